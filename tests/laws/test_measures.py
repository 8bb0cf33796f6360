"""Measures against closed forms, hand-made inputs and the same numbers computed plainly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr
from tests import families
from torch import Tensor

import microtome as mt
from microtome.measurements import neuron_directions, pattern_scores, token_loss
from microtome.stream import TokenBatch, mean_interval

T = 20
TEXT = ("stream", "massive", "head_norms", "activations", "firing", "top_examples", "loss")
NEURAL = ("activations", "firing", "top_examples")


def ids(rows: int = 4, length: int = 12, seed: int = 3) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def on_text(model: mt.Model, text: object, **options: object) -> xr.Dataset:
    """All measures of a text that this model has the sites for."""
    neural = any(site.name == "mlp.post" for site in model.anatomy.hook_points)
    return mt.measure(model, *(n for n in TEXT if neural or n not in NEURAL), text=text, **options)


def pattern(*offset: int, first: bool = False) -> Tensor:
    """Attention of one head that looks `offset` back, or else at the first token."""
    a = torch.zeros(1, 1, 2 * T, 2 * T)
    for q in range(2 * T):
        k = 0 if first or q < offset[0] else q - offset[0]
        a[0, 0, q, k] = 1
    return a


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (pattern(1), "previous_token"),
        (pattern(T), "duplicate"),
        (pattern(T - 1), "induction"),
        (pattern(0, first=True), "first_token"),
    ],
)
def test_a_pattern_of_one_kind_scores_one_there_and_nothing_elsewhere(made: Tensor, name: str) -> None:
    scores = pattern_scores(made, T)
    assert float(scores[name]) == pytest.approx(1.0)
    for other in {"previous_token", "duplicate", "induction", "induction_control"} - {name}:
        assert float(scores[other]) < 0.1, other
    assert float(scores["entropy"]) == 0


def test_a_token_before_the_repeat_moves_nothing_but_itself() -> None:
    """Scores of a pattern are those of the same pattern one place further on, whatever attends to the token before."""
    a = torch.rand(2, 3, 2 * T, 2 * T, generator=torch.Generator().manual_seed(0)).tril()
    shifted = torch.full((2, 3, 2 * T + 1, 2 * T + 1), 7.0).tril()
    shifted[:, :, 1:, 1:] = a
    one, other = pattern_scores(a, T), pattern_scores(shifted, T, lead=1)
    for name in ("previous_token", "duplicate", "induction", "induction_control"):
        assert torch.allclose(one[name], other[name]), name
    assert float(other["first_token"].min()) == 7.0  # the sink is the token before


def test_the_repeat_begins_as_the_tokenizer_begins_a_text() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    plain = mt.measure(model, "induction", sequences=3, period=12)

    class Begins:
        bos_token_id, all_special_ids = 1, ()

        def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [1, 5] if add_special_tokens else [5]}

    seen: list[Tensor] = []
    begun = mt.open(families.build("llama-gqa"), tokenizer=Begins(), prove=False)
    begun.hf.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    data = mt.measure(begun, "induction", sequences=3, period=12)
    assert (seen[0][:, 0] == 1).all()
    assert torch.equal(seen[0][:, 1:13], seen[0][:, 13:])
    run = begun.run(seen[0], capture="1.attn.pattern")["1.attn.pattern"]
    expected = run.diagonal(-11, dim1=2, dim2=3)[..., 2:].double().mean((0, 2))
    assert np.allclose(data["induction"].values[1], expected, atol=1e-6)
    assert not data.equals(plain)


def test_uniform_attention_has_its_closed_form() -> None:
    a = torch.tril(torch.ones(2 * T, 2 * T))
    scores = pattern_scores((a / a.sum(1, keepdim=True))[None, None], T)
    rows = range(1, 2 * T + 1)
    assert float(scores["previous_token"]) == pytest.approx(np.mean([1 / n for n in rows if n > 1]))
    assert float(scores["duplicate"]) == pytest.approx(np.mean([1 / n for n in rows if n > T]))
    assert float(scores["first_token"]) == pytest.approx(np.mean([1 / n for n in rows if n > 2]))
    assert float(scores["entropy"]) == pytest.approx(np.mean([math.log(n) for n in rows]))
    assert float(scores["uniform_entropy"]) == pytest.approx(float(scores["entropy"]))
    assert float(scores["uniform_share"]) == pytest.approx(float(scores["first_token"]))


def test_the_control_looks_at_wrong_offsets_only() -> None:
    a = torch.rand(1, 1, 2 * T, 2 * T, generator=torch.Generator().manual_seed(0)).tril()
    wrong: list[np.floating] = []
    for d in range(-8, 9):
        if abs(d) > 1:
            keys = [(q, q - (T - 1 - d)) for q in range(max(T, T - 1 - d), 2 * T) if q - (T - 1 - d) >= 0]
            wrong.append(np.mean([float(a[0, 0, q, k]) for q, k in keys]))
    assert float(pattern_scores(a, T)["induction_control"]) == pytest.approx(np.mean(wrong))


def test_head_scores_depend_on_the_seed_alone() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)

    def scores(seed: int) -> xr.Dataset:
        with mt.settings(seed=seed):
            return mt.measure(model, "induction", sequences=8, period=12)

    one, two, other = scores(0), scores(0), scores(1)
    assert one.equals(two)
    assert not one.equals(other)
    assert (one["induction_lo"] <= one["induction"] + 1e-12).all()
    less = one["induction"] - one["induction_control"]
    assert np.allclose(one["induction_diff"], less)
    assert (one["induction_diff_lo"] < less).all()
    assert np.isnan(mt.measure(model, "induction", sequences=7, period=12)["induction_lo"]).all()


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt_neox-parallel", "opt-postnorm", "gemma2", "falcon-gqa"])
def test_losses_without_a_part_are_those_of_literal_runs(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    data = mt.measure(model, "ablation_loss", text=ids())
    whole = token_loss(model.run(ids()).logits, ids()).mean()
    flat = torch.nn.functional.cross_entropy(model.run(ids()).logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
    assert float(whole) == pytest.approx(float(flat), abs=1e-5)
    for layer in range(3):
        for part, edit in (
            ("attn", mt.edit.Zero(f"{layer}.attn_out")),
            ("mlp", mt.edit.Zero(f"{layer}.mlp_out")),
            ("block", mt.edit.Skip(layer)),
        ):
            literal = token_loss(model.run(ids(), edits=[edit]).logits, ids()).mean() - whole
            assert float(data[f"loss_skip_{part}"][layer]) == pytest.approx(float(literal), abs=1e-4)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt_neox-parallel", "mixtral", "qwen3_moe"])
def test_measures_of_a_text_are_the_plain_numbers_however_it_is_cut(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    tokens = ids(9)
    three = {"examples": 3} if any(s.name == "mlp.post" for s in model.anatomy.hook_points) else {}
    data, parts = (on_text(model, tokens, rows=rows, **three) for rows in (4, 2))
    for key in data.data_vars:
        assert np.allclose(data[key], parts[key], rtol=1e-4, atol=1e-5, equal_nan=True), key
    neural = [s.layer for s in model.anatomy.hook_points if s.name == "mlp.post"]
    gate = "mlp.gate" if model.anatomy.gated else "mlp.pre"
    wanted = ["*.resid_pre", "*.resid_post", "*.attn_out", "*.attn.result"] + (
        ["*.mlp.post", f"*.{gate}"] if neural else []
    )
    run = model.run(tokens, capture=wanted)
    for i in range(3):
        pre, post, out = (run[f"{i}.{s}"][:, 1:].double() for s in ("resid_pre", "resid_post", "attn_out"))
        share = out.norm(dim=-1) / pre.norm(dim=-1)
        assert float(data["attn_share"][i]) == pytest.approx(float(share.mean()), rel=1e-4)
        _, low, high = mean_interval(share.mean(1))
        assert float(data["attn_share_lo"][i]) == pytest.approx(float(low), rel=1e-4)
        assert float(data["attn_share_hi"][i]) == pytest.approx(float(high), rel=1e-4)
        cosine = torch.cosine_similarity(pre, post, dim=-1).mean()
        assert float(data["block_influence"][i]) == pytest.approx(1 - float(cosine), abs=1e-5)
        away = torch.cosine_similarity(pre, post.roll(-5, 1), dim=-1)  # of 11 tokens behind the first, 5 on
        assert float(data["block_cos_elsewhere"][i]) == pytest.approx(float(away.mean()), abs=1e-5)
        less = torch.cosine_similarity(pre, out, dim=-1) - torch.cosine_similarity(pre, out.roll(-5, 1), dim=-1)
        assert float(data["attn_cos_diff"][i]) == pytest.approx(float(less.mean()), abs=1e-5)
        assert float(data["attn_cos_diff_lo"][i]) == pytest.approx(float(mean_interval(less.mean(1))[1]), abs=1e-5)
        peaks = run[f"{i}.resid_post"].abs().amax((0, 1))
        assert float(data["max_abs"][i]) == pytest.approx(float(peaks.max()), rel=1e-5)
        assert int(data["max_abs_dim"][i]) == int(peaks.argmax())
        first = run[f"{i}.resid_post"][:, 0].norm(dim=-1).mean()
        assert float(data["resid_post_norm_first"][i]) == pytest.approx(float(first), rel=1e-5)
        medians = run[f"{i}.resid_post"].abs().median(-1).values.double()
        assert float(data["median_abs"][i]) == pytest.approx(float(medians.mean()), rel=1e-5)
        heads = run[f"{i}.attn.result"][:, 1:].norm(dim=-1).mean((0, 1))
        assert np.allclose(data["result_norm"][i], heads, rtol=1e-4)
    for i in neural:
        post = run[f"{i}.mlp.post"]
        assert np.allclose(data["firing_rate"].sel(layer=i), (run[f"{i}.{gate}"] > 0).double().mean((0, 1)))
        assert np.allclose(data["std"].sel(layer=i), post.double().std((0, 1), correction=0), rtol=1e-5)
        assert np.allclose(data["example_value"].sel(layer=i), post.amax(1).sort(0, descending=True).values[:3].T)
        best = int(data["example_index"].sel(layer=i).values[5, 0])
        assert float(post.flatten(0, 1)[best, 5]) == pytest.approx(float(post[..., 5].max()))
    loss = float(token_loss(model.run(tokens).logits, tokens).mean())
    assert float(data["loss"]) == pytest.approx(loss, abs=1e-5)


NARROW = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2", "gpt_neox-parallel"])
def test_statistics_of_a_narrow_model_are_those_of_its_values_in_float32(name: str, dtype: torch.dtype) -> None:
    hf = families.build(name)
    with torch.no_grad():
        hf.get_input_embeddings().weight *= 100  # products of two such streams are beyond float16
    model = mt.open(hf.to(dtype), prove=False)
    data = mt.measure(model, "stream", "head_norms", text=ids())
    parallel = model.anatomy.parts.form == "parallel"
    there = ["resid_pre", "resid_pre" if parallel else "resid_mid", "resid_post", "attn_out", "mlp_out"]
    run = model.run(ids(), capture=[f"*.{name}" for name in dict.fromkeys([*there, "attn.z"])])
    for i, layer in enumerate(model.layers):
        pre, before, post, attn, mlp = (run[f"{i}.{name}"][:, 1:].float() for name in there)
        expected = {
            "attn_cos": torch.cosine_similarity(pre, attn, dim=-1),
            "block_cos": torch.cosine_similarity(pre, post, dim=-1),
            "mlp_cos": torch.cosine_similarity(before, mlp, dim=-1), "resid_pre_norm": pre.norm(dim=-1),
            "attn_share": attn.norm(dim=-1) / pre.norm(dim=-1), "mlp_share": mlp.norm(dim=-1) / before.norm(dim=-1),
        }  # fmt: skip
        for key, value in expected.items():
            assert float(data[key][i]) == pytest.approx(float(value.mean()), rel=1e-4, abs=1e-6), key
        z, after = run[f"{i}.attn.z"][:, 1:].float(), layer.attn_post_norm
        added = torch.einsum("bphd,hdm->bphm", z, layer.W_O.detach().float())
        raw = added.sum(2) if layer.b_O is None else added.sum(2) + layer.b_O.detach().float()
        added = added if after is None else added * after.gain / after.scale(raw)[..., None, None]
        assert np.allclose(data["result_norm"][i], added.norm(dim=-1).mean((0, 1)).detach(), rtol=1e-4)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2"])
def test_neurons_of_a_narrow_model_are_those_of_its_weights_in_float32(name: str, dtype: torch.dtype) -> None:
    narrow = families.build(name).to(dtype)
    exact = families.build(name)
    exact.load_state_dict({k: v.float() for k, v in narrow.state_dict().items()})
    found, expected = (
        mt.measure(mt.open(hf, prove=False), "neuron_weights", "promoted_tokens", top=3) for hf in (narrow, exact)
    )
    for key in expected.data_vars:
        assert np.allclose(found[key], expected[key], rtol=1e-4, atol=1e-5, equal_nan=True), key


BEHIND = ["gemma2", "olmo2", "glm4"]  # families with a norm between branch and stream
ADDED = [*BEHIND, "granite", "llama-bias", "opt-postnorm", "gpt_neox-parallel"]


@pytest.mark.parametrize("name", ADDED)
def test_norms_are_of_what_is_added_to_the_stream(name: str) -> None:
    """A head or neuron is measured after all that stands between it and the stream: the branch's scale, its norm."""
    model = mt.open(families.build(name), prove=False)
    data = mt.measure(model, "head_norms", text=ids())
    run = model.run(ids(), capture=["*.attn.result", "*.attn_out", "*.mlp.post", "*.mlp_out"])
    weights = mt.measure(model, "neuron_weights")
    for i, layer in enumerate(model.layers):
        result, out = run[f"{i}.attn.result"], run[f"{i}.attn_out"]
        raw = result.sum(2) if layer.b_O is None else result.sum(2) + layer.b_O.detach()
        added = result * (out / raw).unsqueeze(2)  # its share of what was added, all else held
        norms = added[:, 1:].double().norm(dim=-1).mean((0, 1))
        assert np.allclose(data["result_norm"][i], norms, rtol=1e-3)
        post, rows = run[f"{i}.mlp.post"], neuron_directions(model, i)["w_out"].detach()
        raw = post @ layer.W_out.detach() if layer.b_out is None else post @ layer.W_out.detach() + layer.b_out.detach()
        held = 1.0 if name not in BEHIND else raw.pow(2).mean(-1, keepdim=True).sqrt()
        bias = 0.0 if layer.b_out is None else layer.b_out.detach()
        assert torch.allclose(post @ rows / held + bias, run[f"{i}.mlp_out"], rtol=1e-3, atol=1e-4)
        assert np.allclose(weights["out_norm"][i], rows.norm(dim=-1), rtol=1e-5)


