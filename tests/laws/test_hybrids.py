"""Models whose layers differ: methods measure what each layer has, as plain hooks do, else give NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tests.scripts import script
from torch import Tensor

import microtome as mt
from microtome.anatomy import Site
from microtome.method.runner import measure
from microtome.stream import ExampleMeans

configs = script("tools/family_configs.py")
ANSWER, FOIL = 11, 13
CLEAN = configs.prompt(1, 12, seed=1)
CORRUPT = CLEAN.clone()
CORRUPT[0, 4] = 7


@cache
def hybrid() -> mt.Model:
    """Layers of gated convolution and of attention."""
    return mt.open(configs.build("lfm2"))


def mixers(model: mt.Model) -> list[bool]:
    return [layer.mixer is not None for layer in model.anatomy.parts.layers]


@contextmanager
def hooked(hf: Any, path: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what a module gives."""

    def after(module: Any, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = hf.get_submodule(path).register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def logits(hf: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return hf(input_ids=tokens).logits[:, -1].double()


def written(hf: Any, path: str, tokens: Tensor) -> Tensor:
    kept: list[Tensor] = []
    with hooked(hf, path, lambda x: (kept.append(x.clone()), x)[1]):
        logits(hf, tokens)
    return kept[0]


def difference(x: Tensor) -> float:
    return float(x[0, ANSWER] - x[0, FOIL])


def branch(model: mt.Model, name: str, layer: int) -> str:
    parts = model.anatomy.parts.layers[layer]
    return str({"attn": parts.attn_writes, "mixer": parts.mixer_writes, "mlp": parts.mlp_writes}[name])


@pytest.mark.parametrize("name", ["attn", "mixer", "mlp"])
def test_patching_is_that_of_hooks_where_a_layer_has_the_branch(name: str) -> None:
    model = hybrid()
    data = mt.explain.patch(model, CLEAN, CORRUPT, answer=ANSWER, foil=FOIL, share=False)
    effects, at = data[f"{name}_out"].values, CLEAN.shape[1] - 1
    there = [Site(f"{name}_out", i) in model.anatomy.hook_points for i in range(model.anatomy.n_layers)]
    assert there == [name == "mlp" or mixed == (name == "mixer") for mixed in mixers(model)]
    assert (np.isfinite(effects).all(1) == there).all()
    assert (np.isnan(effects).all(1) != there).all()
    start = difference(logits(model.hf, CORRUPT))
    found = []
    for layer in np.flatnonzero(there):
        path = branch(model, name, layer)
        own = written(model.hf, path, CLEAN)

        def put(x: Tensor, own: Tensor = own) -> Tensor:
            x = x.clone()
            x[:, at] = own[:, at]
            return x

        with hooked(model.hf, path, put):
            found.append(difference(logits(model.hf, CORRUPT)) - start)
        assert effects[layer, at] == pytest.approx(found[-1], abs=1e-4)
    assert max(map(abs, found)) > 1e-2


def test_attribution_ranks_what_there_is_and_measures_it() -> None:
    model = hybrid()
    data = mt.explain.attribute(model, CLEAN, CORRUPT, answer=ANSWER, foil=FOIL, verify=4)
    exact = mt.explain.patch(model, CLEAN, CORRUPT, answer=ANSWER, foil=FOIL, share=False)
    for name in ("attn_out", "mixer_out", "mlp_out", "attn.z[head]"):
        assert (np.isnan(data[name]) == np.isnan(exact[name])).all(), name
        measured = np.isfinite(data[f"{name}_exact"].values)
        assert 4 <= measured.sum() <= 8
        np.testing.assert_allclose(data[f"{name}_exact"].values[measured], exact[name].values[measured], atol=1e-4)


def test_the_parts_of_a_hybrid_sum_to_the_logit() -> None:
    model = hybrid()
    data = mt.explain.contributions(model, CLEAN, answer=ANSWER, foil=FOIL)
    assert float(abs(data["gap"]).max()) < 1e-4
    assert data.attrs["parts"] == ["embed", "constant", "attn", "attn_bias", "mixer", "mlp"]
    final = written(model.hf, model.anatomy.parts.layers[-1].block, CLEAN)[0, -1].double()
    norm = model.final_norm
    assert norm is not None
    u = (model.W_U[:, ANSWER] - model.W_U[:, FOIL]).double() * norm.gain / norm.scale(final)
    for i, mixed in enumerate(mixers(model)):
        assert bool(np.isnan(data["attn"].values[0, i]).all()) == mixed
        value = float(data["mixer"].values[0, i])
        if mixed:
            own = written(model.hf, branch(model, "mixer", i), CLEAN)[0, -1].double() @ u.detach()
            assert value == pytest.approx(float(own), abs=1e-5)
            assert abs(value) > 1e-3
        else:
            assert np.isnan(value)


def test_blocks_of_one_branch_each_sum_to_the_logit_too() -> None:
    model = mt.open(configs.build("nemotron_h"))
    data = mt.explain.contributions(model, CLEAN, answer=ANSWER)
    assert float(abs(data["gap"]).max()) < 1e-4
    there = np.stack([np.isfinite(data[name].values[0]).reshape(data.sizes["layer"], -1).all(1)
                      for name in ("attn", "mixer", "mlp")])  # fmt: skip
    assert there.sum(0).tolist() == [1] * model.anatomy.n_layers


def test_neurons_that_are_not_seen_are_not_split() -> None:
    model = mt.open(configs.build("deepseek_v3"))
    with pytest.raises(mt.errors.SiteError, match="by neuron; got no mlp.post in layer 1: the layer is"):
        mt.explain.contributions(model, CLEAN, detail=("neuron",))


def test_tracing_restores_the_layers_of_a_window_that_have_the_branch() -> None:
    model, at = hybrid(), 6
    data = mt.explain.causal_trace(model, CLEAN, subject=(4, 5), answer=ANSWER, corrupt=CORRUPT, window=3)
    kinds = mixers(model)
    n = len(kinds)
    for name, wanted in (("attn", False), ("mixer", True)):
        for layer in range(n):
            window = [i for i in range(max(0, layer - 1), min(n, layer + 2)) if kinds[i] == wanted]
            got = data[name].values[layer]
            assert np.isnan(got).all() == (not window)
            if not window:
                continue
            assert not got[:4].any()
            edits = [mt.edit.Patch(f"{i}.{name}_out@{at}", source=model.run(CLEAN, f"{i}.{name}_out")) for i in window]
            literal = model.run(CORRUPT, edits=edits).logits[0, -1].softmax(-1)[ANSWER]
            base = model.run(CORRUPT).logits[0, -1].softmax(-1)[ANSWER]
            assert got[at] == pytest.approx(float(literal - base), abs=2e-6)
    assert np.nanmax(abs(data["mixer"].values)) > 1e-4


def test_knocking_out_attention_is_nan_where_no_layer_of_the_window_attends() -> None:
    model = hybrid()
    data = mt.explain.attention_knockout(model, CLEAN, keys=(4, 6), answer=ANSWER, window=1, controls=2)
    attends = [not mixed for mixed in mixers(model)]
    assert np.isfinite(data["probability"].values).tolist() == attends
    layer = attends.index(True)
    cut = model.run(CLEAN, edits=mt.edit.KnockOut(f"{layer}.attn.scores@-1", keys="4-5")).logits
    literal = (cut[0, -1].softmax(-1) - model.run(CLEAN).logits[0, -1].softmax(-1))[ANSWER]
    assert float(data["probability"][layer]) == pytest.approx(float(literal), abs=1e-6)
    assert abs(float(literal)) > 1e-5
    wide = mt.explain.attention_knockout(model, CLEAN, keys=(4, 6), answer=ANSWER, window=3, controls=2)
    assert np.allclose(wide["probability"].values, float(literal), atol=1e-6), "one layer of every window attends"


def test_measures_of_a_hybrid_are_of_the_branches_that_a_layer_has() -> None:
    model, text = hybrid(), configs.prompt(8, 24, seed=5)
    losses = measure(model, "ablation_loss", text=text)
    shares = measure(model, "stream", text=text)
    run = model.run(text, ["*.resid_pre"])
    log = run.logits[:, :-1].double().log_softmax(-1).gather(-1, text[:, 1:, None]).mean()
    for i, mixed in enumerate(mixers(model)):
        other, own = ("attn", "mixer") if mixed else ("mixer", "attn")
        for data, name in ((losses, "loss_skip_{}"), (shares, "{}_share"), (shares, "{}_cos")):
            for end in ("", "_lo", "_hi"):
                assert np.isnan(data[name.format(other) + end].values[i]), name
                assert np.isfinite(data[name.format(own) + end].values[i]), name
        path = branch(model, own, i)
        with hooked(model.hf, path, torch.zeros_like), torch.no_grad():
            again = model.hf(input_ids=text).logits[:, :-1].double().log_softmax(-1)
        literal = log - again.gather(-1, text[:, 1:, None]).mean()
        assert float(losses[f"loss_skip_{own}"][i]) == pytest.approx(float(literal), abs=1e-5)
        added = written(model.hf, path, text).norm(dim=-1) / run[f"{i}.resid_pre"].norm(dim=-1)
        assert float(shares[f"{own}_share"][i]) == pytest.approx(float(added[:, 1:].mean()), rel=1e-4)
    assert np.nanmax(abs(losses["loss_skip_mixer"].values)) > 1e-3


def test_a_model_without_attention_is_patched_and_traced() -> None:
    model = mt.open(configs.build("mamba2"))
    data = mt.explain.patch(model, CLEAN, CORRUPT, answer=ANSWER, foil=FOIL)
    assert {"resid_pre", "mixer_out"} <= set(data.data_vars)
    assert not {"attn_out", "mlp_out", "attn.z[head]"} & set(data.data_vars)
    assert float(data["resid_pre"][0, 4]) == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(mt.errors.SiteError, match="has mlp_out in no layer; got the block has no MLP"):
        mt.explain.patch(model, CLEAN, CORRUPT, answer=ANSWER, sites=["mlp_out"])
    traced = mt.explain.causal_trace(model, CLEAN, subject=(4, 5), answer=ANSWER, corrupt=CORRUPT)
    assert {"resid", "mixer"} <= set(traced.data_vars)
    with pytest.raises(mt.errors.SiteError, match="has attn_out in no layer; got the block has no attention"):
        mt.explain.causal_trace(model, CLEAN, subject=(4, 5), answer=ANSWER, kinds=["attn"])


def test_means_of_units_that_there_are_not_are_nan() -> None:
    means, values = ExampleMeans(3), torch.tensor([[1.0, torch.nan, 3.0], [3.0, torch.nan, 5.0]])
    with pytest.raises(mt.errors.DataError, match="not finite"):
        ExampleMeans(3).update(values, torch.arange(2))
    absent = torch.tensor([False, True, False])
    means.update(values, torch.arange(2), absent=absent)
    means.update(values[:1], torch.tensor([2]), absent=absent)
    assert means.mean[[0, 2]].tolist() == [5 / 3, 11 / 3]
    assert bool(means.mean[1].isnan())
