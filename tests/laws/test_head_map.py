"""What heads attend to: plain loops, closed forms, a simulation of recall, and merging."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from tests import families
from tests.plain_heads import plain
from torch import Tensor

import microtome as mt
from microtome.measurements import cmr_curve, fit_cmr, head_types, token_loss
from microtome.measurements._head_map import fewest, followers, ngram_shares, reach, spread
from microtome.measurements._head_similarity import divergence
from microtome.measurements._in_context import windows
from microtome.measurements._repeat_lags import LAGS, lag_curves
from microtome.method import Bound, Pass, RepeatedTokens, Text, declared
from microtome.stream import TokenBatch


def ids(rows: int = 4, length: int = 12, seed: int = 3, high: int = 12) -> Tensor:
    """Few kinds of tokens, so that n-grams occur twice."""
    return torch.randint(5, high, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


# ------------------------------------------------------------------------------------------------------------- head_map


@pytest.mark.parametrize("lead", [0, 1])
def test_the_map_of_heads_is_the_plain_one(model: mt.Model, lead: int) -> None:
    tokens = ids()
    data = mt.measure(model, "head_map", text=[TokenBatch.of(tokens, lead=lead)])
    run = model.run(tokens, capture="*.attn.pattern")
    for layer in range(3):
        pattern = run[f"{layer}.attn.pattern"].double().numpy()
        for head in range(4):
            expected = plain(pattern[:, head], tokens)
            for name, value in expected.items():
                assert float(data[name][layer, head]) == pytest.approx(value, abs=1e-6), (name, layer, head)
    own = {str(v) for v in data if not str(v).endswith(("_lo", "_hi", "_diff"))}
    assert own == set(expected)
    assert "ngram3_attention" in own
    assert "next_attention" not in own


def test_a_model_that_sees_both_ways_has_a_next_token_and_counts_all_keys() -> None:
    model = mt.open(families.build("bert"), prove=False)
    data = mt.measure(model, "head_map", text=ids())
    pattern = model.run(ids(), capture="0.attn.pattern")["0.attn.pattern"].double()
    ahead = pattern.diagonal(1, dim1=2, dim2=3)[..., 1:].sum(-1).sum(0) / (4 * 11)  # the last token has none after it
    assert np.allclose(data["next_attention"][0], ahead, atol=1e-6)
    assert np.allclose(data["next_uniform"], 10 / 11 / 12)
    assert np.allclose(data["k90_uniform"], 11)
    assert np.allclose(data["distance_uniform"], np.mean([abs(q - k) for q in range(1, 12) for k in range(12)]))


@pytest.mark.parametrize("causal", [True, False])
def test_even_attention_is_its_own_control(causal: bool) -> None:
    even = torch.ones(2, 3, 20, 20, dtype=torch.float64)
    even = even.tril() if causal else even
    even = even / even.sum(-1, keepdim=True)
    found = reach(even, causal=causal) | spread(even, causal=causal)
    for name in ("within_1", "within_4", "distance", "k90"):
        assert torch.allclose(found[name], found[f"{name}_uniform"].expand_as(found[name])), name
    assert torch.allclose(found["previous_attention"], found["previous_uniform"].expand(2, 20, 3))
    assert bool((found["mode_global"][:, 1:] == 1).all())
    assert torch.equal(
        found["mode_single"] + found["mode_subset"] + found["mode_global"], torch.ones(2, 20, 3).double()
    )
    keys = followers(ids(2, 20), 2)
    shares = ngram_shares(even, keys, 2)
    late = (
        keys[:, 12:].any(-1) & ~keys[:, 12:, :4].any(-1) & ~keys[:, 12:, 11:].any(-1)
    )  # all four wrong keys are there
    assert bool(late.any())
    two = [shares[f"ngram2_{name}"][:, 12:][late] for name in ("attention", "elsewhere")]
    assert torch.allclose(*two)


def test_the_fewest_keys_of_a_float32_softmax_are_those_of_its_shares() -> None:
    even = torch.full((1, 1, 1, 10), 0.1).double().float().double()  # 9 of 10 are 0.9 in decimal numbers alone
    assert float(fewest(even)) == 9
    assert float(fewest(torch.tensor([[[[0.5, 0.39, 0.11]]]]))) == 3
    assert float(fewest(torch.tensor([[[[0.5, 0.4, 0.1]]]]))) == 2


def test_followers_are_the_keys_behind_the_same_tokens() -> None:
    tokens = torch.tensor([[7, 8, 9, 7, 8, 5, 8]])
    assert followers(tokens, 2)[0].nonzero().tolist() == [[3, 1], [4, 2], [6, 2], [6, 5]]
    assert followers(tokens, 3)[0].nonzero().tolist() == [[4, 2]]


# ----------------------------------------------------------------------------------------------------------- similarity


def test_heads_are_compared_by_the_divergence_of_their_patterns(model: mt.Model) -> None:
    tokens = ids(3)
    data = mt.measure(model, "head_similarity", text=tokens)
    turned = torch.cat([tokens[:, :1], tokens[:, 1:].flip(1)], dim=1)
    one, other = (model.run(x, capture="*.attn.pattern")["*.attn.pattern"].double() for x in (tokens, turned))

    def js(p: Tensor, q: Tensor) -> float:
        def entropy(x: Tensor) -> Tensor:
            return -(x * x.clamp(min=1e-300).log()).sum(-1)

        return float((entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)[:, 1:].mean())

    for a, b in (((0, 1), (2, 3)), ((1, 0), (1, 2)), ((2, 2), (0, 0))):
        at = b[0] * 4 + b[1]
        assert float(data["js"][a][at]) == pytest.approx(js(one[a[0], :, a[1]], one[b[0], :, b[1]]), abs=1e-9)
        assert float(data["js_reversed"][a][at]) == pytest.approx(
            js(one[a[0], :, a[1]], other[b[0], :, b[1]]), abs=1e-9
        )
    table = data["js"].values.reshape(12, 12)
    assert np.allclose(table, table.T)
    assert np.allclose(np.diag(table), 0)


def test_the_divergence_is_0_of_the_same_and_ln_2_of_what_is_nowhere_the_same() -> None:
    one = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 0.5, 0.5]]]).double()
    assert divergence(one, one).tolist() == [[0.0, pytest.approx(math.log(2))], [pytest.approx(math.log(2)), 0.0]]


# --------------------------------------------------------------------------------------------------------------- recall


def simulated(beta_enc: float, beta_rec: float, gamma: float, items: int = 240) -> np.ndarray:
    """The curve of the retrieved-context model by vectors: each item has a dimension of its own."""
    keep = math.sqrt(1 - beta_enc**2)
    contexts = np.zeros((items, items))
    state = np.zeros(items)
    before = []
    for i in range(items):
        before.append(state)
        state = keep * state + beta_enc * np.eye(items)[i]
        contexts[i] = state
    bound = np.array(before)  # an item is bound to the context before it
    recall = np.zeros(items)
    middle = items // 2
    for i in range(40, middle + 1):
        into = (1 - gamma) * np.eye(items)[i] + gamma * bound[i]
        into = into / np.linalg.norm(into)
        if not recall.any():
            recall = into
            continue
        x = recall @ into
        rho = math.sqrt(1 + beta_rec**2 * (x**2 - 1)) - beta_rec * x
        recall = rho * recall + beta_rec * into
        assert np.linalg.norm(recall) == pytest.approx(1)
    return np.array([bound[middle + lag] @ recall for lag in LAGS])


@pytest.mark.parametrize("known", [(1.0, 1.0, 0.0), (0.7, 0.8, 0.2), (0.5, 0.4, 0.6), (0.9, 0.6, 1.0)])
def test_the_curve_of_recall_is_what_a_simulation_with_vectors_gives(known: tuple[float, float, float]) -> None:
    curve = cmr_curve(*(torch.tensor(x, dtype=torch.float64) for x in known)).numpy()
    assert np.allclose(curve, simulated(*known), atol=1e-6)


def test_a_curve_of_zeros_has_no_fit_and_a_scale_changes_none() -> None:
    curve = cmr_curve(*(torch.tensor(x, dtype=torch.float64) for x in (0.6, 0.5, 0.3)))
    one, other, nothing = (fit_cmr(curve * s) for s in (1.0, 0.01, 0.0))
    assert all(torch.allclose(one[name], other[name]) for name in one)
    assert all(bool(x.isnan()) for x in nothing.values())
    backwards = torch.nn.functional.one_hot(torch.tensor(4), 11).double()  # a head that recalls what came before
    wrong = fit_cmr(backwards)["distance"]
    assert float(one["distance"]) < 1e-2 < 0.3 < float(wrong)


@pytest.mark.parametrize("lead", [0, 1])
def test_the_lag_curve_is_the_plain_mean(lead: int) -> None:
    period = 13
    a = (
        torch.rand(2, 3, 2 * period + lead, 2 * period + lead, generator=torch.Generator().manual_seed(0))
        .double()
        .tril()
    )
    found = lag_curves(a, period, lead)
    for name, place in (("lag_attention", period), ("lag_elsewhere", period // 2)):
        for at, lag in enumerate(LAGS):
            queries = [q for q in range(lead + period, lead + 2 * period) if q - place + lag >= lead]
            expected = torch.stack([a[..., q, q - place + lag] for q in queries]).mean(0)
            assert torch.allclose(found[name][..., at], expected), (name, lag)


def test_the_lag_curve_agrees_with_the_scores_of_induction(model: mt.Model) -> None:
    data = mt.measure(model, "repeat_lags", "induction", sequences=8, period=12)
    assert np.allclose(data["lag_attention"][..., 5], data["duplicate"])
    assert np.allclose(data["lag_attention"][..., 6], data["induction"])
    assert data["lag_attention"].dims == ("layer", "head", "lag")


# ---------------------------------------------------------------------------------------------------- in context, kinds


def test_learning_in_context_is_the_loss_of_two_windows(model: mt.Model) -> None:
    tokens = ids(8, 48, high=families.VOCAB)
    data = mt.measure(model, "in_context", text=tokens)
    loss = token_loss(model.run(tokens).logits, tokens).double()
    early, late = loss[:, 3:6].mean(), loss[:, 44:47].mean()
    assert windows(48) == (slice(2, 5), slice(44, 47)) or windows(48) == (slice(3, 6), slice(44, 47))
    early = loss[:, windows(48)[0]].mean()
    assert float(data["loss_early"]) == pytest.approx(float(early))
    assert float(data["loss_late"]) == pytest.approx(float(late))
    assert float(data["in_context_score"]) == pytest.approx(float(late - early))
    assert float(data["loss_late_diff"]) == pytest.approx(float(late - early))
    assert windows(512) == (slice(34, 66), slice(479, 511))


def test_a_head_is_of_the_kinds_whose_scores_are_above_their_controls() -> None:
    axes = ("layer", "head")
    coords = {"layer": [3], "head": [0, 1, 2, 3]}
    values = {
        "induction_diff": [[0.9, 0.1, 0.5, 0.0]], "induction_diff_lo": [[0.8, 0.05, -0.1, 0.0]],
        "first_token_diff": [[0.3, 0.9, 0.0, 0.0]], "maps_past_diff": [[0.0, 0.0, 0.1, 0.0]],
        "maps_plural_diff": [[0.0, 0.0, 0.4, np.nan]],
    }  # fmt: skip
    data = xr.Dataset({name: (axes, x) for name, x in values.items()}, coords=coords)
    table = head_types(data)
    assert table["name"].values.tolist() == [["induction", "first token (sink)", "relations (weights)", "other"]]
    assert table["is_kind"].sel(kind="induction").values.tolist() == [[True, False, False, False]]  # 2: not surely
    assert table["is_kind"].sel(kind="first token (sink)").values.tolist() == [[True, True, False, False]]
    assert table["heads"].values.tolist() == [1, 2, 1]
    with pytest.raises(mt.errors.DataError, match="no column measures a kind of head"):
        head_types(data[["induction_diff_lo"]])
    with pytest.raises(mt.errors.ArgumentError, match="threshold must be above 0"):
        head_types(data, threshold=0)


# -------------------------------------------------------------------------------------------------------------- merging


SLOW = pytest.param(("head_ablation",), marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "names", [("head_map", "head_similarity", "head_importance"), SLOW, ("selectivity", "unselectable", "in_context"),
              ("repeat_lags",)]
)  # fmt: skip
def test_parts_of_a_text_merge_to_the_whole(model: mt.Model, names: tuple[str, ...]) -> None:
    tokens = ids(4)
    look: Any = Text() if names[0] != "repeat_lags" else RepeatedTokens(period=6)

    def part(rows: slice) -> Pass:
        bound = [Bound(one, one.statistic({}), one.layers(model)) for one in map(declared, names)]  # type: ignore[attr-defined]
        made = Pass(model, bound, look)
        for row in range(*rows.indices(4)):
            made.update(TokenBatch.of(tokens[row : row + 1], torch.tensor([row * 12])))
        return made

    whole = part(slice(None)).results()
    merged = part(slice(1, 4)).merge(part(slice(0, 1))).results()
    for name, data in whole.items():
        for column in data.data_vars:
            assert np.allclose(data[column], merged[name][column], rtol=1e-9, atol=1e-12, equal_nan=True), column
