"""What the page shows of the test: retrievals of some queries by each method, and a map of the embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA

from pml_htl import ClassTree

from ..data import Images, Splits
from .thumbnails import thumbnail

NEIGHBORS = 10  # of each query
QUERIES = 8  # of each kind
CANDIDATES = 2000  # queries among which the worst are looked for
CHUNK = 256  # queries whose distances to all images are in memory
MOST_RELEVANT = 100  # images of its class that a query is judged by
MAPPED = 1500  # images on the map
MAPPED_PER_CLASS = 10
UMAP_NEIGHBORS = 15  # its default; of three images it makes no map at all
KEYS = ("title", "data", "methods", "pictures", "queries", "map")
GRID = 1000  # coordinates of the map are 0 .. GRID


def retrievals_document(embeddings: dict[str, dict[str, np.ndarray]], data: Splits, title: str) -> dict[str, Any]:
    """Plain numbers and pictures of the test, the same queries and the same mapped images for all methods.

    Args:
        embeddings: by method and split ("test", and "gallery" if the data have one), (N, D) each.
        data: whose test images these are of.
        title: says of what training.

    Returns:
        `pictures`: (picture, name of its class) of all images that occur, to which all others refer by their places.
        `queries`: for each its `picture`, its `kind` ("worst": lowest mean average precision at R over the methods, one of
        a class; or "random"), and by method the `neighbors`, (picture, 1 if of the same class else 0) each.
        `map`: the `pictures` on it, the `classes` of these, and by method `points` (by projection, two coordinates each)
        and `nodes` (by level of a tree of these classes, the node of each).
    """
    found = {method: of_candidates(own, data) for method, own in embeddings.items()}
    candidates = candidate_queries(data.test)
    precision = np.mean([precisions for precisions, _ in found.values()], axis=0)
    gallery, pool = data.gallery or data.test, Pool()
    queries = []
    for kind, place in chosen_queries(precision, data.test.labels[candidates].numpy()):
        query = int(candidates[place])
        label = data.test.labels[query]
        neighbors = {
            method: [
                [pool.place(gallery, data, image), int(gallery.labels[image] == label)] for image in nearest[place].tolist()
            ]
            for method, (_, nearest) in found.items()
        }
        queries.append({"kind": kind, "picture": pool.place(data.test, data, query), "neighbors": neighbors})
    mapped = mapped_images(data.test.labels)
    classes, of_class = np.unique(data.test.labels[mapped].numpy(), return_inverse=True)
    return {
        "title": title,
        "data": data.name,
        "methods": list(embeddings),
        "queries": queries,
        "map": {
            "pictures": [pool.place(data.test, data, image) for image in mapped.tolist()],
            "classes": of_class.tolist(),
            "names": [data.class_names[label] for label in classes],
            "methods": {
                method: map_of(own["test"][mapped.numpy()], data.test.labels[mapped]) for method, own in embeddings.items()
            },
        },
        "pictures": pool.pictures,
    }


class Pool:
    """The pictures that occur, each once."""

    def __init__(self) -> None:
        self.pictures: list[tuple[str, str]] = []
        self._places: dict[tuple[int, int], int] = {}

    def place(self, images: Images, data: Splits, index: int) -> int:
        """Where the picture of an image stands in the pool, to which it is added if need be."""
        key = id(images), index
        if key not in self._places:
            self._places[key] = len(self.pictures)
            self.pictures.append((thumbnail(images.picture(index)), data.class_names[int(images.labels[index])]))
        return self._places[key]


def candidate_queries(images: Images) -> torch.Tensor:
    """The places of some images, all if they are few, drawn with a fixed seed."""
    order = np.random.default_rng(0).permutation(len(images))
    return torch.from_numpy(np.sort(order[:CANDIDATES]))


def of_candidates(embeddings: dict[str, np.ndarray], data: Splits) -> tuple[np.ndarray, np.ndarray]:
    """The average precision at R of each candidate, NaN if there is no image of its class, and its nearest images."""
    references, images = (
        (embeddings["gallery"], data.gallery) if data.gallery is not None else (embeddings["test"], data.test)
    )
    points = torch.from_numpy(references.astype(np.float32))
    candidates = candidate_queries(data.test)
    queries = torch.from_numpy(embeddings["test"].astype(np.float32))[candidates]
    labels = data.test.labels[candidates]
    own = 0 if data.gallery is not None else 1  # a query is no neighbour of its own
    relevant = (torch.bincount(images.labels, minlength=int(labels.max()) + 1)[labels] - own).clamp(max=MOST_RELEVANT)
    k = min(max(NEIGHBORS, int(relevant.max())), len(points) - own)
    precisions, nearest = [], []
    for part in torch.arange(len(candidates)).split(CHUNK):
        distances = torch.cdist(queries[part], points)
        if own:
            distances[torch.arange(len(part)), candidates[part]] = torch.inf
        found = distances.topk(k, largest=False).indices
        hits = (images.labels[found] == labels[part, None]).double()
        ranks = torch.arange(1, k + 1)
        hits = hits * (ranks <= relevant[part, None])
        precisions.append((hits * hits.cumsum(dim=1) / ranks).sum(dim=1) / relevant[part])  # 0 / 0 is NaN
        nearest.append(found[:, :NEIGHBORS])
    return torch.cat(precisions).numpy(), torch.cat(nearest).numpy()


def chosen_queries(precision: np.ndarray, labels: np.ndarray) -> list[tuple[str, int]]:
    """The kind and the place of the queries to show: the worst, then some at random, each of another class."""
    chosen: list[tuple[str, int]] = []
    seen: set[int] = set()
    usable = np.flatnonzero(~np.isnan(precision))
    for kind, order in (
        ("worst", usable[np.argsort(precision[usable], kind="stable")]),
        ("random", np.random.default_rng(1).permutation(usable)),
    ):
        for place in order:
            if sum(other == kind for other, _ in chosen) == QUERIES:
                break
            if labels[place] not in seen:
                seen.add(labels[place])
                chosen.append((kind, int(place)))
    return chosen


def mapped_images(labels: torch.Tensor) -> torch.Tensor:
    """The places of the images on the map: some of each of some classes, drawn with a fixed seed."""
    shuffled = np.random.default_rng(2).permutation(len(labels))
    classes = np.random.default_rng(3).permutation(labels.unique().numpy())
    order = shuffled[np.argsort(labels[shuffled].numpy(), kind="stable")]
    sorted_labels = labels[order].numpy()
    found: list[np.ndarray] = []
    for label in classes:
        start, end = np.searchsorted(sorted_labels, [label, label + 1])
        found.append(order[start : min(end, start + MAPPED_PER_CLASS)])
        if sum(map(len, found)) >= MAPPED:
            break
    return torch.from_numpy(np.sort(np.concatenate(found)[:MAPPED]))


def map_of(embeddings: np.ndarray, labels: torch.Tensor) -> dict[str, Any]:
    """Where the images stand on the plane, by each projection that there is, and the nodes of their classes by level.

    There are no levels if the images make no tree: of one class, or no class with two.
    """
    points = embeddings.astype(np.float64)
    counts = labels.unique(return_counts=True)[1]
    nodes, thresholds = np.zeros((len(counts), 0), dtype=np.int64), np.zeros(0)
    if len(counts) > 1 and counts.max() > 1:
        tree = ClassTree().fit_embeddings(torch.from_numpy(points), labels)
        nodes, thresholds = tree.part("nodes").numpy(), tree.part("thresholds").numpy()
    return {
        "points": {name: on_grid(project(points)) for name, project in projections(len(points)).items()},
        "nodes": [np.unique(column, return_inverse=True)[1].tolist() for column in nodes.T],
        "thresholds": np.round(thresholds, 4).tolist(),
    }


def projections(num_points: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """By name: PCA, and UMAP where it is installed and there are more points than its neighbourhood has."""
    found: dict[str, Callable[[np.ndarray], np.ndarray]] = {"PCA": principal_components}
    if num_points <= UMAP_NEIGHBORS:
        return found
    try:
        from umap import UMAP
    except ImportError:
        return found
    umap = UMAP(n_neighbors=UMAP_NEIGHBORS, random_state=0, n_jobs=1)
    return {"UMAP": umap.fit_transform, **found}


def principal_components(points: np.ndarray) -> np.ndarray:
    """The first two, (N, 2); zeros where there are not so many."""
    if np.ptp(points, axis=0).max() == 0:  # one image, or all in one place
        return np.zeros((len(points), 2))
    found = PCA(min(2, *points.shape)).fit_transform(points)
    return np.pad(found, ((0, 0), (0, 2 - found.shape[1])))


def on_grid(points: np.ndarray) -> list[list[int]]:
    """In whole numbers of 0 .. GRID, the wider of the two directions filled."""
    low, high = points.min(axis=0), points.max(axis=0)
    scale = GRID / ((high - low).max() or 1.0)
    return np.round((points - (low + high) / 2) * scale + GRID / 2).astype(int).tolist()


def load(path: Path) -> dict[str, Any] | None:
    """Retrievals from a file, validated; None if it is a JSON file of something else, or none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return None
    if not isinstance(content, dict) or "queries" not in content:
        return None
    validate(content)
    return content


def only(document: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """The same for some of the methods.

    Raises:
        ValueError: it has none of that name.
    """
    unknown = [method for method in methods if method not in document["methods"]]
    if unknown:
        raise ValueError(f"there is no {', '.join(unknown)} in it; there are {', '.join(document['methods'])}")
    return {**document, "methods": methods}


def validate(document: dict[str, Any]) -> None:
    """Raises a `ValueError` that names what is not as it should be."""
    missing = [key for key in KEYS if key not in document]
    if missing:
        raise ValueError(f"retrievals for the report lack {', '.join(missing)}")
    count = len(document["pictures"])
    used = [query["picture"] for query in document["queries"]] + document["map"]["pictures"]
    used += [place for query in document["queries"] for found in query["neighbors"].values() for place, _ in found]
    if not all(0 <= place < count for place in used):
        raise ValueError(f"there are {count} pictures, but others are referred to: {max(used)}")
