"""`microtome fit-lens` writes a lens that `microtome lens` reads, goes on where it was stopped, refuses in a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import check

import microtome as mt
from microtome.explain import Lens

Cli = Callable[..., Any]
SMALL = ("--tokens", 160, "--held-out", 64, "--length", 8, "--rows", 2)


def test_what_it_writes_is_what_the_lens_command_reads(cli: Cli, saved: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "lens.safetensors"
    done = cli("fit-lens", saved, "--text", text, "-o", file, *SMALL, "--seed", 3)
    assert done.code == 0, done.err
    assert f"microtome lens PROMPT --kind tuned --lens {file}" in done.out.replace("\n", "")
    assert "logit lens" in done.out
    model = mt.open(saved, prove=False)
    lens = Lens.load(file, model)
    assert lens.layers == (-1, 0, 1)
    with mt.settings(seed=3):
        own = mt.explain.fit_lens(model, text, tokens=160, held_out=64, length=8, rows=2)
    assert all(bool((lens.maps[name] == own.maps[name]).all()) for name in own.maps)
    assert [p.name for p in tmp_path.iterdir()] == ["lens.safetensors"]
    read = cli("lens", "the cat sat", "-m", saved, "--kind", "tuned", "--lens", file, "--json")
    assert read.code == 0, read.err
    assert "logit_lens_kl" in json.loads(read.out)["variables"]
    told = cli("fit-lens", saved, "--text", text, "-o", file, *SMALL, "--force", "--json", "--kind", "heads",
               "--layers", "1", "--rank", 2)  # fmt: skip
    facts = json.loads(told.out)
    assert (facts["kind"], facts["layers"], len(facts["kl"]["kl"][0])) == ("heads", [1], 4)
    assert cli("lens", "the cat sat", "-m", saved, "--kind", "heads", "--lens", file).code == 0


def test_one_that_was_stopped_goes_on(
    cli: Cli, saved: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from microtome.training import _fit

    file, whole, one = tmp_path / "a.safetensors", tmp_path / "b.safetensors", _fit._Loop._one
    assert cli("fit-lens", saved, "--text", text, "-o", whole, *SMALL).code == 0

    def stopping(self: Any, optimizer: Any) -> None:
        if self.step == 4:
            raise KeyboardInterrupt
        one(self, optimizer)

    with monkeypatch.context() as patched:
        patched.setattr(_fit._Loop, "_one", stopping)
        assert cli("fit-lens", saved, "--text", text, "-o", file, *SMALL).code == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors.state", "b.safetensors"]
    assert cli("fit-lens", saved, "--text", text, "-o", file, *SMALL).code == 0
    a, b = Lens.load(file), Lens.load(whole)
    assert all(bool((a.maps[name] == b.maps[name]).all()) for name in a.maps)
    assert not file.with_name("a.safetensors.state").exists()


def test_what_is_wrong_is_one_line(cli: Cli, saved: Path, text: Path, tmp_path: Path) -> None:
    file, given = tmp_path / "lens.safetensors", (saved, "--text", text)
    check(cli("fit-lens", *given, "-o", tmp_path / "lens.pt"), 9, "cannot write lens.pt; got .pt")
    check(cli("fit-lens", *given, "-o", file, "--share", 0), 2, "share of a lens; got 0.0; allowed: above 0 to 1")
    check(cli("fit-lens", *given, "-o", file, "--layers", "7", *SMALL), 2, "no map is fitted to these layers")
    check(cli("fit-lens", saved, "--text", "none.txt", "-o", file), 10, "it does not exist")
    check(cli("lens", "the cat", "-m", saved, "--kind", "tuned"), 2, "must be fitted first")
    check(cli("lens", "the cat", "-m", saved, "--of", "W_in"), 2, "say which neurons")
    check(cli("lens", "the cat", "-m", saved, "--kind", "tuned", "--lens", text), 10, "cannot read a lens from")
    assert not list(tmp_path.iterdir())
