"""New patterns of heads: what they give to named spans in another task, or all to one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.errors import ArgumentError, PromptError, error
from microtome.explain import Pairs, pairs_given
from microtome.model import Model


def require_position(pairs: Pairs, query: int, what: str) -> None:
    """Refuse a position that not all prompts have.

    Raises:
        ArgumentError: one has not.
    """
    shortest = min(pairs.lengths)
    if not -shortest <= query < shortest:
        raise error(ArgumentError, f"query is no position of {what}", got=query,
                    allowed=f"{-shortest} to {shortest - 1}", do="name a token")  # fmt: skip


def require_seen(
    model: Model, spans: Sequence[tuple[int, int]], lengths: Sequence[int], query: int, what: str = ""
) -> None:
    """Refuse spans behind the query, where heads cannot look.

    Raises:
        PromptError: one is.
    """
    for i, ((_, end), length) in enumerate(zip(spans, lengths, strict=True)):
        at = range(length)[query]
        if model.anatomy.causal and end > at + 1:
            raise error(PromptError, f"pair {i}{what}: heads cannot look ahead", got=f"a span up to token {end - 1}",
                        allowed=f"up to {at}", do="name earlier tokens")  # fmt: skip


def masses_of(
    model: Model, pairs: Pairs, like: Any, named: list[tuple[int, int]], query: int
) -> dict[tuple[int, int], dict[str, float]]:
    """What each head gives to each span that both tasks name, in the other task.

    Raises:
        PromptError: they name none in common, or one lies behind the query.
        ArgumentError: the other task has no such position.
    """
    others = pairs_given(model, like)
    require_position(others, query, "every prompt of the other task")
    shared = [name for name in pairs.spans if name in others.spans]
    if not shared:
        raise error(PromptError, "the two tasks name no span in common", got=f"{list(pairs.spans)} and "
                    f"{list(others.spans)}", do="give keys= instead")  # fmt: skip
    for name in shared:
        require_seen(model, pairs.spans[name], pairs.lengths, query, f', span "{name}"')
        require_seen(model, others.spans[name], others.lengths, query, f' of the other task, span "{name}"')
    found = {head: dict.fromkeys(shared, 0.0) for head in named}
    with torch.no_grad():
        for n, pair in enumerate(others.tokens):
            run = model.run(pair[:1], capture=[f"{i}.attn.pattern" for i in {i for i, _ in named}], logits=False)
            for (i, h), own in found.items():
                row = run[f"{i}.attn.pattern"][0, h, query].double()
                for name in shared:
                    first, end = others.spans[name][n]
                    own[name] += float(row[first:end].sum()) / len(others)
    return found


def rows_of(
    model: Model, one: Pairs, named: list[tuple[int, int]], query: int, target: tuple[int, int] | None,
    masses: Mapping[tuple[int, int], Mapping[str, float]],
) -> list[Float[Tensor, " k_pos"]]:  # fmt: skip
    """The new pattern of each head, in order."""
    length = one.tokens[0].shape[1]
    if target is not None:
        row = torch.zeros(length, dtype=torch.float64)
        row[target[0] : target[1]] = 1.0 / (target[1] - target[0])
        return [row] * len(named)
    run = model.run(one.tokens[0][:1], capture=[f"{i}.attn.pattern" for i in {i for i, _ in named}], logits=False)
    found: list[Tensor] = []
    for i, h in named:
        own = run[f"{i}.attn.pattern"][0, h, query].double().cpu()
        row, free = torch.zeros_like(own), torch.ones(length, dtype=torch.bool)
        for name, mass in masses[i, h].items():
            first, end = one.spans[name][0]
            inside = torch.zeros_like(free)
            inside[first:end] = True
            inside &= free
            free &= ~inside
            row += mass * spread(own, inside)
        rest = max(0.0, 1.0 - float(row.sum()))
        found.append(row + rest * spread(own, free))
    return found


def spread(own: Float[Tensor, " k_pos"], where: Tensor) -> Float[Tensor, " k_pos"]:
    """A pattern inside some keys alone, summing to 1; even where it gives them nothing, zero without keys."""
    inside = own * where
    inside = inside if float(inside.sum()) > 0 else where.to(own)
    return inside / inside.sum().clamp(min=1e-300)
