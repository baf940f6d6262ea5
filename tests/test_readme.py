import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.outcomes import results, tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: f"{code.count(chr(10))}-lines")
def test_every_python_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["htl"].tree.is_fitted


def test_every_block_is_of_a_language_that_is_tested():
    assert README.count("\n```") == 2 * (len(blocks("python")) + len(blocks("bash")))
    assert blocks("python")[0].count("\n") <= 20


def test_the_two_commands():
    main_job, tests = (block.strip() for block in blocks("bash"))
    assert main_job == 'pip install ".[benchmarks,with-hooks-cpu]" && python -m benchmarks'
    assert tests == 'pip install ".[dev]" && python -m pytest'
    # CI takes the command from the README, whichever it is.
    assert "grep --max-count=1 'python -m pytest' README.md" in CI and "torch==2.13.0" in CI


def test_the_other_commands_that_it_names_exist():
    for command in set(re.findall(r"python -m benchmarks ([a-z]+)", README)):
        done = subprocess.run([sys.executable, "-m", "benchmarks", command, "--help"], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, command


@pytest.mark.parametrize("path", re.findall(r"<!-- (benchmarks/results/.*json) -->", README))
def test_the_tables_are_those_of_the_results_files(path):
    table = README.split(f"<!-- {path} -->\n")[1].split("<!-- end -->")[0]
    assert table.strip() == tables.markdown_table(results.load(ROOT / path)).strip()


def test_the_table_of_ablations_is_that_of_the_results_files():
    table = README.split("<!-- ablations -->\n")[1].split("<!-- end -->")[0]
    files = sorted((ROOT / "benchmarks" / "results").glob("ablations*.json"))
    assert table.strip() == tables.markdown_ablations([results.load(path) for path in files]).strip()


def test_the_counts_that_it_tells_are_those_of_the_results_files():
    hostile = json.loads((ROOT / "benchmarks" / "results" / "hostile.json").read_text())["machines"]
    calls, refused = (sum(machine[name] for machine in hostile.values()) for name in ("calls", "refused"))
    assert f"they made {calls:,} calls" in README and f"{refused:,} of these were refused or interrupted" in README
    resume = json.loads((ROOT / "benchmarks" / "results" / "resume.json").read_text())
    assert "Sixty trainings" in README and "and twelve killed in the middle" in README
    assert [run["random"] for run in resume["runs"]].count(True) == 60 and len(resume["runs"]) == 72
    assert all(run["equal"] for run in resume["runs"])
