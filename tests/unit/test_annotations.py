"""The tests check annotations as they run, axes of tensors included: in functions, closures and data classes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

PROBE = """
from __future__ import annotations
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "row d_model"]


def write(z: Float[Tensor, "pos d_head"], w: Float[Tensor, "d_head d_model"], scale: float = 1.0) -> Rows:
    return (scale * (z @ w))[:, : 4 if scale < 3 else 1]


def pair(a: Rows, b: Rows | None = None) -> int:
    return len(a)


def inside() -> Callable[[Tensor, Tensor], Tensor]:
    def add(a: Float[Tensor, " unit"], b: Float[Tensor, " unit"]) -> Float[Tensor, " unit"]:
        return a + b
    return add


@dataclass(frozen=True)
class Kept:
    index: Float[Tensor, "row entry"]
    value: Float[Tensor, "row entry"]
    name: str = ""


class Chain:
    def link(self) -> Self:
        return self

    @property
    def size(self) -> int:
        return "three"
"""


def test_shapes_are_checked_in_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook of conftest.py works: in a module of the package a wrong shape raises, and so does a wrong type."""
    (tmp_path / "shape_probe.py").write_text(PROBE)
    room = "microtome.run"
    package = importlib.import_module(room)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    probe = importlib.import_module(f"{room}.shape_probe")
    monkeypatch.delitem(sys.modules, f"{room}.shape_probe")
    one = torch.ones

    assert probe.write(one(2, 3), one(3, 4), 2).shape == (2, 4)
    assert isinstance(probe.Chain().link(), probe.Chain)
    assert probe.pair(one(2, 3)) == probe.pair(one(2, 3), one(2, 3)) == 2
    assert probe.inside()(one(1), one(1)) == 2
    assert probe.Kept(one(2, 3), one(2, 3)).name == ""
    wrong = {
        "parameter w=": lambda: probe.write(one(2, 3), one(4, 4)),
        "parameter scale=": lambda: probe.write(one(2, 3), one(3, 4), "2"),
        "write.* return ": lambda: probe.write(one(2, 3), one(3, 4), 3),
        "parameter b=": lambda: probe.pair(one(2, 3), one(2, 4)),  # axes by the name of a type
        "parameter a=": lambda: probe.inside()(one(2, 2), one(2)),  # a function inside of a function
        "parameter value=": lambda: probe.Kept(one(2, 3), one(3, 3)),
        "parameter name=": lambda: probe.Kept(one(2, 3), one(2, 3), 3),
        "size.* return ": lambda: probe.Chain().size,
    }
    for message, call in wrong.items():
        with pytest.raises(BeartypeCallHintViolation, match=message):
            call()
