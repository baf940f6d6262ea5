"""In every trainer and label scheme of PML, is the tree that of the embeddings and labels which the loss sees?"""

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.trainers import (
    CascadedEmbeddings,
    DeepAdversarialMetricLearning,
    MetricLossOnly,
    TrainWithClassifier,
    TwoStreamMetricLoss,
)
from torch.utils.data import Dataset, TensorDataset

from pml_htl import ClassTree

from .training import NUM_CLASSES, embed, make_dataset, make_htl, make_models, make_trainer, same_tree

INPUTS, LABELS = make_dataset().tensors
MAPPED = (LABELS + 7) // 3  # 0 .. 23, as the trainer's set_min_label_to_zero makes them
NAMES = [f"class {label}" for label in LABELS.tolist()]


class Samples(Dataset):
    """Whatever `sample(index)` makes of a sample."""

    def __init__(self, sample):
        self.sample = sample

    def __len__(self):
        return len(INPUTS)

    def __getitem__(self, index):
        return self.sample(index)


def train(labels, dataset, num_epochs=2, **kwargs):
    """Trains with a refresh after each epoch; returns the trainer and the HTL."""
    htl = make_htl(labels)
    trainer = make_trainer(htl, dataset, htl.refresh_hook(dataset, batch_size=40), **kwargs)
    trainer.train(num_epochs=num_epochs)
    assert all(module.training for model in trainer.models.values() for module in model.modules())
    return trainer, htl


def expected_tree(trainer, labels, inputs=INPUTS, part=slice(None)):
    return ClassTree().fit_embeddings(embed(trainer, inputs)[:, part], labels)


# Trainers


def test_metric_loss_only():
    trainer, htl = train(LABELS, TensorDataset(INPUTS, LABELS))
    assert type(trainer) is MetricLossOnly and same_tree(htl.tree, expected_tree(trainer, LABELS))


def test_train_with_classifier():
    dataset, htl = TensorDataset(INPUTS, MAPPED), make_htl(MAPPED)
    losses = {"metric_loss": htl.loss, "classifier_loss": torch.nn.CrossEntropyLoss()}
    hook, models = htl.refresh_hook(dataset), make_models("classifier")
    trainer = make_trainer(htl, dataset, hook, TrainWithClassifier, models=models, loss_funcs=losses)
    trainer.train(num_epochs=2)
    assert same_tree(htl.tree, expected_tree(trainer, MAPPED)) and models["classifier"].training


@pytest.mark.parametrize("with_miner", [False, True])
@pytest.mark.filterwarnings("ignore:the tuple miner with type_of_triplets")
def test_both_streams_of_two_stream_metric_loss_count(with_miner):
    other = INPUTS + 0.5 * torch.randn(INPUTS.shape, generator=torch.Generator().manual_seed(1))
    dataset, htl = TensorDataset(INPUTS, other, LABELS), make_htl(LABELS)
    mining = {"tuple_miner": htl.miner} if with_miner else None
    trainer = make_trainer(htl, dataset, htl.refresh_hook(dataset), TwoStreamMetricLoss, mining_funcs=mining)
    before = [parameter.clone() for parameter in trainer.models["trunk"].parameters()]
    trainer.train(num_epochs=2)
    assert same_tree(htl.tree, expected_tree(trainer, LABELS.repeat(2), torch.cat([INPUTS, other])))
    assert not all(map(torch.equal, before, trainer.models["trunk"].parameters()))


def make_cascaded(first, second, hook, dataset):
    losses = {"metric_loss_0": first.loss, "metric_loss_1": second.loss}
    return make_trainer(first, dataset, hook, CascadedEmbeddings, loss_funcs=losses, embedding_sizes=[5, 3])


def test_cascaded_embeddings_have_a_tree_for_each_slice():
    dataset, first, second = TensorDataset(INPUTS, LABELS), make_htl(LABELS), make_htl(LABELS)
    hook = first.refresh_hook(dataset, then=second.refresh_hook(dataset))
    trainer = make_cascaded(first, second, hook, dataset)
    trainer.train(num_epochs=2)
    assert same_tree(first.tree, expected_tree(trainer, LABELS, part=slice(0, 5)))
    assert same_tree(second.tree, expected_tree(trainer, LABELS, part=slice(5, 8)))
    assert not same_tree(first.tree, second.tree)


def test_cascaded_embeddings_refuse_one_tree_for_two_slices():
    dataset, htl = TensorDataset(INPUTS, LABELS), make_htl(LABELS)
    with pytest.raises(ValueError, match=r"metric_loss_0 and metric_loss_1 share one class tree.*a tree .* of its own"):
        make_cascaded(htl, htl, htl.refresh_hook(dataset), dataset).train(num_epochs=1)
    assert not htl.tree.is_fitted


