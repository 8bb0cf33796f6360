"""Lenses: at the start a fitted one is the logit lens, its gradient is autograd's, and what was planted is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt
from microtome.explain import Lens
from microtome.explain._fit_lens import CHUNK, divergence
from microtome.explain._lens_value import no_maps

PROMPT = [7, 20, 33, 41, 52, 60]


def ids(rows: int = 2, length: int = 8, seed: int = 3) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def opened(name: str = "llama-gqa") -> mt.Model:
    return mt.open(families.build(name).requires_grad_(False), prove=False)


def blank(model: mt.Model, kind: Any = "tuned", ahead: int = 1) -> Lens:
    """A lens before it was fitted."""
    a = model.anatomy
    layers = tuple(range(a.n_layers)) if kind == "heads" else tuple(range(-1, a.n_layers - (ahead == 1)))
    maps = no_maps(kind, len(layers), a.n_heads, a.d_model, 3, 0)
    return Lens(kind, ahead, layers, maps, attrs=dict(model.provenance))


@pytest.mark.parametrize("name", families.some(2, ["llama-gqa", "gpt2", "gemma2", "bloom", "granite", "cohere"]))
def test_a_lens_that_is_not_fitted_is_the_logit_lens_and_the_last_layer_the_output(name: str) -> None:
    model = opened(name)
    plain, own = mt.explain.logit_lens(model, ids(), top=3), model.run(ids()).logits.log_softmax(-1)
    asked = {
        "logit": mt.explain.lens(model, ids(), top=3),
        "tuned": mt.explain.lens(model, ids(), kind="tuned", lens=blank(model), top=3),
        "bias": mt.explain.lens(model, ids(), kind="tuned", lens=blank(model, "bias"), top=3),
    }
    for data in asked.values():
        for column in ("token", "probability", "answer_rank", "entropy"):
            np.testing.assert_allclose(data[column], plain[column], rtol=1e-5, atol=1e-5)
        assert ("logit_lens_kl" in data) == (data is not asked["logit"])
        np.testing.assert_allclose(data["kl"], data.get("logit_lens_kl", data["kl"]), atol=1e-6)
        assert data["kl"].values[-1].max() < 1e-5
        assert data["kl"].values[0].min() > 1e-3
    for layer in range(model.anatomy.n_layers):  # the divergence by hand
        read = model.unembed(model.run(ids(), f"{layer}.resid_post")[f"{layer}.resid_post"]).log_softmax(-1)
        by_hand = (own.exp() * (own - read)).sum(-1)
        np.testing.assert_allclose(asked["logit"]["kl"].sel(layer=layer), by_hand, atol=1e-5)


def test_a_branch_and_a_head_are_read_by_themselves() -> None:
    model = opened()
    run = model.run([PROMPT], ["1.mlp_out", "2.attn.result"])
    data = mt.explain.lens(model, PROMPT, of="mlp_out")
    assert data["layer"].values.tolist() == [0, 1, 2]
    assert int(data["token"].sel(layer=1)[0, 3, 0]) == int(model.unembed(run["1.mlp_out"][0, 3]).argmax())
    of_heads = mt.explain.lens(model, PROMPT, kind="heads", position=-2, top=2)
    assert of_heads["word"].dims == ("layer", "head", "rank")
    said = model.unembed(run["2.attn.result"][0, -2]).softmax(-1).topk(2)
    np.testing.assert_allclose(of_heads["probability"].sel(layer=2), said.values, rtol=1e-5)
    assert of_heads["token"].sel(layer=2).values.tolist() == said.indices.tolist()


def test_a_lens_of_the_token_after_next_is_compared_with_what_the_model_says_there() -> None:
    model = opened()
    data = mt.explain.lens(model, [PROMPT], kind="ahead", lens=blank(model, ahead=2))
    own = model.run([PROMPT]).logits.log_softmax(-1)[0, 1:]
    read = model.unembed(model.run([PROMPT], "1.resid_post")["1.resid_post"]).log_softmax(-1)[0, :-1]
    np.testing.assert_allclose(data["kl"].sel(layer=1)[0], (own.exp() * (own - read)).sum(-1), atol=1e-5)
    assert data.sizes["pos"] == len(PROMPT) - 1
    assert data["kl"].sel(layer=2).min() > 1e-3, "the last layer says the next token, not the one after"


def test_the_gradient_that_is_taken_on_the_way_is_autograds() -> None:
    model = mt.open(families.build("gemma2").double(), prove=False)  # whose logits are capped
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(CHUNK + 7, 40, generator=draw, dtype=torch.float64).requires_grad_()
    log_p = torch.randn(len(y), families.VOCAB, generator=draw, dtype=torch.float64).log_softmax(-1)
    p = log_p.exp()
    kl = divergence(model, y, p, -(p * log_p).sum(-1))
    plain = (p * (log_p - model.unembed(y).log_softmax(-1))).sum(-1)
    torch.testing.assert_close(kl, plain, rtol=1e-9, atol=1e-9)
    weights = torch.randn(len(y), generator=draw, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((of * weights).sum(), y)[0] for of in (kl, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)  # the norm's scale is float32


# ------------------------------------------------------------------------------------------------------------- planted


def shifting(strength: float = 1.0) -> tuple[mt.Model, Tensor]:
    """A model whose last layer adds one vector to the stream wherever it is: its lens is that vector as a bias."""
    hf: Any = families.build("gpt2")
    block, draw = hf.transformer.h[-1], torch.Generator().manual_seed(1)
    vector = strength * torch.randn(40, generator=draw)
    with torch.no_grad():
        for held in (block.attn.c_proj.weight, block.attn.c_proj.bias, block.mlp.c_proj.weight):
            held.zero_()
        block.mlp.c_proj.bias.copy_(vector)
    return mt.open(hf.requires_grad_(False), prove=False), vector


@pytest.mark.parametrize("kind", ["bias", "tuned"])
def test_a_planted_shift_is_found(kind: Any) -> None:
    model, vector = shifting()
    lens = mt.explain.fit_lens(
        model, ids(440, 8), tokens=3_000, kind=kind, layers=[1], optimizer="adamw", scale=60.0, held_out=500, length=8,
        rows=4,
    )  # fmt: skip
    before, after = (float(lens.kl[name][0]) for name in ("kl_logit_lens", "kl"))
    assert before > 0.5
    assert after < 0.1 * before
    assert float(lens.kl["gain_lo"][0]) > 0
    found = lens.maps["bias"][0] if kind == "bias" else lens.apply(1, torch.zeros(40))
    assert torch.cosine_similarity(found - found.mean(), vector - vector.mean(), dim=0) > (
        0.9 if kind == "bias" else 0.6
    )


def test_fitted_on_a_share_of_the_tokens_by_sgd_every_layer_gains() -> None:
    model = opened()
    lens = mt.explain.fit_lens(
        model, ids(400, 12), tokens=4_500, share=0.5, held_out=300, length=12, rows=4, scale=10.0
    )  # fmt: skip
    assert lens.layers == (-1, 0, 1)
    assert (lens.kl["gain"].values > 0).all()
    assert lens.attrs["steps"] == len(range(0, 400 - 24, 4))


def test_a_head_reads_better_through_its_own_map_than_through_anothers() -> None:
    model = opened()
    lens = mt.explain.fit_lens(
        model, ids(300, 8), tokens=2_000, kind="heads", layers=[2], rank=4, optimizer="adamw", scale=20.0, held_out=300,
        length=8, rows=4,
    )  # fmt: skip
    assert lens.kl["kl"].dims == ("layer", "head")
    assert (lens.kl["gain"].values > 0).all()
    assert float((lens.kl["kl_other_head"] - lens.kl["kl"]).mean()) > 0
    data = mt.explain.lens(model, PROMPT, kind="heads", lens=lens)
    assert data.sizes["layer"] == 1
    assert float(abs(data["kl"] - data["logit_lens_kl"]).max()) > 1e-3


# -------------------------------------------------------------------------------------------------- stopped, kept, read


def quickly(model: mt.Model, **more: Any) -> Lens:
    given: dict[str, Any] = {"tokens": 160, "share": 0.5, "held_out": 64, "length": 8, "rows": 2, "every": 3}
    return mt.explain.fit_lens(model, ids(28, 8), **given | more)


def test_a_fit_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    model, place = opened(), tmp_path / "state.safetensors"
    whole = quickly(model)

    def stop(stage: str, done: int, everything: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), mt.settings(progress=stop):
        quickly(model, checkpoint=place)
    assert place.exists()
    again = quickly(model, checkpoint=place)
    assert all(torch.equal(whole.maps[name], again.maps[name]) for name in whole.maps)
    assert float(whole.maps["matrix"].abs().max()) > 0


def test_a_lens_is_what_was_saved_and_of_its_model_alone(tmp_path: Path) -> None:
    model, place = opened(), tmp_path / "lens.safetensors"
    lens = quickly(model)
    lens.save(place)
    read = Lens.load(place, model)
    assert all(torch.equal(lens.maps[name], read.maps[name]) for name in lens.maps)
    assert read.kl.equals(lens.kl)
    assert (read.kind, read.ahead, read.layers) == (lens.kind, lens.ahead, lens.layers)
    assert read.attrs == lens.attrs
    one, two = (mt.explain.lens(model, PROMPT, kind="tuned", lens=of) for of in (lens, str(place)))
    assert one["kl"].equals(two["kl"])
    other = opened("gpt2")
    for refused in (lambda: Lens.load(place, other), lambda: mt.explain.lens(other, PROMPT, kind="tuned", lens=lens)):
        with pytest.raises(mt.errors.DataError, match=r"the lens is of another model; got .*; allowed: .* To do: open"):
            refused()
    (tmp_path / "bad").write_bytes(place.read_bytes()[:-9])
    for name in ("bad", "none"):
        with pytest.raises(mt.errors.DataError, match=f"cannot read a lens from .*{name}"):
            Lens.load(tmp_path / name)


WRONG: list[tuple[type[Exception], str, Callable[[mt.Model], Any]]] = [
    (mt.errors.ArgumentError, "a lens of the kind tuned must be fitted first",
     lambda m: mt.explain.lens(m, PROMPT, kind="tuned")),
    (mt.errors.ArgumentError, r"of another kind; got tuned; allowed: ahead",
     lambda m: mt.explain.lens(m, PROMPT, kind="ahead", lens=blank(m))),
    (mt.errors.ArgumentError, "a lens of the kind heads has its own site",
     lambda m: mt.explain.lens(m, PROMPT, kind="heads", of="mlp_out")),
    (mt.errors.ArgumentError, "no such position in this prompt; got 9; allowed: -6 to 5",
     lambda m: mt.explain.lens(m, PROMPT, kind="heads", position=9)),
    (mt.errors.PromptError, "the lens reads 2 tokens ahead; got 1 tokens",
     lambda m: mt.explain.lens(m, [7], kind="ahead", lens=blank(m, ahead=2))),
    (mt.errors.PromptError, "prompts of one length", lambda m: mt.explain.lens(m, [[5, 6], [5, 6, 7]])),
    (mt.errors.ArgumentError, "no kind of lens 'square'", lambda m: quickly(m, kind="square")),
    (mt.errors.ArgumentError, "no map is fitted to these layers of .*; got 2; allowed: -1, 0, 1",
     lambda m: quickly(m, layers=[0, 2])),
    (mt.errors.ArgumentError, "share of a lens; got 0; allowed: above 0 to 1", lambda m: quickly(m, share=0)),
    (mt.errors.DataError, "too little text to fit a lens and to hold some out; got 1 batches",
     lambda m: mt.explain.fit_lens(m, ids(2, 8), rows=2)),
    (mt.errors.SiteError, "cannot be read as logits", lambda _: quickly(opened("bert"))),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "call"), WRONG, ids=[text[:30] for _, text, _ in WRONG])
def test_what_cannot_be_is_refused_in_a_line(kind: Any, text: str, call: Callable[[mt.Model], Any]) -> None:
    with pytest.raises(kind, match=text) as refused:
        call(opened())
    assert "\n" not in str(refused.value)
