"""A tiny model with a tiny tokenizer, saved to disk, and a way to run commands as a user would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests import families

TEXT = "the cat sat on the mat and the dog ran to the cat while the sun shone on the old red barn by the sea"


def tokenizer(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted(set(TEXT.split()))
    vocab = {"<unk>": 0, "<eos>": 1} | {f"\u0120{w}": i + 2 for i, w in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    families.build("llama-gqa").save_pretrained(folder)
    tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join([TEXT] * 40))
    return path


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def call(*arguments: object) -> Done:
        from microtome.cli._app import run

        capfd.readouterr()
        code = run([str(a) for a in arguments])
        streams = capfd.readouterr()
        assert "Traceback" not in streams.err + streams.out
        return Done(code, streams.out, " ".join(streams.err.split()))

    return call
