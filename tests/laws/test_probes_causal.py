"""What a direction does is what the same edits do in plain runs; preferences, signals and weak labels on a model."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tests import families

import microtome as mt
from microtome.edit import Add
from microtome.probes import Probe
from microtome.probes._causal import WAYS, Direction, causal_use, random_directions
from microtome.probes._problem import problem

GIVEN: dict[str, Any] = {
    "kind": "linear", "field": "text", "label": "label", "group": None, "pool": "last", "folds": 2, "shift": (),
    "seed": 0, "untrained": False,
}  # fmt: skip


@cache
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"))


def rows(n: int = 24, *, label: Any = None) -> list[dict[str, Any]]:
    """Prompts of random tokens of 4 to 6; the label is whether the second last is even."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(n):
        ids = rng.integers(5, families.VOCAB, 4 + i % 3).tolist()
        found.append({"text": ids, "label": ("odd", "even")[ids[-2] % 2 == 0] if label is None else label(i, ids)})
    return found


@pytest.mark.parametrize("site", ["1.resid_post@-1", "1.mlp.post@-2", "1.attn.z[2]@-1", "1.attn.z@-1"])
def test_the_effects_are_those_of_the_same_edits_in_plain_runs(site: str) -> None:
    it = problem(model(), rows(6), site=site, **GIVEN | {"folds": 2})
    ((at, states),) = it.states.items()
    vector = torch.nn.functional.normalize(torch.ones(states.shape[1], dtype=torch.float64), dim=0)
    target = it.inside == 0
    found, told = causal_use(it, {at: Direction(vector, 2.5)}, target, 11, 23)
    assert told == "logit of 11 minus that of 23"
    name, shape = str(it.sites[0]), it.shapes[at]
    to = [states[torch.from_numpy(target != side)].mean(0) @ vector for side in (False, True)]
    effects: dict[str, list[float]] = {"adding": [], "ablating": [], "patching": []}
    for row, own in zip(rows(6), target.tolist(), strict=True):
        x = model().run([row["text"]], capture=name)[name].double().flatten()
        base = model().run([row["text"]]).logits[0, -1]
        sizes = {"adding": -2.5 if own else 2.5, "ablating": -float(x @ vector)}
        sizes["patching"] = float(to[own] - x @ vector)
        for way, size in sizes.items():
            edited = model().run([row["text"]], edits=Add(name, (size * vector).reshape(shape).float())).logits[0, -1]
            change = float((edited[11] - edited[23]) - (base[11] - base[23]))
            effects[way].append(-change if own else change)
    for way, each in effects.items():
        assert float(found[way][1]) == pytest.approx(np.mean(each), abs=1e-5), way


def test_a_direction_that_nothing_reads_does_nothing() -> None:
    hf = families.build("llama-gqa")
    for layer in (1, 2):
        block = hf.get_submodule(f"model.layers.{layer}")
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            block.get_submodule(part).weight.data[:, 0] = 0.0
    hf.lm_head.weight.data[:, 0] = 0.0
    blind = mt.open(hf, prove=False)
    it = problem(blind, rows(6), site="0.resid_post@-1", **GIVEN)
    ((at, states),) = it.states.items()
    axis = torch.zeros(states.shape[1], dtype=torch.float64)
    axis[0] = 1.0
    # So small a step that the norm does not see it either.
    found, _ = causal_use(it, {at: Direction(axis, 1e-2)}, it.inside == 0, 11, 23)
    assert abs(float(found["adding"][1])) < 0.05 * abs(float(found["adding_random"][1])) + 1e-4


def test_labels_at_random_seldom_pass_as_used() -> None:
    """Of one direction for all rows the mean effect is ranked among others that all rows share."""
    draws, passed = 12, dict.fromkeys(WAYS, 0)
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        texts = [rng.integers(5, families.VOCAB, 4 + i % 3).tolist() for i in range(24)]
        data = [{"text": ids, "label": "ab"[i % 2]} for i, ids in enumerate(texts)]
        it = problem(model(), data, site="1.resid_post@-1", **GIVEN | {"seed": seed})
        ((at, x),) = it.states.items()
        own = torch.from_numpy(it.inside == 1)
        gap = x[own].mean(0) - x[~own].mean(0)
        found, _ = causal_use(it, {at: Direction(gap / gap.norm(), float(gap.norm()))}, own.numpy(), 11, 23)
        for way in WAYS:
            passed[way] += float(found[f"{way}_p_value"][1]) < 0.05
    assert max(passed.values()) <= 3, passed


