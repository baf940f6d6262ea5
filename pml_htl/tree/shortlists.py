"""The best candidates of each class so far, in lists that are sorted only when they are full."""

from __future__ import annotations

import numpy as np
import torch

LENGTH = 4  # times k


class Shortlists:
    """For each of `num_rows` rows the `k` largest of all scores that it has been offered, and whose they are.

    A row has a list of 4 k entries. What is not above its `reach` is passed over, which is cheap; the rest is written down,
    and a list that is full is cut to its best k. `reach` (num_rows,) float32 is the k-th best at the last cut, and so never
    above the true one. Memory is 32 k bytes a row. On the CPU.
    """

    def __init__(self, num_rows: int, k: int) -> None:
        self.k = k
        self.length = LENGTH * k
        self.reach = np.full(num_rows, -np.inf, dtype=np.float32)
        self._scores = np.full((num_rows, self.length), -np.inf, dtype=np.float32)
        self._owners = np.zeros((num_rows, self.length), dtype=np.int32)
        self._filled = np.zeros(num_rows, dtype=np.int64)

    def offer(self, rows: np.ndarray, scores: np.ndarray, owners: np.ndarray) -> None:
        """Scores (R, M) float32 of some rows (R,), different ones, with columns whose owners are (M,), different ones.

        They may be the transpose of an array, as it lies in memory.
        """
        place, column = _places(scores > self.reach[rows, np.newaxis])  # by numpy: torch's comparisons are slower
        counts = np.bincount(place, minlength=len(rows))
        most = self.length - self.k
        many = np.flatnonzero(counts > most)  # in the beginning; only the best k of them can stay
        if len(many):
            best, best_columns = torch.from_numpy(scores[many]).topk(self.k, sorted=False)
            self._add(rows[many], np.full(len(many), self.k), owners[best_columns.numpy().ravel()], best.numpy().ravel())
            few = counts[place] <= most
            place, column, counts[many] = place[few], column[few], 0
        if len(place):
            self._add(rows, counts, owners[column], scores[place, column])

    def cut(self, rows: np.ndarray) -> None:
        """Leaves their best k to some rows (R,), the best first, and brings `reach` up to date."""
        best, places = torch.from_numpy(self._scores[rows]).topk(self.k)
        self._owners[rows, : self.k] = np.take_along_axis(self._owners[rows], places.numpy(), axis=1)
        self._scores[rows, : self.k], self._scores[rows, self.k :] = best.numpy(), -np.inf
        self._filled[rows] = np.minimum(self._filled[rows], self.k)
        self.reach[rows] = np.maximum(self.reach[rows], best[:, -1].numpy())

    def clear(self) -> None:
        """Forgets all entries, but not how good one has to be."""
        self._scores[:], self._filled[:] = -np.inf, 0

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """Owners (num_rows, k) and scores (num_rows, k), the best first; -inf where there were fewer."""
        for rows in np.array_split(np.arange(len(self.reach)), max(1, len(self.reach) // 2**14)):
            self.cut(rows)
        return self._owners[:, : self.k], self._scores[:, : self.k]

    def _add(self, rows: np.ndarray, counts: np.ndarray, owners: np.ndarray, scores: np.ndarray) -> None:
        """Writes down `counts` (R,) entries of each row, which stand one row after another."""
        full = self._filled[rows] + counts > self.length
        if full.any():  # those that soon will be too, so that it does not come to this for each block
            self.cut(rows[full | (self._filled[rows] > 0.75 * self.length)])
        first = rows * self.length + self._filled[rows]  # in the flat lists
        of_others = np.cumsum(counts) - counts
        places = np.repeat(first - of_others, counts) + np.arange(len(scores))
        self._scores.reshape(-1)[places], self._owners.reshape(-1)[places] = scores, owners
        self._filled[rows] += counts


def _places(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns where a mask (R, M) is true, row by row. It may be the transpose of an array."""
    if mask.flags.c_contiguous:
        return np.divmod(np.flatnonzero(mask), mask.shape[1])
    columns, rows = np.divmod(np.flatnonzero(mask.T), mask.shape[0])
    order = np.argsort(rows.astype(np.int16) if mask.shape[0] < 2**15 else rows, kind="stable")  # of few bytes: radix sort
    return rows[order], columns[order]
