"""Locally linear maps: their sum is the output, and the matrix of a linear network is its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from tests.linear import linear

import microtome as mt
from microtome.explain._linear_map import HELD, Output, jacobian

PROMPT = [7, 20, 33, 41, 52, 28]


def without_biases(name: str, *, double: bool = False) -> mt.Model:
    hf = families.build(name)
    for parameter_name, parameter in hf.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data.zero_()
    return mt.open(hf.double() if double else hf, prove=False)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "qwen3", "gemma2", "phi3", "cohere"])
def test_the_maps_add_up_to_the_output(name: str) -> None:
    data = mt.explain.linear_map(without_biases(name), PROMPT)
    assert float(data["error"]) < 2e-6
    assert abs(float(data["constant"])) < 2e-6
    assert float(data["share"].sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(data["error_plain"]) > 1e-2  # the control: the ordinary Jacobian leaves much


def test_it_is_exact_in_float64() -> None:
    """As exact as the norms, which transformers computes in float32."""
    data = mt.explain.linear_map(without_biases("llama-gqa", double=True), PROMPT)
    assert float(data["error"]) < 1e-6


@pytest.mark.parametrize("name", ["gpt2", "llama-bias", "opt-prenorm"])
def test_what_is_left_is_what_biases_add(name: str) -> None:
    """The constant is the output of the held model for a stream of zeros."""
    model = mt.open(families.build(name), prove=False)
    held = ["attn.scale", "mlp.scale", "attn.pattern", "mlp.gate"] if model.anatomy.gated else []
    if not held:  # the ratio of a plain activation is no site; of it, the shares are checked alone
        data = mt.explain.linear_map(model, PROMPT)
        assert float(data["share"].sum()) + float(data["constant"]) == pytest.approx(1.0, abs=1e-6)
        assert float(data["error"]) > 1e-3
        return
    last = f"{model.anatomy.n_layers - 1}.resid_post"
    base = model.run([PROMPT], capture=[last, "final.scale", "embed", *(f"*.{site}" for site in held)])
    edits: list[mt.edit.Edit] = [mt.edit.Patch(f"*.{site}", source=base) for site in held]
    edits += [mt.edit.Patch("final.scale", source=base), mt.edit.Zero("embed")]
    constant = model.run([PROMPT], capture=last, edits=edits)[last][0, -1].double()
    y = base[last][0, -1].double()  # both are divided by the same number
    data = mt.explain.linear_map(model, PROMPT)
    assert float(data["constant"]) == pytest.approx(float(constant @ y / (y @ y)), abs=1e-5)
    assert abs(float(data["constant"])) > 1e-4


def test_the_map_of_a_linear_network_is_its_matrix() -> None:
    net = linear()
    last = f"{net.anatomy.n_layers - 1}.resid_post"
    run = net.run([PROMPT], capture=["0.resid_pre", last], edits=[HELD], grad=True)
    out = Output(net, run[last].detach()[0, -1])
    maps = jacobian(run, "0.resid_pre", out)
    rng = torch.Generator().manual_seed(2)
    step = torch.randn(1, len(PROMPT), maps.shape[-1], generator=rng, dtype=torch.float64)
    base = run["0.resid_pre"].detach()
    moved = net.run([PROMPT], capture=last, edits=[mt.edit.Set("embed", value=base + step)])
    expected = Output(net, moved[last].detach()[0, -1]).y - out.y
    found = torch.einsum("tij,tj->i", maps, step[0])
    # Held norms divide in float32, as those of transformers do.
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_contributions_and_deletions_of_a_later_layer() -> None:
    model = without_biases("llama-gqa")
    data = mt.explain.linear_map(model, PROMPT, layer=2, answer=11, top=1)
    logit = float(model.run([PROMPT]).logits[0, -1, 11])
    assert float(data["logit"].sum()) == pytest.approx(logit, rel=1e-4, abs=1e-5)
    for p in (0, 3, 5):
        edited = model.run([PROMPT], edits=[mt.edit.Zero(f"2.resid_pre@{p}")]).logits[0, -1, 11]
        assert float(data["deletion"][p]) == pytest.approx(logit - float(edited), abs=1e-5)
    assert data.sizes["component"] == len(PROMPT)
    assert (np.diff(data["singular"].values) <= 0).all()
    assert float(data["effective_rank"].max()) <= model.anatomy.d_model
    assert 1 < float(data["effective_rank_random"]) < model.anatomy.d_model


def test_a_direction_says_what_it_reads_and_writes() -> None:
    """A map made of one token's embedding and another's unembedding is named by them."""
    from microtome.explain._linear_map import _directions

    model = without_biases("llama-gqa")
    v = torch.nn.functional.normalize(model.W_E[29].detach().double(), dim=0)
    out = Output(model, model.run([PROMPT], capture="2.resid_post")["2.resid_post"].detach()[0, -1])
    u = torch.nn.functional.normalize(out.unembed[:, 17], dim=0)
    out.y, maps = u, 5.0 * torch.einsum("i,j->ij", u, v).unsqueeze(0)
    values, names = _directions(model, out, maps, ["word"], 1)
    assert values["writes"][0].split()[0] == repr(model.to_words([17])[0])
    assert values["reads"][0].split()[0] == repr(model.to_words([29])[0])
    assert values["singular"][0] == pytest.approx(5.0)
    assert float(values["effective_rank"][0]) == pytest.approx(1.0, abs=1e-6)
    assert names == ["word (0), 1"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"layer": 3}, "no layer 3; allowed: 0 to 2"),
        ({"position": 6}, "no position 6; allowed: -6 to 5"),
        ({"answer": 99_999}, "token id 99999 is not in the vocabulary"),
    ],
)
def test_what_cannot_be_mapped(given: dict[str, Any], text: str) -> None:
    with pytest.raises(mt.errors.MicrotomeError, match=text):
        mt.explain.linear_map(without_biases("llama-gqa"), PROMPT, **given)


def test_under_a_final_cap_contributions_and_deletions_are_those_before_it() -> None:
    model = without_biases("gemma2")
    cap = model.anatomy.logit_softcap
    assert cap is not None
    data = mt.explain.linear_map(model, PROMPT, answer=11, top=1)

    def before(edits: list[mt.edit.Edit]) -> float:
        return cap * float(torch.atanh(model.run([PROMPT], edits=edits).logits[0, -1, 11].double() / cap))

    assert float(data["logit"].sum()) == pytest.approx(before([]), rel=1e-4, abs=1e-4)
    expected = before([]) - before([mt.edit.Zero("0.resid_pre@2")])
    assert float(data["deletion"][2]) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert data.attrs["metric"] == "logit of the answer, before the cap"
