"""The transforms of torch.func (grad, vmap, jvp, ...): whether they are at work, and what is left when they are over.

All that torch has no public name for stands here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def transforms_active() -> bool:
    """Whether a transform is at work."""
    return torch._C._are_functorch_transforms_active()


def is_batched(values: torch.Tensor) -> bool:
    """Whether vmap is at work on them, so that there is no single value to look at."""
    return transforms_active() and torch._C._functorch.is_batchedtensor(_without_gradients(values))


def lasting(values: torch.Tensor) -> torch.Tensor:
    """The same (if not batched) to keep when the transforms are over: a wrapper could be neither copied nor saved then."""
    return _without_gradients(values) if transforms_active() else values


def all_copies(values: torch.Tensor) -> torch.Tensor:
    """The same, and where vmap is at work on them those of all copies, with a dimension more."""
    while transforms_active() and torch._C._functorch.is_functorch_wrapped_tensor(values):
        values = torch._C._functorch.get_unwrapped(values)
    return values


def outside_transforms() -> AbstractContextManager[None]:
    """For what is none of the function's mathematics: new tensors are no wrappers, and old ones may be changed in place."""
    return torch._C._DisableFuncTorch() if transforms_active() else nullcontext()


def _without_gradients(values: torch.Tensor) -> torch.Tensor:
    while torch._C._functorch.is_gradtrackingtensor(values):
        values = torch._C._functorch.get_unwrapped(values)
    return values
