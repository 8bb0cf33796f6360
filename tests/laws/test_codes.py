"""Heads whose outputs differ where the answer can be predicted have codes of their own there, and others have not."""

from __future__ import annotations

import torch
from tests import families
from tests.laws.test_edges import ids

import microtome as mt
from microtome import circuits
from microtome.circuits._codes import codes_of, scores_of, standardised
from microtome.explain import auc

PAIRS, HEADS, TOLD = 10, 24, 6


def outputs(seed: int) -> torch.Tensor:
    """[head, example, d_head] The first heads write one of two vectors; the others write alike on both sides."""
    g = torch.Generator().manual_seed(seed)
    kinds = torch.randn(HEADS, 2, 16, generator=g)
    which = torch.randint(2, (HEADS, 2 * PAIRS), generator=g)
    which[:TOLD] = (torch.arange(2 * PAIRS) < PAIRS).long()
    chosen = kinds[torch.arange(HEADS).unsqueeze(1), which]
    return chosen + 0.1 * torch.randn(chosen.shape, generator=g)


def test_planted_heads_are_told_from_the_others() -> None:
    positive = torch.arange(2 * PAIRS) < PAIRS
    areas: list[float] = []
    for seed in range(3):
        found = codes_of(standardised(outputs(seed)), 32, 150)
        scores = scores_of(found, positive)
        areas.append(auc(scores[:TOLD], scores[TOLD:]))
        assert float(scores[:TOLD].mean()) > 0.35 > 0.2 > float(scores[TOLD:].mean())
    assert sum(areas) / 3 > 0.85, areas  # chance is 0.5


def test_scores_are_shares_of_codes() -> None:
    codes = torch.tensor([[1, 1, 2, 3, 4, 2], [5, 5, 5, 5, 5, 5], [1, 2, 3, 4, 5, 6]])
    assert scores_of(codes, torch.tensor([True] * 3 + [False] * 3)).tolist() == [0.25, 0.0, 0.5]


def test_heads_that_see_nothing_that_differs_have_no_code_of_their_own() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    clean = [ids(s)[0].tolist() for s in range(4)]
    corrupt = [[row[0] + 1, *row[1:]] for row in clean]
    heads = [f"1.attn.scores[{h}]" for h in range(4)]
    with model.editing(*(mt.edit.KnockOut(f"{site}@-1", keys="0-7") for site in heads), mt.edit.Zero("0.attn.z")):
        data = circuits.code_scores(model, clean, corrupt, answer=11, foil=13, codes=8, steps=50)
    assert float(data["score"][1].max()) == 0.0  # they see the last token alone, which is the same in both
    assert data["score"].shape == (3, 4)
    assert data["score_control"].dims == ("layer", "head")
