"""What follows the last block: the norm through which the head reads the stream, or that there is none."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tests import families
from tests.scripts import script
from torch import Tensor, nn

import microtome as mt

configs = script("tools/family_configs.py")
TOKENS: Tensor = configs.prompt(2, 20)
SITES = ["final", "final.scale", "2.resid_post"]


@cache
def opened(family: str) -> mt.Model:
    return mt.open(configs.build(family))


def logits_of(hf: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return hf(input_ids=tokens).logits


def rms(x: Tensor, eps: float) -> Tensor:
    return (x.pow(2).mean(-1) + eps).sqrt()


# -------------------------------------------------------------------------------------------------------- no norm


@pytest.mark.parametrize("family", ["bert", "electra", "openai-gpt"])
def test_a_head_that_reads_the_stream_itself_is_said_to_have_no_norm_before_it(family: str) -> None:
    model = opened(family)
    with pytest.raises(mt.errors.SiteError, match="no norm stands between the stream and the head"):
        model.run(TOKENS, "final.scale")
    with pytest.raises(mt.errors.SiteError, match="cannot be read as logits"):
        model.unembed(model.run(TOKENS, "2.resid_post")["2.resid_post"])


class Squashed(nn.Module):
    """A norm of no known form."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().amax(-1, keepdim=True) + 0.001)


def test_a_norm_of_no_known_form_is_not_said_to_be_none() -> None:
    hf = families.build("llama-gqa")
    hf.model.norm = Squashed()
    assert mt.open(hf).anatomy.missing[mt.anatomy.Site("final.scale")] == "there is no norm of a known form"


# ------------------------------------------------------------------------------------- a head with its own transform


@pytest.mark.parametrize("family", ["megatron-bert", "roberta-prelayernorm", "modernbert-decoder"])
def test_a_transform_behind_the_final_norm_leaves_the_norm_and_takes_the_unembedding(family: str) -> None:
    model = opened(family)
    norm = model.final_norm
    assert norm is not None
    run = model.run(TOKENS, SITES)
    last = run["2.resid_post"]
    with torch.no_grad():
        torch.testing.assert_close(run["final"], norm.module(last), rtol=1e-5, atol=1e-6)
    variance = last.var(-1, correction=0)
    torch.testing.assert_close(run["final.scale"], (variance + norm.norm.eps).sqrt(), rtol=1e-5, atol=1e-6)
    other = TOKENS.flip(0)
    given = model.run(other, "final")["final"]
    edited = model.run(TOKENS, edits=mt.edit.Set("final", value=given)).logits
    torch.testing.assert_close(edited, logits_of(model.hf, other), rtol=1e-5, atol=1e-5)
    for ask in (lambda: model.W_U, lambda: model.unembed(last), lambda: mt.explain.contributions(model, TOKENS[:1])):
        with pytest.raises(mt.errors.SiteError, match="the head has a transform of its own"):
            ask()


def test_a_head_that_also_reads_the_stream_past_its_norm_has_no_proven_norm() -> None:
    hf = configs.build("megatron-bert")
    seen: dict[str, Tensor] = {}
    hf.bert.encoder.ln.register_forward_hook(lambda module, args, output: seen.update(x=args[0]))
    hf.cls.predictions.decoder.register_forward_pre_hook(lambda module, args: (args[0] + seen["x"],))
    a = mt.open(hf).anatomy
    assert 'fails "6 unembed" at final' in a.missing[mt.anatomy.Site("final.scale")]


# ------------------------------------------------------------------------------------ a number behind the final norm


def scaled(family: str, by: float) -> Any:
    """A model whose unembedding reads so many times what the final norm gives."""
    hf = families.build(family)
    hf.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0] * by,))
    return hf


