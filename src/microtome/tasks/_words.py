"""The words and tables that tasks are made of, from files in the package."""

from __future__ import annotations

import csv
import json
from functools import cache
from importlib.resources import files
from typing import Any

DATA = files("microtome") / "tasks" / "data"  # of the package, so that names are read without importing this room


@cache
def _json(name: str) -> dict[str, Any]:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def words(name: str) -> list[Any]:
    """A list of words, such as "women" or "places"; of (singular, plural) for "nouns" and "attractors"."""
    return list(_json("words.json")[name])


def relations() -> dict[str, dict[str, Any]]:
    """What each relation of the fact tables is about, and its templates."""
    return dict(_json("relations.json"))


@cache
def _table(relation: str) -> tuple[tuple[str, str], ...]:
    lines = (DATA / "facts" / f"{relation}.csv").read_text(encoding="utf-8").splitlines()
    return tuple((row["subject"], row["answer"]) for row in csv.DictReader(lines))


def facts(relation: str | None = None) -> list[tuple[str, str, str]]:
    """The facts of one relation, or of all: (relation, subject, answer)."""
    chosen = list(relations()) if relation is None else [relation]
    return [(name, subject, answer) for name in chosen for subject, answer in _table(name)]
