"""What a layer, or one of its branches, is worth: the loss without it.

Formula:  delta = mean over tokens of -log p_without(next) + log p(next), in nats, a mean over sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from microtome.edit import Edit, Skip, Zero
from microtome.model import Model
from microtome.stream import mean_interval

if TYPE_CHECKING:
    import xarray as xr


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Loss of each next token in nats [batch, pos - 1], from logits [batch, pos, vocab]; one row at a time."""
    rows = [
        torch.logsumexp(row[:-1].float(), -1) - row[:-1].gather(-1, target[1:, None]).squeeze(-1).float()
        for row, target in zip(logits, tokens, strict=True)
    ]
    return torch.stack(rows)


def ablation_loss(
    model: Model, tokens: Tensor, *, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> xr.Dataset:
    """Rise of the loss when a layer's attention, its MLP, or the whole block adds nothing.

    Formula:  see the head of this file; a branch adds zero, a block is skipped.
    Source:   layer removal as in Men et al., "ShortGPT", 2024 (arXiv 2403.03853); here measured, not predicted.
    Cost:     3 L forwards, each from its own layer on: about 1.5 L whole ones.
    Check:    equals a forward with the branch zeroed and nothing shared; tests/laws/test_measure.py.

    Args:
        model: an open causal model.
        tokens: [batch, pos], rows of one length.
        seed: of the bootstrap.
        progress: called with (done, all) forwards.

    Returns:
        Dataset over (layer): `loss_skip_attn`, `loss_skip_mlp`, `loss_skip_block` in nats per token, each with `_lo`
        and `_hi`, the 95 % bootstrap interval over sequences; `loss` (a scalar) of the whole model.
    """
    import xarray as xr

    n = model.anatomy.n_layers
    branches: dict[str, Callable[[int], Edit]] = {
        "attn": lambda i: Zero(f"{i}.attn_out"),
        "mlp": lambda i: Zero(f"{i}.mlp_out"),
        "block": lambda i: Skip(i),
    }
    base = model.run(tokens, capture="*.resid_pre")
    whole = token_loss(base.logits, tokens).double().mean(1)
    found: dict[str, list[Tensor]] = {name: [] for name in branches}
    done = 0
    for i in range(n):
        for name, edit in branches.items():
            run = model.run(tokens, edits=edit(i), start_at=i, given=base[f"{i}.resid_pre"])
            found[name].append(token_loss(run.logits, tokens).double().mean(1) - whole)
            done += 1
            if progress is not None:
                progress(done, len(branches) * n)
    variables: dict[str, tuple[str, object, dict[str, str]]] = {}
    for name, values in found.items():
        for suffix, x in zip(("", "_lo", "_hi"), mean_interval(torch.stack(values, 1).cpu(), seed=seed), strict=True):
            variables[f"loss_skip_{name}{suffix}"] = ("layer", x.numpy(), {"unit": "nats per token"})
    data = xr.Dataset(variables, coords={"layer": list(range(n))})  # pyright: ignore[reportArgumentType]
    data["loss"] = float(whole.mean())
    return data.assign_attrs(model.provenance | {"method": "loss without", "tokens": int(tokens.numel()), "seed": seed})
