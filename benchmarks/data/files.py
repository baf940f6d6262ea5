"""Images in files, read when they are needed: a random crop to train on, the middle to evaluate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from .splits import Images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, on which the networks were trained
AREA = (0.16, 1.0)  # shares of the image that a random crop takes
RATIO = (3 / 4, 4 / 3)  # its width over its height
MARGIN = 256 / 224  # for evaluation the short side is longer than the crop by this

Crop = Callable[[Image.Image, int], Image.Image]


class ImageFiles(Dataset[tuple[torch.Tensor, int]], Images):
    """Images by their paths, as (3, size, size) float32 of ImageNet's mean and deviation, and labels (N,) int64."""

    channels = 3

    def __init__(self, paths: Sequence[str | Path], labels: torch.Tensor, size: int, *, is_training: bool = True) -> None:
        self.paths = [str(path) for path in paths]
        self.labels = labels
        self.size = size
        self.is_training = is_training

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self._crop(index, random_crop if self.is_training else middle_crop)
        return (to_tensor(image) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), int(
            self.labels[index]
        )

    def part(self, inside: torch.Tensor, labels: torch.Tensor) -> ImageFiles:
        """See `Images`."""
        paths = [self.paths[place] for place in inside.nonzero().flatten().tolist()]
        return ImageFiles(paths, labels, self.size, is_training=self.is_training)

    def evaluation(self) -> ImageFiles:
        """See `Images`."""
        return ImageFiles(self.paths, self.labels, self.size, is_training=False)

    def picture(self, index: int) -> torch.Tensor:
        """See `Images`."""
        return to_tensor(self._crop(index, middle_crop))

    def _crop(self, index: int, crop: Crop) -> Image.Image:
        with Image.open(self.paths[index]) as image:
            return crop(image.convert("RGB"), self.size)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, height, width) float32 in 0..1."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255


def random_crop(image: Image.Image, size: int) -> Image.Image:
    """A part of random area and shape, resized, half of the time mirrored; from torch's global generator."""
    draws = torch.rand(5).tolist()
    area = image.width * image.height * (AREA[0] + draws[0] * (AREA[1] - AREA[0]))
    ratio = math.exp(math.log(RATIO[0]) + draws[1] * (math.log(RATIO[1]) - math.log(RATIO[0])))
    width = min(image.width, max(1, round(math.sqrt(area * ratio))))
    height = min(image.height, max(1, round(math.sqrt(area / ratio))))
    left, top = round(draws[2] * (image.width - width)), round(draws[3] * (image.height - height))
    box = (left, top, left + width, top + height)
    found = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return found.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws[4] < 0.5 else found


def middle_crop(image: Image.Image, size: int) -> Image.Image:
    """The square in the middle of the image whose short side has been resized to a little more than `size`."""
    side = min(image.width, image.height) / MARGIN
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
