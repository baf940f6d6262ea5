"""Half precision, float64, autocast, other devices, deterministic algorithms and torch.compile."""

import contextlib
import copy

import pytest
import torch
from pytorch_metric_learning import reducers
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.miners import MultiSimilarityMiner, TripletMarginMiner
from torch.utils._python_dispatch import TorchDispatchMode

from pml_htl import ClassTree, DynamicMarginMiner, HierarchicalTripletLoss
from pml_htl.arithmetic import triplets
from pml_htl.losses import CrossBatchMemory

pytestmark = pytest.mark.numerical

HALF = [torch.float16, torch.bfloat16]


@pytest.fixture
def fitted(device):
    """A fitted tree with a batch of its classes: the embeddings have the precision of bfloat16, so that casts are exact."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12).repeat_interleave(4)
    centres = torch.randn(12, 16, generator=generator)
    embeddings = (centres[labels] + 0.7 * torch.randn(48, 16, generator=generator)).bfloat16().float()
    return ClassTree().fit_embeddings(embeddings, labels), embeddings.to(device), labels


def make(tree, power=2, **kwargs):
    return HierarchicalTripletLoss(DynamicMarginMiner(tree, distance=LpDistance(power=power)), **kwargs)


@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("options", [{}, {"swap": True}, {"reducer": reducers.MeanReducer()}], ids=str)
def test_embeddings_of_any_float_type_give_the_loss_of_float32(fitted, dtype, power, options):
    tree, embeddings, labels = fitted
    results = []
    for kind in (torch.float32, dtype):
        leaf = embeddings.clone().to(kind).requires_grad_()
        loss = make(tree, power, **options)(leaf, labels)
        loss.backward()
        assert leaf.grad.dtype == kind and loss.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
        results.append((loss.item(), leaf.grad.double()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-2, atol=1e-5)  # a gradient in half precision


@pytest.mark.parametrize("dtype", HALF)
def test_under_autocast_nothing_is_computed_in_half_precision(fitted, dtype, device):
    tree, embeddings, labels = fitted
    ref = {"ref_emb": embeddings.flip(0), "ref_labels": labels.flip(0)}
    for inputs in ({}, ref):
        loss, miner = make(tree), DynamicMarginMiner(tree, type_of_triplets="semihard")
        expected = loss(embeddings, labels, **inputs), miner(embeddings, labels, *inputs.values())
        with torch.autocast(device.type, dtype=dtype):
            found = loss(embeddings.to(dtype), labels, **inputs), miner(embeddings.to(dtype), labels, *inputs.values())
            assert torch.is_autocast_enabled(device.type)
        assert found[0] == expected[0] and found[0].dtype == torch.float32
        assert all(map(torch.equal, found[1], expected[1]))


@pytest.mark.parametrize("dtype", HALF)
def test_a_training_step_under_autocast(fitted, dtype, device):
    tree, inputs, labels = fitted
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    loss, values = make(tree), []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype):
            embeddings = model(inputs)
            assert embeddings.dtype == dtype
            value = loss(embeddings, labels)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_in_bfloat16_and_float64_train_with_memory(fitted, dtype, device):
    tree, inputs, labels = fitted
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 8).to(device, dtype)
    loss = CrossBatchMemory(make(tree), 8, memory_size=100)
    for _ in range(4):
        loss(model(inputs.to(dtype)), labels.to(device)).backward()
    assert loss.embedding_memory.dtype == dtype and model.weight.grad.isfinite().all() and (model.weight.grad != 0).any()


@pytest.mark.parametrize("change", ["half", "bfloat16", "double", "to"])
def test_a_cast_of_the_loss_does_no_harm_to_the_tree(fitted, change):
    tree, embeddings, labels = fitted
    loss = make(tree)
    before, expected = copy.deepcopy(tree.state_dict()), loss(embeddings, labels)
    loss = loss.to(torch.float16) if change == "to" else getattr(loss, change)()
    assert loss.miner.tree is tree
    for name, value in tree.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    assert loss(embeddings, labels) == expected


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("reducer", ["AvgNonZero", "Mean", "Sum", "ClassWeighted"])
def test_a_step_does_not_wait_for_the_device(fitted, where, with_ref, reducer):
    """On the meta device there are no values: whoever asks for one, or for a shape that depends on one, gets an error."""
    tree, embeddings, labels = fitted
    arguments = [torch.ones(12)] if reducer == "ClassWeighted" else []
    loss = make(tree, reducer=getattr(reducers, f"{reducer}Reducer")(*arguments))
    labels = labels.to("meta" if where == "device" else "cpu")
    leaf = embeddings.to("meta").requires_grad_()
    ref = {"ref_emb": embeddings.to("meta"), "ref_labels": labels.clone()} if with_ref else {}
    value = loss(leaf, labels, **ref)
    value.backward()
    assert value.device.type == "meta" and leaf.grad.shape == leaf.shape
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):  # the list of triplets does wait
        make(tree, swap=True)(leaf, labels)


def test_labels_on_the_host_are_checked_before_they_move(fitted):
    tree, embeddings, labels = fitted
    for module in (make(tree), DynamicMarginMiner(tree)):
        with pytest.raises(ValueError, match=r"label 12 not among the 12 classes of the class tree"):
            module(embeddings.to("meta"), labels + 1)
        with pytest.raises(ValueError, match=r"label 12 not among"):
            module(embeddings.to("meta"), labels, ref_emb=embeddings.to("meta"), ref_labels=labels + 1)


def test_a_tree_on_another_device_is_copied_there_once_per_fit(fitted):
    tree, embeddings, labels = fitted
    there = labels.to("meta")
    tree.merge_levels(there, there)
    copied = tree._on(there.device, "nodes")
    tree.merge_levels(there, there)
    assert tree._on(there.device, "nodes") is copied
    tree.fit_embeddings(embeddings.cpu(), labels)
    assert tree._on(there.device, "nodes") is not copied


class RefusesAsCuda(TorchDispatchMode):
    """Raises where `torch.use_deterministic_algorithms(True)` does on CUDA, as its documentation lists the operations."""

    ALWAYS = ("put", "put_", "histc", "median", "nanmedian", "kthvalue", "nll_loss_forward", "_ctc_loss", "logcumsumexp")

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        running = name.startswith(("cumsum", "cumprod")) and args[0].is_floating_point()
        weighted = name == "bincount" and ((len(args) > 1 and args[1] is not None) or kwargs.get("weights") is not None)
        multiplied = name.startswith("scatter_reduce") and args[4] == "prod"
        if name in self.ALWAYS or running or weighted or multiplied:
            raise RuntimeError(f"{name} does not have a deterministic implementation")
        return operation(*args, **kwargs)


@contextlib.contextmanager
def deterministic():
    """Deterministic algorithms are asked for, on a device where they may be missing."""
    torch.use_deterministic_algorithms(True)
    try:
        with RefusesAsCuda():
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("tuples", ["all", "triplets", "pairs"])
@pytest.mark.parametrize(
    "options",
    [{}, {"reducer": reducers.ThresholdReducer(low=0.1, high=0.9)}, {"temperature": 0.05}, {"swap": True},
     {"smooth_loss": True}, {"collect_stats": True}],
    ids=str,
)  # fmt: skip
def test_deterministic_algorithms_are_enough(fitted, power, tuples, options, monkeypatch):
    monkeypatch.setattr(triplets, "_most", lambda numbers: None)  # as on a GPU, where looking is not free
    tree, embeddings, labels = fitted
    leaf = embeddings.cpu().double().requires_grad_()
    mined = {"all": None, "triplets": TripletMarginMiner(0.1), "pairs": MultiSimilarityMiner()}[tuples]
    loss, results = make(tree, power, **options), []
    for context in (deterministic, contextlib.nullcontext):
        with context():
            ClassTree().fit_embeddings(leaf.detach(), labels)
            DynamicMarginMiner(tree, collect_stats=True)(leaf, labels)
            value = loss(leaf, labels, mined and mined(leaf, labels))
            results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_compiled_with_the_model(fitted, device):
    tree, inputs, labels = fitted
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 8).to(device)
    loss = make(tree, reducer=reducers.MeanReducer())

    def step(inputs, labels):
        return loss(model(inputs), labels)

    expected = step(inputs, labels)
    expected.backward()
    gradient = model.weight.grad.clone()
    model.zero_grad()
    compiled = torch.compile(step, backend="aot_eager")  # inductor needs a C++ compiler
    for _ in range(2):
        model.zero_grad()
        value = compiled(inputs, labels)
        value.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(model.weight.grad, gradient)
    tree.fit_embeddings(-inputs.cpu(), labels.flip(0))  # a refresh counts from the next step
    assert compiled(inputs, labels) == step(inputs, labels) != expected
