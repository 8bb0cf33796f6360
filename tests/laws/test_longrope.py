"""LongRoPE turns all rows of a batch by the frequencies of its longest: each row is what it is alone, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import families, tokenizers
from torch import Tensor

import microtome as mt
from microtome.anatomy._rotary import RotarySwitch
from microtome.errors import PromptError

FIRST = 16
SHORT, LONG = [1.0, 1.1, 1.2, 1.3, 1.4], [1.0, 2.0, 4.0, 8.0, 16.0]


def phi3(long: list[float] = LONG) -> Any:
    from transformers import Phi3Config, Phi3ForCausalLM

    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": SHORT, "long_factor": long, "factor": 4.0,
        "original_max_position_embeddings": FIRST,
    }  # fmt: skip
    settings: dict[str, Any] = families._GQA | {"rope_parameters": rope, "original_max_position_embeddings": FIRST}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = Phi3ForCausalLM(Phi3Config(**settings)).eval()
        families._randomise(hf)
    return hf


def row(length: int) -> list[int]:
    return torch.randint(3, families.VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def alone(hf: Any, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return hf(input_ids=torch.tensor([tokens])).logits[0]


def test_the_model_itself_mixes_rows() -> None:
    """Else there would be nothing to refuse."""
    hf = phi3()
    short, long = row(8), row(30)
    with torch.no_grad():
        both = hf(input_ids=torch.tensor([short + [0] * 22, long])).logits
    assert float((both[0, :8] - alone(hf, short)).abs().max()) > 0.01
    torch.testing.assert_close(both[1], alone(hf, long), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [(8, 5, 16), (30, 20, 17), (40,), (3,)])
def test_rows_of_one_kind_are_what_they_are_alone(lengths: tuple[int, ...]) -> None:
    hf = phi3()
    model = mt.open(hf)
    prompts = [row(n) for n in lengths]
    for padding in ("left", "right"):
        run = model.run(prompts, padding=padding)  # type: ignore[arg-type]
        for logits, mask, prompt in zip(run.logits, run.mask, prompts, strict=True):
            torch.testing.assert_close(logits[mask], alone(hf, prompt), rtol=1e-4, atol=1e-5)


def test_rows_of_both_kinds_are_refused_wherever_they_meet() -> None:
    model = mt.open(phi3())
    prompts = [row(8), row(30)]
    text = (
        r"the rows of this batch would change each other: where one is longer than 16 tokens, Phi3ForCausalLM turns "
        r"all by other frequencies \(LongRoPE\); got rows of 8 to 30 tokens; allowed: all at most 16 long, or all "
        r"longer\. To do: run those of either kind by themselves\."
    )
    metric = mt.metric.LogitDifference(answer=5, foil=9)
    for run in (
        lambda: model.run(prompts),
        lambda: model.plan(prompts),
        lambda: model.sweep(prompts, [mt.edit.Zero("0.mlp_out")], metric),
        lambda: mt.explain.component_effects(model, prompts, answer=[5, 5], foil=[9, 9]),
    ):
        with pytest.raises(PromptError, match=text):
            run()


def test_a_generation_that_would_cross_with_one_row_only_is_refused() -> None:
    model = mt.open(phi3(), tokenizer=tokenizers.build("characters"))
    with pytest.raises(PromptError, match="rows of 3 to 8 tokens, and 12 new ones"):
        model.generate(["ABC", "ABCDEFGH"], max_new_tokens=12)
    assert len(model.generate(["ABC", "ABCDEFGH"], max_new_tokens=8)) == 2
    assert len(model.generate(["ABC", "ABD"], max_new_tokens=20)) == 2


def test_one_set_of_frequencies_switches_nothing() -> None:
    assert mt.open(phi3(SHORT)).anatomy.rotary_switch is None
    assert mt.open(phi3()).anatomy.rotary_switch == RotarySwitch(FIRST)
    assert mt.open(families.build("phi3")).anatomy.rotary_switch is None
