"""A tiny model with a tiny tokenizer, saved to disk, and a way to run commands as a user would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of one layer as a GGUF file of 40 KiB."""
    import gguf

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(64)
    file.add_embedding_length(32)
    file.add_block_count(1)
    file.add_feed_forward_length(48)
    file.add_head_count(4)
    file.add_head_count_kv(4)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_dimension_count(8)
    file.add_vocab_size(20)
    file.add_tokenizer_model("gpt2")
    file.add_token_list([*map(chr, range(97, 115)), "ab", "abc"])
    file.add_token_merges(["a b", "ab c"])
    file.add_bos_token_id(0)
    file.add_eos_token_id(1)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (20, 32), "output_norm": (32,), "output": (20, 32)}
    shapes |= {f"blk.0.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32), "blk.0.ffn_down": (32, 48)}
    draw = np.random.default_rng(0)
    for name, shape in shapes.items():
        file.add_tensor(f"{name}.weight", draw.standard_normal(shape).astype(np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
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


def check(done: Any, code: int, *texts: str) -> None:
    """What a command that failed said: its exit code, and one line with all of these."""
    assert done.code == code, done.err
    assert done.err.startswith("microtome: ")
    for text in texts:
        assert text in done.err, done.err
