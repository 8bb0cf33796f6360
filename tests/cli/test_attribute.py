"""`microtome attribute` on a tiny saved model: what it says, and a user's mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import microtome as mt

Cli = Callable[..., Any]
PAIR = ("the cat sat on the", "the dog sat on the")
ASKED = ("--answer", "mat", "--foil", "barn")


def check(done: Any, code: int, *texts: str) -> None:
    assert done.code == code, done.err
    for text in texts:
        assert text in done.err, done.err


@pytest.mark.parametrize("method", ["atp", "relp", "eap"])
def test_json_holds_what_the_method_returned(cli: Cli, saved: Path, method: str) -> None:
    done = cli("attribute", *PAIR, *ASKED, "--method", method, "--verify", 4, "-m", saved, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    data = mt.explain.attribute(mt.open(str(saved)), *PAIR, answer="mat", foil="barn", method=method, verify=4)
    names = ["score"] if method == "eap" else ["resid_pre", "attn_out", "mlp_out", "attn.z[head]"]
    assert told["variables"].keys() == set(data.data_vars)
    assert {end for name in names for end in (name, f"{name}_exact")} <= told["variables"].keys()
    for name, held in told["variables"].items():
        np.testing.assert_allclose(np.array(held["values"], dtype=float), data[name].values, atol=1e-5)
    assert told["coords"]["site"]["values"] == names
    assert told["variables"]["measured"]["values"] == [8] * len(names)
    assert told["provenance"]["answer"] == "\u0120mat"
    assert done.err.startswith("plan: ")


def test_maps_in_the_terminal_and_as_a_page(cli: Cli, saved: Path, tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    done = cli("attribute", *PAIR, *ASKED, "--verify", 3, "-m", saved, "-o", page)
    assert done.code == 0, done.err
    wanted = ("MLP output", "estimate", "exact", "how reliable the estimates are", "rank correlation", "page written")
    for text in wanted:
        assert text in done.out
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]
    plain = cli("attribute", *PAIR, *ASKED, "--verify", 0, "-m", saved)
    assert plain.code == 0
    assert "rank correlation" not in plain.out
    edges = cli("attribute", *PAIR, *ASKED, "--method", "eap", "--verify", 2, "-m", saved)
    assert "strongest score between two layers" in edges.out
    assert "→" in edges.out


def test_what_does_not_fit(cli: Cli, saved: Path, tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    for arguments, code, *texts in (
        ((PAIR[0], "the dog sat", *ASKED), 6, "do not align"),
        ((*PAIR, "--answer", "mat", "--foil", "mat"), 6, "the foil equals the answer"),
        ((*PAIR, "--answer", "the mat"), 6, '"the mat" is not one token'),
        ((*PAIR, *ASKED, "--method", "acdc"), 2, "'atp', 'relp', 'atp*', 'ig', 'eap'"),
        ((*PAIR, *ASKED, "--verify", "-1"), 2, "--verify"),
        ((*PAIR, *ASKED, "--seed", "-1"), 2, "--seed"),
    ):
        check(cli("attribute", *arguments, "-m", saved, "-o", page), code, *texts)
    assert not list(tmp_path.iterdir())
