"""Edits do what they say, to what they name, and to nothing else: over every family and site."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import families
from tests.agreement import agreed
from torch import Tensor

import microtome as mt

CAUSAL = [n for n in families.NAMES if families.KIND[n] == "causal"]
READ_ONLY_ROUNDING = 2e-4
SEQUENTIAL = ["gpt2", "llama-gqa", "gemma2", "olmo2", "opt-prenorm", "bloom", "mpt", "granite"]


def ids(rows: int = 2, length: int = 8, seed: int = 3) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


# ------------------------------------------------------------------ every family, every site


@pytest.mark.parametrize("name", families.some(2))
def test_putting_back_what_was_there_changes_nothing(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    sites = [str(s) for s in model.anatomy.hook_points if s.layer in (None, 1)]
    base = model.run(ids(), capture=sites)
    for site in sites:
        run = model.run(ids(), edits=[mt.edit.Patch(site, base)])
        assert (run.logits - base.logits).abs().max() < READ_ONLY_ROUNDING, site


@pytest.mark.parametrize("name", families.some(2))
def test_every_site_can_be_changed_and_the_change_is_seen(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    for site in [s for s in model.anatomy.hook_points if s.layer in (None, 1)]:
        base = model.run(ids(), capture=str(site))
        run = model.run(ids(), capture=str(site), edits=[mt.edit.Scale(str(site), 0.5)])
        # What a mask forbids in scores stays as it was.
        expected = torch.where(base[str(site)] < -1e30, base[str(site)], base[str(site)] * 0.5)
        assert torch.allclose(run[str(site)], expected, atol=1e-5), site
        if site.name not in ("attn.scores", "attn.k", "attn.q", "mlp.router"):
            assert not torch.equal(run.logits, base.logits), site


@pytest.mark.parametrize("name", families.some(2))
def test_active_edits_come_before_those_of_a_run_inside(name: str) -> None:
    """As if both were given to the run, in logits and in what it sees."""
    model = mt.open(families.build(name), prove=False)
    for site in [str(s) for s in model.anatomy.hook_points if s.layer in (None, 1)]:
        stands, inner = mt.edit.Add(site, 0.1), mt.edit.Scale(site, 1.5)
        expected = model.run(ids(), capture=site, edits=[stands, inner])
        with model.editing(stands):
            run = model.run(ids(), capture=site, edits=[inner])
            alone = model.run(ids(), capture=site)
        assert torch.allclose(run.logits, expected.logits, atol=1e-5), site
        assert torch.allclose(run[site], expected[site], atol=1e-5), site
        assert torch.allclose(alone[site], model.run(ids(), capture=site, edits=[stands])[site], atol=1e-5), site


@pytest.mark.parametrize("name", families.some(2))
def test_the_whole_stream_from_another_prompt_gives_its_logits(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    other = model.run(ids(seed=9), capture=["embed", "2.resid_pre"])
    for site in ("embed", "2.resid_pre"):
        run = model.run(ids(), edits=[mt.edit.Patch(site, other)])
        assert (run.logits - other.logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_resid_mid_has_two_readers(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    put = torch.randn(model.anatomy.d_model, generator=torch.Generator().manual_seed(0))
    run = model.run(ids(), capture=["1.mlp.in", "1.mlp_out", "1.resid_post"], edits=[mt.edit.Set("1.resid_mid@3", put)])
    norm = model.layers[1].mlp_norm
    read = put if norm is None else norm.apply(put)
    assert (run["1.mlp.in"][:, 3] - read).abs().max() < 1e-4
    assert (run["1.resid_post"][:, 3] - put - run["1.mlp_out"][:, 3]).abs().max() < 1e-4


@pytest.mark.parametrize("name", families.some(2, CAUSAL))
def test_knocked_out_keys_get_nothing_and_the_rest_takes_it(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    base = model.run(ids(), capture="1.attn.pattern")["1.attn.pattern"]
    edit = mt.edit.KnockOut("1.attn.scores[2]@4-6", keys="0,3")
    cut = model.run(ids(), capture="1.attn.pattern", edits=[edit])["1.attn.pattern"]
    assert cut[:, 2, 4:7, [0, 3]].abs().max() == 0
    kept = [k for k in range(8) if k not in (0, 3)]
    lost = base[:, 2, 4:7, [0, 3]].sum(-1, keepdim=True)
    assert (cut[:, 2, 4:7][..., kept] * (1 - lost) - base[:, 2, 4:7][..., kept]).abs().max() < 1e-4
    others = [h for h in range(4) if h != 2]
    assert torch.allclose(cut[:, others], base[:, others], atol=1e-6)
    blind = model.run(
        ids(), capture=["1.attn.pattern", "1.attn.z"], edits=[mt.edit.KnockOut("1.attn.scores[0]", keys="*")]
    )
    assert blind["1.attn.pattern"][:, 0].abs().max() == 0
    assert blind["1.attn.z"][:, :, 0].abs().max() == 0


# ------------------------------------------------------------------------ what each one does


def test_the_algebra_of_projections_and_rotations(model: mt.Model) -> None:
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(3, 40, generator=generator)
    turn = torch.linalg.qr(torch.randn(40, 40, generator=generator))[0]
    kept = basis.clone()
    base = model.run(ids(), capture="1.resid_pre")["1.resid_pre"]

    def after(*edits: mt.edit.Edit) -> Tensor:
        return model.run(ids(), capture="1.resid_pre", edits=list(edits))["1.resid_pre"]

    out, onto = after(mt.edit.Project("1.resid_pre", basis)), after(mt.edit.Project("1.resid_pre", basis, onto=True))
    assert (out @ basis.T).abs().max() < 1e-4
    assert (out + onto - base).abs().max() < 1e-4
    assert (
        after(mt.edit.Project("1.resid_pre", basis), mt.edit.Project("1.resid_pre", basis)) - out
    ).abs().max() < 1e-5
    assert (after(mt.edit.Rotate("1.resid_pre", turn), mt.edit.Rotate("1.resid_pre", turn.T)) - base).abs().max() < 1e-4
    agreed(after(mt.edit.Rotate("1.resid_pre", turn)) - base, base @ turn.T - base, 1e-5)  # this way round
    inside = base @ (torch.linalg.pinv(basis) @ basis).T
    agreed(onto, inside, 1e-5)  # the part in the span of the basis
    assert torch.equal(basis, kept)
    clamped = after(mt.edit.Clamp("1.resid_pre", -0.1, 0.2))
    for found, bounds in ((clamped, (-0.1, 0.2)), (after(mt.edit.Clamp("1.resid_pre", low=-0.1)), (-0.1, None)),
                          (after(mt.edit.Clamp("1.resid_pre", high=0.2)), (None, 0.2))):  # fmt: skip
        torch.testing.assert_close(found, base.clamp(*bounds), atol=0, rtol=0)
        assert (found - base).abs().max() > 0.1
    assert torch.equal(after(mt.edit.Apply("1.resid_pre", lambda x: x.mul_(2))), base * 2)
    mean = after(mt.edit.Mean("1.resid_pre"))
    assert torch.allclose(mean, base.mean((0, 1)).expand_as(base), atol=1e-6)
    added = after(mt.edit.Add("1.resid_pre", basis[0], strength=2.0))
    assert torch.allclose(added, base + 2 * basis[0], atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(units=st.sets(st.integers(0, 3), min_size=1), at=st.sets(st.integers(0, 7), min_size=1), row=st.integers(0, 1))
def test_only_what_is_named_is_touched(units: set[int], at: set[int], row: int) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    site = f"1.attn.z[{','.join(map(str, units))}]@{','.join(map(str, at))}"
    base = model.run(ids(), capture="1.attn.z")["1.attn.z"]
    run = model.run(ids(), capture="1.attn.z", edits=[mt.edit.Zero(site, rows=(row,))])["1.attn.z"]
    named = torch.zeros(2, 8, 4, 1, dtype=torch.bool)
    for position in at:
        named[row, position, list(units)] = True
    assert torch.equal(run, base.masked_fill(named, 0.0))


def test_scales_taken_from_another_run_freeze_the_norm(model: mt.Model) -> None:
    base = model.run(ids(), capture=["final.scale", "2.resid_post"])
    half = [mt.edit.Scale("2.resid_post", 0.5)]
    frozen = model.run(ids(), edits=[*half, mt.edit.Patch("final.scale", base)])
    assert (frozen.logits - 0.5 * base.logits).abs().max() < 1e-4
    assert (model.run(ids(), edits=half).logits - base.logits).abs().max() < 1e-4


def test_edits_are_values(tmp_path: Path) -> None:
    edits: list[mt.edit.Edit] = [
        mt.edit.Set("1.resid_post[3]@-1", torch.ones(1)),
        mt.edit.Add("0.mlp_out", torch.arange(40.0), 2.0, rows=(0, 1)),
        mt.edit.Zero("*.attn.z[1]"), mt.edit.KnockOut("0-1.attn.scores", keys="0-2"),
        mt.edit.Skip("1-2"), mt.edit.Freeze(mlps=True),
        mt.edit.Project("1.resid_pre", torch.eye(40)[:2], onto=True), mt.edit.Repeat(1, 3), mt.edit.ScaleBlock(2, 0.5),
    ]  # fmt: skip
    mt.edit.save_edits(tmp_path / "e.safetensors", edits)
    assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]
    again = mt.edit.load_edits(tmp_path / "e.safetensors")
    assert again == edits
    assert len({*again, *edits}) == len(edits)
    assert mt.edit.Zero("1.mlp_out") != mt.edit.Zero("2.mlp_out")
    assert repr(edits[0]) == "Set('1.resid_post[3]@-1', value=Tensor[1])"
    with pytest.raises(mt.errors.EditError, match="cannot be saved: it holds a function"):
        mt.edit.save_edits(tmp_path / "x", [mt.edit.Apply("1.mlp_out", abs)])
    (tmp_path / "bad").write_bytes(b"no")
    with pytest.raises(mt.errors.DataError, match="cannot read edits"):
        mt.edit.load_edits(tmp_path / "bad")


def test_edits_that_share_a_tensor_are_saved(tmp_path: Path) -> None:
    v = torch.arange(40.0)
    parts = (v, v, v.view(1, 40), v[:20], v[10:30])
    edits: list[mt.edit.Edit] = [mt.edit.Add("1.mlp_out", part) for part in parts]
    mt.edit.save_edits(tmp_path / "e.safetensors", edits)
    assert mt.edit.load_edits(tmp_path / "e.safetensors") == edits


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda x: x.double() * 2, mt.edit.Scale("1.mlp_out", 2.0)),
        (lambda x: x.isfinite(), mt.edit.Set("1.mlp_out", 1.0)),
    ],
)
def test_what_a_function_returns_is_taken_in_the_models_type(model: mt.Model, change: Any, same: mt.edit.Edit) -> None:
    expected = model.run(ids(), edits=[same]).logits
    got = model.run(ids(), edits=[mt.edit.Apply("1.mlp_out", change)]).logits
    assert got.dtype == model.dtype
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda: mt.edit.Apply("1.resid_post", lambda x: x + 1j), "returned complex numbers"),
        (lambda: mt.edit.Set("1.resid_post", torch.zeros(40, dtype=torch.complex64)), "got torch.complex64; allowed"),
        (
            lambda: mt.edit.Patch("1.mlp_out", source={"1.mlp_out": torch.zeros(40)}),
            r"does not fit 1\.mlp_out; got shape \[40\]; allowed: a tensor \[batch, pos, d_model\]",
        ),
        (lambda: mt.edit.Set("1.resid_post", torch.zeros(3)), r"does not fit 1\.resid_post; got shape \[3\]; allowed"),
        (lambda: mt.edit.Rotate("1.resid_post", torch.ones(40, 40)), "is not a rotation"),
        (
            lambda: mt.edit.Rotate("1.resid_post", torch.eye(7)),
            "a rotation does not fit 1.resid_post; got last axis of 7",
        ),
        (lambda: mt.edit.Project("1.resid_post", torch.ones(2, 7)), "a basis does not fit"),
        (
            lambda: mt.edit.Project("1.resid_post", torch.full((2, 40), float("nan"))),
            "a basis holds numbers that are not finite",
        ),
        (lambda: mt.edit.Apply("1.resid_post", lambda x: x[:1]), "changed the shape"),
        (lambda: mt.edit.KnockOut("1.attn.pattern", keys="0"), "acts on attention scores"),
        (lambda: mt.edit.Zero("1.resid_post", rows=(5,)), r"no rows \(5,\)"),
        (lambda: mt.edit.Skip("9"), "no layers 9"),
        (lambda: mt.edit.Repeat(1, 0), "cannot run a block 0 times"),
        (lambda: mt.edit.Zero("1.resid_post@generated"), "selects nothing in a run"),
    ],
)
def test_edits_that_do_not_fit_are_refused(model: mt.Model, edit: object, text: str) -> None:
    with pytest.raises(mt.errors.MicrotomeError, match=text):
        model.run(ids(), edits=[edit()])  # type: ignore[operator]


# --------------------------------------------------------------- layers, gradients, freezing


@pytest.mark.parametrize("name", families.some(3))
def test_layer_paths(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    base = model.run(ids(), capture="*.resid_pre")
    last = f"{model.anatomy.n_layers - 1}.resid_post"
    skipped = model.run(ids(), capture="2.resid_pre", edits=[mt.edit.Skip(1)])
    assert (skipped["2.resid_pre"] - base["1.resid_pre"]).abs().max() < 1e-4
    same = model.run(ids(), edits=[mt.edit.ScaleBlock("*", 1.0), mt.edit.Repeat(1, 1)]).logits
    assert (same - base.logits).abs().max() < 1e-4
    assert (model.run(ids(), edits=[mt.edit.ScaleBlock(1, 0.0)]).logits - skipped.logits).abs().max() < 1e-4
    once = model.run(ids(), capture="1.resid_post")["1.resid_post"]
    twice = model.run(ids(), capture="1.resid_post", edits=[mt.edit.Set("1.resid_pre", once)])["1.resid_post"]
    repeated = model.run(ids(), capture=["2.resid_pre", last], edits=[mt.edit.Repeat(1, 2)])["2.resid_pre"]
    assert (repeated - twice).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bloom", "falcon-gqa", "gemma2", "gpt_neox-parallel"])
def test_gradients_are_finite_differences(name: str) -> None:
    # In float64, though some norms compute in float32 whatever they get: that bounds the step.
    model = mt.open(families.build(name).double(), prove=False)
    sites = ["1.attn.z", "1.mlp.post", "1.resid_pre", "0.attn.pattern", "1.attn.q", "embed", "0.mlp_out"]
    run = model.run(ids(1), capture=sites, grad=True)
    grads = run.grad(run.logits[0, -1, 7])
    assert all(p.grad is None for p in model.hf.parameters())
    for site in sites:
        x = run[site].detach()
        step = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype) * 1e-3
        ends = [
            model.run(ids(1), edits=[mt.edit.Patch(site, {site: x + sign * step})]).logits[0, -1, 7] for sign in (1, -1)
        ]
        slope = float(ends[0] - ends[1]) / 2
        assert float((grads[site] * step).sum()) == pytest.approx(slope, rel=2e-2, abs=2e-6), site


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "qwen3", "gemma2", "phi3"])
def test_a_frozen_model_without_biases_is_linear_in_its_embeddings(name: str) -> None:
    hf = families.build(name)
    for parameter_name, parameter in hf.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data.zero_()
    if name == "gemma2":
        hf.config.final_logit_softcapping = None
    model = mt.open(hf, prove=False)
    plain = model.run(ids(1)).logits
    run = model.run(ids(1), capture="embed", grad=True, edits=[mt.edit.Freeze()])
    assert torch.equal(run.logits, plain)
    logit = run.logits[0, -1, 7]
    total = float((run.grad(logit)["embed"] * run["embed"].detach()).sum())
    assert total == pytest.approx(float(logit.detach()), rel=1e-4)
    loose = model.run(ids(1), capture="embed", grad=True, edits=[mt.edit.Freeze(activations=False)])
    assert float((loose.grad(loose.logits[0, -1, 7])["embed"] * loose["embed"].detach()).sum()) != pytest.approx(
        total, rel=1e-3
    )


# -------------------------------------------------------------------------------- generation


def greedy(model: mt.Model, prompt: Tensor, n: int, edits: list[mt.edit.Edit]) -> list[int]:
    """The literal loop: a whole run a token, edited at the prompt's own positions."""
    tokens = prompt.tolist()
    for _ in range(n):
        tokens.append(int(model.run([tokens], edits=edits).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def generated(model: mt.Model, prompt: Tensor, n: int, **options: object) -> list[int]:
    out = model.hf.generate(
        prompt.unsqueeze(0), max_new_tokens=n, do_sample=False, pad_token_id=0, eos_token_id=None, **options
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "falcon-gqa", "bloom", "gemma2", "mixtral", "gpt_neo"])
def test_generation_under_edits_is_the_loop_of_runs(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    prompt = ids(1)[0]
    push = torch.randn(40, generator=torch.Generator().manual_seed(2)) * 3
    for edit in (mt.edit.Add("1.resid_post", push), mt.edit.Zero("0.attn.z[1]"), mt.edit.Add("1.mlp_out@2", push)):
        expected = greedy(model, prompt, 5, [edit])
        with model.editing(edit):
            assert generated(model, prompt, 5) == expected, edit
            assert generated(model, prompt, 5, use_cache=False)[:1] == expected[:1]
    assert generated(model, prompt, 5) == greedy(model, prompt, 5, [])


def test_position_rules_of_a_generation(model: mt.Model) -> None:
    prompt = ids(1)[0]
    seen: dict[str, list[int]] = {"last": [], "prompt": [], "generated": [], "*": []}

    def watch(rule: str) -> mt.edit.Edit:
        return mt.edit.Apply(f"1.resid_post@{rule}", lambda x: (seen[rule].append(x.shape[1]), x)[1])

    with model.editing(*[watch(rule) for rule in seen]):
        generated(model, prompt, 4)
    assert seen == {"last": [1, 1, 1, 1], "prompt": [8], "generated": [1, 1, 1], "*": [8, 1, 1, 1]}


def test_rows_of_a_batch_can_be_steered_apart(model: mt.Model) -> None:
    prompt = ids(1)[0]
    push = torch.randn(40, generator=torch.Generator().manual_seed(2)) * 5
    edit = mt.edit.Add("1.resid_post", push)
    with model.editing(mt.edit.Add("1.resid_post", push, rows=(1,))):
        both = model.hf.generate(
            prompt.repeat(2, 1), max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    assert both[0, 8:].tolist() == greedy(model, prompt, 5, [])
    assert both[1, 8:].tolist() == greedy(model, prompt, 5, [edit])


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 3}])
def test_rows_are_prompts_whatever_number_of_beams_they_have(model: mt.Model, how: dict[str, int]) -> None:
    prompts = ids(2)
    push = torch.randn(40, generator=torch.Generator().manual_seed(2)) * 5
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | how
    with model.editing(mt.edit.Add("1.resid_post", push, rows=(1,))):
        both = model.hf.generate(prompts, **options)
    plain = model.hf.generate(prompts[:1], **options)
    with model.editing(mt.edit.Add("1.resid_post", push)):
        steered = model.hf.generate(input_ids=prompts[1:], **options)
    assert both.tolist() == [*plain.tolist(), *steered.tolist()]
    with (
        pytest.raises(mt.errors.EditError, match=r"no rows \(2,\) in this batch; allowed: 0 to 1"),
        model.editing(mt.edit.Add("1.resid_post", push, rows=(2,))),
    ):
        model.hf.generate(prompts, **options)