def test_a_beginning_of_text_is_not_measured_as_text() -> None:
    """Of a row that begins with it, neurons are measured on the rest; its examples still begin at the row's head."""
    model = mt.open(families.build("llama-gqa"), prove=False)
    data = mt.measure(model, *NEURAL, text=[TokenBatch.of(ids(), lead=1)], examples=2)
    run = model.run(ids(), capture=["*.mlp.post", "*.mlp.gate"])
    for i in range(3):
        post = run[f"{i}.mlp.post"][:, 1:]
        assert np.allclose(data["mean"][i], post.double().mean((0, 1)), atol=1e-6)
        assert np.allclose(data["max"][i], post.amax((0, 1)))
        assert np.allclose(data["firing_rate"][i], (run[f"{i}.mlp.gate"][:, 1:] > 0).double().mean((0, 1)))
        peak = post.amax(1).max(0)
        assert np.allclose(data["example_value"][i][:, 0], peak.values)
        assert (data["example_start"].values[i, :, 0] == peak.indices.numpy() * 12).all()
        assert (data["example_index"].values[i] % 12 > 0).all()


def plain_cosine(model: mt.Model, layer: int) -> Tensor:
    """The cosine of what a neuron reads and writes, from the weights and the norm's gain as they lie in the model."""
    weights = model.layers[layer]
    assert weights.mlp_norm is not None
    after = weights.mlp_post_norm
    read = weights.W_in.T.detach() * weights.mlp_norm.gain.detach()
    write = weights.W_out.detach() if after is None else after.centre(weights.W_out.detach()) * after.gain.detach()
    return torch.cosine_similarity(read, write, dim=-1)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2", "granite"])
