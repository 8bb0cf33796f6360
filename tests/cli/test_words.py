"""Text on the command line: chats, words without their space, and bytes that are no text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import families, tokenizers

import microtome as mt

Cli = Callable[..., Any]
CHAT = [{"role": "user", "content": "The capital of France is"}]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny instruct model that says " is" after everything."""
    folder, tokenizer, hf = (
        tmp_path_factory.mktemp("models") / "spoken",
        tokenizers.build("chat"),
        families.build("gpt2"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        final = hf.transformer.ln_f
        word = hf.lm_head.weight[tokenizer.convert_tokens_to_ids("Ġis")]
        word /= word.norm() / 20
        final.weight.zero_()
        final.bias.copy_(word / 2)
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_chat_is_a_prompt_of_every_command(cli: Cli, spoken: Path, tmp_path: Path) -> None:
    chat = json.dumps(CHAT)
    expected = mt.open(str(spoken), prove=False).encodings(CHAT)[0]
    assert expected.text.startswith("<s><|user|>")
    lens = json.loads(cli("lens", chat, "-m", spoken, "--json").out)
    assert "".join(lens["coords"]["prompt"]["values"][0]) == expected.text
    told = json.loads(cli("knockout", chat, "--keys", "France", "-m", spoken, "--json").out)
    assert told["provenance"]["keys"] == " France"
    kept = cli("run", chat, "-c", "final@-1", "-o", tmp_path / "x.safetensors", "-m", spoken, "--json")
    assert json.loads(kept.out)["next"][0]["word"] == " is"
    # What is JSON and no chat stays text.
    for text in ("[1, 2]", '[{"content": "x"}]', "[not json"):
        lens = json.loads(cli("lens", text, "-m", spoken, "--json").out)
        assert "".join(lens["coords"]["prompt"]["values"][0]) == f"<s>{text}"


def test_a_chat_needs_a_template(cli: Cli, spoken: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in spoken.iterdir():
        if file.name != "chat_template.jinja":
            (plain / file.name).write_bytes(file.read_bytes())
    done = cli("lens", json.dumps(CHAT), "-m", plain)
    assert done.code == 6
    assert "this tokenizer has no chat template; got a list of 1 messages" in done.err


def test_an_answer_without_its_space_is_noted_on_stderr(cli: Cli, spoken: Path) -> None:
    done = cli("contributions", PROMPT, "--answer", "is", "-m", spoken, "--json")
    assert done.code == 0
    assert done.err.startswith("microtome: note: the answer is the token 'is', and ' is' is")
    assert json.loads(done.out)["provenance"]["answer"] == "is"
    assert cli("contributions", PROMPT, "--answer", " is", "-m", spoken, "--json").err == ""


def test_arguments_that_are_not_utf8_are_refused(cli: Cli, spoken: Path) -> None:
    """Python hands their bytes on as halves of surrogate pairs, as a process of its own shows for one of them."""
    code = "from microtome.cli import main; main()"
    command = [sys.executable, "-c", code, b"lens", b"The capital of \xff", "-m", str(spoken)]
    alone = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONUTF8": "1"})
    assert len(alone.stderr.strip().splitlines()) == 1
    broken = "The capital of \udcff"
    for arguments in (("contributions", PROMPT, "--answer", broken), ("trace", PROMPT, "--subject", broken)):
        done = cli(*arguments, "-m", spoken)
        for ended, told in ((alone.returncode, alone.stderr), (done.code, done.err)):
            assert ended == 6, told
            assert told.startswith("microtome: PromptError: the ")
            assert "is not valid Unicode; got '\\udcff' at character 15" in told
