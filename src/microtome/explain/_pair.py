"""A clean and a corrupt prompt, which of them is patched, and what is read: kept with scores, to check them by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from microtome.errors import DataError, error
from microtome.explain._answers import answer_metric
from microtome.metric import Metric
from microtome.model import Model
from microtome.run import Run

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True, eq=False)
class Pair:
    """One question to a model.

    Attributes:
        tokens: [2, pos], the clean prompt and the corrupt one.
        answer, foil: token ids; no foil, no difference.
        direction: "noise" starts at the clean prompt, "denoise" at the corrupt one.
    """

    tokens: Tensor
    answer: int
    foil: int | None
    direction: str

    @property
    def start(self) -> Tensor:
        """[1, pos] The prompt that is patched."""
        return self.tokens[:1] if self.direction == "noise" else self.tokens[1:]

    @property
    def goal(self) -> Tensor:
        """[1, pos] The prompt that values are taken from."""
        return self.tokens[1:] if self.direction == "noise" else self.tokens[:1]

    def metric(self, model: Model) -> Metric:
        """What is read."""
        return answer_metric(model, self.answer, self.foil)

    def read(self, model: Model, run: Run) -> Tensor:
        """The metric of a run of one of the prompts, a scalar."""
        metric = self.metric(model)
        logits = run.logits[:, metric.columns(0, self.tokens.shape[1])]
        return metric.read(logits, torch.zeros(1, dtype=torch.long, device=logits.device))[0]

    def attrs(self) -> dict[str, Any]:
        """What a result must record to be checked later."""
        clean, corrupt = self.tokens.tolist()
        ids = {"answer_id": self.answer} | ({} if self.foil is None else {"foil_id": self.foil})
        return {"clean_ids": clean, "corrupt_ids": corrupt, "direction": self.direction} | ids


def pair_of(model: Model, scores: xr.Dataset) -> Pair:
    """The pair that scores are about.

    Raises:
        DataError: the scores are of another model, or of no pair.
    """
    attrs = scores.attrs
    missing = [k for k in ("fingerprint", "clean_ids", "corrupt_ids", "direction", "answer_id") if k not in attrs]
    if missing:
        raise error(
            DataError,
            "these are not scores that can be checked",
            got=f"a dataset without {', '.join(missing)}",
            do="pass what `attribute` returned",
        )
    if attrs["fingerprint"] != model.fingerprint:
        raise error(
            DataError,
            "these scores come from another model",
            got=f"{attrs.get('model')} ({attrs['fingerprint']})",
            allowed=f"{model.anatomy.name} ({model.fingerprint})",
            do="open that model, or attribute again",
        )
    rows = [[int(i) for i in attrs[key]] for key in ("clean_ids", "corrupt_ids")]
    foil = attrs.get("foil_id")
    tokens = torch.tensor(rows, device=model.device)
    return Pair(tokens, int(attrs["answer_id"]), None if foil is None else int(foil), attrs["direction"])
