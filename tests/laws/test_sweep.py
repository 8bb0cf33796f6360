"""A sweep is equal to one literal forward a cell: every family, every site, several positions and lengths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import families
from tests.agreement import agreed, agreement

import microtome as mt
from microtome.sweep._written import written

TOLERANCE = 2e-5
"""Of logits."""
READ = mt.metric.FunctionMetric(lambda logits, prompts: logits.flatten(1), positions=(-1, 5))


def tokens(seed: int, length: int = 9) -> torch.Tensor:
    return torch.randint(5, 100, (2, length), generator=torch.Generator().manual_seed(seed))


def one_row(model: mt.Model) -> int:
    """The smallest budget: bytes of a walk of one cell."""
    return model.sweep(tokens(0)[:1], [mt.edit.Zero("0.resid_pre@0")], READ).plan.bytes


def literal(model: mt.Model, row: torch.Tensor, edits: list[mt.edit.Edit]) -> torch.Tensor:
    return model.run(row.unsqueeze(0), edits=edits).logits[0, [-1, 5]].flatten()


@pytest.mark.parametrize("name", families.some(3))
def test_equals_one_forward_a_cell(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    clean, corrupt = tokens(0), tokens(1)
    sites = [s for s in model.anatomy.hook_points if s.layer in (0, 2)]
    source = model.run(corrupt, capture=[str(s) for s in sites])
    places = {0: ("@1", "@4", "@2-5", ""), 2: ("@5", "@8", "@2-5", "")}  # the last layer acts only where it is read
    cells: list[mt.edit.SiteEdit] = []
    for i, s in enumerate(sites):
        cells.append(mt.edit.Patch(f"{s}{places[s.layer or 0][i % 4]}", source=source))
        at = f"@{5 if s.layer else 3}"
        # What a norm divides by has no units, and cannot be nothing.
        cells.append(mt.edit.Scale(f"{s}{at}", 0.5) if s.spec.unit == "batch" else mt.edit.Zero(f"{s}[0]{at}"))
    result = model.sweep(clean, cells, READ, prompts=[i % 2 for i in range(len(cells))]).run()
    assert result.done == len(cells) == len(result.values)
    base = [literal(model, row, []) for row in clean]
    with agreement(TOLERANCE) as agree:
        for i, cell in enumerate(cells):
            row = i % 2
            edit: mt.edit.Edit = cell
            if isinstance(cell, mt.edit.Patch):
                edit = mt.edit.Patch(cell.site, source={str(s): source[str(s)][row : row + 1] for s in sites})
            agree.cell(result.values[i], literal(model, clean[row], [edit]), base[row], cell.site)


def test_patches_written_together_are_those_written_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    source = model.run(
        [tokens(1)[0], tokens(2)[0, :7]], capture=["*.resid_pre", "*.attn.z", "*.attn.k"], padding="left"
    )
    prompts = [tokens(3)[0], tokens(4)[0, :7]]
    cells: list[mt.edit.SiteEdit | list[mt.edit.SiteEdit]] = [
        mt.edit.Patch(f"{layer}.{name}", source=source)
        for layer in range(3)
        for name in ("resid_pre@2", "resid_pre@4-6", "attn.z[1,3]", "attn.z[2]@5", "attn.k[0]@3", "resid_pre")
    ]
    cells += [[mt.edit.Patch("1.resid_pre@1-3", source=source), mt.edit.Patch("1.resid_pre@3", source=source)]]
    cells += [mt.edit.Patch("1.resid_pre@2", source=source, basis=torch.ones(model.anatomy.d_model))]
    which = [i % 2 for i in range(len(cells))]
    places: list[int] = []

    def counted(acts: list[object]) -> object:
        made, others = written(acts)  # pyright: ignore[reportArgumentType]
        places.append(len(acts) - len(others))
        return made, others

    # Rows of the batch begin in different columns, which only a batch padded alike names alike.
    both = model.to_batch(prompts, "left")
    swept = [model.sweep(both, cells, READ, prompts=which)]
    monkeypatch.setattr("microtome.sweep._pass.written", counted)
    together = swept[0].run().values
    assert sum(places) == len(cells) - 2
    monkeypatch.setattr("microtome.sweep._pass.written", lambda acts: ([], list(range(len(acts)))))
    alone = model.sweep(both, cells, READ, prompts=which).run().values
    assert torch.equal(together, alone)


def test_prompts_of_several_lengths_and_cells_of_several_edits() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    rows = [tokens(2, n)[0].tolist() for n in (7, 11, 7)]
    cells = [
        [mt.edit.Zero("0.attn.z[1]@2"), mt.edit.Scale("2.mlp_out@3", factor=2.0)],
        mt.edit.Zero("1.resid_mid@-1"),
        mt.edit.Zero("*.attn_out"),
    ]
    prompts = [1, 2, 0]
    result = model.sweep(rows, cells, READ, prompts=prompts).run()
    base = [literal(model, torch.tensor(row), []) for row in rows]
    with agreement(TOLERANCE, most=1.0) as agree:
        for i, (cell, prompt) in enumerate(zip(cells, prompts, strict=True)):
            edits = cell if isinstance(cell, list) else [cell]
            agree.cell(result.values[i], literal(model, torch.tensor(rows[prompt]), list(edits)), base[prompt])
            assert (result.effects[i] - (result.values[i] - result.base[prompt])).abs().max() == 0
    for prompt in range(3):
        assert (result.base[prompt] - base[prompt]).abs().max() < TOLERANCE


def test_a_cell_behind_what_is_read_changes_nothing() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    metric = mt.metric.FunctionMetric(lambda logits, prompts: logits.flatten(1), positions=(3,))
    result = model.sweep(tokens(0)[:1], [mt.edit.Zero("0.resid_pre@6"), mt.edit.Zero("0.resid_pre@3")], metric).run()
    assert result.effects[0].abs().max() < 1e-5 < result.effects[1].abs().max()


def test_a_small_budget_gives_the_same_in_more_walks() -> None:
    model = mt.open(families.build("gpt2"), prove=False)
    cells = [mt.edit.Zero(f"{layer}.resid_pre@{pos}") for layer in range(3) for pos in range(9)]
    whole = model.sweep(tokens(0)[:1], cells, READ).run()
    cut = model.sweep(tokens(0)[:1], cells, READ, budget=one_row(model)).run()
    assert cut.plan.passes == len(cells) > whole.plan.passes
    agreed(cut.effects.abs().amax(1), whole.effects.abs().amax(1), TOLERANCE, most=0.6)  # the last layer is read twice
    assert (whole.values - cut.values).abs().max() < TOLERANCE


def test_layers_before_a_cell_are_not_computed() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    model.sweep(tokens(0)[:1], [mt.edit.Zero("1.resid_pre@6")], READ)  # the first one tries what cells share
    calls = [0, 0, 0]
    for i, block in enumerate(model.hf.model.layers):
        inner = block.mlp.forward

        def counted(x: torch.Tensor, i: int = i, inner=inner) -> torch.Tensor:
            calls[i] += x.shape[0] * x.shape[1]
            return inner(x)

        block.mlp.forward = counted
    model.sweep(tokens(0)[:1], [mt.edit.Zero("1.resid_pre@6")], READ).run()
    base = 9
    # Layer 1 from column 6 on, and the last MLP where it is read.
    assert calls == [base, base + 3, base + 2]


def test_stopped_it_keeps_what_it_has() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)

    def stop(done: int, everything: int) -> None:
        raise KeyboardInterrupt

    cells = [mt.edit.Zero(f"{layer}.resid_pre@{pos}") for layer in range(3) for pos in range(9)]
    result = model.sweep(tokens(0)[:1], cells, READ, budget=one_row(model)).run(stop)
    assert result.done == 1
    assert result.values.isfinite().all(dim=1).sum() == 1
    assert not any(m._forward_pre_hooks for m in model.hf.modules())


@pytest.mark.parametrize(
    ("cells", "text"),
    [
        ([mt.edit.Zero("0.resid_pre@9")], "no positions @9 in prompt 0"),
        ([mt.edit.Zero("logits")], "a sweep acts inside the layers, not at logits"),
        ([mt.edit.Zero("0.resid_pre", rows=(0,))], "names rows, but a cell is one row"),
        ([[]], "cell 0 of the sweep holds no edit"),
        ([mt.edit.Zero("7.resid_pre")], "no layers 7"),
    ],
)
def test_what_cannot_be_swept_is_refused(cells: list[mt.edit.SiteEdit], text: str) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.MicrotomeError, match=text):
        model.sweep(tokens(0)[:1], cells, READ).run()


def test_a_metric_that_no_cell_can_reach_is_refused() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    metric, prompt = mt.metric.LogProbability(11, position=1), tokens(0)[:1]
    early, late = mt.edit.Zero("0.resid_pre@1"), mt.edit.Zero("0.resid_pre@2-3")
    match = r"does not depend on what is edited.*; got it reads up to position 1, and the first cell edits from 2 on"
    with pytest.raises(mt.errors.EditError, match=match):
        model.sweep(prompt, [late, late], metric).run()
    effects = model.sweep(prompt, [late, early], metric).run().effects.tolist()
    assert effects[0] == 0 != effects[1]


def test_a_budget_below_one_cell_is_refused() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(
        mt.errors.BudgetError,
        match=r"one cell of this sweep needs more than memory allows; got .* KiB; allowed: .* which is 1 B less",
    ):
        model.sweep(tokens(0)[:1], [mt.edit.Zero("0.resid_pre@0")], READ, budget=one_row(model) - 1).run()


def test_the_plan_counts_what_grows_with_the_length() -> None:
    """Attention grows with its square; the streams, keys, values and one row's MLP grow with the length."""
    model = mt.open(families.build("llama-gqa"), prove=False)
    a = model.anatomy
    cell, metric = [mt.edit.Zero("0.resid_pre@0")], mt.metric.LogProbability(11)
    held = [model.sweep(tokens(0, length)[:1], cell, metric).plan.bytes for length in (8, 16, 24)]
    assert held[2] - 2 * held[1] + held[0] == 4 * a.n_heads * (24**2 - 2 * 16**2 + 8**2)
    row = 6 * a.d_model + 3 * a.d_mlp + 4 * a.n_heads * a.d_head
    base = a.n_layers * (a.d_model + 2 * a.n_kv_heads * a.d_head)
    assert held[1] - held[0] == 4 * (8 * (row + base) + a.n_heads * (16**2 - 8**2))