def test_cascaded_embeddings_find_the_slice_of_a_tree_in_a_tuple_miner():
    dataset, htl, other = TensorDataset(INPUTS, LABELS), make_htl(LABELS), make_htl(LABELS)
    options = {"embedding_sizes": [5, 3], "mining_funcs": {"tuple_miner_1": htl.miner}}
    losses = {"metric_loss_0": TripletMarginLoss(), "metric_loss_1": TripletMarginLoss()}
    hook = htl.refresh_hook(dataset)
    trainer = make_trainer(htl, dataset, hook, CascadedEmbeddings, loss_funcs=losses, **options)
    trainer.train(num_epochs=1)
    assert same_tree(htl.tree, expected_tree(trainer, LABELS, part=slice(5, 8)))
    losses["metric_loss_0"] = other.loss
    options["mining_funcs"] = {"tuple_miner_1": other.miner}
    trainer = make_trainer(other, dataset, other.refresh_hook(dataset), CascadedEmbeddings, loss_funcs=losses, **options)
    with pytest.raises(ValueError, match="metric_loss_0 and tuple_miner_1 share one class tree"):
        trainer.train(num_epochs=1)


def test_cascaded_embeddings_with_the_tree_in_the_sampler_alone():
    dataset, htl = TensorDataset(INPUTS, LABELS), make_htl(LABELS)
    losses = {"metric_loss_0": TripletMarginLoss(), "metric_loss_1": TripletMarginLoss()}
    hook = htl.refresh_hook(dataset)
    trainer = make_trainer(htl, dataset, hook, CascadedEmbeddings, loss_funcs=losses, embedding_sizes=[5, 3])
    trainer.train(num_epochs=1)
    assert same_tree(htl.tree, expected_tree(trainer, LABELS))


def test_deep_adversarial_metric_learning():
    dataset, htl = TensorDataset(INPUTS, LABELS), make_htl(LABELS)
    losses = {"metric_loss": htl.loss, "synth_loss": htl.loss, "g_adv_loss": TripletMarginLoss()}
    models = {**make_models(), "generator": torch.nn.Linear(48, 16)}
    hook = htl.refresh_hook(dataset)
    trainer = make_trainer(
        htl, dataset, hook, DeepAdversarialMetricLearning, models=models, loss_funcs=losses, g_triplets_per_anchor=2,
        loss_weights={name: 1 for name in [*losses, "g_hard_loss", "g_reg_loss"]},
    )  # fmt: skip
    trainer.train(num_epochs=2)
    assert same_tree(htl.tree, expected_tree(trainer, LABELS))


# Options of trainers


def test_frozen_models_and_batchnorm_stay_frozen():
    dataset, htl = TensorDataset(INPUTS, LABELS), make_htl(LABELS)
    models = make_models()
    running_mean = models["trunk"][1].running_mean.clone()
    optimizers = {"embedder_optimizer": torch.optim.SGD(models["embedder"].parameters(), 0.05)}
    modes = []

    def note_modes(trainer):
        modes.append([module.training for model in trainer.models.values() for module in model.modules()])

    for options in ({"freeze_these": ("trunk",), "optimizers": optimizers}, {"freeze_trunk_batchnorm": True}):
        modes.clear()
        hook = htl.refresh_hook(dataset, then=note_modes)
        trainer = make_trainer(htl, dataset, hook, models=models, **options)
        trainer.train(num_epochs=1)
        trainer.set_to_train()
        note_modes(trainer)
        assert modes[0] == modes[1] and not all(modes[0])
        assert torch.equal(models["trunk"][1].running_mean, running_mean)


def test_models_and_data_in_float64():
    models = {name: model.double() for name, model in make_models().items()}
    trainer, htl = train(LABELS, TensorDataset(INPUTS, LABELS), models=models, dtype=torch.float64)
    assert same_tree(htl.tree, expected_tree(trainer, LABELS, INPUTS.double()))


# Label schemes: how the data set gives labels, what the trainer is told, and which labels the loss then sees