def test_edits_that_never_apply_are_warned_of_and_caches_are_guarded(model: mt.Model) -> None:
    with (
        pytest.warns(UserWarning, match="these edits never applied"),
        model.editing(mt.edit.Zero("1.mlp_out@generated")),
    ):
        generated(model, ids(1)[0], 1)
    with pytest.raises(mt.errors.EditError, match="use_cache=False"), model.editing(mt.edit.Skip(0)):
        generated(model, ids(1)[0], 2)
    with model.editing(mt.edit.Skip(0)):
        skipped = generated(model, ids(1)[0], 3, use_cache=False)
    assert skipped == greedy(model, ids(1)[0], 3, [mt.edit.Skip(0)])
    with model.editing(mt.edit.Skip(1)):
        assert generated(model, ids(1)[0], 3) == greedy(model, ids(1)[0], 3, [mt.edit.Skip(1)])


def test_editing_nests(model: mt.Model) -> None:
    one, two = mt.edit.Scale("1.mlp_out", 0.5), mt.edit.Scale("1.attn.pattern", 0.5)
    both = model.run(ids(), edits=[one, two]).logits
    with model.editing(one), model.editing(two):
        assert torch.equal(model.hf(input_ids=ids()).logits, both)
    with model.editing(one):
        assert torch.equal(model.run(ids(), edits=[two]).logits, both)
    assert not math.isclose(float(both[0, 0, 0]), float(model.run(ids()).logits[0, 0, 0]))


