"""The networks: every method of a comparison trains the same."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import nn

WIDTHS = (32, 64, 128, 256)
KERNELS = (5, 3, 3, 3)  # of strided_net
LAST_SIZE = 2  # of images of 32 x 32 at the end of strided_net; larger ones are pooled to it
# By their names in timm, with the weights that "pretrained" takes: for ResNet-50 torchvision's first, which the field uses
# (timm's default ones are of another recipe). It has no BN-Inception; Inception v3 is its successor, with batch norm after
# every convolution; of its weights these are made for images as data/files.py normalises them (the default ones are not).
TIMM = {"resnet50": "resnet50.tv_in1k", "inception": "inception_v3.gluon_in1k"}
SMALL = ("conv_net", "strided_net")
NETWORKS = (*SMALL, *TIMM)


def make_network(name: str, channels: int, seed: int, weights: str = "random") -> tuple[nn.Module, int]:
    """A trunk, images to features (B, width), and its width; it begins as `seed` says where weights are random.

    Args:
        name: one of `NETWORKS`. conv_net and strided_net are small; the others are of `timm`.
        channels: of the images.
        weights: "random", "pretrained" (on ImageNet, from timm's hub) or a file with a state dict, all of the trunk in it.

    Raises:
        ValueError: another name, weights for conv_net that are not random, or weights that are not to be had or do not fit.
    """
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, but it is {name!r}")
    torch.manual_seed(seed)
    if name in SMALL:
        if weights != "random":
            raise ValueError(f"there are no weights for {name}, but --weights is {weights!r}")
        generator = torch.Generator().manual_seed(seed)
        if name == "conv_net":
            return conv_net(channels, generator), WIDTHS[-1]
        return strided_net(channels, generator), WIDTHS[-1] * LAST_SIZE**2
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision of another torch raises the latter
        raise ValueError(f'{name} needs timm and a torchvision that fits torch: pip install ".[field]" ({error})') from error
    try:
        # Any, whether timm is installed and has types or not.
        trunk: Any = timm.create_model(TIMM[name], pretrained=weights == "pretrained", num_classes=0, in_chans=channels)
        if weights not in ("random", "pretrained"):
            load_weights(trunk, weights)
    except (OSError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"there are no weights {weights!r} for {name} to be had: {str(error).splitlines()[0]}. Without the hub, save "
            f"the state dict of timm.create_model({TIMM[name]!r}, pretrained=True) on a machine that has it, and give the "
            "file: --weights FILE"
        ) from error
    return trunk, trunk.num_features


def load_weights(trunk: nn.Module, file: str) -> None:
    """Those of the trunk; what else the file has, such as a classifier, is left out.

    Raises:
        RuntimeError: some are missing, or have another shape.
    """
    found = trunk.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), strict=False)
    missing = [name for name in found.missing_keys if not name.endswith("num_batches_tracked")]  # old files have no such
    if missing:
        raise RuntimeError(f"{len(missing)} of its tensors are not in the file, such as {missing[0]}")


class Augment(nn.Module):
    """In training: a small random affine map and noise, for a whole batch at once. Nothing in evaluation.

    It is the first layer of the trunk, so the same data set serves training, the refresh of the tree and the test.
    """

    max_rotation = 0.15  # radians
    max_scale = 0.1
    max_shift = 0.06  # of half the image
    noise = 0.05

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def get_extra_state(self) -> torch.Tensor:
        """For `state_dict`: of its generator."""
        return self.generator.get_state()

    def set_extra_state(self, state: torch.Tensor) -> None:
        """For `load_state_dict`."""
        self.generator.set_state(state.cpu())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return images
        uniform = torch.rand(len(images), 5, generator=self.generator) * 2 - 1  # each in -1 .. 1
        angle, scale_x, scale_y = self.max_rotation * uniform[:, 0], *(1 + self.max_scale * uniform[:, 1:3]).T
        affine = torch.stack(
            [
                torch.stack([angle.cos() * scale_x, -angle.sin(), self.max_shift * uniform[:, 3]], dim=1),
                torch.stack([angle.sin(), angle.cos() * scale_y, self.max_shift * uniform[:, 4]], dim=1),
            ],
            dim=1,
        ).to(images)  # (B, 2, 3)
        noise = torch.randn(images.shape, generator=self.generator).to(images)
        grid = nn.functional.affine_grid(affine, list(images.shape), align_corners=False)
        return nn.functional.grid_sample(images, grid, align_corners=False) + self.noise * noise


class PoolTo(nn.Module):
    """Averages larger feature maps to `size` x `size`; others pass, for which torch takes a twentieth of a step."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if features.shape[-2:] == (self.size, self.size):
            return features
        return nn.functional.adaptive_avg_pool2d(features, self.size)


def conv_net(channels: int, generator: torch.Generator) -> nn.Sequential:
    """Four blocks of convolution, batch norm and pooling; images of 32 x 32 to 256 features."""
    layers: list[nn.Module] = [Augment(generator)]
    for inputs, outputs in zip((channels, *WIDTHS[:-1]), WIDTHS, strict=True):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        ]
    return _channels_last([*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()])


def strided_net(channels: int, generator: torch.Generator) -> nn.Sequential:
    """Four convolutions of stride 2, each with batch norm; images of 32 x 32 to 1,024 features.

    Strides instead of pooling: on CPUs it trains more than twice as fast.
    """
    layers: list[nn.Module] = [Augment(generator)]
    for kernel, inputs, outputs in zip(KERNELS, (channels, *WIDTHS[:-1]), WIDTHS, strict=True):
        layers += [
            nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return _channels_last([*layers, PoolTo(LAST_SIZE), nn.Flatten()])


def _channels_last(layers: list[nn.Module]) -> nn.Sequential:
    # Nearly twice as fast on CPUs. Torch documents `to(memory_format=)`, but its annotations lack it.
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
