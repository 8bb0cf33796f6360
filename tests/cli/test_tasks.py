"""`microtome tasks`: the list, one task, a file of pairs, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import tokenizers

import microtome as mt

Cli = Callable[..., Any]


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer has the words of the tasks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tok = tmp_path_factory.mktemp("models") / "spoken", tokenizers.build("wordpiece")
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tok), max_position_embeddings=200, eos_token_id=0, bos_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def test_the_list_has_every_task_with_its_numbers(cli: Cli, spoken: Path) -> None:
    done = cli("tasks", "-m", spoken, "-n", 2, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert [row["name"] for row in told["tasks"]] == mt.tasks.names()
    for row in told["tasks"]:
        assert "refused" in row or (
            0 <= row["accuracy_lo"] <= row["accuracy"] <= row["accuracy_hi"] <= 1 and row["example"]["answer"]
        )
    assert sum("refused" in row for row in told["tasks"]) < 4
    table = cli("tasks", "-m", spoken, "-n", 2)
    assert table.code == 0
    for name in mt.tasks.names():
        assert name in table.out


def test_one_task_shows_its_pairs(cli: Cli, spoken: Path) -> None:
    told = json.loads(cli("tasks", "indirect_object", "-m", spoken, "-n", 3, "--seed", 5, "--json").out)
    model = mt.open(spoken)
    task = mt.tasks.build("indirect_object", model, 3, seed=5)
    assert [p["clean"] for p in told["pairs"]] == [p.clean for p in task]
    assert [tuple(p["spans"]["s2"]) for p in told["pairs"]] == [p.spans["s2"] for p in task]
    assert told["accuracy"] == float(task.accuracy(model)["accuracy"])
    assert told["made"]["seed"] == 5
    text = " ".join(cli("tasks", "indirect_object", "-m", spoken, "-n", 3, "--seed", 5).out.split())
    assert "prompt, [clean → corrupt]" in text
    assert "indirect_object: who is given something" in text


def test_a_file_of_pairs(cli: Cli, spoken: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("clean,corrupt,answer,foil\nOne dog,One car, is, are\n")
    told = json.loads(cli("tasks", path, "-m", spoken, "--json").out)
    assert told["pairs"][0]["clean"] == "One dog"
    path.write_text("clean,corrupt,answer,foil\nOne dog,One big car, is, are\n")
    done = cli("tasks", path, "-m", spoken)
    assert done.code == 10
    assert "row 1: the prompts do not align; got 2 and 3 tokens, first different at position 1" in done.err


def test_what_is_refused(cli: Cli, saved: Path, tmp_path: Path) -> None:
    done = cli("tasks", "inductoin")
    assert done.code == 6
    assert 'PromptError: there is no task "inductoin". Did you mean "induction"' in done.err
    done = cli("tasks", tmp_path / "none.csv")
    assert done.code == 10
    assert "it does not exist" in done.err
    done = cli("tasks", "fact.capital", "-m", saved)  # a tokenizer of twenty words
    assert done.code == 6
    assert 'only 0 of 20 pairs of "fact.capital" fit this tokenizer' in done.err
    assert cli("tasks", "--answers", "two").code == 2
