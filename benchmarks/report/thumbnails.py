"""Small pictures that stand in a page."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image

SIZE = 32  # pixels


def thumbnail(image: torch.Tensor, size: int = SIZE) -> str:
    """A picture of an image (channels, height, width) in 0..1, at most so wide and high, as a data URI."""
    pixels = (image.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((size, size))
    buffer = io.BytesIO()
    if picture.mode == "L":
        picture.quantize(8).save(buffer, "PNG", optimize=True)
        kind = "png"
    else:  # a third of a PNG's size
        picture.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
