"""Workers that open a model of their own, and make shards of a harvest with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from microtome.cluster import Worker
from microtome.model import Recipe
from microtome.stream._documents import Row
from microtome.stream._places import kept_of
from microtome.stream._records import Record
from microtome.stream._shard import Layout
from microtome.stream._store import store_of
from microtome.stream._writer import Writer


class HarvestWorker(Worker):
    """Makes shards."""

    def start(
        self,
        recipe: Recipe,
        layout: Layout,
        place: str,
        options: Mapping[str, Any] | None,
        batch: int,
        digest: str,
    ) -> None:
        """Open the model, and the place."""
        model = recipe.open()
        kept = kept_of(model.anatomy, list(layout.sites))
        self._writer = Writer(model, kept, layout, store_of(place, options), batch, digest)

    def work(self, number: int, rows: Sequence[Row]) -> Record:
        """Make one shard."""
        return self._writer.write(number, rows)
