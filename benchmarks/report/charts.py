"""The charts of the report, as SVG for a light and a dark page."""

from __future__ import annotations

import io
import textwrap
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from ..outcomes.curves import AXES, mean_curves
from ..outcomes.intervals import interval, test_values
from ..outcomes.results import readable, summarize

# Okabe and Ito's colours, told apart by the colour-blind; black is grey, to be seen on either page.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888", "#B8A800")
STYLES = ("-", "--", ":")
INK = "#808080"
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pml-htl",  # the same file gives the same page
    "font.family": "sans-serif",
    "font.size": 11,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def style_of(titles: list[str]) -> dict[str, tuple[str, str]]:
    """A colour and a line style for each title, the same in all charts."""
    num = len(COLORS)
    return {title: (COLORS[place % num], STYLES[place // num % len(STYLES)]) for place, title in enumerate(titles)}


def short(title: str) -> str:
    """A long title, one with many settings, in several lines and with short numbers."""
    return textwrap.fill(readable(title).replace(",", ", "), 34, break_long_words=False)


def ranking(document: dict[str, Any]) -> str:
    """Test MAP@R of every method with its interval and its seeds, the best on top."""
    values = test_values(document)
    titles = list(summarize(document).title)
    with plt.rc_context(RC):
        figure, ax = plt.subplots(figsize=(8.4, 0.8 + 0.34 * len(titles)), layout="constrained")
        for place, title in enumerate(titles):
            seeds = 100 * values[title].dropna()
            found = interval(seeds)
            color = COLORS[0] if title.startswith("htl") else COLORS[6]
            ax.errorbar(found.mean, place, xerr=found.half if found.count > 1 else 0, fmt="o", color=color, capsize=4, ms=7)
            ax.plot(seeds, [place] * len(seeds), "|", color=color, alpha=0.6, ms=10)
        ax.set_yticks(range(len(titles)), map(short, titles))
        ax.invert_yaxis()
        ax.set_xlabel("test MAP@R, per cent: mean, 95% interval, seeds")
        return finish(figure, ax)


def curves(document: dict[str, Any], over: str) -> str | None:
    """Validation MAP@R over "iterations" or "seconds", in a band from worst to best seed; None without such points."""
    steps = mean_curves(document, over)
    if steps.empty:
        return None
    styles = style_of(list(summarize(document).title))
    with plt.rc_context(RC):
        figure, ax = plt.subplots(figsize=(10, 5), layout="constrained")
        for title, (color, line) in styles.items():
            curve = steps[steps.title == title]
            width = 2.8 if title == "htl" else 1.6
            ax.plot(curve["at"], 100 * curve["mean"], line, color=color, label=short(title), marker="o", ms=3, lw=width)
            ax.fill_between(curve["at"], 100 * curve["low"], 100 * curve["high"], color=color, alpha=0.1, lw=0)
        ax.set(xlabel=AXES[over], ylabel="validation MAP@R, per cent")
        ax.set_xlim(left=0)
        figure.legend(loc="outside right upper", frameon=False, labelcolor=INK)
        return finish(figure, ax)


def cost(document: dict[str, Any]) -> str:
    """Seconds of 100 iterations, for training and for refreshing the tree."""
    summary = summarize(document)
    names = summary.title.map(short)
    trained, refreshed = (100 * summary[part] / summary.iterations for part in ("train_seconds", "refresh_seconds"))
    with plt.rc_context(RC):
        figure, ax = plt.subplots(figsize=(8.4, 0.9 + 0.32 * len(summary)), layout="constrained")
        ax.barh(names, trained, color=COLORS[0], label="training")
        ax.barh(names, refreshed, left=trained, color=COLORS[1], label="refresh")
        ax.invert_yaxis()
        ax.set_xlabel("seconds of 100 iterations")
        figure.legend(loc="outside right upper", frameon=False, labelcolor=INK)
        return finish(figure, ax)


def finish(figure: Any, ax: Any) -> str:
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
