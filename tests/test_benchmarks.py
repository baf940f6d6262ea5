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
from benchmarks.outcomes import intervals, results, sampling, study, tables, twins
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


def test_the_tuned_results_are_fair():
    """As many trials for each method, its best settings trained with the same seeds, and nothing else different."""
    tuning, tuned = results.load(RESULTS / "study.json"), results.load(RESULTS / "tuned.json")
    assert {len(trials) for trials in tuning["studies"].values()} == {12}
    plans = (document["metadata"]["plan"] for document in (tuning, tuned))
    differing = {name for name, (short, full) in zip_values(*plans) if short != full}
    assert differing == {"iterations", "precision"} and tuning["metadata"]["plan"]["iterations"] >= 500
    seeds = {}
    for run in tuned["runs"]:
        assert run["settings"] == study.winners(tuning)[run["method"]] and run["label"] == run["method"]
        seeds.setdefault(run["method"], set()).add(run["seed"])
    whole = {method for method, found in seeds.items() if found == {0, 1, 2, 3, 4}}
    assert len(whole) >= 16 and all(seeds[method] == {0, 1, 2} for method in seeds.keys() - whole)
    assert seeds.keys() - whole == {f"{name}-sampling" for name in ("supcon", "circle", "arcface", "normalized-softmax")}


def zip_values(first, second):
    """Keys of both, and their values in each."""
    return [(key, (first.get(key), second.get(key))) for key in {*first, *second}]


def test_what_the_readme_says_of_the_tuned_results():
    """Of differences seed by seed, with their 95% intervals where it claims more than an order."""
    document = results.load(RESULTS / "tuned.json")
    values, behind = intervals.test_values(document), intervals.differences(document)
    for sampled, alone in (
        ("triplet-sampling", "triplet"), ("ntxent-sampling", "ntxent"),
        ("multi-similarity-sampling", "multi-similarity"), ("htl", "htl-margin"),
    ):  # fmt: skip
        gain = intervals.interval(values[sampled] - values[alone])
        assert gain.excludes_zero and gain.mean > 0.015
    ahead = behind["htl-constant"]  # the tree's margin does not pay
    assert ahead.excludes_zero and ahead.mean == pytest.approx(0.009, abs=0.0006)
    gains = sampling.gains(document)
    assert not gains["supcon"].excludes_zero
    assert gains["circle"].excludes_zero and 0.01 < gains["circle"].mean < 0.0135
    for title in ("arcface", "normalized-softmax"):
        assert gains[title].excludes_zero and -0.04 < gains[title].mean < -0.025
    trials = sampling.method_values(results.load(RESULTS / "study.json"))
    assert all(trials[f"{title}-sampling"] < trials[title] for title in ("proxy-anchor", "soft-triple"))
    assert behind["htl-paper"].mean == pytest.approx(-0.03, abs=0.003)
    assert share_of_refreshes(document) == pytest.approx(0.2, abs=0.03)
    for ahead, back in (("htl-paper", "triplet"), ("triplet-sampling", "htl-paper")):
        lead = intervals.interval(values[ahead] - values[back])
        assert lead.excludes_zero and lead.mean > 0
    assert not behind["arcface"].excludes_zero
    for title, lead in (("normalized-softmax", -0.008), ("soft-triple", -0.015)):
        assert behind[title].excludes_zero and behind[title].mean == pytest.approx(lead, abs=0.0006)
    best_of_ours = intervals.interval(values["htl-constant"] - values["arcface"])
    assert best_of_ours.excludes_zero and best_of_ours.mean == pytest.approx(0.01, abs=0.0006)
    for title in ("triplet", "ntxent", "multi-similarity", "supcon", "circle", "proxy-anchor"):
        assert behind[title].excludes_zero and behind[title].mean < -0.02
    for name, least, most in (("tuned", 0.003, 0.007), ("hangul", 0.001, 0.005)):
        assert_level_at_equal_rates(name, least, most)
    best = values.mean().sort_values(ascending=False)
    of_pml = [title for title in best.index if not title.startswith("htl") and not title.endswith("-sampling")]
    assert {*of_pml[:3]} == {"arcface", "normalized-softmax", "soft-triple"}