def test_neuron_weights_are_the_dense_products(name: str) -> None:
    hf = families.build(name)
    for module in hf.modules():  # gains that a measure would notice to be left out
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            module.weight.data.uniform_(0.2, 3.0, generator=torch.Generator().manual_seed(0))
    model = mt.open(hf, prove=False)
    data = mt.measure(model, "neuron_weights", "promoted_tokens", top=3)
    norm = model.final_norm
    assert norm is not None
    for layer in range(3):
        w = neuron_directions(model, layer)
        logits = (norm.centre(w["w_out"]) * norm.gain) @ model.W_U * model.anatomy.logit_scale
        logits = logits - logits.mean(-1, keepdim=True)
        assert np.allclose(data["promoted_logit"][layer], logits.topk(3).values.detach(), atol=1e-4)
        assert np.allclose(data["suppressed_logit"][layer], logits.topk(3, largest=False).values.detach(), atol=1e-4)
        expected = torch.cosine_similarity(w["w_in"], w["w_out"], dim=-1).detach()
        assert np.allclose(data["cos_in_out"][layer], expected, atol=1e-5)
        assert ("cos_gate_in" in data) == model.anatomy.gated
        assert np.allclose(data["cos_in_out"][layer], plain_cosine(model, layer), atol=1e-5)
        model.layers[layer].W_out.data.neg_()
    turned = mt.measure(model, "neuron_weights", "promoted_tokens", top=3)
    assert (turned["promoted"].values == data["suppressed"].values).all()
    assert np.allclose(turned["cos_in_out"], -data["cos_in_out"], atol=1e-6)


