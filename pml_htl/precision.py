"""Full float32 arithmetic, whatever precision the user has chosen for the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off. Half precision has three digits, and a margin may be the small difference of large distances."""
    try:
        return torch.autocast(device.type, enabled=False)
    except RuntimeError:  # a device without autocast
        return nullcontext()


@contextmanager
def full_products(device: torch.device) -> Iterator[None]:
    """Autocast off, and no shortened floats (TF32, bfloat16) in products of float32 matrices."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with full_precision(device):
            yield
    finally:
        torch.set_float32_matmul_precision(chosen)
