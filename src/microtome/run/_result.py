"""The result of a run: logits and captured tensors, by address and with their axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from microtome.anatomy import Address, Anatomy, Site, parse
from microtome.edit import Selection, canonical
from microtome.errors import DataError, SiteError, error
from microtome.run._batch import Batch
from microtome.run._labelled import Captured, joined
from microtome.run._saved import SavedRun
from microtome.run._session import compact
from microtome.shown import brief, shown

if TYPE_CHECKING:
    import os

    import xarray as xr

    from microtome.run._core import LoadedModel


@dataclass(frozen=True)
class Words:
    """The texts of the tokens of one run, by id, for copies of it that have no tokenizer."""

    known: dict[int, str]

    @classmethod
    def of(cls, tokens: Tensor, words: Sequence[Sequence[str]]) -> Words:
        """The texts [batch][pos] of tokens [batch, pos]."""
        flat = (word for row in words for word in row)
        return cls(dict(zip(tokens.flatten().tolist(), flat, strict=True)))

    def __call__(self, tokens: Tensor) -> list[str]:
        return [self.known[i] for i in tokens.tolist()]


@shown
class Run:
    """One run of a model.

    Attributes:
        tokens: [batch, pos].
        mask: [batch, pos], True at real tokens.
        captured: the tensors that were asked for, by address, one layer each.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        batch: Batch,
        logits: Tensor | None,
        captured: Mapping[Address, Tensor],
        nodes: Mapping[Site, Tensor],
        to_words: Callable[[Tensor], list[str]],
        provenance: Mapping[str, Any],
    ) -> None:
        self.anatomy, self.batch, self.captured, self._to_words = anatomy, batch, dict(captured), to_words
        self.provenance = dict(provenance)
        self._logits, self._nodes = logits, dict(nodes)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy and a pickle hold: everything but the model and the graph, so that a copy has no gradients."""
        tensors = {address: compact(x.detach()) for address, x in self.captured.items()}
        logits = None if self._logits is None else compact(self._logits.detach())
        words = Words.of(self.tokens, self.words)
        return self.__dict__ | {"captured": tensors, "_logits": logits, "_nodes": {}, "_to_words": words}

    def _facts(self) -> dict[str, str]:
        """The prompts, the logits, and what was captured, sites of several layers together."""
        prompts = ["".join(self._to_words(row)) for row in self.batch.rows[:3]]
        more = f", … {len(self.tokens)} in all" if len(self.tokens) > len(prompts) else ""
        groups: dict[Address, list[Address]] = {}
        for address in self.captured:
            groups.setdefault(address.at(None), []).append(address)
        held = [
            f"{group[0] if len(group) == 1 else f'{name} of {len(group)} layers'} {list(self.captured[group[0]].shape)}"
            for name, group in groups.items()
        ]
        return {
            "tokens": f"{list(self.tokens.shape)} {brief(prompts)[1:-1]}{more}",
            "logits": "none" if self._logits is None else brief(self._logits),
            "captured": "; ".join(held) or "nothing",
        }

    def save(self, path: str | os.PathLike[str], *, logits: bool = True) -> None:
        """Write this run to one safetensors file: tensors in their own types, and tokens, texts, sizes and provenance.

        Captured tensors have their addresses as names. Gradients are not saved, and logits are if `logits` and they
        were computed. What stood at `path` is replaced when the new file is whole, and not before.
        Check: what is loaded is equal to the bit; tests/laws/test_engine_copies.py.

        Raises:
            OutputError: the file cannot be written.
        """
        held = self.__getstate__()
        words: Words = held["_to_words"]
        axes = {str(address): list(self.dims(address)) for address in self.captured}
        tensors = (held["_logits"] if logits else None, held["captured"])
        SavedRun(self.anatomy, self.batch, *tensors, words.known, self.provenance, axes).write(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: LoadedModel | None = None) -> Run:
        """Read a run that `save` wrote; no model is needed.

        Args:
            path: of the file.
            model: to use the run with, such as for `Patch`: the run must be one of it, and is put where it is.

        Raises:
            DataError: the file is missing or damaged, holds no run, or one of another model than the one given.
        """
        saved = SavedRun.read(path)
        if model is None:
            words = Words(dict(saved.words))
            return cls(saved.anatomy, saved.batch, saved.logits, saved.captured, {}, words, saved.provenance)
        own = model.provenance["fingerprint"]
        if saved.provenance["fingerprint"] != own:
            raise error(
                DataError,
                f"the run in {path} is of another model",
                got=f"{saved.provenance['model']} ({saved.provenance['fingerprint']})",
                allowed=f"{model.anatomy.name} ({own})",
                do="open its model, or load it without model=",
            )
        batch = Batch(saved.batch.tokens.to(model.device), saved.batch.lengths, saved.batch.pads)
        logits = None if saved.logits is None else saved.logits.to(model.device)
        captured = {address: x.to(model.device) for address, x in saved.captured.items()}
        return cls(model.anatomy, batch, logits, captured, {}, model.to_words, saved.provenance)

    @property
    def tokens(self) -> Tensor:
        """Token ids [batch, pos]."""
        return self.batch.tokens

    @property
    def mask(self) -> Tensor:
        """[batch, pos], True at real tokens."""
        return self.batch.mask

    @cached_property
    def words(self) -> list[list[str]]:
        """The text of every token `[batch][pos]`, or its number where there is no tokenizer."""
        return [self._to_words(row) for row in self.tokens]

    @property
    def logits(self) -> Tensor:
        """Logits [batch, pos, vocab].

        Raises:
            SiteError: the run was asked not to compute them.
        """
        if self._logits is None:
            raise error(SiteError, "this run has no logits", do="run without stop_at and with logits=True")
        return self._logits

    def __contains__(self, address: str) -> bool:
        try:
            self[address]
        except SiteError:
            return False
        return True

    def __getitem__(self, address: str | Address) -> Tensor:
        """The tensor of an address; several layers are stacked along a first axis, ``*`` those that were captured.

        Raises:
            SiteError: it was not captured; names what was.
        """
        parsed = parse(address)
        if parsed.name == "logits" and parsed not in self.captured and self._logits is not None:
            return self._cut(self._logits, Site("logits"), parsed)
        sites = self._sites(parsed)
        tensors = [self._one(site, parsed.at(site.layer)) for site in sites]
        one = parsed.layers is None or parsed.layers.is_one
        if not one and len({x.shape for x in tensors}) > 1:
            raise error(
                SiteError,
                f'the layers of "{address}" have other shapes than one another, so that they make no one tensor',
                got=", ".join(dict.fromkeys(str(list(x.shape)) for x in tensors)),
                do="look at one layer at a time, or at layers of one shape",
            )
        return tensors[0] if one else torch.stack(tensors)

    def _sites(self, address: Address) -> list[Site]:
        """The sites of an address; of every layer means of all that were captured, for a run may end early or skip."""
        sites = self.anatomy.sites(address)
        if address.layers is None or not address.layers.is_all:
            return sites
        held = [s for s in sites if not self.captured.keys().isdisjoint((address.at(s.layer), parse(str(s))))]
        return held or sites

    def _one(self, site: Site, address: Address) -> Tensor:
        if address in self.captured:
            return self.captured[address]
        whole = Address(address.name, address.layers)
        if whole in self.captured:
            return self._cut(self.captured[whole], site, address)
        held = ", ".join(str(a) for a in list(self.captured)[:8]) + (", ..." if len(self.captured) > 8 else "")
        raise error(
            SiteError,
            f'"{address}" was not captured',
            got=held or "nothing captured",
            do=f'run with capture="{address}"',
        )

    def whole(self, site: Site) -> Tensor:
        """All of one captured site."""
        return self._one(site, Address(site.name, parse(str(site)).layers))

    def _cut(self, x: Tensor, site: Site, address: Address) -> Tensor:
        if address.whole:
            return x
        full = canonical(x, site)
        units = None
        if not address.units.is_all:
            chosen = address.units.resolve(full.shape[2])
            if chosen is None:
                raise error(
                    SiteError,
                    f"no units [{address.units}] at {site}",
                    allowed=f"0 to {full.shape[2] - 1}",
                    do="choose units that exist",
                )
            units = torch.tensor(chosen, device=x.device)
        (frame,) = self.batch.frame.select(address.positions, None, full.shape[1], full.device)
        return canonical(Selection(site, units, frame).cut(full), site)

    def dims(self, address: str | Address) -> tuple[str, ...]:
        """The names of the axes of ``run[address]``."""
        parsed = parse(address)
        one = parsed.layers is None or parsed.layers.is_one
        return parsed.spec.dims if one else ("layer", *parsed.spec.dims)

    def dataset(self, *addresses: str) -> xr.Dataset:
        """Captured sites as an `xarray.Dataset`: one variable per site name, with its axes, coordinates and provenance.

        Args:
            addresses: what to include; everything captured by default.

        Returns:
            float32 copies on the CPU, NaN at pads. Layers are stacked; coordinates are layer numbers, unit numbers and
            positions, counted over the real tokens of a row: from the start where all rows agree in that, from the
            end (-1 is the last) where they agree only in that. `token` [batch, pos] holds the text of the tokens, and
            `mask` [batch, pos] is True at real ones. Captures that select differently along an axis have one each,
            the longest with the plain name: `layer`, `layer_2`, and `pos_2` with `token_2` and `mask_2`.
        """
        parts: dict[str, Captured] = {}
        for address in [parse(a) for a in addresses] or _grouped(self.captured):
            array, columns = self._array(address)
            array = array.squeeze("layer", drop=True) if address.layers is None else array
            name = address.name if address.name not in parts else str(address)
            parts[name] = Captured(array, address.spec.pos, columns)
        data, columns_of = joined(parts, self.provenance)
        for axis, columns in columns_of.items():
            number = axis.removeprefix("pos")
            if "batch" not in data.dims or axis not in data.dims or not axis.startswith("pos"):
                continue
            words, mask = self._told(columns)
            data = data.assign_coords(
                {f"token{number}": (("batch", axis), words), f"mask{number}": (("batch", axis), mask.numpy())}
            )
        return data

    def _told(self, columns: Tensor | None) -> tuple[list[list[str]], Tensor]:
        """The text of the tokens at columns [batch, n], empty at pads, and which of them are real."""
        tokens, mask = self.tokens.cpu(), self.mask.cpu()
        if columns is not None:
            tokens, mask = tokens.gather(1, columns.cpu()), mask.gather(1, columns.cpu())
        words = [
            [word if real else "" for word, real in zip(self._to_words(row), held.tolist(), strict=True)]
            for row, held in zip(tokens, mask, strict=True)
        ]
        return words, mask

    def _array(self, address: Address) -> tuple[xr.DataArray, Tensor | None]:
        """One variable of a dataset, and the columns [batch, n] that it holds (None for all)."""
        import xarray as xr

        sites, spec = self._sites(address), address.spec
        x = torch.stack([self._one(site, address.at(site.layer)) for site in sites]).detach().float().cpu()
        dims = ("layer", *spec.dims)
        coords: dict[str, Any] = {"layer": [-1 if s.layer is None else s.layer for s in sites]}
        if spec.unit != "batch":
            units = None if address.units.is_all else address.units.resolve(self.anatomy.units(sites[0]))
            coords[spec.unit] = units or list(range(x.shape[dims.index(spec.unit)]))
        columns = self.batch.frame.columns_of(address.positions, self.tokens.device)
        if columns is not None and torch.equal(
            columns, torch.arange(self.tokens.shape[1]).to(columns).expand(len(columns), -1)
        ):
            columns = None  # every column of the one row, by name
        whole = [dim for dim in dims if dim == "k_pos" or (dim == spec.pos and columns is None)]
        for dim in whole:
            coords[dim] = self._labels(None)
            if self.batch.padded:
                shape = [n if d in ("batch", dim) else 1 for d, n in zip(dims, x.shape, strict=True)]
                x = x.masked_fill(~self.mask.cpu().reshape(shape), float("nan"))
        if columns is not None:
            coords[spec.pos] = self._labels(columns)
        coords = {dim: labels for dim, labels in coords.items() if labels is not None}
        array = xr.DataArray(x.numpy(), dims=dims, coords=coords)
        array.attrs["address"], array.attrs["meaning"] = str(address), spec.meaning
        return array, columns

    def _labels(self, columns: Tensor | None) -> list[int] | None:
        """Positions of columns over the real tokens, from the start or else from the end; None where rows disagree."""
        frame = replace(self.batch.frame, columns=columns)
        device = self.tokens.device
        from_start = frame.positions(self.tokens.shape[1], device)
        for positions in (from_start, from_start - torch.tensor(self.batch.lengths, device=device).unsqueeze(1)):
            if bool((positions == positions[:1]).all()):
                return positions[0].tolist()
        return None

    def grad(self, of: Tensor) -> dict[str, Tensor]:
        """Gradients of a scalar with respect to every captured site of a run with `grad=True`.

        Args:
            of: a scalar computed from this run's logits or captures.

        Returns:
            Gradients by address, each with the axes of the site; zeros where `of` does not depend on it. The
            parameters of the model get no gradient.

        Raises:
            SiteError: the run keeps no gradients, or `of` is not one number computed from it.
        """
        if not self._nodes:
            raise error(SiteError, "this run keeps no gradients", do="run with grad=True and name what to capture")
        given: Any = of
        if not isinstance(given, Tensor) or given.numel() != 1 or not given.requires_grad:
            shape = f"shape {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise error(
                SiteError,
                "no gradient of this can be taken",
                got=shape if not isinstance(given, Tensor) or given.requires_grad else f"{shape} without a graph",
                allowed="a tensor of one number, computed from this run",
                do="sum it, or choose one of its numbers: run.grad(run.logits[0, -1, token])",
            )
        found = torch.autograd.grad(of, list(self._nodes.values()), retain_graph=True, materialize_grads=True)
        full = dict(zip(self._nodes, found, strict=True))
        wanted = [a for a in self.captured if Site(a.name, _layer(a)) in full]
        return {str(a): self._cut(full[Site(a.name, _layer(a))], Site(a.name, _layer(a)), a) for a in wanted}

    def vjp(self, gradients: Tensor, of: str, to: str) -> Tensor:
        """Gradients at one captured site drawn back to an earlier one, through what lies between the two and no more.

        Args:
            gradients: [n, ...], several gradients at once, each with the axes of the site `of`.
            of: a site that was captured whole in a run with ``grad=True``.
            to: another one, before it.

        Returns:
            [n, ...] each with the axes of the site `to`; zeros where `of` does not depend on it.

        Raises:
            SiteError: one of the two has no gradient, or the gradients do not fit.
        """
        return self.pull_back(gradients, of, [to])[to]

    def pull_back(self, gradients: Tensor, of: str, to: Sequence[str]) -> dict[str, Tensor]:
        """As `vjp`, to several earlier sites in one pass: by name, each with the gradient along all ways to it.

        Raises:
            SiteError: one of them has no gradient, or the gradients do not fit.
        """
        start, *ends = [self._node(name) for name in (of, *to)]
        if gradients.shape[1:] != start.shape:
            raise error(
                SiteError,
                f"gradients do not fit {of}",
                got=f"shape {list(gradients.shape)}",
                allowed=f"[n, {str(list(start.shape))[1:]}",
                do="give gradients whose last axes are those of the site",
            )
        # The other outputs only make sure of a gradient, of zeros, where `of` does not depend on a site.
        zeros = [torch.zeros(len(gradients), *x.shape, dtype=x.dtype, device=x.device) for x in ends]
        outputs, rows = [start, *(x.view_as(x) for x in ends)], [gradients, *zeros]
        found = torch.autograd.grad(outputs, ends, rows, retain_graph=True, is_grads_batched=True)
        return dict(zip(to, found, strict=True))

    def _node(self, name: str) -> Tensor:
        """The node of the graph at a site that was captured."""
        address = parse(name)
        node = self._nodes.get(Site(address.name, _layer(address)))
        if node is None:
            held = ", ".join(str(site) for site in list(self._nodes)[:8]) or "nothing"
            raise error(SiteError, f"no gradient reaches {name}", got=held, do=f'run with grad=True, "{name}" captured')
        return node


def _layer(address: Address) -> int | None:
    return None if address.layers is None or address.layers.ranges is None else address.layers.ranges[0][0]


def _grouped(captured: Mapping[Address, Tensor]) -> list[Address]:
    groups: dict[Address, list[int]] = {}
    for address in captured:
        groups.setdefault(address.at(None), []).append(-1 if _layer(address) is None else _layer(address) or 0)
    return [
        group if layers == [-1] else parse(f"{','.join(map(str, sorted(layers)))}.{group}")
        for group, layers in groups.items()
    ]
