"""What a component does for an answer: by itself, through what follows it, and what repairs its loss.

Formula:  u = centre(gain * (W_U[:, answer] - W_U[:, foil])) / scale, the final norm's scale held at the clean run's;
          d_r = (what r adds at the position) . u.   With component m ablated, every change being ablated minus clean:
          total      change of the logit (difference) that the model gives
          direct     change of d_m, with what follows held
          repair_r   change of d_r, for every r that comes after m
          norm       total - direct - sum_r repair_r: what the final norm, and a soft cap, make of it
          indirect   total - direct
          slope      of sum_r repair_r on direct, over examples: -1 is full self-repair, 0 none
          The change of the logit with the scale held is direct + sum_r repair_r, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from microtome.anatomy import Address, Site, parse
from microtome.change import means, resampled
from microtome.edit import Mean, Patch, SiteEdit, Zero
from microtome.errors import PromptError, SiteError, error
from microtome.explain._contributions import refuse_unless_sum
from microtome.explain._examples import Answers, Variables, answer_and_foil, summarised
from microtome.explain._pairs import aligned
from microtome.explain._patching import refuse_unknown
from microtome.model import Model
from microtome.run import Batch, Run
from microtome.stream import slope_interval

if TYPE_CHECKING:
    import xarray as xr

ABLATIONS = ("zero", "mean", "resample", "corrupt")
RECEIVERS = ("branches", "heads")
Prompts = Sequence[str] | Sequence[Sequence[int]] | Sequence[Tensor] | Tensor | Batch
BRANCHES = ("attn_out", "mlp_out")


def component_effects(
    model: Model,
    prompts: Prompts,
    *,
    answers: Answers,
    foils: Answers | None = None,
    components: Sequence[str] | str = "branches",
    receivers: str = "branches",
    ablation: str = "mean",
    corrupts: Prompts | None = None,
    text: Prompts | None = None,
    everywhere: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Total, direct and indirect effects of ablating heads or branches, and which later components make up for it.

    Formula:  see the head of this file.
    Source:   McGrath et al., "The Hydra Effect: Emergent Self-repair in Language Model Computations", 2023 (arXiv
              2307.15771). Departs: heads too; the mean is over the prompts unless a text is given; the effect of the
              norm is kept apart instead of being counted as indirect alone.
    Cost:     a component of layer l: (L - l)/L of a forward an example, in batches of one layer's components.
    Check:    direct and repairs sum to the change with the scale held; a cell equals its literal forward;
              tests/laws/test_effects.py.

    Args:
        model: an open model with a final norm.
        prompts: any lengths, unless resampled; the answer is read at the last position.
        answers: one token, or one an example.
        foils: explain the difference to the foil's logit.
        components: addresses such as "3.attn.z[2]", "3.attn_out", "3.mlp_out"; or all branches, or all heads and MLPs.
        receivers: whether attention repairs are told by layer or by head.
        ablation: put zeros, the mean, another prompt's value, or the corrupt prompt's value in place.
        corrupts: for "corrupt", one an example, aligned.
        text: for "mean", prompts to average over instead of `prompts`, at the ablated positions.
        everywhere: ablate at all positions instead of the last.
        seed: of resampling and intervals.
        progress: called with (done, all) layers of examples.

    Returns:
        Dataset in logits over `component` and `receiver`: `total`, `direct`, `indirect`, `norm` (component) and
        `repair` (component, receiver), means with `_lo`, `_hi` (95 % bootstrap over examples), `_p` (sign flips) and
        `_each` (example, ...); `total_control`, the mean total of the other heads of its layer, or for a branch of the
        same branch in other layers, as far as they are among the components (NaN where none is); `slope` with `_lo`
        and `_hi`; `clean` (example). Negative: the component helps the answer.

    Raises:
        PromptError: answers, foils or corrupt prompts do not fit the prompts.
        SiteError: a component is not a head or a branch, or the logits are not a sum over parts.
        DataError: there is nothing to resample from.
        EditError: there is no such ablation, or no such receivers.
    """
    refuse_unknown("ablation", ablation, ABLATIONS)
    refuse_unknown("receivers", receivers, RECEIVERS)
    refuse_unless_sum(model)
    rows = model.to_batch(prompts).rows
    named = _components(model, components, receivers)
    wanted, others = answer_and_foil(model, answers, foils, len(rows))
    values = _Values(model, rows, named, ablation, corrupts, text, "" if everywhere else "@-1", seed)
    found: list[dict[str, Tensor]] = []
    for i, row in enumerate(rows):
        with torch.no_grad():
            example = _Example(model, row, wanted[i], None if others is None else others[i], receivers)
            found.append(example.measure(named, values.edits(i)))
        if progress is not None:
            progress(i + 1, len(rows))
    stacked = {name: torch.stack([f[name] for f in found]).cpu() for name in found[0]}
    how = {"ablation": ablation, "positions": "all" if everywhere else "last", "seed": seed}
    data = _dataset(named, _receivers(model, receivers), stacked, seed)
    return data.assign_attrs(model.provenance | {"method": "component effects"} | how)


