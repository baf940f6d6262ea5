"""The comparison under torchrun: two processes train one model, and one results file comes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.outcomes import results

from ..miniature import folder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def torchrun(module, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", module]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    images = tmp_path_factory.mktemp("images")
    folder(images)
    return [
        *("compare", "--data", f"folder:{images}", "--image-size", 16, "--iterations", 4, "--epoch-iterations", 2),
        *("--batch-size", 16, "--embedding-size", 8),
    ]


def test_a_comparison_and_what_it_refuses(plan, tmp_path):
    methods = [
        "htl:neighborhood_size=2,samples_per_class=2", "htl-streaming:neighborhood_size=2,samples_per_class=2",
        "triplet-semihard:samples_per_class=2", "proxy-anchor:samples_per_class=2",
    ]  # fmt: skip
    arguments = [*plan, "--methods", *methods, "--seeds", 0, "--output", tmp_path / "compared"]
    done = torchrun("benchmarks", *arguments)
    assert done.returncode == 0, done.stderr
    document = results.load(tmp_path / "compared" / "results.json")
    assert document["metadata"]["plan"]["processes"] == 2 and document["metadata"]["plan"]["batch_size"] == 16
    assert [run["method"] for run in document["runs"] if run["split"] == "test"] == [m.partition(":")[0] for m in methods]
    assert done.stdout.count("htl:samples_per_class=2,neighborhood_size=2, seed 0: test MAP@R") == 1  # one of them prints

    refused = [
        (["--jobs", 2, "--methods", "triplet"], "torchrun several processes of one"),
        (["--methods", "htl:neighborhood_size=8,samples_per_class=2"], "2 processes cannot share 1 anchors evenly"),
        (["--methods", "triplet:samples_per_class=16"], "2 processes cannot share 1 classes evenly"),
    ]
    commands = [arguments, *([*plan, *wrong, "--output", tmp_path / "refused"] for wrong, _ in refused)]
    done = torchrun("tests.distributed.commands", tmp_path, json.dumps([list(map(str, each)) for each in commands]))
    assert done.returncode != 0  # that of the last
    (again, *ends), *others = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert again[0] == 0 and "4 of 4 runs are in" in again[1], done.stderr  # nothing is missing
    for (code, printed), (_, message) in zip(ends, refused, strict=True):
        assert code != 0 and message in printed
    assert [code for code, _ in others[0]] == [0, *(code for code, _ in ends)]
    assert not (tmp_path / "refused" / "results.json").exists()
