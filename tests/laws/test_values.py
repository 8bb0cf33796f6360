"""Values for ablations: noise that is a value, swaps inside a subspace, means and resamples."""

from __future__ import annotations

import pytest
import torch
from tests import families

import microtome as mt

ROWS = [[7, 20, 33, 41, 52], [9, 21, 34, 42, 53], [8, 22, 35, 43, 54, 60, 61]]
READ = mt.metric.FunctionMetric(lambda logits, prompts: logits.flatten(1))


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"))


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gptj", "gemma2", "bert"])
@pytest.mark.parametrize(
    "site",
    ["embed@1-2", "1.resid_pre@3", "0.resid_post", "1.mlp.post[3,9]@2", "2.attn.k@-1", "0.attn.v[1]", "1.attn.z[2]"],
)
def test_noise_in_a_sweep_is_the_noise_of_a_run(name: str, site: str) -> None:
    model = mt.open(families.build(name), prove=False)
    cells = [mt.edit.Noise(site, std=0.7, seed=s) for s in (3, 3, 4)]
    swept = model.sweep(ROWS[:2], cells, READ, prompts=[1, 0, 1]).run()
    for value, cell, row in zip(swept.values, cells, [1, 0, 1], strict=True):
        expected = model.run([ROWS[row]], edits=[cell]).logits[0, -1]
        assert (value - expected).abs().max() < 1e-4
        assert (value - swept.base[row]).abs().max() > 1e-4
    assert (swept.values[0] - swept.values[2]).abs().max() > 1e-4  # another seed, other noise


def test_noise_does_not_depend_on_rows_padding_or_what_else_is_selected(model: mt.Model) -> None:
    site = "1.attn.z@2"
    alone = model.run([ROWS[0]], capture=site, edits=[mt.edit.Noise("1.attn.z", seed=5)])[site]
    for side in ("left", "right"):
        among = model.run([ROWS[2], ROWS[0]], capture=site, edits=[mt.edit.Noise(site, seed=5)], padding=side)[site]
        assert (among[1] - alone[0]).abs().max() < 1e-5
    plain = model.run([ROWS[0]], capture=site)[site]
    one = model.run([ROWS[0]], capture=site, edits=[mt.edit.Noise("1.attn.z[2]@2", seed=5)])[site]
    assert torch.equal(one[:, :, :2], plain[:, :, :2])
    assert (one[:, :, 2] - alone[:, :, 2]).abs().max() < 1e-6
    rows = model.run(ROWS[:2], capture=site, edits=[mt.edit.Noise(site, seed=5, rows=(1,))])[site]
    assert (rows[0] - plain[0]).abs().max() < 1e-5
    assert (
        rows[1] - model.run([ROWS[1]], capture=site, edits=[mt.edit.Noise(site, seed=5)])[site][0]
    ).abs().max() < 1e-5


def test_noise_has_its_scale(model: mt.Model) -> None:
    added = torch.stack([
        model.run([ROWS[2]], capture="embed", edits=[mt.edit.Noise("embed", std=2.0, seed=s)])["embed"]
        - model.run([ROWS[2]], capture="embed")["embed"]
        for s in range(40)
    ]).double()  # fmt: skip
    assert abs(float(added.mean())) < 0.06
    assert float(added.std()) == pytest.approx(2.0, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([added[:, 0, 0].flatten(), added[:, 0, 1].flatten()]))[0, 1])) < 0.1


def test_noise_is_saved_and_read_again(tmp_path, model: mt.Model) -> None:
    edits = [mt.edit.Noise("embed@1", std=0.5, seed=9), mt.edit.Noise("1.attn.z[2]")]
    mt.edit.save_edits(tmp_path / "noise.safetensors", edits)
    assert mt.edit.load_edits(tmp_path / "noise.safetensors") == edits
    assert mt.edit.Noise("embed", seed=1) != mt.edit.Noise("embed", seed=2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("1.attn.scores",), "Noise cannot act on attn.scores"),
        (("embed", -1.0), "std of Noise on embed must be 0 or more; got -1.0"),
        (("embed", float("nan")), "must be 0 or more; got nan"),
        (("embed", 1.0, -1), "seed of Noise on embed must be 0 or more; got -1"),
    ],
)
def test_noise_that_makes_no_sense_is_refused(arguments: tuple[object, ...], text: str) -> None:
    with pytest.raises(mt.errors.EditError, match=text):
        mt.edit.Noise(*arguments)


