"""A run that starts at a layer with a given stream is the rest of the run that the stream is from."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from tests import families

import microtome as mt

NEAR = {"rtol": 1e-4, "atol": 2e-5}
LAST = families.N_LAYERS - 1


def row(n: int) -> list[int]:
    return torch.randint(5, families.VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist()


ROWS = [row(9), row(6)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", families.some(3))
def test_a_run_from_a_layer_on_is_the_rest_of_the_whole_run(name: str, side: Literal["left", "right"]) -> None:
    model = mt.open(families.build(name), prove=False)
    sites = [str(site) for site in model.anatomy.hook_points if site.name not in ("embed", "attn.scores")]
    whole = model.run(ROWS, capture=sites, padding=side)
    for layer in (0, 1, LAST):
        kept = [str(a) for a in whole.captured if mt.anatomy.parse(str(a)).layers is None or int(str(a)[0]) >= layer]
        assert f"{LAST}.mlp_out" in kept
        rest = model.run(ROWS, kept, start_at=layer, given=whole[f"{layer}.resid_pre"], padding=side)
        for site in kept:
            torch.testing.assert_close(rest[site], whole[site], **NEAR, msg=lambda m, site=site: f"{site}: {m}")
        torch.testing.assert_close(rest.logits, whole.logits, **NEAR)


@pytest.mark.parametrize("name", ["llama-gqa", "gptj"])
def test_edits_act_behind_the_given_stream(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    edits = [mt.edit.Scale("1.resid_pre", 2.0), mt.edit.Zero("2.mlp_out@-1")]
    base = model.run(ROWS[:1], capture="1.resid_pre")["1.resid_pre"]
    rest = model.run(ROWS[:1], edits=edits, start_at=1, given=base)
    torch.testing.assert_close(rest.logits, model.run(ROWS[:1], edits=edits).logits, **NEAR)
    other = model.run(ROWS[:1], edits=edits, start_at=1, given=2 * base)
    assert (other.logits - rest.logits).abs().max() > 1e-2


def test_layers_before_the_start_are_not_computed() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    stream = model.run(ROWS[:1], capture="2.resid_pre")["2.resid_pre"]
    seen: list[int] = []
    for i, layer in enumerate(model.hf.model.layers):
        layer.mlp.register_forward_hook(lambda m, a, o, i=i: seen.append(i))
    pace = model.pace
    model.run(ROWS[:1], start_at=2, given=stream)
    assert seen == [2]
    assert model.pace == pace


def test_the_given_stream_has_a_gradient() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    whole = model.run(ROWS[:1], capture="1.resid_pre", grad=True)
    rest = model.run(ROWS[:1], capture="1.resid_pre", grad=True, start_at=1, given=whole["1.resid_pre"].detach())
    expected, found = (run.grad(run.logits[0, -1, 7])["1.resid_pre"] for run in (whole, rest))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"capture": "0.mlp_out"}, '"0.mlp_out" is never reached: the run starts at layer 1'),
        ({"capture": "0-2.mlp_out"}, '"0-2.mlp_out" is never reached: the run starts at layer 1'),
        ({"capture": "embed"}, '"embed" is never reached: the run starts at layer 1'),
        ({"observe": {"0.attn.z": print}}, '"0.attn.z" is never reached: the run starts at layer 1'),
        ({"edits": mt.edit.Zero("0.mlp_out")}, r"Zero\('0.mlp_out'\) can never act: the run starts at layer 1"),
        ({"edits": mt.edit.Skip("0-2")}, r"Skip\('0-2'\) can never act: the run starts at layer 1"),
        ({"given": None}, "start_at and given go together; got no given"),
        ({"start_at": None}, "start_at and given go together; got no start_at"),
        ({"start_at": 3}, "cannot start at layer 3 of .*; allowed: 0 to 2"),
        ({"start_at": True}, "cannot start at layer True"),
        ({"stop_at": 1}, "a run must stop after the layer at which it starts; got start_at=1, stop_at=1"),
        (
            {"given": torch.zeros(1, 8, families.D_MODEL)},
            r"given is not .* layer 1; got shape \[1, 8, 40\].*\[1, 9, 40\]",
        ),
        ({"given": torch.zeros(9, families.D_MODEL)}, r"given is not a residual stream .* got shape \[9, 40\]"),
    ],
)
def test_what_lies_before_the_start_is_refused(options: dict[str, Any], text: str) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    stream: dict[str, Any] = {"start_at": 1, "given": torch.zeros(1, 9, families.D_MODEL)}
    with pytest.raises((mt.errors.EditError, mt.errors.SiteError), match=text) as caught:
        model.run(ROWS[:1], **stream | options)
    assert "\n" not in str(caught.value)


def test_of_every_layer_those_from_the_start_on_are_captured() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    stream = torch.randn(1, 9, families.D_MODEL, generator=torch.Generator().manual_seed(0))
    run = model.run(ROWS[:1], "*.resid_pre", mt.edit.Scale("*.mlp_out", 0.5), start_at=1, given=stream)
    assert [str(a) for a in run.captured] == ["1.resid_pre", "2.resid_pre"]
    assert torch.equal(run["1.resid_pre"], stream)
    assert stream.shape == (1, 9, families.D_MODEL)
