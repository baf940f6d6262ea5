"""Fewer classes, and label noise, in the training set of a comparison."""

import pytest
import torch

from benchmarks import data
from benchmarks.data import LabelledImages, Splits, fewer_classes, with_noise
from benchmarks.outcomes import results
from benchmarks.outcomes.twins import recall_at, twins_of
from benchmarks.training.nearness import twin_ranks
from pml_htl import ClassTree

from .test_benchmarks import RESULTS, run_cli

IMAGES = 10


def make_splits():
    """Classes 0 .. 19 to train on, then 5 to validate and 5 to test, ten images each; a pixel tells which class it is."""

    def part(first, count):
        labels = torch.arange(first, first + count).repeat_interleave(IMAGES)
        return LabelledImages(labels.to(torch.uint8).view(-1, 1, 1, 1).clone(), labels)

    return Splits("made", part(0, 20), part(20, 5), part(25, 5), [f"class {number}" for number in range(30)])


def test_fewer_classes():
    splits = fewer_classes(make_splits(), 7)
    assert splits.train.labels.tolist() == torch.arange(7).repeat_interleave(IMAGES).tolist()
    assert torch.equal(splits.train.images.flatten(), splits.train.labels.to(torch.uint8))
    assert torch.equal(splits.test.labels, make_splits().test.labels)
    with pytest.raises(ValueError, match="made has 20 training classes, but 21 are wanted; lower --classes"):
        fewer_classes(make_splits(), 21)


def test_split_classes_are_two_halves_and_others_stay():
    splits = with_noise(make_splits(), split_share=0.1, wrong_share=0.0)
    original, labels = splits.train.images.flatten().long(), splits.train.labels
    assert labels.unique().tolist() == list(range(22))
    twins = original[labels >= 20].unique().tolist()
    assert len(twins) == 2
    for label in range(20):
        assert (labels[original == label] == label).sum() == (IMAGES // 2 if label in twins else IMAGES)
    # Whoever was numbered behind the training classes is so still, under its own name.
    assert torch.equal(splits.test.images.flatten().long(), splits.test.labels - 2)
    names = [splits.class_names[label] for label in splits.test.labels.unique()]
    assert names == [f"class {number}" for number in range(25, 30)]
    assert [splits.class_names[label] for label in (20, 21)] == [f"class {twin} (twin)" for twin in twins]
    assert splits.twins == tuple(zip(twins, (20, 21), strict=True))


def test_twins_are_found_among_the_most_confusable_pairs():
    """Two classes of 40 are two by mistake; one of them has samples all over the place."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(20, 16, generator=generator)
    splits = with_noise(make_splits(), split_share=0.1, wrong_share=0.0)
    original, labels = splits.train.images.flatten().long(), splits.train.labels
    embeddings = centres[original] + 0.2 * torch.randn(len(labels), 16, generator=generator)
    assert twin_ranks(ClassTree().fit_embeddings(embeddings, labels), splits.twins) == [1, 2]
    embeddings[labels == 20] = torch.randn(IMAGES // 2, 16, generator=generator)
    assert twin_ranks(ClassTree().fit_embeddings(embeddings, labels), splits.twins)[0] == 1


@pytest.mark.parametrize(
    "ranks, precision, expected",
    [
        ([1, 2, 3], 0.9, 0.75),
        ([1, 3, 4, 9], 0.9, 0.25),
        ([1, 3, 4, 9], 0.7, 0.75),  # three of the first four
        ([2, 3, 4], 0.7, 0.75),  # though the very first is none
        ([2, 5], 0.5, 0.25),
        ([], 0.5, 0.0),
        ([9], 0.5, 0.0),
    ],
)
def test_recall_at_a_precision(ranks, precision, expected):
    assert recall_at(precision, ranks, num_twins=4) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the embeddings have collapsed")
def test_a_comparison_with_noise_tells_how_twins_are_found(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(data.IN_MEMORY, "made", make_splits)
    arguments = ["--data", "made", "--iterations", 4, "--epoch-iterations", 2, "--batch-size", 32, "--embedding-size", 8]
    arguments += ["--methods", "htl", "triplet", "--seeds", 0, 1, "--split-classes", 0.1, "--output", tmp_path]
    # Of images of a few pixels, torch's bf16 convolutions give gradients of NaN where the processor has AMX.
    assert run_cli("compare", *arguments, "--precision", "fp32") == 0
    document = results.load(tmp_path / "results.json")
    assert document["metadata"]["plan"]["split_classes"] == 0.1 and twins_of(document) == 2
    capsys.readouterr()
    assert run_cli("table", "--view", "twins", tmp_path / "results.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:4]] == [["| htl", "2"], ["| htl", "4"]] and not lines[4]
    assert run_cli("table", "--view", "twins", RESULTS / "speed.json") == 2


def test_wrong_labels_are_those_of_other_classes():
    splits = with_noise(make_splits(), split_share=0.0, wrong_share=0.05)
    wrong = splits.train.images.flatten().long() != splits.train.labels
    assert wrong.sum() == 10 and splits.train.labels.max() < 20
    again = with_noise(make_splits(), split_share=0.0, wrong_share=0.05)
    assert torch.equal(splits.train.labels, again.train.labels)


def test_no_noise_changes_nothing():
    splits = with_noise(make_splits(), 0.0, 0.0)
    assert torch.equal(splits.train.labels, make_splits().train.labels)
    assert splits.class_names == make_splits().class_names