# ------------------------------------------------------------------------ sequences, rows and rules as they are given


def test_a_generator_is_what_it_gives(model: mt.Model) -> None:
    names = ["0.mlp_out", "1.mlp_out@-1"]
    listed = model.run(ids(), capture=names)
    given = model.run(ids(), capture=(name for name in names))
    assert list(given.captured) == list(listed.captured)
    assert model.plan(ids(), (name for name in names)).bytes == model.plan(ids(), names).bytes > 0
    with pytest.raises(mt.errors.SiteError, match="cannot capture this; got 3"):
        model.run(ids(), capture=(x for x in ["0.mlp_out", 3]))  # pyright: ignore[reportArgumentType]
    metric = mt.metric.LogitDifference(answer=7, foil=9)
    cells = [mt.edit.Zero("0.mlp_out"), mt.edit.Zero("1.mlp_out")]
    expected = model.sweep(ids(), cells, metric, prompts=[1, 0]).run().effects
    assert float(expected.abs().min()) > 1e-3
    generated: Any = (cell for cell in cells)
    numbers: Any = (n for n in [1, 0])
    assert torch.equal(model.sweep(ids(), generated, metric, prompts=numbers).run().effects, expected)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_only_the_rows_that_are_named_need_the_positions(model: mt.Model, padding: Any) -> None:
    rows = [ids(1, 8)[0].tolist(), ids(1, 3, seed=4)[0].tolist(), ids(1, 6, seed=5)[0].tolist()]
    push = torch.linspace(-2, 2, 40)
    other = model.run([rows[0][::-1], rows[1], rows[2]], capture="1.resid_post", padding=padding)
    wider = model.run([rows[0][::-1], rows[1] + [7], rows[2]], capture="1.resid_post", padding=padding)
    for which, edit in (
        ((0,), mt.edit.Add("1.resid_post@5-7", push, rows=(0,))),
        ((0, 2), mt.edit.Zero("1.attn.z[0]@4,5", rows=(0, 2))),
        ((2,), mt.edit.KnockOut("1.attn.scores@5", keys="4", rows=(2,))),
        ((0,), mt.edit.Patch("1.resid_post@6,7", other, rows=(0,))),
        ((0,), mt.edit.Patch("1.resid_post@6,-1", wider, rows=(0,))),
    ):
        run = model.run(rows, edits=edit, padding=padding)
        plain = model.run(rows, padding=padding)
        for i in range(3):
            if i not in which:
                torch.testing.assert_close(run.logits[i][run.mask[i]], plain.logits[i][plain.mask[i]])
                continue
            source = {"source": {"1.resid_post": other["1.resid_post"][:1]}} if isinstance(edit, mt.edit.Patch) else {}
            alone = model.run([rows[i]], edits=dataclasses.replace(edit, rows=None, **source))
            torch.testing.assert_close(run.logits[i][run.mask[i]], alone.logits[0], rtol=1e-4, atol=2e-5)
            assert float((alone.logits[0] - plain.logits[i][plain.mask[i]]).abs().max()) > 1e-3
    with pytest.raises(mt.errors.SiteError, match="no positions @5 in row 1"):
        model.run(rows, edits=mt.edit.Zero("1.mlp_out@5", rows=(0, 1)), padding=padding)
    with pytest.raises(mt.errors.SiteError, match="different numbers of positions in different rows"):
        model.run(rows, edits=mt.edit.Zero("1.mlp_out@2--1", rows=(0, 2)), padding=padding)