def test_random_directions_are_as_long_and_tell_the_classes_apart_no_more_than_rows_of_one_class() -> None:
    it = problem(model(), rows(8, label=lambda i, ids: "ab"[i % 2]), site="1.resid_post@-1", **GIVEN)
    ((at, x),) = it.states.items()
    x[:, 3] += 50 * torch.from_numpy(it.inside)  # what only the classes differ in
    found = random_directions(it, at)
    assert torch.allclose(found.norm(dim=1), torch.ones(20, dtype=torch.float64))
    assert float(found[:, 3].abs().max()) < 0.9
    size = 2.0
    vector = torch.nn.functional.normalize(torch.ones(x.shape[1], dtype=torch.float64), dim=0)
    got, _ = causal_use(it, {at: Direction(vector, size)}, it.inside == 0, 11, 23)
    chosen, means = [(i, bool(side)) for i, side in enumerate(it.inside == 0)], [0.0] * 20
    for i, own in chosen:
        ids = list(it.parts[0].rows[i])
        base = model().run([ids]).logits[0, -1]
        for k, way in enumerate(found):
            edit = Add("1.resid_post@-1", ((-size if own else size) * way).float())
            out = model().run([ids], edits=edit).logits[0, -1]
            change = float((out[11] - out[23]) - (base[11] - base[23]))
            means[k] += (-change if own else change) / len(chosen)
    assert float(got["adding_random"][1]) == pytest.approx(np.abs(means).mean(), abs=1e-5)


def test_without_an_answer_the_prediction_is_read() -> None:
    scores = mt.probes.probe(model(), rows(), site="*.resid_post@-1", causal=True, folds=3, untrained=False)
    assert scores.attrs["metric"] == "KL divergence from the unedited prediction"
    assert {scores[f"adding{end}"].attrs["unit"] for end in ("", "_lo", "_diff", "_diff_lo")} == {"nats"}
    assert (scores["adding"] >= -1e-6).all()
    assert float(scores["adding"].max()) > 1e-4


def test_the_edit_of_a_probe_moves_its_own_logit_and_taking_the_direction_out_makes_all_texts_equal() -> None:
    found = mt.probes.fit(model(), rows(), site="0-1.resid_post@-1", kind="mass-mean", untrained=False, folds=3)
    texts = [row["text"] for row in rows(6)]
    way = found.direction(1, "odd")
    assert float(way.norm()) == pytest.approx(1)
    for edit, wanted in ((found.edit(1, "odd", strength=2.0), None), (found.edit(1, ablate=True), 0.0)):
        for text in texts:
            plain, edited = (model().run([text], capture="1.resid_post@-1", edits=e)["1.resid_post@-1"].double()
                             for e in ([], [edit]))  # fmt: skip
            moved = float((edited - plain).flatten() @ way)
            step = 2 * float(found.tensors["1.resid_post@-1/step"][found.classes.index("odd")])
            along = float(edited.flatten() @ way)
            assert (moved == pytest.approx(step, rel=1e-3)) if wanted is None else (abs(along) < 1e-4)


