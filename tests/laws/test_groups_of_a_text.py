"""Groups of a text: documents keep their borders, and a group of too few tokens is undecided."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.harvests import GROUPS, TEXTS, opened

import microtome as mt
from microtome.errors import DataError, MicrotomeWarning
from microtome.stream import Corpus

DOCUMENTS = [(text, group) for text, group in zip(TEXTS, GROUPS, strict=True) if len(text.split()) > 1]


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return opened(begins=True)


def alone(model: mt.Model, texts: list[str]) -> tuple[np.ndarray, float]:
    """The mean of every neuron and the loss, from a forward of each document by itself."""
    neurons, losses = [], []
    for text in texts:
        run = model.run(text, capture="*.mlp.post")
        neurons.append(torch.stack([run[f"{layer}.mlp.post"][0, 1:] for layer in range(3)], 1))
        targets = run.batch.tokens[0, 1:]
        losses.append(torch.nn.functional.cross_entropy(run.logits[0, :-1], targets, reduction="none"))
    return torch.cat(neurons).double().mean(0).numpy(), float(torch.cat(losses).double().mean())


def test_every_document_is_read_as_if_alone(model: mt.Model, tmp_path: Path) -> None:
    corpus = Corpus.of("t", [text for text, _ in DOCUMENTS], [group for _, group in DOCUMENTS])
    found = mt.measure(model, "activations", "loss", text=corpus, groups=True, length=64)
    assert list(found["group"].values) == ["a", "b", "c"]
    for group in "abc":
        mean, loss = alone(model, [text for text, own in DOCUMENTS if own == group])
        np.testing.assert_allclose(found["mean"].sel(group=group), mean, atol=1e-6)
        assert float(found["loss"].sel(group=group)) == pytest.approx(loss, abs=1e-5)
    for text, group in DOCUMENTS:  # a folder for each group
        (tmp_path / "texts" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / group / f"{len(list((tmp_path / 'texts' / group).iterdir()))}.txt").write_text(text)
    of_folder = mt.measure(model, "activations", text=tmp_path / "texts", groups=True, length=64)
    np.testing.assert_allclose(of_folder["mean"], found["mean"], atol=1e-9)


def test_a_group_of_too_few_tokens_is_not_a_number(model: mt.Model) -> None:
    text = {"long": TEXTS[2], "short": ["cat", "dog"], "wide": TEXTS[5]}
    with pytest.warns(MicrotomeWarning, match=r'^group "short" has no document of 2 tokens or more: nothing is known'):
        found = mt.measure(model, "activations", text=text, groups=True)
    assert np.isfinite(found["mean"].values[[0, 2]]).all()
    assert np.isnan(found["mean"].sel(group="short")).all()
    with (
        pytest.warns(MicrotomeWarning),
        pytest.raises(DataError, match="no group of the text has a document of 2 tokens or more; got a, b"),
    ):
        mt.measure(model, "activations", text={"a": ["cat"], "b": ["dog"]})