def share_of_refreshes(document):
    """Of `htl`: the seconds of refreshing the tree over those of training, mean over the seeds."""
    runs = [run for run in document["runs"] if run["method"] == "htl" and run["split"] == "test"]
    return sum(run["refresh_seconds"] / run["train_seconds"] for run in runs) / len(runs)


def assert_level_at_equal_rates(name, low, high):
    """A constant margin less the tree's, each with the learning rate of the other: what the README says, in points."""
    values = intervals.test_values(results.load(RESULTS / f"{name}.json"))
    swapped = results.load(RESULTS / f"{'glyphs' if name == 'tuned' else name}-rate.json")
    rates = intervals.test_values(swapped)
    by_method = {run["method"]: results.title_of(run) for run in swapped["runs"]}
    assert swapped["metadata"]["plan"] == results.load(RESULTS / f"{name}.json")["metadata"]["plan"]
    for difference, expected in (
        (rates[by_method["htl-constant"]] - values["htl"], low), (values["htl-constant"] - rates[by_method["htl"]], high),
    ):  # fmt: skip
        found = intervals.interval(difference.dropna())
        assert found.count == 3 and not found.excludes_zero and found.mean == pytest.approx(expected, abs=0.0006)


def test_what_the_readme_says_of_kanji_and_hangul():
    """The winners on glyphs, untouched: what sampling brings the triplet loss, the lead of htl, and that ArcFace's fail."""
    winners = study.winners(results.load(RESULTS / "study.json"))
    for name, methods, gain, lead, arcface in (
        ("kanji", 16, 0.041, 0.089, (0.6, 0.75)), ("hangul", 16, 0.226, 0.37, (0.0, 0.05)),
    ):  # fmt: skip
        document = results.load(RESULTS / f"{name}.json")
        assert all(run["settings"] == winners[run["method"]] for run in document["runs"])
        assert document["metadata"]["plan"]["samples_per_class"] == 6
        values = intervals.test_values(document)
        assert values.shape == (3, methods) and values.notna().all(axis=None)
        for ahead, back, expected in (
            ("triplet-sampling", "triplet", gain), ("htl", "triplet", lead), ("htl", "triplet-sampling", None),
        ):  # fmt: skip
            found = intervals.interval(values[ahead] - values[back])
            assert found.excludes_zero and found.mean > 0
            assert expected is None or found.mean == pytest.approx(expected, abs=0.001)
        assert values["arcface"].between(*arcface).all()


def test_what_the_readme_says_of_kanji():
    """All methods: which are level, which fall behind with settings of glyphs, and whom sampling helps."""
    document = results.load(RESULTS / "kanji.json")
    values, behind = intervals.test_values(document), intervals.differences(document)
    for level in ("htl-constant", "circle"):
        assert not behind[level].excludes_zero and abs(behind[level].mean) < 0.005
    for title in ("triplet", "ntxent", "multi-similarity", "supcon", "proxy-anchor", "soft-triple", "normalized-softmax"):
        assert behind[title].excludes_zero and behind[title].mean < -0.019
    assert behind["proxy-anchor"].mean == pytest.approx(-0.30, abs=0.005)
    assert behind["arcface"].mean == pytest.approx(-0.09, abs=0.001) and not behind["arcface"].excludes_zero
    assert values["arcface"].max() - values["arcface"].min() == pytest.approx(0.07, abs=0.005)
    assert values.mean().idxmax() == "htl-margin" and not behind["htl-margin"].excludes_zero
    assert behind["htl-paper"].excludes_zero and behind["htl-paper"].mean < 0
    over_triplet = intervals.interval(values["htl-paper"] - values["triplet"])
    assert over_triplet.excludes_zero and over_triplet.mean > 0
    gains = sampling.gains(document)
    assert {title for title, gain in gains.items() if gain.excludes_zero} == {"triplet", "ntxent"}
    assert gains["ntxent"].mean == pytest.approx(0.02, abs=0.005)
    on_glyphs = intervals.differences(results.load(RESULTS / "tuned.json"))
    for title in ("triplet", "triplet-sampling", "ntxent", "ntxent-sampling", "multi-similarity", "supcon"):
        assert behind[title].mean == pytest.approx(on_glyphs[title].mean, abs=0.0305)
    paper = intervals.interval(values["htl-paper"] - values["triplet-sampling"])
    assert not paper.excludes_zero and abs(paper.mean) < 0.005


