"""Contributions sum to the logit and predict the ablation they stand for; the lens ends at the model's own output."""

from __future__ import annotations

import math

import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt

UNREADABLE = {"opt-postnorm", "opt-proj", "bert", "roberta"}
READABLE = [n for n in families.NAMES if n not in UNREADABLE]


def ids(rows: int = 2, length: int = 8, seed: int = 3) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", families.some(2, READABLE))
def test_the_parts_sum_to_the_logit_and_the_details_to_the_parts(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    mixture = any(part.experts for part in model.anatomy.parts.layers)
    detail = ("source",) if mixture else ("source", "neuron")
    logits = model.run(ids()).logits[:, -2]
    for foil in (None, 13):
        data = mt.explain.contributions(model, ids(), answer=11, foil=foil, position=-2, detail=detail)
        assert abs(data["gap"]).max() < 1e-4
        if model.anatomy.logit_softcap is None:
            expected = logits[:, 11] - (0 if foil is None else logits[:, 13])
            assert abs(torch.from_numpy(data["logit"].values) - expected).max() < 1e-4
        assert abs(data["attn_source"].sum("k_pos") - data["attn"]).max() < 1e-4
        if not mixture:
            assert abs(data["mlp_neuron"].sum("neuron") + data["mlp_bias"] - data["mlp"]).max() < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gemma2", "granite", "cohere", "bloom"])
def test_a_contribution_is_what_its_removal_takes_away(name: str) -> None:
    """In the last layer, with the norms held, zeroing a head's result takes away exactly its contribution."""
    model = mt.open(families.build(name), prove=False)
    data = mt.explain.contributions(model, ids(1), answer=11)
    base = model.run(ids(1), capture=["final.scale", "2.mlp_out", "2.attn_out", "2.attn.result"])
    result = base["2.attn.result"][:, :, 1]
    path = model.anatomy.parts.layers[2].attn_post_norm
    if path is None:
        removed = result * model.anatomy.hook_points[mt.anatomy.Site("attn_out", 2)].scale
    else:  # the norm behind the branch is held too, so that the head's share of it is linear
        module = model.hf.get_submodule(path)
        whole = base["2.attn.result"].sum(2)
        removed = result * (module(whole) / whole)
    edits = [mt.edit.Set("2.attn_out", base["2.attn_out"] - removed), mt.edit.Patch("2.mlp_out", base)]
    logits = model.run(ids(1), edits=[*edits, mt.edit.Patch("final.scale", base)]).logits[0, -1, 11]
    if model.anatomy.logit_softcap is not None:
        logits = torch.atanh(logits / model.anatomy.logit_softcap) * model.anatomy.logit_softcap
    taken = float(data["logit"][0]) - float(logits)
    assert taken == pytest.approx(float(data["attn"][0, 2, 1]), abs=1e-4)


@pytest.mark.parametrize("foil", [None, 13])
def test_a_cap_that_hides_the_logit_does_not_hide_its_parts(foil: int | None) -> None:
    """A soft cap far below the logits makes every capped logit the cap itself: the parts still sum to what it hid."""
    hf = families.build("gemma2")
    loose = mt.explain.contributions(mt.open(hf, prove=False), ids(), answer=11, foil=foil)
    hf.config.final_logit_softcapping = 1e-3
    model = mt.open(hf, prove=False)
    logits = model.run(ids()).logits[:, -1]
    assert bool((logits[:, 11].abs() == logits.abs().amax()).all())  # nothing is left to read it back from
    data = mt.explain.contributions(model, ids(), answer=11, foil=foil)
    assert abs(data["gap"]).max() < 1e-4
    assert abs(data["logit"] - loose["logit"]).max() < 1e-4
    assert float(abs(loose["logit"]).max()) > 0.1
    own = mt.explain.contributions(model, ids())  # the model's own answer is the one whose hidden logit is largest
    run = model.run(ids(), capture="final@-1")
    assert own["answer"].values.tolist() == [str(i) for i in (run["final@-1"][:, 0] @ model.W_U).argmax(-1).tolist()]


def test_each_prompt_of_a_batch_is_explained_alone() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    together = mt.explain.contributions(model, ids(), detail=())
    assert together.attrs["fingerprint"] == model.fingerprint
    assert sum(together[part].sum() for part in together.attrs["parts"]) == pytest.approx(
        float(together["logit"].sum()), abs=1e-4
    )
    two = mt.explain.contributions(model, ids(), answer=[11, 12])
    for i, answer in enumerate((11, 12)):
        alone = mt.explain.contributions(model, ids()[i : i + 1], answer=answer)
        assert float(abs(two["attn"][i] - alone["attn"][0]).max()) < 1e-5
    for i in range(2):
        alone = mt.explain.contributions(model, ids()[i : i + 1])
        assert abs(together["attn"][i] - alone["attn"][0]).max() < 1e-5
        answer = int(model.run(ids()[i : i + 1]).logits[0, -1].argmax())
        assert str(alone["answer"].values[0]) == str(answer)


@pytest.mark.parametrize("name", sorted(UNREADABLE))
def test_a_stream_that_does_not_sum_to_the_logits_is_refused(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    norms = "the sum of what branches write; got norms on the residual stream itself"
    projected = "cannot be read as logits; got a head with its own transform"  # OPT-350m's, behind its final norm
    with pytest.raises(mt.errors.SiteError, match=projected if name == "opt-proj" else norms):
        mt.explain.contributions(model, ids())
    with pytest.raises(mt.errors.SiteError, match="cannot be read as logits"):
        mt.explain.logit_lens(model, ids())


@pytest.mark.parametrize("name", families.some(2, READABLE))
def test_the_lens_ends_at_the_model_and_begins_at_the_embedding(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    run = model.run(ids(), capture="embed")
    data = mt.explain.logit_lens(model, ids(), top=4)
    final = run.logits.softmax(-1).topk(4)
    assert abs(torch.from_numpy(data["probability"].values[-1]) - final.values).max() < 1e-4
    first = model.unembed(run["embed"]).softmax(-1).topk(4).values
    assert abs(torch.from_numpy(data["probability"].sel(layer=-1).values) - first).max() < 1e-5
    assert data["layer"].values.tolist() == list(range(-1, model.anatomy.n_layers))
    streams = model.run(ids(), capture="*.resid_post")
    for layer in range(model.anatomy.n_layers):  # as the addresses count them
        best = model.unembed(streams[f"{layer}.resid_post"]).softmax(-1).topk(4).values
        assert abs(torch.from_numpy(data["probability"].sel(layer=layer).values) - best).max() < 1e-5
    assert (data["answer_rank"][-1] == 0).all()
    assert data["entropy"].min() >= 0
    assert data["entropy"].max() <= math.log(model.anatomy.d_vocab)
    assert (data["probability"].diff("rank") <= 0).all()


def test_rows_of_several_lengths_are_refused() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.PromptError, match=r"prompts of one length; got \[2, 3\]"):
        mt.explain.logit_lens(model, [[5, 6], [5, 6, 7]])
