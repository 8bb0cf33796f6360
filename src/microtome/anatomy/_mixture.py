"""Mixtures of experts: in which of two ways their experts are called, how many there are, and the weights of each.

    slots      experts(hidden [token, d_model], chosen [token, slot], weights [token, slot]) -> [token, d_model]
    stacked    experts(hidden times weight [expert * token, d_model]) -> the same shape, summed over experts outside

Whatever a router returns, what its experts are called with says which were used and with which weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from inspect import Parameter, signature
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

GATE_UP = ("gate_up_proj",)
GATE = ("gate_proj", "mlp.w1", "w1")
UP = ("up_proj", "mlp.v1", "w3")
DOWN = ("down_proj", "mlp.w2", "w2")
_ACTIVATION = ("act_fn", "activation_fn", "mlp.activation_fn", "mlp.act_fn")
_COUNTS = ("num_experts", "total_experts", "num_local_experts", "n_routed_experts", "num_router_classes")
_CHOICES = ("top_k", "num_experts_per_tok", "moe_top_k", "num_experts_per_token", "top_k_experts")


def _found(module: object, names: Iterable[str]) -> Any:
    """The first attribute (dotted) that there is, or None."""
    for name in names:
        try:
            value = attrgetter(name)(module)
        except AttributeError:
            continue
        if value is not None:
            return value
    return None


class Experts:
    """The weights of all experts of a mixture, as views, and what an expert makes of a token."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.n_experts = int(_found(module, ("num_routed_experts", *_COUNTS)) or 0)
        down = self._tensor(DOWN)
        if down is not None and down.dim() == 3:
            self.n_experts = int(down.shape[0])

    @property
    def known(self) -> bool:
        """Whether the weights have a known form."""
        return self.W_in is not None and self.W_out is not None and self._act is not None

    def _tensor(self, names: tuple[str, ...]) -> Tensor | None:
        found = _found(self.module, names)
        return found if isinstance(found, Tensor) and found.is_floating_point() else None

    def _bias(self, names: tuple[str, ...]) -> Tensor | None:
        return self._tensor(tuple(f"{name}_bias" for name in names))

    @cached_property
    def _turned(self) -> bool:
        """Whether weights are stored as [expert, in, out]."""
        declared = getattr(self.module, "is_transposed", None)
        both, down = self._tensor(GATE_UP), self._tensor(DOWN)
        if declared is not None or both is None or down is None:
            return bool(declared)
        return both.shape[1] != 2 * down.shape[2]

    def _half(self, k: int) -> Tensor | None:
        """[expert, d_model, neuron] the gate (0) or the up projection (1) of a fused one."""
        both = self._tensor(GATE_UP)
        if both is None:
            return None
        both = both if self._turned else both.transpose(1, 2)
        return both[..., k::2] if self.interleaved else both.chunk(2, dim=-1)[k]

    @property
    def interleaved(self) -> bool:
        """Whether a fused projection has gate and up of each neuron in turn."""
        return getattr(self.module, "is_concatenated", True) is False

    def _alone(self, names: tuple[str, ...], out: bool = False) -> Tensor | None:
        """[expert, in, out] a projection of its own; where all experts share one matrix, they are [expert * neuron]."""
        weight = self._tensor(names)
        if weight is None or weight.dim() not in (2, 3) or not self.n_experts:
            return None
        if weight.dim() == 2:
            weight = weight.unflatten(0, (self.n_experts, -1))
            return weight if out else weight.transpose(1, 2)
        return weight if self._turned else weight.transpose(1, 2)

    @property
    def W_gate(self) -> Tensor | None:
        """[expert, d_model, neuron], or None without gates."""
        return self._alone(GATE) if self._tensor(GATE_UP) is None else self._half(0)

    @property
    def W_in(self) -> Tensor | None:
        """[expert, d_model, neuron]"""
        return self._alone(UP) if self._tensor(GATE_UP) is None else self._half(1)

    @property
    def W_out(self) -> Tensor | None:
        """[expert, neuron, d_model]"""
        return self._alone(DOWN, out=True)

    def bias(self, name: str) -> Tensor | None:
        """`b_gate` or `b_in` [expert, neuron], or `b_out` [expert, d_model]; None where there is none."""
        both = self._bias(GATE_UP)
        if name == "b_out" or both is None:
            return self._bias({"b_out": DOWN, "b_in": UP, "b_gate": GATE}[name])
        k = 0 if name == "b_gate" else 1
        return both[..., k::2] if self.interleaved else both.chunk(2, dim=-1)[k]

    @property
    def _act(self) -> Any:
        own = getattr(self.module, "_apply_gate", None)
        return _found(self.module, _ACTIVATION) if own is None or self.W_gate is None else own

    def neurons(self, x: Tensor, expert: int) -> Tensor:
        """[token, neuron] what enters W_out of one expert that reads x [token, d_model]."""
        parts: list[Tensor] = []
        for name, weight in (("b_gate", self.W_gate), ("b_in", self.W_in)):
            if weight is not None:
                bias = self.bias(name)
                parts.append(x @ weight[expert] if bias is None else x @ weight[expert] + bias[expert])
        if len(parts) == 1:
            return self._act(parts[0])
        gate, up = parts
        if getattr(self.module, "_apply_gate", None) is None:
            return self._act(gate) * up
        # Some gate in their own way, for which they take both as their projection gives them.
        in_turn = torch.stack((gate, up), dim=-1).flatten(-2) if self.interleaved else torch.cat((gate, up), dim=-1)
        return self._act(in_turn)

    def writes(self, post: Tensor, expert: int) -> Tensor:
        """[token, d_model] what one expert makes of its neurons [token, neuron], before it is weighted."""
        weight, bias = self.W_out, self.bias("b_out")
        assert weight is not None
        made = post @ weight[expert] if bias is None else post @ weight[expert] + bias[expert]
        return self.module.post_expert_norm(made) if getattr(self.module, "has_post_expert_norm", False) else made


