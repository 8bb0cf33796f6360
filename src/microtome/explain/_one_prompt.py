"""What questions about one prompt and its answer share: how they are read, and how scores stand beside deletions."""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor

from microtome.errors import PromptError, error
from microtome.explain._answers import answers_and_foils, own_answer
from microtome.explain._pairs import SMALLEST_GAP as SMALLEST_GAP
from microtome.explain._spans import one_row
from microtome.explain._verify import rank_correlation
from microtome.metric import LogitDifference, LogProbability, Metric
from microtome.model import Model
from microtome.run import Prompt


def asked(
    model: Model, prompt: Prompt, answer: str | int | None, foil: str | int | None = None, position: int = -1
) -> tuple[Int[Tensor, " pos"], list[int], dict[str, Any]]:
    """The tokens of one prompt up to a position, the token that is read there and its foil, and what results say.

    Raises:
        PromptError: there are several prompts, or no such position; the answer is not one token, or the foil is it.
    """
    tokens = one_row(model.to_tokens(prompt))
    n = len(tokens)
    if not -n <= position < n:
        raise error(PromptError, f"no position {position}", allowed=f"{-n} to {n - 1}", do="name a token")
    tokens = tokens[: range(n)[position] + 1]
    token, attrs = own_answer(model, tokens, answer)
    if foil is None:
        return tokens, [token], attrs | {"metric": "log-probability of the answer"}
    _, foils = answers_and_foils(model, token, foil, [tokens])
    assert foils is not None
    return tokens, [token, *foils], attrs | {"metric": "logit difference", "foil": model.to_words(foils)[0]}


def reading(ids: list[int]) -> tuple[Metric, str]:
    """What is read of an answer, and its foil if there is one; and the unit."""
    if len(ids) == 1:
        return LogProbability(ids[0]), "nats"
    return LogitDifference(ids[0], foil=ids[1]), "logits"


def beside(scores: Tensor, effects: Tensor) -> float:
    """The rank correlation of scores and exact effects."""
    return rank_correlation(scores.detach().cpu().numpy(), effects.detach().cpu().numpy())
