"""`microtome harvest` writes what it says, goes on where it was, and refuses in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cli.conftest import TEXT, check

from microtome.stream import Harvest

Cli = Callable[..., Any]


def test_it_writes_what_it_says(cli: Cli, saved: Path, tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("lang,text\n" + "".join(f"{name},{TEXT}\n" for name in "aba"))
    out = tmp_path / "h"
    arguments = ("harvest", saved, "--sites", "*.resid_post,0.mlp.post[0-3]", "--text", table, "-o", out)
    done = cli(*arguments, "--group-by", "lang", "--as", "int8", "--length", 16, "--shuffle", 3)
    assert done.code == 0, done.err
    found = Harvest(out)
    assert f"{len(found):,} tokens of 3 documents, 4 sites" in done.out
    assert "3 of 3 documents are longer than a row of 16 tokens" in done.err
    assert set(found.index["group"].to_pylist()) == {"a", "b"}
    assert (found.dtype, found.manifest["asked"]["seed"]) == ("int8", 3)
    told = cli(*arguments, "--group-by", "lang", "--as", "int8", "--length", 16, "--shuffle", 3, "--json")
    facts = json.loads(told.out)
    assert (facts["tokens"], facts["bytes"], facts["dtype"]) == (len(found), found.bytes, "int8")
    assert facts["sites"]["0.mlp.post[0-3]"] == [4]
    check(cli(*arguments), 9, "OutputError", "holds a harvest of something else", "--force")
    assert cli(*arguments, "--force").code == 0
    assert Harvest(out).dtype == "float32"


def test_what_is_wrong_is_one_line(cli: Cli, saved: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "h"
    check(cli("harvest", saved, "--sites", "*.resid_pots", "-o", out), 5, 'Did you mean "resid_post"')
    check(cli("harvest", saved, "--sites", "final", "--text", "none.txt", "-o", out), 10, "it does not exist")
    check(cli("harvest", saved, "--sites", "final", "-o", text), 9, "is a file")
    check(cli("harvest", saved, "--sites", "0.attn.pattern", "--text", text, "-o", out), 5, "value for each token")
    check(cli("harvest", saved, "--sites", "final", "--text", text, "-o", "nosuch://x"), 9, "no file system here")
    binary = tmp_path / "a.txt"
    binary.write_bytes(b"\x7fELF\0\0")
    check(cli("harvest", saved, "--sites", "final", "--text", binary, "-o", out), 10, "is binary, not text")
    binary.write_bytes(b"")
    check(cli("harvest", saved, "--sites", "final", "--text", binary, "-o", out), 10, "has no text; got 0 bytes")
    assert not out.exists()
