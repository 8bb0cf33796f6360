"""Inside a mixture: the weights of its experts, what each slot writes, and the neurons of each expert.

All of it is read from what the experts are called with. What they make of it is computed once more, slot by slot or
expert by expert, only where it is asked for; the output is changed, by the difference, only where it is edited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from microtome.anatomy import Experts, HookPoint
from microtome.run.hook._tensors import made_of

Visit = Callable[[Tensor], Tensor | None]
Shape = Callable[[], tuple[int, int]]


class Called:
    """A call of experts on tokens, with the experts `chosen` [token, slot] for each, and their `weights`."""

    def __init__(self, experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.experts = experts
        self.args = list(signature(type(experts).forward).bind(experts, *args, **kwargs).args[1:])
        self.at = 2 if self.args[1].is_floating_point() else 1
        self.tokens = self.args[0].reshape(-1, self.args[0].shape[-1])
        self.chosen: Tensor = self.args[self.at]
        self.weights: Tensor = self.args[3 - self.at]

    def given(self, chosen: Tensor, weights: Tensor) -> tuple[Any, ...]:
        """The arguments, with other experts and weights."""
        return (self.args[0], chosen, weights) if self.at == 1 else (self.args[0], weights, chosen)

    def slots(self, output: Tensor) -> Tensor:
        """[token, slot, d_model] what each slot adds, by the experts' own forward."""
        each = (self.given(self.chosen[:, [i]], self.weights[:, [i]]) for i in range(self.chosen.shape[1]))
        return torch.stack([self.experts.forward(*args).reshape(self.tokens.shape) for args in each], dim=1)

    def reads(self, expert: int, at: Tensor) -> Tensor:
        """[token, d_model] what an expert reads of some tokens."""
        return self.tokens[at]

    def used(self, n_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of every expert that is used: which, the tokens that it sees, and in which slot."""
        for expert in self.chosen.unique().cpu().numpy().tolist():
            if 0 <= expert < n_experts:  # what lies beyond computes nothing
                at, slot = torch.where(self.chosen == expert)
                yield expert, at, slot

    def put(self, output: Tensor, change: Tensor) -> Tensor:
        """The output with what each slot adds changed by `change` [token, slot, d_model]."""
        return output + change.sum(1).reshape(output.shape)


class Stacked(Called):
    """A call of all experts on all tokens, times their weights; one without weight reads nothing, and adds nothing."""

    def __init__(self, experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any], top_k: int) -> None:
        hidden = (*args, *kwargs.values())[0]
        self.each = hidden.reshape(Experts(experts).n_experts, -1, hidden.shape[-1])
        size = self.each.detach().norm(dim=-1).T
        self.chosen = size.topk(max(top_k, int((size > 0).sum(-1).max())), dim=-1).indices
        self.weights = (size.gather(1, self.chosen) > 0).to(hidden.dtype)  # what they write is not weighted again
        self.index = self.chosen.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])

    def slots(self, output: Tensor) -> Tensor:
        """[token, slot, d_model] what each slot adds."""
        return output.reshape(self.each.shape).transpose(0, 1).gather(1, self.index)

    def reads(self, expert: int, at: Tensor) -> Tensor:
        """[token, d_model] what an expert reads of some tokens."""
        return self.each[expert, at]

    def put(self, output: Tensor, change: Tensor) -> Tensor:
        """The output with what each slot adds changed by `change` [token, slot, d_model]."""
        each = torch.zeros_like(self.each).transpose(0, 1).scatter(1, self.index, change.to(output.dtype))
        return output + each.transpose(0, 1).reshape(output.shape)


def _called(experts: Any, point: HookPoint, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Called:
    top_k = dict(point.sizes).get("stacked")
    return Called(experts, args, kwargs) if top_k is None else Stacked(experts, args, kwargs, top_k)


def _remembering(output: Tensor, before: Tensor, **parts: Tensor) -> Tensor:
    """An output that remembers what it was made of, as the one before did: who looks next sees that changed."""
    for part in ("slots", "post"):
        setattr(output, part, parts.get(part, getattr(before, part, None)))
    return output


def router(point: HookPoint, experts: Any, visit: Visit, shape: Shape) -> Any:
    """Show the weight of every expert, and replace what the experts are called with."""
    n_choices = dict(point.sizes)["expert"]

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = Called(experts, args, kwargs)
        chosen, weights = call.chosen, call.weights
        dense = weights.new_zeros(weights.shape[0], n_choices).scatter_add(-1, chosen, weights)
        new = visit(dense.unflatten(0, shape()))
        if new is None:
            return None
        new = new.flatten(0, 1)
        times = torch.zeros_like(new.detach()).scatter_add(-1, chosen, torch.ones_like(weights))
        if bool((new.detach()[times == 0] != 0).any() or (times > 1).any()):
            # Experts are used that the router did not choose, or chose twice: each token gets all that have a weight.
            most = int((new.detach() != 0).sum(-1).max())
            chosen = new.detach().abs().topk(max(most, chosen.shape[-1]), dim=-1).indices
        return call.given(chosen, new.gather(-1, chosen)), {}

    return before


def slots(point: HookPoint, experts: Any, visit: Visit, shape: Shape) -> Any:
    """Show what every slot adds, and change the output by how much that is changed."""

    def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        call = _called(experts, point, args, kwargs)
        own = made_of(output, "slots", lambda: call.slots(output))
        seen = own.unflatten(0, shape())
        new = visit(seen * point.scale if point.scale != 1.0 else seen)
        if new is None:
            return None
        new = new.flatten(0, 1) / point.scale
        return _remembering(call.put(output, new - own), output, slots=new)

    return after


def neurons(point: HookPoint, experts: Any, visit: Visit, shape: Shape) -> Any:
    """Show the neurons of every expert, 0 where it was not used, and change the output by what they would write."""
    sizes, of = dict(point.sizes), Experts(experts)

    def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        call = _called(experts, point, args, kwargs)

        def compute() -> Tensor:
            dense = output.new_zeros(call.chosen.shape[0], sizes["expert"], sizes["neuron"])
            for expert, at, _ in call.used(of.n_experts):
                made = of.neurons(call.reads(expert, at), expert)
                dense = dense.index_put((at, torch.full_like(at, expert)), made)
            return dense

        own = made_of(output, "post", compute)
        new = visit(own.unflatten(0, shape()))
        if new is None:
            return None
        new, before = new.flatten(0, 1), made_of(output, "slots", lambda: call.slots(output))
        change = torch.zeros_like(before)
        for expert, at, slot in call.used(of.n_experts):
            wrote, writes = (of.writes(x[at, expert], expert) for x in (own, new))
            change = change.index_put((at, slot), (writes - wrote) * call.weights[at, slot].unsqueeze(-1).to(before))
        return _remembering(call.put(output, change), output, slots=before + change, post=new)

    return after
