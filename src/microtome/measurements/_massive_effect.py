"""What the largest activations of the stream are for: the loss without them, and with their mean in their place.

Formula:  M_l = the n entries (token, dimension) of each row of resid_post of layer l that are largest in size;
          loss_massive_zero = loss with those set to 0, minus the loss of the whole model;
          loss_massive_mean = the same with each set to the mean, over the rows of a batch, of the entries of M_l in its
          dimension;
          loss_massive_control = the same with n other entries of each row set to 0: each in the token of one of M_l, in
          a dimension drawn at random that is not of M_l.
          An activation that is one number whatever the text is a bias: its mean does what it does, and 0 does not.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.context import current
from microtome.edit import Apply
from microtome.method import Argument, Column, Seen, Source, Text, measure
from microtome.metric import token_loss

CHART = "Loss without the largest activations"
ENTRIES = 3


@measure(
    "massive_effect",
    of="layer",
    on=Text(sequences=8, width=128, rows=8),
    atlas="full",
    title="loss without the largest activations",
    question="Does the model need its largest activations, or only their mean?",
    columns=(
        Column(
            "loss_massive_zero", "nats", "increase in loss when the largest entries of each row of the stream after "
            "the layer are set to 0", "loss_massive_control", title="zero", chart=CHART,
        ),
        Column(
            "loss_massive_mean", "nats", "the same when each is set to its mean over rows", "loss_massive_control",
            title="mean", chart=CHART,
        ),
        Column(
            "loss_massive_control", "nats", "the same when as many other entries of the same tokens are set to 0",
            title="others to 0", chart=CHART,
        ),
    ),
    source=Source(
        "Sun et al.", "Massive Activations in Large Language Models", 2024, "2402.17762", "section 3, interventions",
        departs="the three largest entries of each row in place of thresholds, so that every layer has a value; means "
        "are over the rows of a batch; a control by other entries",
    ),
    cost="3 L forwards over the first sequences of the text, each from its own layer on: about 1.5 L full ones",
    check="tests/laws/test_sinks.py",
)  # fmt: skip
def massive_effect(
    seen: Seen,
    entries: Annotated[int, Argument("how many of the largest activations of a row to change", "entries", 1)] = ENTRIES,
) -> dict[str, Float[Tensor, "example layer"]]:
    """Increase in loss when the largest activations of a layer's output are set to zero, or to their mean over rows.

    Raises:
        ModelUnsupported: the model is not causal.
    """
    seen.model.require_next_token()
    model, tokens, layers = seen.model, seen.tokens, seen.model.anatomy.n_layers
    base = model.run(tokens, capture=["*.resid_pre", "*.resid_post"])
    whole = token_loss(base.logits, tokens).double().mean(1)
    found = {f"loss_massive_{name}": whole.new_zeros(len(whole), layers) for name in ("zero", "mean", "control")}
    generator = torch.Generator().manual_seed(current().seed)
    for i in range(layers):
        before, after = base[f"{i}.resid_pre"], base[f"{i}.resid_post"]
        largest = largest_entries(after, entries)
        others = other_entries(largest, generator)
        changed = {
            "zero": after.masked_fill(largest, 0), "mean": torch.where(largest, entry_means(after, largest), after),
            "control": after.masked_fill(others, 0),
        }  # fmt: skip
        for name, new in changed.items():
            run = model.run(tokens, edits=_to(f"{i}.resid_post", new), start_at=i, given=before)
            found[f"loss_massive_{name}"][:, i] = token_loss(run.logits, tokens).double().mean(1) - whole
        current().report("changing the largest activations", i + 1, layers)
    return found


def _to(site: str, value: Tensor) -> Apply:
    return Apply(site, function=lambda x: value.to(x).reshape(x.shape))


def largest_entries(x: Float[Tensor, "row pos d"], n: int) -> Bool[Tensor, "row pos d"]:
    """[row, pos, d] The n entries of each row that are largest in size."""
    flat = x.abs().flatten(1)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    return mask.scatter_(1, flat.topk(min(n, flat.shape[1]), dim=1).indices, True).reshape(x.shape)


def entry_means(x: Float[Tensor, "row pos d"], chosen: Bool[Tensor, "row pos d"]) -> Float[Tensor, " d"]:
    """[d] The mean of the chosen entries of each dimension, over all rows; NaN in a dimension without any."""
    return (x.double().where(chosen, 0.0).sum((0, 1)) / chosen.sum((0, 1))).to(x.dtype)


def other_entries(chosen: Bool[Tensor, "row pos d"], generator: torch.Generator) -> Bool[Tensor, "row pos d"]:
    """[row, pos, d] As many entries of each token as were chosen of it, in dimensions that were chosen nowhere."""
    score = torch.rand(chosen.shape, generator=generator).to(chosen.device)
    score = score.masked_fill(chosen.any((0, 1)), -1.0)
    rank = score.argsort(-1, descending=True).argsort(-1)
    return rank < chosen.sum(-1, keepdim=True)
