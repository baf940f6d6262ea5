"""The search for hyperparameters: as many trials for each, on folds of the training classes; it goes on where it stopped."""

import copy
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import torch

from benchmarks.commands import train as commands
from benchmarks.comparison import tune
from benchmarks.data.splits import fold
from benchmarks.methods import spaces
from benchmarks.methods.ablations import ABLATIONS, Ablation
from benchmarks.methods.contenders import METHODS, parse_contender
from benchmarks.methods.method import Task
from benchmarks.methods.spaces import space_of, suggest
from benchmarks.outcomes import intervals, results, study, tables
from benchmarks.training.parallel import workers
from tests.processes import environment
from tests.test_benchmarks import TINY, run_cli

ANY = [*TINY, "--batch-size", "16", "--folds", "1"]
SHORT = [*ANY, "--methods", "htl", "triplet"]


@pytest.fixture
def small_batches(monkeypatch):
    """Spaces whose every batch fits into 16."""
    monkeypatch.setitem(spaces.COMMON, "samples_per_class", spaces.choice(2, 4))
    monkeypatch.setitem(spaces.NEIGHBORHOOD, "neighborhood_size", spaces.choice(2, 4))


def trials_of(folder):
    document = results.load(folder / "study.json")
    return {
        method: [(trial["settings"], trial["folds"]) for trial in trials] for method, trials in document["studies"].items()
    }


def test_folds_are_class_disjoint_parts_of_the_training_classes(glyphs):
    seen = []
    for number in range(4):
        part = fold(glyphs, number)
        train, val = set(part.train.labels.tolist()), set(part.val.labels.tolist())
        assert train == set(range(len(train))) and val == set(range(len(train), len(train) + len(val)))
        assert len(train) + len(val) == int(glyphs.train.labels.max()) + 1
        assert len(part.train) + len(part.val) == len(glyphs.train)
        assert part.test is glyphs.test
        names = [part.class_names[label] for label in val]
        for images in (part.train, part.val):  # the pictures went with their classes
            label = int(images.labels[0])
            old = glyphs.class_names.index(part.class_names[label])
            assert torch.equal(images.pictures_of(label)[0], glyphs.train.pictures_of(old)[0])
        seen += names
    assert sorted(seen) == sorted(glyphs.class_names[: int(glyphs.train.labels.max()) + 1])  # each once
    with pytest.raises(ValueError, match=r"parts 0 \.\. 3 of .* but not 4"):
        fold(glyphs, 4)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_space_around_its_defaults(name):
    defaults = METHODS[name].defaults
    assert space_of(name).keys() <= defaults.keys()
    task = Task(torch.arange(80).repeat_interleave(8), 128, 16, 3, 0)
    drawn = []
    optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).optimize(
        lambda trial: drawn.append(suggest(trial, name)) or 0.0, n_trials=20
    )
    for settings in drawn:
        assert settings.keys() == defaults.keys()
        METHODS[name].build(task, settings)  # any of them trains
    changed = {setting for settings in drawn for setting in settings if settings[setting] != defaults[setting]}
    assert changed == space_of(name).keys()
    # The defaults are inside the space, so that the first trial is one of it.
    optuna.create_study().optimize(lambda trial: suggest(optuna.trial.FixedTrial(defaults), name) and 0.0, n_trials=1)


