"""Inside attention: queries, keys, values, scores and patterns, seen and changed.

Most families of `transformers` look their attention function up in a registry. While a hook set watches, what that
registry answers is wrapped in ours, which shows q, k and v as used and then calls what it wraps, so that its result is
the same to the bit; the name of the kernel in the configuration stays, since some models choose their masks by it.
Scores and patterns, which fast kernels never form, are computed separately when they are only read; the kernel's result
is replaced only when they are edited.

Families with attention code of their own are watched from a `TorchFunctionMode` that is active during the forward of
the attention module alone: it sees the product of queries and keys, the softmax, and the product with the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from microtome.run.hook._tensors import input_of

Visit = Callable[[Tensor], Tensor | None]


@dataclass
class AttentionHooks:
    """What to do inside one attention module.

    Attributes:
        visits: for each of q, k, v, mix [batch, pos, head, d_head] and scores, pattern [batch, head, q_pos, k_pos],
            functions that see the tensor and may return another; the mix is what attention gives.
        edits_pattern: whether a visit may change scores or pattern, so that they must replace the kernel's result.
        frozen: hold the pattern constant for gradients, by detaching queries and keys.
        acts: whether the forward under way is one that is watched.
    """

    visits: dict[str, list[Visit]] = field(default_factory=dict)
    edits_pattern: bool = False
    frozen: bool = False
    acts: Callable[[], bool] = lambda: True

    def add(self, slot: str, visit: Visit, edits: bool) -> None:
        """Visit one of the six tensors."""
        self.visits.setdefault(slot, []).append(visit)
        self.edits_pattern |= edits and slot in ("scores", "pattern")

    @property
    def wants_pattern(self) -> bool:
        """Whether scores or pattern must be formed."""
        return bool(self.visits.get("scores") or self.visits.get("pattern"))

    def visit(self, slot: str, x: Tensor) -> Tensor:
        """Show a tensor to the visits of a slot, in order."""
        for visit in self.visits.get(slot, ()):
            new = visit(x)
            x = x if new is None else new
        return x

    def visit_heads(self, slot: str, x: Tensor) -> Tensor:
        """The same for q, k or v as attention functions hold them, [batch, head, pos, d_head]."""
        if not self.visits.get(slot):
            return x
        return self.visit(slot, x.transpose(1, 2)).transpose(1, 2)


_ACTIVE: dict[int, list[AttentionHooks]] = {}


def watched(module: nn.Module) -> AttentionHooks:
    """All hooks that act in the attention of a module, as one: visits in the order in which they were entered."""
    one = AttentionHooks()
    for watch in _ACTIVE.get(id(module), ()):
        if not watch.acts():
            continue
        for slot, visits in watch.visits.items():
            one.visits.setdefault(slot, []).extend(visits)
        one.edits_pattern |= watch.edits_pattern
        one.frozen |= watch.frozen
    return one


def is_unwatched(module: nn.Module) -> bool:
    """Whether nothing watches the attention of a module."""
    return id(module) not in _ACTIVE


@contextmanager
def watching(module: nn.Module, watch: AttentionHooks, acts: Callable[[], bool]) -> Iterator[None]:
    """Let a watch see the attention of a module in the forwards in which it acts."""
    watch.acts = acts
    stack = _ACTIVE.setdefault(id(module), [])
    stack.append(watch)
    try:
        yield
    finally:
        stack.remove(watch)
        if not stack:
            del _ACTIVE[id(module)]


class _Registry:
    """Wraps what the registry of attention functions answers, for as long as anything is watched."""

    def __init__(self) -> None:
        self._lock, self._users = Lock(), 0

    @contextmanager
    def wrapped(self) -> Iterator[None]:
        """Answer with wrapped functions inside the block; blocks of several threads may overlap."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._install()
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    AttentionInterface.get_interface = self._named
                    del AttentionInterface.__getitem__

    def _install(self) -> None:
        self._named = AttentionInterface.get_interface

        def get_interface(own: AttentionInterface, *args: Any, **kwargs: Any) -> Callable[..., Any]:
            return _wrapped(self._named(own, *args, **kwargs))

        def getitem(own: AttentionInterface, key: str) -> Callable[..., Any]:
            return _wrapped(super(AttentionInterface, own).__getitem__(key))

        for name, function in (("get_interface", get_interface), ("__getitem__", getitem)):
            setattr(AttentionInterface, name, function)


REGISTRY = _Registry()


