"""The table "With the rest of PML" of the package README: a test for every row, and a row for every test."""

import re
from pathlib import Path

import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper
from torch.utils.data import DataLoader

from pml_htl import ClassTree, DynamicMarginMiner, HierarchicalTripletLoss
from pml_htl.losses import CrossBatchMemory, SelfSupervisedLoss

from . import (
    test_devices,
    test_lightning,
    test_precision,
    test_recipe,
    test_refresh_control,
    test_trainers,
    test_transforms,
    test_validation,
    test_waiting,
)
from .distributed import sharded
from .rounding import tolerance
from .test_losses import REDUCERS, TUPLES, assert_same, batch, ours, pmls, run
from .training import NUM_CLASSES, make_dataset, make_htl, make_trainer

README = (Path(__file__).parents[1] / "pml_htl" / "README.md").read_text(encoding="utf-8")
CPU = torch.device("cpu")
ROWS = {}


def row(name, verdict):
    def add(function):
        ROWS[name] = verdict, function
        return function

    return add


def table():
    """{first column: second column} of the README's table."""
    section = README.split("## With the rest of PML\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\| (.*?) \| (works|refused) \|", section, re.MULTILINE)
    assert len(lines) == len(re.findall(r"^\|", section, re.MULTILINE)) - 2  # all but the head
    return dict(lines)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "`torch.compile`" else name for name in table()]
)
def test_row(name, request):
    verdict, function = ROWS[name]
    assert verdict == table()[name]
    function(
        *(request.getfixturevalue(fixture) for fixture in function.__code__.co_varnames[: function.__code__.co_argcount])
    )


def test_every_row_stands_in_the_table():
    assert list(ROWS) == list(table())


def fitted():
    embeddings, labels = batch()
    return ClassTree().fit_embeddings(embeddings, labels), embeddings, labels


@row("`CrossBatchMemory`", "works")
def memory():
    for step in range(6):
        embeddings, labels = batch(step, dtype=torch.float64)  # in float32 rounding decides which triplets of so many count
        if step == 0:
            both = CrossBatchMemory(ours(), 16, 50), losses.CrossBatchMemory(pmls(), 16, 50)
        one, other = (memory(embeddings, labels) for memory in both)
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance(one.dtype))


@row("PML's own `CrossBatchMemory`", "refused")
def pmls_memory():
    with pytest.raises(Exception, match="not supported for HierarchicalTripletLoss"):
        losses.CrossBatchMemory(ours(), 16)


@row("`MultipleLosses`", "works")
def multiple_losses():
    embeddings, labels = batch()
    parts = {"htl": ours(), "contrastive": losses.ContrastiveLoss()}
    for chosen in (None, {"htl": DynamicMarginMiner(ClassTree(), type_of_triplets="semihard")}):
        both = losses.MultipleLosses(parts, chosen, {"htl": 2, "contrastive": 0.5})
        found = chosen and chosen["htl"](embeddings, labels)
        expected = 2 * parts["htl"](embeddings, labels, found) + 0.5 * parts["contrastive"](embeddings, labels)
        assert both(embeddings, labels) == expected


@row("`DistributedLossWrapper`, `DistributedMinerWrapper`", "works")
def distributed(tmp_path):
    """In one process; `tests/pml/test_distributed.py` has two."""
    tree, embeddings, labels = fitted()
    miner = DynamicMarginMiner(tree, type_of_triplets="semihard")
    loss = HierarchicalTripletLoss(miner)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'group'}", world_size=1, rank=0)
    try:
        for efficient in (False, True):
            mined = DistributedMinerWrapper(miner, efficient)(embeddings, labels)
            assert DistributedLossWrapper(loss, efficient)(embeddings, labels, mined) == loss(embeddings, labels, mined) > 0
    finally:
        torch.distributed.destroy_process_group()


@row("`SelfSupervisedLoss`", "refused")
def self_supervised():
    with pytest.raises(ValueError, match=r"makes up the labels 0 \.\. B-1"):
        SelfSupervisedLoss(ours())
    with pytest.raises(Exception, match="not supported for HierarchicalTripletLoss"):
        losses.SelfSupervisedLoss(ours())
    embeddings, _ = batch()
    both = (wrapper(losses.TripletMarginLoss()) for wrapper in (SelfSupervisedLoss, losses.SelfSupervisedLoss))
    one, other = (wrapped(embeddings, embeddings.flip(1)) for wrapped in both)
    assert one == other > 0  # other losses are as ever


row("`MetricLossOnly`", "works")(test_trainers.test_metric_loss_only)
row("`TrainWithClassifier`", "works")(test_trainers.test_train_with_classifier)
row("`TwoStreamMetricLoss`", "works")(lambda: test_trainers.test_both_streams_of_two_stream_metric_loss_count(False))
row("`CascadedEmbeddings`", "works")(test_trainers.test_cascaded_embeddings_have_a_tree_for_each_slice)
row("`CascadedEmbeddings`, one tree for two slices", "refused")(
    test_trainers.test_cascaded_embeddings_refuse_one_tree_for_two_slices
)
row("`DeepAdversarialMetricLearning`", "works")(test_trainers.test_deep_adversarial_metric_learning)


