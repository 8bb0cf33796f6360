"""The laws of the trainer: what is resumed equals what ran through; nothing is lost; what it borrows it puts back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.families import build
from torch import Tensor, nn

import microtome as mt
from microtome.edit import Add, Scale, Set
from microtome.errors import ArgumentError, DataError, FitError, OutputError
from microtome.training import Fitted

STEPS = 12


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(build("llama-gqa"))


def problem(seed: int = 0) -> tuple[dict[str, Tensor], Callable[[int], Tensor], Callable[[Tensor], Any]]:
    """A regression with noise inside the loss: two tensors, batches of a step, a loss that draws."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(5, 3, generator=generator)
    tensors = {"w": torch.zeros(5, 3), "b": torch.zeros(3)}

    def batch(step: int) -> Tensor:
        return torch.randn(16, 5, generator=torch.Generator().manual_seed(1000 + step))

    def loss(x: Tensor) -> Any:
        noisy = x + 0.1 * torch.randn(x.shape)
        gap = noisy @ tensors["w"] + tensors["b"] - (x @ truth + 1)
        return gap.square().mean(), {"worst": gap.detach().abs().max()}

    return tensors, batch, loss


RULES = (
    {"optimizer": "adamw", "lr": 0.05, "weight_decay": 0.01, "schedule": "cosine", "warmup": 3},
    {"optimizer": "sgd", "lr": 0.05, "clip": 1.0, "schedule": "linear"},
    {"optimizer": "lbfgs", "lr": 0.5},
)


class Stopped(Exception):
    """Stands for whatever ends a training in the middle."""


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["optimizer"]))
@pytest.mark.parametrize("cut", [1, 5, STEPS - 1])
@pytest.mark.parametrize("how", [Stopped, KeyboardInterrupt])
def test_resumed_equals_uninterrupted(rule: Any, cut: int, how: Any, tmp_path: Path) -> None:
    tensors, batch, loss = problem()
    whole = mt.fit(tensors, loss, batch, STEPS, **rule)
    want = {name: x.clone() for name, x in tensors.items()}
    assert all(float(x.abs().max()) > 0.05 for x in want.values())

    tensors, batch, loss = problem()

    def stopping(step: int) -> Tensor:
        if step == cut:
            raise how
        return batch(step)

    place = tmp_path / "state.safetensors"
    with pytest.raises(how):
        mt.fit(tensors, loss, stopping, STEPS, checkpoint=place, every=4, **rule)
    assert all(not bool(x.any()) for x in tensors.values()), "put back"
    assert Fitted.load(place).step == cut
    again = mt.fit(tensors, loss, batch, STEPS, checkpoint=place, every=4, **rule)
    for name, x in want.items():
        assert torch.equal(tensors[name], x)
    assert again.metrics.identical(whole.metrics)
    assert again.step == STEPS
    torch.manual_seed(7)  # another state of the generators outside changes nothing
    tensors, batch, loss = problem()
    once_more = mt.fit(tensors, loss, batch, STEPS, checkpoint=place, every=4, **rule)
    assert torch.equal(once_more.values["w"], want["w"]), "a finished one is given back"


def test_muon_is_resumed(tmp_path: Path) -> None:
    def once(cut: int | None) -> Tensor:
        tensors, batch, loss = problem()
        bias = tensors.pop("b")
        tensors["b"] = bias

        def stopping(step: int) -> Tensor:
            if step == cut:
                raise Stopped
            return batch(step)

        given: dict[str, Any] = {"lr": 0.05, "optimizer": "muon", "checkpoint": tmp_path / f"{cut}"}
        if cut is not None:
            with pytest.raises(Stopped):
                mt.fit({"w": tensors["w"]}, loss, stopping, 6, **given)
        mt.fit({"w": tensors["w"]}, loss, batch, 6, **given)
        return tensors["w"]

    assert torch.equal(once(None), once(3))
    assert float(once(None).abs().max()) > 0.01


def test_it_finds_the_minimum() -> None:
    tensors, batch, loss = problem()
    found = mt.fit(tensors, loss, batch, 400, lr=0.05, schedule="linear")
    assert float(found.metrics["loss"][-20:].mean()) < 0.02 * float(found.metrics["loss"][0])
    assert torch.allclose(tensors["b"], torch.ones(3), atol=0.05)
    assert found.metrics["lr"].values[0] == 0.05
    assert found.metrics["lr"].values[-1] == pytest.approx(0.05 / 400)


def test_no_step_changes_nothing() -> None:
    tensors, batch, loss = problem()
    found = mt.fit(tensors, loss, batch, 0)
    assert found.step == 0
    assert all(not bool(x.any()) for x in tensors.values())
    assert dict(found.metrics.sizes) == {"step": 0}


