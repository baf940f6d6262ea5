"""The table of a comparison, for the terminal and for the README."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

from rich import box
from rich.table import Table

from ..methods.ablations import ABLATIONS, Ablation
from ..methods.contenders import BASELINE, parse_contender
from ..training.train import Plan
from . import sampling, sets, signs, study, timings, twins
from .intervals import differences, interval, test_values, with_interval
from .results import readable, summarize

BEHIND = ("R-Prec.", "val.", "train", "refresh")


def columns(document: dict[str, Any]) -> tuple[str, ...]:
    """The heads of the table; with recalls these instead of P@1, which is the first of them."""
    paired = [f"vs {BASELINE}"] if differences(document) else []
    return "method", "MAP@R", *paired, *(recalls_of(document) or ["P@1"]), *BEHIND


def recalls_of(document: dict[str, Any]) -> list[str]:
    return [f"R@{k}" for k in document["runs"][0].get("recall", {})]


def rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table, sorted by test MAP@R; accuracies in per cent, seconds per run."""
    paired, values = differences(document), test_values(document)
    return [
        (
            row["title"],
            with_interval(interval(values[row["title"]].dropna())),
            *([with_interval(paired[row["title"]], sign="+") if row["title"] in paired else "-"] if paired else []),
            *(percent(row[name]) for name in recalls_of(document) or ["precision_at_1"]),
            percent(row["r_precision"]),
            percent(row["validation"]),
            f"{row['train_seconds']:.0f} s",
            f"{row['refresh_seconds']:.0f} s" if row["refresh_seconds"] else "-",
        )
        for row in summarize(document).to_dict("records")
    ]


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def caption(document: dict[str, Any]) -> str:
    """What the numbers are of."""
    paired = f"; vs {BASELINE}: paired difference over the seeds" if differences(document) else ""
    return f"{caption_of_trainings(document)}; val.: MAP@R on the validation classes{paired}"


def caption_of_trainings(document: dict[str, Any]) -> str:
    summary, data = summarize(document), document["metadata"]["data"]
    count = summary.seeds.max()
    fewer = [f"{title}: {own}" for title, own in zip(summary.title, summary.seeds, strict=True) if own < count]
    of = f"{count} seeds ({', '.join(fewer)})" if fewer else f"{count} seeds"
    seeds = f"mean of {of} ± half the width of its 95% confidence interval" if count > 1 else "one seed"
    batch = document["metadata"]["plan"]["batch_size"]
    training = f"{summary.iterations[0]} iterations at batch size {batch}, {seeds}"
    classes = f"{data['name']}, {data['test_classes']} unseen classes"
    return f"{classes}, {training}, in per cent"


def rich_table(document: dict[str, Any]) -> Table:
    """For the terminal; the best is in bold."""
    heads, cells_of_rows, title = contents(document)
    return narrow_table(heads, cells_of_rows, title, bold_first=True)


def rich_ablation_table(name: str, document: dict[str, Any]) -> Table:
    """One question, for the terminal."""
    return narrow_table(ABLATION_HEADS, ablation_rows(ABLATIONS[name], document), caption_of_trainings(document))


def narrow_table(heads: tuple[str, ...], rows: list[tuple[str, ...]], title: str, *, bold_first: bool = False) -> Table:
    """As narrow as can be, for 80 columns."""
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        title_style="italic",
        header_style="bold",
    )
    for number, head in enumerate(heads):
        # Where it gets narrow, long titles break and numbers do not.
        number_like = is_number(number, heads)
        width = None if number else 20
        justify: Literal["right", "left"] = "right" if number_like else "left"
        table.add_column(head, justify=justify, no_wrap=number_like, overflow="fold", min_width=width)
    for number, (first, *others) in enumerate(rows):
        cells = (readable(first), *others)
        table.add_row(*(cell.replace(" ± ", "±") for cell in cells), style="bold" if bold_first and number == 0 else None)
    return table


def markdown_table(document: dict[str, Any]) -> str:
    """For the README: of a comparison, a tuning or the speed benchmark."""
    if "measurements" in document:
        return timings.markdown_table(document)
    heads, cells_of_rows, title = contents(document)
    return markdown_lines(heads, cells_of_rows) + f"\n\n{title}\n"


VIEWS = ("ablations", "sets", "sampling", "nearness", "order", "twins")  # of several files in one table