@pytest.mark.slow
def test_every_method_gets_its_defaults_and_as_many_trials(tiny, small_batches, tmp_path, capsys):
    assert run_cli("tune", *SHORT, "--trials", 3, "--output", tmp_path) == 0
    found = trials_of(tmp_path)
    assert {method: len(trials) for method, trials in found.items()} == {"htl": 3, "triplet": 3}
    for method, trials in found.items():
        assert trials[0][0] == METHODS[method].defaults
        assert len({str(settings) for settings, _ in trials}) == 3
    document = results.load(tmp_path / "study.json")
    best = study.winners(document)
    for method, trials in document["studies"].items():
        assert best[method] == max(trials, key=lambda trial: trial["mean"])["settings"]
        assert all(trial["mean"] == trial["folds"][0] for trial in trials)
    assert "settings of the best" in capsys.readouterr().out
    assert tables.markdown_table(document).count("| htl | 3 |") == 1

    arguments = [*TINY, "--tuned", "--study", tmp_path / "study.json", "--seeds", 0, 1]
    assert run_cli("compare", *arguments, "--output", tmp_path / "tuned") == 0
    compared = results.load(tmp_path / "tuned" / "results.json")
    assert {(run["label"], run["seed"]) for run in compared["runs"]} == {(m, s) for m in ("htl", "triplet") for s in (0, 1)}
    assert all(run["settings"] == best[run["method"]] for run in compared["runs"])
    assert set(results.summarize(compared).title) == {"htl", "triplet"}


@pytest.mark.slow
def test_the_best_trials_of_a_search_are_trained_again_for_longer(tiny, small_batches, tmp_path, capsys):
    run_cli("tune", *SHORT, "--trials", 3, "--output", tmp_path / "search")
    searched = results.load(tmp_path / "search" / "study.json")
    final = ["tune", *SHORT, "--iterations", 6, "--finalists", tmp_path / "search" / "study.json"]
    assert run_cli(*final, "--trials", 2, "--output", tmp_path / "final") == 0
    for method, trials in trials_of(tmp_path / "final").items():
        order = sorted(searched["studies"][method], key=lambda trial: -trial["mean"])
        assert [settings for settings, _ in trials] == [trial["settings"] for trial in order[:2]]
    document = results.load(tmp_path / "final" / "study.json")
    assert document["metadata"]["plan"]["iterations"] == 6
    assert tables.markdown_table(document).count("| 2 |") == 2
    capsys.readouterr()
    assert run_cli(*final, "--trials", 4, "--output", tmp_path / "more") == 2
    assert "the best 4 trials of each method are wanted, but each had 3" in capsys.readouterr().out
    assert run_cli(*final, "--methods", "contrastive", "--trials", 2, "--output", tmp_path / "more") == 2
    assert "has triplet, htl, but not contrastive" in capsys.readouterr().out


def test_a_title_stands_for_one_setting(tiny, tmp_path, capsys):
    def study_with(margin):
        settings = {**METHODS["triplet"].defaults, "margin": margin}
        trial = {"settings": settings, "folds": [0.5], "mean": 0.5, "seconds": 1.0, "error": None}
        metadata = {"commit": "", "versions": {}, "plan": {}, "data": {}, "folds": 1}
        results.save({"metadata": metadata, "studies": {"triplet": [trial]}}, tmp_path / f"{margin}.json")
        return ["--tuned", "--study", tmp_path / f"{margin}.json"]

    arguments = ["compare", *TINY, "--iterations", 2, "--seeds", 0, "--output", tmp_path / "out", "--methods"]
    assert run_cli(*arguments, "triplet", "triplet:margin=0.2", *study_with(0.2)) == 0  # the same twice
    assert len(results.load(tmp_path / "out" / "results.json")["runs"]) == 2
    for others in (study_with(0.3), []):
        capsys.readouterr()
        assert run_cli(*arguments, "triplet", *others) == 2
        assert "triplet has other settings" in capsys.readouterr().out
    assert len(results.load(tmp_path / "out" / "results.json")["runs"]) == 2


def test_a_training_that_fails_is_named(tiny, tmp_path, capsys):
    arguments = ["compare", *TINY, "--seeds", 3, "--output", tmp_path, "--methods", "triplet:learning_rate=1e30"]
    assert run_cli(*arguments) == 2
    assert "triplet:learning_rate=1e+30, seed 3: " in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(tiny, small_batches, tmp_path, monkeypatch):
    run_cli("tune", *SHORT, "--trials", 6, "--output", tmp_path / "whole")
    count = []

    def interrupted(*arguments, **options):
        count.append(1)
        if len(count) in (1, 4, 9):
            raise KeyboardInterrupt
        return original(*arguments, **options)

    original = tune.train
    monkeypatch.setattr(tune, "train", interrupted)
    assert run_cli("tune", *SHORT, "--trials", 2, "--output", tmp_path / "parts") != 0
    for _ in range(2):
        assert run_cli("tune", *SHORT, "--trials", 6, "--output", tmp_path / "parts") != 0
    assert run_cli("tune", *SHORT, "--trials", 6, "--output", tmp_path / "parts") == 0
    assert len(count) == 12 + 3
    assert trials_of(tmp_path / "parts") == trials_of(tmp_path / "whole")
    assert run_cli("tune", *SHORT, "--trials", 6, "--output", tmp_path / "parts", "--iterations", 2) == 2