def test_keys_may_be_named_by_the_rules_of_an_address(model: mt.Model) -> None:
    prompts, options = ids(2), {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    seen: dict[str, list[list[int]]] = {}

    def watch(keys: str) -> list[mt.edit.Edit]:
        def keep(x: Tensor) -> Tensor:
            seen.setdefault(keys, []).append([int(i) for i in (x[0, -1, 0] == 0).nonzero().flatten()])
            return x

        return [mt.edit.KnockOut("1.attn.scores[0]", keys=keys),
                mt.edit.Apply("1.attn.pattern[0]", keep)]  # fmt: skip

    for keys in ("@prompt", "@generated", "@last"):
        with model.editing(*watch(keys)):
            model.hf.generate(prompts, max_new_tokens=3, **options)
    assert seen["@prompt"] == [list(range(8))] * 3
    assert seen["@generated"] == [[], [8], [8, 9]]
    assert seen["@last"] == [[7], [7, 8], [7, 8, 9]]
    cut = mt.edit.KnockOut("1.attn.scores", keys="@last")
    assert torch.equal(model.run(prompts, edits=cut).logits,
                       model.run(prompts, edits=mt.edit.KnockOut("1.attn.scores", keys="-1")).logits)  # fmt: skip
    with pytest.raises(mt.errors.SiteError, match='"@generated" selects nothing in a run'):
        model.run(prompts, edits=mt.edit.KnockOut("1.attn.scores", keys="@generated"))
    with pytest.raises(mt.errors.SiteError, match="cannot read keys"):
        mt.edit.KnockOut("1.attn.scores", keys="@now")