def test_what_the_readme_says_of_tuning_on_kanji():
    """Equal budgets, the winners trained as with the settings of glyphs, and nothing gained that can be told from zero."""
    tuning, tuned = results.load(RESULTS / "study-kanji.json"), results.load(RESULTS / "kanji-tuned.json")
    of_glyphs = results.load(RESULTS / "kanji.json")
    assert {len(trials) for trials in tuning["studies"].values()} == {12}
    assert tuned["metadata"]["plan"] == of_glyphs["metadata"]["plan"]
    assert tuning["metadata"]["plan"] == {**tuned["metadata"]["plan"], "iterations": 500}
    assert all(run["settings"] == study.winners(tuning)[run["method"]] for run in tuned["runs"])
    values, before = intervals.test_values(tuned), intervals.test_values(of_glyphs)
    assert {*values} == {"htl", "arcface", "normalized-softmax", "proxy-anchor"}
    assert not any(intervals.interval(values[title] - before[title]).excludes_zero for title in values)
    assert all(lead.excludes_zero and lead.mean < -0.1 for lead in intervals.differences(tuned).values())


def test_what_the_readme_says_of_hangul():
    """What sampling brings each loss, and how far htl is ahead of PML's losses with either sampler."""
    document = results.load(RESULTS / "hangul.json")
    gains, behind = sampling.gains(document), intervals.differences(document)
    expected = {"triplet": 0.23, "htl-margin": 0.22, "ntxent": 0.16, "multi-similarity": 0.07}
    assert gains.keys() == expected.keys()
    for title, gain in gains.items():
        assert gain.excludes_zero and gain.mean == pytest.approx(expected[title], abs=0.005)
    of_pml = [title for title in behind if not title.startswith("htl")]
    alone = {title: behind[title] for title in of_pml if not title.endswith("-sampling")}
    assert len(alone) == 9 and all(lead.excludes_zero for lead in behind.values())
    assert max(alone, key=lambda title: alone[title].mean) == "multi-similarity"
    assert behind["multi-similarity"].mean == pytest.approx(-0.18, abs=0.005)
    assert behind["ntxent-sampling"].mean == max(behind[title].mean for title in of_pml) == pytest.approx(-0.044, abs=0.005)
    assert behind["htl-constant"].mean == pytest.approx(0.012, abs=0.001)
    values = intervals.test_values(document)
    assert values[["arcface", "normalized-softmax", "proxy-anchor"]].max(axis=None) < 0.15
    assert share_of_refreshes(document) == pytest.approx(0.6, abs=0.03)
    assert behind["htl-paper"].mean == pytest.approx(-0.13, abs=0.005)
    assert all(behind[title].mean < -0.178 for title in alone)
    on_glyphs = intervals.differences(results.load(RESULTS / "tuned.json"))
    assert all(behind[title].mean < on_glyphs[title].mean for title in of_pml)
    over_triplet = intervals.interval(values["htl-paper"] - values["triplet"])
    assert over_triplet.excludes_zero and over_triplet.mean > 0
    assert values["soft-triple"].mean() == pytest.approx(0.32, abs=0.005)
    paper = intervals.interval(values["htl-paper"] - values["triplet-sampling"])
    assert not paper.excludes_zero and abs(paper.mean) < 0.015
    same = sampling.gains(results.load(RESULTS / "hangul-same.json"))  # all settings but the sampler
    assert same.keys() == {"htl:sampling=per-class", "ntxent"}
    for title, gain in (("htl:sampling=per-class", gains["htl-margin"]), ("ntxent", gains["ntxent"])):
        assert same[title].excludes_zero and same[title].mean == pytest.approx(gain.mean, abs=0.016)
    for name, ours, theirs in (("hangul-same", 0.72, 0.50), ("hangul-long", 0.90, 0.62)):
        means = intervals.test_values(results.load(RESULTS / f"{name}.json")).mean()
        assert means["htl"] == pytest.approx(ours, abs=0.006)
        assert means["htl:sampling=per-class"] == pytest.approx(theirs, abs=0.006)