@pytest.mark.slow
def test_a_training_that_diverges_is_worth_nothing(tiny, small_batches, tmp_path, monkeypatch):
    def diverging(contender, *rest, **options):
        if contender.settings["learning_rate"] != METHODS["htl"].defaults["learning_rate"]:
            raise ValueError("3 of 32 embeddings are NaN")
        return original(contender, *rest, **options)

    original = tune.train
    monkeypatch.setattr(tune, "train", diverging)
    assert run_cli("tune", *SHORT, "--trials", 2, "--output", tmp_path) == 0
    for trials in results.load(tmp_path / "study.json")["studies"].values():
        assert trials[1]["folds"] == [0.0] and trials[1]["error"] == "3 of 32 embeddings are NaN"
        assert trials[0]["error"] is None and trials[0]["mean"] > 0


@pytest.mark.slow
def test_broken_studies_are_named(tiny, small_batches, tmp_path):
    run_cli("tune", *SHORT, "--trials", 1, "--output", tmp_path)
    document = results.load(tmp_path / "study.json")
    for change, message in [
        (lambda d: d["metadata"].pop("plan"), "lack plan"),
        (lambda d: d["studies"].update(nonsense=[]), "no method 'nonsense'"),
        (lambda d: d["studies"].update(triplet=[]), "triplet has no trials"),
        (lambda d: d["studies"]["htl"][0].update(mean="high"), "trial 0 of htl: mean should be a float"),
        (lambda d: d["studies"]["htl"][0].update(folds=[0.1, 0.2]), "there should be 1 accuracies"),
        (lambda d: d["studies"]["htl"][0]["settings"].pop("beta"), "only htl has: beta"),
    ]:
        broken = copy.deepcopy(document)
        change(broken)
        with pytest.raises(ValueError, match=message):
            results.validate(broken)


@pytest.mark.slow
def test_the_outcome_has_all_studies_and_winners_are_of_as_many_trials(tiny, small_batches, tmp_path, capsys):
    arguments = [*ANY, "--output", tmp_path, "--methods"]
    assert run_cli("tune", *arguments, "triplet", "--trials", 2) == 0
    assert run_cli("tune", *arguments, "htl", "htl", "--trials", 1) == 0
    assert {method: len(trials) for method, trials in trials_of(tmp_path).items()} == {"triplet": 2, "htl": 1}
    compared = ["compare", *TINY, "--tuned", "--study", tmp_path / "study.json", "--output", tmp_path / "tuned"]
    capsys.readouterr()
    assert run_cli(*compared) == 2
    said = capsys.readouterr().out
    assert "there are triplet 2, htl 1; go on with" in said
    command = said.partition("`python -m benchmarks ")[2].partition("`")[0].split()
    assert run_cli(command[0], *ANY, "--output", tmp_path, *command[1:]) == 0
    assert {method: len(trials) for method, trials in trials_of(tmp_path).items()} == {"triplet": 2, "htl": 2}
    # Of another plan: not to be compared, also if it is another method's.
    assert run_cli("tune", *arguments, "ntxent", "--trials", 1, "--embedding-size", 8) == 2
    assert "the study of triplet was made with" in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [32, 48])
def test_a_batch_that_some_trial_could_not_have_is_refused_before_the_search(tiny, tmp_path, capsys, batch_size):
    """Otherwise it would be worth nothing, and a method with neighbourhoods would have fewer trials than others."""
    assert run_cli("tune", *SHORT, "--batch-size", batch_size, "--trials", 1, "--output", tmp_path) == 2
    said = capsys.readouterr().out
    assert "htl is searched with {'samples_per_class': " in said and "choose another --batch-size" in said
    assert not (tmp_path / "study.db").exists()


