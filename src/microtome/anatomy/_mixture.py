"""Mixtures of experts: in which of two ways their experts are called, how many there are, and the weights of each.

    slots      experts(hidden [token, d_model], chosen [token, slot], weights [token, slot]) -> [token, d_model]
    stacked    experts(hidden times weight [expert * token, d_model]) -> the same shape, summed over experts outside

Whatever a router returns, what its experts are called with says which were used and with which weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from inspect import signature
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from microtome.anatomy._stored import present
from microtome.shown import brief, shown

NAMES = {"gate": ("gate_proj", "mlp.w1", "w1"), "in": ("up_proj", "mlp.v1", "w3"), "out": ("down_proj", "mlp.w2", "w2")}
"""What families call the projections of all experts; `gate_up_proj` is the first two as one."""
_ACTIVATION = ("act_fn", "activation_fn", "mlp.activation_fn", "mlp.act_fn")
_COUNTS = ("num_experts", "total_experts", "num_local_experts", "n_routed_experts", "num_router_classes")
_CHOICES = ("top_k", "num_experts_per_tok", "moe_top_k", "num_experts_per_token", "top_k_experts")


def _found(of: object, names: Iterable[str], kind: type) -> Any:
    """The first attribute (dotted) of a kind that there is, and is not nothing; or None."""
    for name in names:
        try:
            value = attrgetter(name)(of)
        except AttributeError:
            continue
        if isinstance(value, kind) and not isinstance(value, bool) and (isinstance(value, Tensor) or value):
            return value
    return None


@shown
class Experts:
    """The weights of all experts of a mixture, as views, and what an expert makes of a token."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.interleaved = getattr(module, "is_concatenated", True) is False  # gate and up of each neuron in turn
        down, both = self._tensor(*NAMES["out"]), self._tensor("gate_up_proj")
        counted = None if down is None or down.dim() != 3 else int(down.shape[0])
        self.n_experts: int = counted or _found(module, _COUNTS, int) or 0
        turned = getattr(module, "is_transposed", None)  # stored as [expert, in, out]
        if turned is None and down is not None and both is not None:
            turned = both.shape[1] != 2 * down.shape[2]
        self._turned = bool(turned)
        own = getattr(module, "_apply_gate", None)
        self._gates: Any = None if self.W_gate is None else own
        self._act: Any = next((f for f in (_found(module, (name,), object) for name in _ACTIVATION) if f), None)

    def _facts(self) -> dict[str, str]:
        weights = {name: getattr(self, name) for name in ("W_gate", "W_in", "W_out")}
        return {"n_experts": str(self.n_experts)} | {name: brief(w) for name, w in weights.items() if w is not None}

    @property
    def known(self) -> bool:
        """Whether the weights have a known form."""
        return self.W_in is not None and self.W_out is not None and (self._act or self._gates) is not None

    def _tensor(self, *names: str) -> Tensor | None:
        found = present(self.module, _found(self.module, names, Tensor))
        return found if found is None or found.is_floating_point() else None

    def _half(self, both: Tensor, name: str) -> Tensor:
        k = 0 if name == "gate" else 1
        return both[..., k::2] if self.interleaved else both.chunk(2, dim=-1)[k]

    def _weight(self, name: str) -> Tensor | None:
        """[expert, in, out]; where all experts share one matrix, it is [expert * neuron, d_model]."""
        both = None if name == "out" else self._tensor("gate_up_proj")
        weight = self._tensor(*NAMES[name]) if both is None else both
        if weight is None or not self.n_experts:
            return None
        if weight.dim() == 2:
            weight = weight.unflatten(0, (self.n_experts, -1))
            return weight if name == "out" else weight.transpose(1, 2)
        weight = weight if self._turned else weight.transpose(1, 2)
        return weight if both is None else self._half(weight, name)

    @property
    def W_gate(self) -> Tensor | None:
        """[expert, d_model, neuron], or None without gates."""
        return self._weight("gate")

    @property
    def W_in(self) -> Tensor | None:
        """[expert, d_model, neuron]"""
        return self._weight("in")

    @property
    def W_out(self) -> Tensor | None:
        """[expert, neuron, d_model]"""
        return self._weight("out")

    def bias(self, name: str) -> Tensor | None:
        """`b_gate` or `b_in` [expert, neuron], or `b_out` [expert, d_model]; None where there is none."""
        name = name.removeprefix("b_")
        both = None if name == "out" else self._tensor("gate_up_proj_bias")
        return self._tensor(*(f"{each}_bias" for each in NAMES[name])) if both is None else self._half(both, name)

    def neurons(self, x: Tensor, expert: int) -> Tensor:
        """[token, neuron] what enters W_out of one expert that reads x [token, d_model]."""
        parts: list[Tensor] = []
        for weight, bias in ((self.W_gate, self.bias("b_gate")), (self.W_in, self.bias("b_in"))):
            if weight is not None:
                parts.append(x @ weight[expert] if bias is None else x @ weight[expert] + bias[expert])
        if len(parts) == 1 or self._gates is None:
            return self._act(parts[0]) if len(parts) == 1 else self._act(parts[0]) * parts[1]
        # Some gate in a way of their own, for which they take both as their projection gives them.
        return self._gates(torch.stack(parts, dim=-1).flatten(-2) if self.interleaved else torch.cat(parts, dim=-1))

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
        p for p in list(signature(type(module).forward).parameters.values())[1:] if p.kind == p.POSITIONAL_OR_KEYWORD
    ]
    top_k = next((n for of in (*around, config) if (n := _found(of, _CHOICES, int))), 0)
    experts = Experts(module)
    if len(taken) not in (1, 3) or not top_k or not experts.n_experts:
        return f"its experts are called in no known form: ({', '.join(p.name for p in taken)})"
    choices = max(experts.n_experts, *(_found(of, (name,), int) or 0 for of in around for name in _COUNTS))
    weight = experts.W_out if experts.known else None
    return Mixture(len(taken) == 1, experts.n_experts, choices, top_k, 0 if weight is None else int(weight.shape[1]))
