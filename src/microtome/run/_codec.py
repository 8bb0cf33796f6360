"""Text to tokens and back: what the whole package asks of a tokenizer, asked in one place.

A text becomes the tokens of a run. What its tokenizer puts before every text stands there once, also where the text
begins with it, as the text of a chat template may. What it puts behind every text is left out in a causal model: there
the question is how the text goes on. Where a word lies is found by its characters, and which tokens these are by the
characters that every token stands for.

Check:    tests/laws/test_tokenizers.py, under byte-level, SentencePiece-like, WordPiece and normalising tokenizers.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from microtome.errors import PromptError, error

Ids = tuple[int, ...]
Characters = tuple[int, int]
"""The first character and the one behind the last."""

BEFORE = ("\n", "x")
"""What an answer is put behind, to see which tokens it becomes inside a text; neither ends in a space."""
SPACE = "\u2581"
"""How SentencePiece writes a space in its vocabulary."""


@dataclass(frozen=True, eq=False)
class Encoding:
    """A text, the ids of its tokens, and the characters that each of them stands for.

    Attributes:
        text: as it was given, or as the ids decode.
        ids: as a run has them.
    """

    text: str
    ids: Ids
    _measure: Callable[[], Sequence[Characters]] = field(repr=False)

    @cached_property
    def ranges(self) -> tuple[Characters, ...]:
        """The characters of each token, (first, end); nothing, first = end, where it stands for no text."""
        return tuple(self._measure())

    def tokens_at(self, first: int, end: int) -> tuple[int, int] | None:
        """The tokens (first, end) that some characters belong to, spaces around them left out; None if there are none.

        Where several tokens make one character, all of them are meant.
        """
        first, end = _stripped(self.text, first, end)
        there = [i for i, (a, b) in enumerate(self.ranges) if a < b and b > first and a < end]
        return (there[0], there[-1] + 1) if there else None

    def whole_tokens_at(self, first: int, end: int) -> tuple[int, int] | None:
        """The same, if these tokens stand for these characters and nothing more, spaces around them left out."""
        found = self.tokens_at(first, end)
        if found is None:
            return None
        a, b = self.ranges[found[0]][0], self.ranges[found[1] - 1][1]
        return found if _stripped(self.text, a, b) == _stripped(self.text, first, end) else None

    def find(self, wanted: str) -> list[Characters]:
        """Where a text stands in this one, overlaps too; an accent may be part of its letter or a mark behind it."""
        (whole, places), target = _composed(self.text), unicodedata.normalize("NFC", wanted.strip())
        found: list[Characters] = []
        at = whole.find(target) if target else -1
        while at >= 0:
            first, end = places[at], places[at + len(target)]
            # Not a letter without the mark that belongs to it.
            if first is not None and end is not None:
                found.append((first, end))
            at = whole.find(target, at + 1)
        return found

    def stands_alone(self, first: int, end: int) -> bool:
        """Whether some characters are words of their own, and no part of longer ones."""
        return not any(_inside_a_word(self.text, cut) for cut in (first, end))


def _inside_a_word(text: str, cut: int) -> bool:
    """Whether a cut parts two letters of one word; in scripts without spaces every letter may begin one."""
    beside = text[cut - 1 : cut + 1] if 0 < cut < len(text) else " "
    # Tokenizers without a decoder leave their own marks of a space.
    letters = [
        unicodedata.combining(c) or (c.isalnum() and ord(c) < 0x2E80 and c not in "\u0120\u2581") for c in beside
    ]
    return all(letters)


def _stripped(text: str, first: int, end: int) -> Characters:
    """Characters without the spaces at both ends."""
    inside = text[first:end]
    return first + len(inside) - len(inside.lstrip()), first + len(inside.rstrip())


def _composed(text: str) -> tuple[str, list[int | None]]:
    """A text in composed form, NFC, and for each place of it that of the text; None inside what was composed."""
    if text.isascii():
        return text, list(range(len(text) + 1))
    parts: list[str] = []
    for letter in text:
        apart = (
            not unicodedata.combining(letter) and parts and _nfc(parts[-1] + letter) == _nfc(parts[-1]) + _nfc(letter)
        )
        if not parts or apart:
            parts.append(letter)
        else:
            parts[-1] += letter
    made, places, at = "", list[int | None](), 0
    for part in parts:
        composed = _nfc(part)
        places += [at, *[None] * (len(composed) - 1)]
        made, at = made + composed, at + len(part)
    return made, [*places, at]


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def require_text(text: str, what: str = "the text") -> None:
    """Refuse a text that no tokenizer can read.

    Raises:
        PromptError: it holds half of a surrogate pair, which is no character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise error(
            PromptError, f"{what} is not valid Unicode", got=f"{text[problem.start]!a} at character {problem.start}",
            allowed="text that can be written as UTF-8", do="decode its bytes in their own encoding, or leave it out",
        ) from None  # fmt: skip


