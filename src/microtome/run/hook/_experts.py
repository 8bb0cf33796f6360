"""Inside a mixture: the weights of its experts, what each slot writes, and the neurons of each expert.

All of it is read from what the experts are called with. What they make of it is computed once more, slot by slot or
expert by expert, only where it is asked for; the output is changed, by the difference, only where it is edited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from microtome.anatomy import Experts, HookPoint
from microtome.run.hook._tensors import made_of

Visit = Callable[[Tensor], Tensor | None]
Shape = Callable[[], tuple[int, int]]


@dataclass
class Called:
    """A call of experts on tokens, with the experts that were chosen for each."""

    experts: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @cached_property
    def _places(self) -> list[int | str]:
        """Where the hidden states are, the chosen experts, and their weights."""
        given: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        tensors = [(place, x) for place, x in given if isinstance(x, Tensor)]
        whole = next(place for place, x in tensors if not x.is_floating_point())
        hidden, weights = (place for place, x in tensors if x.is_floating_point())
        return [hidden, whole, weights]

    def _argument(self, n: int) -> Tensor:
        place = self._places[n]
        return self.args[place] if isinstance(place, int) else self.kwargs[place]

    @property
    def tokens(self) -> Tensor:
        """[token, d_model]"""
        hidden = self._argument(0)
        return hidden.reshape(-1, hidden.shape[-1])

    @cached_property
    def chosen(self) -> Tensor:
        """[token, slot] numbers of experts."""
        return self._argument(1)

    @property
    def weights(self) -> Tensor:
        """[token, slot]"""
        return self._argument(2)

    def given(self, chosen: Tensor, weights: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with other experts and weights."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for place, new in zip(self._places[1:], (chosen, weights), strict=True):
            if isinstance(place, int):
                args[place] = new
            else:
                kwargs[place] = new
        return tuple(args), kwargs

    def slots(self, output: Tensor) -> Tensor:
        """[token, slot, d_model] what each slot adds, by the experts' own forward."""
        made: list[Tensor] = []
        for i in range(self.chosen.shape[1]):
            args, kwargs = self.given(self.chosen[:, [i]], self.weights[:, [i]])
            made.append(self.experts.forward(*args, **kwargs).reshape(self.tokens.shape))
        return torch.stack(made, dim=1)

    def used(self, n_experts: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Of every expert that is used: which, the tokens that it sees, in which slot, and what it reads of them."""
        for expert in self.chosen.unique().cpu().numpy().tolist():
            if 0 <= expert < n_experts:  # what lies beyond computes nothing
                at, slot = torch.where(self.chosen == expert)
                yield expert, at, slot, self.tokens[at]

    def put(self, output: Tensor, change: Tensor) -> Tensor:
        """The output with what each slot adds changed by `change` [token, slot, d_model]."""
        return output + change.sum(1).reshape(output.shape)


class Stacked(Called):
    """A call of all experts on all tokens, times their weights: one without weight reads and adds nothing."""

    top_k = 1

    @property
    def _each(self) -> Tensor:
        hidden = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return hidden.reshape(Experts(self.experts).n_experts, -1, hidden.shape[-1])

    @cached_property
    def chosen(self) -> Tensor:
        """[token, slot] numbers of experts, the one with most weight first."""
        size = self._each.detach().norm(dim=-1).T
        return size.topk(max(self.top_k, int((size > 0).sum(-1).max())), dim=-1).indices

    @property
    def weights(self) -> Tensor:
        """[token, slot] one: what an expert writes is not weighted again."""
        return torch.ones_like(self.chosen, dtype=self._each.dtype)

    def _index(self) -> Tensor:
        return self.chosen.unsqueeze(-1).expand(-1, -1, self._each.shape[-1])

    def slots(self, output: Tensor) -> Tensor:
        """[token, slot, d_model] what each slot adds."""
        return output.reshape(self._each.shape).transpose(0, 1).gather(1, self._index())

    def used(self, n_experts: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Of every expert that is used: which, the tokens that it sees, in which slot, and what it reads of them."""
        for expert in range(n_experts):
            at, slot = torch.where(self.chosen == expert)
            live = (self._each[expert, at] != 0).any(-1)
            if bool(live.any()):
                yield expert, at[live], slot[live], self._each[expert, at[live]]

    def put(self, output: Tensor, change: Tensor) -> Tensor:
        """The output with what each slot adds changed by `change` [token, slot, d_model]."""
        each = torch.zeros_like(self._each).transpose(0, 1).scatter(1, self._index(), change.to(output.dtype))
        return output + each.transpose(0, 1).reshape(output.shape)


def called(experts: Any, point: HookPoint, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Called:
    """A call of experts in the way in which this mixture calls them."""
    if "stacked" not in dict(point.sizes):
        return Called(experts, args, kwargs)
    found = Stacked(experts, args, kwargs)
    found.top_k = dict(point.sizes)["stacked"]
    return found


def _remembering(output: Tensor, before: Tensor, **parts: Tensor) -> Tensor:
    """An output that remembers what it was made of, as the one before did: who looks next sees that changed."""
    for part in ("slots", "post"):
        known = parts.get(part, getattr(before, part, None))
        if known is not None:
            setattr(output, part, known)
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
        return call.given(chosen, new.gather(-1, chosen))

    return before


def slots(point: HookPoint, experts: Any, visit: Visit, shape: Shape) -> Any:
    """Show what every slot adds, and change the output by how much that is changed."""

    def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        call = called(experts, point, args, kwargs)
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
        call = called(experts, point, args, kwargs)

        def compute() -> Tensor:
            rows = call.chosen.shape[0]
            dense = output.new_zeros(rows, sizes["expert"], sizes["neuron"])
            for expert, at, _, read in call.used(of.n_experts):
                made = of.neurons(read, expert)
                dense = dense.index_put((at, torch.full_like(at, expert)), made)
            return dense

        own = made_of(output, "post", compute)
        new = visit(own.unflatten(0, shape()))
        if new is None:
            return None
        new, before = new.flatten(0, 1), made_of(output, "slots", lambda: call.slots(output))
        change = torch.zeros_like(before)
        for expert, at, slot, _ in call.used(of.n_experts):
            wrote, writes = (of.writes(x[at, expert], expert) for x in (own, new))
            change = change.index_put((at, slot), (writes - wrote) * call.weights[at, slot].unsqueeze(-1).to(before))
        return _remembering(call.put(output, change), output, slots=before + change, post=new)

    return after
