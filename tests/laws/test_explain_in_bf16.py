"""Every method runs on a model in bfloat16 and returns finite numbers, near those of the same weights in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from tests import families

import microtome as mt
from microtome.explain._first_order import changes

CLEAN, CORRUPT = [7, 20, 33, 41, 52, 28], [7, 20, 64, 41, 52, 28]
ROWS = [CLEAN, [9, 21, 34, 42, 53, 60], [8, 22, 35, 43, 54, 61]]
PAIR = {"answer": 11, "foil": 13}
METHODS: dict[str, tuple[str, Callable[[mt.Model], object]]] = {
    "patch": ("mlp_out", lambda m: mt.explain.patch(m, CLEAN, CORRUPT, **PAIR)),
    "patch, of several": (
        "mlp_out",
        lambda m: mt.explain.patch(m, [CLEAN] * 2, [CORRUPT] * 2, **PAIR, sites=["mlp_out"], share=False),
    ),
    "node_effects": ("effect", lambda m: mt.explain.node_effects(m, CLEAN, CORRUPT, **PAIR)),
    "edge_effects": ("effect", lambda m: mt.explain.edge_effects(m, CLEAN, CORRUPT, **PAIR)),
    "atp": ("mlp_out", lambda m: mt.explain.attribute(m, CLEAN, CORRUPT, **PAIR, verify=3)),
    "relp": ("mlp_out", lambda m: mt.explain.attribute(m, CLEAN, CORRUPT, **PAIR, method="relp", verify=3)),
    "eap": ("score", lambda m: mt.explain.attribute(m, CLEAN, CORRUPT, **PAIR, method="eap", verify=3)),
    "component_effects": ("total", lambda m: mt.explain.component_effects(m, ROWS, answer=11, foil=13)),
    "causal_trace": ("resid", lambda m: mt.explain.causal_trace(m, CLEAN, subject=(2, 4), answer=11, samples=2)),
    "attention_knockout": (
        "log_probability",
        lambda m: mt.explain.attention_knockout(m, CLEAN, keys=(1, 3), answer=11),
    ),
    "contributions": ("mlp", lambda m: mt.explain.contributions(m, CLEAN, answer=11)),
    "logit_lens": ("", lambda m: mt.explain.logit_lens(m, CLEAN)),
}


@cache
def models() -> tuple[mt.Model, mt.Model]:
    narrow = families.build("llama-gqa").to(torch.bfloat16)
    at_least_float32 = families.build("llama-gqa")
    at_least_float32.load_state_dict({k: v.float() for k, v in narrow.state_dict().items()})
    return mt.open(narrow, prove=False), mt.open(at_least_float32, prove=False)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_in_bf16(name: str) -> None:
    variable, method = METHODS[name]
    narrow, at_least_float32 = (method(model) for model in models())
    if not variable:
        variable = next(str(v) for v in at_least_float32.data_vars if at_least_float32[v].dtype.kind == "f")
    values, exact = (np.asarray(data[variable].values) for data in (narrow, at_least_float32))
    assert values.dtype in (np.float32, np.float64)
    assert (np.isfinite(values) == np.isfinite(exact)).all()
    there = np.isfinite(exact)
    size = abs(exact[there]).max()
    assert size > 0
    assert abs(values[there] - exact[there]).max() < 0.15 * size + 0.02


def test_differences_of_runs_are_taken_in_float32() -> None:
    model = models()[0]
    sites = ["embed", "*.attn.z", "*.mlp_out"]
    start, goal = (model.run([row], capture=sites, grad=row is CLEAN) for row in (CLEAN, CORRUPT))
    found = changes(model, start, goal, None)
    assert found.dtype == torch.float32
    change = {s: goal[s].float() - start[s].detach().float() for s in ("1.attn.z", "1.mlp_out")}
    at = 1 + model.anatomy.n_heads + 1  # after the embedding and layer 0
    heads = torch.einsum("phd,hdm->hpm", change["1.attn.z"][0], model.layers[1].W_O.detach().float())
    torch.testing.assert_close(found[at : at + 4, 0], heads)
    torch.testing.assert_close(found[at + 4, 0], change["1.mlp_out"][0])
    logits = start.logits[0, -1].double()
    slope = start.grad(logits[PAIR["answer"]] - logits[PAIR["foil"]])["1.mlp_out"]
    scores = mt.explain.attribute(model, CLEAN, CORRUPT, **PAIR, sites=["mlp_out"], verify=0, direction="noise")
    exact = (change["1.mlp_out"].double() * slope.double()).sum(-1)[0]
    assert np.allclose(scores["mlp_out"][1], exact, rtol=1e-6, atol=1e-9)


def test_logits_under_a_cap_are_formed_in_float32() -> None:
    model = mt.open(families.build("gemma2").to(torch.bfloat16), prove=False)
    final = model.run([CLEAN], capture="final")["final"][0, -1].float()
    data = mt.explain.contributions(model, CLEAN, answer=11)
    assert float(data["logit"][0]) == pytest.approx(float(final @ model.W_U[:, 11].detach().float()), rel=1e-5)
