"""Every causal family of the installed transformers: none is wrong, none crashes, and docs/families.md says what is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.scripts import script

configs = script("tools/family_configs.py")
checks = script("tools/family_checks.py")
script("tools/family_methods.py")
page = script("tools/families_page.py")
families = script("tools/families.py")

ROOT = Path(__file__).resolve().parents[2]
RECORD: dict[str, Any] = json.loads((ROOT / "benchmarks/results/families.json").read_text(encoding="utf-8"))
FEW = ("llama", "olmo2", "mixtral")

KNOWN: dict[str, tuple[str, ...]] = {}
"""Families that are wrong or crash, by why: an entry that no longer holds must go."""


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("family", configs.FAMILIES)
def test_it_is_neither_wrong_nor_crashes(family: str) -> None:
    found = families.apart(family, families.SECONDS)
    known = any(family in names for names in KNOWN.values())
    assert (found["state"] in ("wrong", "crashes")) == known, found["why"]
    recorded = next(row for row in RECORD["families"] if row["family"] == family)
    assert found["state"] == recorded["state"], f"{found['why']}; to do: python tools/families.py"


@pytest.mark.parametrize("family", FEW)
def test_it_opens_and_every_check_holds(family: str) -> None:
    found = families.trial(family, methods=False)
    assert found["state"] == "in full"
    assert {check["state"] for check in found["checks"].values()} == {"holds"}


@pytest.mark.parametrize("name", checks.CHECKS)
def test_a_check_of_another_model_fails(name: str) -> None:
    """Beside a model of other weights, nothing that is compared is the same."""
    hf = configs.build("llama")
    subject = checks.Subject(families.mt.open(hf), "llama")
    subject.hf = configs.build("llama")
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.mul_(1.05)
    gap = checks.CHECKS[name](subject)
    assert gap.effect > 0
    assert not gap.holds


def test_each_recipe_is_of_a_family() -> None:
    assert set(configs._MORE) | set(configs.IMPOSSIBLE) <= set(configs.FAMILIES)
    assert [row["family"] for row in RECORD["families"]] == configs.FAMILIES


def test_every_parameter_is_random() -> None:
    for family in ("gemma3_text", "qwen3_next", "gpt_oss"):
        for name, x in configs.build(family).state_dict().items():
            assert x.numel() < 2 or x.unique().numel() > 1, f"{family} {name}"


def test_what_is_wrong_or_crashes_is_known() -> None:
    bad = {row["family"] for row in RECORD["families"] if row["state"] in ("wrong", "crashes")}
    assert sorted(bad) == sorted(name for names in KNOWN.values() for name in names)


def test_the_page_is_what_was_found() -> None:
    assert RECORD["counts"] == families.counts(RECORD["families"])
    said = {name: checks.summary(check) for name, check in checks.CHECKS.items()}
    text = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    assert text == page.render(RECORD, said, checks.TOLERANCE)
