"""`microtome measure`: commands made from declarations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from tests.cli.conftest import TEXT
from torch import Tensor

from microtome.method import Argument, Column, Seen, Source, forget, measure

SOURCE = Source("Nobody", "A Toy for Tests", 2026)


@pytest.fixture
def toy() -> Iterator[str]:
    @measure(
        "toy", of="layer", sites="resid_post", question="How large is a toy?", source=SOURCE, cost="nothing",
        columns=(Column("toy_size", "norm", "mean size of the stream, halved", "none: a toy"),),
        check="tests/cli/test_measure.py",
    )  # fmt: skip
    def sizes(
        seen: Seen, half: Annotated[float, Argument("what to multiply by", "ratio", least=0)] = 0.5
    ) -> dict[str, Tensor]:
        """Half the size of the stream."""
        return {"toy_size": half * seen["resid_post"].double().norm(dim=-1)}

    yield "toy"
    forget("toy")


def test_a_toy_measure_has_a_command_with_its_options(
    toy: str, saved: Path, text: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    shown = cli("measure", toy, "--help").out
    assert "--half" in shown
    assert "How large is a toy?" in shown
    assert toy in cli("measure", "--help").out
    done = cli("measure", toy, "-m", saved, "--text", text, "--tokens", 200, "--length", 20, "--half", "1", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert len(told["variables"]["toy_size"]["values"]) == 3
    assert told["provenance"]["source"] == str(SOURCE)
    page_of = tmp_path / "toy.html"
    assert cli("measure", toy, "-m", saved, "--text", text, "--tokens", 200, "-o", page_of).code == 0
    assert "toy" in page_of.read_text()
    refused = cli("measure", toy, "-m", saved, "--half", "-1")
    assert refused.code == 2


def test_a_measure_that_compares_groups_takes_several_texts(saved: Path, text: Path, cli: Callable[..., Any]) -> None:
    other = text.with_name("other.txt")
    other.write_text(text.read_text()[::-1])
    common = ("measure", "group_neurons", "-m", saved, "--tokens", 200, "--length", 20)
    done = cli(*common, "--text", text, "--text", other, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["variables"]["group_firing"]["dims"] == ["group", "layer", "neuron"]
    refused = cli(*common, "--text", text)
    assert refused.code == 2
    assert "compares groups, and this text has one" in refused.err


def test_the_command_reads_groups_off_a_column(cli: Callable[..., Any], saved: Path, tmp_path: Path) -> None:
    table = tmp_path / "a.jsonl"
    lines = [{"words": f"{TEXT} {TEXT}", "lang": group} for group in "abac"]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ("measure", "firing", "-m", saved, "--text", table, "--field", "words", "--length", 16)
    told = json.loads(cli(*arguments, "--group-by", "lang", "--json").out)
    assert told["coords"]["group"]["values"] == ["a", "b", "c"]
    assert "group" not in json.loads(cli(*arguments, "--json").out)["coords"]
    some = json.loads(cli(*arguments, "--group-by", "lang", "--group", "b", "--json").out)
    assert some["coords"]["group"]["values"] == ["b"]
