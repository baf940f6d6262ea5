"""Losses, triplets and the memory of a `CrossBatchMemory`, computed from lists without PML and without our package."""

import torch

from .shared import MARGIN


def losses_by_hand(query, ref, triplets, margin=MARGIN, power=2, smooth=False, swap=False):
    """The loss of each triplet in a list of (anchor, positive, negative), straight from the equation."""
    query, ref = (embeddings / embeddings.norm(dim=1, keepdim=True) for embeddings in (query, ref))
    anchors, positives, negatives = torch.tensor(triplets, dtype=torch.int64, device=query.device).reshape(-1, 3).T

    def distances(x, y):
        plain = (x - y).norm(dim=1)
        # A sample and its copy in a memory: rounding must not give their distance of zero a direction.
        return plain.where(plain > 1e-3, 0) ** power

    to_negative = distances(query[anchors], ref[negatives])
    if swap:
        to_negative = torch.minimum(to_negative, distances(ref[positives], ref[negatives]))
    violation = distances(query[anchors], ref[positives]) - to_negative + margin
    return (1 + violation.exp()).log() if smooth else violation.clamp(min=0)


def triplets_of(indices_tuple):
    """The list of triplets that PML's pairs or triplets stand for: each positive pair with each negative of its anchor."""
    lists = [index.tolist() for index in indices_tuple]
    if len(lists) == 3:
        return list(zip(*lists, strict=True))
    positive_pairs, negative_pairs = (list(zip(*two, strict=True)) for two in (lists[:2], lists[2:]))
    return [(a, p, n) for a, p in positive_pairs for other, n in negative_pairs if other == a]


def mean_of_positive(losses):
    return losses[losses > 0].mean() if (losses > 0).any() else 0 * losses.sum()


class Ring:
    """The last samples, each in its slot, one after the other."""

    def __init__(self, size):
        self.size, self.count, self.slots = size, 0, {}

    def add(self, embeddings, labels):
        """The slots where the samples went."""
        slots = [(self.count + place) % self.size for place in range(len(labels))]
        self.slots |= dict(zip(slots, zip(embeddings.detach().clone(), labels.tolist(), strict=True), strict=True))
        self.count += len(labels)
        return slots

    @property
    def embeddings(self):
        return torch.stack([self.slots[slot][0] for slot in range(len(self.slots))])

    @property
    def labels(self):
        return [self.slots[slot][1] for slot in range(len(self.slots))]


def without_own_copies(pairs, slots):
    """Indices into batch and memory, without the positive pairs of a sample and its own copy in the memory."""
    kept = torch.tensor([p != slots[a] for a, p in zip(pairs[0].tolist(), pairs[1].tolist(), strict=True)], dtype=torch.bool)
    if len(pairs) == 3:
        return [index.cpu()[kept] for index in pairs]
    return [index.cpu()[kept] for index in pairs[:2]] + [index.cpu() for index in pairs[2:]]


def with_input(indices, given):
    """Both lists of indices; triplets become pairs where the others are pairs, and the other way round."""
    if given is None:
        return indices
    given = [index.cpu() for index in given]
    if len(indices) == 4 and len(given) == 3:
        given = [given[0], given[1], given[0], given[2]]
    elif len(indices) == 3 and len(given) == 4:
        given = torch.tensor(triplets_of(given), dtype=torch.int64).reshape(-1, 3).T
    return [torch.cat(two) for two in zip(indices, given, strict=True)]


def all_pairs(labels, ref_labels):
    same = labels.cpu().unsqueeze(1) == torch.tensor(ref_labels)
    return [*same.nonzero().T, *(~same).nonzero().T]


def indices_by_hand(miner, embeddings, labels, ring, slots, given):
    """`slots` None: nothing of the batch is in the memory."""
    ref_labels = torch.tensor(ring.labels, device=labels.device)
    if miner is None:
        indices = all_pairs(labels, ring.labels)
    else:
        indices = [index.cpu() for index in miner(embeddings, labels, ring.embeddings, ref_labels)]
    return with_input(indices if slots is None else without_own_copies(indices, slots), given)
