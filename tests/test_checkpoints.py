"""Files of a loss as PML writes and reads them: good ones load, others say what is wrong and change nothing."""

import copy

import pytest
import torch
from pytorch_metric_learning.utils.common_functions import load_model, save_model

from pml_htl import ClassTree, DynamicMarginMiner, HierarchicalTripletLoss
from pml_htl.losses import CrossBatchMemory

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.arange(10).repeat_interleave(3)
EMBEDDINGS = torch.randn(30, 8, generator=GENERATOR)
DEVICE = torch.device("cpu")


def loss_with(tree):
    return HierarchicalTripletLoss(DynamicMarginMiner(tree))


def fitted(labels=LABELS, num_levels=16):
    return loss_with(ClassTree(num_levels).fit_embeddings(torch.randn(len(labels), 8, generator=GENERATOR), labels))


def same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("wrap", [lambda loss: loss, lambda loss: CrossBatchMemory(loss, 8, 20)], ids=["plain", "memory"])
def test_a_saved_loss_loads_with_weights_only(tmp_path, wrap):
    saved = wrap(fitted())
    saved(EMBEDDINGS[:20], LABELS[:20])
    save_model(saved, tmp_path / "loss.pth")
    for loss in (wrap(loss_with(ClassTree())), wrap(fitted())):
        loss.load_state_dict(torch.load(tmp_path / "loss.pth", weights_only=True))
        assert same_state(loss.state_dict(), saved.state_dict())


def test_format_version_stands_in_the_file():
    """Version 1 is the first: what a later one must still read, or name."""
    assert loss_with(ClassTree()).state_dict()["miner.tree.format_version"] == 1


BAD = {
    "another number of levels": (
        lambda: fitted(num_levels=8).state_dict(),
        r"num_levels=8, but this tree has num_levels=16",
    ),
    "other classes": (lambda: fitted(LABELS + 2).state_dict(), r"only one of them has labels 0, 1, 10, 11"),
    "a model": (lambda: torch.nn.Linear(3, 4).state_dict(), r"Missing.*miner\.tree\.format_version.*Unexpected.*weight"),
    "a later version": (
        lambda: {**fitted().state_dict(), "miner.tree.format_version": torch.tensor(7)},
        r"format version is 7, this version of pml-htl reads 1 to 6",
    ),
    "a tree and less": (
        lambda: {name: value for name, value in fitted().state_dict().items() if not name.endswith("spreads")},
        r"Missing.*miner\.tree\.spreads",
    ),
    "no state at all": (lambda: [1, 2, 3], r"state_dict to be dict-like"),
}


@pytest.mark.parametrize("kind", BAD)
def test_pmls_loader_says_what_is_wrong_with_a_file_and_changes_nothing(kind, tmp_path):
    make, message = BAD[kind]
    torch.save(make(), tmp_path / "loss.pth")
    loss = fitted()
    before = copy.deepcopy(loss.state_dict())
    with pytest.raises((RuntimeError, TypeError), match=f"(?s){message}"):  # a KeyError would send PML's loader astray
        load_model(loss, tmp_path / "loss.pth", DEVICE)
    assert same_state(before, loss.state_dict())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_an_error_and_changes_nothing(share, tmp_path):
    path = tmp_path / "loss.pth"
    save_model(fitted(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    loss = fitted()
    before = copy.deepcopy(loss.state_dict())
    with pytest.raises(Exception) as caught:
        load_model(loss, path, DEVICE)
    assert not isinstance(caught.value, KeyError)
    assert same_state(before, loss.state_dict())


class Model(torch.nn.Module):
    """A network that holds its loss, and perhaps another head."""

    def __init__(self, loss, *heads):
        super().__init__()
        for head in heads:
            self.add_module(head, torch.nn.Linear(2, 2))
        self.loss = loss


@pytest.mark.parametrize("saved, loaded", [((), ("new",)), (("old",), ()), (("old",), ("new",))])
def test_keys_of_other_modules_do_not_keep_a_tree_from_loading(saved, loaded):
    state = Model(fitted(), *saved).state_dict()
    model = Model(loss_with(ClassTree()), *loaded)
    found = model.load_state_dict(state, strict=False)
    assert len(found.missing_keys) == 2 * len(loaded) and len(found.unexpected_keys) == 2 * len(saved)
    assert same_state(model.loss.state_dict(), {name.removeprefix("loss."): state[name] for name in state if "loss" in name})
    with pytest.raises(RuntimeError, match="new.weight" if loaded else "old.weight"):
        model.load_state_dict(state)