def test_what_neurons_promote_is_relative_to_the_mean_token_and_says_so() -> None:
    """One vector added to the unembedding of every token moves all logits alike, and no promoted logit."""
    model = mt.open(families.build("gpt2"), prove=False)
    before = mt.measure(model, "promoted_tokens", top=3)
    model.hf.lm_head.weight.data += torch.randn(1, model.anatomy.d_model, generator=torch.Generator().manual_seed(0))
    after = mt.measure(model, "promoted_tokens", top=3)
    w_out, norm = neuron_directions(model, 0)["w_out"], model.final_norm
    assert norm is not None
    absolute = (norm.centre(w_out) * norm.gain @ model.W_U).topk(3).values.detach()
    gap = np.abs(after["promoted_logit"][0] - before["promoted_logit"][0]).max()
    assert float(abs(absolute - torch.as_tensor(after["promoted_logit"].values[0])).median()) > 100 * float(gap)
    for name in ("promoted_logit", "suppressed_logit"):
        assert np.allclose(after[name], before[name], atol=1e-5)
        assert "relative to the mean token" in after[name].attrs["meaning"]


def test_attention_to_delimiters_and_to_itself_is_the_plain_share() -> None:
    """A tokenizer whose even ids are marks: each share is what a loop over queries and keys gives."""

    class Marks:
        def decode(self, ids: list[int]) -> str:
            return " ," if ids[0] % 2 == 0 else " don't"  # a letter is enough to be a word

    model = mt.open(families.build("llama-gqa"), tokenizer=Marks(), prove=False)
    data = mt.measure(model, "attention_targets", text=ids())
    run = model.run(ids(), capture="*.attn.pattern")
    marks = ids() % 2 == 0
    assert 0.2 < float(marks.double().mean()) < 0.8
    for layer in range(3):
        pattern = run[f"{layer}.attn.pattern"].double()
        for head in range(4):
            rows = [(b, q) for b in range(4) for q in range(1, 12)]
            to_marks = np.mean([float(pattern[b, head, q][marks[b]].sum()) for b, q in rows])
            to_itself = np.mean([float(pattern[b, head, q, q]) for b, q in rows])
            even = np.mean([float(marks[b, : q + 1].double().mean()) for b, q in rows])
            assert float(data["delimiter_attention"][layer, head]) == pytest.approx(to_marks, abs=1e-6)
            assert float(data["self_attention"][layer, head]) == pytest.approx(to_itself, abs=1e-6)
            assert float(data["delimiter_uniform"][layer, head]) == pytest.approx(even, abs=1e-6)
    assert np.allclose(data["self_uniform"], np.mean([1 / (q + 1) for q in range(1, 12)]))
    assert float(np.abs(data["delimiter_attention"] - data["delimiter_uniform"]).max()) > 1e-3


