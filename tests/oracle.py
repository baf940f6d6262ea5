"""The method, straight from its equations: slow loops in float64, sharing no code with the package."""

import functools
import itertools
import math

import numpy as np
import torch


def unit(embeddings):
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def squared_distance(x, y):
    return float(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)))


def class_distance(embeddings, labels, p, q):
    """Mean squared distance over all cross pairs."""
    pairs = itertools.product(embeddings[labels == p], embeddings[labels == q])
    return float(np.mean([squared_distance(x, y) for x, y in pairs]))


def class_distances(embeddings, labels):
    classes = np.unique(labels)
    distances = np.zeros((len(classes), len(classes)))
    for a, b in itertools.combinations(range(len(classes)), 2):
        distances[a, b] = distances[b, a] = class_distance(embeddings, labels, classes[a], classes[b])
    return distances


def spreads(embeddings, labels):
    """Mean squared distance over the ordered pairs of each class, NaN for a single sample; and the average spread."""
    found = []
    for c in np.unique(labels):
        members = embeddings[labels == c]
        pairs = [squared_distance(x, y) for x, y in itertools.permutations(members, 2)]
        found.append(np.mean(pairs) if pairs else math.nan)
    average = np.nanmean(found)
    return np.where(np.isnan(found), average, found), float(average)


def thresholds(average_spread, num_levels):
    return np.array([average_spread + level * (4 - average_spread) / num_levels for level in range(num_levels + 1)])


def single_linkage_nodes(distances, levels):
    """Transitive merging below each threshold, one node in the end; a node is named by its smallest class."""
    num_classes = len(distances)
    nodes = np.zeros((num_classes, len(levels)), dtype=int)
    for level, threshold in enumerate(levels[:-1]):
        node = list(range(num_classes))
        changed = True
        while changed:
            changed = False
            for a, b in itertools.permutations(range(num_classes), 2):
                if distances[a, b] < threshold and node[a] != node[b]:
                    node[a] = node[b] = min(node[a], node[b])
                    changed = True
        nodes[:, level] = node
    return nodes


def merge_heights(distances, linkage="single"):
    """The height at which any two classes are first in one group: the two nearest groups merge until one is left."""
    between = {"single": np.min, "average": np.mean, "complete": np.max}[linkage]
    heights = np.zeros((len(distances), len(distances)))
    groups = [[c] for c in range(len(distances))]
    while len(groups) > 1:
        pairs = itertools.combinations(range(len(groups)), 2)
        height, a, b = min((between(distances[np.ix_(groups[a], groups[b])]), a, b) for a, b in pairs)
        for first, second in itertools.product(groups[a], groups[b]):
            heights[first, second] = heights[second, first] = height
        groups[a] += groups.pop(b)
    return heights


def agglomerated_nodes(distances, levels, linkage):
    """Average or complete linkage: merges the two nearest groups as long as they are below the threshold."""
    between = {"average": np.mean, "complete": np.max}[linkage]
    nodes = np.zeros((len(distances), len(levels)), dtype=int)
    for level, threshold in enumerate(levels[:-1]):
        groups = [[c] for c in range(len(distances))]
        while len(groups) > 1:
            pairs = itertools.combinations(range(len(groups)), 2)
            height, a, b = min((between(distances[np.ix_(groups[a], groups[b])]), a, b) for a, b in pairs)
            if height >= threshold:
                break
            groups[a] += groups.pop(b)
        for group in groups:
            nodes[group, level] = min(group)
    return nodes


def margin(nodes, levels, spread, a, n, beta=0.1, power=2):
    """alpha of classes at positions a and n: they meet at the first level where their nodes are equal."""
    level = next(level for level in range(len(levels)) if nodes[a, level] == nodes[n, level])
    root = math.sqrt if power == 1 else float
    return beta + root(levels[level]) - root(spread[a])


def triplets(labels, ref_labels=None):
    own = ref_labels is None
    others = labels if own else ref_labels
    return [
        (a, p, n)
        for a in range(len(labels))
        for p in range(len(others))
        for n in range(len(others))
        if labels[a] == others[p] and labels[a] != others[n] and not (own and a == p)
    ]


def losses(embeddings, found, margin_of, power=2, smooth=False, swap=False, ref_emb=None):
    """The loss of each triplet, differentiable: embeddings (B, D) float64 tensors that need not be normalised."""
    query = embeddings / embeddings.norm(dim=1, keepdim=True)
    ref = query if ref_emb is None else ref_emb / ref_emb.norm(dim=1, keepdim=True)

    def distance(x, y):
        squared = ((x - y) ** 2).sum()
        return squared if power == 2 else squared.sqrt()

    # Each pair is in many triplets.
    from_anchor = functools.cache(lambda a, other: distance(query[a], ref[other]))
    from_positive = functools.cache(lambda p, n: distance(ref[p], ref[n]))
    result = []
    for a, p, n in found:
        to_negative = from_anchor(a, n)
        if swap:
            to_negative = torch.minimum(to_negative, from_positive(p, n))
        violation = from_anchor(a, p) - to_negative + margin_of(a, n)
        result.append(torch.nn.functional.softplus(violation) if smooth else violation.clamp(min=0))
    return torch.stack(result)
