"""Attention repeated is a Hopfield network: its energy never rises, and its first update is the head's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import families

import microtome as mt
from microtome.measurements import hopfield_updates
from microtome.measurements._hopfield import updates

TOKENS = torch.randint(5, families.VOCAB, (1, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("slope", [0.05, 0.35, 2.0, 30.0])
def test_the_energy_never_rises_and_is_never_negative(slope: float) -> None:
    rng = torch.Generator().manual_seed(0)
    sees = torch.ones(9, 9, dtype=torch.bool).tril()
    for scale in (0.1, 1.0, 10.0):
        q, k = (scale * torch.randn(5, 9, 8, generator=rng, dtype=torch.float64) for _ in range(2))
        found = updates(q, k, sees, slope, 12)
        size = found["energy"].abs().amax(0)
        assert bool((found["energy"].diff(dim=0) <= 1e-12 * size).all())
        assert bool((found["energy"] >= -1e-12 * size).all())
        assert float(found["moved"][-1].max()) < 1


def test_a_stored_key_is_at_rest_and_a_soft_head_comes_to_rest_between_all() -> None:
    key = 6 * torch.eye(8, dtype=torch.float64).unsqueeze(0)
    sees = torch.ones(8, 8, dtype=torch.bool)
    sharp = updates(key + 0.5, key, sees, 2.0, 3)
    assert float(sharp["moved"][-1].max()) < 1e-9
    assert bool((sharp["k90"] == 1).all())
    soft = updates(key, key, sees, 1e-3, 6)
    assert float(soft["moved"][-1].max()) < 1e-6
    assert bool((soft["k90"][-1] == 8).all())


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bert"])
def test_the_first_state_of_a_models_head_has_its_own_attention(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    data = hopfield_updates(model, TOKENS, steps=3)
    assert data["energy"].shape == (3, 4, 4)
    assert data["moved"].shape == (3, 4, 3)
    assert float(data["energy"].diff("step").max()) <= 1e-9
    pattern = model.run(TOKENS, capture="1.attn.pattern")["1.attn.pattern"].double()
    held = pattern.sort(dim=-1, descending=True).values.cumsum(-1)
    own = (1 + (held < 0.9 - 1e-6).sum(-1)).double()[0, :, 6:].mean(1)
    assert np.allclose(data["k90"][1, :, 0], own)


def test_scores_that_are_no_products_are_refused() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.ArgumentError, match="one prompt of two tokens or more"):
        hopfield_updates(model, TOKENS[:, :1])
    with pytest.raises(mt.errors.ArgumentError, match="at least one update"):
        hopfield_updates(model, TOKENS, steps=0)
    with pytest.raises(mt.errors.SiteError, match="are no multiple of q . k; got a gap of"):
        hopfield_updates(mt.open(families.build("bloom"), prove=False), TOKENS)
