"""What holds of every method on models whose weights say something: see `tests.twins`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from tests import twins
from tests.contract.test_contract import OF_EXPERTS, PLANTED, RESULTS, arguments, model, numbers, run

ON_MODELS = [name for name in RESULTS if name not in (*PLANTED, *OF_EXPERTS)]
BRANCHES = {"sites": ["mlp_out", "attn_out"]}
WAYS: dict[str, tuple[dict[str, Any], ...]] = {
    "attribute": (BRANCHES, {"method": "relp"}, {"method": "eap"}),
    "patch": (BRANCHES,),
    "component_effects": ({"components": "heads", "receivers": "heads", "ablation": "zero"},),
    "contributions": ({"detail": ("source", "neuron")},),
}
"""Arguments with which a method takes another way than with those of the contract, and is tried once more."""

OF_WEIGHTS = {
    "context_update": ("update", "reads"),
    "memorised": ("attn_gradient", "mlp_gradient"),
    "weight_mask": ("",),
}
"""By method, what is of weights, of their gradients, or of what is trained on them: those with the gains in them are
others."""

RANKS = {"referee": 0.02}
"""By method, how far ranks may be: effects that are nothing but rounding have ranks of their own."""

LAST = {"corrupt": [7, 20, 34, 41, 52, 61], "subject": (2, 6)}
"""Prompts that differ at the last token too: without attention nothing else would tell."""


@cache
def results(name: str, kind: str) -> list[xr.Dataset]:
    """What a method finds, in each of its ways."""
    own = arguments(name, kind)
    if "scores" in own:
        own["scores"] = results("attribute", kind)[0]
    own |= {key: value for key, value in LAST.items() if key in own}
    return [run(name, kind, given=own | way) for way in ({}, *WAYS.get(name, ()))]


@pytest.mark.parametrize("kind", twins.FOLDED)
def test_the_twins_compute_the_same_and_their_gains_matter(kind: str) -> None:
    tokens = torch.arange(5, 65).reshape(4, 15)
    gains, folded, plain = (model(f"{kind}{end}").run(tokens).logits for end in ("/gains", "/folded", ""))
    assert (gains - folded).abs().max() < 1e-4
    assert (gains - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (i > 0)) for i, k in enumerate(twins.FOLDED)]
)
@pytest.mark.parametrize("name", ON_MODELS)
def test_gains_moved_into_the_weights_change_no_number(name: str, kind: str) -> None:
    """A method that leaves a gain out, anywhere, reads other numbers of two models that compute the same."""
    for one, other in zip(results(name, f"{kind}/gains"), results(name, f"{kind}/folded"), strict=True):
        for key, x in numbers(one).items():
            if key.startswith(OF_WEIGHTS.get(name, ("-",))):
                continue
            if key.endswith("_p"):
                continue  # of few examples it has few steps, and rounding decides ties; its examples are compared
            rtol = 2**-7 if key.endswith("_around") else 2e-3  # passages are kept in bfloat16, whose steps are 2**-8
            atol = RANKS.get(name, 2e-4)
            assert np.allclose(x, numbers(other)[key], rtol=rtol, atol=atol, equal_nan=True), key


def of_branch(data: xr.Dataset, branch: str) -> dict[str, np.ndarray]:
    """What is known of a branch: variables and labels of an axis that bear its name."""
    found: dict[str, np.ndarray] = {}
    for key, x in data.data_vars.items():
        unit = str(x.attrs["unit"])
        if (
            x.dtype.kind != "f"
            or str(key).endswith(("_p", "_control", "_lo", "_hi"))
            or "per" in unit
            or x.isnull().all()
        ):
            continue
        if branch in str(key):
            found[str(key)] = x.values
        for axis in {"component", "sender"} & set(map(str, x.dims)):
            found[f"{key} by {axis}"] = x.isel({axis: [branch in str(label) for label in x[axis].values]}).values
    return {key: x for key, x in found.items() if np.isfinite(x).any()}


NAMING = [
    "ablation_loss", "attribute", "causal_trace", "component_effects", "contributions", "edge_effects", "fourier",
    "node_effects", "patch", "stream", "token_lens", "verify",
]  # fmt: skip
"""Methods that name branches in what they return."""
OTHERWISE = {"circuit", "completeness", "flow", "memorised", "roles", "signals"}
"""Those that name them too, but only parts of a circuit, or say nothing of one that adds nothing, or of its gradient,
which it has all the same."""


@pytest.mark.parametrize("kind", twins.MUTE)
@pytest.mark.parametrize(("mute", "other"), [("mlp", "attn"), ("attn", "mlp")])
@pytest.mark.parametrize("name", NAMING)
def test_a_branch_that_adds_nothing_is_given_nothing(name: str, mute: str, other: str, kind: str) -> None:
    """Where sites are confused, one branch is given what the other does."""
    for data in results(name, f"{kind}/no {mute}"):
        silent, loud = of_branch(data, mute), of_branch(data, other)
        assert silent
        for key, x in silent.items():
            assert float(np.nanmax(np.abs(x))) < 1e-5, key
        assert max(float(np.nanmax(np.abs(x))) for x in loud.values()) > 1e-3


def test_every_method_that_names_branches_is_among_them() -> None:
    kind = "llama-gqa/folded"
    named = {name for name in ON_MODELS if all(of_branch(results(name, kind)[0], part) for part in ("mlp", "attn"))}
    assert named == set(NAMING) | OTHERWISE
