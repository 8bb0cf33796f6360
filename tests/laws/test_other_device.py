"""A model on another device gives what the CPU gives, and nothing meets a tensor that was left on the CPU.

The device is a pretence (see `tests/elsewhere.py`), so that this runs on any machine; what is compared is what
`tools/gpu_check.py` compares on a real one.
"""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.elsewhere import DEVICE, WAITS, Elsewhere, Mixed
from tests.scripts import script

import microtome as mt
from microtome.run import free_memory
from microtome.stream import Extremes, Firing, Moments, TopExamples

agreement = script("tools/gpu_agreement.py")
QUICK = ("capture", "edits", "sweep")


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("microtome.model._open.refuse_unreadable", lambda *_: None)  # real meta tensors have no numbers
    with Elsewhere() as device:
        yield device


def moved(hf: Any) -> Any:
    """A copy of a model on the other device; its parameters stay leaves."""
    hf = deepcopy(hf)
    for module in hf.modules():
        for name, held in module._parameters.items():
            if held is not None:
                module._parameters[name] = torch.nn.Parameter(held.data.to(DEVICE))
        for name, held in module._buffers.items():
            module._buffers[name] = None if held is None else held.to(DEVICE)
    hf.tie_weights()
    return hf


def test_the_pretended_device_refuses_what_a_device_refuses(there: torch.device) -> None:
    here, away = torch.ones(3), torch.ones(3, device=there)
    assert away.device == there
    assert (away + away).tolist() == [2, 2, 2]
    assert (away + torch.tensor(1.0)).cpu().tolist() == [2, 2, 2]
    assert away[torch.tensor([0])].tolist() == [1]
    for mixed in (lambda: away + here, lambda: here[torch.tensor([0], device=there)], lambda: torch.cat([here, away])):
        with pytest.raises(Mixed, match="two devices"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        away.numpy()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in agreement.CHECKS]
)
def test_a_device_gives_what_the_cpu_gives(there: torch.device, name: str) -> None:
    check = agreement.CHECKS[name]
    here = check(agreement.opened("cpu", torch.float32))
    model = mt.open(moved(agreement._weights()), tokenizer=agreement._words())
    assert model.device == there
    assert all(check.status != "fails" for check in model.proof)
    found = agreement.compare(here, check(model), None)
    assert found["tensors"] == len(here) > 1


def test_a_sweep_does_not_wait_for_the_device_for_every_cell(there: torch.device) -> None:
    model = mt.open(moved(agreement._weights()), prove=False)
    source = model.run(agreement.tokens(2), capture="*.resid_pre", logits=False)
    cells = [mt.edit.Patch(f"{layer}.resid_pre@{p}", source=source) for layer in range(4) for p in (4, 6)]
    waits: list[int] = []
    model.sweep(agreement.tokens(1), cells, agreement._metric()).run()  # the first tries what can be shared
    for times in (1, 5):
        WAITS.clear()
        swept = model.sweep(agreement.tokens(1), cells * times, agreement._metric()).run()
        assert swept.plan.passes == 1
        waits.append(len(WAITS))
    assert waits[0] == waits[1] > 0


def test_free_memory_is_that_of_the_device_and_of_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"mem_get_info": lambda d: (1000, 5000), "memory_reserved": lambda d: 300, "memory_allocated": lambda d: 100}
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(**held))
    assert free_memory(torch.device("cuda:0")) == 1200
    assert free_memory(torch.device("cpu")) > 10_000


def test_gaps_beyond_what_is_allowed_are_disagreements() -> None:
    ones = torch.ones(3, dtype=torch.float64)
    agreement.compare({"a": ones}, {"a": ones + 0.9e-4}, None)
    for other in (ones + 1.1e-4, ones[:2], torch.full_like(ones, torch.nan)):
        with pytest.raises(agreement.Disagreement):
            agreement.compare({"a": ones}, {"a": other}, None)
    with pytest.raises(agreement.Disagreement, match="only one"):
        agreement.compare({"a": ones}, {"a": ones, "b": ones}, None)
    agreement.compare({"a": ones + 0.01}, {"a": ones - 0.03}, {"a": ones})
    with pytest.raises(agreement.Disagreement):
        agreement.compare({"a": ones + 0.01}, {"a": ones - 0.09}, {"a": ones})


@pytest.mark.parametrize(
    "make", [lambda: Moments(5), lambda: Moments(5, order=4), lambda: Firing(5), lambda: Extremes(5)]
)
def test_a_statistic_of_a_device_is_that_of_the_cpu(there: torch.device, make: Any) -> None:
    values = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.arange(40) % 7 > 0
    here, away, mixed, other = make(), make(), make(), make()
    for part, chosen in zip(values.split(16), mask.split(16), strict=True):
        here.update(part, chosen)
        away.update(part.to(there), chosen)
    mixed.update(values[:16].to(there), mask[:16])
    mixed.update(values[16:32], mask[16:32])
    other.update(values[32:].to(there), mask[32:])
    wanted = here.state()
    for made in (away, mixed.merge(other), away.copy()):
        assert all(x.is_cpu for x in vars(made.result()).values() if isinstance(x, torch.Tensor))
        for name, x in made.state().items():
            torch.testing.assert_close(x, wanted[name], rtol=1e-12, atol=1e-12)


def test_top_examples_of_a_device_are_those_of_the_cpu(there: torch.device) -> None:
    values = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    here, away = TopExamples(5, 3), TopExamples(5, 3)
    for i in (0, 3):
        here.update(values[i : i + 3], torch.arange(i, i + 3) * 8)
        away.update(values[i : i + 3].to(there), torch.arange(i, i + 3) * 8)
    assert all(torch.equal(x, here.state()[name]) for name, x in away.state().items())
