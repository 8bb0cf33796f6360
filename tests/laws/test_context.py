"""Scores of sentences are divergences of plain runs, and sentences are cut where they end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import families

import microtome as mt
from microtome.explain._context import SENTENCE
from microtome.explain._divergence import jensen_shannon

PROMPT = [7, 20, 33, 41, 52, 60, 61, 62, 63]
PARTS = [(0, 3), (3, 5), (5, 7)]


def model(name: str = "llama-gqa") -> mt.Model:
    return mt.open(families.build(name), prove=False)


def test_scores_and_losses_are_those_of_plain_runs() -> None:
    it = model()
    data = mt.explain.context(it, PROMPT, sentences=PARTS, tokens=3, top=2)
    own = PROMPT
    for _ in range(3):
        own = [*own, int(it.run([own]).logits[0, -1].argmax())]
    answer = own[len(PROMPT) :]
    assert data.attrs["answer"] == " ".join(map(str, answer))

    def log_p(rest: list[int]) -> torch.Tensor:
        return it.run([[*rest, *answer[:-1]]]).logits[0, -3:].double().log_softmax(-1)

    whole, ids = log_p(PROMPT), torch.tensor(answer)[:, None]
    for i, (first, end) in enumerate(PARTS):
        without = log_p(PROMPT[:first] + PROMPT[end:])
        assert float(data["score"][i]) == pytest.approx(float(jensen_shannon(whole, without).sum()), abs=1e-6)
        assert float(data["loss"][i]) == pytest.approx(float((whole - without).gather(1, ids).sum()), abs=1e-5)
    assert float(data["log_probability"]) == pytest.approx(float(whole.gather(1, ids).sum()), abs=1e-5)
    assert (data["score_random"] > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2"])
def test_what_a_head_says_is_read_by_itself(name: str) -> None:
    it = model(name)
    data = mt.explain.context(it, PROMPT, answer=11, sentences=PARTS, top=2)
    first, end = PARTS[int(data["score"].values.argmax())]
    capture = ["1.attn.result@-1", "1.mlp_out@-1"]
    runs = [it.run([row], capture) for row in (PROMPT, PROMPT[:first] + PROMPT[end:])]
    said = [it.unembed(run["1.attn.result@-1"][0, 0]).log_softmax(-1) for run in runs]
    assert np.allclose(data["heads"][1], jensen_shannon(*said), atol=1e-5)
    mlp = [it.unembed(run["1.mlp_out@-1"][0, 0]).log_softmax(-1) for run in runs]
    assert float(data["mlps"][1]) == pytest.approx(float(jensen_shannon(*mlp)), abs=1e-5)
    best = [divmod(int(i), 4) for i in data["heads"].values.flatten().argsort()[::-1][:2]]
    edits = [mt.edit.Zero(f"{i}.attn.z[{h}]@-1") for i, h in best]
    a, b = (it.run([PROMPT], edits=e).logits[0, -1].log_softmax(-1)[11] for e in ((), edits))
    assert float(data["gated"]) == pytest.approx(float(b - a), abs=1e-5)


def test_sentences_end_where_they_end() -> None:
    text = "Mary lives in Paris. John, 3.5 years old, lives in Rome!\nWhere does John live? John lives in"
    assert [m.group() for m in SENTENCE.finditer(text)] == [
        "Mary lives in Paris.", "John, 3.5 years old, lives in Rome!", "Where does John live?", "John lives in",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"sentences": [(0, 3)]}, "there must be two sentences or more to leave out; got 1"),
        ({"sentences": None}, "there must be two sentences or more to leave out; got 0"),
        ({"sentences": [(0, 3), (2, 4)]}, "sentences overlap"),
        ({"sentences": [(0, 3), (3, 99)]}, "the prompt has no such sentence"),
    ],
)
def test_what_is_no_context_is_refused(given: dict[str, object], match: str) -> None:
    with pytest.raises(mt.errors.PromptError, match=match):
        mt.explain.context(model(), PROMPT, answer=11, **given)  # type: ignore[arg-type]