def test_delimiters_are_not_told_without_a_tokenizer() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.DataError, match="has no tokenizer to find delimiters with"):
        mt.measure(model, "attention_targets", text=ids())


@pytest.mark.parametrize("causal", [True, False])
def test_even_attention_equals_its_controls(causal: bool) -> None:
    """Over the keys that a query sees: those up to it, or all of them."""
    from microtome.measurements._attention_targets import target_shares

    even = torch.ones(2, 3, 2 * T, 2 * T)
    even = even.tril() if causal else even
    even = even / even.sum(-1, keepdim=True)
    found = target_shares(even, ids(2, 2 * T) % 3 == 0, causal=causal)
    assert torch.allclose(found["delimiter_attention"], found["delimiter_uniform"], atol=1e-6)
    assert torch.allclose(found["self_attention"], found["self_uniform"], atol=1e-6)
    for lead in (0, 1):
        pattern = even[..., : 2 * T - 1, : 2 * T - 1] if lead == 0 else even
        pattern = pattern / pattern.sum(-1, keepdim=True)
        scores = pattern_scores(pattern, T - 1, lead, causal=causal)
        assert torch.allclose(scores["entropy"], scores["uniform_entropy"], atol=1e-5)
        assert torch.allclose(scores["first_token"], scores["uniform_share"], atol=1e-6)