def test_what_the_readme_says_of_fewer_classes_of_hangul():
    """The same plan on 300 classes: of what the sampler brings on all, a small part."""
    few, all_classes = (results.load(RESULTS / f"{name}.json")["metadata"] for name in ("hangul-300", "hangul"))
    assert few["plan"] == {**all_classes["plan"], "classes": 300}
    assert few["data"]["test_classes"] == all_classes["data"]["test_classes"]
    gains = sampling.gains(results.load(RESULTS / "hangul-300.json"))
    assert gains.keys() == {"triplet", "htl:sampling=per-class"}
    assert not gains["triplet"].excludes_zero and gains["triplet"].count == 3
    assert gains["htl:sampling=per-class"].excludes_zero
    assert gains["htl:sampling=per-class"].mean == pytest.approx(0.03, abs=0.005)


def test_what_the_readme_says_of_noise():
    """Our sampler's gain stays. Leaving out suspects is level with split classes, and costs with wrong labels."""
    margin, clean = "htl-constant", intervals.test_values(results.load(RESULTS / "noise.json"))
    for name, gain, (least, most) in (("noise", 0.064, (-0.005, 0.005)), ("noise-split", 0.060, (-0.005, 0.005)),
                                      ("noise-wrong", 0.059, (-0.01, -0.003))):  # fmt: skip
        values = intervals.test_values(results.load(RESULTS / f"{name}.json"))
        found = intervals.interval(values[margin] - values[f"{margin}:sampling=per-class"])
        assert found.mean == pytest.approx(gain, abs=0.0006) and found.excludes_zero
        lost = {
            title: intervals.interval(values[title] - clean[title]) for title in (margin, f"{margin}:sampling=per-class")
        }
        costs = {title for title, loss in lost.items() if loss.excludes_zero}
        assert costs == ({margin} if name == "noise-wrong" else set()) and all(loss.mean > -0.0125 for loss in lost.values())
        for variant in ("neighbors-apart", "neighbors-distinct"):
            change = intervals.interval(values[f"{margin}:sampling={variant}"] - values[margin])
            assert least < change.mean < most and change.excludes_zero == (name == "noise-wrong")


def test_what_the_readme_says_of_twins():
    """Means over the seeds of the recall of split classes, at the iterations and precisions that it names."""
    document = results.load(RESULTS / "twins.json")
    num_twins = twins.twins_of(document)
    assert num_twins == 56

    def recall(title, iterations, precision):
        curves = [dict(c["nearness"]["twins"]) for c in document["curves"] if results.title_of(c) == title]
        assert len(curves) == 3
        return sum(twins.recall_at(precision, curve[iterations], num_twins) for curve in curves) / 3

    assert recall("htl", 300, 0.5) > 0.94 and recall("htl", 2000, 0.5) > 0.98 and recall("htl-margin", 2000, 0.5) > 0.98
    assert recall("htl", 2000, 0.7) > 0.89 > 0.8 > recall("htl-margin", 2000, 0.7)
    assert 0.2 < recall("htl", 2000, 0.9) < 0.3


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
