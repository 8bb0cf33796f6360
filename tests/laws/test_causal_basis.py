"""The causal basis: orthonormal, ordered, whole at the end; a planted plane is found, and random directions are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt
from microtome.explain._causal_basis import View, ablated

PROMPT = [7, 20, 33, 41, 52, 60]


def ids(rows: int = 12, length: int = 12) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


def opened(name: str = "llama-gqa") -> mt.Model:
    return mt.open(families.build(name).requires_grad_(False), prove=False)


def planar() -> tuple[mt.Model, Tensor]:
    """A Llama whose unembedding reads a plane of a stream that varies alike in all directions; its blocks are mute."""
    hf: Any = families.build("llama-gqa")
    draw = torch.Generator().manual_seed(1)
    plane = torch.linalg.qr(torch.randn(40, 2, generator=draw)).Q.T
    with torch.no_grad():
        hf.model.norm.variance_epsilon = 1e6
        hf.model.norm.weight.fill_(1e3)
        hf.lm_head.weight.copy_(torch.randn(families.VOCAB, 2, generator=draw) @ plane)
        white = torch.linalg.qr(torch.randn(families.VOCAB, 40, generator=draw)).Q
        hf.model.embed_tokens.weight.copy_(10 * white)
        for block in hf.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return mt.open(hf.requires_grad_(False), prove=False), plane


def asked(model: mt.Model, **more: Any) -> Any:
    return mt.explain.causal_basis(model, **{"text": ids(), "size": 48, "directions": 3, "length": 12} | more)


@pytest.mark.parametrize("name", families.some(1, ["llama-gqa", "gpt2", "gemma2", "bloom"]))
def test_directions_are_orthonormal_and_their_influences_fall(name: str) -> None:
    data = asked(opened(name), layer=1, directions=5)
    v = data["vector"].values
    np.testing.assert_allclose(v @ v.T, np.eye(5), atol=1e-5)
    assert (np.diff(data["fitted"].values) <= 0).all()
    assert float(data["fitted"].min()) > 0
    assert float(data["influence"][0]) > 2 * float(data["random_influence"])
    ranks = (data[name].values.argsort().argsort() for name in ("influence", "model_influence"))
    assert float(data["rank_correlation"]) == pytest.approx(np.corrcoef(*ranks)[0, 1]), "of those that were found alone"


def test_all_directions_together_leave_a_constant() -> None:
    model = opened()
    data = asked(model, layer=1, directions=40, steps=1, size=24)
    basis = torch.tensor(data["vector"].values, dtype=torch.float32)
    view = View.of(model, None, 1)
    h = torch.randn(7, 40, generator=torch.Generator().manual_seed(2))
    mean = h.mean(0)
    out = view.log_p(ablated(h, mean, basis))
    torch.testing.assert_close(out, view.log_p(mean).expand_as(out), atol=1e-4, rtol=1e-4)
    assert float((view.log_p(ablated(h, mean, basis[:-5])) - out).abs().max()) > 1e-2
    np.testing.assert_allclose(data["together"][-1], data["random_together"][-1], rtol=1e-3)


def test_of_the_last_stream_the_model_is_the_lens_and_a_planted_plane_is_found() -> None:
    model, plane = planar()
    data = asked(model, layer=2, steps=4, text=ids(80), size=480)
    np.testing.assert_allclose(data["influence"], data["model_influence"], atol=1e-5)
    np.testing.assert_allclose(data["random_influence"], data["random_model_influence"], atol=1e-5)
    found = torch.tensor(data["vector"].values[:2], dtype=torch.float32)
    assert torch.linalg.svdvals(found @ plane.T).min() > 0.9
    influence = data["influence"].values
    assert influence[1] > 4 * influence[2]
    assert influence[1] > 2 * float(data["random_influence"])
    assert float(data["rank_correlation"]) > 0.99, "over the three that were found"
    assert np.isnan(asked(model, layer=2, directions=2, steps=1)["rank_correlation"])
    both = data["together"].values
    assert both[2] - both[1] < 0.1 * both[1]
    assert both[1] - both[0] > 0.2 * both[1]


def test_the_influence_of_a_direction_is_that_of_plain_softmaxes() -> None:
    model = opened()
    data = asked(model, layer=0, directions=1, text=ids(8), size=48, skip=0)
    rows = ids(8)
    h = model.run(rows, "1.resid_pre")["1.resid_pre"].detach()
    v, mean = torch.tensor(data["vector"].values[0], dtype=torch.float32), h[:4].flatten(0, 1).mean(0)
    x = h[4:]
    y = x + ((mean - x) @ v).unsqueeze(-1) * v
    p, q = (model.unembed(s).log_softmax(-1) for s in (x, y))
    kl = (p.exp() * (p - q)).sum(-1).mean(1)
    np.testing.assert_allclose(data["influence_each"].values[:, 0], kl.detach(), rtol=1e-3, atol=1e-6)
    run = model.run(rows[4:], edits=[mt.edit.Set("1.resid_pre", value=y)]).logits.log_softmax(-1)
    own = model.run(rows[4:]).logits.log_softmax(-1)
    kl = (own.exp() * (own - run)).sum(-1).mean(1)
    np.testing.assert_allclose(data["model_influence_each"].values[:, 0], kl.detach(), rtol=1e-3, atol=1e-5)


def test_a_fitted_lens_is_read_through_its_map() -> None:
    model = opened()
    lens = mt.explain.fit_lens(model, ids(60, 8), tokens=320, held_out=64, length=8, rows=4, scale=20.0)
    plain, mapped = (asked(model, layer=1, directions=1, lens=of) for of in (None, lens))
    assert float(abs(plain["vector"] - mapped["vector"]).max()) > 1e-3
    assert mapped.attrs["lens"].startswith("tuned")


def test_what_cannot_be_is_refused_in_a_line() -> None:
    model = opened()
    heads = mt.explain.fit_lens(model, ids(20, 8), tokens=64, kind="heads", held_out=64, length=8, rows=4)
    some = mt.explain.fit_lens(model, ids(20, 8), tokens=64, layers=[0], held_out=64, length=8, rows=4)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (mt.errors.ArgumentError, "no such layer; got 3; allowed: -1 to 2", {"layer": 3}),
        (mt.errors.ArgumentError, "too short to leave out so many positions; got 11; allowed: under 11", {"skip": 11}),
        (mt.errors.ArgumentError, "the stream has fewer directions; got 41", {"directions": 41}),
        (mt.errors.ArgumentError, "a lens of the stream and of the next token is needed; got heads", {"lens": heads}),
        (mt.errors.ArgumentError, "the lens has no map for layer 1; allowed: 0", {"lens": some, "layer": 1}),
        (mt.errors.DataError, "too little text to find directions", {"text": ids(1)}),
    ]
    for kind, text, given in wrong:
        with pytest.raises(kind, match=text) as refused:
            asked(model, **given)
        assert "\n" not in str(refused.value)
