"""Batches go through a pass: here, or on the actors of a Ray cluster, whose accumulators are merged.

Formula:  parts of the batches, in their order, each through a pass of its own; what these keep is merged in that order.
Law:      the same as one pass here: exactly for counts and top-k, to 1e-12 of the scale for float64 statistics, and to
          the rounding of a forward where workers run other kernels.
Cost:     what a part keeps travels once; there are 32 parts at most.
Check:    tests/laws/test_cluster.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from microtome.cluster import Worker, spread
from microtome.context import current, settings
from microtome.method._look import Text
from microtome.method._measure import Measure
from microtome.method._parts import Parts
from microtome.method._pass import Bound, Pass
from microtome.method._registry import declared
from microtome.method._statistic import Kept
from microtome.model import Recipe
from microtome.stream import DocumentBatches, TokenBatch, TokenBatches

PARTS = 32
Report = Callable[[int, int], None]


def feed(made: Pass, batches: Sequence[TokenBatch] | TokenBatches | DocumentBatches, report: Report) -> Parts | None:
    """Let a pass see batches, all of them once.

    Args:
        made: the pass.
        batches: what it sees.
        report: called with how many it has seen, and how many there are.

    Returns:
        What a cluster has done, on disk: to be cleared when all of it is of no more use.

    Raises:
        ArgumentError: no cluster answers.
        ModelError: workers cannot open the model.
    """
    cluster, count = current().ray, len(batches)
    report(0, count)
    if cluster is None:
        for number in range(count):
            made.update(batches[number])
            report(number + 1, count)
        return None
    look = replace(made.look, text=None) if isinstance(made.look, Text) else made.look
    bound = [(one.measure.method.name, dict(one.arguments), one.layers, one.apart) for one in made.bound]
    recipe = Recipe.of(made.model, cluster.threads)
    start = (recipe, bound, look, made.groups, current().seed, current().budget)
    work = (recipe.fingerprint, str(recipe.dtype), bound, repr(look), made.groups, made.compared, current().seed)
    done = Parts(work, [type(one.statistic).__module__ for one in made.bound])
    each = -(-count // PARTS)
    parts = [range(first, min(first + each, count)) for first in range(0, count, each)]
    waiting: dict[int, list[dict[Any, Kept]]] = {}
    following = 0

    def missing() -> Iterator[tuple[int, tuple[list[TokenBatch]]]]:
        for number, part in enumerate(parts):
            given = [batches[i] for i in part]
            kept = done.read(number, given)
            if kept is None:
                yield number, (given,)
            else:
                waiting[number] = kept

    def take_in() -> None:
        nonlocal following
        while following in waiting:  # in the order of the text, so that sums are rounded alike each time
            _take_in(made, waiting.pop(following))
            following += 1
        report(sum(len(parts[i]) for i in (*range(following), *waiting)), count)

    for number, kept in spread(cluster, MeasureWorker, start, missing()):
        done.write(number, [batches[i] for i in parts[number]], kept)
        waiting[number] = kept
        take_in()
    take_in()
    return done


def _take_in(made: Pass, kept: Sequence[dict[Any, Kept]]) -> None:
    """Merge what one part has kept."""
    for mine, theirs in zip(made.bound, kept, strict=True):
        for key, found in theirs.items():
            own = mine.kept.setdefault(key, {})
            for name, accumulator in found.items():
                own[name] = own[name].merge(accumulator) if name in own else accumulator


class MeasureWorker(Worker):
    """Lets a pass see parts of the batches."""

    def start(
        self,
        recipe: Recipe,
        bound: Sequence[tuple[str, dict[str, Any], list[int | None], bool]],
        look: Any,
        groups: Sequence[str] | None,
        seed: int,
        budget: int | None,
    ) -> None:
        """Open the model, and prepare the measures."""
        made: list[Bound] = []
        for name, arguments, layers, apart in bound:
            measure = declared(name)
            assert isinstance(measure, Measure)
            own = {p.name: arguments[p.name] for p in measure.parameters if p.name in arguments}
            made.append(Bound(measure, measure.statistic(own), layers, arguments, apart=apart))
        self._settings: dict[str, Any] = {"seed": seed, "budget": budget, "progress": None}
        with settings(**self._settings):
            self._pass = Pass(recipe.open(), made, look, groups)

    def work(self, batches: Sequence[TokenBatch]) -> list[dict[Any, Kept]]:
        """What is kept of some batches, by measure."""
        with settings(**self._settings):
            for one in self._pass.bound:
                one.kept = {}
            for batch in batches:
                self._pass.update(batch)
        # Copies lie on the host, wherever the model is.
        return [{key: _copied(kept) for key, kept in one.kept.items()} for one in self._pass.bound]


def _copied(kept: Kept) -> Kept:
    return {name: accumulator.copy() for name, accumulator in kept.items()}
