"""Tokenizers of different kinds, trained here in a moment: no network, no files."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

import microtome as mt
from microtome.tasks._words import _json
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers


@cache
def text() -> tuple[str, ...]:
    """Prose, and the words of the tasks several times, so that most of them become one token."""
    prose = next(iter(mt.stream.standard_library_text()))[:2000]
    lists = [str(w) for held in _json("words.json").values() for item in held for w in [item, *item] if len(w) > 1]
    words = [w for _, subject, answer in mt.tasks.facts() for w in (subject, answer)] + lists + ["she", "he"]
    words += ["is", "are", "was", "were", "has", "have", "one", "apple", "apples"]
    numbers = [f"{i:02d} {i} {i:03d}" for i in range(1000)]
    return (prose, *(f"the {w} and {w} of {w}." for w in words for _ in range(3)), *numbers)


@cache
def build(name: str) -> Any:
    made = {"bpe-bos": lambda: _bpe(2), "bpe-three-digits": lambda: _bpe(3), "wordpiece": _wordpiece}
    return (made | {"characters": _characters})[name]()


def _bpe(digits: int) -> PreTrainedTokenizerFast:
    """Byte-level, numbers cut after so many digits, with a token before every text."""
    made = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(rf"\d{{1,{digits}}}"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=6000, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(text(), trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", clean_up_tokenization_spaces=False)


def _wordpiece() -> PreTrainedTokenizerFast:
    """Lower-cased words without their spaces; digits one by one."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(True)])
    made.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=4000, special_tokens=["[UNK]"], show_progress=False)
    made.train_from_iterator(text(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", clean_up_tokenization_spaces=False)


def _characters() -> PreTrainedTokenizerFast:
    """One token a character."""
    made = Tokenizer(models.WordLevel({chr(i): i for i in range(400)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", clean_up_tokenization_spaces=False)


class Slow(PreTrainedTokenizer):
    """The tokens of a fast tokenizer, from a class that keeps no offsets."""

    def __init__(self, fast: Any, **options: Any) -> None:
        self.fast = fast
        super().__init__(bos_token=fast.bos_token, unk_token=fast.unk_token, **options)

    @property
    def vocab_size(self) -> int:
        return len(self.fast)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.fast.get_vocab())

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return self.fast.tokenize(text, add_special_tokens=False)

    def _convert_token_to_id(self, token: str) -> int:
        return self.fast.convert_tokens_to_ids(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.fast.convert_ids_to_tokens(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.fast.convert_tokens_to_string(tokens)