def test_a_probe_is_kept_and_refuses_another_model_and_another_width(tmp_path: Any) -> None:
    path = tmp_path / "probe.safetensors"
    found = mt.probes.fit(model(), rows(), site="*.mlp.post@-1", untrained=False, folds=3)
    found.save(path)
    again = Probe.load(path, model())
    texts = [row["text"] for row in rows(5)]
    assert again.sites == found.sites == tuple(f"{i}.mlp.post@-1" for i in range(3))
    assert again.classes == ("even", "odd")
    assert torch.equal(again.direction(2), found.direction(2))
    assert again.predict(model(), texts, 2) == found.predict(model(), texts, 2)
    assert again.edit(2) == found.edit(2)
    assert np.allclose(again.scores["accuracy"], found.scores["accuracy"])
    assert again.scores.attrs["fingerprint"] == model().provenance["fingerprint"]
    other = families.build("llama-gqa")
    other.lm_head.weight.data.mul_(1.5)
    with pytest.raises(mt.errors.DataError, match="the probe is of another model"):
        Probe.load(path, mt.open(other, prove=False))
    config = type(other.config)(**other.config.to_dict() | {"intermediate_size": 48})
    narrow = mt.open(type(other)(config), prove=False)
    with pytest.raises(mt.errors.ArgumentError, match="does not fit 0.mlp.post; got a width of 48; allowed: a site 56"):
        Probe.load(path, narrow)
    with pytest.raises(mt.errors.DataError, match="cannot read a probe from"):
        Probe.load(tmp_path / "none.safetensors")
    mt.edit.save_edits(path, [mt.edit.Zero("0.mlp_out")])
    with pytest.raises(mt.errors.DataError, match="cannot read a probe from .*no 'probe'"):
        Probe.load(path)


def test_what_the_command_saves_has_the_scores_that_the_call_gives(tmp_path: Any) -> None:
    path = tmp_path / "probe.safetensors"
    scores = mt.probes.probe(model(), rows(), folds=3, untrained=False, save=path)
    saved = Probe.load(path).scores
    for name in ("accuracy", "accuracy_lo", "control_task_hi", "surface", "selectivity"):
        assert np.allclose(saved[name], scores[name], equal_nan=True), name


def test_preferences_are_ranked_and_beside_the_likelihood() -> None:
    data = []
    for row in rows(32):
        ids = row["text"]
        data.append({"chosen": [*ids, 40], "rejected": [*ids, 41]})
    found = mt.probes.fit(model(), data, kind="preference", site="*.resid_post@-1", untrained=False)
    assert (found.scores["accuracy"] == 1).all()
    assert float(found.scores["surface"]) == 1
    assert float(found.scores["control_task"].max()) < 0.85
    base = [model().run([row["chosen"]]).logits[0, -2].log_softmax(-1) for row in data]
    ahead = np.mean([float(p[40] > p[41]) for p in base])
    assert float(found.scores["likelihood"]) == pytest.approx(ahead)
    assert found.direction(2).shape == (families.D_MODEL,)


def test_the_direction_of_preferences_is_what_chosen_texts_have_more_of() -> None:
    data = [{"chosen": [*row["text"], 40], "rejected": [*row["text"], 41]} for row in rows(32)]
    found = mt.probes.fit(model(), data, kind="preference", site="0.resid_pre@-1", untrained=False)
    table = model().hf.get_input_embeddings().weight.detach().double()
    gap = torch.nn.functional.normalize(table[40] - table[41], dim=0)
    assert float(found.direction(0) @ gap) > 0.999
    step = float(found.tensors["0.resid_pre@-1/step"][1])
    assert step == pytest.approx(float((table[40] - table[41]).norm()), rel=1e-4)


def test_a_signal_is_fitted_to_states() -> None:
    texts = [row["text"] for row in rows(60)]
    states = [model().run([ids], capture="1.resid_post@-1")["1.resid_post@-1"].flatten()[3].item() for ids in texts]
    noise = np.random.default_rng(0).standard_normal((60, 2)) * 0.05
    data = [{"text": ids, "label": [x + e for e in pair]} for ids, x, pair in zip(texts, states, noise, strict=True)]
    scores = mt.probes.probe(model(), data, kind="ridge", untrained=False)
    assert float(scores["r"][1]) > 0.5
    assert float(scores["ceiling"]) > 0.9
    assert abs(float(scores["r_turned"][1])) < 0.4


