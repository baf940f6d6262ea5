"""Tables of several results files: what the sampler brings, whether the first tree tells, and the order of methods."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import __main__ as cli
from benchmarks.methods.ablations import ABLATIONS
from benchmarks.methods.contenders import METHODS, parse_contender
from benchmarks.outcomes import results, sampling, signs

METADATA = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "speed.json").read_text())["metadata"]


def made(values, name="glyphs", nearness=None, **plan):
    """The document of a comparison whose contenders reach these accuracies, one a seed."""
    metadata = {
        **METADATA,
        "plan": {"batch_size": 128, "iterations": 2000, **plan},
        "data": {"name": name, "train_classes": 1000, "train_images": 6000, "test_classes": 500},
        "sessions": [],
    }
    document = {"metadata": metadata, "runs": [], "curves": []}
    for text, accuracies in values.items():
        contender = parse_contender(text)
        for seed, accuracy in enumerate(accuracies):
            shared = {"method": contender.method.name, "seed": seed, "settings": contender.settings}
            run = {"iterations": 2000, "train_seconds": 1.0, "refresh_seconds": 0.0}
            run |= dict.fromkeys(("map_at_r", "precision_at_1", "r_precision"), accuracy)
            document["runs"] += [{**shared, **run, "split": split} for split in ("validation", "test")]
            curve = {"iterations": [2000], "map_at_r": [accuracy], "seconds": [1.0]}
            if nearness and contender.settings["sampling"] == "neighbors":
                curve["nearness"] = {"first": nearness, "last": nearness}
            document["curves"].append({**shared, **curve})
    results.validate(document)
    return document


def nearness_of(nearest, share):
    return {"spread": 0.2, "nearest": [nearest / 2, nearest, nearest, nearest, nearest], "levels": [share, 0.1, 0.9 - share]}


def run_cli(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.fixture
def files(tmp_path):
    near = {"triplet": [0.5, 0.6], "triplet-sampling": [0.7, 0.84], "htl-margin": [0.5, 0.6], "htl": [0.6, 0.7]}
    far = {"triplet": [0.5, 0.6], "triplet:sampling=neighbors": [0.51, 0.59], "ntxent": [0.4, 0.5]}
    middle = {"triplet": [0.5, 0.6], "triplet-sampling": [0.55, 0.65]}
    documents = {
        "near.json": made(near, "hangul", nearness_of(0.5, 0.6)),
        "far.json": made(far, "glyphs", nearness_of(2.0, 0.1), samples_per_class=6),
        "middle.json": made(middle, "kanji", nearness_of(1.0, 0.3), wrong_labels=0.05),
    }
    for name, document in documents.items():
        (tmp_path / name).write_text(json.dumps(document))
    return {name: tmp_path / name for name in documents}


def test_pairs_are_found_by_name_and_by_settings(files):
    found = {name: sampling.pairs(results.load(path)) for name, path in files.items()}
    assert found == {
        "near.json": {"triplet": "triplet-sampling", "htl-margin": "htl"},
        "far.json": {"triplet": "triplet:sampling=neighbors"},
        "middle.json": {"triplet": "triplet-sampling"},
    }
    # A method keeps its pair under other settings, and is no pair of another method's.
    tuned = made({"ntxent:temperature=0.2": [0.5, 0.6], "supcon": [0.5, 0.6], "ntxent-sampling": [0.7, 0.7]})
    assert sampling.pairs(tuned) == {}
    for run in (*tuned["runs"], *tuned["curves"]):
        run["label"] = run["method"]
    assert sampling.pairs(tuned) == {"ntxent": "ntxent-sampling"}


def test_what_sampling_brings(files, capsys):
    assert run_cli("table", "--view", "sampling", *files.values()) == 0
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in capsys.readouterr().out.splitlines()[:4]]
    assert lines[0][1:] == [
        "hangul, 1,000 classes, 6 samples, 2,000 iterations",
        "glyphs, 1,000 classes, 6 samples, 2,000 iterations",
        "kanji, 1,000 classes, 6 samples, wrong labels 0.05, 2,000 iterations",
    ]
    half = stats.t.ppf(0.975, 1) * np.std([20, 24], ddof=1) / np.sqrt(2)
    assert [line[0] for line in lines[2:]] == ["htl-margin", "triplet"]  # in the order of the mean gain
    assert lines[3][1] == f"+22.0 ± {half:.1f}" and lines[3][2].startswith("+0.0 ± ") and lines[2][2] == "-"


def test_files_of_the_same_plan_and_data_share_a_column(files):
    near = results.load(files["near.json"])
    more = made({"ntxent": [0.5, 0.6], "ntxent-sampling": [0.7, 0.8]}, "hangul")
    longer = made({"ntxent": [0.5, 0.6], "ntxent-sampling": [0.6, 0.7]}, "hangul", iterations=6000)
    heads, rows, _ = sampling.gain_table([near, more, longer])
    assert [head.split(", ")[-1] for head in heads] == ["method", "2,000 iterations", "6,000 iterations"]
    assert {row[0]: [cell[:5] for cell in row[1:]] for row in rows} == {
        "triplet": ["+22.0", "-"],
        "ntxent": ["+20.0", "+10.0"],
        "htl-margin": ["+10.0", "-"],
    }
    # Files that differ in anything else of the plan are not mixed, though their heads are the same.
    other = made({"ntxent": [0.5, 0.6], "ntxent-sampling": [0.7, 0.8]}, "hangul", network="conv_net")
    heads, rows, _ = sampling.gain_table([near, other])
    assert heads[1] == heads[2] and [row[1:].count("-") for row in rows] == [1, 1, 1]
    # Which of two measurements of one loss is meant, nobody can tell: both are shown.
    heads, rows, _ = sampling.gain_table([near, results.only(near, ["triplet", "triplet-sampling"])])
    assert heads[1] == heads[2] and [len([cell for cell in row[1:] if cell != "-"]) for row in rows] == [2, 1]


def test_methods_on_several_sets(files, tmp_path, capsys):
    fewer, longer = tmp_path / "fewer.json", tmp_path / "longer.json"
    document = made({"triplet": [0.5], "ntxent": [0.75, 0.85], "htl": [0.6, 0.7]}, "kanji")
    fewer.write_text(json.dumps(document))
    assert run_cli("table", "--view", "sets", files["near.json"], fewer) == 0
    *table, _, caption = capsys.readouterr().out.splitlines()
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table]
    assert lines[0][1:] == [f"{name}, 1,000 classes, 6 samples" for name in ("hangul", "kanji")]
    assert "mean over the seeds (2,000 iterations, 2 seeds); in brackets: less that of htl" in caption
    # Those in both files first, each part in the order of the means; less htl seed by seed; a mean of fewer seeds says so.
    assert [line[0] for line in lines[2:]] == ["htl", "triplet", "ntxent", "triplet-sampling", "htl-margin"]
    assert lines[2][1:] == ["65.0", "65.0"] and lines[3][1:] == ["55.0 (-10.0 ± 0.0)", "50.0, of 1"]
    half = stats.t.ppf(0.975, 1) * np.std([10, 14], ddof=1) / np.sqrt(2)
    assert lines[4][1:] == ["-", "80.0 (+15.0 ± 0.0)"] and lines[5][1:] == [f"77.0 (+12.0 ± {half:.1f})", "-"]
    # Two files of one training set share a column, and each may have some of the methods that are asked for.
    more = tmp_path / "more.json"
    more.write_text(json.dumps(made({"supcon": [0.5, 0.6]}, "kanji")))
    chosen = ["--methods", "htl", "supcon", "htl-margin"]
    assert run_cli("table", "--view", "sets", files["near.json"], fewer, more, *chosen) == 0
    *table, _, caption = capsys.readouterr().out.splitlines()
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table]
    assert [line[0] for line in lines[2:]] == ["htl", "htl-margin", "supcon"] and len(lines[0]) == 3
    assert lines[4][2] == "55.0 (-10.0 ± 0.0)"  # less the baseline of the other file
    assert run_cli("table", "--view", "sets", fewer, more, "--methods", "htl") == 2
    assert "more.json has none of htl; it has supcon" in capsys.readouterr().out.replace("\n", "")
    document["metadata"]["plan"]["iterations"] = 6000
    longer.write_text(json.dumps(document))
    assert run_cli("table", "--view", "sets", fewer, longer) == 0
    shown = capsys.readouterr().out  # what all columns share stands in the caption alone
    assert "| kanji, 1,000 classes, 6 samples, 6,000 iterations |" in shown and "over the seeds (2 seeds); in" in shown
    third = tmp_path / "third.json"
    third.write_text(json.dumps(made({"htl": [0.6, 0.7, 0.8]}, "glyphs")))
    assert run_cli("table", "--view", "sets", longer, third) == 0
    shown = capsys.readouterr().out
    assert "| glyphs, 1,000 classes, 6 samples, 2,000 iterations, 3 seeds |" in shown and "over the seeds; in" in shown


def test_whether_the_first_tree_tells(files, capsys):
    assert run_cli("table", "--view", "nearness", *files.values()) == 0
    *table, _, caption = capsys.readouterr().out.splitlines()
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table]
    assert lines[0][1] == "method" and "gain: the same on the test classes" in caption
    # A row for each loss of each file, the largest gain first, and the order of all of them.
    found = [(line[0].split(",")[0], line[1], line[-1].split(" ")[0]) for line in lines[2:6]]
    assert found == [
        ("hangul", "triplet-sampling", "+22.0"),
        ("hangul", "htl", "+10.0"),
        ("kanji", "triplet-sampling", "+5.0"),
        ("glyphs", "triplet:sampling=neighbors", "+0.0"),
    ]
    assert lines[2][2:6] == ["0.50", "0.25", "0.60", "0.70"]
    assert lines[2][6:9] == ["+22.0"] * 3  # on the validation classes, which reach the same here
    order = stats.spearmanr([0.5, 0.5, 1.0, 2.0], [22, 10, 5, 0]).statistic
    shown = [*2 * [f"{order:+.2f}"], *2 * [f"{-order:+.2f}"], *3 * ["+1.00"]]
    assert lines[6] == ["**rank correlation with the gain**", "all", *shown, "-"]
    assert len(lines) == 7  # no loss is in three files


def test_whether_the_first_tree_tells_of_one_loss(files, capsys):
    alone = ["--methods", "triplet", "triplet-sampling"]
    far = made({"triplet": [0.5, 0.6], "triplet-sampling": [0.4, 0.6]}, "kanji", nearness_of(2.5, 0.1))
    third = files["near.json"].parent / "third.json"
    third.write_text(json.dumps(far))
    assert run_cli("table", "--view", "nearness", files["near.json"], files["middle.json"], third, *alone) == 0
    line = capsys.readouterr().out.splitlines()[5]
    shown = " | ".join(["-1.00", "-1.00", *5 * ["+1.00"]])
    assert line == f"| **rank correlation with the gain** | triplet-sampling | {shown} | - |"


def test_the_gain_on_the_validation_classes_during_a_training(files):
    document = results.load(files["middle.json"])
    for curve, points in zip(document["curves"], ([0.1, 0.4], [0.3, 0.5], [0.2, 0.7], [0.5, 0.6]), strict=True):
        curve.update(iterations=[1000, 2000], map_at_r=points)
    document["curves"].append({**document["curves"][0], "seed": 7, "map_at_r": [0.9, 0.9]})  # of one of both alone
    for share, gain in ((0.25, 15), (0.5, 15), (1.0, 20)):
        assert signs.validation_gain(document, "triplet", "triplet-sampling", share) == pytest.approx(gain)


def test_whether_methods_stand_in_the_same_order(files, capsys):
    assert run_cli("table", "--view", "order", files["near.json"], files["middle.json"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "| near | middle | 2 | 1.00 |"


def test_views_of_other_files_are_refused(files, tmp_path, capsys):
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps(made({"triplet": [0.5, 0.6]})))
    speed = Path(__file__).parents[1] / "benchmarks" / "results" / "speed.json"
    treeless = tmp_path / "treeless.json"
    treeless.write_text(json.dumps(made({"triplet": [0.5, 0.6], "triplet-sampling": [0.5, 0.6]})))
    for view, file, message in [
        ("nearness", treeless, "needs trainings with our sampler that keep facts of their first tree"),
        ("nonsense", alone, "view must be one of ablations, sets, sampling, nearness, order, twins, but it is 'nonsense'"),
        ("sampling", alone, "needs methods with both samplers"),
        ("ablations", alone, "these files answer no question"),
        ("order", speed, "of comparisons and tunings"),
        ("ablations", speed, "the view ablations is of comparisons"),
    ]:
        assert run_cli("table", "--view", view, file) == 2
        assert message in " ".join(capsys.readouterr().out.split())


def test_a_picture_of_some_methods(files, tmp_path, capsys):
    picture = tmp_path / "curves.png"
    for over in ("iterations", "seconds"):
        picture.unlink(missing_ok=True)
        assert run_cli("plot", files["near.json"], picture, "--methods", "triplet", "htl", "--over", over) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
    speed = Path(__file__).parents[1] / "benchmarks" / "results" / "speed.json"
    untimed = json.loads(files["near.json"].read_text())
    for curve in untimed["curves"]:
        del curve["seconds"]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(untimed))
    for file, output, over, message in [
        (speed, picture, "iterations", "plot is of comparisons"),
        (files["near.json"], tmp_path / "curves.txt", "iterations", "should be a .png or .svg"),
        (files["near.json"], picture, "epochs", "a curve is over iterations or seconds, not 'epochs'"),
        (old, picture, "seconds", "no training in this file has seconds"),
    ]:
        assert run_cli("plot", file, output, "--over", over) == 2
        assert message in " ".join(capsys.readouterr().out.split())


def test_questions_about_the_length_of_a_training(tmp_path, capsys):
    """Each length is a file of its own, and 2,000 iterations are the usual ones."""
    assert {method: METHODS[method].defaults["sampling"] for method in ("triplet", "htl-constant")} == {
        "triplet": "per-class",
        "htl-constant": "neighbors",
    }
    paths = []
    for iterations in (4000, 500, 2000):
        contenders = ABLATIONS["length"].contenders
        document = made({text: [0.5 + iterations / 1e5] * 2 for text in contenders}, iterations=iterations)
        paths.append(tmp_path / f"{iterations}.json")
        paths[-1].write_text(json.dumps(document))
    assert run_cli("table", "--view", "ablations", *paths) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ")[0].strip("| ") for line in lines[2:-2]]
    assert rows[0] == "**anchor-neighbour sampling over the length of a training**"
    assert [row for row in rows if row.startswith("triplet,")] == [f"triplet, iterations {n}" for n in (500, 2000, 4000)]
    (line,) = [line for line in lines if line.startswith("| triplet:sampling=neighbors, iterations 500 ")]
    assert line.endswith("| 50.5 ± 0.0 | +0.0 ± 0.0 | triplet |")
