"""Many examples at once: their answers as tokens, and what is said of values that exist once an example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from microtome.errors import DataError, PromptError, error
from microtome.explain._answers import one_token
from microtome.model import Model
from microtome.stream import mean_interval, sign_flip
from microtome.sweep import SweepResult

if TYPE_CHECKING:
    import xarray as xr

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


def over_prompts(swept: SweepResult, *, seed: int = 0) -> xr.Dataset:
    """The effects of a sweep on average over its prompts, of which each has the same cells in the same order.

    Formula:  mean over prompts of values - base, cell by cell; 95 % bootstrap interval; p-value of sign flips.
    Source:   as `mean_interval` and `sign_flip`. Departs: none.
    Cost:     no forward.
    Check:    equal to both of these on the effects of each prompt; tests/laws/test_sweep.py.

    Args:
        swept: the result of a sweep over several prompts.
        seed: of the statistics.

    Returns:
        Dataset over (cell, ...): `effect`, `effect_lo`, `effect_hi`, `effect_p`; `effect_each` (example, cell, ...);
        in units of the metric. Prompts of which a stopped sweep did not reach every cell are left out.

    Raises:
        DataError: prompts have different numbers of cells, or none was reached whole.

    >>> swept = model.sweep(prompts, cells * len(prompts), metric, prompts=[i for i in range(5) for _ in cells])
    >>> over_prompts(swept)["effect_lo"]
    """
    import xarray as xr

    whose = torch.tensor(swept.prompts)
    each = [swept.effects[whose == prompt] for prompt in whose.unique()]
    if len({len(part) for part in each}) != 1:
        raise error(
            DataError,
            "the prompts of this sweep do not have the same cells",
            got=f"{sorted({len(part) for part in each})} cells",
            do="sweep as many cells of every prompt, in one order",
        )
    whole = [part for part in each if bool(part.isfinite().all())]
    if not whole:
        raise error(DataError, "no prompt of this sweep was measured to its end", do="let it run longer")
    dims = ["cell", *(f"value_{i}" for i in range(swept.effects.dim() - 1))]
    variables = summarised("effect", torch.stack(whole).double(), dims, "that of the metric", seed)
    return xr.Dataset(variables).assign_attrs(seed=seed, examples=len(whole))  # pyright: ignore[reportArgumentType]