class Codec:
    """A tokenizer as the whole package uses it.

    Attributes:
        tokenizer: one of `transformers`, or a callable on a text that gives `input_ids` and can decode them.
        causal: whether a text is to be continued, so that nothing is put behind it.
    """

    def __init__(self, tokenizer: Any, *, causal: bool = True) -> None:
        self.tokenizer, self.causal = tokenizer, causal
        self.is_fast = bool(getattr(tokenizer, "is_fast", False))

    @cached_property
    def _own(self) -> tuple[Ids, Ids]:
        """What the tokenizer puts before every text, and behind it."""
        try:
            empty, one = self._raw(""), self._raw("a")
        except ValueError:  # one that refuses a text of nothing puts nothing around it
            return (), ()
        n = next((i for i, (a, b) in enumerate(zip(empty, one, strict=False)) if a != b), min(len(empty), len(one)))
        behind = empty[n:]
        return empty[:n], behind if one[len(one) - len(behind) :] == behind else ()

    @property
    def start(self) -> Ids:
        """What stands before every prompt: a beginning-of-text token, or nothing."""
        return self._own[0]

    @property
    def end(self) -> Ids:
        """What the tokenizer puts behind every text, whether it is kept or not."""
        return self._own[1]

    def _raw(self, text: str) -> Ids:
        return tuple(int(i) for i in self.tokenizer(text)["input_ids"])

    def _kept(self, ids: Ids) -> slice:
        """The tokens of a run among those that the tokenizer gave."""
        n, behind = len(self.start), len(self.end) if self.causal else 0
        twice = n > 0 and ids[:n] == ids[n : 2 * n] == self.start
        ended = behind > 0 and ids[len(ids) - behind :] == self.end
        return slice(n if twice else 0, len(ids) - behind if ended else len(ids))

    def ids(self, text: str) -> Ids:
        """The ids of a text, as a run has them.

        Raises:
            PromptError: it is no valid text.
        """
        require_text(text)
        ids = self._raw(text)
        return ids[self._kept(ids)]

    def ids_of_all(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, in one call."""
        for text in texts:
            require_text(text)
        rows = [tuple(int(i) for i in row) for row in self.tokenizer(list(texts))["input_ids"]]
        return [row[self._kept(row)] for row in rows]

    def encode(self, text: str) -> Encoding:
        """A text as tokens.

        Raises:
            PromptError: it is no valid text.
        """
        ids = self.ids(text)
        return Encoding(text, ids, lambda: self._offsets(text) if self.is_fast else self._by_beginnings(text, ids))

    def _offsets(self, text: str) -> list[Characters]:
        given = self.tokenizer(text, return_offsets_mapping=True)
        kept = self._kept(tuple(int(i) for i in given["input_ids"]))
        return [(int(a), int(b)) for a, b in given["offset_mapping"]][kept]

    def _by_beginnings(self, text: str, ids: Ids) -> list[Characters]:
        """For tokenizers that keep no offsets: a token ends where the text up to there gives the tokens up to it."""
        behind = 0 if self.causal else len(self.end)
        ends: dict[int, int] = {}
        for end in range(len(text) + 1):
            part = self.ids(text[:end])
            part = part[: len(part) - behind]
            if part == ids[: len(part)]:
                ends[len(part)] = end
        ranges, first, at = [(0, 0)] * min(ends, default=0), min(ends, default=0), 0
        for place in sorted(ends):
            ranges += [(at, ends[place])] * (place - first)
            first, at = place, max(at, ends[place])
        return ranges + [(len(text), len(text))] * (len(ids) - len(ranges))

    def decode(self, ids: Sequence[int]) -> Encoding:
        """Ids as a text with the characters of each token.

        The text of growing beginnings tells them, because a token by itself may lose the space before it; one that ends
        inside a character ends with a replacement character instead.
        """
        given = tuple(int(i) for i in ids)

        def measure() -> list[Characters]:
            begun = [self.tokenizer.decode(list(given[: i + 1])) for i in range(len(given))]
            ranges, group, at = list[Characters](), 0, 0
            for i, text in enumerate(begun):
                end = len(text.rstrip("\ufffd"))
                if end == len(text) or i == len(begun) - 1:
                    ranges += [(at, max(at, end))] * (i + 1 - group)
                    group, at = i + 1, max(at, end)
            return ranges

        return Encoding(self.tokenizer.decode(list(given)), given, measure)

    def words(self, ids: Sequence[int]) -> list[str]:
        """The text of each id as it stands inside a text, with its leading space where it has one."""
        named = getattr(self.tokenizer, "convert_ids_to_tokens", None)
        pieces = [""] * len(ids) if named is None else named([int(i) for i in ids])
        return [self._word(int(i), piece) for i, piece in zip(ids, pieces, strict=True)]

    def _word(self, token: int, piece: Any) -> str:
        """SentencePiece writes the space before a word into its token; decoders drop that of the first one."""
        shown, bare = self.tokenizer.decode([token]), str(piece or "").lstrip(SPACE)
        spaces = len(str(piece or "")) - len(bare)
        return " " * spaces + shown.lstrip(" ") if spaces else shown

    def continued(self, ids: Sequence[int], **options: Any) -> str:
        """The text of ids that follow others, with the space that decoders drop at the beginning of a text."""
        text = self.tokenizer.decode(ids, **options)
        named = getattr(self.tokenizer, "convert_ids_to_tokens", None)
        hidden = getattr(self.tokenizer, "all_special_ids", ()) if options.get("skip_special_tokens") else ()
        shown = [int(i) for i in ids if int(i) not in hidden]
        written = "" if named is None else "".join(str(piece or "") for piece in named(shown))
        spaces = len(written) - len(written.lstrip(SPACE))  # as SentencePiece wrote them: none in other vocabularies
        return " " * (spaces - (len(text) - len(text.lstrip(" ")))) + text

    def alone(self, text: str) -> Ids:
        """The ids of a text that nothing stands before, without what the tokenizer adds by itself.

        Raises:
            PromptError: it is no valid text.
        """
        require_text(text)
        ids = self._raw(text)
        return ids[len(self.start) : len(ids) - len(self.end)]

    def continuation(self, text: str) -> Ids:
        """The ids that a text becomes inside another one, letter by letter: with a leading space, if it has one.

        Raises:
            PromptError: it is no valid text.
        """
        for before in BEFORE:
            first, whole = self.alone(before), self.alone(before + text)
            if whole[: len(first)] == first:
                return whole[len(first) :]
        return self.alone(text)

    def one_token(self, text: str) -> int:
        """The id of an answer of one token, as it stands inside a text.

        Raises:
            PromptError: it is several tokens, with what they are, or not in the vocabulary; says how to write it.
        """
        require_text(text, "the word")
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        itself = text == getattr(self.tokenizer, "unk_token", None)
        # A tokenizer that begins every word with a space may not know a word without one.
        tried = [self.continuation(text), self.alone(text)]
        ids = tried[0] if unknown not in tried[0] or itself else tried[1]
        if len(ids) == 1 and (ids[0] != unknown or itself):
            return ids[0]
        spaced = self.continuation(" " + text)
        if not text[:1].isspace() and len(spaced) == 1 and unknown not in spaced:
            do = f'write it as it follows the prompt, with its space: " {text}"'
        else:
            do = "choose another word, pass a token id, or read a span with metric=SpanLoss where one is taken"
        if ids and unknown in ids:
            raise error(
                PromptError,
                f'"{text}" is not in the vocabulary',
                do=do.replace(", or read a span with metric=SpanLoss where one is taken", ""),
            )
        got = str(self.words(ids)) if ids else "no tokens"
        raise error(PromptError, f'"{text}" is not one token', got=got, allowed="one token", do=do)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> Encoding:
        """Messages as tokens, by the tokenizer's own template; one of the assistant at their end is to be continued.

        Raises:
            PromptError: there is no template, it refuses them, or they are no messages.
        """
        for i, message in enumerate(messages):
            strange = [key for key in ("role", "content") if not isinstance(message.get(key), str)]
            if strange:
                got = (
                    f"{strange[0]} {message.get(strange[0])!r}"
                    if strange[0] in message
                    else ", ".join(map(str, message))
                )
                allowed = 'a mapping with the texts "role" and "content"'
                raise error(
                    PromptError, f"cannot read message {i} of the chat", got=got, allowed=allowed, do="write it so"
                )
            require_text(message["content"], f"message {i} of the chat")
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise error(
                PromptError, "this tokenizer has no chat template", got=f"a list of {len(messages)} messages",
                do="pass the prompt as text, or open the model with the tokenizer of an instruct model",
            )  # fmt: skip
        answered = messages[-1]["role"] == "assistant"
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=not answered,
                continue_final_message=answered,
            )  # fmt: skip
        except Exception as problem:  # a template is a program: what it raises is its own word on the messages
            got = " ".join(str(problem).split())
            what, do = "the chat template of this tokenizer refuses the messages", "change them, or pass text"
            raise error(PromptError, what, got=got, do=do) from problem
        # A template writes all that the model was trained on, so that nothing is put before it.
        return self._as_written(text)

    def _as_written(self, text: str) -> Encoding:
        """The tokens of a text with nothing added."""
        options: dict[str, Any] = {"add_special_tokens": False}
        ids = tuple(int(i) for i in self.tokenizer(text, **options)["input_ids"])

        def offsets() -> list[Characters]:
            given = self.tokenizer(text, return_offsets_mapping=True, **options)["offset_mapping"]
            return [(int(a), int(b)) for a, b in given]

        return Encoding(text, ids, offsets if self.is_fast else lambda: self.decode(ids).ranges)
