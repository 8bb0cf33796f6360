"""Laws of the geometry of the stream: closed forms, what a rotation changes, and the same computed plainly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests import families, twins
from tests.scripts import script
from torch import Tensor

import microtome as mt
from microtome.measurements import entropy, neural_collapse
from microtome.measurements._attention_rank import pattern_ranks
from microtome.measurements._geometry import shape_of
from microtome.measurements._invariance import dime, info_nce, kept_tokens, lidar
from microtome.measurements._rank_collapse import residual

LAYERS = script("tools/planted_cases/layers.py")
THRICE = ("prompt_entropy", "prompt_rank", "top_component", "curvature", "rank_one_residual")
BASIS_FREE = (*THRICE, *(f"{name}_first" for name in THRICE), "row_similarity", "self_similarity", "anisotropy",
              "text_entropy", "step_length")  # fmt: skip
OF_A_BASIS = ("unit_correlation", *(f"{name}_even" for name in THRICE))


def ids(rows: int = 8, length: int = 14, vocab: int = families.VOCAB) -> Tensor:
    return torch.randint(5, vocab, (rows, length), generator=torch.Generator().manual_seed(3))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_r_equal_directions_have_the_entropy_ln_r(rank: int, alpha: float) -> None:
    x = torch.linalg.qr(drawn(20, rank))[0].T.repeat(4, 1)
    assert float(entropy(torch.linalg.eigvalsh(x @ x.T), alpha)) == pytest.approx(math.log(rank), abs=1e-12)
    told = shape_of(x, alpha)
    assert float(told["prompt_rank"]) == pytest.approx(rank)
    assert float(told["top_component"]) == pytest.approx(1 / rank)


def test_a_line_has_no_curvature_and_a_square_a_right_angle() -> None:
    line = torch.arange(9.0, dtype=torch.float64).unsqueeze(1) * drawn(1, 6) + drawn(1, 6, seed=1)
    assert float(shape_of(line)["curvature"]) < 1e-6
    square = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1], [0, 0]], dtype=torch.float64)
    assert float(shape_of(square)["curvature"]) == pytest.approx(math.pi / 2)
    noise = shape_of(drawn(4000, 50))["curvature"]  # steps of independent points have a cosine of -1/2
    assert float(noise) == pytest.approx(2 * math.pi / 3, abs=0.01)


def test_one_vector_has_no_residual_and_centred_ones_all_of_it() -> None:
    assert float(shape_of(drawn(1, 8).expand(5, 8))["rank_one_residual"]) < 1e-12
    x = drawn(6, 8)
    assert float(shape_of(x - x.mean(0))["rank_one_residual"]) == pytest.approx(1)
    mask = torch.tensor([[False, True, True, True, False, True]])
    own = x[mask[0]]
    expected = float((own - own.mean(0)).norm() / own.norm())
    assert float(residual(x.unsqueeze(0), mask)) == pytest.approx(expected)


def test_directions_with_a_common_mean_have_its_anisotropy() -> None:
    """Embeddings m + z: any two have the cosine |m|^2 / (|m|^2 + d), for large d; here all layers add nothing."""
    hf: Any = LAYERS.tiny()
    with torch.no_grad():
        noise = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
        hf.get_input_embeddings().weight.copy_(noise + 3.0 * torch.eye(40)[0] * 40**0.5 / 3)
    data = mt.measure(mt.open(hf, prove=False), "geometry", text=ids(16, 30, 60))
    assert np.allclose(data["anisotropy"], 0.5, atol=0.03)
    assert np.allclose(data["self_similarity"], 1, atol=1e-6)
    assert np.allclose(data["step_length"], 0, atol=1e-6)
    assert np.allclose(data["unit_correlation"], 1, atol=1e-6)


def test_columns_are_those_of_captures() -> None:
    model = mt.open(families.build("llama-gqa").double(), prove=False)
    some = 5 + ids() % 30  # so that tokens come again
    data = mt.measure(model, "geometry", text=some)
    run = model.run(some, capture=["*.resid_pre", "*.resid_post"])
    for layer in range(3):
        pre, post = run[f"{layer}.resid_pre"], run[f"{layer}.resid_post"]
        rows: dict[str, list[float]] = {}
        for row in post:
            dims = row.abs().amax(0).topk(3).indices
            even = row[1:].clone()
            even[:, dims] = 0
            for end, x in (("", row[1:]), ("_first", row), ("_even", even)):
                p = torch.linalg.svdvals(x).square()
                p = p / p.sum()
                rows.setdefault(f"prompt_entropy{end}", []).append(float(-(p * p.log()).sum()))
                steps = torch.nn.functional.normalize(x[1:] - x[:-1], dim=-1)
                rows.setdefault(f"curvature{end}", []).append(float((steps[1:] * steps[:-1]).sum(-1).arccos().mean()))
        for name, values in rows.items():
            assert float(data[name][layer]) == pytest.approx(np.mean(values), rel=1e-6), name
        u = torch.nn.functional.normalize(post[:, 1:].flatten(0, 1), dim=-1)
        pairs = (u @ u.T)[~torch.eye(len(u), dtype=torch.bool)]
        assert float(data["anisotropy"][layer]) == pytest.approx(float(pairs.mean()), rel=1e-9)
        a, b = (x[:, 1:].flatten(0, 1).numpy() for x in (pre, post))
        units = [np.corrcoef(a[:, n], b[:, n])[0, 1] for n in range(a.shape[1])]
        assert float(data["unit_correlation"][layer]) == pytest.approx(np.mean(units), rel=1e-9)
        means = post[:, 1:].mean(1)
        p = torch.linalg.svdvals(means).square()
        expected = float(entropy(p))
        assert float(data["text_entropy"][layer]) == pytest.approx(expected, rel=1e-9)
        alike: list[float] = []
        for row, tokens in zip(torch.nn.functional.normalize(post[:, 1:], dim=-1), some[:, 1:], strict=True):
            same = (tokens[:, None] == tokens).fill_diagonal_(False)
            alike += [float((row @ row.T)[same].mean())] if bool(same.any()) else []
        assert len(alike) > 3
        assert float(data["self_similarity"][layer]) == pytest.approx(np.mean(alike), rel=1e-6)


def test_a_rotation_changes_the_numbers_of_units_and_no_others() -> None:
    hf = twins.build("llama-gqa/folded").double()
    one, other = (mt.measure(mt.open(m, prove=False), "geometry", text=ids()) for m in (hf, twins.turned(hf)))
    for name in BASIS_FREE:
        np.testing.assert_allclose(other[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for name in OF_A_BASIS:
        assert float(abs(other[name] - one[name]).max()) > 1e-5, name


def test_halves_of_a_text_give_what_the_whole_gives() -> None:
    from microtome.stream import TokenBatch

    model = mt.open(families.build("llama-gqa"), prove=False)
    start = torch.arange(8) * 14
    whole = mt.measure(model, "geometry", text=[TokenBatch.of(ids(), start)])
    parts = mt.measure(model, "geometry", text=[TokenBatch.of(ids()[s], start[s]) for s in (slice(0, 3), slice(3, 8))])
    for name in whole.data_vars:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-6, atol=1e-8, err_msg=str(name))


@pytest.mark.parametrize("name", ["geometry", "layer_similarity"])
def test_rows_that_are_too_short_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(mt.errors.DataError, match=r"needs rows with \w+ tokens behind their first") as refused:
        mt.measure(mt.open(families.build("llama-gqa"), prove=False), name, text=ids(8, 3))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["geometry", "sinks", "inertia", "layer_similarity", "secondary_sinks", "registers"])
def test_numbers_that_are_not_finite_are_refused(name: str) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with model.editing(mt.edit.Set("1.mlp_out[3]@7", value=torch.nan)), pytest.raises(mt.errors.DataError):
        mt.measure(model, name, text=ids())


# ------------------------------------------------------------------------------------------------- collapse, and ranks


def test_residuals_are_those_of_layers_run_by_hand() -> None:
    model = mt.open(families.build("llama-gqa").double(), prove=False)
    data = mt.measure(model, "rank_collapse", text=ids())
    later = torch.ones(8, 14, dtype=torch.bool)
    later[:, 0] = False
    silent = model.run(ids(), capture="*.resid_post", edits=mt.edit.Zero("*.mlp_out"))
    x, y = (model.run(ids(), capture="0.resid_pre")["0.resid_pre"] for _ in range(2))
    for layer in range(3):
        expected = float(residual(silent[f"{layer}.resid_post"], later).mean())
        assert float(data["residual_no_mlp"][layer]) == pytest.approx(expected, rel=1e-6)
        capture = [f"{layer}.attn_out", f"{layer}.mlp_out"]
        x = model.run(ids(), capture=capture[0], start_at=layer, given=x)[capture[0]]
        assert float(data["residual_attention"][layer]) == pytest.approx(float(residual(x, later).mean()), rel=1e-3)
        attn = model.run(ids(), capture=capture[0], start_at=layer, given=y)[capture[0]]
        edit = mt.edit.Patch(f"{layer}.resid_mid", source={f"{layer}.resid_mid": attn})
        y = model.run(ids(), capture=capture[1], edits=edit, start_at=layer, given=y)[capture[1]]
        assert float(data["residual_no_skip"][layer]) == pytest.approx(float(residual(y, later).mean()), rel=1e-3)


def test_attention_alone_loses_rank_and_skips_keep_it() -> None:
    hf: Any = LAYERS.tiny(4, mute=False)
    data = mt.measure(mt.open(hf, prove=False), "rank_collapse", text=ids(8, 24, 60))
    alone, whole = data["residual_attention"].values, data["residual_whole"].values
    assert (np.diff(alone) < 0).all()
    assert alone[-1] < 0.5 * whole[-1]


def test_ranks_of_patterns_have_their_closed_forms() -> None:
    sink = torch.zeros(1, 1, 12, 12)
    sink[..., 0] = 1
    identity = torch.eye(12).reshape(1, 1, 12, 12)
    blocks = torch.block_diag(*[torch.full((3, 3), 1 / 3)] * 4).reshape(1, 1, 12, 12)
    for pattern, rank in ((sink, 1), (identity, 12), (blocks, 4)):
        told = pattern_ranks(pattern)
        assert float(told["attention_rank"]) == rank
        assert float(told["attention_effective_rank"]) == pytest.approx(rank, abs=1e-5)


def test_ranks_by_head_are_those_of_captures() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    data = mt.measure(model, "attention_rank", text=ids())
    pattern = model.run(ids(), capture="1.attn.pattern")["1.attn.pattern"].double()
    s = torch.linalg.svdvals(pattern)
    np.testing.assert_allclose(data["attention_rank"][1], (s > 0.05 * s[..., :1]).double().sum(-1).mean(0))
    even = torch.ones(14, 14).tril()
    uniform = pattern_ranks((even / even.sum(1, keepdim=True))[None, None])["attention_effective_rank"]
    assert np.allclose(data["attention_effective_rank_uniform"], float(uniform))


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
def test_collapse_of_a_simplex_has_its_closed_form(spread: float) -> None:
    """C means at the corners of a simplex of norm 1: Sigma_B has C - 1 eigenvalues 1 / (C - 1)."""
    classes, n, d = 5, 4000, 12
    corners = torch.eye(classes, dtype=torch.float64) - 1 / classes
    means = torch.nn.functional.normalize(corners, dim=1) @ torch.linalg.qr(drawn(d, classes, seed=2))[0].T
    labels = torch.arange(classes).repeat_interleave(n)
    told = neural_collapse(means[labels] + spread * drawn(classes * n, d), labels * 7 - 3)
    assert told.variability == pytest.approx(spread**2 * (classes - 1) ** 2 / classes, rel=0.05, abs=1e-12)
    assert told.cosine == pytest.approx(-1 / (classes - 1), abs=0.01)
    assert told.spread < 0.05
    assert told.norms < 0.05
    assert told.variability_shuffled > 100 * max(told.variability, 1e-3)


# ---------------------------------------------------------------------------------------------------------- invariance


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_views_that_are_one_have_the_bound_of_a_simplex(temperature: float) -> None:
    """N rows at the corners of a simplex: s_ii = 1 / t, s_ij = -1 / ((N - 1) t)."""
    n = 6
    x = torch.eye(n, dtype=torch.float64) @ torch.linalg.qr(drawn(9, n))[0].T
    expected = math.log(n) - math.log(1 + (n - 1) * math.exp(-(1 + 1 / (n - 1)) / temperature))
    assert float(info_nce(x, x, temperature)) == pytest.approx(expected)
    assert float(info_nce(x, x.roll(1, 0), temperature)) < 0


def test_lidar_counts_the_directions_that_tell_rows_apart() -> None:
    rows, d = 400, 10
    for rank in (1, 3, 6):
        means = drawn(rows, rank, seed=rank) @ torch.linalg.qr(drawn(d, rank))[0].T
        x, y = (means + 0.01 * drawn(rows, d, seed=seed) for seed in (20, 21))
        assert float(lidar(x, y)) == pytest.approx(rank, rel=0.05)


@pytest.mark.parametrize("clusters", [2, 4])
def test_views_that_share_clusters_share_their_logarithm(clusters: int) -> None:
    """K has C blocks: both have entropy ln C together, and 2 ln C once one is in another order."""
    rows = 32 * clusters
    x = 100 * drawn(clusters, 6)[torch.arange(rows) % clusters]
    y = 100 * drawn(clusters, 9, seed=1)[torch.arange(rows) % clusters]
    assert float(dime(x, y, width=1.0)) == pytest.approx(math.log(clusters), rel=0.1)
    assert abs(float(dime(x, y[torch.randperm(rows, generator=torch.Generator().manual_seed(5))], 1.0))) < 0.1
    assert float(dime(x, torch.ones(rows, 3).double())) == pytest.approx(0, abs=1e-9)  # a view that says nothing
    turn = torch.linalg.qr(drawn(6, 6, seed=2))[0]
    near = drawn(rows, 6, seed=3)
    assert float(dime(near, x)) == pytest.approx(float(dime(3 * near @ turn, 3 * x)), rel=1e-6)  # of no basis or scale


def test_rows_of_two_kinds_share_more_than_rows_of_one() -> None:
    told = LAYERS.shared_kinds()
    assert (told["found"], told["false"]) == ("3 of 3", "0 of 9")


def test_views_are_those_run_by_hand() -> None:
    model = mt.open(families.build("llama-gqa").double(), prove=False)
    data = mt.measure(model, "invariance", text=ids(12, 16), drop=0.4)
    views: list[Tensor] = []
    for number in range(2):
        places = kept_tokens(ids(12, 16).shape, torch.arange(12) * 16, 0.4, number * 2**20)
        assert places.shape == (12, 10)
        assert bool((places.diff(dim=1) > 0).all())
        views.append(model.run(ids(12, 16).gather(1, places), capture="1.resid_post")["1.resid_post"][:, 1:].mean(1))
    assert not torch.equal(*views)
    assert float(data["infonce"][1]) == pytest.approx(float(info_nce(*views)), rel=1e-6)
    assert float(data["lidar"][1]) == pytest.approx(float(lidar(*views)), rel=1e-6)
    assert float(data["dime"][1]) == pytest.approx(float(dime(*views)), rel=1e-6)
    assert float(data["dime"][1]) > 5 * abs(float(data["dime_unpaired"][1]))
    assert float(data["infonce"][1]) > 0.5 > float(data["infonce_unpaired"][1])
    same = mt.measure(model, "invariance", text=ids(12, 16), drop=0)
    assert (same["infonce"] > data["infonce"]).all()


def test_collapse_refuses_what_has_no_answer() -> None:
    x = drawn(6, 3)
    for states, labels in ((x, torch.zeros(6, dtype=torch.int64)), (x * torch.nan, torch.arange(6) % 2),
                           (x, torch.arange(5)), (torch.ones(6, 3), torch.arange(6) % 2)):  # fmt: skip
        with pytest.raises(mt.errors.DataError) as refused:
            neural_collapse(states, labels)
        assert "\n" not in str(refused.value)


def test_what_is_planted_is_found_and_nothing_else() -> None:
    told = LAYERS.geometry()
    assert (told["found"], told["false"]) == ("3 of 3", "0 of 3")