def test_the_generators_outside_are_left_alone() -> None:
    tensors, batch, loss = problem()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = mt.fit(tensors, loss, batch, 5, seed=1).metrics
    assert torch.equal(torch.get_rng_state(), before)
    same = mt.fit(problem()[0], loss, batch, 0, seed=1)
    assert same.attrs["seed"] == 1
    tensors, batch, loss = problem()
    torch.manual_seed(4)
    assert mt.fit(tensors, loss, batch, 5, seed=1).metrics.identical(first)
    tensors, batch, loss = problem()
    assert not mt.fit(tensors, loss, batch, 5, seed=2).metrics.identical(first)


def test_it_puts_back_what_it_borrows(model: mt.Model) -> None:
    weights = dict(model.hf.named_parameters())
    before = {name: x.detach().clone() for name, x in weights.items()}
    flags = {name: x.requires_grad for name, x in weights.items()}
    model.hf.train()
    try:
        with pytest.raises(Stopped):
            mt.fit(model.hf, _lm_loss(model, stop=2), [torch.arange(8)[None]], 5, model=model)
        assert model.hf.training
        assert all(module.training for module in model.hf.modules())
    finally:
        model.hf.eval()
    assert {name: x.requires_grad for name, x in weights.items()} == flags
    assert all(x.grad is None for x in weights.values())
    assert all(torch.equal(x, before[name]) for name, x in weights.items())


def _lm_loss(model: mt.Model, stop: int | None = None) -> Callable[[Tensor], Tensor]:
    calls = 0

    def loss(tokens: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls - 1 == stop:
            raise Stopped
        assert not model.hf.training
        logits = model.run(tokens, grad=True).logits
        assert logits is not None
        return nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:])

    return loss


def test_the_weights_of_a_model_are_trained(model: mt.Model) -> None:
    before = {name: x.detach().clone() for name, x in model.hf.named_parameters()}
    print_before = model.fingerprint
    try:
        found = mt.fit(model.hf, _lm_loss(model), [torch.arange(8)[None]], 30, lr=0.01, model=model)
        assert float(found.metrics["loss"][-1]) < 0.2 * float(found.metrics["loss"][0])
        assert model.fingerprint != print_before
        assert found.attrs["fingerprint"] == print_before
    finally:
        with torch.no_grad():
            for name, x in model.hf.named_parameters():
                x.copy_(before[name])
    assert model.fingerprint == print_before


def test_edits_stay_active(model: mt.Model) -> None:
    """What a standing edit cuts off has no gradient; an edit that changes nothing changes none."""
    tokens, d = torch.arange(8)[None], model.anatomy.d_model

    def gradients(*edits: Any) -> Tensor:
        vector, seen = torch.zeros(d), list[Tensor]()

        def loss(tokens: Tensor) -> Tensor:
            run = model.run(tokens, edits=[Add("0.resid_post@3", vector)], grad=True)
            assert run.logits is not None
            value = run.logits[0, -1].log_softmax(-1)[5] + 0 * vector.sum()
            seen.append(torch.autograd.grad(value, vector, retain_graph=True)[0])
            return value

        mt.fit({"vector": vector}, loss, [tokens], 1, model=model, edits=edits)
        return seen[0]

    plain = gradients()
    assert float(plain.abs().max()) > 1e-4
    assert torch.allclose(gradients(Scale("1.attn.z", 1.0)), plain, rtol=0, atol=1e-7)
    own = model.run(tokens, capture="1.mlp_out")["1.mlp_out"]
    assert float((gradients(Set("1.mlp_out", own)) - plain).abs().max()) > 1e-5, "a constant passes no gradient"
    assert not bool(gradients(Set("1.resid_post", own)).any())
    assert model.run(tokens).logits is not None


def test_a_loss_that_is_not_finite_ends_it(tmp_path: Path) -> None:
    w = torch.full((3,), 1.0)

    def loss(step: int) -> Tensor:
        return w.square().sum() if step < 4 else (w - 1e9).sqrt().sum()

    with pytest.raises(FitError, match=r"the loss is not finite at step 4; got nan.*lower the learning rate") as caught:
        mt.fit({"w": w}, loss, lambda step: step, 10, optimizer="sgd", momentum=0.0, lr=0.1)
    assert torch.equal(w, torch.ones(3)), "put back"
    good = caught.value.fitted
    assert isinstance(good, Fitted)
    assert torch.allclose(good.values["w"], torch.full((3,), 0.8**3)), "of the last step whose loss was finite"
    assert good.metrics.sizes["step"] == 4


