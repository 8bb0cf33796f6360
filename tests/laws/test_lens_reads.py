"""What a lens reads: parts sum to the logit, heads to their branch, and rows of weights are those of their neurons."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families

import microtome as mt
from microtome.explain._lens_reads import bias_logits, rows_of

PROMPT = [7, 20, 33, 41, 52, 60]
SUMS = ["llama-gqa", "gpt2", "gemma2", "granite", "cohere", "gpt_neox-parallel", "falcon-mqa", "bloom"]


def opened(name: str) -> mt.Model:
    return mt.open(families.build(name).requires_grad_(False), prove=False)


def before_cap(model: mt.Model, prompt: list[int]) -> torch.Tensor:
    """The logits as they enter a cap, from the last stream."""
    run = model.run([prompt], "*.resid_post")
    y = model.require_readable().apply(run[f"{model.anatomy.n_layers - 1}.resid_post"].double())
    logits = y @ model.W_U.double() + (0.0 if model.b_U is None else model.b_U.double())
    return logits[0] * model.anatomy.logit_scale


@pytest.mark.parametrize("name", families.some(3, SUMS))
def test_the_parts_of_the_stream_sum_to_the_logit_and_heads_to_their_branch(name: str) -> None:
    model = opened(name)
    stream, attn, mlp = (mt.explain.lens(model, [PROMPT], of=of) for of in ("resid_post", "attn_out", "mlp_out"))
    answers = model.run([PROMPT]).logits[0].argmax(-1)
    biases = bias_logits(model)[answers].numpy() * model.anatomy.logit_scale
    logits = before_cap(model, PROMPT)[range(len(PROMPT)), answers].numpy()
    own = stream["answer_logit"].isel(batch=0)
    np.testing.assert_allclose(own.isel(layer=-1), logits, atol=2e-4, rtol=1e-4)
    parts = attn["answer_logit"].isel(batch=0).sum("layer") + mlp["answer_logit"].isel(batch=0).sum("layer")
    np.testing.assert_allclose(own.sel(layer=-1) + parts, logits, atol=2e-4, rtol=1e-4)
    assert float(abs(parts).max()) > 1e-2
    heads = mt.explain.lens(model, PROMPT, of="attn.z")["answer_logit"]
    one = mt.explain.lens(model, [PROMPT], of="attn.z[2]")["answer_logit"].isel(batch=0)
    np.testing.assert_allclose(one.isel(pos=-1), heads.sel(head=2), atol=1e-5)
    shares = mt.explain.contributions(model, PROMPT, answer=int(answers[-1]))
    np.testing.assert_allclose(heads, shares["attn"][0], atol=2e-4)
    whole = heads.sum("head") + shares["attn_bias"][0]
    np.testing.assert_allclose(whole, attn["answer_logit"].isel(batch=0, pos=-1), atol=2e-4)
    linear = mt.explain.lens(model, [PROMPT], of="mlp_out", scale="run")["answer_logit"].isel(batch=0, layer=-1)
    last = model.run([PROMPT], [f"{model.anatomy.n_layers - 1}.{site}" for site in ("resid_post", "mlp_out")])
    norm = model.require_readable()
    for site, x in (("resid_post", own), ("mlp_out", linear)):  # biases count to the whole stream, and only to it
        vector = last[f"{model.anatomy.n_layers - 1}.{site}"][0].double()
        scale = norm.scale(last[f"{model.anatomy.n_layers - 1}.resid_post"])[0].double().unsqueeze(-1)
        plain = (norm.centre(vector) / scale * norm.gain * model.W_U.T[answers].double()).sum(-1).numpy()
        plain = plain * model.anatomy.logit_scale
        bias = biases if site == "resid_post" else 0.0
        np.testing.assert_allclose(x if site == "mlp_out" else x.isel(layer=-1), plain + bias, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2"])
def test_with_the_divisor_of_the_run_the_last_layer_is_still_the_model(name: str) -> None:
    model = opened(name)
    data = mt.explain.lens(model, [PROMPT], scale="run")
    own = mt.explain.lens(model, [PROMPT])
    assert float(data["kl"].isel(layer=-1).max()) < 1e-5
    assert float(abs(data["kl"] - own["kl"]).isel(layer=1).max()) > 1e-3, "an earlier stream has another length"
    np.testing.assert_allclose(data["answer_logit"], own["answer_logit"])
    branch = mt.explain.lens(model, [PROMPT], of="mlp_out", scale="run", top=2)
    x = model.run([PROMPT], ["1.mlp_out", "final.scale"])
    norm = model.require_readable()
    y = norm.centre(x["1.mlp_out"]) / x["final.scale"].unsqueeze(-1) * norm.gain
    p = (y @ model.W_U * model.anatomy.logit_scale).softmax(-1)[0, 3].topk(2)
    np.testing.assert_allclose(branch["probability"].sel(layer=1)[0, 3], p.values, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_rows_of_weights_are_read_as_vectors_of_their_neurons(name: str) -> None:
    model = opened(name)
    written = mt.explain.lens(model, PROMPT, of="W_out[5,17]", top=2)
    assert written["word"].dims == ("layer", "neuron", "rank")
    assert written["neuron"].values.tolist() == [5, 17]
    weights = model.layers[1]
    log_p = model.unembed(weights.W_out[17]).log_softmax(-1)
    assert written["token"].sel(layer=1, neuron=17).values.tolist() == log_p.topk(2).indices.tolist()
    own = model.run([PROMPT]).logits[0, -1].log_softmax(-1)
    kl = float((own.exp() * (own - log_p)).sum())
    assert float(written["kl"].sel(layer=1, neuron=17)) == pytest.approx(kl, rel=1e-4)
    gain: Any = weights.mlp_norm.gain if weights.mlp_norm is not None else 1.0
    read = mt.explain.lens(model, PROMPT, of="W_in[5]")
    wanted = model.unembed(weights.W_in[:, 5] * gain).argmax()
    assert int(read["token"].sel(layer=1, neuron=5)[0]) == int(wanted)
    assert int(model.unembed(weights.W_in[:, 6] * gain).argmax()) != int(wanted)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2", "granite"])
def test_a_row_of_what_neurons_write_is_what_one_alone_adds_to_the_stream(name: str) -> None:
    model = opened(name)
    alone = torch.zeros(model.anatomy.d_mlp)
    alone[5] = 1.0
    run = model.run([PROMPT], "1.mlp_out", edits=[mt.edit.Set("1.mlp.post", alone)])
    wrote, row = run["1.mlp_out"][0, -1].detach(), rows_of(model, 1, "W_out")[5]
    if model.layers[1].mlp_post_norm is None:
        torch.testing.assert_close(wrote, row)
    assert float(torch.cosine_similarity(wrote, row, dim=0)) == pytest.approx(1.0, abs=1e-5)
    scale = model.require_readable().scale(model.run([PROMPT], "2.resid_post")["2.resid_post"][0, -1])
    norm = model.require_readable()
    token = int(model.run([PROMPT]).logits[0, -1].argmax())
    logit = float((norm.centre(row) / scale * norm.gain) @ model.W_U[:, token]) * model.anatomy.logit_scale
    read = mt.explain.lens(model, PROMPT, of="W_out[5]")["answer_logit"].sel(layer=1, neuron=5)
    assert float(read) == pytest.approx(logit, rel=1e-4)


def test_a_row_is_decoded_as_row_lens_decodes_it() -> None:
    model = opened("llama-gqa")
    best = mt.explain.row_lens(model, PROMPT, neurons=3)
    for name, token in zip(best["component"].values, best["token"].values, strict=True):
        layer, neuron = (int(part) for part in str(name).split()[0][1:].split("N"))
        one = mt.explain.lens(model, PROMPT, of=f"W_in[{neuron}]")
        assert int(one["token"].sel(layer=layer, neuron=neuron)[0]) == int(token)


WRONG = [
    ("resid", r"a lens reads no such part; got 'resid'; allowed: resid_post, .*W_in\[431\]"),
    ("W_in", r"say which neurons .* To do: name some, such as W_in\[431\]; of all neurons: .*row_lens"),
    ("W_in[56]", "there are no such neurons; got .*; allowed: 0 to 55"),
    ("attn.z[4]", "one head at all positions; got .*; allowed: one of 0 to 3"),
    ("attn.z[0-1]", "one head at all positions"),
    ("mlp_out[3]", "mlp_out has no units"),
]


@pytest.mark.parametrize(("of", "text"), WRONG)
def test_what_it_cannot_read_is_refused_in_a_line(of: str, text: str) -> None:
    with pytest.raises(mt.errors.ArgumentError, match=text) as refused:
        mt.explain.lens(opened("llama-gqa"), PROMPT, of=of)
    assert "\n" not in str(refused.value)


def test_a_matrix_or_branch_that_a_model_lacks_is_refused() -> None:
    with pytest.raises(mt.errors.SiteError, match="W_gate"):
        mt.explain.lens(opened("gpt2"), PROMPT, of="W_gate[3]")
    with pytest.raises(mt.errors.SiteError, match="has no mixer_out to read"):
        mt.explain.lens(opened("gpt2"), PROMPT, of="mixer_out")
    with pytest.raises(mt.errors.SiteError, match="has no W_out to read"):
        mt.explain.lens(opened("mixtral"), PROMPT, of="W_out[3]")