def test_a_swap_in_a_subspace_changes_nothing_outside_it(model: mt.Model) -> None:
    site = "1.resid_mid"
    clean, source = model.run([ROWS[0]], capture=site), model.run([ROWS[1]], capture=site)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(3, 40, generator=generator)
    dependent = torch.cat([basis, basis[:1] - 2 * basis[1:2], torch.zeros(1, 40)])  # rank 3 in 5 rows
    for given in (basis, dependent, basis * 1e3):
        got = model.run([ROWS[0]], capture=site, edits=[mt.edit.Patch(site, source=source, basis=given)])[site]
        inside = torch.linalg.pinv(basis) @ basis  # [d, d] projector, up to transposition
        assert ((got - source[site]) @ inside.T).abs().max() < 1e-4
        assert ((got - clean[site]) @ (torch.eye(40) - inside).T).abs().max() < 1e-4
        cell = mt.edit.Patch(site, source=source, basis=given)
        swept = model.sweep([ROWS[0]], [cell], READ).run().values[0]
        assert (swept - model.run([ROWS[0]], edits=[cell]).logits[0, -1]).abs().max() < 1e-4
    whole = model.run([ROWS[0]], capture=site, edits=[mt.edit.Patch(site, source=source, basis=torch.eye(40))])[site]
    assert (whole - source[site]).abs().max() < 1e-5
    assert mt.edit.Patch(site, source=source, basis=basis) != mt.edit.Patch(site, source=source)
    assert mt.edit.Patch(site, source=source, basis=basis) != mt.edit.Patch(site, source=source, basis=2 * basis)
    with pytest.raises(
        mt.errors.EditError, match=r"a basis does not fit 1.resid_mid; got last axis of 39; allowed: 40"
    ):
        model.run([ROWS[0]], edits=[mt.edit.Patch(site, source=source, basis=torch.ones(39))])


def test_projecting_out_a_dependent_basis_removes_its_span_and_no_more(model: mt.Model) -> None:
    site = "1.resid_mid"
    v = torch.randn(40, generator=torch.Generator().manual_seed(1))
    one, twice = (
        model.run([ROWS[0]], capture=site, edits=[mt.edit.Project(site, basis=b)])[site]
        for b in (v, torch.stack([v, -v]))
    )
    assert (one - twice).abs().max() < 1e-5
    nothing = model.run([ROWS[0]], capture=site, edits=[mt.edit.Project(site, basis=torch.zeros(2, 40))])[site]
    assert torch.equal(nothing, model.run([ROWS[0]], capture=site)[site])


def test_means_are_those_of_the_runs(model: mt.Model) -> None:
    wanted = ["1.mlp_out", "*.attn.z", "2.mlp.post[3-5]@-1"]
    got = mt.change.means(model, ROWS, wanted)
    runs = [model.run([row], capture=wanted) for row in ROWS]
    assert set(got) == {"1.mlp_out", "0.attn.z", "1.attn.z", "2.attn.z", "2.mlp.post[3-5]@-1"}
    for address, mean in got.items():
        expected = torch.cat([run[address][0].double() for run in runs]).mean(0)
        assert mean.dtype == torch.float64
        assert (mean - expected).abs().max() < 1e-5
    edited = model.run(ROWS[:1], capture="1.attn.z", edits=[mt.edit.Mean("1.attn.z@2", mean=got["1.attn.z"])])[
        "1.attn.z"
    ]
    assert (edited[0, 2] - got["1.attn.z"]).abs().max() < 1e-5
    same = mt.change.means(model, torch.tensor(ROWS[:2]), "1.mlp_out")["1.mlp_out"]
    batches = [mt.stream.TokenBatch.of(torch.tensor([r])) for r in ROWS[:2]]
    assert (mt.change.means(model, batches, "1.mlp_out")["1.mlp_out"] - same).abs().max() < 1e-6
    with pytest.raises(mt.errors.DataError, match="means needs text"):
        mt.change.means(model, iter([]), "1.mlp_out")


def test_a_mean_over_a_corpus_leaves_out_what_is_put_before_the_text(model: mt.Model) -> None:
    rows = torch.tensor(ROWS[:2])
    batches = [mt.stream.TokenBatch.of(rows, lead=1)]
    want = model.run(rows, capture="1.mlp_out")["1.mlp_out"][:, 1:].double().mean((0, 1))
    assert (mt.change.means(model, batches, "1.mlp_out")["1.mlp_out"] - want).abs().max() < 1e-6
    first = model.run(rows, capture="1.mlp_out@0")["1.mlp_out@0"].double().mean((0, 1))
    assert (mt.change.means(model, batches, "1.mlp_out@0")["1.mlp_out@0"] - first).abs().max() < 1e-6


def test_resampling_takes_another_prompts_values(model: mt.Model) -> None:
    rows = [[i, 20, 33 + i] for i in range(5, 11)]
    source = mt.change.resampled(model, rows, "*.attn_out", seed=2)
    plain = model.run(rows, capture="*.attn_out")["1.attn_out"]
    gaps = (source["1.attn_out"][:, None] - plain[None]).abs().amax((2, 3))
    taken = gaps.argmin(1)
    assert gaps.min(1).values.max() < 1e-5
    assert sorted(taken.tolist()) == list(range(6))
    assert bool((taken != torch.arange(6)).all())
    swept = model.sweep(rows, [mt.edit.Patch("1.attn_out", source=source)] * 6, READ, prompts=range(6)).run()
    for i in range(6):
        edit = mt.edit.Set("1.attn_out", value=plain[taken[i]][None])
        assert (swept.values[i] - model.run([rows[i]], edits=[edit]).logits[0, -1]).abs().max() < 1e-4
    again = mt.change.resampled(model, rows, "*.attn_out", seed=2)
    assert torch.equal(again["0.attn_out"], source["0.attn_out"])
    with pytest.raises(mt.errors.DataError, match="prompt 2 cannot be resampled; got no other prompt of 7 tokens"):
        mt.change.resampled(model, ROWS, "1.attn_out")
