"""`microtome atlas` on a text in groups."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cli.conftest import TEXT

Cli = Callable[..., Any]


def asked(cli: Cli, folder: Path, query: str) -> list[dict[str, Any]]:
    done = cli("sql", query, "--atlas", folder, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_several_texts_are_groups_and_damage_is_added_to_them(
    cli: Cli, saved: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.txt").write_text("\n".join([" ".join(reversed(TEXT.split()))] * 40))
    folder, texts = tmp_path / "atlas", ("--text", text, "--text", tmp_path / "other.txt")
    only = [part for name in ("loss", "group_neurons") for part in ("--only", name)]
    done = cli("atlas", saved, *texts, "--tokens", 400, "--length", 20, *only, "-o", folder)
    assert done.code == 0, done.err
    assert "groups " in done.out
    groups = asked(cli, folder, "SELECT group_name, tokens, loss FROM groups")
    assert [(row["group_name"], row["tokens"]) for row in groups] == [("text", 200), ("other", 200)]
    assert groups[0]["loss"] != groups[1]["loss"]
    refused = cli("sql", "SELECT * FROM damage", "--atlas", folder)
    assert refused.code == 10
    assert "--add damage" in " ".join(refused.err.split())
    added = cli("atlas", saved, *texts, "--add", "damage", "-o", folder)
    assert added.code == 0, added.err
    sets = asked(cli, folder, "SELECT DISTINCT neurons_of FROM damage")
    assert {row["neurons_of"] for row in sets} <= {"text", "other"}
    assert sets


def test_a_column_of_a_table_names_the_groups(cli: Cli, saved: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "lines.jsonl", tmp_path / "atlas"
    file.write_text("\n".join(json.dumps({"words": f"{TEXT} {TEXT}", "lang": name}) for name in "abacabacabac"))
    arguments = ("atlas", saved, "--text", file, "--field", "words", "--length", 20, "--tokens", 300, "--only", "loss")
    done = cli(*arguments, "--group-by", "lang", "-o", folder)
    assert done.code == 0, done.err
    rows = asked(cli, folder, "SELECT group_name, documents, tokens FROM groups")
    assert [tuple(row.values()) for row in rows] == [("a", 2, 100), ("b", 2, 100), ("c", 2, 100)]
    assert cli(*arguments, "-o", tmp_path / "one").code == 0
    assert len(asked(cli, tmp_path / "one", "SELECT * FROM groups")) == 1
    same = cli("compare", folder, folder)
    assert same.code == 0, same.err
    assert "no change: loss" not in same.out, "what is of the whole model is in no table"
    assert "apart: the 95 % intervals of both do not overlap" in same.out
    options = {"--measures": ["loss"], "--tokens": [5000], "--seed": [0], "--budget": ["2 GiB"], "--force": []}
    for option, value in options.items():  # a default that is named is named
        refused = cli("compare", folder, folder, option, *value)
        assert refused.code == 2, option
        assert f"{option} is for two models, and these are two atlases" in " ".join(refused.err.split())
    refused = cli("compare", folder, folder, "--seed", 1, "--text", file)
    assert "--text and --seed are for two models" in " ".join(refused.err.split())