@pytest.mark.parametrize("family", ["minicpm3", "gpt2", "llama-gqa"])
def test_what_the_unembedding_reads_may_be_a_multiple_of_what_the_norm_gives(family: str) -> None:
    model = opened(family) if family == "minicpm3" else mt.open(scaled(family, 0.375))
    by = 0.5 if family == "minicpm3" else 0.375
    tokens, last = TOKENS[:1], f"{model.anatomy.n_layers - 1}.resid_post"
    run = model.run(tokens, ["final", "final.scale", last])
    norm = model.final_norm
    assert norm is not None
    assert norm.norm.times == pytest.approx(by, rel=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(run["final"], by * norm.module(run[last]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.unembed(run[last]), run.logits, rtol=1e-4, atol=1e-5)
    own = run.logits.softmax(-1).amax(-1)
    lens = mt.explain.logit_lens(model, tokens)
    torch.testing.assert_close(torch.tensor(lens["probability"][-1, ..., 0].values), own, rtol=1e-4, atol=1e-6)
    found = mt.explain.contributions(model, tokens[0].tolist(), answer=11, foil=23)
    parts = sum(float(found[name].sum()) for name in found.attrs["parts"] if name in found)
    expected = float(run.logits[0, -1, 11] - run.logits[0, -1, 23])
    assert parts == pytest.approx(expected, abs=1e-4 * float(run.logits.abs().max()))
    edited = model.run(tokens, edits=mt.edit.Scale("final.scale", 2.0)).logits
    torch.testing.assert_close(edited, model.unembed(run[last], run["final.scale"] * 2.0), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------- a norm that runs twice in a forward


def twice() -> Any:
    """A model whose final norm also runs on the embeddings."""
    hf = families.build("llama-gqa")
    hf.model.embed_tokens.register_forward_hook(lambda module, args, output: hf.model.norm(output))
    return hf


def halved_at_the_end(hf: Any, tokens: Tensor, **more: Any) -> Tensor:
    """Logits of a model whose norm divides by twice as much in the second of its two calls."""
    calls: list[int] = []

    def hook(module: Any, args: Any, output: Tensor) -> Tensor | None:
        calls.append(1)
        return output / 2 if len(calls) == 2 else None

    handle = hf.model.norm.register_forward_hook(hook)
    try:
        return logits_of(hf, tokens)
    finally:
        handle.remove()


def test_a_norm_that_runs_twice_is_seen_and_edited_where_the_head_reads_it() -> None:
    hf = twice()
    model = mt.open(hf)
    norm = model.final_norm
    assert norm is not None
    assert norm.norm.call == (1, 2)
    last = f"{model.anatomy.n_layers - 1}.resid_post"
    run = model.run(TOKENS, ["final.scale", last, "embed"])
    torch.testing.assert_close(run["final.scale"], rms(run[last], norm.norm.eps))
    edited = model.run(TOKENS, ["embed", "final.scale"], edits=mt.edit.Scale("final.scale", 2.0))
    assert torch.equal(edited["embed"], run["embed"])
    torch.testing.assert_close(edited["final.scale"], 2 * run["final.scale"])
    torch.testing.assert_close(edited.logits, halved_at_the_end(hf, TOKENS))
    with model.editing(mt.edit.Scale("final.scale", 2.0)):
        for _ in range(2):  # calls are counted within each forward
            torch.testing.assert_close(logits_of(hf, TOKENS), edited.logits)
        nested = model.run(TOKENS, "final.scale", edits=mt.edit.Scale("final.scale", 3.0))
    torch.testing.assert_close(nested["final.scale"], 6 * run["final.scale"])
    torch.testing.assert_close(model.unembed(run[last]), run.logits, rtol=1e-4, atol=1e-5)


def test_a_forward_that_ends_early_leaves_no_call_behind() -> None:
    model = mt.open(twice())
    expected = model.run(TOKENS, "final.scale")["final.scale"]
    with model.editing(mt.edit.Scale("final.scale", 2.0)):
        model.run(TOKENS, "0.resid_pre", logits=False)  # it ends between the two calls
        torch.testing.assert_close(model.run(TOKENS, "final.scale")["final.scale"], 2 * expected)


def test_generation_under_an_edit_of_one_call_is_full_forwards_under_it() -> None:
    hf = twice()
    model = mt.open(hf)
    edit = mt.edit.Scale("final.scale", 0.25)
    row = TOKENS[:1]
    with model.editing(edit):
        out: Any = hf.generate(
            input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=4, do_sample=False, pad_token_id=0,
            eos_token_id=None, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    for step, logits in enumerate(out.logits):
        tokens = out.sequences[:, : row.shape[1] + step]
        torch.testing.assert_close(logits, model.run(tokens, edits=edit).logits[:, -1], rtol=1e-4, atol=1e-5)


def test_sweeps_leave_the_other_call_of_the_norm_alone() -> None:
    hf = twice()
    model = mt.open(hf)
    row, metric = TOKENS[:1], mt.metric.LogitDifference(11, foil=23)
    cells = [mt.edit.Zero(f"{layer}.mlp_out@{at}") for layer in range(model.anatomy.n_layers) for at in (3, 19)]
    swept = model.sweep(row, cells, metric).run().values
    logits = torch.stack([model.run(row, edits=cell).logits[0, -1] for cell in cells])
    torch.testing.assert_close(swept, logits[:, 11] - logits[:, 23], rtol=1e-4, atol=1e-5)
