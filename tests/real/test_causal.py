"""On the default model: a fact is held where it is said to be, and spans are found in real text."""

from __future__ import annotations

import pytest

import microtome as mt

pytestmark = pytest.mark.real
PROMPT = "The Colosseum is in the city of"


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open()


def test_a_fact_is_restored_at_its_subject_and_read_at_the_end(model: mt.Model) -> None:
    data = mt.explain.causal_trace(
        model, PROMPT, subject="Colosseum", corrupt="The Eiffel Tower is in the city of", kinds=["resid"]
    )
    assert data["token"].values[data["subject"].values].tolist() == [" Col", "osse", "um"]
    assert data.attrs["answer"] == " Rome"
    assert float(data["clean"]) == pytest.approx(0.85, abs=0.02)
    gap = float(data["clean"] - data["corrupt"])
    assert gap > 0.7
    stream = data["resid"].values
    assert stream[29, -1] == pytest.approx(gap, abs=1e-4)
    assert stream[:10, -1].max() < 0.1 * gap < 0.5 * gap < stream[24:, -1].min()
    assert stream[8:16, 2:4].max() > 0.3 * gap
    assert abs(stream[24:, 1:4]).max() < 0.1 * gap


def test_cutting_the_end_from_the_subject_loses_the_fact(model: mt.Model) -> None:
    data = mt.explain.attention_knockout(model, PROMPT, keys="The Colosseum", controls=0)
    assert data.attrs["keys"] == "The Colosseum"
    assert float(data["relative"][20]) < -0.9
    assert abs(float(data["relative"][2])) < 0.2


@pytest.mark.parametrize("text", ["Collosseum", "  ", "Paris"])
def test_a_subject_that_is_not_there_is_refused(model: mt.Model, text: str) -> None:
    with pytest.raises(mt.errors.PromptError, match=f'the prompt has no subject "{text}"; got "{PROMPT}"'):
        mt.explain.causal_trace(model, PROMPT, subject=text)


def test_spans_are_found_in_text(model: mt.Model) -> None:
    tokens = model.to_tokens("Élodie café is 日本語 here, and café there")[0]
    words = model.to_words(tokens)
    for text in ("Élodie", "café", "日本語", "and café", "there"):
        first, end = mt.explain.span_of(model, tokens, text)
        whole = model.tokenizer.decode(tokens[first:end])
        assert text in whole
        assert text not in model.tokenizer.decode(tokens[first + 1 : end])
        assert text not in model.tokenizer.decode(tokens[first : end - 1])
    assert mt.explain.span_of(model, tokens, -1) == (len(words) - 1, len(words))
    assert mt.explain.span_of(model, tokens, (-3, -1)) == (len(words) - 3, len(words) - 1)


@pytest.mark.parametrize(
    ("prompt", "text", "words"),
    [
        ("The start of the art of war", "art", [" art"]),
        ("Parisian and Paris", "Paris", [" Paris"]),
        ("Parisians eat", "Paris", ["Paris"]),  # inside a word, and a token
    ],
)
def test_a_text_means_whole_words_where_it_can(model: mt.Model, prompt: str, text: str, words: list[str]) -> None:
    tokens = model.to_tokens(prompt)[0]
    first, end = mt.explain.span_of(model, tokens, text)
    assert model.to_words(tokens)[first:end] == words


def test_a_text_inside_a_token_alone_is_refused(model: mt.Model) -> None:
    with pytest.raises(mt.errors.PromptError, match=r'the prompt has "art" only inside longer words; got "The start"'):
        mt.explain.span_of(model, model.to_tokens("The start")[0], "art", "subject")


def test_an_answer_of_several_tokens_is_refused_with_how(model: mt.Model) -> None:
    with pytest.raises(mt.errors.PromptError, match=r'" Llanfair" is not one token; .* To do: .* metric=SpanLoss'):
        mt.explain.patch(model, PROMPT, PROMPT, answer=" Llanfair")
