"""The speed benchmark: that it measures what it says, and that its results file, table and picture hold together."""

import copy
import json
import time

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import TripletMarginLoss

from benchmarks.__main__ import main
from benchmarks.outcomes import results, tables
from benchmarks.outcomes import timings as report
from benchmarks.speed import cases, measure, scaling
from benchmarks.speed.cases import Case, Contender
from tests.test_benchmarks import run_cli

pytestmark = pytest.mark.filterwarnings("ignore:the tree stays as it is")

SMALL = [
    Case("loss", {"B": 32, "t": 4, "D": 8}),
    Case("smooth loss", {"B": 32, "t": 4, "D": 8}),
    Case("miner", {"B": 40, "t": 4, "D": 8}, "skewed"),
    Case("sampler", {"C": 20, "B": 64}),
    Case("tree", {"C": 60, "D": 8}),
    Case("full refresh", {"C": 30, "N": 420}),
    Case("epoch", {"C": 30, "B": 32}),
]
ROLES = {
    "loss": {"ours", "peer", "floor", "alone"},
    "smooth loss": {"ours", "peer"},
    "miner": {"ours", "peer", "alone"},
    "sampler": {"ours", "peer"},
    "tree": {"ours", "peer", "floor"},
    "full refresh": {"ours", "floor"},
    "epoch": {"ours", "peer"},
}


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """What the command writes for small cases."""
    output = tmp_path_factory.mktemp("speed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.speed.run.cases", lambda parts, large, device: SMALL)
        patch.setattr("benchmarks.speed.run.peak_memory", lambda *args: {"extra_mib": 3.0, "process_mib": 300.0})
        patch.setattr(cases, "EPOCH", 2)
        patch.setattr(measure, "SECONDS", 0.01)
        patch.setattr(measure, "SAMPLE_SECONDS", 0.001)
        with pytest.raises(SystemExit) as done:
            main(["speed", "--threads", "1", "--output", str(output)])
    assert done.value.code == 0 and (output / "speed.png").stat().st_size > 10_000
    return results.load(output / "speed.json")


def test_every_case_has_ours_and_something_to_hold_it_against(document):
    entries = document["measurements"]
    for case in SMALL:
        keys = case.part, case.sizes, case.classes
        found = {entry["role"] for entry in entries if (entry["part"], entry["sizes"], entry["classes"]) == keys}
        assert found == ROLES[case.part]
    assert all(entry["threads"] == 1 and entry["seconds"]["samples"] >= measure.MIN_SAMPLES for entry in entries)
    assert {"commit", "versions", "date", "command"} <= document["metadata"].keys()


def test_the_table_has_the_ratios_of_the_medians(document):
    times = {entry["name"]: entry["seconds"]["median"] for entry in document["measurements"] if entry["part"] == "loss"}
    row, smooth = (cells for cells in report.rows(document) if cells[0].startswith("loss"))
    assert "temperature" in smooth[0] and smooth[2] == "-"  # it is another loss than the peer
    assert row[2] == f"{times['TripletMarginLoss'] / times['HierarchicalTripletLoss']:.3g}"
    ours = times["HierarchicalTripletLoss"]
    first, second = (f"{ours / times[name]:.2f}" for name in ("autograd's Gram matrix", "symmetric Gram matrix"))
    assert row[3] == f"{first} (autograd's), {second} (symmetric)"
    miners = {cells[0]: cells[2] for cells in report.rows(document) if cells[0].startswith("miner")}
    assert [peer == "-" for name, peer in miners.items() if "fitted" in name] == [True]  # it finds other triplets
    assert [peer == "-" for name, peer in miners.items() if "same margin" in name] == [False]
    assert tables.markdown_table(document).count("\n| ") == 1 + sum(
        e["role"] in ("ours", "alone") for e in document["measurements"]
    )


BAD = {
    "list that is not empty": lambda document: document.update(measurements=[]),
    "metadata lack versions": lambda document: document["metadata"].pop("versions"),
    "role": lambda document: document["measurements"][0].update(role="winner"),
    "quartiles": lambda document: document["measurements"][0]["seconds"].update(q1=9e9),
    "MiB": lambda document: document["measurements"][0].update(extra_mib=-1.0),
    "threads should be": lambda document: document["measurements"][0].pop("threads"),
    "stands twice": lambda document: document["measurements"].append(document["measurements"][0]),
}


