"""What the READMEs say is so: code blocks run, tables are those of the results files, links and commands lead somewhere."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as cli

ROOT = Path(__file__).parents[1]
READMES = {
    path: (ROOT / path).read_text(encoding="utf-8")
    for path in ("README.md", "pml_htl/README.md", "benchmarks/README.md", "tests/README.md")
}
README = READMES["README.md"]
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
LINK = re.compile(r"(?<!`)\[[^\]]+\]\(([^)\s]+)\)")
TABLE = re.compile(r"<!-- (python -m benchmarks table .*?) -->\n(.*?)<!-- end -->", re.DOTALL)


def blocks(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def everywhere(pattern):
    return sorted({found for text in READMES.values() for found in re.findall(pattern, text)})


def run_cli(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return stop.value.code


def anchors(text):
    """Those that headings get on a repository's page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, id=f"{path}-{number}")
        for path, text in READMES.items()
        for number, code in enumerate(blocks("python", text))
    ],
)
def test_every_python_block_runs(code, tmp_path, monkeypatch):
    for engine in ("accelerate", "transformers"):
        if f"from {engine} import" in code:
            pytest.importorskip(engine)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["htl"].tree.is_fitted


def test_every_block_is_of_a_language_that_is_tested():
    for text in READMES.values():
        assert text.count("\n```") == 2 * (len(blocks("python", text)) + len(blocks("bash", text)))
    assert blocks("python", README)[0].count("\n") <= 20


def test_the_two_commands():
    main_job, tests = (block.strip() for text in READMES.values() for block in blocks("bash", text))
    assert main_job == 'pip install ".[benchmarks,with-hooks-cpu]" && python -m benchmarks'
    assert tests == 'pip install ".[dev]" && python -m pytest'
    # CI takes the command from the README, whichever it is.
    assert "grep --max-count=1 'python -m pytest' README.md" in CI and "torch==2.13.0" in CI


def test_contributors_are_told_what_ci_checks():
    (checks,) = set(re.findall(r"`(ruff check [^`]*)`", README))
    assert checks in CI


@pytest.mark.parametrize("command", everywhere(r"-m benchmarks ([a-z]+)"))
def test_the_commands_of_the_benchmarks_exist(command, capsys):
    assert run_cli(command, "--help") == 0
    assert command in capsys.readouterr().out


@pytest.mark.parametrize("module", everywhere(r"python -m tests\.([a-z_.]+)"))
def test_the_commands_of_the_tests_exist(module):
    path = ROOT / "tests" / module.replace(".", "/")
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize("path", READMES)
def test_the_links_resolve(path):
    targets = LINK.findall(READMES[path])
    assert targets
    for target in targets:
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (ROOT / path).parent / file if file else ROOT / path
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("path", everywhere(r"`((?:pml_htl|benchmarks|tests)/[\w./-]+)`"))
def test_the_files_that_are_named_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "command, table", [pytest.param(*found, id=found[0]) for t in READMES.values() for found in TABLE.findall(t)]
)
def test_the_tables_are_those_of_the_results_files(command, table, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run_cli(*shlex.split(command)[3:]) == 0
    assert table.strip() == capsys.readouterr().out.strip()


def test_every_table_of_numbers_is_generated():
    by_hand = [line for text in READMES.values() for line in TABLE.sub("", text).splitlines() if " ± " in line]
    assert by_hand == []
    assert len(TABLE.findall(README)) == 1 and TABLE.findall(README)[0][1].count("\n| ") <= 2 + 6


def test_the_readme_is_short():
    assert len(README.encode()) <= 10_240


def test_the_counts_that_are_told_are_those_of_the_results_files():
    told = " ".join(READMES["tests/README.md"].split())
    hostile = json.loads((ROOT / "benchmarks" / "results" / "hostile.json").read_text())["machines"]
    calls, refused = (sum(machine[name] for machine in hostile.values()) for name in ("calls", "refused"))
    assert f"they made {calls:,} calls" in told and f"{refused:,} of these were refused or interrupted" in told
    resume = json.loads((ROOT / "benchmarks" / "results" / "resume.json").read_text())
    assert "Sixty trainings" in told and "and twelve killed in the middle" in told
    assert [run["random"] for run in resume["runs"]].count(True) == 60 and len(resume["runs"]) == 72
    assert all(run["equal"] for run in resume["runs"])
