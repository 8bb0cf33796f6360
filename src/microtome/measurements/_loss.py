"""The next-token loss, and how much each layer and branch contributes to it.

Formula:  loss = mean over tokens of -log p(next), in nats;
          loss_skip = mean over tokens of -log p_without(next) + log p(next), a branch set to zero or a block skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.edit import Edit, Skip, Zero
from microtome.method import Column, Seen, Source, Text, measure
from microtome.metric import token_loss

WHOLE = "none: already relative to the loss of the whole model"
CHART = "Loss when a part is skipped"
CHECK = "tests/laws/test_measures.py"


@measure(
    "loss",
    of="model",
    sites="logits",
    title="next-token loss",
    question="How well does the model predict the text?",
    columns=(
        Column("loss", "nats", "mean next-token loss", "loss_uniform", (0, None)),
        Column(
            "loss_uniform", "nats", "the same for a uniform guess over the vocabulary", range=(0, None), interval=False
        ),
    ),
    source=Source("Shannon", "A Mathematical Theory of Communication", 1948, where="section 6, entropy"),
    cost="one forward with logits, and one logsumexp over them",
    check=CHECK,
)
def loss(seen: Seen) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean next-token loss in nats, with its interval over rows.

    Raises:
        ModelUnsupported: the model is not causal.
    """
    seen.model.require_next_token()
    tokens = seen.tokens
    found = torch.nn.functional.pad(token_loss(seen["logits"], tokens), (1, 0))
    predicted = torch.ones(tokens.shape, dtype=torch.bool)
    predicted[:, 0] = False  # nothing comes before the first token to predict it from
    even = torch.full_like(found, math.log(seen["logits"].shape[-1]))
    return {"loss": (found, predicted), "loss_uniform": (even, predicted)}


def _skipped(name: str, part: str, title: str) -> Column:
    meaning = f"increase in loss when {part} adds nothing: loss without it minus loss of the whole model"
    return Column(name, "nats", meaning, WHOLE, title=title, chart=CHART)


@measure(
    "ablation_loss",
    of="layer",
    on=Text(sequences=8, width=128),
    atlas="default",
    title="loss without a part",
    question="How much does the loss rise without each layer, or without each of its branches?",
    columns=(
        _skipped("loss_skip_attn", "attention", "attention"),
        _skipped("loss_skip_mixer", "the mixer that is no attention", "mixer"),
        _skipped("loss_skip_mlp", "the MLP", "MLP"),
        _skipped("loss_skip_block", "the whole block", "block"),
    ),
    source=Source(
        "Men et al.", "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024,
        "2403.03853", departs="measured, not predicted",
    ),
    cost="3 L forwards over the first sequences of the text, each from its own layer on: about 1.5 L full ones",
    check=CHECK,
)  # fmt: skip
def ablation_loss(seen: Seen) -> dict[str, tuple[Tensor, Tensor]]:
    """Increase in loss when a layer's attention, its MLP, or the whole block adds nothing; by row [example, layer].

    Mixers that are no attention are branches too; of a branch that a layer has not, there is NaN.

    Raises:
        ModelUnsupported: the model is not causal.
    """
    seen.model.require_next_token()
    model, tokens = seen.model, seen.tokens
    branches: dict[str, Callable[[int], Edit]] = {
        "attn": lambda i: Zero(f"{i}.attn_out"), "mixer": lambda i: Zero(f"{i}.mixer_out"),
        "mlp": lambda i: Zero(f"{i}.mlp_out"), "block": Skip,
    }  # fmt: skip
    points, layers = model.anatomy.hook_points, range(model.anatomy.n_layers)
    there = {name: [name == "block" or Site(f"{name}_out", i) in points for i in layers] for name in branches}
    base = model.run(tokens, capture="*.resid_pre")
    whole = token_loss(base.logits, tokens).double().mean(1)
    rows = {name: torch.zeros(len(whole), len(layers), dtype=torch.float64) for name in branches if any(there[name])}
    for i in layers:
        for name in (name for name in rows if there[name][i]):
            # What comes before layer i is the same with and without it: start from what it read.
            run = model.run(tokens, edits=branches[name](i), start_at=i, given=base[f"{i}.resid_pre"])
            rows[name][:, i] = token_loss(run.logits, tokens).double().mean(1) - whole
        current().report("leaving layers out", i + 1, len(layers))
    return {f"loss_skip_{name}": (x, torch.tensor(there[name])) for name, x in rows.items()}