def same_as_pml(names, **kwargs):
    embeddings, labels = batch()
    for name in names:
        results = [run(make(reducer=REDUCERS[name](), **kwargs), embeddings, labels) for make in (ours, pmls)]
        assert not isinstance(results[0], type), name
        assert_same(*results)


@row("`AvgNonZeroReducer`, `MeanReducer`, `SumReducer`, `ThresholdReducer`, `ClassWeightedReducer`", "works")
def reducers_of_sums():
    same_as_pml(["avg-non-zero", "mean", "sum", "threshold", "class-weighted"])


@row("`MultipleReducers`, `DoNothingReducer`, reducers of your own", "works")
def reducers_of_lists():
    class Largest(reducers.BaseReducer):
        def triplet_reduction(self, losses, *_):
            return losses.max()

    same_as_pml(["multiple", "do-nothing"])
    embeddings, labels = batch()
    assert_same(*(run(make(reducer=Largest()), embeddings, labels) for make in (ours, pmls)))


@row("`PerAnchorReducer`, `DivisorReducer`", "refused")
def reducers_without_triplets():
    embeddings, labels = batch()
    for reducer, error in ((reducers.PerAnchorReducer(), NotImplementedError), (reducers.DivisorReducer(), KeyError)):
        for make in (ours, pmls):
            with pytest.raises(error):
                make(reducer=reducer)(embeddings, labels)


@row("`embedding_regularizer`", "works")
def regularizer():
    for kind in (regularizers.LpRegularizer, regularizers.ZeroMeanRegularizer):  # PML's others are of weights
        same_as_pml(["default", "sum"], embedding_regularizer=kind(), embedding_reg_weight=0.5)


@row("`LpDistance(p=2)` with `power=2` or `power=1`", "works")
def the_distances():
    for power in (1, 2):
        same_as_pml(["default", "mean"], power=power)


@row("other distances", "refused")
def other_distances():
    for distance in (distances.CosineSimilarity(), distances.SNRDistance(), distances.LpDistance(p=1)):
        with pytest.raises(ValueError, match="the margins are squared or plain Euclidean distances"):
            DynamicMarginMiner(ClassTree(), distance=distance)


@row("`indices_tuple` of triplets or pairs, `ref_emb`", "works")
def tuples():
    embeddings, labels = batch()
    ref = {"ref_emb": embeddings.flip(0), "ref_labels": labels.flip(0)}
    for name in ("triplets", "pairs"):
        indices_tuple = TUPLES[name](embeddings, labels)
        for inputs in ({"indices_tuple": indices_tuple}, {"indices_tuple": indices_tuple, **ref}, ref):
            assert_same(*(run(make(), embeddings, labels, **inputs) for make in (ours, pmls)))


@row("`swap=True` with `ref_emb`", "refused")
def swap_with_ref_emb():
    embeddings, labels = batch()
    with pytest.raises(ValueError, match="swap=True does not work with ref_emb"):
        ours(swap=True)(embeddings, labels, ref_emb=embeddings.clone(), ref_labels=labels)


@row("`tuple_miner`", "works")
def tuple_miner():
    dataset = make_dataset()
    for make_miner in (
        lambda tree: DynamicMarginMiner(tree, type_of_triplets="hard"),
        lambda _: miners.TripletMarginMiner(0.2),
        lambda _: miners.MultiSimilarityMiner(),
    ):
        htl = make_htl(dataset.tensors[1])
        mining = {"tuple_miner": make_miner(htl.tree)}
        trainer = make_trainer(htl, dataset, htl.refresh_hook(dataset), mining_funcs=mining)
        before = trainer.models["embedder"].weight.clone()
        trainer.train(num_epochs=2)
        assert htl.tree.is_fitted and not torch.equal(before, trainer.models["embedder"].weight)


@row("`collect_stats`", "works")
def collect_stats():
    tree, embeddings, labels = fitted()
    loss = HierarchicalTripletLoss(DynamicMarginMiner(tree), collect_stats=True)
    loss(embeddings, labels)
    assert 0 < loss.active_share < 1 and loss.min_margin < loss.margin < loss.max_margin


def scheme(*names):
    return lambda: [test_trainers.test_labels(name) for name in names] and None


row("`set_min_label_to_zero`", "works")(scheme("set_min_label_to_zero", "label_hierarchy_level, mapped"))
row("`label_hierarchy_level`, one level", "works")(scheme("label_hierarchy_level", "a list of labels, one a level"))
row("`label_hierarchy_level`, several levels", "refused")(test_trainers.test_all_levels_at_once_are_refused)
row("`data_and_label_getter`, `collate_fn`, dictionary batches", "works")(scheme("collate_fn", "dictionary batches"))
row("labels as tensors, arrays, lists, or strings that your getter maps", "works")(
    scheme("tensors", "integers", "arrays", "strings")
)