@pytest.mark.parametrize("name", families.some(2, [n for n in families.NAMES if families.KIND[n] == "causal"]))
def test_reading_two_tokens_computes_only_their_logits(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    cells = [
        mt.edit.Zero(f"{layer}.{site}@{pos}") for layer in (0, 2) for site in ("resid_pre", "mlp_out") for pos in (2, 8)
    ]
    metric = mt.metric.LogitDifference([11, 17], foil=[13, 11])
    whole = mt.metric.FunctionMetric(lambda z, p: z[:, 0].gather(1, torch.tensor([11, 17])[p].unsqueeze(1)).squeeze(1)
                       - z[:, 0].gather(1, torch.tensor([13, 11])[p].unsqueeze(1)).squeeze(1))  # fmt: skip
    prompts = [i % 2 for i in range(len(cells))]
    one, other = (model.sweep(tokens(0), cells, m, prompts=prompts).run() for m in (metric, whole))
    agreed(one.effects, other.effects, TOLERANCE)
    assert (one.base - other.base).abs().max() < TOLERANCE
    assert one.plan.bytes < other.plan.bytes


def test_statistics_over_prompts_are_those_of_each_prompts_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    prompts = [tokens(seed)[0, : 5 + seed % 3].tolist() for seed in range(8)]
    cells = [mt.edit.Zero(f"{layer}.mlp_out@-1") for layer in range(3)]
    whose = [number for _ in cells for number in range(8)]  # cell by cell, not prompt by prompt
    metric = mt.metric.LogitDifference(11, foil=13)
    swept = model.sweep(prompts, [cell for cell in cells for _ in range(8)], metric, prompts=whose).run()
    with mt.settings(seed=3):
        data = mt.explain.over_prompts(swept)
    each = torch.stack([model.sweep([prompt], cells, metric).run().effects for prompt in prompts])
    agreed(data["effect_each"], each, TOLERANCE)
    mean, low, high = mt.stream.mean_interval(swept.effects.reshape(3, 8).T.double())
    p = mt.stream.sign_flip(swept.effects.reshape(3, 8).T.double(), seed=3)
    for name, expected in (("effect", mean), ("effect_lo", low), ("effect_hi", high), ("effect_p", p)):
        assert data[name].dims == ("cell",)
        np.testing.assert_array_equal(data[name], expected)
    effects = swept.effects.clone()
    effects[2] = torch.nan  # stopped: the third prompt lacks a cell
    stopped = mt.explain.over_prompts(replace(swept, effects=effects))
    assert stopped.attrs["examples"] == 7
    np.testing.assert_array_equal(stopped["effect_each"], data["effect_each"].drop_isel(example=2))
    with pytest.raises(mt.errors.DataError, match=r"do not have the same cells; got \[2, 3\] cells"):
        mt.explain.over_prompts(model.sweep(prompts, [*cells, *cells[:2]], metric, prompts=[0, 0, 0, 1, 1]).run())


@pytest.mark.parametrize(
    "site", ["1.attn.pattern[2]", "1.attn.z[2]", "1.attn.scores[1]", "2.mlp.post", "1.mlp_out@1-3"]
)
@pytest.mark.parametrize("name", ["llama-gqa", "bloom"])
def test_each_prompt_takes_its_own_row_of_a_batch_of_several_lengths(name: str, site: str) -> None:
    model = mt.open(families.build(name), prove=False)
    prompts = [tokens(seed)[0, :length].tolist() for seed, length in ((0, 5), (1, 8), (2, 6))]
    others = [tokens(seed + 9)[0, : len(prompt)].tolist() for seed, prompt in enumerate(prompts)]
    whole = site.split("[")[0].split("@")[0]
    batch = model.run(others, capture=whole)
    mapping = {whole: batch[whole]}
    metric = mt.metric.LogitDifference(11, foil=13)
    alone = [
        model.sweep([p], [mt.edit.Patch(site, source=model.run([o], capture=whole))], metric).run().effects[0]
        for p, o in zip(prompts, others, strict=True)
    ]
    for source in (batch, mapping):
        cells = [mt.edit.Patch(site, source=source)] * 3
        found = model.sweep(prompts, cells, metric, prompts=[0, 1, 2]).run().effects
        agreed(found, torch.stack(alone), 3e-6, most=1.0)
        with pytest.raises(
            mt.errors.EditError, match="another number of rows than there are prompts; got 3 rows for 1"
        ):
            model.sweep(prompts[:1], cells[:1], metric).run()
