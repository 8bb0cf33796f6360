"""Facts are sorted by why they are answered: each kind is planted in what a model says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import families, tokenizers

import microtome as mt
from microtome import tasks
from microtome.errors import ArgumentError, PromptError
from microtome.tasks import Fact

TEMPLATE = "The capital of {subject} is"


def spoken() -> mt.Model:
    """A tiny model with a tokenizer of words."""
    hf, tokenizer = families.build("llama-gqa"), tokenizers.build("bpe-bos")
    hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return mt.open(hf, tokenizer=tokenizer, prove=False)


def say(monkeypatch: pytest.MonkeyPatch, model: mt.Model, answers: dict[str, str]) -> None:
    """Let a model's last logits be those of the first answer whose key is in the prompt's text; else of " no"."""
    from microtome.tasks import _scenarios

    def logits(of: mt.Model, rows: list[Any]) -> torch.Tensor:
        found = torch.zeros(len(rows), of.anatomy.d_vocab, dtype=torch.float64)
        for row, ids in zip(found, rows, strict=True):
            text = of.to_text(list(ids))
            word = next((answer for key, answer in answers.items() if key in text), " no")
            row[of.codec.continuation(word)[0]] = 9.0  # pyright: ignore[reportOptionalMemberAccess]
        return found

    monkeypatch.setattr(_scenarios, "last_logits", logits)


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return spoken()


@pytest.mark.parametrize(
    ("answers", "subject", "answer", "label", "cue"),
    [
        ({"France": " one"}, "France", "one", "recall", None),
        ({"France": " two"}, "France", "one", "wrong", None),
        ({"known that": " two", "As every": " two", "France": " one"}, "France", "one", "guess", None),
        ({"is": " one"}, "France", "one", "heuristic", "cue_prompt"),
        ({"England": " one"}, "Bank of England", "one", "heuristic", "cue_name"),
        ({"one way": " one"}, "one way", "one", "heuristic", "cue_overlap"),
    ],
)
def test_each_scenario_is_told(
    monkeypatch: pytest.MonkeyPatch, model: mt.Model, answers: dict[str, str], subject: str, answer: str, label: str,
    cue: str | None,
) -> None:  # fmt: skip
    say(monkeypatch, model, answers)
    data = tasks.scenarios(model, [Fact(subject, answer, (TEMPLATE,))])
    assert data["label"].item() == label
    cues = {name for name in ("cue_prompt", "cue_name", "cue_overlap") if bool(data[name].item())}
    assert cue is None or cue in cues
    if label == "recall":
        assert not cues
    assert float(data["share"].sel(label_name=label)) == 1.0


def test_what_is_said_is_what_the_model_says(model: mt.Model) -> None:
    data = tasks.scenarios(
        model, [Fact("France", "Paris", (TEMPLATE,)), Fact("Peru", "Lima", (TEMPLATE, "{subject}:"))]
    )
    for prompt, said, chance in zip(
        data["prompt"].values, data["said"].values, data["probability"].values, strict=True
    ):
        last = model.run(prompt).logits[0, -1]
        assert model.to_words([int(last.argmax())])[0] == said
        assert float(last.double().softmax(-1).max()) == pytest.approx(float(chance))
    assert float(data["share"].sum()) == pytest.approx(1.0)


def test_facts_that_cannot_be_asked_are_refused(model: mt.Model) -> None:
    with pytest.raises(PromptError, match="there are no facts"):
        tasks.scenarios(model, [])
    with pytest.raises(ArgumentError, match="lacks the subject's place"):
        tasks.scenarios(model, [Fact("France", "Paris", ("The capital is",))])
    with pytest.raises(ArgumentError, match="agree must be a share"):
        tasks.scenarios(model, [Fact("France", "Paris", (TEMPLATE,))], agree=2.0)


def test_the_package_has_facts() -> None:
    own = Fact.own("capital")
    assert own[0].prompt.startswith("The capital of")
    assert len(own[0].paraphrases()) == 7
    assert len(Fact.own()) > len(own)


def test_the_prompt_that_is_judged_is_none_of_its_paraphrases(monkeypatch: pytest.MonkeyPatch, model: mt.Model) -> None:
    fact = Fact("France", "one", (TEMPLATE,))
    assert len(fact.paraphrases()) == 3
    assert fact.prompt not in fact.paraphrases()
    say(monkeypatch, model, {"known that": " two", "As every": " two", "France": " one"})
    assert float(tasks.scenarios(model, [fact])["consistent"].item()) == pytest.approx(1 / 3)
