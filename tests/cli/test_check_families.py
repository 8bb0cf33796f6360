"""The command `microtome check` proves every family, from a folder on disk as a user has it, and says so last."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import families

from microtome.anatomy._family import FAMILIES

IDENTITIES = ("1 inert", "2 residual", "3 heads", "4 neurons", "5 attention", "6 unembed", "7 weights")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", families.some(6))
def test_a_family_in_a_folder_is_proven(cli: Callable[..., Any], tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    families.build(name).save_pretrained(folder)
    done = cli("check", folder)
    assert done.code == 0, done.out + done.err
    assert done.err == ""
    lines = done.out.splitlines()
    assert lines[-1] == "The map is proven."
    kind = name.split("-")[0]
    assert re.fullmatch(rf"{name} \({kind}\w*\): {families.N_LAYERS} layers, .+, d_model {families.D_MODEL}", lines[0])
    for identity in IDENTITIES:
        assert any(line.startswith(identity) and " holds" in line for line in lines), identity
    assert not any(" fails" in line for line in lines)


def test_every_record_of_a_family_is_checked_or_is_the_twin_of_one_that_is() -> None:
    assert {kind for kind in FAMILIES if kind not in {n.split("-")[0] for n in families.NAMES}} == {"cohere2"}
    assert FAMILIES["cohere2"] == FAMILIES["cohere"]
