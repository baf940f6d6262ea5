"""In which float type a network computes fastest."""

from __future__ import annotations

import torch


def fast_precision(device: str) -> str:
    """ "bf16" where the hardware computes in it, else "fp32".

    A processor that has to emulate it takes twice as long as in float32.
    """
    kind = device.partition(":")[0]
    if kind == "cuda":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Torch tells of its instruction sets only by these names; where they are missing, float32 is never wrong.
    has = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16" if kind == "cpu" and any(test is not None and test() for test in has) else "fp32"