@row("`HTL(..., samples_per_class=1)`, or batches of one class", "refused")
def batches_without_triplets():
    test_recipe.test_batches_without_triplets_are_refused((2, 3, 1), "no sample of a batch has a positive")
    test_recipe.test_batches_without_triplets_are_refused((1, 1, 4), "no sample of a batch has a negative")


row("`freeze_these`, `freeze_trunk_batchnorm`", "works")(test_trainers.test_frozen_models_and_batchnorm_stay_frozen)
row("`dataloader_num_workers`, persistent workers, spawned workers", "works")(
    test_refresh_control.test_persistent_workers_bring_no_batches_of_the_old_tree
)


@row("float16 and bfloat16 autocast", "works")
def autocast():
    for dtype in test_precision.HALF:
        test_precision.test_a_training_step_under_autocast(fitted(), dtype, CPU)


@row("models in bfloat16 or float64", "works")
def models():
    for dtype in (torch.bfloat16, torch.float64):
        test_precision.test_models_in_bfloat16_and_float64_train_with_memory(fitted(), dtype, CPU)


@row("devices without float64: MPS, many Intel GPUs", "works")
def without_float64(poor_device):
    test_devices.test_the_loss(poor_device, "sums", 2)
    test_devices.test_a_tree_that_moves_there_keeps_every_digit(poor_device, False)


@row("a validation loss on unseen classes, in a plain loop or a Lightning `validation_step`", "works")
def validation():
    test_validation.test_a_plain_loop_with_a_validation_loss_trains_as_one_without(False)
    test_lightning.test_a_validation_loss_on_unseen_classes(False)


@row("`.half()` on the loss", "works")
def half():
    test_precision.test_a_cast_of_the_loss_does_no_harm_to_the_tree(fitted(), "half")


@row('`mode="streaming"` while some classes have not been in a batch', "works")
def streaming_while_classes_wait():
    test_waiting.test_classes_join_refresh_by_refresh_and_nothing_warns()


@row("`torch.compile`", "works")
def compiled():
    test_precision.test_compiled_with_the_model(fitted(), CPU)


def in_shards(split_batches, num_replicas):
    """The batches that accelerate gives to each of two processes, whose samplers yield parts or wholes."""
    data_loader = pytest.importorskip("accelerate.data_loader")
    made = [
        make_htl(make_dataset().tensors[1], num_anchors=4, neighborhood_size=2, num_replicas=num_replicas, rank=rank)
        for rank in (range(2) if num_replicas == 2 else (0, 0))
    ]
    shards = [data_loader.BatchSamplerShard(htl.sampler, 2, rank, split_batches) for rank, htl in enumerate(made)]
    return [list(DataLoader(range(10**6), batch_sampler=shard)) for shard in shards]


@row("accelerate", "works")
def accelerate():
    """In one process; `tests/distributed/test_engines.py` has two."""
    one, other = (torch.stack(batches) for batches in in_shards(split_batches=True, num_replicas=1))
    htl = make_htl(make_dataset().tensors[1], num_anchors=4, neighborhood_size=2)
    assert torch.cat([one, other], dim=1).tolist() == list(htl.sampler)


@row("accelerate, a prepared loader and the sampler's parts of batches", "refused")
def accelerate_with_parts():
    for split_batches in (False, True):
        with pytest.raises(ValueError, match=r"do not prepare the loader; or .*split_batches=True.*rank=0"):
            in_shards(split_batches, num_replicas=2)


@row("Hugging Face's `Trainer`", "works")
def hugging_face():
    """In one process; `tests/distributed/test_engines.py` has two."""
    pytest.importorskip("transformers")
    from .distributed import engines

    found = engines.hugging_face()
    untrained = engines.flat(engines.make_model().parameters())
    assert (found["weights"] - untrained).abs().max() > 1e-2 and len(found["nodes"]) == NUM_CLASSES


@row("FSDP and FSDP2", "works")
def fsdp(tmp_path):
    """In one process; `tests/distributed/test_sharded.py` has two."""
    expected = sharded.refresh(lambda model: model)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'group'}", world_size=1, rank=0)
    try:
        for wrap in sharded.WRAPPERS.values():
            assert torch.equal(sharded.refresh(wrap)["nodes"], expected["nodes"])
    finally:
        torch.distributed.destroy_process_group()


row("`torch.func`: `grad`, `vmap`, `jvp`, `jacrev`, `jacfwd`, `hessian`", "works")(
    test_transforms.test_what_pmls_triplet_loss_can_do_this_can
)


@row("`CrossBatchMemory` under `torch.func`", "refused")
def transformed_memory():
    embeddings, labels = batch()
    for memory in (CrossBatchMemory(ours(), 16, 50), losses.CrossBatchMemory(pmls(), 16, 50)):
        with pytest.raises(RuntimeError, match="in-place operation"):
            torch.func.grad(memory)(embeddings, labels)


@row("`torch.use_deterministic_algorithms(True)`", "works")
def deterministic(monkeypatch):
    for options in ({}, {"temperature": 0.05}, {"swap": True}):
        test_precision.test_deterministic_algorithms_are_enough(fitted(), 2, "all", options, monkeypatch)