def _wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function that shows what it reads where its module is watched."""
    if getattr(function, "shows_what_it_reads", False):
        return function

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_unwatched(module):
            return function(module, *args, **kwargs)
        # Families pass these by position or by name.
        given = dict(zip(("query", "key", "value", "attention_mask"), args, strict=False)) | kwargs
        q, k, v, mask = (given.pop(name, None) for name in ("query", "key", "value", "attention_mask"))
        return _attend(function, module, q, k, v, mask, **given)

    attend.shows_what_it_reads = True  # pyright: ignore[reportFunctionMemberAccess]
    return attend


def _attend(
    function: Callable[..., Any], module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
) -> Any:
    watch = watched(module)
    q, k, v = (watch.visit_heads(slot, x) for slot, x in zip("qkv", (q, k, v), strict=True))
    if watch.frozen:
        q, k = q.detach(), k.detach()
    if watch.edits_pattern:
        pattern = _form_pattern(module, watch, q, k, mask, kwargs)
        return watch.visit("mix", (pattern @ _repeat(v, q)).transpose(1, 2).contiguous()), pattern
    if watch.wants_pattern:
        _form_pattern(module, watch, q, k, mask, kwargs)
    output = function(module, q, k, v, mask, **kwargs)
    if not watch.visits.get("mix"):
        return output
    return watch.visit("mix", output[0]), *output[1:]


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [batch, kv_head, pos, d_head], once for every query head."""
    times = q.shape[1] // x.shape[1]
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def _form_pattern(
    module: nn.Module, watch: AttentionHooks, q: Tensor, k: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    scores = q @ _repeat(k, q).transpose(-1, -2)
    scaling = kwargs.get("scaling")
    scores = scores * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    softcap = kwargs.get("softcap")
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    bias = kwargs.get("position_bias")
    scores = scores if bias is None else scores + bias
    scores = _masked(scores, mask, _is_causal(module, kwargs))
    scores = watch.visit("scores", scores)
    sinks = kwargs.get("s_aux", getattr(module, "sinks", None))
    return watch.visit("pattern", _softmax(scores, sinks).to(q.dtype))


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over keys; a learned sink takes part in it and is dropped. A row with no key left is all zeros.

    In float32, or in float64 if the scores are: as the fused kernels do.
    """
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        return torch.cat([scores, column.to(scores.dtype)], dim=-1).softmax(-1, dtype=dtype)[..., :-1]
    return scores.softmax(-1, dtype=dtype).nan_to_num()


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    flag = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True)) if flag is None else bool(flag)


def _masked(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    n_q, n_k = scores.shape[-2:]
    if mask is None:
        if not causal or n_q == 1:
            return scores
        # As the fused kernels do: query 0 stands at key 0, also in front of the free columns of a static cache.
        mask = torch.ones(n_q, n_k, dtype=torch.bool, device=scores.device).tril()
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


class InlineAttention(TorchFunctionMode):
    """Watches an attention module that computes its attention in its own forward."""

    PRODUCTS = ("matmul", "bmm", "baddbmm", "__matmul__", "__rmatmul__")

    def __init__(self, watch: AttentionHooks, batch: int, n_heads: int) -> None:
        super().__init__()
        self.watch, self.batch, self.n_heads = watch, batch, n_heads
        self.softmaxed = False
        self.done = False

    @classmethod
    def around(cls, module: nn.Module, n_heads: int) -> Callable[..., Any]:
        """A wrapper of a module's forward in which all that watches it is active."""

        def run(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = input_of(args, kwargs)
            with cls(watched(module), hidden.shape[0], n_heads):
                return forward(*args, **kwargs)

        return run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is nn.functional.scaled_dot_product_attention:
            return self._fused(args, kwargs)
        if name == "softmax" and not self.softmaxed:
            self.softmaxed = True
            given = kwargs.pop("input", None) if not args else args[0]
            scores = self._by_head("scores", given)
            pattern = func(scores, *args[1:], **kwargs)
            pattern = pattern.nan_to_num() if self.watch.edits_pattern else pattern  # a row with no key left
            return self._by_head("pattern", pattern)
        if name in self.PRODUCTS and not self.done and _batched(args, kwargs):
            self.done = self.softmaxed
            return self._values(func, args, kwargs) if self.softmaxed else self._scores(func, args, kwargs)
        return func(*args, **kwargs)

    def _fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, v = (self.watch.visit_heads(s, given[n]) for s, n in zip("qkv", names[:3], strict=True))
        if self.watch.frozen:
            q, k = q.detach(), k.detach()
        mask, extra = (
            given.get("attn_mask"),
            {"is_causal": given.get("is_causal", False), "scaling": given.get("scale")},
        )
        if self.watch.wants_pattern:
            pattern = _form_pattern(nn.Module(), self.watch, q, k, mask, extra)
            if self.watch.edits_pattern:
                return pattern @ _repeat(v, q)
        given |= {"query": q, "key": k, "value": v}
        return nn.functional.scaled_dot_product_attention(**given)

    def _by_head(self, slot: str, x: Tensor) -> Tensor:
        """Visit scores or a pattern of shape [batch * head, q_pos, k_pos] or [batch, head, q_pos, k_pos]."""
        if x.dim() == 4:
            return self.watch.visit(slot, x)
        return self.watch.visit(slot, x.unflatten(0, (self.batch, -1))).flatten(0, 1)

    def _visit(self, slot: str, x: Tensor) -> Tensor:
        """Visit a tensor of shape [batch * head, pos, d_head] or [batch, head, pos, d_head]."""
        shape = x.shape
        heads = x if x.dim() == 4 else x.reshape(self.batch, -1, *shape[1:])
        return self.watch.visit_heads(slot, heads).reshape(shape)

    def _scores(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if "batch1" in kwargs:
            q, k = kwargs["batch1"], kwargs["batch2"]
        else:
            q, k = args[-2:]
        q, k = self._visit("q", q), self._visit("k", k.transpose(-1, -2)).transpose(-1, -2)
        if self.watch.frozen:
            q, k = q.detach(), k.detach()
        if "batch1" in kwargs:
            return func(*args, **kwargs | {"batch1": q, "batch2": k})
        return func(*args[:-2], q, k, **kwargs)

    def _values(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        pattern, v = args[-2:]
        return func(*args[:-2], pattern, self._visit("v", v), **kwargs)


def _batched(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a product is between activations; a projection written as a product has a weight of two axes."""
    last = kwargs.get("batch2", args[-1] if args else None)
    return isinstance(last, Tensor) and last.dim() > 2