def test_it_is_ended_by_whoever_looks() -> None:
    tensors, batch, loss = problem()
    seen: list[int] = []

    def look(step: int, metrics: Any) -> bool:
        seen.append(step)
        assert set(metrics) == {"loss", "lr", "worst"}
        return step == 6

    found = mt.fit(tensors, loss, batch, 50, observe=look)
    assert seen == list(range(7))
    assert found.step == 7


def test_what_comes_after_a_step() -> None:
    """A projection after each update keeps unit rows."""
    w = nn.functional.normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), dim=1)

    def unit() -> None:
        w.div_(w.norm(dim=1, keepdim=True))

    mt.fit([w], lambda x: (w @ x).square().mean(), [torch.ones(6)], 20, lr=0.1, after=unit)
    assert torch.allclose(w.norm(dim=1), torch.ones(4), atol=1e-6)
    assert float((w @ torch.ones(6)).square().mean()) < 0.05


def test_progress_counts_its_steps() -> None:
    tensors, batch, loss = problem()
    seen: list[tuple[str, int, int]] = []
    with mt.settings(progress=lambda *x: seen.append(x)):
        mt.fit(tensors, loss, batch, 3, name="a lens")
    assert seen == [("a lens", 1, 3), ("a lens", 2, 3), ("a lens", 3, 3)]


def test_what_was_trained_is_saved(tmp_path: Path) -> None:
    tensors, batch, loss = problem()
    found = mt.fit(tensors, loss, batch, 3)
    found.save(tmp_path / "x.safetensors")
    again = Fitted.load(tmp_path / "x.safetensors")
    assert again.metrics.identical(found.metrics)
    assert again.attrs == found.attrs
    assert again.step == 3
    assert all(torch.equal(again.values[name], x) for name, x in tensors.items())
    assert "value.w" in load_file(tmp_path / "x.safetensors"), "readable without us"


def test_a_longer_training_goes_on(tmp_path: Path) -> None:
    place = tmp_path / "s"
    tensors, batch, loss = problem()
    mt.fit(tensors, loss, batch, 4, checkpoint=place)
    tensors, batch, loss = problem()
    more = mt.fit(tensors, loss, batch, 9, checkpoint=place)
    tensors, batch, loss = problem()
    assert mt.fit(tensors, loss, batch, 9).metrics.identical(more.metrics)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "s"
    tensors, batch, loss = problem()
    mt.fit(tensors, loss, batch, 4, checkpoint=place)
    for given, named in (({"lr": 0.5}, "lr"), ({"seed": 9}, "seed"), ({"schedule": "linear"}, "schedule")):
        with pytest.raises(DataError, match=rf"is the checkpoint of another training; got {named}"):
            mt.fit(problem()[0], loss, batch, 4, checkpoint=place, **given)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="another training; got start"):
        mt.fit({"w": torch.ones(5, 3), "b": torch.ones(3)}, loss, batch, 4, checkpoint=place)
    place.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="cannot read a training from"):
        mt.fit(problem()[0], loss, batch, 4, checkpoint=place)


def test_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    tensors, batch, loss = problem()
    with pytest.raises(OutputError, match="cannot write a training to"):
        mt.fit(tensors, loss, batch, 4, checkpoint=tmp_path / "nowhere" / "s")
    assert all(not bool(x.any()) for x in tensors.values())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"optimizer": "adam"}, r"no optimizer 'adam'; allowed: adamw, sgd, lbfgs, muon.*Did you mean \"adamw\""),
        ({"schedule": "step"}, "no schedule 'step'; allowed: constant, linear, cosine"),
        ({"lr": 0.0}, "lr of a training; got 0.0; allowed: above 0"),
        ({"lr": math.nan}, "lr of a training; got nan"),
        ({"clip": -1.0}, "clip of a training; got -1.0"),
        ({"momentum": 1.0}, "momentum of a training; got 1.0; allowed: 0 to below 1"),
        ({"steps": -1}, "a training takes steps; got steps=-1"),
        ({"every": 0}, "a training takes steps; got steps=1000, every=0"),
        ({"edits": [Scale("0.mlp_out", 2.0)]}, "edits need a model"),
        ({"optimizer": "muon"}, r'muon trains matrices alone; got "b" \[3\]'),
        ({"seed": -1}, "seed must be an integer of 0 or more"),
    ],
)
def test_wrong_arguments(given: Any, text: str) -> None:
    tensors, batch, loss = problem()
    with pytest.raises(ArgumentError, match=text):
        mt.fit(tensors, loss, batch, **given)