@pytest.mark.parametrize("message", BAD)
def test_a_file_that_is_not_as_it_should_be_is_refused(document, message, tmp_path):
    changed = copy.deepcopy(document)
    BAD[message](changed)
    (tmp_path / "speed.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=message):
        results.load(tmp_path / "speed.json")


def test_contenders_take_turns_and_seconds_are_of_one_unit_of_work(monkeypatch):
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.001)
    monkeypatch.setattr(measure, "SECONDS", 0.05)
    calls = []

    def contender(name, seconds, repeats):
        def run():
            calls.append(name)
            time.sleep(seconds)

        return Contender(name, "ours", run, repeats)

    found = measure.time_in_turns([contender("one", 0.004, 1), contender("four", 0.004, 4)])
    assert calls[4:10] == ["one", "four"] * 3  # after two calls of each to see how long they take
    assert min(found["one"]) >= 0.004 and min(found["four"]) >= 0.001
    assert np.median(found["one"]) > 2 * np.median(found["four"])  # four units of work take as long as one


@pytest.mark.slow
def test_memory_is_that_of_one_run():
    small, large = (
        measure.peak_memory(Case("loss", {"B": size, "t": 4, "D": 8}), "TripletMarginLoss", "cpu", 1) for size in (64, 256)
    )
    mask = 256**3 / 2**20  # MiB: one byte for each triplet
    assert small["extra_mib"] < mask < large["extra_mib"] < large["process_mib"]


def test_a_contender_that_computes_something_else_stops_the_benchmark(monkeypatch):
    monkeypatch.setattr(cases, "LARGEST_CHECKED", 100)
    monkeypatch.setattr(cases, "cut_levels", lambda edges, heights, thresholds: np.zeros((60, 17)))
    with pytest.raises(RuntimeError, match="not those of scipy"):
        Case("tree", {"C": 60, "D": 8}).contenders("cpu")
    monkeypatch.setattr(cases, "TripletMarginLoss", lambda margin, **kwargs: TripletMarginLoss(margin + 0.1, **kwargs))
    with pytest.raises(RuntimeError, match="differ where they should be equal"):
        SMALL[0].contenders("cpu")
    monkeypatch.setattr(cases.DynamicMarginMiner, "forward", lambda miner, *args: (torch.zeros(1),) * 3)
    with pytest.raises(RuntimeError, match="different triplets"):
        Case("miner", {"B": 40, "t": 4, "D": 8}).contenders("cpu")


def test_the_cases_are_those_that_the_results_are_asked_for():
    found = cases.cases(list(cases.PARTS), large=True, device="cuda")
    assert {case.part for case in found} == set(cases.PARTS)
    assert {case.sizes["C"] for case in found if case.part == "tree"} >= {5_000, 11_318, 100_000, 300_000, 1_000_000}
    assert {case.part for case in found if case.classes == "skewed"} == {"loss", "miner", "sampler", "tree"}
    assert max(case.sizes["C"] for case in cases.cases(["tree"], large=False, device="cpu")) == 100_000


def test_a_device_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit) as done:
        main(["speed", "--device", "cuda:99"])
    assert done.value.code == 2 and "there is no device cuda:99 here" in capsys.readouterr().out


def test_an_unknown_part_is_named(capsys):
    with pytest.raises(SystemExit) as done:
        main(["speed", "--parts", "loss", "tres"])
    assert done.value.code == 2 and "there is no part tres" in capsys.readouterr().out


def test_the_stages_of_a_refresh_are_measured(monkeypatch, tmp_path):
    small = {
        "statistics": [{"N": 40, "C": 4, "D": 3}],
        "shared fit": [{"C": 12, "D": 3}],
        "refresh": [{"N": 12, "C": 3, "D": 256}],
    }
    monkeypatch.setattr(scaling, "SIZES", small)
    assert run_cli("scaling", "--output", tmp_path / "scaling.json") == 0
    document = results.load(tmp_path / "scaling.json")
    document["measurements"][0]["sizes"]["ranks"] = 2  # as if two processes had measured it
    document["measurements"][1]["sizes"]["ranks"] = 2
    results.save(document, tmp_path / "scaling.json")
    assert run_cli("scaling", "--output", tmp_path / "scaling.json") == 0
    found = results.load(tmp_path / "scaling.json")["measurements"]
    assert [(entry["part"], entry["sizes"]["ranks"], entry["role"]) for entry in found] == [
        *(("statistics", ranks, role) for ranks in (2, 1) for role in ("ours", "peer")),
        *((part, 1, role) for part in ("shared fit", "refresh") for role in ("ours", "peer")),
    ]
