"""Arithmetic with groups against plain edited runs, what changes nothing, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt
from microtome.edit import Add, Zero
from microtome.measurements import group_arithmetic, token_loss
from microtome.measurements._lens_groups import group_tokens

SETS: dict[str, list[tuple[int, int]]] = {"a": [(0, 3), (0, 9), (2, 1)], "b": [(1, 4), (2, 7)], "c": [(1, 1)]}


def ids(rows: int, seed: int, low: int, high: int) -> Tensor:
    return torch.randint(low, high, (rows, 12), generator=torch.Generator().manual_seed(seed))


TEXT = {"a": ids(9, 0, 5, 25), "b": ids(8, 1, 20, 45)}


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


def test_it_is_what_plain_edits_do_to_losses_and_probabilities(model: mt.Model) -> None:
    data = group_arithmetic(model, SETS, TEXT, target="a", other="b", strength=2.0)
    run = model.run(TEXT["a"], capture="*.mlp.post")
    means = {i: run[f"{i}.mlp.post"][:, 1:].detach().double().mean((0, 1)).float() for i in range(3)}
    down = [Zero("1.mlp.post[4]"), Zero("2.mlp.post[7]")]
    up = [Add("0.mlp.post[3,9]", value=2 * means[0][[3, 9]]), Add("2.mlp.post[1]", value=2 * means[2][[1]])]
    counts = torch.stack([torch.bincount(x[:, 1:].flatten(), minlength=families.VOCAB) for x in TEXT.values()])
    belongs = group_tokens(counts.double())
    assert data["vocabulary"].values.tolist() == [int((belongs == g).sum()) for g in range(2)]
    for g, (group, rows) in enumerate(TEXT.items()):
        assert float(data["text_share"][g, g]) == pytest.approx(float((belongs[rows[:, 1:]] == g).double().mean()))
        base = model.run(rows).logits.detach()
        for name, edits in {"scale": down, "add": up, "both": [*down, *up]}.items():
            logits = model.run(rows, edits=edits).logits.detach()
            own = data.sel(group=group, edit=name)
            rise = (token_loss(logits, rows) - token_loss(base, rows)).double().mean()
            assert float(own["rise"]) == pytest.approx(float(rise), abs=1e-6)
            for h in range(2):
                after, before = (x[:, :-1].softmax(-1)[..., belongs == h].sum(-1).mean() for x in (logits, base))
                assert float(own["shift"][h]) == pytest.approx(float(after - before), abs=1e-6)
                assert float(own["share"][h]) == pytest.approx(float(before), abs=1e-6)
    assert data["neurons"].values.tolist() == [2, 3, 5]
    for name in ("rise", "shift"):
        np.testing.assert_allclose(data[f"{name}_diff"], data[name] - data[f"{name}_random"], atol=1e-12)
        assert (data[f"{name}_lo"] <= data[name]).all()
        assert (data[name] <= data[f"{name}_hi"]).all()
    assert (data["shift_random"] != 0).all()


def test_nothing_added_and_nothing_scaled_changes_nothing(model: mt.Model) -> None:
    data = group_arithmetic(model, SETS, TEXT, target="b", other="a", strength=0, scale=1, controls=0)
    assert not {"rise_random", "shift_diff"} & set(data)
    for name in ("rise", "shift"):
        assert float(abs(data[name]).max()) < 1e-6, name


def test_a_group_without_tokens_to_predict_has_no_value(model: mt.Model) -> None:
    text = TEXT | {"c": ids(1, 2, 5, 45)[:, :1]}
    data = group_arithmetic(model, SETS, text, target="a", other="b", controls=1)
    whole = group_arithmetic(model, SETS, TEXT, target="a", other="b", controls=0)
    for name in ("loss", "rise", "rise_diff", "shift", "shift_random", "text_share"):
        assert data[name].sel(group="c").isnull().all(), name
        assert data[name].sel(group=["a", "b"]).notnull().all(), name
    np.testing.assert_allclose(data["rise"].sel(group=["a", "b"]), whole["rise"], atol=1e-6)
    with pytest.raises(mt.errors.DataError, match="the text of target has no tokens but first ones.*; got c"):
        group_arithmetic(model, SETS, text, target="c", other="b")


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        (("a", "a"), "target and other are the same group; got a"),
        (("x", "a"), "target has no set of neurons; got x"),
        (("a", "c"), "other has no text; got c"),
    ],
)
def test_a_pair_that_is_none_is_refused_in_one_line(model: mt.Model, pair: Any, told: str) -> None:
    with pytest.raises(mt.errors.ArgumentError) as refused:
        group_arithmetic(model, SETS, TEXT, target=pair[0], other=pair[1])
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