SCHEMES = {
    "tensors": (lambda i: (INPUTS[i], LABELS[i]), {}, LABELS),
    "integers": (lambda i: (INPUTS[i], int(LABELS[i])), {}, LABELS),
    "arrays": (lambda i: (INPUTS[i].numpy(), LABELS[i].numpy()), {}, LABELS),
    "set_min_label_to_zero": (
        lambda i: (INPUTS[i], LABELS[i]),
        {"set_min_label_to_zero": True, "dataset_labels": LABELS.tolist()},
        MAPPED,
    ),
    "label_hierarchy_level": (
        lambda i: (INPUTS[i], torch.stack([LABELS[i] // 30, LABELS[i]])),
        {"label_hierarchy_level": 1},
        LABELS,
    ),
    "label_hierarchy_level, mapped": (
        lambda i: (INPUTS[i], torch.stack([LABELS[i] // 30, LABELS[i]])),
        {
            "label_hierarchy_level": 1,
            "set_min_label_to_zero": True,
            "dataset_labels": torch.stack([LABELS // 30, LABELS], dim=1).tolist(),
        },
        MAPPED,
    ),
    "a list of labels, one a level": (
        lambda i: (INPUTS[i], [int(LABELS[i]) // 30, int(LABELS[i])]),
        {"label_hierarchy_level": 1},
        LABELS,
    ),
    "dictionary batches": (
        lambda i: {"image": INPUTS[i], "label": LABELS[i]},
        {"data_and_label_getter": lambda batch: (batch["image"], batch["label"])},
        LABELS,
    ),
    "collate_fn": (
        lambda i: (INPUTS[i], LABELS[i]),
        {"collate_fn": lambda batch: (torch.stack([x for x, _ in batch]), np.array([int(y) for _, y in batch]))},
        LABELS,
    ),
    "strings": (
        lambda i: (INPUTS[i], NAMES[i]),
        {"data_and_label_getter": lambda batch: (batch[0], torch.tensor([int(name.split()[1]) for name in batch[1]]))},
        LABELS,
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_labels(scheme):
    sample, options, labels = SCHEMES[scheme]
    trainer, htl = train(labels, Samples(sample), **options)
    assert same_tree(htl.tree, expected_tree(trainer, labels))


@pytest.mark.parametrize("labels", [LABELS.tolist(), LABELS.numpy().astype(np.int32), LABELS.to(torch.int16)], ids=type)
def test_the_sampler_takes_labels_of_any_container(labels):
    trainer, htl = train(labels, TensorDataset(INPUTS, LABELS))
    assert same_tree(htl.tree, expected_tree(trainer, LABELS))


def test_all_levels_at_once_are_refused():
    dataset, htl = TensorDataset(INPUTS, torch.stack([LABELS // 30, LABELS], dim=1)), make_htl(LABELS)
    for level in ("all", [0, 1]):
        hook = htl.refresh_hook(dataset, warmup_epochs=0)
        with pytest.raises(ValueError, match=r"shape \(.*, 2\).*a single label_hierarchy_level"):
            hook.before_training(make_trainer(htl, dataset, hook, label_hierarchy_level=level))


# Mismatches: every one of these would train without an error, on margins of the wrong classes


def refused(match, labels, dataset=None, refreshed=None, tree_labels=None, **kwargs):
    dataset = TensorDataset(INPUTS, LABELS) if dataset is None else dataset
    htl = make_htl(labels)
    if tree_labels is not None:
        htl.tree.fit_embeddings(INPUTS, tree_labels)
    nodes = htl.tree.nodes
    hook = htl.refresh_hook(dataset if refreshed is None else refreshed, warmup_epochs=0)
    with pytest.raises(ValueError, match=match):
        hook.before_training(make_trainer(htl, dataset, hook, **kwargs))
    assert htl.tree.nodes is nodes and hook.num_refreshes == 0


def test_a_sampler_with_raw_labels_under_a_trainer_that_maps_them():
    mapping = {"set_min_label_to_zero": True, "dataset_labels": LABELS.tolist()}
    refused(r"sample 0 .* label -7 in the AnchorNeighborSampler, .* loss label 0; give the sampler", LABELS, **mapping)


def test_a_sampler_with_labels_of_another_level_of_the_same_values():
    """Both levels have the labels 0 .. 23, so nothing that compares sets of labels could tell."""
    levels = torch.stack([MAPPED, (MAPPED + 5) % NUM_CLASSES], dim=1)
    refused(r"sample 0 .* label 5 .* loss label 0;", levels[:, 1], TensorDataset(INPUTS, levels))


def test_a_refresh_over_another_data_set():
    other = TensorDataset(INPUTS, LABELS + 1)
    refused(r"the AnchorNeighborSampler lacks labels -6, .*\(24 in all\)", LABELS, refreshed=other)
    half = TensorDataset(INPUTS[:-6], LABELS[:-6])
    refused(r"the data set lacks label 62; .* or give TreeRefresh the whole training set", LABELS, refreshed=half)
    sampler = MPerClassSampler(LABELS, 2, 18, 18 * 20)
    refused(r"trains on label.* not in the refresh's data set of 24", LABELS, refreshed=other, sampler=sampler)


def test_a_tree_that_was_fitted_on_other_labels():
    refused(r"the class tree, .* lacks labels -7, .* begin with a new ClassTree", LABELS, tree_labels=LABELS + 100)
    sampler = MPerClassSampler(LABELS, 2, 18, 18 * 20)
    refused(r"change the trainer's label mapping to", LABELS, tree_labels=MAPPED, sampler=sampler)


def test_later_refreshes_may_find_new_classes_only_without_a_sampler_of_ours():
    """The comparison with a tree is for the first refresh; after that the tree is the refresh's own."""
    dataset, htl = TensorDataset(INPUTS, LABELS), make_htl(LABELS)
    sampler = MPerClassSampler(LABELS, 2, 18, 18 * 20)
    hook = htl.refresh_hook(dataset, warmup_epochs=0)
    trainer = make_trainer(htl, dataset, hook, sampler=sampler)
    hook.before_training(trainer)
    hook.dataset = TensorDataset(INPUTS, LABELS + 1)
    hook.before_training(trainer)
    assert htl.tree.labels.tolist() == (LABELS + 1).unique().tolist()
