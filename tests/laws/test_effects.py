"""Direct effects and repairs sum to the whole with the norm held, and every effect is that of its literal forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from tests.agreement import Agreement
from torch.utils._python_dispatch import TorchDispatchMode

import microtome as mt
from microtome.stream import mean_interval, sign_flip

ROWS = [[7, 20, 33, 41, 52], [9, 21, 34, 42, 53], [8, 22, 35, 43, 54]]
OTHERS = [[5, 20, 33, 41, 52], [9, 21, 36, 42, 53], [8, 27, 35, 43, 54]]
ANSWERS, FOILS = [11, 12, 13], [14, 15, 16]
SEQUENTIAL = ["llama-gqa", "gpt2", "gpt_neox-sequential", "gemma2", "opt-prenorm", "granite"]
PARALLEL = ["gptj", "gpt_neox-parallel", "falcon-mqa", "cohere"]


def difference(logits: torch.Tensor, i: int, cap: float | None = None) -> float:
    logits = logits[0, -1].double()
    logits = logits if cap is None else torch.atanh(logits / cap) * cap
    return float(logits[ANSWERS[i]] - logits[FOILS[i]])


def held(model: mt.Model, i: int, edits: list[mt.edit.Edit]) -> float:
    """The logit difference before any cap, with the final norm's scale that of the clean run: one literal forward."""
    clean = model.run([ROWS[i]], capture="final.scale")
    logits = model.run([ROWS[i]], edits=[*edits, mt.edit.Patch("final.scale", source=clean)]).logits
    return difference(logits, i, model.anatomy.logit_softcap)


