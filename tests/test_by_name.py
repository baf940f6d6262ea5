"""Any loss by the name of its class: all of PML's train, or are refused with the reason."""

import inspect
import sys

import pytest
import torch
from pytorch_metric_learning import losses

from benchmarks.methods.by_name import REFUSED
from benchmarks.methods.contenders import METHODS, find_method, parse_contender
from benchmarks.methods.method import Task
from pml_htl.losses import CrossBatchMemory

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:{kind}:pytorch_metric_learning.losses")
    for message, kind in [
        ("Using a non-tuple sequence", "UserWarning"),
        ("__array_wrap__ must accept", "DeprecationWarning"),
        ("Values of Tp or Tn are too high", "UserWarning"),
    ]
]
LABELS = torch.arange(12).repeat_interleave(8)
TASK = Task(LABELS, batch_size=32, embedding_size=16, iterations=2, seed=0)
ALL = sorted(name for name, cls in vars(losses).items() if inspect.isclass(cls))


def two_steps(text):
    """Trains a linear model for two steps; whether it and the parameters of the loss have moved."""
    torch.manual_seed(0)
    inputs = torch.randn(12, 8)[LABELS] + 0.5 * torch.randn(96, 8)
    model = torch.nn.Linear(8, 16)
    parts = parse_contender(text).build(TASK)
    learners = [model] + [parts.loss] * (parts.loss_lr is not None)
    before = [parameter.detach().clone() for learner in learners for parameter in learner.parameters()]
    optimizers = [torch.optim.Adam(learner.parameters(), 1e-2) for learner in learners]
    indices = list(parts.sampler)
    batches = indices if isinstance(indices[0], list) else [indices[:32], indices[32:64]]
    for batch in batches[:2]:
        embeddings, labels = model(inputs[batch]), LABELS[batch]
        mined = None if parts.miner is None else parts.miner(embeddings, labels)
        loss = parts.loss(embeddings, labels, mined)
        assert torch.isfinite(loss)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    after = [parameter for learner in learners for parameter in learner.parameters()]
    return [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]


@pytest.mark.parametrize("name", ALL)
def test_every_loss_of_pml_trains_or_is_refused_with_the_reason(name):
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"{name} is no method of its own: it (is|wraps|joins|compares|keeps|takes) "):
            find_method(name)
        return
    assert all(two_steps(name))


def test_what_is_refused_is_there():
    assert set(REFUSED) <= set(ALL)


@pytest.mark.parametrize(
    "text",
    [
        "ArcFaceLoss:sampling=neighbors,scale=32",
        "MultiSimilarityLoss:miner=MultiSimilarityMiner,miner.epsilon=0.2",
        "ContrastiveLoss:distance=CosineSimilarity,pos_margin=1,neg_margin=0",
        "TripletMarginLoss:distance=LpDistance,distance.power=2,miner=TripletMarginMiner,miner.type_of_triplets=hard",
        "ContrastiveLoss:memory=64,miner=PairMarginMiner",
        f"{__name__}:Own:scale=3",
    ],
)
def test_arguments_miners_distances_memories_and_losses_of_ones_own(text):
    assert all(two_steps(text))


class Own(torch.nn.Module):
    def __init__(self, num_classes, embedding_size, scale=2):
        super().__init__()
        self.classify = torch.nn.Linear(embedding_size, num_classes)
        self.scale = scale

    def forward(self, embeddings, labels, indices_tuple=None):
        return torch.nn.functional.cross_entropy(self.scale * self.classify(embeddings), labels)


def test_what_is_given_arrives():
    parts = parse_contender("CircleLoss:m=0.3,gamma=16,distance=CosineSimilarity").build(TASK)
    assert (parts.loss.m, parts.loss.gamma) == (0.3, 16) and type(parts.loss.distance).__name__ == "CosineSimilarity"
    parts = parse_contender("TripletMarginLoss:miner=TripletMarginMiner,miner.margin=0.3,swap=True").build(TASK)
    assert parts.miner.margin == 0.3 and parts.loss.swap is True and parts.tree is None and parts.loss_lr is None
    parts = parse_contender("NTXentLoss:memory=64,miner=MultiSimilarityMiner").build(TASK)
    assert type(parts.loss) is CrossBatchMemory and parts.loss.memory_size == 64 and parts.miner is None
    assert type(parts.loss.miner).__name__ == "MultiSimilarityMiner"
    parts = parse_contender("ProxyNCALoss:loss_lr=0.5,sampling=neighbors").build(TASK)
    assert parts.loss_lr == 0.5 and parts.loss.proxies.shape == (12, 16) and parts.tree is not None
    assert parse_contender(f"{__name__}:Own:scale=3").build(TASK).loss.scale == 3
    assert sys.modules[__name__].Own(2, 3).scale == 2


def test_titles_have_what_differs():
    assert parse_contender("CircleLoss:gamma=80,m=0.2").title == "CircleLoss:m=0.2"
    assert parse_contender(f"{__name__}:Own").title == f"{__name__}:Own"


@pytest.mark.parametrize(
    "text, message",
    [
        ("CircelLoss", "no loss 'CircelLoss' in pytorch_metric_learning.losses; near are: CircleLoss"),
        ("CircleLoss:gama=2", "has no setting 'gama'; it has: .*gamma"),
        ("CircleLoss:m=big", "m of CircleLoss must be a number"),
        ("CircleLoss:samples_per_class=2.5", "samples_per_class of CircleLoss must be an integer"),
        ("CircleLoss:miner=MultiMiner", "no miner 'MultiMiner' .*MultiSimilarityMiner"),
        ("CircleLoss:distance=Cosine", "no distance 'Cosine' .*CosineSimilarity"),
        ("no.such:Loss", "no module 'no.such'"),
        ("torch.nn:Lost", "no loss 'Lost', a torch module, in torch.nn"),
        ("tripelt", "there is no method 'tripelt'; there are: triplet, .*any loss of pytorch_metric_learning"),
    ],
)
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_contender(text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("ArcFaceLoss:memory=64", "ArcFaceLoss"),
        ("CosFaceLoss:distance=LpDistance", "CosFaceLoss"),
    ],
)
def test_what_pml_refuses_is_a_value_error(text, message):
    with pytest.raises(ValueError, match=message):
        parse_contender(text).build(TASK)


def test_the_listed_ones_are_the_classes_with_either_sampler():
    for name in ("supcon", "circle", "soft-triple", "arcface", "normalized-softmax"):
        plain, sampled = METHODS[name], METHODS[f"{name}-sampling"]
        assert plain.defaults | {"sampling": "neighbors"} == sampled.defaults and plain.defaults["sampling"] == "per-class"
