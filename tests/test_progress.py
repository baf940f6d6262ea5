"""What shows how far trainings are, in a terminal and in a log; and that news from worker processes arrive."""

import io
import re

import pytest
from rich.console import Console

from benchmarks.common.progress import News, TrainingsProgress
from benchmarks.training.parallel import tell, workers

from .test_benchmarks import TINY, run_cli


def shown(news, ended=True, **options):
    console = Console(file=io.StringIO(), width=100, **options)
    with TrainingsProgress(console, count=2, iterations=200) as progress:
        for message in news:
            progress.told(message)
        if ended:
            progress.ended("htl, seed 0", "test MAP@R 71.0%")
    return console.file.getvalue()


NEWS = [
    News("htl, seed 0", 1, 0.5, None, evaluated=False),
    News("htl, seed 0", 100, 0.25, 0.5, evaluated=True),
    News("triplet, seed 0", 50, 0.125, None, evaluated=False),
    News("htl, seed 0", 200, 0.1, 0.625, evaluated=True),
]


def test_a_log_has_a_line_for_each_evaluation():
    lines = shown(NEWS).splitlines()
    for line, (done, loss, best) in zip(lines, [(100, "0.25", "50.0%"), (200, "0.1", "62.5%")], strict=False):
        start = f"htl, seed 0: {done} of 200 iterations, loss {loss}, best validation MAP@R {best}"
        assert re.fullmatch(re.escape(start) + r"(; about \d+:\d\d min left for all)?", line)
    assert lines[2:] == ["htl, seed 0: test MAP@R 71.0%"]


def test_a_terminal_has_a_bar_for_each_training():
    text = shown(NEWS, ended=False, force_terminal=True)
    assert "2 trainings" in text and "htl, seed 0" in text and "triplet, seed 0" in text
    assert "loss 0.1, best 62.5%" in text and "200/200" in text and "of 200 iterations" not in text


def test_news_that_come_late_take_nothing_back():
    console = Console(file=io.StringIO(), width=100)
    with TrainingsProgress(console, count=1, iterations=200) as progress:
        progress.told(NEWS[3])
        progress.ended("htl, seed 0", "ended")
        progress.told(NEWS[1])
        assert progress._progress.tasks[0].completed == 200


def told_by_work(data, number):
    tell(number)
    return number + data


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_what_work_tells_arrives(jobs):
    heard = []
    with workers(10, jobs, heard.append) as submit:
        assert [submit(told_by_work, number).result() for number in range(4)] == [10, 11, 12, 13]
    assert sorted(heard) == [0, 1, 2, 3]
    tell("nobody listens any more")
    assert len(heard) == 4


@pytest.mark.slow
def test_a_comparison_shows_how_far_it_is_and_ends_with_a_report(tiny, tmp_path, capsys):
    arguments = ["compare", *TINY, "--methods", "htl", "triplet", "--seeds", 0, 1, "--output"]
    assert run_cli(*arguments, tmp_path / "with") == 0
    out = capsys.readouterr().out
    for title in ("htl, seed 0", "triplet, seed 1"):
        assert re.search(rf"{title}: 2 of 4 iterations, loss [\d.e-]+, best validation MAP@R \d+\.\d%", out)
    page = tmp_path / "with" / "report.html"
    assert f"Open {page.as_uri()}" in out
    text = page.read_text(encoding="utf-8")
    for section in ("results", "retrievals-0", "map-0", "explorer-0"):
        assert f'id="{section}"' in text
    kept = sorted(path.parent.name for path in (tmp_path / "with" / "runs").glob("*/test_embeddings.npy"))
    assert kept == ["htl-seed0", "triplet-seed0"]  # of the first seed alone
    assert run_cli(*arguments, tmp_path / "without", "--no-report") == 0
    assert "Open" not in capsys.readouterr().out
    assert not list((tmp_path / "without").glob("re*.html"))
