"""A device without float64, as Apple's GPUs are, made of CPU tensors: for tests where there is no such device.

It takes the name of the meta device, for which torch has an autograd that needs no hardware. Its tensors have values.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class OnDevice(torch.Tensor):
    """A CPU tensor, `held`, that says it is on the device."""

    is_meta = False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        if held.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"the device has no {held.dtype}")
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        tensor.held = held
        return tensor

    def tolist(self):
        """As of a real tensor of a device; torch refuses it for subclasses."""
        return self.cpu().tolist()

    def __repr__(self):
        return f"OnDevice({self.held})"  # torch's own makes float64 of it, on the host where the device is real

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class DeviceMode(TorchDispatchMode):
    """Brings the device into being: what is made there, or of what is there, is there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    there = [value for value in given if isinstance(value, OnDevice)]
    on_host = [value for value in given if not isinstance(value, OnDevice) and value.ndim > 0]
    is_indexed = func is torch.ops.aten.index.Tensor and isinstance(args[0], OnDevice)  # by indices of either device
    if there and on_host and func not in COPIES and not is_indexed:
        raise RuntimeError(f"{func} got tensors on two devices")
    goes_there = bool(there)
    if kwargs.get("device") is not None:
        goes_there = kwargs["device"] == DEVICE
        if goes_there and func is torch.ops.aten.empty.memory_format and kwargs.get("dtype") == torch.int64:
            # What becomes of `torch.tensor(..., device="meta")` and of an index that is a list: nothing but garbage.
            raise NotImplementedError("the stand-in device takes no numbers from Python lists; move a tensor there")
        kwargs = {**kwargs, "device": torch.device("cpu") if goes_there else kwargs["device"]}
    of_held = {id(value.held): value for value in there}
    own = {id(value) for value in given}

    def wrap(value):
        if not isinstance(value, torch.Tensor) or id(value) in own:
            return value
        if id(value) in of_held:  # changed in place
            return of_held[id(value)]
        return OnDevice(value) if goes_there else value

    args, kwargs = tree_map(lambda value: value.held if isinstance(value, OnDevice) else value, (args, kwargs))
    return tree_map(wrap, func(*args, **kwargs))
