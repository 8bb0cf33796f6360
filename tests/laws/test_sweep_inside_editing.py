"""A sweep inside `editing` is one literal forward a cell, with the standing edits and then the cell's own."""

from __future__ import annotations

import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt
from microtome.run.hook import lock_of
from microtome.sweep import _sharing

NAMES = ["llama-gqa", "gpt2", "gpt_neo", "bloom", "mistral", "gemma2", "gptj", "mixtral", "bert"]
NEAR = {"rtol": 1e-3, "atol": 1e-4}
WIDE = 40


def row(n: int, seed: int = 0) -> list[int]:
    return torch.randint(5, families.VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [row(8, 1), row(6, 2), row(8, 3)]
METRIC = mt.metric.LogitDifference(answer=7, foil=9)


def push(seed: int = 2, *shape: int) -> Tensor:
    return torch.randn(*shape, WIDE, generator=torch.Generator().manual_seed(seed))


def standing() -> dict[str, list[mt.edit.Edit]]:
    return {
        "steering": [mt.edit.Add("1.resid_post", push(), strength=0.7)],
        "one position": [mt.edit.Add("0.resid_post@2", push(3)), mt.edit.Scale("2.mlp_out@-1", 0.5)],
        "a head": [mt.edit.Zero("1.attn.z[1]"), mt.edit.Project("0.resid_pre", push(4))],
        "before it all": [mt.edit.Noise("embed", std=0.5)],
        "keys": [mt.edit.KnockOut("1.attn.scores@-2--1", keys="0,1"), mt.edit.Scale("2.attn.v@1", -2.0)],
        "a mean of the run": [mt.edit.Mean("1.mlp_out"), mt.edit.Mean("2.resid_post@1-4")],
        "by position": [mt.edit.Add("1.resid_post@0-3", push(5, 4)), mt.edit.Apply("0.mlp_out", lambda x: x.flip(1))],
        "the end": [mt.edit.Add("2.resid_post", push(6))],
    }


def cells() -> list[mt.edit.SiteEdit | list[mt.edit.SiteEdit]]:
    return [
        mt.edit.Zero("0.mlp_out@1"),
        mt.edit.Zero("1.attn.z[1]@3"),
        mt.edit.Add("1.resid_post@5", push(7)),
        mt.edit.Scale("2.mlp_out@-1", 3.0),
        [mt.edit.Zero("2.attn_out@4"), mt.edit.Add("0.resid_post@-1", push(8))],
        mt.edit.Add("embed@0", push(9)),
    ]


@pytest.mark.parametrize("name", families.some(3, NAMES))
def test_a_sweep_inside_editing_is_the_literal_forwards(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    read = mt.metric.FunctionMetric(lambda logits, prompts: logits[:, -1, :12])
    which = [i % 3 for i in range(len(cells()))]
    plain = model.sweep(PROMPTS, cells(), read, prompts=which).run()
    for kind, edits in standing().items():
        with model.editing(*edits):
            swept = model.sweep(PROMPTS, cells(), read, prompts=which).run()
        for i, prompt in enumerate(PROMPTS):
            base = model.run([prompt], edits=edits).logits[0, -1, :12]
            torch.testing.assert_close(swept.base[i], base, **NEAR, msg=lambda m, k=kind: f"{k}, base: {m}")
        for place, (cell, i) in enumerate(zip(cells(), which, strict=True)):
            own = cell if isinstance(cell, list) else [cell]
            literal = model.run([PROMPTS[i]], edits=[*edits, *own]).logits[0, -1, :12]
            text = f"{kind}, {cell}: "
            torch.testing.assert_close(swept.values[place], literal, **NEAR, msg=lambda m, t=text: t + m)
        assert float((swept.base - plain.base).abs().max()) > 100 * NEAR["atol"], kind
        assert int((swept.effects.abs().amax(1) > 100 * NEAR["atol"]).sum()) >= 5, kind  # of 6 cells


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("site", ["mlp.router", "mlp.experts", "mlp.experts.post", "mlp.scale"])
def test_edits_inside_a_mixture_stand_in_a_sweep(name: str, site: str) -> None:
    model = mt.open(families.build(name), prove=False)
    edits = [mt.edit.Scale(f"0.{site}@3", 0.3), mt.edit.Scale(f"2.{site}@-1", 1.7)]
    read = mt.metric.FunctionMetric(lambda logits, prompts: logits[:, -1, :12])
    which = [i % 3 for i in range(len(cells()))]
    with model.editing(*edits):  # the first sweep of this model: what its cells can share is tried inside, too
        swept = model.sweep(PROMPTS, cells(), read, prompts=which).run()
    outside = model.sweep(PROMPTS, cells(), read, prompts=which)
    assert swept.plan.shares == outside.plan.shares == "layers and positions"
    for place, (cell, i) in enumerate(zip(cells(), which, strict=True)):
        own = cell if isinstance(cell, list) else [cell]
        literal = model.run([PROMPTS[i]], edits=[*edits, *own]).logits[0, -1, :12]
        torch.testing.assert_close(swept.values[place], literal, **NEAR, msg=lambda m, c=cell: f"{c}: {m}")
    assert float((swept.base - outside.run().base).abs().amax(1).min()) > 10 * NEAR["atol"]


def test_what_fails_inside_editing_does_not_say_what_a_model_can_share(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    cell = mt.edit.Zero("1.mlp_out@3")
    own = _sharing._Trial.holds

    def failing(trial: _sharing._Trial, way: _sharing.Sharing) -> bool:
        if lock_of(model.hf).active_edits:
            raise RuntimeError("an edit that the trial meets")
        return own(trial, way)

    monkeypatch.setattr(_sharing._Trial, "holds", failing)
    with model.editing(mt.edit.Zero("1.attn.z[0]")):
        inside = model.sweep(PROMPTS[0], [cell], METRIC)
        literal = METRIC.read(model.hf(torch.tensor([PROMPTS[0]])).logits[:, -1:], torch.tensor([0]))
        torch.testing.assert_close(inside.run().base, literal, **NEAR)
    assert inside.plan.shares.startswith("nothing")
    assert model.sweep(PROMPTS[0], [cell], METRIC).plan.shares == "layers and positions"


def test_two_edits_at_one_place_act_in_the_order_of_the_model() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    scale, add = mt.edit.Scale("2.resid_pre@3", -1.0), mt.edit.Add("1.resid_post@3", push(), strength=9.0)
    cell: list[mt.edit.SiteEdit] = [scale, add]
    literal = METRIC.read(model.run([PROMPTS[0]], edits=cell).logits[:, -1:], torch.tensor([0]))
    torch.testing.assert_close(model.sweep(PROMPTS[0], [cell], METRIC).run().values, literal, **NEAR)
    alone = METRIC.read(model.run([PROMPTS[0]], edits=cell[1]).logits[:, -1:], torch.tensor([0]))
    assert float((alone - literal).abs()) > 0.1


def test_a_mean_in_the_last_layer_is_over_all_positions() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    cell = mt.edit.Mean("2.resid_post")
    literal = METRIC.read(model.run([PROMPTS[0]], edits=cell).logits[:, -1:], torch.tensor([0]))
    swept = model.sweep(PROMPTS[0], [cell], METRIC).run()
    torch.testing.assert_close(swept.values, literal, **NEAR)
    assert float(swept.effects.abs()) > 0.01


def test_questions_inside_editing_are_asked_of_the_edited_model() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    edit = mt.edit.Add("1.resid_post", push())
    clean, corrupt = PROMPTS[0], PROMPTS[2]
    with model.editing(edit):
        found = mt.explain.patch(model, clean, corrupt, answer=7, foil=9, sites=["resid_pre"])
        source = model.run(clean, capture="1.resid_pre")
    values = METRIC.read(model.run(corrupt, edits=[edit]).logits[:, -1:], torch.tensor([0]))
    assert abs(float(found["corrupt"]) - float(values[0])) < 1e-4
    own = model.run(corrupt, edits=[edit, mt.edit.Patch("1.resid_pre@3", source)]).logits[:, -1:]
    clean_value = float(METRIC.read(model.run(clean, edits=[edit]).logits[:, -1:], torch.tensor([0])))
    share = (float(METRIC.read(own, torch.tensor([0]))) - float(values[0])) / (clean_value - float(values[0]))
    assert abs(float(found["resid_pre"][1, 3]) - share) < 1e-3 * max(1.0, abs(share))


def test_edges_inside_editing_are_those_of_a_model_whose_weights_do_the_same() -> None:
    hf = families.build("llama-gqa")
    model, prompts = mt.open(hf, prove=False), torch.tensor([row(9, 5), row(9, 6)])
    changed = families.build("llama-gqa")
    layers, width = changed.model.layers, changed.config.head_dim
    with torch.no_grad():
        layers[1].self_attn.o_proj.weight[:, 2 * width : 3 * width] = 0
        layers[0].mlp.down_proj.weight *= 0.5
        layers[2].self_attn.q_proj.weight[width : 2 * width] = 0
        layers[1].mlp.up_proj.weight[7] = 0
    edits = [
        mt.edit.Zero("1.attn.z[2]"), mt.edit.Scale("0.mlp_out", 0.5), mt.edit.Zero("2.attn.q[1]"),
        mt.edit.Zero("1.mlp.up[7]"),
    ]  # fmt: skip
    names = [(s, r) for s in ("embed", "0.attn.z[1]", "0.mlp_out") for r in
             ("1.attn.q[2]", "1.attn.k[3]", "1.mlp.in", "2.attn.q[1]", "2.attn.v[1]", "final")]  # fmt: skip
    sent = ["embed", "*.attn.z", "*.mlp_out"]

    def swept(of: mt.Model) -> Tensor:
        source = of.run(prompts[1:], capture=sent)
        edges = [mt.sweep.Edge(sender, receiver, source) for sender, receiver in names]
        return of.sweep(prompts[:1], edges, METRIC).run().effects

    with model.editing(*edits):
        found = swept(model)
    expected, plain = swept(mt.open(changed, prove=False)), swept(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert float(found[names.index(("embed", "2.attn.q[1]"))].abs()) < 1e-6  # its queries are zero whatever it reads
    assert float(plain[names.index(("embed", "2.attn.q[1]"))].abs()) > 1e-5
    assert float((plain - expected).abs().max()) > 1e-3


def test_what_a_sweep_cannot_hold_is_refused() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    cell = mt.edit.Zero("1.mlp_out@3")
    source = model.run(PROMPTS[0], capture="0.attn.z")
    edge = mt.sweep.Edge("0.attn.z[1]", "1.mlp.in", source)
    for edits, swept, text in (
        ([mt.edit.Skip(1)], cell, "cannot hold this edit in its rows; got Skip"),
        ([mt.edit.Zero("1.attn.z[0]", rows=(0,))], cell, "of `editing` names rows"),
        ([mt.edit.Zero("final")], cell, "a sweep acts inside the layers, not at final"),
        ([mt.edit.Scale("1.mlp.scale", 2.0)], edge, "edges cannot be swept inside `editing` of .* a norm divides by"),
        (
            [mt.edit.Zero("1.attn_out")],
            edge,
            "edges cannot be swept inside `editing` of .* heads write what it changes",
        ),
    ):
        with pytest.raises(mt.errors.MicrotomeError, match=text), model.editing(*edits):
            model.sweep(PROMPTS[0], [swept], METRIC)
    outside = model.sweep(PROMPTS[0], [cell], METRIC)
    with (
        pytest.raises(mt.errors.EditError, match="must run under the edits .* was prepared; got Zero.*allowed: none"),
        model.editing(mt.edit.Zero("1.attn.z[0]")),
    ):
        outside.run()
    with model.editing(mt.edit.Zero("1.attn.z[0]")):
        inside = model.sweep(PROMPTS[0], [cell], METRIC)
        assert torch.isfinite(inside.run().values).all()
        before = model.hf(torch.tensor([PROMPTS[0]])).logits
    with pytest.raises(mt.errors.EditError, match="must run under the edits"):
        inside.run()
    assert torch.equal(before, model.run(PROMPTS[0], edits=mt.edit.Zero("1.attn.z[0]")).logits)
