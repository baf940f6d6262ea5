"""Anchor-neighbour sampling: batches of classes that are near each other (method, section 3)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import filterfalse, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, SequentialSampler

from .common.dealers import find_dealer
from .common.labels import Labels, integer_at_least, label_tensor, name_some
from .distributed import Ranks
from .tree import ClassTree

NO_CLASS = -1  # stands where a class has no neighbours yet
MAX_PLACES = 1024  # batches that `state_dict` can go back; loaders draw no more ahead than their workers prefetch


class Place(NamedTuple):
    """Where the drawing of batches stands."""

    epoch: int  # of the batches that come next
    batches: int  # drawn in this epoch
    generator: Mapping[str, Any] | None  # state of the epoch's random generator; None before its first batch
    skipped: list[int]  # classes whose turn as anchor has been put off, first in the next batch
    walk: np.ndarray  # (W,) the classes that are still to be anchors, after these


class AnchorNeighborSampler(BatchSampler):
    """Yields batches of `num_anchors` anchor classes, the nearest classes of each, and samples of all of them.

    Step by step, for every batch:

    1. Anchor classes come from a walk through a shuffled list of all classes: among the batches drawn, every class is an
       anchor once before any is one twice. An anchor whose class is already in the batch is skipped and comes first in
       the next batch.
    2. Each anchor brings its `neighborhood_size - 1` nearest classes by the tree, the nearest first; one that is already
       in the batch is replaced by the next nearest. All classes of a batch are distinct.
    3. Each class gives `samples_per_class` samples, drawn without replacement.

    Batches are drawn one by one when they are asked for, so a refreshed tree counts from the next batch drawn. They are
    lists of indices, group by group: anchor class, its neighbours, next anchor class, and so on. Give the sampler as
    `batch_sampler` to a `DataLoader`, or as `sampler` to a PML trainer. Source: HTL (Ge et al., ECCV 2018), section 3.2.

    Args:
        labels: (N,) the label of every sample of the data set, any integers.
        tree: the tree that it shares with the loss; it may change between batches.
        num_anchors, neighborhood_size, samples_per_class: l', m and t of the method. The batch size is their product.
        batches_per_epoch: length of one iteration; default `len(labels)` by the size of the whole batch, at least 1.
        seed: of the sampler's own generator. Default: drawn from torch's global generator, so `torch.manual_seed` fixes it.
        num_replicas, rank: how many processes train together and which of them this is; default, those of
            torch.distributed's default group when an iteration begins, and one without it. Each process has its own sampler
            with the same arguments, and yields its part of the batch that one process would have drawn: whole
            neighbourhoods, the first `num_anchors / num_replicas` on rank 0 and so on. `batch_size` is the length of that
            part. With `num_replicas=1, rank=0` each yields the whole batch, for a loader that splits it.

    Behaviour in corner cases:

    - While the tree is not fitted, neighbours are random classes, unless its hierarchy was given: that has neighbours.
      Those of a class that has had no samples yet (`ClassTree.waiting`) are random too, and it is nobody's neighbour.
    - A class with fewer samples than asked for is drawn with replacement.
    - When the walk ends inside a batch, its last classes are kept free to be anchors if they would be skipped otherwise.
    - A batch larger than the tree's `max_neighbors` can use up all known neighbours of an anchor; random classes follow.
    - Every iteration is a new epoch with new random numbers in the same walk. `set_epoch(e)` starts epoch e with a new
      walk: the same batches every time, whatever was drawn before (so a walk ends with its epoch if it is called in each).
    - A loader's workers draw ahead. Batches that are thrown away when a `TreeRefresh` starts the loader anew have moved the
      walk on, so the batches after it depend on how many workers there are (which must be the same in all processes).

    To stop and go on in the middle of an epoch: `state_dict()` after the last batch, `load_state_dict(state)` in a sampler
    made the same way, and the next `iter()` yields the rest of that epoch. The tree has its own `state_dict`.

    Raises:
        ValueError: fewer classes than a batch needs, fewer than two classes, an empty data set, counts below 1, anchors that
            the processes do not divide, a rank that is not among them, or several processes without a `seed` (these
            when an iteration begins, if the process group is there only then); a tree whose given hierarchy has other
            classes; while drawing, a tree that was fitted on other classes, or a loader that accelerate has prepared so
            that parts of different batches, or of samplers with different seeds, would meet.
        TypeError: labels that are not integers, or a tree that is none.
    """

    def __init__(
        self,
        labels: Labels,
        tree: ClassTree,
        *,
        num_anchors: int,
        neighborhood_size: int,
        samples_per_class: int,
        batches_per_epoch: int | None = None,
        seed: int | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        if not isinstance(tree, ClassTree):
            raise TypeError(f"tree must be a ClassTree, but it is a {type(tree).__name__}")
        self.tree = tree
        self.num_anchors = integer_at_least(1, "num_anchors", num_anchors)
        self.neighborhood_size = integer_at_least(1, "neighborhood_size", neighborhood_size)
        self.samples_per_class = integer_at_least(1, "samples_per_class", samples_per_class)
        self.labels = _sample_labels(labels)
        # Samples sorted by class: those of class c are order[start[c] : start[c] + count[c]].
        self.classes, self._counts = np.unique(self.labels, return_counts=True)
        self._order = np.argsort(self.labels, kind="stable")
        self._starts = np.cumsum(self._counts) - self._counts
        self._are_enough = bool((self._counts >= self.samples_per_class).all())  # so that none is drawn twice
        self._check_classes()
        if tree.is_given:  # no fit will change its classes
            self._check_tree()

        self.num_replicas = None if num_replicas is None else integer_at_least(1, "num_replicas", num_replicas)
        self.rank = None if rank is None else integer_at_least(0, "rank", rank)
        self._has_own_seed = seed is not None
        joint_size = self.num_anchors * self.neighborhood_size * self.samples_per_class
        # The rest of what a BatchSampler has, but for batch_size, which is not known for good here.
        self.sampler, self.drop_last = SequentialSampler(self.labels), True
        self._ranks()
        if batches_per_epoch is None:
            batches_per_epoch = max(1, len(self.labels) // joint_size)
        self.batches_per_epoch = integer_at_least(1, "batches_per_epoch", batches_per_epoch)
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()).item())
        self.seed = integer_at_least(0, "seed", seed)
        self._place = Place(0, 0, None, [], np.empty(0, dtype=np.int64))
        self._places: deque[Place] = deque([self._place], MAX_PLACES)  # of this epoch, after each of its batches
        self._goes_on = False  # the next iteration is the rest of an epoch
        self._known_neighbors: tuple[torch.Tensor, np.ndarray] | None = None

    @property
    def batch_size(self) -> int:  # type: ignore[override]  # torch has it as an attribute; here it follows the processes
        """Samples in a batch of this process."""
        return self.num_anchors * self.neighborhood_size * self.samples_per_class // self._ranks()[0]

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        # The epoch begins with its first batch: loaders with workers call iter() more often than they draw.
        num_replicas, rank = self._ranks()
        self._check_dealer(num_replicas)
        if not self._goes_on:
            self._begin_epoch()
        self._goes_on = False
        place = self._place
        generator = np.random.default_rng([self.seed, place.epoch])
        if place.generator is not None:
            generator.bit_generator.state = place.generator
        while place.batches < self.batches_per_epoch:
            classes, skipped, walk = self._draw_classes(place, generator)
            samples = self._draw_samples(np.array(classes), generator)
            drawn = Place(place.epoch, place.batches + 1, generator.bit_generator.state, skipped, walk)
            if self._place is place:  # no other iteration has begun, or been prepared by `set_epoch`
                self._place = drawn
                self._places.append(drawn)
            place = drawn
            share = len(classes) // num_replicas
            yield samples[rank * share : (rank + 1) * share].ravel().tolist()

    def set_epoch(self, epoch: int) -> None:
        """Makes the next `iter()` epoch `epoch` (0, 1, ...), with a walk of its own.

        After `load_state_dict` in the middle of that very epoch, the rest of it. An iteration under way goes on as it was:
        Lightning's loader draws the first batches of a fit before it says that their epoch begins.
        """
        epoch = integer_at_least(0, "epoch", epoch)
        if not (self._goes_on and epoch == self._place.epoch):
            self._set_place(Place(epoch, 0, None, [], np.empty(0, dtype=np.int64)), goes_on=True)

    def state_dict(self, batches_consumed: int | None = None) -> dict[str, Any]:
        """Where the drawing of batches stands, as numbers and tensors; O(C) memory. It is the same on all ranks.

        Args:
            batches_consumed: as of so many batches of the current epoch (those before a resumption counted), for loaders
                whose workers draw ahead; default, all that were drawn.

        Raises:
            ValueError: the epoch has not drawn so many, or it is more than 1,024 batches back.
        """
        place = self._place
        if batches_consumed is not None:
            known = {kept.batches: kept for kept in self._places}
            if batches_consumed not in known:
                raise ValueError(
                    f"batches_consumed must be one of the {min(known)} .. {max(known)} batches of this epoch that are "
                    f"remembered, but it is {batches_consumed!r}"
                )
            place = known[batches_consumed]
        return {
            "epoch": place.epoch,
            "batches": place.batches,
            "generator": place.generator,
            "skipped": list(place.skipped),
            "walk": torch.from_numpy(place.walk.copy()),
            "seed": self.seed,
            "made_for": self._made_for(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was called: the next `iter()` yields the rest of that epoch, or the next one.

        Raises:
            ValueError: it is not such a state, or that of a sampler with other labels or counts. Nothing has changed then.
        """
        names = {"epoch", "batches", "generator", "skipped", "walk", "seed", "made_for"}
        if not isinstance(state, dict) or state.keys() != names or not isinstance(state["made_for"], dict):
            found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"the state of an AnchorNeighborSampler has {', '.join(sorted(names))}, but this has {found}")
        for name, value in self._made_for().items():
            if state["made_for"].get(name) != value:
                raise ValueError(
                    f"the state is of a sampler with {name}={state['made_for'].get(name)}, but this one has {name}={value}; "
                    "make the sampler with the same labels and arguments"
                )
        place = self._checked_place(state)
        self.seed = integer_at_least(0, "the seed of the state", state["seed"])
        self._set_place(place, goes_on=place.batches < self.batches_per_epoch)

    def _checked_place(self, state: dict[str, Any]) -> Place:
        skipped, walk = (label_tensor(state[name], "cpu").numpy().copy() for name in ("skipped", "walk"))
        classes = np.concatenate([skipped, walk])
        if len(np.unique(classes)) < len(classes) or (classes < 0).any() or (classes >= len(self.classes)).any():
            raise ValueError(f"the walk of the state should be distinct classes below {len(self.classes)}, not {classes}")
        if state["generator"] is not None:
            try:
                np.random.default_rng(0).bit_generator.state = state["generator"]
            except (TypeError, ValueError, KeyError) as error:
                raise ValueError(f"the generator of the state is none of NumPy's: {error}") from error
        epoch, batches = (integer_at_least(0, f"{name} of the state", state[name]) for name in ("epoch", "batches"))
        return Place(epoch, batches, state["generator"], skipped.tolist(), walk)

    def _begin_epoch(self) -> None:
        """The epoch after this one, in the same walk; the first one if none has begun."""
        place = self._place
        epoch = place.epoch + (place.generator is not None)
        self._set_place(place._replace(epoch=epoch, batches=0, generator=None), goes_on=False)

    def _set_place(self, place: Place, *, goes_on: bool) -> None:
        self._place, self._goes_on = place, goes_on
        self._places.clear()
        self._places.append(place)

    def _made_for(self) -> dict[str, int]:
        """What must be the same for batches to go on."""
        names = ("num_anchors", "neighborhood_size", "samples_per_class", "batches_per_epoch")
        return {"samples": len(self.labels), "classes": len(self.classes), **{name: getattr(self, name) for name in names}}

    def _ranks(self) -> tuple[int, int]:
        """How many processes share each batch, and which of them this is."""
        ranks = Ranks()
        num_replicas = ranks.size if self.num_replicas is None else self.num_replicas
        rank = ranks.rank if self.rank is None else self.rank
        if rank >= num_replicas:
            raise ValueError(f"rank must be below num_replicas={num_replicas}, but it is {rank}")
        if self.num_anchors % num_replicas:
            raise ValueError(
                f"{num_replicas} processes cannot share {self.num_anchors} anchors evenly, and a neighbourhood stays on "
                f"one; make num_anchors a multiple of {num_replicas}"
            )
        if num_replicas > 1 and not self._has_own_seed:
            raise ValueError(f"the samplers of {num_replicas} processes draw parts of one batch: give them the same seed")
        return num_replicas, rank

    def _check_dealer(self, num_replicas: int) -> None:
        """Raises a `ValueError` if accelerate deals out what should stay together."""
        dealer = find_dealer()
        if dealer is None:
            return
        if num_replicas > 1:
            raise ValueError(
                f"accelerate deals out the batches of a prepared loader among the processes ({dealer}), but this sampler "
                "yields this process's part of each batch already, and parts of different batches would meet; do not "
                "prepare the loader; or prepare it with DataLoaderConfiguration(split_batches=True), and give the sampler "
                "(or HTL) num_replicas=1, rank=0 and a seed, so that it yields whole batches"
            )
        if Ranks().size > 1 and not self._has_own_seed:
            raise ValueError(f"{dealer} deals out the batches of {Ranks().size} samplers: give them the same seed")

    def _draw_samples(self, classes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Samples of classes (K,): (K, samples_per_class), by Floyd's algorithm for all classes at a time.

        The j-th draw is one of the first `n - t + j + 1` samples; if it is there already, the last of these is not.
        """
        counts, wanted = self._counts[classes], self.samples_per_class
        choices = counts - wanted + np.arange(1, wanted + 1)[:, np.newaxis]  # (t, K)
        if not self._are_enough:
            enough = counts >= wanted
            choices = np.where(enough, choices, counts)
        draws = (generator.random(choices.shape) * choices).astype(np.int64)
        for place in range(1, wanted):
            again = draws[0] == draws[place]
            for before in range(1, place):
                again |= draws[before] == draws[place]
            if not self._are_enough:
                again &= enough
            np.copyto(draws[place], choices[place] - 1, where=again)
        return self._order[(self._starts[classes] + draws).T]

    def _draw_classes(self, place: Place, generator: np.random.Generator) -> tuple[list[int], list[int], np.ndarray]:
        """The class positions of the next batch, group by group; and what is then skipped and left of the walk.

        A loop over anchors, since what a group may take depends on those before it.
        """
        batch_classes = self.num_anchors * self.neighborhood_size
        skipped, walk = place.skipped, place.walk
        rest = len(skipped) + len(walk)  # what this round of the walk still holds
        longer = walk
        if rest < batch_classes:  # the next round may have to begin inside this batch
            longer = np.concatenate([walk, self._new_round(generator)])
        # Enough: a class is there once or, where two rounds meet, twice.
        ahead = skipped + longer[: 2 * batch_classes - len(skipped)].tolist()
        classes, used = self._fill_batch(ahead, generator, num_reserved=0)
        if used[-1] >= rest and sum(place < rest for place in used) < rest:
            # Some class was skipped at the end of its round, and others would be anchors twice before it is one.
            reserved = min(rest, self.num_anchors)
            classes, used = self._fill_batch(ahead, generator, num_reserved=reserved)
        passed = max(used[-1] + 1, len(skipped))
        left = (longer if used[-1] >= rest else walk)[passed - len(skipped) :]
        return classes, [ahead[place] for place in sorted(set(range(passed)).difference(used))], left

    def _new_round(self, generator: np.random.Generator) -> np.ndarray:
        """The class positions of a round of the walk, in random order: each of them once."""
        return generator.permutation(len(self.classes))

    def _fill_batch(self, walk: list[int], generator: np.random.Generator, num_reserved: int) -> tuple[list[int], list[int]]:
        """One batch: its class positions, and the places of the walk (ascending) that became its anchors.

        The first `num_reserved` classes of the walk are kept free to be anchors. An example, with groups of two: in a walk
        5, 8, 2, ... where 8 is nearest to 5, the batch begins 5, 8 and goes on with the anchor 2; the places used are 0 and
        2, and 8 stays in the walk. If 5, 8 are the last of their round, 8 is reserved, and the batch is 5, its next nearest,
        8, and the nearest of 8.
        """
        neighbors = self._neighbors()
        taken = set(walk[:num_reserved])
        strangers = self._strangers(generator)
        classes: list[int] = []
        used: list[int] = []
        first = 2 * self.neighborhood_size
        for place, anchor in enumerate(walk):
            if len(used) == self.num_anchors:
                break
            if anchor in taken and place >= num_reserved:
                continue
            used.append(place)
            taken.add(anchor)
            classes.append(anchor)
            wanted = self.neighborhood_size - 1
            if neighbors is not None:
                nearest = neighbors[anchor]
                near = nearest[:first].tolist()  # as a rule they will do, and a list of all takes time
                if near[0] != NO_CLASS:
                    wanted -= _take_free(near, taken, wanted, classes)
                    if wanted:
                        wanted -= _take_free(nearest[first:].tolist(), taken, wanted, classes)
            if wanted:
                _take_free(strangers, taken, wanted, classes)
        return classes, used

    def _strangers(self, generator: np.random.Generator) -> Iterator[int]:
        """Random classes, different ones, and enough for a batch even if it has all of its classes already."""
        enough = 2 * self.num_anchors * self.neighborhood_size
        yield from generator.choice(len(self.classes), min(enough, len(self.classes)), replace=False).tolist()

    def _neighbors(self) -> np.ndarray | None:
        """The tree's nearest classes (C, k) as positions, or None while it is not fitted; converted once per fit."""
        nearest = self.tree.nearest_classes
        if nearest is None:
            return None
        if self._known_neighbors is None or self._known_neighbors[0] is not nearest:
            self._check_tree()
            self._known_neighbors = nearest, self._neighbors_by_class(nearest.cpu().numpy())
        return self._known_neighbors[1]

    def _neighbors_by_class(self, nearest: np.ndarray) -> np.ndarray:
        """A copy (see `_sample_labels`) with a row for each class of the data set, of NO_CLASS if it has none yet."""
        if self.tree.waiting is None:
            return nearest.copy()
        found = np.full((len(self.classes), nearest.shape[1]), NO_CLASS)
        known = np.searchsorted(self.classes, self.tree.part("labels").cpu().numpy())
        found[known] = known[nearest]
        return found

    def _check_tree(self) -> None:
        all_labels = self.tree.all_labels
        assert all_labels is not None
        tree_classes = all_labels.cpu().numpy()
        if not np.array_equal(tree_classes, self.classes):
            difference = torch.from_numpy(np.setxor1d(tree_classes, self.classes))
            raise ValueError(
                f"the tree has {len(tree_classes)} classes and the sampler has {len(self.classes)}: only one of "
                f"them knows {name_some(difference)}; give both the same labels, before or after any mapping of labels"
            )

    def _check_classes(self) -> None:
        needed = self.num_anchors * self.neighborhood_size
        if len(self.classes) < 2:
            raise ValueError("the data set has a single class; triplets need at least two")
        if len(self.classes) < needed:
            raise ValueError(
                f"a batch of {self.num_anchors} anchors x {self.neighborhood_size} classes needs {needed} distinct classes, "
                f"but the data set has {len(self.classes)}; lower num_anchors or neighborhood_size"
            )


def _sample_labels(labels: Labels) -> np.ndarray:
    # A copy: a tensor that is sent to another process moves to shared memory, and leaves views of it pointing nowhere.
    array = label_tensor(labels).cpu().numpy().copy()
    if array.ndim != 1:
        raise ValueError(f"labels must be of shape (N,), one per sample, but they are {array.shape}")
    if len(array) == 0:
        raise ValueError("the data set is empty: there are no labels to sample from")
    return array


def _take_free(candidates: Iterable[int], taken: set[int], wanted: int, classes: list[int]) -> int:
    """Moves the first `wanted` of the candidates, which are distinct, that are not taken into `classes`; says how many."""
    free = list(islice(filterfalse(taken.__contains__, candidates), wanted))
    taken.update(free)
    classes += free
    return len(free)
