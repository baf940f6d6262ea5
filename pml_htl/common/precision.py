"""Which floats a device has, and full float32 arithmetic whatever precision the user has chosen for the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

WITHOUT_FLOAT64 = ("mps",)  # types of devices; of "xpu" some have it and some don't, and say so


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64: Apple's GPUs, many of Intel's."""
    if device.type == "xpu":
        return torch.float64 if torch.xpu.get_device_properties(device).has_fp64 else torch.float32
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def home_of(dtype: torch.dtype, device: torch.device) -> torch.device:
    """Where numbers that belong on `device` are kept: there, but float64 on the host if the device has none."""
    is_there = dtype != torch.float64 or widest_float(device) == torch.float64
    return device if is_there else torch.device("cpu")


def copy_for(device: torch.device, values: torch.Tensor) -> torch.Tensor:
    """`values` on `device`, float64 as the widest float that is there."""
    dtype = widest_float(device) if values.dtype == torch.float64 else values.dtype
    return values.to(dtype).to(device)  # in two steps: what the device does not have must not arrive there


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off. Half precision has three digits, and a margin may be the small difference of large distances."""
    try:
        is_on = torch.is_autocast_enabled(device.type)
    except RuntimeError:  # a device without autocast
        is_on = False
    except TypeError:  # torch 2.3 does not tell of a device
        is_on = True
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()


@contextmanager
def full_products(device: torch.device) -> Iterator[None]:
    """Autocast off, and no shortened floats (TF32, bfloat16) in products of float32 matrices."""
    try:
        chosen = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch tells its older setting only as long as nobody has used the newer ones
        products: AbstractContextManager[None] = _newer_settings()
    else:
        products = nullcontext() if chosen == "highest" else _older_setting(chosen)
    with products, full_precision(device):
        yield


@contextmanager
def _older_setting(chosen: str) -> Iterator[None]:
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


@contextmanager
def _newer_settings() -> Iterator[None]:
    backends: Any = torch.backends  # torch adds these settings when it runs, unseen by type checkers
    settings = (backends.cuda.matmul, backends.mkldnn.matmul)
    chosen = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, chosen, strict=True):
            # What only followed the general setting goes on to follow it.
            setting.fp32_precision = "none" if value == backends.fp32_precision else value