def test_a_network_that_is_not_to_be_had_is_no_training_that_diverged(tiny, tmp_path, capsys):
    for change, message in [
        (["--network", "vgg"], "network must be one of"),
        (["--weights", "pretrained"], "no weights for"),
    ]:
        assert run_cli("tune", *SHORT, "--trials", 1, "--output", tmp_path / "out", *change) == 2
        assert message in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_ablations_are_of_contenders_that_there_are():
    task = Task(torch.arange(80).repeat_interleave(16), 128, 16, 3, 0)
    for ablation in ABLATIONS.values():
        contenders = [parse_contender(text) for text in ablation.contenders]
        assert len({str(contender.settings) + contender.method.name for contender in contenders}) == len(contenders)
        for contender in contenders:
            contender.build(task)


@pytest.mark.slow
def test_questions_share_their_trainings_and_other_batch_sizes_have_a_file_each(tiny, tmp_path, monkeypatch, capsys):
    first, second, third = (f"htl-margin:beta={beta},samples_per_class=8" for beta in (0.2, 0.3, 0.4))
    # Settings are named in the order in which a method has them.
    titles = [f"htl-margin:samples_per_class=8,beta={beta}" for beta in (0.2, 0.3, 0.4)]
    questions = {
        "one": Ablation("one", [first, second]),
        "other": Ablation("other", [second, third], compared_with={third: first}),
        "size": Ablation("size", ["htl:beta=0.2", "htl"], [{"batch_size": 16}]),
    }
    for module in (commands, tables):
        monkeypatch.setattr(module, "ABLATIONS", questions)
    arguments = ["--data", "tiny", "--iterations", 2, "--epoch-iterations", 2, "--embedding-size", 8, "--seeds", 0, 1]
    assert run_cli("ablate", *questions, *arguments, "--output", tmp_path) == 0
    assert "2 of 4 runs are in" in capsys.readouterr().out
    files = [tmp_path / "results.json", tmp_path / "batch_size-16" / "results.json"]
    for path, size, trainings in zip(files, (128, 16), (6, 4), strict=True):
        document = results.load(path)
        assert document["metadata"]["plan"]["batch_size"] == size and len(document["runs"]) == 2 * trainings
    assert run_cli("table", "--view", "ablations", *files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:-2]] == [
        *("**one**", *titles[:2]),
        *("**other**", *titles[1:]),
        *("**size**", "htl:beta=0.2, batch size 16", "htl, batch size 16"),
    ]
    for line, path, title, baseline in [(7, 0, titles[2], titles[0]), (9, 1, "htl:beta=0.2", "htl")]:
        values = intervals.test_values(results.load(files[path]))
        gain = 100 * (values[title] - values[baseline]).mean()
        assert f"| {gain:+.1f} ± " in lines[line] and lines[line].endswith(f"| {baseline} |")
    assert run_cli("ablate", "nonsense", *arguments, "--output", tmp_path) == 2


@pytest.mark.slow
def test_side_by_side_is_one_after_another(tiny):
    with workers(tiny, 1) as one, workers(tiny, 2) as two:
        assert one(class_names_between, 3, 7).result() == two(class_names_between, 3, 7).result() == tiny.class_names[3:7]
        with pytest.raises(ZeroDivisionError):
            two(failing).result()


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from benchmarks.training.parallel import workers\n"
        "def own_process(data):\n"
        "    return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    with workers(None, 1 + 1) as submit:\n"
        "        print(submit(own_process).result(), flush=True)\n"
        "        submit(time.sleep, 60).result()\n"
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment())
    worker = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        if not is_running(worker):
            break
        time.sleep(0.1)
    assert not is_running(worker)


def class_names_between(splits, start, end):
    return splits.class_names[start:end]


def failing(splits):
    return 1 / 0


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
