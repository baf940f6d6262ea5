import copy
import hashlib
import json
import os
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import pytest
import torch
from pytorch_metric_learning.losses import NTXentLoss

from benchmarks import __main__ as cli
from benchmarks import data
from benchmarks.commands import train as commands
from benchmarks.commands.app import spread_lists
from benchmarks.comparison import compare as comparing
from benchmarks.data.splits import LabelledImages
from benchmarks.methods.by_name import ClassMethod
from benchmarks.methods.contenders import METHODS, NTXent, parse_contender
from benchmarks.methods.method import Task
from benchmarks.outcomes import results, tables
from benchmarks.training.networks import Augment, make_network
from benchmarks.training.precision import fast_precision
from benchmarks.training.train import Plan, make_optimizers, make_schedulers, train

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
OTHERS = ("class_tree.json", "hostile.json", "resume.json")  # these are no results of a comparison
COMMITTED = sorted(path for path in RESULTS.glob("*.json") if path.name not in OTHERS)
TINY = ["--data", "tiny", "--iterations", "4", "--epoch-iterations", "2", "--batch-size", "32", "--embedding-size", "16"]


def has_tree(name):
    """A margin or a sampler needs one."""
    return name.startswith("htl") or name.endswith("-sampling")


def run_cli(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(map(str, arguments)))
    return stop.value.code


def test_glyphs(glyphs):
    assert 1300 < len(glyphs.class_names) < 1450
    names = set(glyphs.class_names)
    assert {"e", "é", "ê", "ë", "A", "B"} <= names
    assert not names & {"Α", "А", "ё"}  # Greek and Cyrillic A look like the Latin one
    for part in (glyphs.train, glyphs.val, glyphs.test):
        assert part.images.shape[1:] == (1, 32, 32) and part.images.dtype == torch.uint8
        counts = part.labels.bincount()[part.labels.min() :]
        assert 10 <= counts.min() and counts.max() <= 16
        ink = part.images.flatten(1) / 255
        assert ink.min() == 0 and ink.max() == 1 and (ink.amax(dim=1) > 0.2).all()  # no empty image
        edges = part.images / 255
        edges[..., 1:-1, 1:-1] = 0
        assert (edges.flatten(1).amax(dim=1) > 0.5).float().mean() < 0.02  # letters are not cut off


def test_the_split_is_fixed_and_by_class(glyphs):
    parts = [set(part.labels.tolist()) for part in (glyphs.train, glyphs.val, glyphs.test)]
    num_classes = len(glyphs.class_names)
    assert set.union(*parts) == set(range(num_classes)) and sum(map(len, parts)) == num_classes
    assert parts[0] == set(range(len(parts[0])))  # classes of the training come first
    assert len(parts[2]) == round(num_classes / 2) and len(parts[1]) == round(0.2 * (num_classes - len(parts[2])))
    images = LabelledImages(torch.zeros(9, 1), torch.arange(9))
    names = data.splits.split_by_class("x", images, list("abcdefghi")).class_names
    assert hashlib.sha256("".join(names).encode()).hexdigest()[:8] == "e30a5577"


def test_few_samples_a_class(glyphs):
    few, again = data.capped(glyphs, 5), data.capped(glyphs, 5)
    assert (few.train.labels.bincount() == 5).all() and torch.equal(few.train.images, again.train.images)
    assert few.val is glyphs.val and few.test is glyphs.test and few.class_names == glyphs.class_names
    for label in (0, 17, 300):
        whole = {image.numpy().tobytes() for image in glyphs.train.images[glyphs.train.labels == label]}
        chosen = {image.numpy().tobytes() for image in few.train.images[few.train.labels == label]}
        assert chosen < whole
    enough = data.capped(glyphs, 99)
    assert len(enough.train) == len(glyphs.train)


def test_hardly_a_picture_stands_in_two_classes(glyphs):
    """Letters that look alike in one font are one class; those that do across fonts are few."""
    where = {}
    for part in (glyphs.train, glyphs.val, glyphs.test):
        for image, label in zip(part.images, part.labels.tolist(), strict=True):
            where.setdefault(image.numpy().tobytes(), set()).add(label)
    shared = sum(len(labels) > 1 for labels in where.values())
    assert shared < 0.01 * len(where)


