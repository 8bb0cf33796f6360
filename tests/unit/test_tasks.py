"""Tasks: aligned under any tokenizer, true, and the same for the same seed."""

from __future__ import annotations

import calendar
import re
import string
from collections import Counter
from typing import Any

import pytest
from tests import tokenizers
from transformers import PreTrainedTokenizerFast

import microtome as mt
from microtome.errors import PromptError

TEXTS = [n for n in mt.tasks.names() if n != "induction"]
KINDS = ("default", "bpe-bos", "wordpiece")
FEW = 12


@pytest.fixture(scope="session")
def default() -> Any:
    return mt.open(prove=False).tokenizer


def tokenizer(kind: str, request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("default") if kind == "default" else tokenizers.build(kind)


KIND = pytest.mark.parametrize("kind", [pytest.param("default", marks=pytest.mark.real), *KINDS[1:]])


def same(tok: Any, shown: str, text: str) -> bool:
    """Whether a decoded stretch is a text, as far as the tokenizer keeps case."""
    return shown.strip() == (text if tok("A")["input_ids"] != tok("a")["input_ids"] else text.lower())


# ------------------------------------------------------------------------------------------------------------- the laws


@KIND
@pytest.mark.parametrize("name", TEXTS)
def test_pairs_align_and_their_answers_continue_them(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    tok = tokenizer(kind, request)
    task = mt.tasks.build(name, tok, FEW, fewer=True)
    assert len(task) == FEW or name.startswith("fact.")
    for pair in task:
        assert list(pair.clean_tokens) == tok(pair.clean)["input_ids"]
        assert list(pair.corrupt_tokens) == tok(pair.corrupt)["input_ids"]
        assert len(pair.clean_tokens) == len(pair.corrupt_tokens)
        assert pair.clean_tokens != pair.corrupt_tokens
        assert not set(pair.answer_ids) & set(pair.foil_ids)
        if name not in ("greater_than", "subject_verb_agreement"):
            assert len(pair.answer_ids) == len(pair.foil_ids) == 1
        assert tok.decode([pair.answer_ids[0]]) in pair.answer
        assert pair.spans["end"] == (len(pair.clean_tokens) - 1, len(pair.clean_tokens))
    assert len({pair.clean for pair in task}) == len(task)


CHANGED = {
    "indirect_object": {"s2"}, "greater_than": {"start"}, "docstring": {"arg3", "arg4"}, "needle": {"needle"},
    "addition": {"b"},
}  # fmt: skip


@KIND
@pytest.mark.parametrize("name", TEXTS)
def test_spans_are_the_words_and_only_they_change(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    tok = tokenizer(kind, request)
    for pair in mt.tasks.build(name, tok, FEW, fewer=True):
        changed = CHANGED.get(name, {"subject"})
        inside = {i for span in changed for i in range(*pair.spans[span])}
        differ = {i for i, (a, b) in enumerate(zip(pair.clean_tokens, pair.corrupt_tokens, strict=True)) if a != b}
        assert differ
        assert differ <= inside
        for span, (first, end) in pair.spans.items():
            shown = tok.decode(pair.clean_tokens[first:end]).strip()
            if span not in ("end", "subject_last"):
                assert shown
                assert "".join(shown.lower().split()) in "".join(pair.clean.lower().split())
        if "subject" in pair.spans:
            first, end = pair.spans["subject"]
            assert pair.spans["subject_last"] == (end - 1, end)


@KIND
@pytest.mark.parametrize("relation", ["capital", "landmark", "plural", "next_month"])
def test_subject_spans_decode_to_the_subject(relation: str, kind: str, request: pytest.FixtureRequest) -> None:
    tok = tokenizer(kind, request)
    table = {subject: answer for _, subject, answer in mt.tasks.facts(relation)}
    for pair in mt.tasks.build(f"fact.{relation}", tok, FEW, fewer=True):
        for text, tokens, answer in (
            (pair.clean, pair.clean_tokens, pair.answer),
            (pair.corrupt, pair.corrupt_tokens, pair.foil),
        ):
            shown = tok.decode(tokens[slice(*pair.spans["subject"])])
            subject = next(s for s in table if same(tok, shown, s))
            assert subject in text
            assert same(tok, answer, table[subject])


@KIND
def test_one_seed_gives_one_task(kind: str, request: pytest.FixtureRequest) -> None:
    tok = tokenizer(kind, request)
    for name in mt.tasks.names():
        if name in ("fact.next_day", "fact.currency"):
            continue  # too few to be drawn differently for sure
        first = mt.tasks.build(name, tok, 5, seed=3, fewer=True)
        assert first == mt.tasks.build(name, tok, 5, seed=3, fewer=True), name
        other = mt.tasks.build(name, tok, 5, seed=4, fewer=True)
        assert [p.clean for p in first] != [p.clean for p in other], name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[(n, "bpe-bos") for n in ("indirect_object", "fact.landmark", "greater_than", "addition", "docstring")],
        *[(n, "characters") for n in ("greater_than", "addition")],
    ],
)
def test_a_tokenizer_without_offsets_gives_the_same(name: str, kind: str) -> None:
    fast = tokenizers.build(kind)
    slow = tokenizers.Slow(fast)
    if kind == "bpe-bos":  # the class itself adds nothing: leave it out of both
        fast = PreTrainedTokenizerFast(tokenizer_object=_without_start(fast), unk_token=None)
    assert not slow.is_fast
    assert mt.tasks.build(name, slow, 6).pairs == mt.tasks.build(name, fast, 6).pairs


def _without_start(fast: Any) -> Any:
    from tokenizers import Tokenizer, processors

    made = Tokenizer.from_str(fast.backend_tokenizer.to_str())
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return made


# -------------------------------------------------------------------------------------------------------- they are true


def build(name: str, n: int = 40, **options: Any) -> mt.tasks.Task:
    return mt.tasks.build(name, tokenizers.build("bpe-bos"), n, **options)


@pytest.mark.parametrize("corruption", ["swap", "third"])
@pytest.mark.parametrize("order", ["both", "ABBA", "BABA"])
def test_indirect_object(order: str, corruption: str) -> None:
    task = build("indirect_object", order=order, corruption=corruption)
    orders = Counter(pair.group.split()[0] for pair in task)
    assert set(orders) == ({"ABBA", "BABA"} if order == "both" else {order})
    assert len({pair.group for pair in task}) == (8 if order == "both" else 4)
    for pair in task:
        io, s = pair.answer.strip(), pair.foil.strip()
        words, other = re.findall(r"\w+", pair.clean), re.findall(r"\w+", pair.corrupt)
        assert (words.count(io), words.count(s)) == (1, 2)
        assert (other.count(io), other.count(s)) == ((2, 1) if corruption == "swap" else (1, 1))
        assert (pair.spans["io"] < pair.spans["s1"]) == pair.group.startswith("ABBA")
        assert pair.spans["s1"] < pair.spans["s2"]


@pytest.mark.parametrize("kind", ["bpe-three-digits", "characters"])
def test_greater_than_under_other_cuts(kind: str, request: pytest.FixtureRequest) -> None:
    test_greater_than(kind, request)
    given = {pair.group for pair in mt.tasks.build("greater_than", tokenizers.build(kind), 5)}
    assert given == {"3 digits given" if kind == "bpe-three-digits" else "2 digits given"}


@KIND
def test_greater_than(kind: str, request: pytest.FixtureRequest) -> None:
    """Whatever follows an answer token the year is later; whatever follows a foil token it is not."""
    tok = tokenizer(kind, request)
    for pair in mt.tasks.build("greater_than", tok, 40):
        start, prefix = re.search(r"year (\d{4}) to the year (\d+)$", pair.clean).groups()  # type: ignore[union-attr]
        earliest = re.search(r"year (\d{4}) to", pair.corrupt)[1]  # type: ignore[index]
        assert start.startswith(prefix)
        assert int(earliest) == int(prefix.ljust(4, "0")) + (len(prefix) == 2)
        shown = [tok.decode([i]).removeprefix("##") for i in pair.answer_ids]
        assert all(int((prefix + a).ljust(4, "0")) > int(start) for a in shown)
        shown = [tok.decode([i]).removeprefix("##") for i in pair.foil_ids]
        assert all(int((prefix + f).ljust(4, "9")) <= int(start) for f in shown)


@KIND
def test_addition(kind: str, request: pytest.FixtureRequest) -> None:
    for pair in mt.tasks.build("addition", tokenizer(kind, request), 40):
        for prompt, answer in ((pair.clean, pair.answer), (pair.corrupt, pair.foil)):
            sums = re.findall(r"(\d+) \+ (\d+) = ?(\d*)", prompt + " " * prompt.endswith("=") + answer.strip())
            assert len(sums) == 3
            assert all(int(a) + int(b) == int(c) for a, b, c in sums)
            assert len({c for _, _, c in sums}) == 3
        assert pair.answer.strip() not in re.findall(r"= (\d+)", pair.clean)


def test_docstring_agreement_pronoun_and_needle() -> None:
    for pair in build("docstring"):
        for prompt, third in ((pair.clean, pair.answer), (pair.corrupt, pair.foil)):
            args = re.search(r"\(self, (.*)\):", prompt)[1].split(", ")  # type: ignore[index]
            assert re.findall(r":param (\w+):", prompt) == args[:2]
            assert third == f" {args[2]}"
    for pair in build("subject_verb_agreement"):
        words = re.findall(r"\w+", pair.clean)
        attractor_is_plural = words[-1].endswith("s")
        assert (" is" in pair.answer) == attractor_is_plural
        assert set(pair.answer.split("|")) in ({" is", " was", " has"}, {" are", " were", " have"})
    names = mt.tasks._words.words("women")
    for pair in build("gendered_pronoun"):
        words = set(re.findall(r"\w+", pair.clean))
        assert (pair.answer == " she") == bool(words & set(names))
    for pair in build("needle", sentences=3):
        assert pair.clean.count(pair.answer + ".") == 1
        assert pair.corrupt.count(pair.foil + ".") == 1
        assert pair.clean.count(".") == 4


def test_induction_needs_no_text() -> None:
    from tests import families

    model = mt.open(families.build("llama-gqa"), prove=False)
    task = mt.tasks.build("induction", model, 20, length=7)
    for pair in task:
        once, again = pair.clean_tokens[:7], pair.clean_tokens[7:]
        assert len(set(once)) == 7
        assert again == once[:6]
        assert pair.answer_ids == once[6:]
        assert pair.foil_ids == pair.corrupt_tokens[6:7]
        assert pair.clean_tokens[slice(*pair.spans["source"])] == pair.answer_ids
        assert pair.clean_tokens[slice(*pair.spans["previous"])] == pair.clean_tokens[-1:]
    tok = tokenizers.build("bpe-bos")
    pair = mt.tasks.build("induction", tok, 1)[0]
    assert pair.clean_tokens[0] == tok.bos_token_id
    assert tok.bos_token_id not in pair.clean_tokens[1:]
    assert pair.clean_tokens[slice(*pair.spans["source"])] == pair.answer_ids


# ------------------------------------------------------------------------------------------------------------ the facts


def test_facts_are_many_and_no_subject_stands_twice() -> None:
    facts = mt.tasks.facts()
    assert len(facts) >= 400
    assert len(facts) == 535
    asked = (
        "capital language currency landmark element_symbol opposite plural past_tense next_day next_month next_number"
    )
    assert {r for r, _, _ in facts} == {*asked.split(), "next_letter"}
    twice = [k for k, count in Counter((r, s) for r, s, _ in facts).items() if count > 1]
    assert not twice
    for relation, subject, answer in facts:
        assert subject == subject.strip() != answer == answer.strip() != "", (relation, subject)


def test_facts_that_the_standard_library_knows() -> None:
    def table(relation: str) -> list[tuple[str, str]]:
        return [(s, a) for _, s, a in mt.tasks.facts(relation)]

    days, months = list(calendar.day_name), list(calendar.month_name)[1:]
    assert table("next_day") == [*zip(days, days[1:] + days[:1], strict=True)]
    assert table("next_month") == [*zip(months, months[1:] + months[:1], strict=True)]
    assert table("next_letter") == [*zip(string.ascii_uppercase, string.ascii_uppercase[1:], strict=False)]
    numbers = table("next_number")
    assert [a for _, a in numbers[:-1]] == [s for s, _ in numbers[1:]]


@pytest.mark.parametrize("relation", ["currency", "next_number", "opposite", "plural"])
def test_no_answer_or_foil_can_be_copied_from_the_example(relation: str) -> None:
    """By first tokens, so that every answer is read whatever the tokenizer makes of it."""
    table = {subject: answer for _, subject, answer in mt.tasks.facts(relation)}
    seen: set[str] = set()
    for seed in range(3):
        for pair in build(f"fact.{relation}", len(table), fewer=True, answers="first", seed=seed):
            subject, other = (
                next(s for s in sorted(table, key=len, reverse=True) if re.search(rf"\b{s}\b", p))
                for p in (_last_sentence(pair.clean), _last_sentence(pair.corrupt))
            )
            example = pair.clean.removesuffix(_last_sentence(pair.clean))
            assert not re.search(rf"\b({table[subject]}|{table[other]})\b", example), pair.clean
            seen |= {subject}
    missed = set(table) - seen
    assert len(missed) < len(table) / 4, missed  # they are asked without the example instead of left out


def _last_sentence(prompt: str) -> str:
    return prompt.rpartition(". ")[2]


def test_a_corrupt_fact_is_another_subject_of_its_relation() -> None:
    for pair in mt.tasks.build("fact", tokenizers.build("bpe-bos"), 200):
        table = {s: a for r, s, a in mt.tasks.facts(pair.group)}
        own = [s for s in table if f" {table[s]}" == pair.answer and s in pair.clean and s not in pair.corrupt]
        other = [s for s in table if f" {table[s]}" == pair.foil and s in pair.corrupt]
        assert own
        assert other


# ------------------------------------------------------------------------------------------------------------ refusals


def test_words_of_many_tokens_are_refused_with_how() -> None:
    characters = tokenizers.build("characters")
    with pytest.raises(PromptError) as told:
        mt.tasks.build("fact.next_month", characters, 5)
    assert 'only 0 of 5 pairs of "fact.next_month" fit this tokenizer' in str(told.value)
    with pytest.raises(
        PromptError, match="an answer or foil is several tokens: .* read the first token of each answer"
    ):
        mt.tasks.build("fact.next_letter", characters, 5)
    with pytest.raises(PromptError, match="answer and foil begin with the same token: ' [B-Z]' and ' [B-Z]'"):
        mt.tasks.build("fact.next_letter", characters, 5, answers="first")
    for name in ("greater_than", "addition", "induction"):  # digits are tokens
        assert len(mt.tasks.build(name, characters, 5)) == 5


def test_first_tokens_are_read_if_asked() -> None:
    tok = tokenizers.build("bpe-bos")
    task = mt.tasks.build("fact.element_symbol", tok, 64, answers="first", fewer=True)
    assert len(task) >= len(mt.tasks.build("fact.element_symbol", tok, 64, fewer=True))
    for pair in task:
        assert len(pair.answer_ids) == 1
        assert pair.answer_ids != pair.foil_ids


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("indirect_objekt", {}, 'there is no task "indirect_objekt". Did you mean "indirect_object"'),
        ("induction", {"n": 0}, "a task has at least one pair; got n=0"),
        ("induction", {"seed": -1}, "a task cannot be drawn with this seed; got -1; allowed: 0 or more."),
        ("needle", {"length": 3}, 'the task "needle" has no such option; got length; allowed: sentences.'),
        ("fact", {"relation": "x"}, 'the task "fact" has no such option; got relation; allowed: none.'),
        ("indirect_object", {"order": "AABB"}, "has no such order; got 'AABB'; allowed: both, ABBA, BABA."),
        ("indirect_object", {"corruption": "x"}, "has no such corruption; got 'x'; allowed: swap, third."),
        ("needle", {"sentences": 99}, "the context cannot have that many sentences; got 99; allowed: 1 to 16."),
        ("induction", {"length": 1}, "random repeats of this length cannot be drawn; got 1; allowed: 2 to "),
        ("fact.next_day", {"n": 8}, 'only 7 of 8 pairs of "fact.next_day" fit this tokenizer; got 0 drafts refused'),
        ("fact.next_day", {"n": 8}, "ask for n=7, or pass fewer=True."),
    ],
)
def test_bad_input(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(PromptError) as told:
        mt.tasks.build(name, tokenizers.build("bpe-bos"), **options)
    assert text in str(told.value)
    assert "\n" not in str(told.value)


def test_every_task_says_what_it_asks() -> None:
    assert mt.tasks.about("induction") == "the next token of random tokens that are repeated"
    assert len({mt.tasks.about(name) for name in mt.tasks.names()}) == len(mt.tasks.names()) == 21
    with pytest.raises(PromptError, match='there is no task "x"; allowed: indirect_object, '):
        mt.tasks.about("x")


def test_bad_sources() -> None:
    from tests import families

    with pytest.raises(PromptError, match="cannot tokenise with this; got dict; allowed: a model or a tokenizer"):
        mt.tasks.build("fact", {})
    with pytest.raises(PromptError, match='the task "fact" is made of text, and this model has no tokenizer'):
        mt.tasks.build("fact", mt.open(families.build("llama-gqa"), prove=False))
    model = mt.open(families.build("llama-gqa"), tokenizer=tokenizers.build("bpe-bos"), prove=False)
    with pytest.raises(PromptError, match="the prompt is longer than the model's context: .* tokens, at most 64"):
        mt.tasks.build("needle", model, 3, sentences=16)
