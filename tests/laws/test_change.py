"""A change of weights: what it does, what undoing gives back, and what it refuses."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import families

import microtome as mt
from microtome.errors import ArgumentError, DataError, EditError, OutputError, SiteError

ROWS = [[7, 20, 33, 41, 52], [9, 21, 34, 42, 53]]
FAMILIES = ["llama-gqa", "gpt2", "phi3", "gptj", "olmo2"]  # grouped, transposed, fused, parallel, post-norm


def opened(name: str = "llama-gqa") -> mt.Model:
    return mt.open(families.build(name), prove=False)


def bits(model: mt.Model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.hf.named_parameters()}


def same(model: mt.Model, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in model.hf.named_parameters())


def drawn(model: mt.Model, address: str, seed: int = 0, size: float = 0.1) -> torch.Tensor:
    shape = mt.change.weight_at(model, address).shape
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_change_of_neurons_and_heads_acts_where_the_address_says(name: str) -> None:
    model = opened(name)
    parts = model.anatomy.parts.layers[1]
    for site, address, module in (("1.mlp.post", "1.W_out", parts.down), ("1.attn.z", "1.W_O[2]", parts.o)):
        x = model.run(ROWS, capture=site)[site]
        x = x[:, :, 2] if site == "1.attn.z" else x
        delta = drawn(model, address)
        inner = model.hf.get_submodule(str(module))
        with mt.change.of(model, {address: delta}).applied(model):
            changed = model.run(ROWS).logits
        hook = inner.register_forward_hook(lambda _, __, out, d=delta, x=x: out + x @ d.reshape(-1, d.shape[-1]))
        expected = model.hf(torch.tensor(ROWS)).logits
        hook.remove()
        assert (changed - expected).abs().max() < 1e-4, address
        assert (changed - model.run(ROWS).logits).abs().max() > 1e-3, address


@pytest.mark.parametrize("name", FAMILIES)
def test_a_neuron_without_its_row_is_a_neuron_that_is_zero(name: str) -> None:
    model = opened(name)
    zeroed = model.run(ROWS, edits=[mt.edit.Zero("1.mlp.post[3,9]")]).logits
    rows = mt.change.weight_at(model, "1.W_out[3,9]").read()
    with mt.change.of(model, {"1.W_out[3,9]": -rows}).applied(model):
        assert (model.run(ROWS).logits - zeroed).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("address", "site"),
    [
        ("1.W_in[3,9]", "1.mlp.post[3,9]"),
        ("1.W_V[1]", "1.attn.v[1]"),
        ("0.W_Q[2]", "0.attn.q[2]"),
        ("0.W_O[3]", "0.attn.z[3]"),
    ],
)
def test_units_are_those_of_the_sites(address: str, site: str) -> None:
    model = opened()
    expected = model.run(ROWS, edits=[mt.edit.Zero(site)]).logits
    with mt.change.of(model, {address: -mt.change.weight_at(model, address).read()}).applied(model):
        assert (model.run(ROWS).logits - expected).abs().max() < 1e-5


def test_low_rank_and_values_give_what_a_sum_gives() -> None:
    model = opened()
    left, right = drawn(model, "1.W_in")[:, :2], drawn(model, "1.W_in", 1)[:2]
    whole, weight = left.double() @ right.double(), mt.change.weight_at(model, "1.W_in").read()
    given: list[Any] = [whole, mt.change.LowRank(left, right), mt.change.Values((weight.double() + whole).float())]
    assert len({mt.change.of(model, {"1.W_in": one}).after for one in given}) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_undo_restores_every_bit_after_random_sequences(name: str) -> None:
    model, generator = opened(name), torch.Generator().manual_seed(3)
    before, addresses = bits(model), ["0.W_out", "1.W_O[1]", "2.W_in[5,7]", "0.W_V[0]", "W_E", "1.W_out[0-9]"]
    for _ in range(20):
        done: list[mt.change.Change] = []
        for i in torch.randint(len(addresses), (4,), generator=generator).tolist():
            change = mt.change.of(model, {addresses[i]: drawn(model, addresses[i], i, 0.37)})
            change.apply(model)
            done.append(change)
        assert mt.change.applied_to(model) == done
        assert not same(model, before)
        for change in reversed(done):
            change.undo(model)
        assert same(model, before)


def fail_inside(
    change: mt.change.Change, model: mt.Model, before: dict[str, torch.Tensor], kind: type[BaseException]
) -> None:
    with change.applied(model):
        assert not same(model, before)
        raise kind


def test_a_model_is_restored_after_an_exception_and_after_ctrl_c() -> None:
    model = opened()
    before = bits(model)
    for kind in (ValueError, KeyboardInterrupt):
        change = mt.change.of(model, {"1.W_out": drawn(model, "1.W_out")})
        with pytest.raises(kind):
            fail_inside(change, model, before, kind)
        assert same(model, before)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_ctrl_c_while_weights_are_written_or_restored_leaves_them_whole(
    monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    model = opened()
    both = {"0.W_out": drawn(model, "0.W_out"), "1.W_out": drawn(model, "1.W_out")}
    before, change, calls = bits(model), mt.change.of(model, both), [0]
    kind = type(mt.change.weight_at(model, "0.W_out"))
    write = kind.write

    def interrupted(self: Any, values: torch.Tensor) -> None:
        calls[0] += 1
        if calls[0] == at:
            signal.raise_signal(signal.SIGINT)
        write(self, values)

    monkeypatch.setattr(kind, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        enter(change, model)
    assert calls[0] == 4
    assert same(model, before)
    assert mt.change.applied_to(model) == []


def enter(change: mt.change.Change, model: mt.Model) -> None:
    with change.applied(model):
        assert model.fingerprint == change.after


def test_a_write_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened()
    both = {"0.W_out": drawn(model, "0.W_out"), "1.W_out": drawn(model, "1.W_out")}
    before, change, calls = bits(model), mt.change.of(model, both), [0]
    kind = type(mt.change.weight_at(model, "0.W_out"))
    write = kind.write

    def failing(self: Any, values: torch.Tensor) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise RuntimeError("out of memory")
        write(self, values)

    monkeypatch.setattr(kind, "write", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        change.apply(model)
    assert same(model, before)
    assert mt.change.applied_to(model) == []


def test_a_block_is_restored_though_changes_inside_it_are_not_undone() -> None:
    model = opened()
    before, outer = bits(model), mt.change.of(model, {"0.W_out": drawn(model, "0.W_out")})
    with outer.applied(model):
        inner = mt.change.of(model, {"1.W_out": drawn(model, "1.W_out")})
        inner.apply(model)
    assert same(model, before)
    assert mt.change.applied_to(model) == []
    with pytest.raises(KeyError):
        leave(outer, inner, model)
    assert same(model, before)


def leave(outer: mt.change.Change, inner: mt.change.Change, model: mt.Model) -> None:
    with outer.applied(model):
        inner.apply(model)
        raise KeyError


def test_weights_that_moved_are_restored_where_they_are_now() -> None:
    model = opened()
    before, change = bits(model), mt.change.of(model, {"0.W_out": drawn(model, "0.W_out")})
    with change.applied(model):
        for parameter in model.hf.parameters():
            parameter.data = parameter.data.clone()  # as moving to another device does
    assert same(model, before)


def test_a_change_may_be_made_from_the_weights_themselves() -> None:
    model = opened()
    first, second = (model.layers[i].W_out for i in (0, 1))
    whole = bits(model)
    with mt.change.of(model, {"0.W_out": mt.change.Values(second), "1.W_out": mt.change.Values(first)}).applied(model):
        assert torch.equal(model.layers[0].W_out, whole["model.layers.1.mlp.down_proj.weight"].T)
        assert torch.equal(model.layers[1].W_out, whole["model.layers.0.mlp.down_proj.weight"].T)
    with mt.change.of(model, {"1.W_out": model.layers[1].W_out}).applied(model):
        assert torch.equal(model.layers[1].W_out, 2 * whole["model.layers.1.mlp.down_proj.weight"].T)
    assert same(model, whole)


def test_changes_follow_on_each_other_and_compose() -> None:
    model = opened()
    before, first = bits(model), mt.change.of(model, {"0.W_out": drawn(model, "0.W_out")}, reason="first")
    with first.applied(model):
        second = mt.change.of(model, {"0.W_out": drawn(model, "0.W_out", 1)}, reason="second")
        with second.applied(model):
            logits = model.run(ROWS).logits
    with first.then(second).applied(model):
        assert torch.equal(model.run(ROWS).logits, logits)
    assert same(model, before)
    with pytest.raises(EditError, match="do not follow on each other"):
        second.then(first)
    with pytest.raises(EditError, match=r"another model or another state.*allowed: "):
        second.apply(model)
    first.apply(model)
    second.apply(model)
    with pytest.raises(EditError, match="another change was applied after this one; got second"):
        first.undo(model)
    with pytest.raises(EditError, match="applied already"):
        second.apply(model)
    second.undo(model)
    first.undo(model)
    with pytest.raises(EditError, match="not applied to this model"):
        first.undo(model)
    assert same(model, before)


def test_what_was_written_besides_is_not_undone_over() -> None:
    model = opened()
    change = mt.change.of(model, {"0.W_out": drawn(model, "0.W_out")})
    change.apply(model)
    with torch.no_grad():
        model.W_E[3, 3] += 1
    with pytest.raises(EditError, match="written to since"):
        change.undo(model)
    other = opened()
    change = mt.change.of(other, {"0.W_out": drawn(other, "0.W_out")})
    with pytest.raises(EditError, match="written to inside the block"), change.applied(other), torch.no_grad():
        other.W_E.add_(1.0)


def test_a_change_for_another_model_is_refused() -> None:
    model, other = opened(), opened("mistral")
    change = mt.change.of(model, {"0.W_out": drawn(model, "0.W_out")})
    before = bits(other)
    with pytest.raises(EditError, match="another model"):
        change.apply(other)
    assert same(other, before)


def test_a_change_that_was_saved_is_the_change(tmp_path: Path) -> None:
    model = opened()
    deltas: dict[str, Any] = {
        "0.W_out[3]": drawn(model, "0.W_out[3]"), "W_E": mt.change.LowRank(torch.ones(101, 1), torch.ones(1, 40)),
        "1.W_in": mt.change.Values(torch.zeros(40, 56)),
    }  # fmt: skip
    change = mt.change.of(model, deltas, reason="why", method="mine", parameters={"rank": 1}, seed=4)
    change.save(tmp_path / "change.safetensors")
    loaded = mt.change.load(tmp_path / "change.safetensors")
    assert (loaded.before, loaded.after, loaded.weights) == (change.before, change.after, change.weights)
    step = loaded.steps[0]
    assert (step.method, step.reason, step.parameters, step.seed) == ("mine", "why", {"rank": 1}, 4)
    with loaded.applied(model):
        assert model.fingerprint == change.after
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for name in ("bad", "missing"):
        with pytest.raises(DataError, match="cannot read a change"):
            mt.change.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(OutputError):
        change.save(tmp_path / "no" / "folder" / "change.safetensors")


def test_a_random_change_has_the_norms_and_the_ranks() -> None:
    model = opened()
    deltas: dict[str, Any] = {
        "0.W_out": drawn(model, "0.W_out"), "1.W_in": mt.change.LowRank(torch.ones(40, 1), torch.ones(1, 56)),
        "2.W_O[1]": mt.change.Values(torch.zeros(1, 10, 40)),
    }  # fmt: skip
    change = mt.change.of(model, deltas)
    random, norms = change.random(model, seed=2), change.norms(model)
    assert random.norms(model)["added"].values == pytest.approx(norms["added"].values, rel=1e-9)
    assert random.after == change.random(model, seed=2).after
    assert random.after not in (change.after, change.random(model, seed=3).after)
    left: Any = random.steps[0].deltas["1.W_in"]
    assert left.left.shape == (40, 1)
    assert float(norms["share"].sel(weight_name="2.W_O[1]")) == pytest.approx(1.0)


def test_what_is_refused() -> None:
    model = opened()
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, ArgumentError, "at least one weight"),
        ({"0.W_out": torch.zeros(3, 3)}, ArgumentError, r"does not fit 0.W_out; got \[3, 3\]; allowed: \[56, 40\]"),
        ({"0.W_out": torch.full((56, 40), torch.nan)}, ArgumentError, "not finite; got 2240 of 2240"),
        ({"0.W_uot": torch.zeros(3)}, SiteError, "Did you mean"),
        ({"9.W_out": torch.zeros(3)}, SiteError, "layers 0 to 2"),
        ({"0.W_out[99]": torch.zeros(1, 40)}, SiteError, "0 to 55"),
        ({"0.b_out": torch.zeros(40)}, SiteError, "has no 0.b_out"),
        ({"model.norm.wait": torch.zeros(40)}, SiteError, "there is no weight"),
        ({"W_E[3]": torch.zeros(40)}, SiteError, 'To do: write "W_E"'),
    ]
    before = bits(model)
    for deltas, kind, text in wrong:
        with pytest.raises(kind, match=text):
            mt.change.of(model, {"1.W_out": drawn(model, "1.W_out")} | deltas if deltas else deltas)
        assert same(model, before)


def test_parameters_must_be_plain_values() -> None:
    model = opened()
    with pytest.raises(ArgumentError, match="must be plain values"):
        mt.change.of(model, {"1.W_out": drawn(model, "1.W_out")}, parameters={"rate": torch.ones(1)})


def test_a_parameter_can_be_named_by_its_path() -> None:
    model = opened()
    norm = model.final_norm
    assert norm is not None
    plain, gain = model.run(ROWS).logits, torch.as_tensor(norm.gain).clone()
    with mt.change.of(model, {"model.norm.weight": gain}).applied(model):  # twice what it was
        assert (model.run(ROWS).logits - 2 * plain).abs().max() < 1e-4
    assert torch.equal(torch.as_tensor(norm.gain), gain)


def test_a_weight_that_is_a_copy_cannot_be_written() -> None:
    model = opened("falcon-gqa")
    with pytest.raises(SiteError, match=r"0.W_Q of .* cannot be written"):
        mt.change.weight_at(model, "0.W_Q")
    assert mt.change.weight_at(model, "0.W_K").shape == tuple(model.layers[0].W_K.shape)
