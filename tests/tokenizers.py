"""Tokenizers of different kinds, trained here in a moment: no network, no files."""

from __future__ import annotations

import json
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
    made |= {"bpe-eos": lambda: _bpe(2, "$A </s>"), "bpe-both": lambda: _bpe(2, "<s> $A </s>"), "chat": _chat}
    made |= {"nfc": lambda: _bpe(2, normalizer=normalizers.NFC()), "llama-2": lambda: _llama("metaspace")}
    made |= {"llama-2-legacy": lambda: _llama("prepend"), "bert": lambda: _wordpiece("[CLS] $A [SEP]")}
    return (made | {"characters": _characters})[name]()


def _bpe(digits: int, around: str = "<s> $A", normalizer: Any = None) -> PreTrainedTokenizerFast:
    """Byte-level, numbers cut after so many digits, with tokens of its own around every text."""
    made = Tokenizer(models.BPE())
    if normalizer is not None:
        made.normalizer = normalizer
    cut = pre_tokenizers.Split(Regex(rf"\d{{1,{digits}}}"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=6000, special_tokens=["<s>", *OWN[1:] * ("</s>" in around)], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(text(), trainer)
    return _finished(made, around)


OWN = ("<s>", "</s>")


def _finished(made: Tokenizer, around: str) -> PreTrainedTokenizerFast:
    there = [(mark, made.token_to_id(mark)) for mark in OWN if mark in around]
    made.post_processor = processors.TemplateProcessing(single=around, special_tokens=there)
    names = {name: mark for name, mark in zip(("bos_token", "eos_token"), OWN, strict=True) if mark in around}
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **names)


def _llama(space: str) -> PreTrainedTokenizerFast:
    """Words with a mark of the space before them, which every text begins with, as those of Llama 2 are.

    The mark is put before a text by the cut into words, or in older files before there is any, so that it stands
    behind special tokens in the text too.
    """
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if space == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", *OWN, *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=6000, special_tokens=special, show_progress=False)
    trained.train_from_iterator(text(), trainer)
    kept = json.loads(trained.to_str())["model"]
    merges = [tuple(m) for m in kept["merges"]]
    made.model = models.BPE(kept["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    made.add_special_tokens(["<unk>", *OWN])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return _finished(made, "<s> $A")


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _chat() -> PreTrainedTokenizerFast:
    """Byte-level, with a template of messages that writes the token which the tokenizer puts before every text too."""
    made = _bpe(2)
    made.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]})
    made.chat_template = TEMPLATE
    return made


def _wordpiece(around: str = "") -> PreTrainedTokenizerFast:
    """Lower-cased words without their spaces; digits one by one."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(True)])
    made.decoder = decoders.WordPiece(cleanup=False)
    marks = ["[UNK]", *around.replace("$A", "").split()]
    trainer = trainers.WordPieceTrainer(vocab_size=4000, special_tokens=marks, show_progress=False)
    made.train_from_iterator(text(), trainer)
    if around:
        there = [(mark, made.token_to_id(mark)) for mark in marks[1:]]
        made.post_processor = processors.TemplateProcessing(single=around, special_tokens=there)
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
