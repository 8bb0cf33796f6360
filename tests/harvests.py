"""What the tests of harvests share: a small text, tiny models that read it, and a process that is killed."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests import families

import microtome as mt
from microtome.stream import Corpus, Harvest, harvest

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "and",
    "dog",
    "ran",
    "to",
    "while",
    "sun",
    "shone",
    "old",
    "red",
    "barn",
    "by",
    "sea",
]
TEXTS = ["the cat sat on the mat " * n for n in (3, 1, 9, 0, 2, 7, 1, 1, 4)]
GROUPS = list("abaababca")
CORPUS = Corpus.of("t", TEXTS, GROUPS)
SITES = "*.resid_post,0.mlp.post[0,3-5],1.attn.z"


def tokenizer(*, begins: bool = False) -> Any:
    """Words by number, with a token before every text where it begins one."""
    from transformers import PreTrainedTokenizerFast

    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {"<unk>": 0, "<eos>": 1, "<s>": 2} | {word: 3 + i for i, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    marks = {"bos_token": "<s>"} if begins else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<eos>", **marks)


def opened(family: str = "llama-gqa", *, begins: bool = False) -> mt.Model:
    """A tiny model that reads these words."""
    return mt.open(families.build(family), tokenizer=tokenizer(begins=begins), prove=False)


def made(model: mt.Model, out: str | Path, **more: Any) -> Harvest:
    """A harvest of several shards; that documents are cut is meant."""
    given: dict[str, Any] = {"sites": SITES, "text": CORPUS, "length": 16, "shard_tokens": 40} | more
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*longer than a row")
        return harvest(model, out=out, **given)


def files(folder: Path) -> dict[str, bytes]:
    """Every file, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def killed(work: Callable[[], object], after: float) -> int | None:
    """Do some work in a process of its own and kill that; its exit code if it ended before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: a fork beside threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + after
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
