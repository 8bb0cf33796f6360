"""A task: pairs of prompts with known answers, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from microtome.errors import PromptError, error
from microtome.metric import Metric
from microtome.model import Model
from microtome.shown import in_notebooks
from microtome.stream import OF_MEANS, OF_SHARES
from microtome.tasks._pair import Pair
from microtome.tasks._score import metric_of, score

if TYPE_CHECKING:
    import xarray as xr


@in_notebooks
@dataclass(frozen=True)
class Task:
    """Pairs of prompts with known answers, aligned under one tokenizer.

    Attributes:
        name: as in `names`, or that of a file.
        about: what it asks, in a line.
        pairs: the pairs, in the order drawn.
        attrs: how they were made: seed, corruption, source, options; after `known_by` also by whom they are known.
        text: whether the prompts are texts; if not, they are ids, and `clean` and `corrupt` only show them.
    """

    name: str
    about: str
    pairs: tuple[Pair, ...]
    attrs: Mapping[str, Any]
    text: bool = True

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    @overload
    def __getitem__(self, at: int) -> Pair: ...
    @overload
    def __getitem__(self, at: slice) -> Task: ...
    def __getitem__(self, at: int | slice) -> Pair | Task:
        return replace(self, pairs=self.pairs[at]) if isinstance(at, slice) else self.pairs[at]

    def __repr__(self) -> str:
        return f"Task({self.name}: {len(self)} pairs, {self.about})"

    @property
    def clean_tokens(self) -> list[list[int]]:
        """Ids of the clean prompts: a prompt for `Model.run` and `Model.sweep`."""
        return [list(pair.clean_tokens) for pair in self.pairs]

    @property
    def corrupt_tokens(self) -> list[list[int]]:
        """Ids of the corrupt prompts, row by row as long as the clean ones."""
        return [list(pair.corrupt_tokens) for pair in self.pairs]

    def metric(self) -> Metric:
        """What to read at the last position of prompt i: the logit difference of the answer and the foil of pair i.

        Where a pair has several right or wrong tokens, the log-odds of the two sets, which is the logit difference
        where each holds one.

        >>> swept = model.sweep(task.corrupt_tokens, cells, task.metric(), prompts=pair_of_each_cell)
        """
        return metric_of(self._some)

    def accuracy(self, model: Model) -> xr.Dataset:
        """How often the model answers, by how much it prefers the answer, and the same after the corrupt prompt.

        Formula:  see the head of tasks/_score.py.
        Source:   logit difference as in Wang et al., 2022 (arXiv 2211.00593). Departs: of sets of tokens, the log-odds.
        Cost:     two forwards per pair, in batches of prompts of one length.
        Check:    equals answers read one prompt at a time; tests/unit/test_tasks_score.py.

        Args:
            model: a causal model with the tokenizer of the task.

        Returns:
            Dataset. By `example`: `top1_clean`, `top1_corrupt` (the likeliest token is an answer of the clean prompt),
            `predicted_clean`, `predicted_corrupt` (that token), `difference_clean`, `difference_corrupt` (logits,
            positive where the answer is preferred to the foil). As one number with `_lo` and `_hi`, 95 % intervals:
            `accuracy`; `accuracy_corrupt`, its control, how often the same answer comes without what should cause it;
            `preferred`, how often the answer beats the foil, and `preferred_corrupt` (all four by `share_interval`);
            `mean_difference_clean` and `mean_difference_corrupt` in logits (`mean_interval`); and each minus its
            control in the same pairs, `accuracy_diff`, `preferred_diff` (`share_difference_interval`) and
            `mean_difference_clean_diff`.

        Raises:
            ModelUnsupported: the model is not causal.
            PromptError: its tokenizer gives other tokens than the task holds, or there are no pairs.
        """
        data = score(model, self._some, self.text)
        said = {"method": "task accuracy", "interval": OF_MEANS, "interval_of_shares": OF_SHARES}
        return data.assign_attrs(model.provenance | self._attributes | said)

    def known_by(self, model: Model) -> Task:
        """The pairs whose clean prompt the model answers correctly, with the accuracy in `attrs`.

        Raises:
            PromptError: it answers none, or there is none.
        """
        data = score(model, self._some, self.text)
        kept = tuple(p for p, right in zip(self.pairs, data["top1_clean"].values, strict=True) if right)
        name = model.anatomy.name
        if not kept:
            got, do = f"0 of {len(self)} pairs", "choose a task that it does, as `microtome tasks` shows"
            raise error(PromptError, f'{name} knows no answer of the task "{self.name}"', got=got, do=do)
        attributes = {n: float(data[n]) for n in ("accuracy", "accuracy_lo", "accuracy_hi")}
        known = {"known_by": name, "fingerprint": model.fingerprint, "asked": len(self)} | attributes
        return replace(self, pairs=kept, attrs={**self.attrs, **known})

    def dataset(self) -> xr.Dataset:
        """The pairs as a table.

        Returns:
            Dataset over `example`: `clean`, `corrupt`, `answer`, `foil`, `group` (text), `length` (tokens), and for
            every span that all pairs have, `<name>_first` and `<name>_end` (positions).

        Raises:
            PromptError: there are no pairs.
        """
        import xarray as xr

        texts = ("clean", "corrupt", "answer", "foil", "group")
        values = {n: (np.array([getattr(p, n) for p in self.pairs], dtype=object), "text") for n in texts}
        values["length"] = (np.array([len(p.clean_tokens) for p in self.pairs]), "tokens")
        shared = [name for name in self._some[0].spans if all(name in p.spans for p in self.pairs)]
        for name in shared:
            for i, ending in enumerate(("first", "end")):
                values[f"{name}_{ending}"] = (np.array([p.spans[name][i] for p in self.pairs]), "position")
        data = xr.Dataset({n: ("example", v, {"unit": unit}) for n, (v, unit) in values.items()})
        return data.assign_attrs(self._attributes)

    @property
    def _some(self) -> tuple[Pair, ...]:
        """The pairs, where there are any: a slice may have left none."""
        if not self.pairs:
            raise error(PromptError, f'the task "{self.name}" has no pairs', do="keep at least one of them")
        return self.pairs

    @property
    def _attributes(self) -> dict[str, Any]:
        return {"task": self.name, "about": self.about, "pairs": len(self), **self.attrs}
