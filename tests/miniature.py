"""Tiny copies of the field's data sets, in the layout of the real files."""

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (40, 30)


def draw(path: Path, label: int, sample: int) -> str:
    """An image of its class: a colour and stripes; samples differ by noise."""
    rng = np.random.default_rng([label, sample])
    colour = np.random.default_rng(label).integers(0, 200, size=3)
    pixels = np.broadcast_to(colour, (SIZE[1], SIZE[0], 3)).copy()
    pixels[:, :: 2 + label % 5] += 50
    pixels = (pixels + rng.integers(-20, 20, size=pixels.shape)).clip(0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "L" if sample == 0 and label % 7 == 0 else "RGB"  # the real sets have some grey ones
    Image.fromarray(pixels).convert(mode).save(path)
    return path.name


def cub(root: Path, classes=(*range(1, 11), *range(101, 107)), per_class: int = 5) -> None:
    """Classes 1 to 100 are to train, 101 to 200 to test."""
    base = root / "CUB_200_2011"
    images, labels = [], []
    for label in classes:
        for sample in range(per_class):
            name = f"{label:03d}.Some_Bird_{label}/Some_Bird_{sample:04d}.jpg"
            draw(base / "images" / name, label, sample)
            images.append(f"{len(images) + 1} {name}")
            labels.append(f"{len(labels) + 1} {label}")
    (base / "images.txt").write_text("\n".join(images) + "\n")
    (base / "image_class_labels.txt").write_text("\n".join(labels) + "\n")


def cars(root: Path, classes=(*range(1, 11), *range(99, 105)), per_class: int = 5) -> None:
    """196 names; images of all classes in both the archive's folders; classes 1 to 98 are to train."""
    names = [f"Make Model/{label} 2012" for label in range(1, 197)]
    root.mkdir(parents=True, exist_ok=True)
    (root / "names.csv").write_text("\n".join(names) + "\n")
    for split in ("train", "test"):
        with (root / f"anno_{split}.csv").open("w", newline="") as file:
            for label in classes:
                for sample in range(split == "test", per_class, 2):
                    folder = root / "car_data" / "car_data" / split / names[label - 1].replace("/", "-")
                    image = draw(folder / f"{label:03d}{sample:02d}.jpg", label, sample)
                    csv.writer(file).writerow([image, 1, 1, 30, 30, label])


def sop(root: Path, num_train: int = 10, num_test: int = 6, per_class: int = 4) -> None:
    base = root / "Stanford_Online_Products"
    image = 0
    for split, labels in (("train", range(1, num_train + 1)), ("test", range(num_train + 1, num_train + num_test + 1))):
        rows = ["image_id class_id super_class_id path"]
        for label in labels:
            for sample in range(per_class):
                image += 1
                name = f"chair_final/{label}_{sample}.JPG"
                draw(base / name, label, sample)
                rows.append(f"{image} {label} 1 {name}")
        (base / f"Ebay_{split}.txt").write_text("\n".join(rows) + "\n")


def inaturalist(root: Path, num_train: int = 10, num_test: int = 6, per_class: int = 4) -> None:
    lists = {"train": [], "val": []}
    splits = {"train": [], "test": []}
    for label in range(num_train + num_test):
        for sample in range(per_class):
            name = f"train_val2018/Aves/{label}/{label}{sample}.jpg"
            draw(root / name, label, sample)
            lists["val" if sample == 0 else "train"].append((100 * label + sample, name, label))
            splits["train" if label < num_train else "test"].append(name)
    for part, entries in lists.items():
        document = {
            "images": [{"id": number, "file_name": name} for number, name, _ in entries],
            "annotations": [{"image_id": number, "category_id": label} for number, _, label in entries],
        }
        (root / f"{part}2018.json").write_text(json.dumps(document))
    (root / "Inat_dataset_splits").mkdir()
    for part, names in splits.items():
        (root / "Inat_dataset_splits" / f"Inaturalist_{part}_set1.txt").write_text("\n".join(names) + "\n")


def inshop(root: Path, num_train: int = 10, num_test: int = 6, per_class: int = 4) -> None:
    rows = []
    for label in range(num_train + num_test):
        for sample in range(per_class):
            name = f"img/WOMEN/Dresses/id_{label:08d}/0{sample}_1_front.jpg"
            draw(root / "Img" / name, label, sample)
            status = "train" if label < num_train else ("query" if sample < 2 else "gallery")
            rows.append(f"{name} id_{label:08d} {status}")
    (root / "Eval").mkdir()
    heads = [str(len(rows)), "image_name item_id evaluation_status"]
    (root / "Eval" / "list_eval_partition.txt").write_text("\n".join([*heads, *rows]) + "\n")


def folder(root: Path, num_classes: int = 20, per_class: int = 4) -> None:
    for label in range(num_classes):
        for sample in range(per_class):
            draw(root / f"class <{label}>" / f"{sample}.png", label, sample)
    (root / "notes.txt").write_text("not a class")
    (root / "empty").mkdir()


MINIATURES = {"cub": cub, "cars": cars, "sop": sop, "inaturalist": inaturalist, "inshop": inshop, "folder": folder}
RECALL_AT = {
    "cub": [1, 2, 4, 8],
    "cars": [1, 2, 4, 8],
    "sop": [1, 10, 100, 1000],
    "inaturalist": [1, 4, 16, 32],
    "inshop": [1, 10, 20, 30],
    "folder": [1, 2, 4, 8],
}