@pytest.mark.parametrize("name", families.some(3, SEQUENTIAL + PARALLEL))
def test_direct_and_repairs_sum_to_the_whole_with_the_norm_held(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    plain = not any(part.attn_post_norm for part in model.anatomy.parts.layers)
    names = ["0.attn_out", "0.mlp_out", "1.attn.z[2]", "1.mlp_out", "2.attn_out", "0.attn.z[1]"]
    wholes, totals, norms = (Agreement(2e-5) for _ in range(3))
    for receivers in ("branches", "heads") if plain else ("branches",):
        data = mt.explain.component_effects(
            model, ROWS, answer=ANSWERS, foil=FOILS, components=names, receivers=receivers, ablation="zero"
        )
        for i in range(3):
            before = held(model, i, [])
            for name in names:
                edits: list[mt.edit.Edit] = [mt.edit.Zero(f"{name}@-1")]
                one = data.sel(component=name)
                whole = float(one["direct_each"][i] + one["repair_each"][i].sum())
                wholes(whole, held(model, i, edits) - before, name)
                literal = difference(model.run([ROWS[i]], edits=edits).logits, i)
                clean = difference(model.run([ROWS[i]]).logits, i)
                totals(one["total_each"][i], literal - clean, name)
                assert float(data["clean"][i]) == pytest.approx(clean, abs=1e-4)
                norms(one["norm_each"][i], literal - clean - whole, name)
        repairs = abs(data["repair_each"]).max("receiver").values
        assert float((repairs > 2e-4).mean()) > 0.6  # but of the last layer, behind which nothing can repair
    for agree in (wholes, totals, norms):
        agree.stands_out(0.8)
    if name in PARALLEL:  # an MLP beside the attention cannot repair it
        assert abs(float(data["repair_each"].sel(component="0.attn_out", receiver="0.mlp_out").max())) < 1e-6


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("ablation", ["mean", "resample", "corrupt"])
def test_each_ablation_is_its_literal_forward(ablation: str, everywhere: bool) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    names, at = ["0.mlp_out", "1.attn.z[2]", "2.attn_out"], "" if everywhere else "@-1"
    corrupt = OTHERS if ablation == "corrupt" else None
    with mt.settings(seed=3):
        data = mt.explain.component_effects(
            model, ROWS, answer=ANSWERS, foil=FOILS, components=names, ablation=ablation, corrupt=corrupt,
            everywhere=everywhere,
        )  # fmt: skip
    sites = ["0.mlp_out", "1.attn.z", "2.attn_out"]
    means = mt.change.means(model, ROWS, [s + at for s in sites])
    drawn = mt.change.resampled(model, ROWS, sites, seed=3)
    agree = Agreement(2e-5)
    for i in range(3):
        clean = difference(model.run([ROWS[i]]).logits, i)
        for name, site in zip(names, sites, strict=True):
            if ablation == "mean":
                mean = means[site + at][2] if "[" in name else means[site + at]
                edit: mt.edit.Edit = mt.edit.Set(name + at, value=mean)
            elif ablation == "resample":
                edit = mt.edit.Patch(name + at, source={site: drawn[site][i : i + 1]})
            else:
                edit = mt.edit.Patch(name + at, source=model.run([OTHERS[i]], capture=site))
            literal = difference(model.run([ROWS[i]], edits=[edit]).logits, i) - clean
            agree(data["total_each"].sel(component=name)[i], literal, name)
    agree.stands_out(0.8)


def test_all_components_and_what_cannot_act() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    data = mt.explain.component_effects(model, ROWS, answer=11, components="heads", receivers="heads", ablation="zero")
    assert data.sizes["component"] == data.sizes["receiver"] == 3 * 5
    repair = abs(data["repair_each"].values)
    layer = [int(str(c).split(".")[0]) for c in data["component"].values]
    for i, a in enumerate(layer):
        for j, b in enumerate(layer):
            head_of_same = a == b and not (str(data["component"].values[i]).endswith("]") and j % 5 == 4)
            if b < a or head_of_same:
                assert repair[:, i, j].max() < 1e-5  # nothing comes before, or beside
    assert float(abs(data["indirect"] - (data["total"] - data["direct"])).max()) < 1e-12
    totals = data["total"].values
    assert float(data["total_control"][0]) == pytest.approx(totals[1:4].mean())
    assert float(data["total_control"][4]) == pytest.approx(totals[[9, 14]].mean())  # the MLPs of other layers
    branches = mt.explain.component_effects(model, ROWS, answer=11, ablation="zero")
    totals = branches["total"].values
    for i in range(6):  # attention and MLP by turns
        others = [j for j in range(6) if j % 2 == i % 2 and j != i]
        assert float(branches["total_control"][i]) == pytest.approx(totals[others].mean())
    alone = mt.explain.component_effects(
        model, ROWS, answer=11, components=["1.attn.z[2]", "2.mlp_out"], ablation="zero"
    )
    assert bool(alone["total_control"].isnull().all())  # nothing is like them
    rows = [*ROWS, *(row[::-1] for row in ROWS), *ROWS[:4]][:8]
    many = mt.explain.component_effects(model, rows, answer=11, ablation="zero")
    for name in ("total", "direct", "repair"):  # the same example is subtracted
        each = torch.from_numpy(many[f"{name}_each"].values)
        like = torch.stack([each[:, [j for j in range(6) if j % 2 == i % 2 and j != i]].mean(1) for i in range(6)], 1)
        less, low, high = mean_interval(each - like)
        for end, expected in (("", less), ("_lo", low), ("_hi", high), ("_p", sign_flip(each - like))):
            assert np.allclose(many[f"{name}_diff{end}"], expected, atol=1e-9), (name, end)
    assert data.attrs["ablation"] == "zero"
    for said in (data.attrs["sign"], data.attrs["reading"], data["total"].attrs["meaning"]):
        assert "ablated minus clean" in said  # which the literal ablations above are
    slope = data["slope"].values
    each, sums = data["direct_each"].values[:, 0], data["repair_each"].values[:, 0].sum(-1)
    d = each - each.mean()
    assert slope[0] == pytest.approx((d * (sums - sums.mean())).sum() / (d * d).sum())


def test_only_the_rows_that_are_read_are_widened() -> None:
    """The unembedding is large, and each example reads one or two rows of it."""
    model = mt.open(families.build("llama-gqa"), prove=False)
    shapes: set[tuple[int, ...]] = set()

    class Widened(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
                shapes.add(tuple(sorted(made.shape)))
            return made

    with Widened():
        mt.explain.component_effects(model, ROWS, answer=ANSWERS, foil=FOILS)
    assert shapes
    assert tuple(sorted(model.W_U.shape)) not in shapes


def test_a_task_gives_prompts_answers_and_corrupt_prompts() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    task = mt.tasks.build("induction", model, 3, length=4)
    data = mt.explain.component_effects(model, task, components=["1.mlp_out", "heads"], ablation="corrupt")
    same = mt.explain.component_effects(
        model, task.clean_tokens, answer=[p.answer_ids[0] for p in task], foil=[p.foil_ids[0] for p in task],
        corrupt=task.corrupt_tokens, components=["1.mlp_out", "heads"], ablation="corrupt",
    )  # fmt: skip
    assert data.equals(same)
    assert data["component"].values[:2].tolist() == ["1.mlp_out", "0.attn.z[0]"]
    assert data.attrs["examples"] == 3
    assert data.attrs["metric"] == "logit difference"
    assert float(abs(data["total"]).max()) > 1e-3


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"components": ["0.resid_pre"]}, '"0.resid_pre" is not a component; allowed: heads'),
        ({"components": "mlps"}, '"mlps" is not a component; .* "\\*.mlp_out", or the words "branches" and'),
        ({"components": ["0.mlpout"]}, '"0.mlpout" is not a component; allowed: heads'),
        ({"components": ["0.attn_out@2"]}, '"0.attn_out@2" is not a component'),
        ({"answer": [11, 12]}, "there must be one answer per example; got 2; allowed: 3"),
        ({"foil": ANSWERS}, 'the foil equals the answer in example 0; got "11"'),
        ({"answer": " Paris"}, 'cannot read " Paris": this model was opened without a tokenizer'),
        ({"ablation": "sideways"}, "ablation must be one of zero, mean, resample, corrupt; got 'sideways'"),
        ({"receivers": "sideways"}, "receivers must be one of branches, heads; got 'sideways'"),
        ({"ablation": "corrupt"}, "there is nothing to ablate with"),
        ({"ablation": "corrupt", "corrupt": OTHERS[:2]}, "one corrupt prompt per prompt; got 2; allowed: 3"),
        ({"ablation": "corrupt", "corrupt": [[1, 2], *OTHERS[1:]]}, "differ first at token 0; got 5 and 2 tokens"),
        ({"prompts": [*ROWS, [5, 6]], "answer": 11, "foil": 12, "ablation": "resample"}, "no other prompt of 2"),
    ],
)  # fmt: skip
def test_what_has_no_effect_to_measure_is_refused(change: dict[str, object], text: str) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    arguments = {"prompts": ROWS, "answer": ANSWERS, "foil": FOILS} | change
    with pytest.raises(mt.errors.MicrotomeError, match=text):
        mt.explain.component_effects(model, arguments.pop("prompts"), **arguments)


def test_models_without_such_a_sum_are_refused() -> None:
    with pytest.raises(mt.errors.SiteError, match="the sum of what branches write; got norms on the resid"):
        mt.explain.component_effects(mt.open(families.build("bert"), prove=False), ROWS, answer=11)
    with pytest.raises(mt.errors.SiteError, match="a norm follows the heads"):
        mt.explain.component_effects(mt.open(families.build("gemma2"), prove=False), ROWS, answer=11, receivers="heads")