def test_what_cannot_be_trained() -> None:
    tensors, batch, loss = problem()
    with pytest.raises(ArgumentError, match="there is nothing to train"):
        mt.fit({}, loss, batch)
    with pytest.raises(ArgumentError, match=r'cannot be trained; got "n", a tensor of torch.int64'):
        mt.fit({"n": torch.arange(3)}, loss, batch)
    with pytest.raises(ArgumentError, match=r"cannot be trained; got \"0\", the result of a computation"):
        mt.fit([torch.zeros(3, requires_grad=True) * 2], loss, batch)
    with pytest.raises(ArgumentError, match="batches that can be asked for again; got none"):
        mt.fit(tensors, loss, [])
    with pytest.raises(FitError, match="the loss depends on none of the parameters; got w, b"):
        mt.fit(tensors, lambda x: torch.ones(1, requires_grad=True).sum(), [1])
    with pytest.raises(FitError, match="the loss depends on none of the parameters"):
        mt.fit(tensors, lambda x: torch.ones(()), [1])
    with pytest.raises(FitError, match=r"must be one number; got shape \[3\]"):
        mt.fit(tensors, lambda x: tensors["b"] * 1, [1])
    assert not any(x.requires_grad for x in tensors.values())


def test_what_is_stopped_inside_an_update_is_not_kept(tmp_path: Path) -> None:
    """A half-done step leaves the checkpoint of the last one that was written."""
    place, calls = tmp_path / "s", 0

    def stopping() -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Stopped

    tensors, batch, loss = problem()
    with pytest.raises(Stopped):
        mt.fit(tensors, loss, batch, 9, after=stopping, checkpoint=place, every=2)
    assert Fitted.load(place).step == 4
    tensors, batch, loss = problem()
    resumed = mt.fit(tensors, loss, batch, 9, checkpoint=place)
    tensors, batch, loss = problem()
    assert mt.fit(tensors, loss, batch, 9).metrics.identical(resumed.metrics)


def test_an_update_that_leaves_no_number_ends_it(tmp_path: Path) -> None:
    """A finite loss may have a gradient that is none; the checkpoint keeps the last good state."""
    x, place = torch.tensor([4.0]), tmp_path / "s"

    def loss(step: int) -> Tensor:
        return x.sum() if step < 3 else (x - x.detach()).abs().sqrt().sum()

    with pytest.raises(FitError, match='"x" is not finite after step 3') as caught:
        mt.fit({"x": x}, loss, lambda step: step, 9, optimizer="sgd", momentum=0.0, lr=1.0, checkpoint=place, every=1)
    assert torch.equal(x, torch.tensor([4.0]))
    assert torch.equal(caught.value.fitted.values["x"], torch.tensor([1.0]))
    assert Fitted.load(place).step == 3
    assert torch.equal(Fitted.load(place).values["x"], torch.tensor([1.0]))


def test_buffers_are_resumed_and_put_back(tmp_path: Path) -> None:
    def made() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    def trained(module: nn.Module, cut: int | None = None, **more: Any) -> Fitted:
        def batch(step: int) -> Tensor:
            if step == cut:
                raise Stopped
            return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))

        return mt.fit(module, lambda x: (module(x) - x[:, :3] - 2).square().mean(), batch, 6, **more)

    whole, cut, place = made(), made(), tmp_path / "s"
    trained(whole)
    before = {key: x.clone() for key, x in cut.state_dict().items()}
    with pytest.raises(Stopped):
        trained(cut, 3, checkpoint=place)
    assert all(torch.equal(x, before[key]) for key, x in cut.state_dict().items())
    trained(cut, checkpoint=place)
    assert all(torch.equal(x, cut.state_dict()[key]) for key, x in whole.state_dict().items())
    assert not torch.equal(whole.state_dict()["1.running_mean"], before["1.running_mean"])


def test_whoever_looks_may_draw() -> None:
    tensors, batch, loss = problem()
    plain = mt.fit(tensors, loss, batch, 4).metrics
    tensors, batch, loss = problem()
    assert mt.fit(tensors, loss, batch, 4, observe=lambda step, found: bool(torch.rand(3).sum() < 0)).metrics.identical(
        plain
    )


def test_another_loss_is_another_training(tmp_path: Path) -> None:
    place = tmp_path / "s"

    def trained(goal: float) -> float:
        x = torch.zeros(1)
        mt.fit({"x": x}, lambda _: (x - goal).square().sum(), [0], 50, lr=0.1, checkpoint=place)
        return float(x)

    assert trained(1.0) == trained(1.0) > 0.9
    with pytest.raises(DataError, match="another training; got a first loss of 1; allowed: 25, that of this loss"):
        trained(-5.0)


def test_an_error_says_how_far_its_values_are() -> None:
    w = torch.ones(1)
    with pytest.raises(FitError) as caught:
        mt.fit([w], lambda step: w.sum() * (1 if step < 3 else math.nan), lambda step: step, 9, optimizer="sgd", lr=0.1)
    assert caught.value.fitted.step == 2
    assert caught.value.fitted.metrics.sizes["step"] == 3
