"""What attention heads do on random tokens that repeat.

Formula:  tokens r_0..r_{T-1} r_0..r_{T-1};  A the pattern of a head, q over the second half unless said otherwise:
          induction       mean A[q, q - T + 1]      the token after the earlier occurrence
          duplicate       mean A[q, q - T]          the earlier occurrence itself
          previous_token  mean A[q, q - 1]          q >= 1, both halves
          first_token     mean A[q, 0]              q >= 2, both halves: the sink
          entropy         mean -sum_k A log A       both halves, in nats
          induction_control  mean A[q, q - T + 1 + d]  over d in -8..8 without -1, 0, 1: keys as far away, but wrong
          Where the tokenizer begins every text with a token of its own, that token stands before r_0, is the first
          token of first_token, and is neither query nor key of the other scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from microtome.anatomy import Site
from microtome.errors import DataError, error
from microtome.model import Model
from microtome.stream import bos_id, mean_interval

if TYPE_CHECKING:
    import xarray as xr

SCORES = ("previous_token", "duplicate", "induction", "first_token", "induction_control", "entropy")


def repeated_tokens(model: Model, sequences: int, length: int, seed: int) -> Tensor:
    """Random tokens repeated once [sequence, lead + 2 * length], drawn evenly from the vocabulary without special ones.

    `lead` is 1 where the tokenizer begins every text with a token of its own, which then comes first; else 0.
    """
    special: set[int] = set(getattr(model.tokenizer, "all_special_ids", None) or ())
    allowed = torch.tensor([t for t in range(model.anatomy.d_vocab) if t not in special])
    generator = torch.Generator().manual_seed(seed)
    half = allowed[torch.randint(len(allowed), (sequences, length), generator=generator)]
    bos = bos_id(model.tokenizer)
    first = torch.full((sequences, 0 if bos is None else 1), bos or 0)
    return torch.cat([first, half, half], dim=1).to(model.device)


def head_scores(model: Model, *, sequences: int = 16, length: int = 50, seed: int = 0) -> xr.Dataset:
    """Previous-token, duplicate, induction and first-token scores of every head, with intervals and a control.

    Formula:  see the head of this file.
    Source:   Olsson et al., "In-context Learning and Induction Heads", 2022 (random repeated tokens); duplicate-token
              heads after Wang et al., "Interpretability in the Wild", 2022 (arXiv 2211.00593). Departs: an explicit
              control at wrong offsets.
    Cost:     one forward of sequences x 2 length tokens, patterns formed in every layer but not kept.
    Check:    a hand-made pattern of each kind scores 1 and the others 0; tests/laws/test_measure.py.

    Args:
        model: an open model whose attention patterns can be seen.
        sequences: how many random sequences.
        length: tokens before the repeat.
        seed: of the tokens.

    Returns:
        Dataset over (layer, head): each score as a share of attention (0 to 1; `entropy` in nats), with `_lo` and
        `_hi`, the ends of the 95 % bootstrap interval over sequences.

    Raises:
        DataError: there are no sequences, or the repeat would be longer than the model's context or too short for the
            control.
    """
    import xarray as xr

    lead = 0 if bos_id(model.tokenizer) is None else 1
    if sequences < 1:
        what = "head_scores cannot use this number of sequences"
        raise error(DataError, what, got=str(sequences), allowed="1 or more", do="choose another")
    if length < 12 or lead + 2 * length > model.anatomy.n_ctx:
        raise error(
            DataError,
            "head_scores cannot use this length",
            got=str(length),
            allowed=f"12 to {(model.anatomy.n_ctx - lead) // 2}",
            do="choose another",
        )
    tokens = repeated_tokens(model, sequences, length, seed)
    found: dict[int, dict[str, Tensor]] = {}

    def score(site: Site, pattern: Tensor) -> None:
        found[site.layer or 0] = pattern_scores(pattern, length, lead)

    with torch.no_grad():
        model.run(tokens, logits=False, observe={"*.attn.pattern": score})
    variables: dict[str, tuple[tuple[str, str], object, dict[str, str]]] = {}
    for name in SCORES:
        values = torch.stack([found[i][name] for i in sorted(found)], dim=1).cpu()
        unit = {"unit": "nats" if name == "entropy" else "share of attention"}
        for suffix, x in zip(("", "_lo", "_hi"), mean_interval(values, seed=seed), strict=True):
            variables[name + suffix] = (("layer", "head"), x.numpy(), unit)
    return xr.Dataset(
        variables,  # pyright: ignore[reportArgumentType]
        coords={"layer": sorted(found), "head": list(range(model.anatomy.n_heads))},
        attrs=model.provenance
        | {"method": "scores on repeated random tokens", "sequences": sequences, "length": length, "seed": seed},
    )


def pattern_scores(pattern: Tensor, length: int, lead: int = 0) -> dict[str, Tensor]:
    """The scores [batch, head] of patterns [batch, head, q_pos, k_pos] on tokens that repeat after `length`.

    The first `lead` positions stand before the tokens, and count as the first token only.
    """
    a = pattern.double()

    def diagonal(offset: int, first: int) -> Tensor:
        """Mean of A[q, q - offset] over q >= first, counted without the lead."""
        return a.diagonal(-offset, dim1=2, dim2=3)[..., max(lead, lead + first - offset) :].mean(-1)

    wrong = [diagonal(length - 1 - d, length) for d in range(-8, 9) if abs(d) > 1]
    return {
        "previous_token": diagonal(1, 1),
        "duplicate": diagonal(length, length),
        "induction": diagonal(length - 1, length),
        "first_token": a[:, :, max(2, lead) :, 0].mean(-1),
        "induction_control": torch.stack(wrong).mean(0),
        "entropy": -torch.special.xlogy(a, a).sum(-1)[..., lead:].mean(-1),
    }