def test_a_model_that_sees_both_ways_is_compared_with_attention_to_all_keys() -> None:
    """Without queries its attention is even: every score is then that of its control."""

    class Marks:
        bos_token_id, all_special_ids = None, ()

        def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [5]}

        def decode(self, ids: list[int]) -> str:
            return " ," if ids[0] % 2 == 0 else " don't"  # a letter is enough to be a word

    hf = families.build("bert")
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if ".query." in name:
                weight.zero_()
    model = mt.open(hf, tokenizer=Marks(), prove=False)
    data = mt.measure(model, "attention_targets", "induction", text=ids(), sequences=3, period=12)
    for found, control in (
        ("delimiter_attention", "delimiter_uniform"), ("self_attention", "self_uniform"),
        ("first_token", "uniform_share"), ("induction", "uniform_share"), ("entropy", "uniform_entropy"),
    ):  # fmt: skip
        assert np.allclose(data[found], data[control], atol=1e-6), found
    assert np.allclose(data["self_uniform"], 1 / 12)


@pytest.mark.parametrize("name", ["loss", "ablation_loss"])
def test_a_model_without_a_next_token_has_no_loss(name: str) -> None:
    model = mt.open(families.build("bert"), prove=False)
    with pytest.raises(mt.errors.ModelUnsupported, match="attention in both directions; allowed: causal models"):
        mt.measure(model, name, text=ids())