def _components(model: Model, components: Sequence[str] | str, receivers: str) -> list[Address]:
    """Heads and branches by address, each of one layer, in the order given."""
    if receivers == "heads" and any(part.attn_post_norm for part in model.anatomy.parts.layers):
        raise error(SiteError, "a norm stands behind the heads", do='use receivers="branches"')
    if isinstance(components, str) and components in RECEIVERS:
        components = _receivers(model, components)
    named: list[Address] = []
    for text in [components] if isinstance(components, str) else components:
        address = parse(text)
        head = address.name == "attn.z" and not address.units.is_all
        if not (head or (address.name in BRANCHES and address.units.is_all)) or "@" in text:
            raise error(
                SiteError,
                f'"{text}" is not a component',
                allowed='heads "3.attn.z[2]", branches "3.attn_out" and "3.mlp_out"',
                do="name one of these, without positions",
            )
        named += [address.at(site.layer) for site in model.anatomy.sites(address)]
    return named


def _receivers(model: Model, kind: str) -> list[str]:
    """The names of what can repair, layer by layer: two branches, or every head and the MLP."""
    n, heads = model.anatomy.n_layers, range(model.anatomy.n_heads)
    if kind == "branches":
        return [f"{i}.{branch}" for i in range(n) for branch in BRANCHES]
    return [name for i in range(n) for name in (*(f"{i}.attn.z[{h}]" for h in heads), f"{i}.mlp_out")]


class _Values:
    """What is put in place of each component in each example."""

    def __init__(
        self,
        model: Model,
        rows: list[Tensor],
        named: list[Address],
        ablation: str,
        corrupts: Prompts | None,
        text: Prompts | None,
        at: str,
        seed: int,
    ) -> None:
        self.ablation, self.at = ablation, at
        self.sources: list[Mapping[str, Tensor]] = [{}] * len(rows)
        sites = sorted({str(Site(a.name, _layer(a))) for a in named})
        if ablation == "mean":
            self.means = means(model, rows if text is None else text, [site + at for site in sites])
        elif ablation == "resample":
            drawn = resampled(model, rows, sites, seed=seed)
            self.sources = [{k: x[i : i + 1, : len(row)] for k, x in drawn.items()} for i, row in enumerate(rows)]
        elif ablation == "corrupt":
            if corrupts is None:
                raise error(PromptError, "there is nothing to ablate with", do="give corrupts=, one an example")
            others = model.to_batch(corrupts).rows
            if len(others) != len(rows):
                raise error(
                    PromptError, "there must be one corrupt prompt an example", got=len(others), allowed=len(rows)
                )
            pairs = [aligned(model, row, other)[1:] for row, other in zip(rows, others, strict=True)]
            runs = [model.run(other, capture=sites, logits=False) for other in pairs]
            self.sources = [{str(k): x for k, x in run.captured.items()} for run in runs]

    def edits(self, example: int) -> Callable[[Address], SiteEdit]:
        """The ablation of a component in one example."""

        def edit(address: Address) -> SiteEdit:
            site = f"{address}{self.at}"
            if self.ablation == "zero":
                return Zero(site)
            if self.ablation != "mean":
                return Patch(site, source=self.sources[example])
            mean = self.means[f"{Site(address.name, _layer(address))}{self.at}"]
            units = address.units.resolve(mean.shape[0])
            return Mean(site, mean=mean if address.units.is_all or units is None else mean[units])

        return edit


def _layer(address: Address) -> int:
    assert address.layers is not None
    assert address.layers.ranges is not None
    return address.layers.ranges[0][0]


