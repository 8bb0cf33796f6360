"""What the cells of a sweep share is what a model allows: each way is equal to literal runs, and a wider one is not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from tests.scripts import script

import microtome as mt
from microtome.sweep._sharing import Sharing, sharing_of

TOLERANCE = 2e-5
"""Of logits."""
METRIC = mt.metric.LogitDifference(60, foil=70)
EVERYWHERE = Sharing(True, True, True)


@dataclass(frozen=True)
class Way:
    """A family, what its cells share, and how that is described."""

    family: str
    shares: Sharing
    described: str


WAYS = [
    Way("llama", EVERYWHERE, "layers and positions"),
    # Its MLP is flattened to two axes by the mixture, which takes no columns out of it.
    Way("llama4_text", Sharing(True, True, False), "layers and positions"),
    # States of delta attention are no keys and values.
    Way("qwen3_next", Sharing(True, False, True), "layers only, as a prefix of positions cannot be cut"),
    # Its channel mixing reads the token before.
    Way("rwkv", Sharing(True, False, False), "layers only, as a prefix of positions cannot be cut"),
    # Its trunk reshapes what it returns by the shape of the tokens.
    Way("openai-gpt", Sharing(False, False, False), "nothing, as its layers give something else in a batch that grows"),
]
NAMES = [way.family for way in WAYS]


@cache
def opened(family: str) -> mt.Model:
    # What the blocks of a recurrence return is known from its proof alone; the others are open in less time without.
    return mt.open(script("tools/family_configs.py").build(family), prove=family == "rwkv")


def tokens(seed: int, length: int = 16) -> torch.Tensor:
    return torch.randint(30, 100, (1, length), generator=torch.Generator().manual_seed(seed))


def cells_of(model: mt.Model, length: int) -> list[mt.edit.SiteEdit]:
    here, places = model.anatomy.hook_points, (3, length - 2, length - 1)
    streams = [f"{layer}.resid_pre" for layer in range(model.anatomy.n_layers)]
    inside = [str(s) for s in here if s.name in ("attn_out", "mixer_out", "mlp_out", "mlp.post")]
    found: list[mt.edit.SiteEdit] = [mt.edit.Zero(f"{site}@{at}") for site in streams for at in places]
    found += [mt.edit.Zero(f"{site}@{length - 2}") for site in inside]
    scores = [s for s in here if s.name == "attn.scores"]
    return found + [mt.edit.KnockOut(f"{s}@{length - 1}", keys=f"{length - 3}-{length - 2}") for s in scores]


def literal(model: mt.Model, row: torch.Tensor, *edits: mt.edit.Edit) -> float:
    logits = model.run(row, edits=edits).logits[0, -1]
    return float(logits[60] - logits[70])


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_every_way_gives_what_literal_runs_give(way: Way) -> None:
    model, row = opened(way.family), tokens(0)
    cells = cells_of(model, 16)
    result = model.sweep(row, cells, METRIC).run()
    assert replace(sharing_of(model), unreached=frozenset()) == way.shares
    assert result.plan.shares == way.described
    expected = torch.tensor([literal(model, row, cell) for cell in cells])
    base = literal(model, row)
    assert (result.values - expected).abs().max() < TOLERANCE
    assert abs(float(result.base[0]) - base) < TOLERANCE
    assert ((expected - base).abs() > 100 * TOLERANCE).sum() > len(cells) / 2
    if not way.shares.layers:
        assert (result.plan.passes, result.plan.forwards) == (len(cells), len(cells) + 1)


@pytest.mark.parametrize("way", WAYS[1:], ids=NAMES[1:])
def test_a_wider_way_gives_something_else(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    model, row = opened(way.family), tokens(0)
    # Edits inside of the last MLP would let it run whole.
    cells = [cell for cell in cells_of(model, 16) if ".mlp" not in cell.site]
    expected = model.sweep(row, cells, METRIC).run().values
    wider = replace(way.shares, narrow=True, positions=way.shares.narrow, layers=True)
    monkeypatch.setattr("microtome.sweep._sweep.sharing_of", lambda model: wider)
    try:
        got = model.sweep(row, cells, METRIC).run().values
    except Exception:  # noqa: BLE001 (a model's own error, of any kind)
        return
    assert (got - expected).abs().max() > 100 * TOLERANCE


def test_alone_cells_keep_prompts_lengths_sources_and_standing_edits() -> None:
    model = opened("openai-gpt")
    prompts = [tokens(1)[0], tokens(2, 11)[0], tokens(3)[0]]
    source = model.run([tokens(4)[0], tokens(5, 11)[0], tokens(6)[0]], capture=["1.resid_pre", "2.mlp_out"])
    cells: list[Any] = [
        mt.edit.Patch("1.resid_pre@4", source=source),
        [mt.edit.Patch("2.mlp_out@-1", source=source), mt.edit.Zero("0.attn_out@2")],
        mt.edit.Zero("*.attn_out@5"),
        mt.edit.Patch("1.resid_pre@-1", source=source),
    ]
    which, standing = [1, 2, 0, 0], mt.edit.Scale("1.mlp_out", factor=0.5)
    with model.editing(standing):
        result = model.sweep(prompts, cells, METRIC, prompts=which).run()
    for value, cell, prompt in zip(result.values, cells, which, strict=True):
        length = len(prompts[prompt])
        own = {name: source[name][prompt : prompt + 1, :length] for name in ("1.resid_pre", "2.mlp_out")}
        edits = [
            replace(edit, source=own) if isinstance(edit, mt.edit.Patch) else edit
            for edit in (cell if isinstance(cell, list) else [cell])
        ]
        assert abs(float(value) - literal(model, prompts[prompt][None], standing, *edits)) < TOLERANCE
    for prompt, row in enumerate(prompts):
        assert abs(float(result.base[prompt]) - literal(model, row[None], standing)) < TOLERANCE


def test_alone_cells_start_with_the_stream_that_is_given() -> None:
    model, row, other = opened("openai-gpt"), tokens(1), tokens(2)
    start, cell = model.run(other, capture="0.resid_pre")["0.resid_pre"], mt.edit.Zero("1.mlp_out@7")
    found = mt.sweep.Sweep(model, row, [cell], METRIC, start=start).run()
    assert abs(float(found.values[0]) - literal(model, other, cell)) < TOLERANCE
    assert abs(float(found.base[0]) - literal(model, other)) < TOLERANCE


def test_alone_cells_are_counted_stopped_and_limited() -> None:
    model, row = opened("openai-gpt"), tokens(1)
    cells = [mt.edit.Zero(f"{layer}.resid_pre@5") for layer in range(3)]
    seen: list[tuple[int, int]] = []

    def stop(done: int, of: int) -> None:
        seen.append((done, of))
        if done == 2:
            raise KeyboardInterrupt

    swept = model.sweep(row, cells, METRIC)
    found = swept.run(stop)
    assert seen == [(1, 3), (2, 3)]
    assert found.done == 2
    assert found.values.isnan().tolist() == [False, False, True]
    model.sweep(row, cells, METRIC, budget=swept.plan.bytes)
    with pytest.raises(mt.errors.BudgetError, match="one cell of this sweep"):
        model.sweep(row, cells, METRIC, budget=swept.plan.bytes - 1)


def test_edges_are_refused_where_layers_are_not_shared() -> None:
    model = opened("openai-gpt")
    change = torch.ones(16, model.anatomy.d_model)
    with pytest.raises(mt.errors.SiteError, match="has no edges that can be measured"):
        model.sweep(tokens(1), [mt.sweep.Edge("embed", "2.mlp.in", change=change)], METRIC)


def test_a_layer_that_is_passed_by_is_named() -> None:
    model, row = opened("mllama"), tokens(1)
    cells = [mt.edit.Zero("0.resid_pre@5"), mt.edit.Zero("2.resid_pre@15")]
    found = model.sweep(row, cells, METRIC).run()
    for value, cell in zip(found.values, cells, strict=True):
        assert abs(float(value) - literal(model, row, cell)) < TOLERANCE
    with pytest.raises(mt.errors.EditError, match="passes layer 1 by"):
        model.sweep(row, [mt.edit.Zero("1.resid_pre@5")], METRIC)


def test_the_trial_is_made_once_and_leaves_the_pace_as_it_was() -> None:
    model = mt.open(script("tools/family_configs.py").build("llama"), prove=False)
    model.run(tokens(0))
    pace = model.pace
    first = sharing_of(model)
    assert sharing_of(model) is first
    assert model.pace == pace