def told_by_the_last(n: int = 48) -> list[dict[str, Any]]:
    """Prompts of random tokens; the label is that of the last of them, one of six."""
    rng = np.random.default_rng(0)
    return [{"text": [*rng.integers(5, 60, 4).tolist(), 10 + i % 6], "label": "ab"[i % 6 > 2]} for i in range(n)]


def test_labels_of_a_weak_probe_that_is_always_right_are_as_good_as_true_ones() -> None:
    scores = mt.probes.weak_to_strong(model(), told_by_the_last(), weak="0.resid_pre@-1", l2=1e-3)
    assert float(scores["weak"]) == 1
    assert np.array_equal(scores["weak_to_strong"], scores["ceiling"])


def test_labels_of_a_weak_probe_that_knows_nothing_teach_less_than_true_ones() -> None:
    scores = mt.probes.weak_to_strong(model(), told_by_the_last(), weak="0.resid_pre@0", site="0.resid_pre@-1", l2=1e-3)
    weak, taught, ceiling = (float(scores[name].squeeze()) for name in ("weak", "weak_to_strong", "ceiling"))
    assert ceiling == 1
    assert weak < 0.75
    assert taught < 0.85
    assert float(scores["recovered"].squeeze()) == pytest.approx((taught - weak) / (ceiling - weak))


def test_weak_to_strong_refuses_groups_that_leak() -> None:
    same = [{"text": [5, 6, 7, 8 + i // 2 % 3 * 20], "label": "ab"[i % 2], "group": i} for i in range(4)]
    with pytest.raises(mt.errors.DataError, match="groups leak"):
        mt.probes.weak_to_strong(model(), same)


def test_a_shift_is_tested_on_its_group_alone() -> None:
    data = [row | {"group": f"g{i % 4}"} for i, row in enumerate(rows(48))]
    scores = mt.probes.probe(model(), data, shift=("g3",), folds=3, untrained=False)
    assert scores.attrs["rows"] == 36
    assert float(scores["shifted_last"]) == pytest.approx(float(scores["shifted"][-1]))
    assert float(scores["shifted_diff"][-1]) == pytest.approx(0)
    inside = [row for row in data if row["group"] != "g3"]
    probe = mt.probes.fit(model(), inside, folds=3, untrained=False)
    outside = [row for row in data if row["group"] == "g3"]
    named = probe.predict(model(), [row["text"] for row in outside], 1)
    right = np.mean([name == row["label"] for name, row in zip(named, outside, strict=True)])
    assert float(scores["shifted"][1]) == pytest.approx(right)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt_neox-parallel", "gpt2"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post"])
def test_what_the_branches_write_sums_to_the_logit(family: str, site: str) -> None:
    own = mt.open(families.build(family), prove=False)
    if mt.anatomy.Site(site, 1) not in own.anatomy.hook_points:
        return
    found = mt.probes.fit(own, rows(), site=f"1.{site}@-1", untrained=False, folds=2)
    text = rows()[3]["text"]
    data = mt.probes.parts(found, own, text, 1, "odd")
    logits = found.logits(own, [text], 1)[0] - found.reader(1).tensors["bias"]
    assert float(data["logit"]) == pytest.approx(float(logits[1] - logits[0]), rel=1e-4)
    assert abs(float(data["rest"])) < 1e-4 * (1 + abs(float(data["logit"])))
    before = (
        mt.probes.fit(own, rows(), site="0.resid_mid@-1", untrained=False, folds=2) if site == "resid_mid" else None
    )
    if before is not None and own.anatomy.parts.form != "parallel":
        # The last thing that is written before it: its gradient is what it writes.
        last = mt.probes.parts(before, own, text, 0)
        assert float(last["attn_gradient"][0]) == pytest.approx(float(last["attn"][0]), abs=1e-5)


def test_states_that_are_not_finite_are_refused_by_layer_and_row() -> None:
    hf = families.build("llama-gqa")
    hf.get_submodule("model.layers.1.mlp.down_proj").weight.data[0, 0] = float("nan")
    with pytest.raises(mt.errors.DataError, match="what 1.resid_post holds of row 0 is not finite"):
        mt.probes.probe(mt.open(hf, prove=False), rows(), untrained=False)
