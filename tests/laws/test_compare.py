"""Two models compared: a model with itself has no change, exchanged roles exchange signs, what was changed is found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families

import microtome as mt
from microtome.errors import ArgumentError, DataError
from microtome.method import moved_most

TOKENS = torch.randint(5, families.VOCAB, (12, 24), generator=torch.Generator().manual_seed(1))


def built(change: Any = None) -> mt.Model:
    hf = families.build("llama-gqa")
    if change is not None:
        with torch.no_grad():
            change(hf)
    return mt.open(hf, prove=False)


def scaled(hf: Any) -> None:
    hf.model.layers[1].mlp.down_proj.weight.mul_(1.5)


def changes(data: Any) -> dict[str, np.ndarray]:
    return {
        str(n): data[n].values
        for n in data.data_vars
        if str(n).endswith(("_change", "_lo", "_hi")) or "moved" in str(n)
    }


def test_a_model_compared_with_itself_has_no_change() -> None:
    data = mt.compare(built(), built(), text=TOKENS)
    found = changes(data)
    assert len(found) > 60
    for name, values in found.items():
        assert float(np.nanmax(np.abs(values))) <= 1e-6, name
    assert all(row["certain"] in (0, None) for row in moved_most(data))


def test_exchanged_roles_exchange_signs() -> None:
    there, back = (mt.compare(*pair, text=TOKENS) for pair in ((built(), built(scaled)), (built(scaled), built())))
    moved = 0
    for name in (str(n) for n in there.data_vars if str(n).endswith("_change")):
        scale = max(1.0, float(np.nanmax(np.abs(there[name].values))))
        np.testing.assert_allclose(there[name], -back[name], atol=1e-6 * scale, err_msg=name)
        if f"{name}_lo" in there:
            np.testing.assert_allclose(there[f"{name}_lo"], -back[f"{name}_hi"], atol=1e-6 * scale, err_msg=name)
        moved += bool(np.nanmax(np.abs(there[name].values)) > 1e-3)
    assert moved > 20


def test_values_are_those_of_each_model_and_the_change_is_where_it_was_made() -> None:
    a, b = built(), built(scaled)
    data = mt.compare(a, b, "stream", "head_norms", "neuron_weights", "loss", text=TOKENS)
    for model, end in ((a, "a"), (b, "b")):
        alone = mt.measure(model, "stream", "head_norms", "neuron_weights", "loss", text=TOKENS)
        for name in ("mlp_share", "result_norm", "out_norm", "loss"):
            np.testing.assert_allclose(data[f"{name}_{end}"], alone[name], rtol=1e-6, err_msg=name)
    out = data["out_norm_change"].values / data["out_norm_a"].values
    np.testing.assert_allclose(out[1], 0.5, rtol=1e-5)
    assert np.abs(out[[0, 2]]).max() < 1e-6
    np.testing.assert_allclose(data["moved_W_out"], [0, 0.5, 0], atol=1e-6)
    assert float(np.abs(data["moved_W_Q"]).max()) == 0
    assert float(abs(data["result_norm_change"].sel(layer=[0, 1])).max()) < 1e-6, "nothing before the change moves"
    assert float(abs(data["result_norm_change"].sel(layer=2)).max()) > 1e-2
    best = next(row for row in moved_most(data) if row["column"] == "mlp_share")
    assert best["where"][0] == "1"
    assert best["certain"] >= 1


def test_the_interval_is_that_of_pairs() -> None:
    """Of the differences of loss, row by row, as runs of both models give them; unpaired ones would be wider."""
    from microtome.measurements import token_loss
    from microtome.stream import mean_interval

    a, b = built(), built(scaled)
    data = mt.compare(a, b, "loss", text=TOKENS)
    rows = [token_loss(m.run(TOKENS).logits, TOKENS).double().mean(1).numpy() for m in (a, b)]
    each = rows[1] - rows[0]
    _, *ends = mean_interval(torch.from_numpy(each)[:, None])
    assert float(data["loss_change"]) == pytest.approx(each.mean(), rel=1e-5)
    found = [float(data[f"loss_change_{end}"]) for end in ("lo", "hi")]
    np.testing.assert_allclose(found, [float(end) for end in ends], rtol=1e-3)
    spread = float(np.std(rows[0])) + float(np.std(rows[1]))
    assert found[1] - found[0] < 0.5 * spread, "rows differ more than the models do"


def test_what_does_not_correspond_is_refused() -> None:
    with pytest.raises(DataError, match=r"have other shapes.*n_kv_heads 2 and 4"):
        mt.compare(built(), mt.open(families.build("gpt2"), prove=False), text=TOKENS)
    with pytest.raises(ArgumentError, match="compares groups, not models"):
        mt.compare(built(), built(), "group_neurons", text=TOKENS)
    one = mt.open(families.build("llama-gqa"), tokenizer=lambda text, **_: {"input_ids": [5]}, prove=False)
    with pytest.raises(DataError, match="read text as other tokens"):
        mt.compare(one, built(), text=TOKENS)
