"""The three additive sums per class behind every class distance and spread (method, section 1)."""

from __future__ import annotations

import copy
import numbers
from typing import Any

import numpy as np
import torch

from ..common.batches import check_embeddings, check_lengths
from ..common.labels import Labels, integer_at_least, label_tensor, name_some, positions
from ..common.precision import home_of
from ..common.state import check_entries, check_labels, check_setting
from ..distributed import Group, Ranks

SUMS = ("counts", "_sums", "_squared_norms", "_weights", "_squared_weights")
STATE = ("labels", "embedding_size", "normalize", "forget", *(name.lstrip("_") for name in SUMS))


class ClassStatistics:
    """Count, sum of embeddings and sum of squared norms of every class.

    They give the mean squared distances between and within classes exactly, without any array of size N x D or N x N:

    - between two classes, over all cross pairs: `d(p,q) = q_p + q_q - 2 mu_p . mu_q`,
    - within a class, over its ordered pairs: `s_c = 2 n_c / (n_c - 1) * (q_c - ||mu_c||^2)`,

    where `mu_c` is the class mean and `q_c` the mean squared norm. The sums are float64, memory is O(C D), and the order
    of updates does not matter beyond rounding. Source: HTL (Ge et al., ECCV 2018), section 3.1.

    Args:
        labels: the labels of the training set, or only its distinct classes; any integer type and values.
        embedding_size: D.
        normalize: L2-normalise every embedding before it counts, as PML's distances do. With `False` the caller promises
            unit norms, and a batch that breaks the promise by more than rounding (1e-4, or four times the resolution of a
            short float type) is a `ValueError`.
        device: where the sums are kept; default the CPU, where sums are deterministic. For a device without float64 (MPS,
            many Intel GPUs) they are kept on the CPU as well.
        forget: what the sums of a class are multiplied by each time a batch has new samples of it, in (0, 1]. Below 1 the
            statistics follow a network that changes: samples of k batches ago (that had the class) weigh `forget^k`, and
            classes that no batch has keep their sums. Means and distances are weighted means then; the spread is that
            over the ordered pairs of different samples, each pair with the product of its weights:
            `s_c = 2 (q_c - ||mu_c||^2) / (1 - W2 / W1^2)` of the sums of weights `W1` and of squared weights `W2`.

    Corner cases: a class with one sample has no spread of its own and gets the average spread; a class without samples
    has NaN as mean and spread; without any class of two samples the average spread is NaN. An embedding of all zeros
    stays zero, as in PML.

    Raises:
        ValueError: there are no labels, `embedding_size` is below 1, or `forget` is not in (0, 1].
        TypeError: the labels are not integers.
    """

    labels: torch.Tensor  # (C,) int64, sorted
    counts: torch.Tensor  # (C,) int64
    embedding_size: int
    normalize: bool
    device: torch.device
    forget: float
    _sums: torch.Tensor  # (C, D) float64
    _squared_norms: torch.Tensor  # (C,) float64, as are both sums of weights
    _weights: torch.Tensor
    _squared_weights: torch.Tensor

    def __init__(
        self,
        labels: Labels,
        embedding_size: int,
        *,
        normalize: bool = True,
        device: torch.device | str | None = None,
        forget: float = 1.0,
    ) -> None:
        if not isinstance(forget, numbers.Real) or not 0 < forget <= 1:
            raise ValueError(f"forget must be in (0, 1], but it is {forget!r}; 1 forgets nothing")
        self.forget = float(forget)
        self.device = home_of(torch.float64, torch.device("cpu" if device is None else device))
        self.embedding_size = integer_at_least(1, "embedding_size", embedding_size)
        self.normalize = normalize
        self.labels = label_tensor(labels, self.device).unique()
        if len(self.labels) == 0:
            raise ValueError("the data set is empty: class statistics need at least one label")
        self.counts = self.labels.new_zeros(len(self.labels))
        self._sums = torch.zeros(len(self.labels), self.embedding_size, dtype=torch.float64, device=self.device)
        self._squared_norms, self._weights, self._squared_weights = (
            torch.zeros(len(self.labels), dtype=torch.float64, device=self.device) for _ in range(3)
        )

    def update(self, embeddings: torch.Tensor, labels: Labels) -> ClassStatistics:
        """Adds a batch: `embeddings` (B, D) of any float type on any device, `labels` (B,). Returns itself.

        Raises:
            ValueError: wrong shapes, different lengths, an unknown label, values that are not finite, or (with
                `normalize=False`) norms that are not one. Nothing has been added then.
            TypeError: embeddings that are not floats or labels that are not integers.
        """
        labels = label_tensor(labels, self.device)
        check_embeddings(embeddings, size=self.embedding_size)
        check_lengths(embeddings, labels)
        # Two steps: a device without float64 has to hand its values over first.
        values = embeddings.detach().to(self.device).to(torch.float64)
        norms = values.norm(dim=1)
        if not torch.isfinite(norms).all():
            broken = labels[~torch.isfinite(norms)]
            raise ValueError(
                f"{len(broken)} of {len(labels)} embeddings are NaN or infinite ({name_some(broken)}); "
                "has the training diverged?"
            )
        if self.normalize:
            values = torch.nn.functional.normalize(values)
        else:
            self._check_unit_norms(norms, torch.finfo(embeddings.dtype).eps)
        classes = positions(labels, self.labels, "these class statistics")

        touched = classes.unique()
        before = {name: getattr(self, name)[touched] for name in SUMS}
        try:
            self._add(values, classes, touched)
        except BaseException:  # also Ctrl-C: the sums of a class belong together
            for name, sums in before.items():
                getattr(self, name)[touched] = sums
            raise
        return self

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """Adds the sums of `other`, which must have the same classes and embedding size. Returns itself."""
        if not isinstance(other, ClassStatistics):
            raise TypeError(f"only other ClassStatistics can be merged, but this is a {type(other).__name__}")
        if other.embedding_size != self.embedding_size:
            raise ValueError(
                f"the embedding sizes differ: {self.embedding_size} here, {other.embedding_size} in the other statistics"
            )
        if not torch.equal(self.labels, other.labels.to(self.device)):
            raise ValueError(
                f"the classes differ: {len(self.labels)} here, {len(other.labels)} in the other statistics; "
                "make both from the labels of the whole training set"
            )
        merged = {name: getattr(self, name) + getattr(other, name).to(self.device) for name in SUMS}
        self.__dict__.update(merged)  # in one step, so that nothing, not even Ctrl-C, leaves some sums merged and others not
        return self

    def all_reduce(self, group: Group | None = None) -> ClassStatistics:
        """Adds up the sums of all processes of a torch.distributed group (default: all), each of its own samples. Returns
        itself.

        All end with the statistics of all samples, of the classes that any of them has. All must call it; a second call
        would count everything again. Without torch.distributed nothing happens. It takes O(C) memory beside the sums.

        Raises:
            ValueError: embedding sizes that differ. Nothing has been added then, in any process.
        """
        ranks = Ranks(group)
        sizes = ranks.gather(self.embedding_size)
        if len(set(sizes)) > 1:
            raise ValueError(f"the embedding sizes of ranks 0 .. {ranks.size - 1} differ: {', '.join(map(str, sizes))}")
        self.add_classes(ranks.union(self.labels))
        for name in SUMS:
            ranks.sum_(getattr(self, name))
        return self

    def add_classes(self, labels: Labels) -> ClassStatistics:
        """Makes room for classes that are not known yet (an O(C D) copy if there are any). Returns itself."""
        grown = torch.cat([self.labels, label_tensor(labels, self.device).flatten()]).unique()
        if len(grown) > len(self.labels):
            kept = torch.searchsorted(grown, self.labels)
            state = {"labels": grown}
            for name in SUMS:
                old = getattr(self, name)
                state[name] = old.new_zeros(len(grown), *old.shape[1:]).index_copy_(0, kept, old)
            self.__dict__.update(state)  # in one step, as in `merge`
        return self

    def of_classes_with_samples(self) -> ClassStatistics:
        """Those of the classes that have samples, as a copy of O(C D); itself if all have."""
        places = (self.counts > 0).nonzero().squeeze(1)
        if len(places) == len(self.labels):
            return self
        found = copy.copy(self)
        found.__dict__.update({name: getattr(self, name)[places] for name in ("labels", *SUMS)})
        return found

    @property
    def means(self) -> torch.Tensor:
        """Mean embedding of each class, (C, D) float64; not normalised again."""
        return self._sums / self._weights.unsqueeze(1)

    @property
    def mean_squared_norms(self) -> torch.Tensor:
        """`q_c`, (C,) float64: one for normalised embeddings."""
        return self._squared_norms / self._weights

    @property
    def spreads(self) -> torch.Tensor:
        """`s_c`, the mean squared distance over the ordered pairs of each class, (C,) float64."""
        spreads = self._own_spreads()
        return torch.where((self.counts > 0) & spreads.isnan(), _mean(spreads[~spreads.isnan()]), spreads)

    @property
    def average_spread(self) -> torch.Tensor:
        """`d_0`, the mean spread of the classes with at least two samples, a float64 scalar."""
        spreads = self._own_spreads()
        return _mean(spreads[~spreads.isnan()])

    def squared_distances(self, rows: torch.Tensor | slice | None = None) -> torch.Tensor:
        """`d(p,q)`: the mean squared distance over all pairs of a sample of class p and a sample of class q.

        Args:
            rows: which classes p, as positions in `labels` (a tensor or slice); default all, which takes C x C floats.

        Returns:
            (rows, C) float64, in [0, 4] for normalised embeddings. Where p is q the pairs include each sample with
            itself; that is not the spread.
        """
        means, norms = self.means, self.mean_squared_norms
        rows = slice(None) if rows is None else rows
        if not isinstance(rows, slice):
            rows = self._checked_positions(rows, "(R,)", 1)
        # In place, so that there is one array of this size.
        return (means[rows] @ means.T).mul_(-2).add_(norms[rows].unsqueeze(1)).add_(norms).clamp_(min=0)

    def squared_distances_of(self, pairs: torch.Tensor) -> torch.Tensor:
        """`d(p,q)` of some pairs (E, 2) of positions in `labels`: (E,) float64, in blocks of little memory."""
        norms = self.mean_squared_norms
        found = []
        for block in self._checked_positions(pairs, "(E, 2)", 2).split(2**16):
            means = [self._sums[ends] / self._weights[ends].unsqueeze(1) for ends in block.unbind(1)]
            found.append(norms[block].sum(dim=1) - 2 * (means[0] * means[1]).sum(dim=1))
        return torch.cat(found).clamp_(min=0)

    def fingerprint(self) -> np.ndarray:
        """The sums over all classes, (D + 2,) float64: the same, up to rounding, for the same samples only."""
        sums = [self._sums.sum(dim=0), self._weights.sum().unsqueeze(0), self.counts.sum().double().unsqueeze(0)]
        return torch.cat(sums).cpu().numpy()

    def is_finite(self) -> bool:
        """Whether all sums are numbers."""
        return bool(torch.isfinite(self._sums).all() and torch.isfinite(self._squared_norms).all())

    def state_dict(self) -> dict[str, Any]:
        """Settings, and copies of the labels and sums: O(C D) memory."""
        sums = {name.lstrip("_"): getattr(self, name).clone() for name in SUMS}
        settings = {"embedding_size": self.embedding_size, "normalize": self.normalize, "forget": self.forget}
        return {"labels": self.labels.clone(), **settings, **sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the sums of a `state_dict`, on its own device, instead of those that are there.

        Raises:
            ValueError: it is not such a state, has other settings or labels, or values that are not finite. Nothing has
                changed then.
        """
        owner = type(self).__name__
        check_entries(state, STATE, owner)
        for name in ("embedding_size", "normalize", "forget"):
            check_setting(name, state[name], getattr(self, name), owner)
        check_labels(state["labels"], self.labels, owner)
        loaded = {}
        for name in SUMS:
            value, own = state[name.lstrip("_")], getattr(self, name)
            if not isinstance(value, torch.Tensor) or value.dtype != own.dtype or value.shape != own.shape:
                kind = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value)
                raise ValueError(
                    f"{name.lstrip('_')} of the state should be {own.dtype} of shape {tuple(own.shape)}, but is {kind}"
                )
            loaded[name] = value.detach().to(self.device, copy=True)
        if any((~torch.isfinite(loaded[name])).any() or (name != "_sums" and (loaded[name] < 0).any()) for name in SUMS):
            raise ValueError("the sums of the state are not finite, or negative where they cannot be")
        for name in SUMS:
            setattr(self, name, loaded[name])

    def _own_spreads(self) -> torch.Tensor:
        """`s_c` (C,), NaN for classes with fewer than two samples (or all the weight on one)."""
        squares_of_means = (torch.linalg.vector_norm(self._sums, dim=1) / self._weights).square()
        within = (self.mean_squared_norms - squares_of_means).clamp(min=0)
        # n^2 and n (n - 1) where all samples weigh 1
        all_pairs, different = self._weights.square(), self._weights.square() - self._squared_weights
        has_pairs = (self.counts > 1) & (different > 1e-9 * all_pairs)
        return torch.where(has_pairs, 2 * within * (all_pairs / different), torch.nan)

    def _checked_positions(self, given: torch.Tensor, shape: str, ndim: int) -> torch.Tensor:
        try:
            found = label_tensor(given, self.device)
        except TypeError:
            raise TypeError(f"class positions must be integers or a slice, but they are {given!r}") from None
        if found.ndim != ndim or (ndim == 2 and found.shape[1] != 2):
            raise ValueError(f"class positions must be of shape {shape}, but they are {tuple(found.shape)}")
        if len(found) and not 0 <= found.min() <= found.max() < len(self.labels):
            raise ValueError(
                f"class positions must be within 0 .. {len(self.labels) - 1}, but there are {int(found.min())} and "
                f"{int(found.max())}; give positions in `labels`, not labels"
            )
        return found

    def _add(self, values: torch.Tensor, classes: torch.Tensor, touched: torch.Tensor) -> None:
        if self.forget < 1:
            for sums in (self._sums, self._squared_norms, self._weights):
                sums[touched] *= self.forget
            self._squared_weights[touched] *= self.forget**2
        counts = torch.ones_like(classes)
        self.counts.index_add_(0, classes, counts)
        self._weights.index_add_(0, classes, counts.double())
        self._squared_weights.index_add_(0, classes, counts.double())
        self._sums.index_add_(0, classes, values)
        self._squared_norms.index_add_(0, classes, values.square().sum(dim=1))

    def _check_unit_norms(self, norms: torch.Tensor, eps: float) -> None:
        off = (norms - 1).abs()
        if len(off) and off.max() > max(1e-4, 4 * eps):  # four roundings of a short float, 1e-4 for the others
            raise ValueError(
                f"normalize=False promises embeddings of norm 1, but there is one of norm {norms[off.argmax()].item():.6g}; "
                "normalise them or leave normalize=True"
            )


def _mean(values: torch.Tensor) -> torch.Tensor:
    """The mean, NaN (without a warning) where there are none."""
    return values.sum() / len(values) if len(values) else values.new_tensor(torch.nan)
