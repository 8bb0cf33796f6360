"""Many examples at once: their answers as tokens, and what is said of values that exist once an example."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from microtome.errors import PromptError, error
from microtome.explain._contributions import one_token
from microtome.run import Model
from microtome.stream import mean_interval, sign_flip

Answers = str | int | Sequence[str] | Sequence[int]
"""One token for all examples, or one an example: as text of one token, or as its id."""

Variables = dict[str, tuple[object, object, dict[str, str]]]
"""What `xarray.Dataset` takes: axes, values and attributes, by name."""


def answer_tokens(model: Model, answers: Answers, n: int, what: str = "answer") -> list[int]:
    """The token of each of n examples.

    Raises:
        PromptError: there are not as many as examples, or one is several tokens.
    """
    given = [answers] * n if isinstance(answers, str | int) else list(answers)
    if len(given) != n:
        raise error(PromptError, f"there must be one {what} an example", got=len(given), allowed=str(n))
    return [one_token(model, a) for a in given]


def answer_and_foil(
    model: Model, answers: Answers, foils: Answers | None, n: int
) -> tuple[list[int], list[int] | None]:
    """The tokens of the answers and of the foils of n examples.

    Raises:
        PromptError: not one an example, not one token, or a foil that equals its answer.
    """
    wanted = answer_tokens(model, answers, n)
    if foils is None:
        return wanted, None
    others = answer_tokens(model, foils, n, "foil")
    same = next((i for i, (a, f) in enumerate(zip(wanted, others, strict=True)) if a == f), None)
    if same is not None:
        raise error(
            PromptError,
            "the foil equals the answer" + (f" in example {same}" if n > 1 else ""),
            got=f'"{model.to_words([wanted[same]])[0]}"',
            do="choose another foil",
        )
    return wanted, others


def summarised(name: str, values: Tensor, dims: Sequence[str], unit: str, seed: int, *, test: bool = True) -> Variables:
    """Values [example, ...] as variables: `name`, their mean; `_lo`, `_hi`, `_p`, what is known of it; `_each`.

    The interval is a 95 % bootstrap interval over examples, `_p` the p-value of their sign flips.
    """
    mean, low, high = mean_interval(values, seed=seed)
    said: dict[str, Tensor] = {"": mean, "_lo": low, "_hi": high}
    if test:
        said["_p"] = sign_flip(values, seed=seed)
    units = {"unit": unit}
    variables: Variables = {
        name + end: (tuple(dims), x.cpu().numpy(), {"unit": "probability"} if end == "_p" else units)
        for end, x in said.items()
    }
    variables[f"{name}_each"] = (("example", *dims), values.double().cpu().numpy(), units)
    return variables
