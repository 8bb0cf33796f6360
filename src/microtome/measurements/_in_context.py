"""How much a model learns from the context of a row: its loss late in the row beside its loss early in it.

Formula:  windows of L / 16 tokens of rows of L tokens: early around L / 10, late at the end (of 512 tokens: around the
          50th, and the last 32);
          loss_early, loss_late   mean next-token loss in either;   in_context_score = loss_late - loss_early;
          in_context_shuffled     the same score where all tokens of the row before each window are in another order.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.context import current
from microtome.method import Column, Seen, Source, Text, measure
from microtome.metric import token_loss

WIDTH, EARLY = 16, 10
"""L over the width of a window, and over the place of the early one."""


@measure(
    "in_context",
    of="model",
    on=Text(tokens=4_096, length=512),
    title="learning in context",
    question="How much better does the model predict late in a row of text than early in it?",
    columns=(
        Column("loss_late", "nats", "mean next-token loss at the end of a row of text", "loss_early", (0, None)),
        Column("loss_early", "nats", "the same around its first tenth", range=(0, None)),
        Column("in_context_score", "nats", "loss_late - loss_early", "in_context_shuffled"),
        Column("in_context_shuffled", "nats", "the same score where what comes before either window is shuffled"),
    ),
    source=Source(
        "Olsson et al.", "In-context Learning and Induction Heads", 2022, "2209.11895", "in-context learning score",
        departs="means over windows, not the 500th and the 50th token alone; shuffled contexts are the control",
    ),
    cost="three forwards over the text",
    check="tests/laws/test_head_map.py",
    atlas="full",
)  # fmt: skip
def in_context(seen: Seen) -> dict[str, Float[Tensor, " example"]]:
    """The loss early and late in each row, their difference, and the same with shuffled contexts.

    Raises:
        ModelUnsupported: the model is not causal.
    """
    seen.model.require_next_token()
    tokens = seen.tokens
    early, late = windows(tokens.shape[1])
    loss = token_loss(seen.model.run(tokens).logits, tokens).double()
    found = {"loss_early": loss[:, early].mean(1), "loss_late": loss[:, late].mean(1)}
    mixed = {name: _shuffled_loss(seen, window) for name, window in (("early", early), ("late", late))}
    return found | {
        "in_context_score": found["loss_late"] - found["loss_early"],
        "in_context_shuffled": mixed["late"] - mixed["early"],
    }


def windows(length: int) -> tuple[slice, slice]:
    """The early and the late window of rows of a length, as places of predictions (the first is of token 1)."""
    width = max(1, length // WIDTH)
    first = max(0, length // EARLY - 1 - width // 2)
    return slice(first, first + width), slice(length - 1 - width, length - 1)


def _shuffled_loss(seen: Seen, window: slice) -> Float[Tensor, " example"]:
    """The loss of a window where the text before its first target is in another order, by the seed and the row."""
    tokens, border = seen.tokens.clone(), window.start + 1
    for row, start in enumerate(seen.examples.tolist()):
        generator = torch.Generator().manual_seed(current().seed + int(start))
        order = torch.randperm(border - seen.lead, generator=generator) if border > seen.lead else torch.arange(0)
        part = tokens[row, seen.lead : border].clone()
        tokens[row, seen.lead : border] = part[order.to(part.device)]
    return token_loss(seen.model.run(tokens).logits, tokens).double()[:, window].mean(1)
