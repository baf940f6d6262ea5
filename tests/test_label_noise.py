"""Fewer classes, and label noise, in the training set of a comparison."""

import pytest
import torch

from benchmarks.data import LabelledImages, Splits, fewer_classes, with_noise

IMAGES = 10


def make_splits():
    """Classes 0 .. 19 to train on, then 5 to validate and 5 to test, ten images each; a pixel tells which class it is."""

    def part(first, count):
        labels = torch.arange(first, first + count).repeat_interleave(IMAGES)
        return LabelledImages(labels.to(torch.uint8).view(-1, 1, 1, 1), labels)

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
