"""What a model holds of each example at a site: one vector a row and layer; and the same of an untrained model.

A row is probed at the positions that the example or else the address names; of several the last one counts, or their
mean. What two rows are up to there is what the probe can know of them: rows that are the same up to there are the same
example, and must not stand on both sides of a fold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from microtome.anatomy import ALL, Address, Site, parse_list
from microtome.context import current
from microtome.errors import DataError, SiteError, error
from microtome.explain import span_of
from microtome.model import Model
from microtome.probes._examples import Examples

TOKENS = 1024
"""Tokens, pads counted, that run at once."""
Pool = Literal["last", "mean"]


@dataclass(frozen=True, eq=False)
class Placed:
    """Examples as a model runs them.

    Attributes:
        rows: the token ids of each.
        columns: the positions of each that are probed.
        keys: by row, what tells it from others up to there.
        causal: whether what follows a position is unknown there.
    """

    rows: tuple[tuple[int, ...], ...]
    columns: tuple[tuple[int, ...], ...]
    keys: tuple[tuple[Any, ...], ...]
    causal: bool

    def prefix(self, row: int) -> tuple[int, ...]:
        """The tokens of a row that can be known where it is probed."""
        return self.rows[row][: self.columns[row][-1] + 1] if self.causal else self.rows[row]


def addresses(model: Model, site: str | Sequence[str]) -> list[Address]:
    """The sites to probe, each with all that is probed of it.

    Raises:
        SiteError: one cannot be read, is not there, is of pairs of positions; or they name different positions.
    """
    found = parse_list(site)
    if not found:
        raise error(SiteError, "no site to probe", do='name one, such as "*.resid_post@-1"')
    for address in found:
        if address.spec.pos != "pos":
            what = f'"{address}" is of pairs of positions, not of one'
            raise error(SiteError, what, do='name a site of single positions, such as "*.attn.z@-1"')
        if address.positions in ("prompt", "generated"):
            raise error(SiteError, f'"{address}" names tokens of a generation', do="name positions, such as @-1")
        model.anatomy.sites(address)
    if len({str(address.positions) for address in found}) > 1:
        got = ", ".join(map(str, found))
        raise error(
            SiteError, "all sites must be probed at the same positions", got=got, do="name one position for all"
        )
    return found


def sites_of(model: Model, address: Address) -> list[Site]:
    """The sites of an address, one a layer that has it."""
    return model.anatomy.sites(address)


def placed(model: Model, examples: Examples, address: Address, pool: Pool) -> Placed:
    """The tokens of each example, and where they are probed.

    Raises:
        PromptError: a text cannot be read, or has no such span.
        DataError: a position lies outside its text.
    """
    rows = [tuple(model.to_batch(text if isinstance(text, str) else list(text)).tokens[0].tolist())
            for text in examples.texts]  # fmt: skip
    columns = tuple(
        _columns(model, ids, text, place, address, pool, where)
        for ids, text, place, where in zip(rows, examples.texts, examples.places, examples.where, strict=True)
    )
    causal = model.anatomy.causal
    keys = tuple((ids[: at[-1] + 1] if causal else ids, at) for ids, at in zip(rows, columns, strict=True))
    return Placed(tuple(rows), columns, keys, causal)


def _columns(
    model: Model, ids: tuple[int, ...], text: Any, place: str | int | None, address: Address, pool: Pool, where: str
) -> tuple[int, ...]:
    n = len(ids)
    if isinstance(place, str):
        source = model.encodings(text)[0] if isinstance(text, str) else list(ids)
        found = list(range(*span_of(model, source, place)))
    elif place is not None or address.positions == "last":
        at = -1 if place is None else place
        found = [at + n if at < 0 else at] if -n <= at < n else None
    else:
        assert not isinstance(address.positions, str)
        found = address.positions.resolve(n)
    if not found:
        got = f"position {address.positions if place is None else place} of {n} tokens"
        raise error(DataError, f"{where}: there is nothing where it is probed", got=got, do="probe another position")
    return tuple(found) if pool == "mean" else (found[-1],)


def states_of(model: Model, at: Placed, address: Address, stage: str = "reading states") -> dict[Site, Tensor]:
    """What the model holds at a site: [row, ...] by layer, float32 on the CPU, of several positions the mean.

    Raises:
        SiteError: as `Model.run`.
        DataError: a value is not finite.
    """
    sites = sites_of(model, address)
    names = {site: replace(address, layers=None, positions=ALL).at(site.layer) for site in sites}
    last = all(columns == (len(ids) - 1,) for ids, columns in zip(at.rows, at.columns, strict=True))
    ends = {site: f"{name}@-1" if last else str(name) for site, name in names.items()}
    kept: dict[Site, Tensor] = {}
    done = 0
    for rows in batches(model, at.rows):
        run = model.run([list(at.rows[i]) for i in rows], capture=list(ends.values()), logits=False)
        for site, name in ends.items():
            x = run[name].detach().float().cpu()
            pooled = torch.stack([x[j][[0] if last else list(at.columns[i])].mean(0) for j, i in enumerate(rows)])
            if site not in kept:
                kept[site] = pooled.new_empty((len(at.rows), *pooled.shape[1:]))
            kept[site][rows] = pooled
        current().report(stage, done := done + len(rows), len(at.rows))
    for site, x in kept.items():
        if not bool(x.isfinite().all()):
            bad = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
            raise error(DataError, f"what {site} holds of row {bad} is not finite", do="leave the row or layer out")
    return kept


def batches(model: Model, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Numbers of rows that run at once, of much the same length; of one length where pads would change them."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    pads = "right" in model.anatomy.padding and model.anatomy.rotary_switch is None
    batch: list[int] = []
    for i in order:
        other = bool(batch) and not pads and len(rows[i]) != len(rows[batch[0]])
        if batch and (other or (len(batch) + 1) * len(rows[i]) > TOKENS):
            yield batch
            batch = []
        batch.append(i)
    yield batch


def flat(states: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    """States [row, width], in float64."""
    return {site: x.reshape(len(x), -1).double() for site, x in states.items()}