def markdown_view(view: str, documents: dict[str, dict[str, Any]]) -> str:
    """For the README: one of `VIEWS` of some files, by their names."""
    if view not in VIEWS:
        raise ValueError(f"view must be one of {', '.join(VIEWS)}, but it is {view!r}")
    of = ("runs", "studies") if view == "order" else ("runs",)
    if not all(any(kind in document for kind in of) for document in documents.values()):
        what = "comparisons" + " and tunings" * (view == "order")
        raise ValueError(f"the view {view} is of {what}, and a file is of something else")
    if view == "ablations":
        heads, rows, title = ablation_table(list(documents.values()))
    elif view == "sets":
        heads, rows, title = sets.sets_table(list(documents.values()))
    elif view == "order":
        heads, rows, title = sampling.order_table(documents)
    elif view == "twins":
        heads, rows, title = twins.twin_table(list(documents.values()))
        if not rows:
            raise ValueError("the view twins needs trainings with --split-classes, and no file has any with a tree")
    else:
        if not all(sampling.pairs(document) for document in documents.values()):
            raise ValueError(f"the view {view} needs methods with both samplers, and a file has none")
        table = sampling.gain_table if view == "sampling" else signs.nearness_table
        heads, rows, title = table(list(documents.values()))
    return markdown_lines(heads, rows) + f"\n\n{title}\n"


def ablation_table(documents: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Heads, cells and caption: the questions that these files of `ablate` answer, one after another, set by set."""
    rows: list[tuple[str, ...]] = []
    used: list[dict[str, Any]] = []
    for ablation in ABLATIONS.values():
        answering = [document for changes in ablation.plans for document in documents if fits(ablation, document, changes)]
        if answering:
            answers = [row for document in answering for row in ablation_rows(ablation, document)]
            rows += [(f"**{ablation.question}**", "", "", ""), *answers]
            used += answering
    if not rows:
        raise ValueError("these files answer no question of `python -m benchmarks ablate` as a whole")
    return ABLATION_HEADS, rows, "; ".join(dict.fromkeys(caption_of_trainings(document) for document in used))


def markdown_lines(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    rule = tuple("---:" if is_number(number, heads) else "---" for number in range(len(heads)))
    shown = ((readable(first), *others) for first, *others in rows)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *shown))


ABLATION_HEADS = ("method and settings", "MAP@R", "difference", "settings compared with")


def fits(ablation: Ablation, document: dict[str, Any], changes: dict[str, Any]) -> bool:
    """Whether a file has the trainings of an ablation with these changes of the plan."""
    wanted = {**changes_of(ablation, {}), **changes}
    titles = {parse_contender(text).title for text in ablation.contenders}
    return changes_of(ablation, document["metadata"]["plan"]) == wanted and titles <= set(test_values(document))


def changes_of(ablation: Ablation, plan: dict[str, Any]) -> dict[str, Any]:
    """What an ablation varies, as it is in a plan; its default where the plan does not tell."""
    defaults = {field.name: field.default for field in fields(Plan)}
    return {name: plan.get(name, defaults[name]) for changes in ablation.plans for name in changes}


def ablation_rows(ablation: Ablation, document: dict[str, Any]) -> list[tuple[str, ...]]:
    """Title, test MAP@R, difference seed by seed, and to which: of every contender, in the order of the question."""
    values = test_values(document)
    rows: list[tuple[str, ...]] = []
    for text in ablation.contenders:
        title, other = parse_contender(text).title, parse_contender(ablation.baseline_of(text)).title
        varied = changes_of(ablation, document["metadata"]["plan"])
        shown = ", ".join([title, *(f"{name.replace('_', ' ')} {value}" for name, value in varied.items() if value)])
        gain = "-"
        if other in values and other != title:
            gain = with_interval(interval((values[title] - values[other]).dropna()), sign="+")
        rows.append((shown, with_interval(interval(values[title].dropna())), gain, other if gain != "-" else "-"))
    return rows


def contents(document: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Heads, cells and caption."""
    if "studies" in document:
        return study.COLUMNS, study.rows(document), study.caption(document)
    return columns(document), rows(document), caption(document)


def is_number(number: int, heads: tuple[str, ...]) -> bool:
    return number > 0 and heads[number] != "method" and not heads[number].startswith("settings")
