"""The network that every method trains."""

from __future__ import annotations

import torch
from torch import nn

WIDTHS = (32, 64, 128, 256)


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
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # nearly twice as fast on CPUs
