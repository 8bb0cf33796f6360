"""A second device where there is none: tensors that say they lie on `meta`, hold their numbers on the CPU all the same,
and refuse to meet tensors of the CPU where those of an accelerator would.

>>> with Elsewhere() as there:
...     model.to(there)  # torch.device("meta")

As on an accelerator, tensors without axes mix with any, indices may lie on the CPU, and copies go both ways; `numpy()`
is refused. What is not imitated: streams, and kernels that lack a type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


WAITS: list[str] = []
"""The operations by which the host has waited for the device: what reads its numbers."""


class Mixed(RuntimeError):
    """An operation met tensors of two devices."""


class Away(Tensor):
    """A tensor that lies elsewhere."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> Away:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE, requires_grad=requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Away({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor of another device to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operation on the numbers, and put what comes out where it belongs."""
    flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    asked = kwargs.get("device")
    there = torch.device(asked) == DEVICE if asked is not None else any(isinstance(x, Away) for x in flat)
    if any(isinstance(x, Away) for x in flat) and func not in COPIES:
        checked = (
            [args[0], *(x for x in tree_flatten(args[2:])[0] if isinstance(x, Tensor))] if func in INDEXED else flat
        )
        strangers = [x for x in checked if not isinstance(x, Away) and x.dim()]
        if strangers:
            raise Mixed(f"{func} met tensors of two devices: one of the CPU {[tuple(x.shape) for x in strangers]}")
    if func == aten._local_scalar_dense.default or (func == aten._to_copy.default and not there):
        WAITS.extend([str(func)] * isinstance(args[0], Away))
    if func == aten.copy_.default:
        there = isinstance(args[0], Away)
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    inner = tree_map(lambda x: x.held if isinstance(x, Away) else x, (args, kwargs))
    out = func(*inner[0], **inner[1])
    known = {id(x.held): x for x in flat if isinstance(x, Away)}
    known |= {id(x): x for x in flat if not isinstance(x, Away)}

    def place(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, Away):
            return x
        if id(x) in known:  # what was changed in place is the same tensor
            return known[id(x)]
        return Away(x) if there else x

    return tree_map(place, out)


class _Made(TorchFunctionMode):
    """Numbers that are given as such: `torch.tensor` keeps none for a real meta tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]) == DEVICE
            made = func(*args, **kwargs | {"device": None}) if there else func(*args, **kwargs)
            return made.to(DEVICE) if there else made
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
            args = (args[0], index, *args[2:])
        return func(*args, **kwargs)


class Elsewhere(TorchDispatchMode):
    """Inside the block, tensors can be made on the other device, and moved there."""

    def __enter__(self) -> torch.device:
        super().__enter__()
        self._made = _Made()
        self._made.__enter__()
        return DEVICE

    def __exit__(self, *problem: Any) -> None:
        self._made.__exit__(*problem)
        super().__exit__(*problem)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})
