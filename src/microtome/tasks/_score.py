"""How well a model does a task, with its control and intervals.

Formula:  difference = log sum_{t in answers} exp z[t] - log sum_{t in foils} exp z[t], which is the log-odds of a right
          token against a wrong one, and with one answer and one foil the logit difference z[answer] - z[foil];
          top1 = whether the token with the highest logit is an answer.
Check:    with one of each it is `LogitDifference`; it is the difference of the log-probabilities of the two sets;
          tests/unit/test_tasks_score.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from microtome.errors import EditError, PromptError, error
from microtome.metric import LogitDifference, Metric, Vocabulary
from microtome.model import Model
from microtome.shown import shown
from microtome.stream import mean_interval, share_difference_interval, share_interval
from microtome.tasks._pair import Pair
from microtome.tasks._tokens import Ids, Tokens

if TYPE_CHECKING:
    import xarray as xr

AT_ONCE = 1024
"""Tokens per forward pass."""


@shown
@dataclass(frozen=True)
class LogOdds:
    """Log-odds of a set of answers against a set of foils, at the last position; sets may differ by prompt.

    Attributes:
        answers: one set of tokens per prompt, each an id or a text of one token.
        foils: likewise.
    """

    answers: Sequence[Sequence[int | str]]
    foils: Sequence[Sequence[int | str]]

    def __post_init__(self) -> None:
        if len(self.answers) != len(self.foils):
            got = f"{len(self.answers)} and {len(self.foils)} sets"
            raise error(
                EditError,
                "answers and foils differ in number",
                got=got,
                do="give one of each per prompt",
            )
        for right, wrong in zip(self.answers, self.foils, strict=True):
            for held in (right, wrong):
                if isinstance(held, str | int):
                    what, do = "answers and foils must be a set for each prompt", f"write [[{held!r}]] for one prompt"
                    raise error(EditError, what, got=repr(held), allowed="lists of tokens, ids or texts", do=do)
            if not right or not wrong or set(right) & set(wrong):
                got = f"{len(right)} answers, {len(wrong)} foils, {len(set(right) & set(wrong))} in both"
                raise error(EditError, "answers and foils must be two disjoint sets of tokens", got=got)

    def in_ids(self, vocabulary: Vocabulary) -> Metric:
        """The same sets with the ids of their tokens."""
        both = [[tuple(map(vocabulary.to_id, own)) for own in sets] for sets in (self.answers, self.foils)]
        return LogOdds(*both)

    def columns(self, prompt: int, length: int) -> list[int]:
        """The last column."""
        return [length - 1]

    def read(self, logits: Tensor, prompts: Tensor) -> Tensor:
        """[row], in logits."""
        needed = max(prompts.tolist(), default=-1) + 1
        if needed > len(self.answers):
            got = f"{len(self.answers)} for {needed} prompts"
            raise error(EditError, "fewer sets of tokens than prompts", got=got, do="give one set per prompt")
        if any(isinstance(t, str) for sets in (self.answers, self.foils) for own in sets for t in own):
            do = "give it to a sweep or a method, or call its in_ids(model)"
            raise error(EditError, "sets of texts must be read by a model's tokenizer first", do=do)
        rows = zip(logits[:, 0], prompts.tolist(), strict=True)
        return torch.stack([z[[*self.answers[p]]].logsumexp(0) - z[[*self.foils[p]]].logsumexp(0) for z, p in rows])


def metric_of(pairs: Sequence[Pair]) -> Metric:
    """The logit difference where each pair has one answer and one foil; else the log-odds of the sets."""
    answers, foils = [p.answer_ids for p in pairs], [p.foil_ids for p in pairs]
    if all(len(ids) == 1 for ids in (*answers, *foils)):
        return LogitDifference([ids[0] for ids in answers], foil=[ids[0] for ids in foils])
    return LogOdds(answers, foils)


def require_fit(model: Model, pairs: Sequence[Pair], text: bool) -> None:
    """Refuse a model without a next token, or whose tokenizer is not that of the pairs.

    Raises:
        ModelUnsupported: it is not causal.
        PromptError: its tokenizer gives other ids.
    """
    model.require_next_token()
    if not text or model.tokenizer is None:
        return
    tokens = Tokens.of(model)
    for number, pair in enumerate(pairs):
        if tokens.ids(pair.clean) != pair.clean_tokens:
            raise error(
                PromptError,
                f"the task was built with another tokenizer than that of {model.anatomy.name}",
                got=f"other tokens in pair {number}",
                do="build it again with this model",
            )


def last_logits(model: Model, rows: Sequence[Ids]) -> Tensor:
    """[example, vocab] float64 logits after each prompt; prompts of one length are run together."""
    found: dict[int, Tensor] = {}
    for length in sorted({len(row) for row in rows}):
        chosen = [i for i, row in enumerate(rows) if len(row) == length]
        step = max(1, AT_ONCE // length)
        for part in (chosen[i : i + step] for i in range(0, len(chosen), step)):
            logits = model.run([list(rows[i]) for i in part]).logits[:, -1].double()
            found |= dict(zip(part, logits, strict=True))
    return torch.stack([found[i] for i in range(len(rows))])


def score(model: Model, pairs: Sequence[Pair], text: bool) -> xr.Dataset:
    """What `Task.accuracy` returns, without its attributes."""
    import xarray as xr

    require_fit(model, pairs, text)
    metric, prompts = metric_of(pairs), torch.arange(len(pairs), device=model.device)
    values: dict[str, np.ndarray] = {}
    for name in ("clean", "corrupt"):
        logits = last_logits(model, [getattr(p, f"{name}_tokens") for p in pairs])
        best = logits.argmax(-1).tolist()
        values[f"top1_{name}"] = np.array([b in p.answer_ids for b, p in zip(best, pairs, strict=True)])
        values[f"predicted_{name}"] = np.array(model.to_words(best), dtype=object)
        values[f"difference_{name}"] = metric.read(logits.unsqueeze(1), prompts).cpu().numpy()
    units = {"difference": "logits", "top1": "bool", "predicted": "text"}
    data = xr.Dataset({n: ("example", v, {"unit": units[n.split("_")[0]]}) for n, v in values.items()})
    means = {
        "accuracy": (values["top1_clean"], values["top1_corrupt"]),
        "preferred": (values["difference_clean"] > 0, values["difference_corrupt"] > 0),
        "mean_difference": (values["difference_clean"], values["difference_corrupt"]),
    }
    for name, (clean, corrupt) in means.items():
        share = clean.dtype == bool
        own = name if share else f"{name}_clean"
        of = of_share if share else of_mean
        found = {own: of(clean), f"{name}_corrupt": of(corrupt)}
        found[f"{own}_diff"] = of_share_difference(clean, corrupt) if share else of_mean(clean - corrupt)
        for column, ends in found.items():
            attrs = {"unit": "share" if share else "logits"} | ({"control": f"{name}_corrupt"} if column == own else {})
            data = data.assign({column + end: ((), x, attrs) for end, x in zip(("", "_lo", "_hi"), ends, strict=True)})
    return data


def of_share(values: np.ndarray) -> tuple[float, float, float]:
    """A share of successes (boolean [example]), and the ends of its interval."""
    return float(values.mean()), *share_interval(int(values.sum()), len(values))


def of_share_difference(values: np.ndarray, control: np.ndarray) -> tuple[float, float, float]:
    """The difference of two shares of the same examples, and the ends of its interval."""
    gained, lost = int((values & ~control).sum()), int((control & ~values).sum())
    return float(values.mean() - control.mean()), *share_difference_interval(gained, lost, len(values))


def of_mean(values: np.ndarray) -> tuple[float, float, float]:
    """A mean over examples, and the ends of its interval."""
    mean, low, high = (float(x) for x in mean_interval(torch.from_numpy(values)))
    return mean, low, high
