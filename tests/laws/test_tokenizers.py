"""Text to tokens and back is one thing for every method, whatever a tokenizer puts around, before or into words."""

from __future__ import annotations

import unicodedata
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import families, tokenizers

import microtome as mt
from microtome.errors import PromptError
from microtome.run import Codec
from microtome.run._batch import rows_of
from microtome.stream import Corpus, TokenBatches

PROMPT, OTHER = "The capital of France is", "The capital of Italy is"
KINDS = (
    "bpe-bos",
    "bpe-eos",
    "bpe-both",
    "chat",
    "nfc",
    "llama-2",
    "llama-2-legacy",
    "bert",
    "wordpiece",
    "characters",
)
LLAMA = ("llama-2", "llama-2-legacy")
CHAT = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "The capital of France?"}]


@cache
def model(kind: str, family: str = "llama-gqa", slow: bool = False) -> mt.Model:
    tokenizer = tokenizers.build(kind)
    hf = families.build(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return mt.open(hf, tokenizer=tokenizers.Slow(tokenizer) if slow else tokenizer, prove=False)


def pieces(m: mt.Model, text: str) -> list[str]:
    return m.tokenizer.convert_ids_to_tokens(m.to_tokens(text)[0].tolist())


# ------------------------------------------------------------------------------------------- what stands around a text


@pytest.mark.parametrize(("kind", "first"), [("bpe-bos", ["<s>"]), ("bpe-eos", []), ("bpe-both", ["<s>"])])
def test_a_prompt_ends_with_its_own_last_token(kind: str, first: list[str]) -> None:
    m = model(kind)
    assert pieces(m, PROMPT) == [*first, "The", "Ġc", "ap", "ital", "Ġof", "ĠFrance", "Ġis"]
    ids = m.to_tokens(PROMPT)
    assert m.to_batch([PROMPT, "The"]).lengths == (len(ids[0]), len(first) + 1)
    # Lens, contributions and patching read what follows " is", where the tokens alone put it.
    lens = mt.explain.logit_lens(m, PROMPT)
    assert lens["prompt"].values.reshape(-1)[-1] == " is"
    answer = m.run(ids).logits[0, -1].argmax()
    assert lens["token"].isel(layer=-1, pos=-1).item() == answer
    assert mt.explain.contributions(m, PROMPT).attrs["answer"] == m.to_words(answer.reshape(1))[0]
    patched = mt.explain.patch(m, PROMPT, OTHER, answer=" Paris", foil=" Rome", sites=["resid_pre"], share=False)
    paris, rome = (m.tokenizer.convert_tokens_to_ids("Ġ" + w) for w in ("Paris", "Rome"))
    logits = m.run(ids).logits[0, -1].double()
    assert float(patched["clean"]) == pytest.approx(float(logits[paris] - logits[rome]), abs=1e-5)
    assert abs(float(logits[paris] - logits[rome])) > 1e-2
    # Ids are run as they are, the closing one too.
    given = m.tokenizer(PROMPT)
    assert m.to_tokens(given)[0].tolist() == given["input_ids"]
    assert m.to_tokens(PROMPT + "</s>")[0].tolist()[: len(ids[0])] == ids[0].tolist()


def test_a_corpus_of_chats_begins_once() -> None:
    tokenizer = tokenizers.build("chat")
    chats = [tokenizer.apply_chat_template(CHAT[i:], tokenize=False) for i in range(2)]
    assert all(chat.startswith("<s>") for chat in chats)
    made = [TokenBatches(Corpus.of("t", texts), tokenizer, length=16) for texts in (chats, [c[3:] for c in chats])]
    assert made[0].flat == made[1].flat
    for batch in made[0]:
        for row in batch.tokens.tolist():
            assert row[0] == tokenizer.bos_token_id
            assert row[1] != tokenizer.bos_token_id


def test_an_end_that_was_written_stays() -> None:
    m = model("bpe-both")
    assert pieces(m, "The</s>") == ["<s>", "The", "</s>"]
    assert pieces(m, "") == ["<s>"]


def test_an_encoder_keeps_what_closes_a_text() -> None:
    m = model("bert", "bert")
    assert pieces(m, PROMPT)[0] == "[CLS]"
    assert pieces(m, PROMPT)[-1] == "[SEP]"
    assert pieces(model("bert"), PROMPT)[-1] == "is"


@pytest.mark.parametrize("kind", ["bpe-bos", "bpe-both", "chat", *LLAMA])
def test_what_begins_every_text_stands_there_once(kind: str) -> None:
    m = model(kind)
    as_written = m.tokenizer("<s>" + PROMPT, add_special_tokens=False)["input_ids"]
    assert as_written.count(m.tokenizer.bos_token_id) == 1
    assert m.to_tokens("<s>" + PROMPT)[0].tolist() == as_written
    assert m.to_tokens("<s>")[0].tolist() == m.to_tokens("")[0].tolist() == [m.tokenizer.bos_token_id]
    first, end = mt.explain.span_of(m, m.encodings("<s>" + PROMPT)[0], "France")
    assert m.to_words(as_written[first:end]) == [" France"]


@pytest.mark.parametrize("kind", ["bpe-eos", "bpe-both"])
def test_a_generation_goes_on_where_the_text_ends(kind: str) -> None:
    m = model(kind)
    ids = m.to_tokens(PROMPT)
    assert "</s>" not in pieces(m, PROMPT)
    out = m.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert m.generate(PROMPT, max_new_tokens=3) == m.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_tasks_are_the_same_with_and_without_an_end() -> None:
    ended = mt.tasks.build("fact.capital", tokenizers.build("bpe-both"), 6)
    plain = mt.tasks.build("fact.capital", tokenizers.build("bpe-bos"), 6)
    assert [p.clean for p in ended] == [p.clean for p in plain]
    assert [dict(p.spans) for p in ended] == [dict(p.spans) for p in plain]
    assert all(p.clean_tokens[-1] != 1 for p in ended)


# ---------------------------------------------------------------------------------------------------------------- chat


def test_a_chat_is_what_the_template_writes() -> None:
    m = model("chat")
    wrote = m.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert wrote == "<s><|system|>Answer.<|end|><|user|>The capital of France?<|end|><|assistant|>"
    expected = m.tokenizer(wrote, add_special_tokens=False)["input_ids"]
    assert expected.count(m.tokenizer.bos_token_id) == 1
    assert m.to_tokens(CHAT)[0].tolist() == m.to_tokens(wrote)[0].tolist() == expected  # type: ignore[arg-type]
    assert torch.equal(m.run(CHAT).logits, m.run([expected]).logits)
    both = m.to_batch([CHAT, CHAT[1:]])
    assert both.rows[0].tolist() == expected
    assert both.rows[1].tolist() == m.to_tokens(CHAT[1:])[0].tolist()
    first, end = mt.explain.span_of(m, m.encodings(CHAT)[0], "France")
    assert m.to_words(expected[first:end]) == [" France"]
    assert m.generate(CHAT, max_new_tokens=2) == m.generate([CHAT], max_new_tokens=2)[0]


def test_a_last_message_of_the_assistant_is_continued() -> None:
    m = model("chat")
    begun = [*CHAT, {"role": "assistant", "content": "It is"}]
    assert "".join(m.to_words(m.to_tokens(begun)[0])).endswith("<|end|><|assistant|>It is")


@pytest.mark.parametrize(
    ("kind", "chat", "text"),
    [
        (
            "bpe-bos",
            CHAT,
            "this tokenizer has no chat template; got a list of 2 messages. To do: pass the prompt as text",
        ),
        ("chat", [{"role": "tool", "content": "x"}], "refuses the messages; got no role tool"),
        ("chat", [{"role": "user", "content": None}], "cannot read message 0 of the chat; got content None"),
        ("chat", [{"role": "user"}], "cannot read message 0 of the chat; got role; allowed: a mapping"),
        ("chat", CHAT[0], "the prompt holds no input_ids; got role, content. To do: put a single message into a list"),
        ("chat", [CHAT[0], "text"], "cannot read the prompt"),
        ("chat", [{"role": "user", "content": "\ud800"}], "message 0 of the chat is not valid Unicode"),
    ],
)
def test_a_chat_that_cannot_be_read(kind: str, chat: Any, text: str) -> None:
    with pytest.raises(PromptError) as told:
        model(kind).run(chat)
    assert text in str(told.value)


def test_a_model_without_a_tokenizer_reads_no_chat() -> None:
    bare = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(PromptError, match="opened without a tokenizer, so it cannot read text"):
        bare.run(CHAT)


# ----------------------------------------------------------------------------------------------------------- the words


@pytest.mark.parametrize("kind", LLAMA)
def test_a_word_of_sentencepiece_keeps_its_space(kind: str, tmp_path: Path) -> None:
    m = model(kind)
    paris = m.tokenizer.convert_tokens_to_ids("▁Paris")
    assert m.to_words([paris]) == [" Paris"]
    assert "".join(m.to_words(m.to_tokens(PROMPT)[0])) == "<s> " + PROMPT
    assert m.to_id(" Paris") == paris
    assert mt.explain.contributions(m, PROMPT, answer=" Paris").attrs["answer"] == " Paris"
    with pytest.raises(PromptError, match=r'"Paris" is not one token; .* with its space: " Paris"'):
        m.to_id("Paris")
    pair = mt.tasks.build("fact.capital", m, 1)[0]
    assert pair.answer.startswith(" ")
    assert m.to_id(pair.answer) == pair.answer_ids[0]
    assert m.to_tokens(pair.clean + pair.answer)[0].tolist() == [*pair.clean_tokens, *pair.answer_ids]
    path = tmp_path / "pairs.csv"
    path.write_text(f"clean,corrupt,answer,foil\n{PROMPT},{OTHER}, Paris, Rome\n")
    assert mt.tasks.read(path, m)[0].answer == " Paris"


def test_a_subject_of_a_file_is_found_as_one_of_a_prompt_is(tmp_path: Path) -> None:
    m = model("nfc")
    path = tmp_path / "pairs.csv"
    for written, subject in (("Peruvians of Peru and", "Peru"), ("in Zu\u0308rich and", "Z\u00fcrich")):
        path.write_text(f"clean,corrupt,answer,foil,subject\n{written} is,{written} of, is, of,{subject}\n", "utf-8")
        pair = mt.tasks.read(path, m)[0]
        assert pair.spans["subject"] == mt.explain.span_of(m, m.encodings(written)[0], subject)
        shown = m.tokenizer.decode(pair.clean_tokens[slice(*pair.spans["subject"])])
        assert shown == unicodedata.normalize("NFC", f" {subject}")


@pytest.mark.parametrize("kind", LLAMA)
def test_what_is_generated_keeps_its_first_space(kind: str) -> None:
    m = model(kind)
    added = [m.tokenizer.convert_tokens_to_ids(t) for t in ("▁Paris", "▁is")]
    assert Codec(m.tokenizer).continued(added, skip_special_tokens=True) == " Paris is"
    assert Codec(m.tokenizer).continued([1, *added], skip_special_tokens=True) == " Paris is"
    space = m.tokenizer.convert_tokens_to_ids("▁")
    assert Codec(m.tokenizer).continued([space, space, *added]) == "   Paris is"
    ids = m.to_tokens(PROMPT)
    out = m.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
    whole = m.tokenizer.decode(out[0], skip_special_tokens=True)
    assert whole == PROMPT + m.generate(PROMPT, max_new_tokens=4)


def test_what_is_generated_keeps_its_indentation() -> None:
    m = model("bpe-bos")
    ids = m.to_tokens("a  b")[0, -2:].tolist()
    assert Codec(m.tokenizer).continued(ids) == m.tokenizer.decode(ids)
    for text in ("  b", "    b c", "\n  b"):
        ids = Codec(m.tokenizer).alone(text)
        assert Codec(m.tokenizer).continued(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_what_follows_a_prompt(kind: str) -> None:
    m = model(kind)
    codec = Codec(m.tokenizer)
    for text in (" Paris", " Rome", "\n", ",", " is", " apples"):
        added = m.to_tokens(PROMPT + text)[0].tolist()[len(m.to_tokens(PROMPT)[0]) :]
        assert list(codec.continuation(text)) == added, text
        if len(added) == 1 and added[0] != m.tokenizer.unk_token_id:
            assert m.to_id(text) == added[0]


@pytest.mark.parametrize(
    ("kind", "slow"),
    [*((k, False) for k in KINDS), *((k, True) for k in ("bpe-bos", "characters", "llama-2-legacy"))],
)
def test_the_tokens_of_a_word_are_found_by_its_characters(kind: str, slow: bool) -> None:
    """Whatever the tokenizer, the tokens of a word are those that decode to it, and all of them."""
    m = model(kind, "gpt2", slow=slow)
    text = "The capital of France is Paris, that capital of Italy is Rome so"
    (encoding,), ids = m.encodings(text), m.to_tokens(text)[0]
    assert encoding.ids == tuple(ids.tolist())
    for word in ("The", "capital", "capital of France", "Paris", "Italy", "Rome"):
        for given in (encoding, ids):
            first, end = mt.explain.span_of(m, given, word)
            assert m.tokenizer.decode(ids[first:end].tolist()).strip().lower() == word.lower(), (word, type(given))
    at = text.rindex("capital")
    second = encoding.tokens_at(at, at + len("capital"))
    assert second is not None
    assert second[0] > mt.explain.span_of(m, encoding, "capital")[1]
    if kind not in ("characters",):
        assert encoding.whole_tokens_at(at + 1, at + 4) is None


@pytest.mark.parametrize("kind", ["nfc", "bpe-bos", "bert", "llama-2"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD"])
def test_a_letter_is_found_however_its_accent_is_written(kind: str, written: Any, asked: Any) -> None:
    m = model(kind)
    text = unicodedata.normalize(written, "The city of Zürich is nice, Élodie says.")
    (encoding,) = m.encodings(text)
    for word in ("Zürich", "Élodie"):
        first, end = mt.explain.span_of(m, encoding, unicodedata.normalize(asked, word))
        at = text.index(unicodedata.normalize(written, word))
        assert (first, end) == encoding.tokens_at(at, at + len(unicodedata.normalize(written, word)))
        if kind != "bert":  # which knows no such letter
            ids = m.to_tokens(text)[0]
            assert mt.explain.span_of(m, ids, unicodedata.normalize(asked, word)) == (first, end)
            shown = unicodedata.normalize("NFC", m.tokenizer.decode(ids[first:end].tolist())).strip()
            assert shown == word
    with pytest.raises(PromptError, match='no span "Zu"'):
        mt.explain.span_of(m, encoding, "Zu")


def test_methods_find_a_subject_however_its_accent_is_written() -> None:
    m = model("nfc")
    text, subject = "The city of Zu\u0308rich is in", "Zu\u0308rich"
    traced = mt.explain.causal_trace(m, text, subject=subject, samples=2, kinds=["resid"])
    words = [w for w, inside in zip(traced["token"].values, traced["subject"].values, strict=True) if inside]
    assert len(words) > 1
    first, end = m.encodings(text)[0].tokens_at(12, 19) or (0, 0)
    assert np.flatnonzero(traced["subject"].values).tolist() == list(range(first, end))
    cut = mt.explain.attention_knockout(m, text, keys=subject, controls=1)
    assert unicodedata.normalize("NFC", cut.attrs["keys"]).strip() == "Zürich"
    spans = mt.explain.patch(m, text, text.replace("in", "is"), answer=" a", sites=["mlp_out"], share=False,
                             spans={"subject": subject, "end": -1})  # fmt: skip
    assert spans["span"].values.tolist() == ["subject", "end"]


def test_an_unknown_subject_is_not_another_unknown_word() -> None:
    m = model("wordpiece")
    with pytest.raises(PromptError, match='no span "東京"'):
        mt.explain.span_of(m, m.to_tokens("the city of Łódź is")[0], "東京")


# ----------------------------------------------------------------------------------------------------- what is no text


@pytest.mark.parametrize("kind", ["bpe-bos", "llama-2"])
def test_half_a_surrogate_pair_is_refused(kind: str) -> None:
    m = model(kind)
    broken = "of \udcff is"
    told = r"is not valid Unicode; got '\\udcff' at character \d"
    for call in (
        lambda: m.run(broken), lambda: m.run(["fine", broken]), lambda: m.generate(broken), lambda: m.to_id(broken),
        lambda: mt.explain.logit_lens(m, broken), lambda: mt.explain.contributions(m, PROMPT, answer=broken),
        lambda: mt.explain.causal_trace(m, PROMPT, subject=broken), lambda: m.encodings(broken),
        lambda: mt.explain.causal_trace(m, PROMPT, subject="France", subjects=[broken]),
        lambda: mt.explain.patch(m, PROMPT, OTHER, answer=" Paris", spans={"x": broken}),
    ):  # fmt: skip
        with pytest.raises(PromptError, match=told):
            call()


@pytest.mark.parametrize("given", [b"abc", bytearray(b"abc"), memoryview(b"abc"), [b"abc"], (b"a", b"b")])
def test_bytes_are_no_ids(given: Any) -> None:
    m = model("bpe-bos")
    for call in (m.run, m.to_tokens, m.generate, m.encodings):
        with pytest.raises(
            PromptError, match=r"cannot read the prompt; got (bytes|bytearray|memoryview); .*decode it first"
        ):
            call(given)


def test_bytes_are_neither_answers_nor_spans_and_sets_have_no_order() -> None:
    m = model("bpe-bos")
    with pytest.raises(PromptError, match="cannot read the subject; got b'ab'"):
        mt.explain.causal_trace(m, PROMPT, subject=b"ab")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="cannot read the answer; got b'abc'"):
        mt.explain.contributions(m, [PROMPT] * 3, answer=b"abc")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="cannot read the prompt; got set"):
        rows_of({5, 6}, None)


# ------------------------------------------------------------------------------------------------- answers and metrics


@pytest.mark.parametrize("kind", ["bpe-bos", "llama-2"])
def test_a_metric_takes_text_where_a_function_does(kind: str) -> None:
    m = model(kind)
    paris, rome, bern = (m.to_id(f" {word}") for word in ("Paris", "Rome", "Lima"))
    cells = [mt.edit.Zero("0.mlp_out"), mt.edit.Zero("1.attn_out")]
    mk = mt.metric
    both = [
        (mk.LogitDifference(" Paris", foil=" Rome"), mk.LogitDifference(paris, foil=rome)),
        (mk.LogitDifference([" Paris", rome], foil=bern), mk.LogitDifference([paris, rome], foil=bern)),
        (mk.LogProbability(" Paris"), mk.LogProbability(paris)),
        (mk.Probability(" Paris", position=-2), mk.Probability(paris, position=-2)),
        (mk.Rank([" Paris", " Rome"]), mk.Rank([paris, rome])),
        (mk.SpanLoss([" Paris Rome"] * 2, positions=(-2, -1)), mk.SpanLoss([[paris, rome]] * 2, positions=(-2, -1))),
        (
            mt.tasks.LogOdds([(" Paris", bern)] * 2, [(" Rome",)] * 2),
            mt.tasks.LogOdds([(paris, bern)] * 2, [(rome,)] * 2),
        ),
    ]
    for text, ids in both:
        found, expected = (m.sweep([PROMPT, OTHER], cells, metric, prompts=[0, 1]).run() for metric in (text, ids))
        assert torch.equal(found.values, expected.values)
        assert expected.effects.abs().max() > 0.005 * expected.values.abs().max()
        with pytest.raises(mt.errors.EditError, match="must be read by a model's tokenizer first"):
            text.read(torch.zeros(2, 2, 6000), torch.arange(2))
    given = {"sites": ["resid_pre"], "share": False}
    patched = mt.explain.patch(m, PROMPT, OTHER, metric=both[0][0], **given)
    assert patched.equals(mt.explain.patch(m, PROMPT, OTHER, metric=both[0][1], **given))
    nodes = mt.explain.node_effects(m, PROMPT, OTHER, metric=mk.LogProbability(" Paris"))
    assert nodes["effect"].equals(mt.explain.node_effects(m, PROMPT, OTHER, metric=mk.LogProbability(paris))["effect"])


@pytest.mark.parametrize(
    ("made", "kind", "text"),
    [
        (lambda: mt.metric.LogitDifference(" Paris", foil=" Paris"), mt.errors.EditError, "the foil equals the answer"),
        (lambda: mt.metric.LogProbability("Paris"), PromptError, 'with its space: " Paris"'),
        (lambda: mt.metric.Rank([]), mt.errors.EditError, "cannot read the tokens of a metric"),
        (lambda: mt.metric.Rank(b"a"), mt.errors.EditError, "cannot read the tokens of a metric; got b'a'"),
        (lambda: mt.metric.SpanLoss([" Paris"], positions=(-2, -1)), mt.errors.EditError, "got ' Paris', 1 tokens"),
    ],
)
def test_texts_of_a_metric_that_cannot_be_read(made: Any, kind: Any, text: str) -> None:
    with pytest.raises(kind, match=text):
        model("bpe-bos").sweep(PROMPT, [mt.edit.Zero("0.mlp_out")], made())


def test_a_metric_in_text_needs_a_tokenizer() -> None:
    bare = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(PromptError, match='cannot read " Paris": this model was opened without a tokenizer'):
        bare.sweep([5, 6], [mt.edit.Zero("0.mlp_out")], mt.metric.Probability(" Paris"))


def spaced(kind: str = "bpe-bos") -> tuple[mt.Model, int, int]:
    """A model whose words without a space are tokens, and the ids of "is" and " is"; the second is far likelier."""
    m = model(kind)
    return m, m.to_id("is"), m.to_id(" is")


@pytest.fixture
def likelier(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes one token a hundred times as likely as it was, after every prompt."""

    def make(m: mt.Model, token: int, times: float) -> None:
        bias = torch.zeros(m.anatomy.d_vocab)
        bias[token] = np.log(times)
        hook = m.hf.lm_head.register_forward_hook(lambda module, given, out: out + bias)
        undo.append(hook)

    undo: list[Any] = []
    yield make
    for hook in undo:
        hook.remove()


ASKED = {
    "contributions": lambda m, a: mt.explain.contributions(m, PROMPT, answer=a),
    "patch": lambda m, a: mt.explain.patch(m, PROMPT, OTHER, answer=a, sites=["mlp_out"], share=False),
    "metric": lambda m, a: mt.explain.patch(
        m, PROMPT, OTHER, metric=mt.metric.LogProbability(a), sites=["mlp_out"], share=False
    ),
    "component_effects": lambda m, a: mt.explain.component_effects(m, [PROMPT], answer=a, components=["0.mlp_out"]),
    "causal_trace": lambda m, a: mt.explain.causal_trace(m, PROMPT, subject="France", answer=a, samples=1),
    "attention_knockout": lambda m, a: mt.explain.attention_knockout(m, PROMPT, keys="France", answer=a, controls=0),
    "node_effects": lambda m, a: mt.explain.node_effects(m, PROMPT, OTHER, answer=a),
    "attribute": lambda m, a: mt.explain.attribute(m, PROMPT, OTHER, answer=a, verify=0, sites=["mlp_out"]),
}  # fmt: skip


@pytest.mark.parametrize("method", sorted(ASKED))
def test_an_answer_without_its_space_is_warned_of(method: str, likelier: Any) -> None:
    m, bare, word = spaced()
    chances = m.run(PROMPT).logits[0, -1].log_softmax(-1)
    likelier(m, word, 1000 * float((chances[bare] - chances[word]).exp()))
    with pytest.warns(mt.errors.MicrotomeWarning, match=r"the answer is the token 'is', and ' is' is 1,000 times as"):
        ASKED[method](m, "is")
    with warnings.catch_warnings():
        warnings.simplefilter("error", mt.errors.MicrotomeWarning)
        ASKED[method](m, " is")
        ASKED[method](m, bare)  # an id is what it is


def test_behind_the_mark_of_a_turn_the_form_with_a_space_is_warned_of(likelier: Any) -> None:
    m, bare, word = spaced("chat")
    chances = m.run(CHAT).logits[0, -1].log_softmax(-1)
    likelier(m, bare, 1000 * float((chances[word] - chances[bare]).exp()))
    with pytest.warns(mt.errors.MicrotomeWarning, match="the answer is the token ' is', and 'is' is"):
        mt.explain.contributions(m, CHAT, answer=" is")


def test_no_warning_where_the_other_form_is_not_far_likelier(likelier: Any) -> None:
    m, bare, word = spaced()
    chances = m.run(PROMPT).logits[0, -1].log_softmax(-1)
    likelier(m, word, 9 * float((chances[bare] - chances[word]).exp()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", mt.errors.MicrotomeWarning)
        ASKED["contributions"](m, "is")


def test_behind_a_space_the_form_with_another_one_is_warned_of(likelier: Any) -> None:
    m, bare, word = spaced()
    ended = PROMPT + " "
    chances = m.run(ended).logits[0, -1].log_softmax(-1)
    likelier(m, bare, 1000 * float((chances[word] - chances[bare]).exp()))
    with pytest.warns(mt.errors.MicrotomeWarning, match="the answer is the token ' is', and 'is' is"):
        mt.explain.contributions(m, ended, answer=" is")
    with pytest.warns(mt.errors.MicrotomeWarning, match="the foil of example 1 is the token ' is'"):
        mt.explain.contributions(m, [PROMPT, ended], answer=word + 1, foil=" is")
