"""Norms whose divisor is held constant for gradients: every one that runs, by its form, which is tried on values.

plain               y = gain * centre(x) / sg[scale(x)] + bias
gate before         y = gain * h / sg[scale(h)], h = x * act(gate), by groups of its width
gate behind         y = gain * x / sg[scale(x)] * act(gate)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from microtome.anatomy import Anatomy, NormWeights, at_least_float32, norm_of, present
from microtome.errors import EditError, error
from microtome.run.hook._points import divided, divisor
from microtome.run.hook._tensors import input_of

After = Callable[[tuple[Any, ...], dict[str, Any], Tensor], Tensor]


def tie(value: Tensor, linear: Tensor) -> Tensor:
    """The value of one tensor with the gradient of another."""
    return value.detach() + (linear - linear.detach())


def frozen_norms(model: nn.Module, anatomy: Anatomy) -> Iterator[tuple[str, After]]:
    """Paths of all norms, with what holds the divisor of each; what has no known form is refused where it runs."""
    for path, module in model.named_modules():
        named = "norm" in type(module).__name__.lower()
        if next(module.children(), None) is not None or not (named or _may_be_norm(module)):
            continue
        norm = norm_of(module, path, anatomy.d_model)
        if norm is not None:
            if not norm.identity:
                yield path, _plain(NormWeights(module, norm))
        elif named:
            gated = _gated_of(module)
            yield path, _refused(path) if gated is None else gated.after


def _may_be_norm(module: nn.Module) -> bool:
    """Whether a module holds no more than a gain and a bias; only such are tried without being called a norm."""
    held = dict(module.named_parameters())
    return held.keys() <= {"weight", "bias"} and all(p.dim() <= 1 for p in held.values())


def _plain(norm: NormWeights) -> After:
    def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = input_of(args, kwargs)
        held = divisor(output, norm, x).detach()
        gain = norm.gain
        unused = isinstance(gain, Tensor) and gain.dim() == 1 and gain.shape[0] not in (1, x.shape[-1])
        # A weight that does not fit what is read takes no part in the forward: some norms hold one as a dummy.
        linear = norm.centre(x) / held.unsqueeze(-1).to(x.dtype) if unused else norm.apply(x, held)
        return divided(tie(output, linear), held)

    return after


def _refused(path: str) -> After:
    def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        raise error(
            EditError, f"the norm {path} has no known form, so it cannot be frozen", do="use Freeze(norms=False)"
        )

    return after


@dataclass(frozen=True)
class _Gated:
    """A root mean square norm with a gate: `act` of a second argument, times what it reads or what it gives."""

    module: nn.Module
    act: Callable[[Tensor], Tensor]
    before: bool
    group: int
    eps: float

    def apply(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """The norm of x [..., width], in float32 at least; its divisor has no gradient."""
        by = 1.0 if gate is None else self.act(at_least_float32(gate))
        h = at_least_float32(x) * by if self.before else at_least_float32(x)
        h = h.unflatten(-1, (-1, self.group))
        held = (h.pow(2).mean(-1, keepdim=True) + self.eps).sqrt().detach()
        y = (h / held).flatten(-2) * present(self.module, self.module.weight)
        return y if self.before else y * by

    def after(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """The same value, with the gradient of the norm whose divisor is held."""
        gate = args[1] if len(args) > 1 else kwargs.get("gate")
        return tie(output, self.apply(input_of(args, kwargs), gate).to(output.dtype))


def _gated_of(module: nn.Module) -> _Gated | None:
    """How a norm uses its gate, by trying it on random vectors; None for what is no such norm."""
    weight = present(module, getattr(module, "weight", None))
    eps = next((v for n in ("variance_epsilon", "eps") if isinstance(v := getattr(module, n, None), float)), None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or eps is None:
        return None
    width = weight.shape[0]
    groups: Any = getattr(module, "n_groups", 1)
    group: Any = getattr(module, "group_size", None) or (width // groups if isinstance(groups, int) else width)
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(2, 4, 1, width, generator=generator) * 2).to(weight.device, weight.dtype)
    rtol = 2e-2 if x.dtype in (torch.float16, torch.bfloat16) else 1e-4
    try:
        with torch.no_grad():
            got = at_least_float32(module.forward(x, gate))
            for act, before in product((nn.functional.silu, torch.sigmoid), (True, False)):
                tried = _Gated(module, act, before, group, eps)
                if torch.allclose(tried.apply(x, gate), got, rtol=rtol, atol=1e-2):
                    return tried
    except Exception:  # noqa: BLE001 (whatever a module makes of a gate that it does not expect)
        return None
    return None
