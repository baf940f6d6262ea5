"""The data sets of the field, by PML's own classes where it has one. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_metric_learning import datasets

from .files import ImageFiles
from .splits import Splits, split_as_given, split_by_class


@dataclass(frozen=True)
class FieldSet:
    """A data set of PML: its class, what must be in its folder, where that comes from, and its usual recalls."""

    dataset: Callable[..., Any]
    needed: tuple[str, ...]
    source: str
    recall_at: tuple[int, ...]


FIELD_SETS = {
    "cub": FieldSet(
        datasets.CUB,
        ("CUB_200_2011/images.txt", "CUB_200_2011/image_class_labels.txt", "CUB_200_2011/images"),
        f"CUB_200_2011.tgz from {datasets.CUB.DOWNLOAD_URL}",
        (1, 2, 4, 8),
    ),
    "cars": FieldSet(
        datasets.Cars196,
        ("names.csv", "anno_train.csv", "anno_test.csv", "car_data/car_data"),
        f"the archive from {datasets.Cars196.DOWNLOAD_URL}",
        (1, 2, 4, 8),
    ),
    "sop": FieldSet(
        datasets.StanfordOnlineProducts,
        ("Stanford_Online_Products/Ebay_train.txt", "Stanford_Online_Products/Ebay_test.txt"),
        f"Stanford_Online_Products.zip from {datasets.StanfordOnlineProducts.DOWNLOAD_URL}",
        (1, 10, 100, 1000),
    ),
    "inaturalist": FieldSet(
        datasets.INaturalist2018,
        (
            "train2018.json",
            "val2018.json",
            "Inat_dataset_splits/Inaturalist_train_set1.txt",
            "Inat_dataset_splits/Inaturalist_test_set1.txt",
        ),
        f"train_val2018.tar.gz from {datasets.INaturalist2018.IMG_DOWNLOAD_URL}, the annotations from "
        f"{datasets.INaturalist2018.TRAIN_ANN_URL} and {datasets.INaturalist2018.VAL_ANN_URL}, and the splits from "
        f"{datasets.INaturalist2018.SPLITS_URL}",
        (1, 4, 16, 32),
    ),
}
INSHOP_SOURCE = (
    "list_eval_partition.txt and img.zip of the In-shop Clothes Retrieval Benchmark of DeepFashion "
    "(https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html)"
)
INSHOP_RECALL = (1, 10, 20, 30)
FOLDER_RECALL = (1, 2, 4, 8)


def field_set(name: str, root: Path, size: int) -> Splits:
    """One of `FIELD_SETS`, its files below `root`, as crops of `size`."""
    spec = FIELD_SETS[name]
    require(name, root, spec.needed, spec.source)
    parts = [spec.dataset(str(root), split=split, download=False) for split in ("train", "test")]
    require(name, root, tuple(str(Path(part.paths[0]).relative_to(root)) for part in parts), spec.source)
    classes, labels = np.unique(np.concatenate([part.labels for part in parts]), return_inverse=True)
    own_labels = np.split(labels, [len(parts[0].labels)])
    names = [Path(path).parent.name for part in parts for path in part.paths]
    by_class = dict(zip(labels.tolist(), names, strict=True))
    train, test = (ImageFiles(part.paths, torch.from_numpy(own), size) for part, own in zip(parts, own_labels, strict=True))
    return split_as_given(name, train, test, None, [by_class[place] for place in range(len(classes))], spec.recall_at)


def in_shop(root: Path, size: int) -> Splits:
    """In-Shop Clothes Retrieval by its official files: queries are looked up in the gallery."""
    lists = [folder / "list_eval_partition.txt" for folder in (root / "Eval", root)]
    found = [path for path in lists if path.exists()]
    if not found:
        require("inshop", root, ("Eval/list_eval_partition.txt",), INSHOP_SOURCE)
    base = root / "Img" if (root / "Img").is_dir() else root
    rows = [line.split() for line in found[0].read_text(encoding="utf-8").splitlines()[2:] if line.strip()]
    broken = [row for row in rows if len(row) != 3 or row[2] not in ("train", "query", "gallery")]
    if broken:
        raise ValueError(f"{found[0]}: a line should be an image, an item and train, query or gallery, not {broken[0]}")
    classes, labels = np.unique([item for _, item, _ in rows], return_inverse=True)

    def part(status: str) -> ImageFiles:
        inside = [place for place, row in enumerate(rows) if row[2] == status]
        if not inside:
            raise ValueError(f"{found[0]} has no image with status {status}")
        require("inshop", base, (rows[inside[0]][0],), INSHOP_SOURCE)
        return ImageFiles([base / rows[place][0] for place in inside], torch.from_numpy(labels[inside]), size)

    return split_as_given("inshop", part("train"), part("query"), part("gallery"), classes.tolist(), INSHOP_RECALL)


def class_folders(root: Path, size: int) -> Splits:
    """Any folder with a folder for each class, in which its images are."""
    readable = set(Image.registered_extensions())
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    files = {
        folder.name: sorted(path for path in folder.rglob("*") if path.suffix.lower() in readable) for folder in folders
    }
    files = {name: paths for name, paths in files.items() if paths}
    if len(files) < 4:
        raise ValueError(
            f"{root} has {len(files)} folders with images, but a comparison needs at least four classes: a folder for each, "
            "named by it, with its images"
        )
    labels = np.repeat(np.arange(len(files)), [len(paths) for paths in files.values()])
    images = ImageFiles([path for paths in files.values() for path in paths], torch.from_numpy(labels), size)
    splits = split_by_class(f"folder:{root}", images, list(files), FOLDER_RECALL)
    return Splits(
        splits.name, splits.train, splits.val.evaluation(), splits.test.evaluation(), splits.class_names, None, FOLDER_RECALL
    )


def require(name: str, root: Path, needed: tuple[str, ...], source: str) -> None:
    """Raises a `ValueError` that says what to get, and where to put it, unless everything needed is there."""
    missing = [part for part in needed if not (root / part).exists()]
    if missing:
        raise ValueError(
            f"there is no {root / missing[0]}. Get {source}, and unpack it in {root} (or name another folder: "
            f"--data {name}:FOLDER). Nothing is downloaded by itself"
        )