class _Example:
    """One prompt: its clean run, and what ablations change at its last position."""

    def __init__(self, model: Model, row: Tensor, answer: int, foil: int | None, receivers: str) -> None:
        self.model, self.by_head = model, receivers == "heads"
        self.read = [answer] if foil is None else [answer, foil]
        self.tokens = row.unsqueeze(0)
        self.n = model.anatomy.n_layers
        base = model.run(self.tokens, capture=["*.resid_pre", "final.scale@-1", *self._read(0)], logits=False)
        self.streams = [base[f"{i}.resid_pre"] for i in range(self.n)]
        norm = model.final_norm
        assert norm is not None
        u = self._difference(model.W_U[:, self.read].double()).squeeze(-1)
        self.u = norm.centre(u * model.anatomy.logit_scale * norm.gain) / base["final.scale@-1"].double().reshape(())
        self.parts = [self._parts(base, i) for i in range(self.n)]
        self.clean = self._logit(base)[0]

    def _read(self, layer: int) -> list[str]:
        """What is captured of a run from a layer on."""
        names = ("attn_out", "mlp_out", "attn.z") if self.by_head else BRANCHES
        return [f"{layer}-{self.n - 1}.{name}@-1" for name in names] + [f"{self.n - 1}.resid_post@-1"]

    def _difference(self, logits: Tensor) -> Tensor:
        """[..., (answer, foil)] to answer minus foil, [..., 1]."""
        return logits if len(self.read) == 1 else logits[..., :1] - logits[..., 1:]

    def _logit(self, run: Run) -> Tensor:
        """The logit (difference) that the model gives, [row]."""
        logits = self.model.unembed(run[f"{self.n - 1}.resid_post@-1"][:, 0])
        return self._difference(logits[:, self.read]).squeeze(-1).double()

    def _parts(self, run: Run, layer: int) -> tuple[Tensor, Tensor]:
        """What a layer's branches add to the logit, [row, branch], and its receivers, [row, receiver]."""
        branches = torch.stack([run[f"{layer}.{name}@-1"][:, 0].double() @ self.u for name in BRANCHES], dim=1)
        if not self.by_head:
            return branches, branches
        read = torch.einsum("hdm,m->hd", self.model.layers[layer].W_O.double(), self.u)
        read = read * self.model.anatomy.hook_points[Site("attn_out", layer)].scale
        heads = (run[f"{layer}.attn.z@-1"][:, 0].double() * read).sum(-1)
        return branches, torch.cat([heads, branches[:, 1:]], dim=1)

    def measure(self, named: list[Address], edit: Callable[[Address], SiteEdit]) -> dict[str, Tensor]:
        """The effects of every component, layer by layer."""
        found: dict[int, dict[str, Tensor]] = {}
        for layer in sorted({_layer(a) for a in named}):
            numbers = [k for k, a in enumerate(named) if _layer(a) == layer]
            effects = self._ablate(layer, [edit(named[k]) for k in numbers])
            for i, k in enumerate(numbers):
                found[k] = {name: x[i] for name, x in effects.items()}
        return {name: torch.stack([found[k][name] for k in range(len(named))]) for name in found[0]} | {
            "clean": self.clean
        }

    def _ablate(self, layer: int, ablations: list[SiteEdit]) -> dict[str, Tensor]:
        """One run with a row an ablation, from the layer on: what comes before it is the clean run's."""
        n, edits = len(ablations), [replace(edit, rows=(row,)) for row, edit in enumerate(ablations)]
        tokens, stream = self.tokens.expand(n, -1), self.streams[layer].expand(n, -1, -1)
        run = self.model.run(tokens, self._read(layer), edits, start_at=layer, given=stream, logits=False)
        changes = [
            tuple(new - old for new, old in zip(self._parts(run, i), self.parts[i], strict=True))
            for i in range(layer, self.n)
        ]
        own = torch.tensor([int(edit.address.name == "mlp_out") for edit in ablations], device=run.tokens.device)
        direct = changes[0][0].gather(1, own.unsqueeze(1)).squeeze(1)
        width = changes[0][1].shape[1]
        mine = (torch.arange(width, device=own.device) == width - 1) == own.unsqueeze(1).bool()
        repair = torch.stack([torch.zeros_like(changes[0][1])] * layer + [c[1] for c in changes], dim=1)
        repair[:, layer] = repair[:, layer].masked_fill(mine, 0.0)
        total = self._logit(run) - self.clean
        return {"total": total, "direct": direct, "repair": repair.flatten(1)}


def _dataset(named: list[Address], receivers: list[str], found: dict[str, Tensor], seed: int) -> xr.Dataset:
    """The effects over examples, with intervals, the control, and the slope of repair on direct effect."""
    import xarray as xr

    total, direct, repair = found["total"], found["direct"], found["repair"]
    rest = {"indirect": total - direct, "norm": total - direct - repair.sum(-1)}
    variables: Variables = {}
    for name, x in {"total": total, "direct": direct, **rest}.items():
        variables |= summarised(name, x, ["component"], "logits", seed)
    variables |= summarised("repair", repair, ["component", "receiver"], "logits", seed)
    for end, x in zip(("", "_lo", "_hi"), slope_interval(direct, repair.sum(-1), seed=seed), strict=True):
        variables[f"slope{end}"] = ("component", x.numpy(), {"unit": "logits per logit"})
    kinds = [(a.name, _layer(a) if a.name == "attn.z" else None) for a in named]
    alike = torch.tensor([[float(a == b and i != j) for j, b in enumerate(kinds)] for i, a in enumerate(kinds)])
    control = alike.double() @ total.mean(0) / alike.double().sum(1)  # NaN where it has no like
    variables["total"][2]["control"] = "total_control"
    variables["total_control"] = ("component", control.numpy(), {"unit": "logits"})
    variables["clean"] = ("example", found["clean"].numpy(), {"unit": "logits"})
    coords = {"component": [str(a) for a in named], "receiver": receivers}
    return xr.Dataset(variables, coords=coords)  # pyright: ignore[reportArgumentType]