@pytest.mark.parametrize("name", ["opt-postnorm", "opt-proj"])
def test_tokens_are_promoted_only_where_the_stream_can_be_read_as_logits(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    with pytest.raises(mt.errors.SiteError) as refused:
        model.unembed(torch.zeros(model.anatomy.d_model))
    with pytest.raises(mt.errors.SiteError, match="cannot be read as logits") as found:
        mt.measure(model, "promoted_tokens")
    assert str(found.value) == str(refused.value)


def test_effective_rank_counts_the_directions() -> None:
    """A stream of k orthogonal directions of one variance has rank k; rotated, its diagonal sees more of them."""
    from microtome.measurements._effective_rank import EffectiveRank
    from microtome.stream import Covariance

    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64)).Q
    flat = torch.zeros(4000, 32, dtype=torch.float64)
    flat[:, :5] = torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    for turn, seen in ((torch.eye(32, dtype=torch.float64), 5.0), (rotation, 25.0)):
        kept = {"covariance": Covariance(32)}
        kept["covariance"].update(flat @ turn)
        found = EffectiveRank().result(kept)
        assert float(found["effective_rank"]) == pytest.approx(5, rel=0.01)
        assert float(found["effective_rank_diagonal"]) == pytest.approx(seen, rel=0.2)


def test_kurtosis_and_skewness_are_those_of_scipy() -> None:
    from scipy import stats

    model = mt.open(families.build("llama-gqa"), prove=False)
    data = mt.measure(model, "kurtosis", text=ids())
    post = model.run(ids(), capture="*.mlp.post")
    for layer in range(3):
        x = post[f"{layer}.mlp.post"].double().flatten(0, 1).numpy()
        assert np.allclose(data["kurtosis"][layer], stats.kurtosis(x, fisher=False), rtol=1e-6)
        assert np.allclose(data["skewness"][layer], stats.skew(x), rtol=1e-6, atol=1e-8)
    assert float(np.abs(data["kurtosis"] - 3).max()) > 1


def test_a_token_before_the_text_is_the_first_of_its_row_and_none_of_the_text() -> None:
    model, tokens = mt.open(families.build("llama-gqa"), prove=False), ids()
    led, plain = (TokenBatch.of(tokens, torch.arange(len(tokens)) * 12, lead) for lead in (1, 0))
    with_lead, without = (mt.measure(model, "stream", "firing", text=[batch]) for batch in (led, plain))
    first = model.run(tokens, capture="*.resid_post")["*.resid_post"][:, :, 0].norm(dim=-1).mean(1)
    for data in (with_lead, without):
        np.testing.assert_allclose(data["resid_post_norm_first"], first, rtol=1e-5)
    np.testing.assert_allclose(with_lead["resid_post_norm"], without["resid_post_norm"], rtol=1e-6)
    gate = model.run(tokens, capture="*.mlp.gate")["*.mlp.gate"][:, :, 1:] > 0
    np.testing.assert_allclose(with_lead["firing_rate"], gate.double().mean((1, 2)), atol=1e-9)


def test_measures_with_axes_of_several_sizes_go_together() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    data = mt.measure(model, "promoted_tokens", "top_examples", text=ids(), top=6, examples=3)
    assert data["promoted"].sizes["rank"] == data["example_value"].sizes["rank"] == 6
    alone = mt.measure(model, "top_examples", text=ids(), examples=3)
    np.testing.assert_array_equal(data["example_value"][..., :3], alone["example_value"])
    assert bool(data["example_value"][..., 3:].isnull().all())
    assert data["promoted"].dtype.kind == "i"


def test_the_repeat_is_as_long_as_the_context_has_room_for() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    assert model.anatomy.n_ctx == 64
    found = [mt.measure(model, "induction", sequences=2, **given)["induction"] for given in ({}, {"period": 32})]
    np.testing.assert_array_equal(*found)
    with pytest.raises(mt.errors.ArgumentError, match=r"period must be an integer from 12 to 32 .*; got 50"):
        mt.measure(model, "induction", period=50)
