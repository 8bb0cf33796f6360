"""A fitted probe: what it found at each layer, its scores, and the edits that its direction makes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from microtome.anatomy import parse
from microtome.edit import Add, Project, unshared
from microtome.errors import ArgumentError, DataError, EditError, error
from microtome.files import atomic
from microtome.method import Result
from microtome.model import Model
from microtome.probes._examples import Examples
from microtome.probes._readers import Reader, ahead_of_others
from microtome.probes._states import flat, placed, states_of
from microtome.shown import in_notebooks

FORMAT = 1


@in_notebooks
@dataclass(frozen=True, eq=False, repr=False)
class Probe:
    """A probe that was fitted at one or several sites and layers of a model: a value, to be saved and used.

    Attributes:
        kind: "linear", "sparse", "mass-mean", "mlp", "kan", "mdl", "concept", "ridge", "mix" or "preference".
        sites: the addresses that were probed, with their positions, one for each layer.
        classes: the names of the classes, in the order of `weight`.
        tensors: by "SITE/NAME": `weight` [class, width], `bias` [class] in the units of the site; of small networks
            their layers; `direction` [class, width], of length 1; `step` [class] how far a class's mean
            lies from that of the others along its direction.
        shapes: by site, the axes of a state; its width is their product.
        pool: which of several positions count.
        scores: the result that it was fitted with: scores, controls, intervals, provenance.
        by_row: whether rows named where they were probed, so that there is no one position to read or edit.
    """

    kind: str
    sites: tuple[str, ...]
    classes: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    pool: str
    scores: xr.Dataset
    by_row: bool = False

    def __repr__(self) -> str:
        of = f" of {', '.join(self.classes[:4])}{', ...' if len(self.classes) > 4 else ''}" if self.classes else ""
        return f"Probe({self.kind}{of} at {self._where()})"

    def _where(self) -> str:
        more = f" and {len(self.sites) - 1} more" if self.sites[1:] else ""
        return f"{self.sites[0]}{more}" if self.sites else "all layers together"

    def _facts(self) -> dict[str, str]:
        """What it was fitted to, and where."""
        found = {"kind": self.kind, "sites": self._where()}
        model = str(self.scores.attrs.get("model", "?"))
        return found | {"classes": ", ".join(self.classes[:8]) or "none", "model": model}

    def at(self, layer: int | None = None, site: str | None = None) -> str:
        """The address of one layer; of probes at several sites `site` names which, such as "mlp.post".

        Raises:
            ArgumentError: there is none, or several.
        """
        found = [name for name in self.sites if _matches(name, layer, site)]
        if len(found) != 1:
            got = f"layer {layer}" + (f", site {site}" if site else "")
            what = "no probe was fitted there" if not found else f"{len(found)} probes were fitted there"
            allowed = ", ".join(self.sites[:6]) + (", ..." if self.sites[6:] else "")
            raise error(
                ArgumentError, what, got=got, allowed=allowed, do="name a layer, and a site if there are several"
            )
        return found[0]

    def reader(self, layer: int | None = None, site: str | None = None) -> Reader:
        """The tensors of one layer, as a function of states."""
        name = self.at(layer, site)
        return Reader({k.removeprefix(f"{name}/"): x for k, x in self.tensors.items() if k.startswith(f"{name}/")})

    def direction(
        self, layer: int | None = None, label: str | None = None, *, site: str | None = None
    ) -> Float[Tensor, " width"]:
        """The direction, of length 1, along which states of a class lie from those of the others.

        Of means it is their difference, of a regression the covariance of states with its logit (Haufe et al., 2014),
        on the units that a sparse one reads, and of a concept its vector. `normal` gives the weights themselves.

        Args:
            layer: which.
            label: the class; of two the second by default, as of signals and preferences the only one.
            site: which, of probes at several sites.

        Raises:
            ArgumentError: it has none: a small network, or no such class.
        """
        return self._of("direction", layer, site)[self._number(label)]

    def normal(
        self, layer: int | None = None, label: str | None = None, *, site: str | None = None
    ) -> Float[Tensor, " width"]:
        """The weights of a class minus the mean of those of the others; see `direction` for the arguments and errors.

        A state's logit above the others' is its product with these, and an offset.
        """
        return ahead_of_others(self._of("weight", layer, site), self._number(label))

    def _of(self, name: str, layer: int | None, site: str | None) -> Tensor:
        held = self.reader(layer, site).tensors
        if name not in held:
            raise error(ArgumentError, f"a probe of the kind {self.kind} has no one direction", do='fit kind="linear"')
        return held[name]

    def edit(
        self,
        layer: int | None = None,
        label: str | None = None,
        *,
        strength: float = 1.0,
        ablate: bool = False,
        site: str | None = None,
        positions: str | None = None,
    ) -> Add | Project:
        """The edit that moves states along the direction, or takes it out.

        Args:
            layer: which.
            label: towards which class; see `direction`.
            strength: how far, in units of the way from the mean of the others to that of the class.
            ablate: project the direction out instead.
            site: which, of probes at several sites.
            positions: where, such as "-1" or "last"; those that were probed by default, and "*" for all.

        Raises:
            ArgumentError: see `direction`.
            EditError: the direction is over several heads, and cannot be projected out of each.
            ArgumentError: rows named where they were probed, and `positions` is not given.
        """
        name, vector = self.at(layer, site), self.direction(layer, label, site=site)
        shape = self.shapes[name]
        if positions is None:
            self.require_place('such as positions="-1", or "*" for all')
        place = name if positions is None else name.partition("@")[0] + ("" if positions == "*" else f"@{positions}")
        if not ablate:
            step = float(self.tensors[f"{name}/step"][self._number(label)])
            return Add(place, (step * vector).reshape(shape).float(), strength=strength)
        if math.prod(shape[:-1]) != 1:
            what = f"the direction at {name} is over {shape[0]} heads, and cannot be projected out of each"
            raise error(EditError, what, do="probe one head, such as *.attn.z[3]@-1, or the stream")
        return Project(place, basis=vector.float())

    def _number(self, label: str | None) -> int:
        if label is None and len(self.classes) > 2:
            raise error(
                ArgumentError, "which class is not said", allowed=", ".join(self.classes), do="name one: label="
            )
        if label is None:
            return 0 if self.kind == "ridge" else 1
        if label not in self.classes:
            raise error(ArgumentError, f'no class "{label}"', allowed=", ".join(self.classes) or "none", do="name one")
        return self.classes.index(label)

    def require_place(self, do: str) -> None:
        """Refuse to take the address's position for those that rows named.

        Raises:
            ArgumentError: rows named where they were probed.
        """
        if self.by_row:
            raise error(ArgumentError, "the probe was fitted where each row said: say where to use it", do=do)

    def logits(
        self,
        model: Model,
        texts: Sequence[Any],
        layer: int | None = None,
        *,
        site: str | None = None,
        positions: Sequence[int | str] | None = None,
    ) -> Float[Tensor, "row class"]:
        """What it says of texts, in nats of a class against others for logistic regressions.

        Args:
            model: that it was fitted to.
            texts: each a text, or token ids.
            layer: whose probe.
            site: which, of probes at several sites.
            positions: of each text a position or a span, as rows name them; by default those of the address.

        Raises:
            DataError: it was fitted to another model; or a text has no such position.
            ArgumentError: see `at`; the site of this model has another width; rows named where they were probed, and
                `positions` does not, or not one for each text.
        """
        name = self.at(layer, site)
        self.require(model, name)
        if positions is None:
            self.require_place("name a position or a span for each text: positions=[...]")
        elif len(positions) != len(texts) or isinstance(positions, str):
            got = f"{positions!r}" if isinstance(positions, str) else f"{len(positions)} for {len(texts)} texts"
            raise error(ArgumentError, "positions must name one place for each text", got=got, do="such as [-1, 3]")
        places = (None,) * len(texts) if positions is None else tuple(positions)
        where = tuple(f"text {i}" for i in range(len(texts)))
        given = tuple(text if isinstance(text, str) else tuple(text) for text in texts)
        read = Examples("texts", given, (), places=places, where=where)
        address = parse(name)
        at = placed(model, read, address, "mean" if self.pool == "mean" else "last")
        (x,) = flat(states_of(model, at, address)).values()
        reader = self.reader(layer, site)
        if not {"weight", "w1"} & reader.tensors.keys():
            raise error(ArgumentError, f"a probe of the kind {self.kind} reads pairs of texts", do="see its scores")
        if "share" in reader.tensors:
            raise error(ArgumentError, "a mixture reads all layers, not one", do='fit kind="linear" to read one')
        if "weight" in reader.tensors and reader.tensors["weight"].shape[1] != x.shape[1]:
            what = f"the probe at {name} reads states of several moments"
            raise error(
                ArgumentError, what, got=f"{reader.tensors['weight'].shape[1]} numbers", do="fit it without delays"
            )
        return reader.logits(x)

    def predict(
        self,
        model: Model,
        texts: Sequence[Any],
        layer: int | None = None,
        *,
        site: str | None = None,
        positions: Sequence[int | str] | None = None,
    ) -> list[str]:
        """The class that it names for each text; see `logits` for the arguments.

        Raises:
            ArgumentError, DataError: see `logits`; or it is of no classes.
        """
        if not self.classes:
            raise error(ArgumentError, f"a probe of the kind {self.kind} names no class", do="use logits")
        return [
            self.classes[i]
            for i in self.logits(model, texts, layer, site=site, positions=positions).argmax(-1).tolist()
        ]

    def require(self, model: Model, name: str | None = None) -> None:
        """Refuse a model that it was not fitted to, or a site of another width.

        Raises:
            ArgumentError: the site has another width.
            DataError: the model is another.
        """
        for one in self.sites if name is None else (name,):
            address = parse(one)
            site = model.anatomy.sites(address)[0]
            axes = site.spec.dims[2:]
            sizes = [model.anatomy.size(site, axis) for axis in axes]
            if axes and not address.units.is_all:
                sizes[0] = len(address.units.resolve(sizes[0]) or ())
            if math.prod(sizes) != math.prod(self.shapes[one]):
                what, allowed = f"the probe does not fit {site}", f"a site {math.prod(self.shapes[one])} wide"
                raise error(
                    ArgumentError, what, got=f"a width of {math.prod(sizes)}", allowed=allowed, do="fit it here"
                )
        own, known = model.provenance["fingerprint"], self.scores.attrs.get("fingerprint")
        if own != known:
            got = f"{model.anatomy.name} ({own})"
            allowed = f"{self.scores.attrs.get('model')} ({known})"
            raise error(DataError, "the probe is of another model", got=got, allowed=allowed, do="fit it to this one")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one safetensors file: its tensors, and its scores and provenance as JSON.

        Raises:
            OutputError: the file cannot be written.
        """
        about = {
            "format": FORMAT, "kind": self.kind, "sites": self.sites, "classes": self.classes, "pool": self.pool,
            "shapes": self.shapes, "by_row": self.by_row, "scores": _plain(self.scores.to_dict()),
        }  # fmt: skip
        with atomic(path, "the probe to") as partial:
            save_file(unshared(self.tensors), partial, metadata={"probe": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Model | None = None) -> Probe:
        """Read a probe that `save` wrote.

        Args:
            path: of the file.
            model: to use it with: the probe must be one of it.

        Raises:
            DataError: the file is missing or damaged, holds no probe, or one of another model.
            ArgumentError: a site of the model has another width.
        """
        try:
            with safe_open(str(path), "pt") as file:
                about = json.loads((file.metadata() or {})["probe"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            shapes = {name: tuple(shape) for name, shape in about["shapes"].items()}
            scores = Result.of(xr.Dataset.from_dict(about["scores"]))
            made = cls(
                about["kind"], tuple(about["sites"]), tuple(about["classes"]), tensors, shapes, about["pool"], scores,
                bool(about.get("by_row", False)),
            )  # fmt: skip
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as problem:
            got = f"no {problem}" if isinstance(problem, KeyError) else str(problem)
            raise error(DataError, f"cannot read a probe from {Path(path)}", got=got, do="save it again") from problem
        if model is not None:
            made.require(model)
        return made


def _matches(name: str, layer: int | None, site: str | None) -> bool:
    address = parse(name)
    own = None if address.layers is None or address.layers.ranges is None else address.layers.ranges[0][0]
    return (layer is None or own == layer) and (site is None or address.name == site)


def _plain(value: Any) -> Any:
    """Values as JSON takes them."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return value