@dataclass(frozen=True)
class Mixture:
    """How the experts of a layer are called.

    Attributes:
        stacked: all on all tokens, which come weighted; else on tokens with the experts chosen for each, and weights.
        n_experts: how many have weights.
        n_choices: among how many a router chooses; some let it choose none, or the token itself.
        top_k: how many it chooses for a token.
        n_neurons: of an expert; 0 where their weights have no known form.
    """

    stacked: bool
    n_experts: int
    n_choices: int
    top_k: int
    n_neurons: int


def mixture_of(model: nn.Module, config: Any, mlp: str, router: str | None, path: str) -> Mixture | str:
    """How the experts at a path are called, or why that is not known."""
    module = model.get_submodule(path)
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return "its experts are modules in a list, each called on the tokens that it got, whose places are not passed"
    around = [model.get_submodule(at) for at in (router, path, mlp) if at]
    taken = [
        p
        for p in list(signature(type(module).forward).parameters.values())[1:]
        if p.kind == Parameter.POSITIONAL_OR_KEYWORD
    ]
    top_k = next((n for of in (*around, config) if (n := _whole(of, _CHOICES))), 0)
    experts = Experts(module)
    if len(taken) not in (1, 3) or not top_k or not experts.n_experts:
        return f"its experts are called in no known form: ({', '.join(p.name for p in taken)})"
    choices = max(experts.n_experts, *(_whole(of, (name,)) for of in around for name in _COUNTS))
    weight = experts.W_out if experts.known else None
    return Mixture(len(taken) == 1, experts.n_experts, choices, top_k, 0 if weight is None else int(weight.shape[1]))


def _whole(of: object, names: Iterable[str]) -> int:
    """The first of some attributes that is a whole number, or 0."""
    found = (getattr(of, name, 0) for name in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n), 0)
