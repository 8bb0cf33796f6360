"""A planted path tells which settings of activation patching recover it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from microtome import explain, planted
from microtome.errors import PromptError


@pytest.fixture(scope="module")
def it() -> planted.Planted:
    return planted.fact_memory()


def prompts(it: planted.Planted, pairs: int = 8) -> tuple[Any, Any, Any, Any]:
    """Pairs of subjects of one relation each, with different objects."""
    truth, found = it.truth, []
    for s in range(len(truth["subjects"]) - 1):
        a, b = truth["facts"][s][0], truth["facts"][s + 1][0]
        if a != b and len(found) < pairs:
            rows = [
                [truth["bos"], truth["subjects"][s + k], truth["fillers"][0], truth["relations"][0]] for k in (0, 1)
            ]
            found.append((*rows, a, b))
    clean, corrupt, answers, foils = (list(x) for x in zip(*found, strict=True))
    return clean, corrupt, answers, foils


def test_replaced_tokens_recover_the_planted_path_and_noise_does_not(it: planted.Planted) -> None:
    """The embeddings here hold a large constant, so that noise of their size puts the stream outside of what it is."""
    clean, corrupt, answers, foils = prompts(it, 4)
    data = explain.patching_grid(it.model, clean, corrupt, answer=answers, foil=foils, windows=(1, 2), samples=2)
    settings = data["setting"].values.tolist()
    assert len(settings) == 12
    for setting in settings:
        own = data["effect"].sel(setting=setting).to_numpy()
        if setting.startswith("noise"):
            assert own[0, 1] < 0.6, setting
            continue
        narrow = setting.endswith(", 1")
        assert own[0, 1] > 0.9, setting
        # A window of two around layer 1 holds layer 0 too, so that it points to a layer that does nothing.
        assert (abs(own[1, 1]) < 0.05) == narrow, setting
        assert abs(own[:, 2:]).max() < 0.05, setting
    agreement = data["agreement"].to_numpy()
    assert agreement.diagonal() == pytest.approx(1.0)
    assert agreement == pytest.approx(agreement.T)
    one = settings.index("replace, difference, 1")
    other = settings.index("replace, difference, 2")
    assert agreement[one, other] < 0.99


def test_a_grid_is_what_patching_gives(it: planted.Planted) -> None:
    clean, corrupt, answers, foils = (x[:1] for x in prompts(it))
    data = explain.patching_grid(it.model, clean, corrupt, answer=answers, foil=foils, corruptions=["replace"])
    own = data["effect"].sel(setting="replace, difference, 1").to_numpy()
    known = explain.patch(it.model, clean, corrupt, answer=answers, foil=foils, sites=["mlp_out"])["mlp_out"].to_numpy()
    assert own[:, 1:] == pytest.approx(known[:, 1:], abs=1e-4)


def test_what_a_grid_cannot_read_is_refused(it: planted.Planted) -> None:
    clean, corrupt, answers, _ = prompts(it)
    with pytest.raises(PromptError, match="needs a foil"):
        explain.patching_grid(it.model, clean, corrupt, answer=answers)


def test_traces_by_scenario_are_those_of_their_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of one fact is its causal trace; a label without facts is empty."""
    from tests import families, tokenizers

    import microtome as mt
    from microtome.tasks import Fact, _scenarios

    hf, tokenizer = families.build("llama-gqa"), tokenizers.build("bpe-bos")
    hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = mt.open(hf, tokenizer=tokenizer, prove=False)
    template = "The capital of {subject} is"
    said = model.to_words([int(model.run(template.replace("{subject}", "France")).logits[0, -1].argmax())])[0]
    fact = Fact("France", said.strip(), (template,))
    judged = _scenarios._judged  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(_scenarios, "_judged", lambda *a: judged(*a) | {"label": "recall"})
    found = explain.scenario_traces(model, [fact], samples=2)
    trace = explain.causal_trace(model, fact.prompt, subject="France", samples=2, window=10, kinds=("mlp", "attn"))
    at = int(torch.from_numpy(trace["subject"].values).nonzero()[-1])
    assert found["mlp_subject"].sel(label="recall").values == pytest.approx(trace["mlp"].values[:, at])
    assert found["attn_last"].sel(label="recall").values == pytest.approx(trace["attn"].values[:, -1])
    assert found["mlp_last"].sel(label="guess").isnull().all()
    assert found["facts"].values.tolist() == [0, 0, 1]