def test_augmentation():
    images = torch.rand(8, 1, 32, 32)
    augment = Augment(torch.Generator().manual_seed(0))
    assert augment.eval()(images) is images
    changed = augment.train()(images)
    assert changed.shape == images.shape and all((a - b).abs().mean() > 0.01 for a, b in zip(changed, images, strict=True))
    again = Augment(torch.Generator().manual_seed(0)).train()(images)
    assert torch.equal(changed, again)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_gradient_on_its_own_batches(name):
    labels = torch.arange(40).repeat_interleave(6)
    embeddings = torch.randn(240, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    parts = parse_contender(name).build(Task(labels, batch_size=32, embedding_size=16, iterations=3, seed=0))
    indices = list(parts.sampler)
    batch = indices[0] if isinstance(indices[0], list) else indices[:32]
    assert len(batch) == 32 and len(labels[batch].unique()) == 8
    mined = None if parts.miner is None else parts.miner(embeddings[batch], labels[batch])
    parts.loss(embeddings[batch], labels[batch], mined).backward()
    assert embeddings.grad.abs().sum() > 0
    assert (parts.loss_lr is not None) == any(True for _ in parts.loss.parameters())
    assert (parts.tree is not None) == has_tree(name)


def test_contenders():
    contender = parse_contender("triplet:margin=0.25,distance=squared,samples_per_class=4")
    assert contender.settings == {**METHODS["triplet"].defaults, "margin": 0.25, "distance": "squared"}
    assert contender.title == "triplet:margin=0.25,distance=squared"
    assert parse_contender("htl").title == "htl"
    for text, message in [
        ("tripelt", "there are: triplet,"),
        ("triplet:margn=1", "it has: learning_rate, .* margin, distance"),
        ("triplet:margin=big", "margin of triplet must be a float"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_contender(text)
    for text, message in [
        ("htl:distance=cosine", "plain or squared"),
        ("htl:margins=wide", "tree or constant"),
        ("triplet:sampling=random", "per-class or one of neighbors, neighbors-apart"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_contender(text).build(Task(torch.arange(40), 32, 16, 3, 0))


def test_tuned_contenders():
    tuned = {"htl": {**METHODS["htl"].defaults, "beta": 0.3}}
    contender = parse_contender("htl:num_levels=8", tuned)
    assert contender.settings == {**METHODS["htl"].defaults, "beta": 0.3, "num_levels": 8}
    assert contender.title == "htl:num_levels=8" and parse_contender("htl", tuned).title == "htl"
    with pytest.raises(ValueError, match="triplet was not tuned; there are: htl"):
        parse_contender("triplet", tuned)


def test_any_method_takes_either_sampler():
    task = Task(torch.arange(40).repeat_interleave(4), 32, 16, 3, 0)
    for name in METHODS:
        kinds = {
            sampling: type(parse_contender(f"{name}:sampling={sampling}").build(task).sampler).__name__
            for sampling in ("per-class", "neighbors")
        }
        assert kinds == {"per-class": "MPerClassSampler", "neighbors": "AnchorNeighborSampler"}
    tree = parse_contender("htl:refresh_every=3").build(task)
    assert tree.refresh_every == 3


def test_lists_on_the_command_line():
    spread = spread_lists(["compare", "--methods", "htl", "triplet", "--seeds", "0", "1", "--output", "x"])
    assert spread == "compare --methods htl --methods triplet --seeds 0 --seeds 1 --output x".split()
    spread = spread_lists(["compare", "--methods=htl", "triplet", "--seeds", "--output", "x"])
    assert spread == "compare --methods=htl --methods triplet --seeds --output x".split()  # --seeds without any: an error


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the tree stays as it is")
def test_all_methods_train_and_are_compared(tiny, tmp_path, capsys):
    # Of losses by their class, which tests/test_by_name.py trains, one with proxies.
    methods = [name for name, method in METHODS.items() if not isinstance(method, ClassMethod)] + ["soft-triple-sampling"]
    twice = ["htl", "triplet"]
    assert run_cli("compare", *TINY, "--methods", *twice, "--seeds", 0, 1, "--no-report", "--output", tmp_path) == 0
    assert run_cli("compare", *TINY, "--methods", *methods, "--seeds", 0, "--output", tmp_path) == 0
    document = results.load(tmp_path / "results.json")
    assert {run["method"] for run in document["runs"]} == set(methods)
    assert len(document["runs"]) == (len(methods) + len(twice)) * 2  # splits
    for run in document["runs"]:
        assert run["train_seconds"] > 0
        if run["method"] != "htl-streaming":  # four batches have not had all classes
            assert (run["refresh_seconds"] > 0) == has_tree(run["method"])
    for curve in document["curves"]:
        assert curve["iterations"] == [2, 4] and 0 < curve["seconds"][0] < curve["seconds"][1]
        assert ("nearness" in curve) == has_tree(curve["method"])
    for name in ("accuracy.png", "class_tree.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    records = tmp_path / "runs" / "htl-seed0"
    assert (records / "records" / "logs.db").exists() and list((records / "tensorboard").glob("events*"))
    assert list((records / "records").glob("accuracies*VAL*.csv"))
    out = capsys.readouterr().out
    summary = results.summarize(document)
    assert summary.map_at_r.is_monotonic_decreasing
    assert summary.seeds.tolist() == [1 + (title in twice) for title in summary.title]
    fewer = ", ".join(f"{title}: 1" for title in summary.title if title not in twice)
    assert f"mean of 2 seeds ({fewer}) ± half" in tables.caption(document)
    order = [out.rindex(f" {title} ") for title in summary.title if len(title) <= 20]  # longer ones stand in two lines
    assert order == sorted(order)  # the table on the screen is sorted by MAP@R


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(tiny, tmp_path, monkeypatch, capsys):
    arguments = ["compare", *TINY, "--methods", "htl", "triplet", "--seeds", "0", "1"]
    run_cli(*arguments, "--output", tmp_path / "whole")
    trained = []

    def interrupted(contender, seed, *rest, **options):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append((contender.title, seed))
        return train(contender, seed, *rest, **options)

    monkeypatch.setattr(comparing, "train", interrupted)
    assert run_cli(*arguments, "--output", tmp_path / "parts") != 0
    assert trained == [("htl", 0), ("triplet", 0)]
    trained.clear()
    assert run_cli(*arguments, "--output", tmp_path / "parts") == 0
    assert trained == [("htl", 1), ("triplet", 1)]
    whole, parts = (results.load(tmp_path / name / "results.json") for name in ("whole", "parts"))

    def accuracies(document):
        return {(run["method"], run["seed"], run["split"]): run["map_at_r"] for run in document["runs"]}

    assert accuracies(whole) == accuracies(parts)
    assert "2 of 4 runs are in" in capsys.readouterr().out
    assert run_cli(*arguments, "--output", tmp_path / "parts", "--embedding-size", "8") == 2
    assert "choose another --output" in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(tiny, tmp_path):
    plan = Plan(iterations=4, epoch_iterations=2, batch_size=32, embedding_size=16)
    for name in ("htl", "proxy-anchor"):
        outcomes = [train(parse_contender(name), 3, plan, tiny, tmp_path / f"{name}{i}") for i in range(2)]
        assert outcomes[0].accuracies == outcomes[1].accuracies
        curves = [[(step, accuracy) for step, accuracy, _ in outcome.curve] for outcome in outcomes]
        assert curves[0] == curves[1]


def test_a_cosine_falls_to_zero_with_the_last_iteration():
    trunk, embedder, loss = (torch.nn.Linear(2, 2) for _ in range(3))
    optimizers = make_optimizers(trunk, embedder, loss, 0.1, 0.2)
    schedulers = make_schedulers(optimizers, Plan(iterations=8, epoch_iterations=2))
    assert schedulers.keys() == {f"{name}_scheduler_by_iteration" for name in ("trunk", "embedder", "metric_loss")}
    rates = []
    for _ in range(8):
        for optimizer, scheduler in zip(optimizers.values(), schedulers.values(), strict=True):
            optimizer.step()
            scheduler.step()
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers.values()])
    assert rates[3] == pytest.approx([0.05, 0.05, 0.1]) and rates[-1] == pytest.approx([0, 0, 0], abs=1e-12)
    assert rates == sorted(rates, reverse=True)
    assert make_schedulers(optimizers, Plan(schedule="constant")) == {}
    with pytest.raises(ValueError, match="schedule must be constant or cosine"):
        Plan(schedule="linear")


@pytest.mark.slow
def test_a_schedule_and_another_network_are_written_down(tiny, tmp_path):
    options = ["--network", "conv_net", "--schedule", "constant"]
    assert run_cli("compare", *TINY, *options, "--methods", "triplet", "proxy-anchor", "--output", tmp_path) == 0
    plan = results.load(tmp_path / "results.json")["metadata"]["plan"]
    assert (plan["network"], plan["schedule"], plan["precision"]) == ("conv_net", "constant", fast_precision("cpu"))
    assert run_cli("compare", *TINY, "--methods", "triplet", "--output", tmp_path) == 2  # it is of another schedule


@pytest.mark.parametrize("name", ["conv_net", "strided_net"])
def test_small_networks(name):
    (trunk, width), (again, _) = (make_network(name, 3, seed=1) for _ in range(2))
    images = torch.rand(4, 3, 32, 32)
    features = trunk.eval()(images)
    assert features.shape == (4, width) and torch.equal(features, again.eval()(images))
    assert trunk(torch.rand(2, 3, 64, 64)).shape == (2, width)
    with pytest.raises(ValueError, match=f"no weights for {name}"):
        make_network(name, 3, 0, "pretrained")


@pytest.mark.parametrize("temperature", [0.02, 0.1, 0.5])
def test_ntxent_is_that_of_pml(temperature):
    embeddings, labels = torch.randn(32, 8, dtype=torch.float64), torch.randint(6, (32,))
    results_of = []
    for loss in (NTXent(temperature), NTXentLoss(temperature)):
        leaves = embeddings.clone().requires_grad_()
        value = loss(leaves, labels)
        value.backward()
        results_of.append((value, leaves.grad))
    for ours, pmls in zip(*results_of, strict=True):
        assert torch.allclose(ours, pmls, rtol=1e-9, atol=1e-12)


def test_the_precision_follows_the_hardware(monkeypatch):
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for answers, expected in (((False, False), "fp32"), ((True, False), "bf16"), ((False, True), "bf16")):
        for name, answer in zip(tests, answers, strict=True):
            monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
        assert fast_precision("cpu") == expected
    for name in tests:
        monkeypatch.delattr(torch.cpu, name)
    assert fast_precision("cpu") == "fp32"  # a torch that does not tell
    assert fast_precision("mps") == "fp32"


@pytest.mark.slow
def test_workers_train_too(tiny, tmp_path):
    plan = Plan(iterations=4, epoch_iterations=2, batch_size=32, embedding_size=16, workers=2)
    assert train(parse_contender("htl"), 0, plan, tiny, tmp_path).tree.is_fitted


def test_the_quick_preset_is_the_default(monkeypatch):
    asked = []
    monkeypatch.setattr(commands, "compare", lambda **kwargs: asked.append(kwargs))
    assert run_cli() == 0
    assert asked == [
        {
            "methods": commands.QUICK_METHODS,
            "seeds": [0],
            "iterations": commands.QUICK_ITERATIONS,
            "jobs": min(os.cpu_count(), len(commands.QUICK_METHODS)),
            "output": Path("runs/quick"),
        }
    ]


def test_mistakes_on_the_command_line_end_in_one_line(tiny, capsys, tmp_path):
    for arguments, message in [
        (["--methods", "nonsense"], "there is no method 'nonsense'"),
        (["--data", "nonsense"], "there is no data set 'nonsense'; there are: glyphs,"),
        (["--data", "cub"], "there is no data/cub/CUB_200_2011/images.txt. Get CUB_200_2011.tgz"),
        (["--iterations", "7"], "multiple of the 2"),
        (["--batch-size", "24"], "multiple of 16"),
        (["--batch-size", "4096", "--methods", "triplet"], "at most 4 of each of the 20 classes"),
        (["--methods", "triplet:samples_per_class=3"], "multiple of samples_per_class=3"),
        (["--methods", "htl:samples_per_class=0"], "multiple of 0"),
        (["--methods", "[/foo]"], "there is no method '[/foo]'"),
        (["--device", "nonsense"], "there is no device 'nonsense' here"),
        (["--precision", "fp8"], "precision must be fp32 or bf16"),
        (["--tuned", "--study", "/nowhere.json"], "there is no /nowhere.json; `python -m benchmarks tune` makes one"),
        (["--tuned", "--study", RESULTS / "tuned.json"], "this is not the outcome of a tuning"),
        (["--output", "/dev/null"], "/dev/null"),
        (["--seeds", "one"], "Invalid value for '--seeds'"),
        (["--seeds"], "requires an argument"),
        (["--epoch-iterations", "0"], "Invalid value for '--epoch-iterations'"),
    ]:
        assert run_cli("compare", *TINY, "--output", tmp_path / "x", *arguments) == 2
        out = "".join(capsys.readouterr())
        assert message in " ".join(out.split()) and "Traceback" not in out
    assert run_cli("table", tmp_path) == 2


@pytest.mark.slow
def test_what_is_named_twice_is_trained_once(tiny, tmp_path):
    assert run_cli("compare", *TINY, "--methods", "triplet", "ntxent", "triplet", "--seeds", 0, 0, "--output", tmp_path) == 0
    assert len(results.load(tmp_path / "results.json")["runs"]) == 2 * 2


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_results_are_valid(path):
    document = results.load(path)
    for session in (document["metadata"], *document["metadata"].get("sessions", [])):  # of speed there is one
        assert len(session["commit"]) == 40  # known, and without changes
    assert tables.markdown_table(document)


def test_tables_show_numbers_in_three_digits():
    assert (
        results.readable("htl:learning_rate=0.003156585790533713,num_levels=16") == "htl:learning_rate=0.00316,num_levels=16"
    )
    assert results.readable("CircleLoss:m=0.4,gamma=80") == "CircleLoss:m=0.4,gamma=80"
    document = results.load(RESULTS / "glyphs-rate.json")
    assert "| htl:learning_rate=0.00316 |" in tables.markdown_table(document)


def test_broken_results_are_named():
    document = results.load(RESULTS / "tuned.json")
    for change, message in [
        (lambda d: d.pop("runs"), "has metadata, runs and curves"),
        (lambda d: d["metadata"].pop("commit"), "lack commit"),
        (lambda d: d.update(curves=[]), "curves should be a list that is not empty"),
        (lambda d: d["runs"].append(7), r"should be an object, but it is 7"),
        (lambda d: d["curves"][0].update(map_at_r=["high"]), r"0\.\.1"),
        (lambda d: d["runs"][0].pop("seed"), r"runs\[0\]: seed should be a int"),
        (lambda d: d["runs"][0].update(map_at_r=61.2), r"0\.\.1"),
        (lambda d: d["runs"][0].update(split="train"), "test or validation"),
        (lambda d: d["runs"][0].update(note="?"), "unknown note"),
        (lambda d: d["runs"].append(d["runs"][0]), "twice"),
    ]:
        broken = copy.deepcopy(document)
        change(broken)
        with pytest.raises(ValueError, match=message):
            results.validate(broken)


def test_a_results_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    results.save({"a": 1}, path)
    monkeypatch.setattr(json, "dumps", lambda *args, **kwargs: sys.exit("killed"))
    with pytest.raises(SystemExit):
        results.save({"a": 2}, path)
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_table_of_some_methods(capsys):
    assert run_cli("table", RESULTS / "kanji.json") == 0
    whole = capsys.readouterr().out.splitlines()
    assert run_cli("table", RESULTS / "kanji.json", "--methods", "htl", "triplet") == 0
    some = capsys.readouterr().out.splitlines()
    assert len(some) < len(whole) and some == [line for line in whole if line in some]
    assert [line.split(" | ")[0].strip("| ") for line in some[2:4]] == ["htl", "triplet"]
    for file, message in [
        ("tuned.json", "there is no htI in it; there are arcface"),
        ("speed.json", "of something else"),
    ]:
        assert run_cli("table", RESULTS / file, "--methods", "htI") == 2
        assert message in " ".join(capsys.readouterr().out.split())
