"""What a component contributes to an answer, directly and through what follows it, and what repairs its loss.

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

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.anatomy import Address, Site, parse
from microtome.change import means, resampled
from microtome.context import current
from microtome.edit import Mean, Patch, SiteEdit, Zero
from microtome.errors import PromptError, SiteError, error
from microtome.explain._answers import answers_and_foils
from microtome.explain._contributions import refuse_unless_sum
from microtome.explain._pairs import AnswerOfClean, FoilOfCorrupt, Given, aligned, pairs_of, task_of
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.run import Prompt, Run, prompt_from_text
from microtome.stream import OF_SLOPES, slope_interval

ABLATIONS = ("zero", "mean", "resample", "corrupt")
RECEIVERS = ("branches", "heads")
BRANCHES = ("attn_out", "mlp_out")
EFFECTS = ("total", "direct", "indirect", "norm", "repair")
SIGN = "ablated minus clean, so that below 0 the component helps the answer"


def _effect(name: str, meaning: str, dims: tuple[str, ...] = ("component",), sign: str = SIGN) -> tuple[Column, Column]:
    """An effect, and its control: that of what is like the component."""
    meaning = f"change of the logit (difference) {meaning}; {sign}"
    control = f"mean {name} of the layer's other heads, or of the branch in other layers"
    return (
        Column(name, "logits", meaning, f"{name}_control", dims=dims, test=True),
        Column(f"{name}_control", "logits", control, dims=dims),
    )


@question(
    "component_effects",
    command="effects",
    title="component effects",
    question="How much does a component contribute to an answer directly, and what compensates for its loss?",
    columns=(
        *_effect("total", "when the component is ablated"),
        *_effect("direct", "through the component's own output, with what follows held fixed"),
        *_effect("indirect", "other than the direct effect: total - direct"),
        *_effect("norm", "due to the final norm and any soft cap on the logits"),
        *_effect("repair", "through a later component, the receiver", dims=("component", "receiver"),
                 sign="ablated minus clean, so that above 0 the receiver repairs what a helpful component did"),
        Column("slope", "logits per logit", "slope of the summed repairs on the direct effect, over examples",
               "none: 0 is no repair, -1 full repair", dims=("component",)),
        Column("clean", "logits", "the logit (difference) without ablation", "none: the baseline of the changes",
               dims=("example",)),
    ),
    source=Source(
        "McGrath et al.", "The Hydra Effect: Emergent Self-repair in Language Model Computations", 2023, "2307.15771",
        departs="heads too; the mean is over the prompts unless a text is given; the norm's effect is kept separate",
    ),
    cost="(L - l)/L of a forward per example and component of layer l, in batches of one layer's components",
    check="tests/laws/test_effects.py, tests/planted/test_causal.py",
    call='mt.explain.component_effects(model, ["The capital of France is"], answer=" Paris", foil=" Rome")',
    reading="Every effect is ablated minus clean: below 0, the component helps the answer; a repair above 0 "
    "compensates for its loss.",
    needs=("sum", "lens", "attention and MLP"),
)  # fmt: skip
def component_effects(
    model: Model,
    prompts: Annotated[
        Given,
        Argument("prompts, a task, or a .csv or .jsonl file of pairs", positional=True, from_text=prompt_from_text),
    ],
    *,
    answer: AnswerOfClean = None,
    foil: FoilOfCorrupt = None,
    components: Annotated[
        str | Sequence[str],
        Argument('addresses such as "3.attn.z[2]" or "*.mlp_out", or all "branches" or "heads"', from_text=str),
    ] = "branches",
    receivers: Annotated[str, Argument("split repair by branch or by head", choices=RECEIVERS)] = "branches",
    ablation: Annotated[str, Argument("what replaces a component", choices=ABLATIONS)] = "mean",
    corrupt: Annotated[
        Prompt | None,
        Argument(
            'for "corrupt", one aligned prompt per prompt; by default those of the task', from_text=prompt_from_text
        ),
    ] = None,
    text: Annotated[
        Prompt | None,
        Argument('for "mean", prompts to average over instead, at the ablated positions', from_text=prompt_from_text),
    ] = None,
    everywhere: Annotated[bool, Argument("ablate at all positions instead of the last")] = False,
) -> Found:
    """Total, direct and indirect effects of ablating heads or branches, and which later components compensate for them.

    The answer is read at the last position of each prompt; prompts may have any lengths, unless they are resampled.
    Controls are over the components that are measured, NaN where none of them is like this one.

    Raises:
        PromptError: answers, foils or corrupt prompts do not fit the prompts.
        SiteError: a component is not a head or a branch, or the logits are not a sum over parts.
        DataError: there is nothing to resample from.
    """
    refuse_unless_sum(model)
    rows, others, answers, foils = _examples(model, prompts, answer, foil, corrupt)
    named = _components(model, components, receivers)
    ablate = _ablations(model, rows, others, named, ablation, text, "" if everywhere else "@-1")
    found: list[dict[str, Tensor]] = []
    for i, row in enumerate(rows):
        with torch.no_grad():
            example = _Example(model, row, answers[i], None if foils is None else foils[i], receivers)
            found.append(example.measure([ablate(i, address) for address in named]))
        current().report("ablating", i + 1, len(rows))
    each = {name: torch.stack([f[name] for f in found]).cpu() for name in found[0]}
    clean, total, direct, repair = each.pop("clean"), each["total"], each["direct"], each["repair"]
    each |= {"indirect": total - direct, "norm": total - direct - repair.sum(-1)}
    each |= {f"{name}_control": _control(named, each[name]) for name in EFFECTS}
    slope = slope_interval(direct, repair.sum(-1))
    values = {f"slope{end}": (("component",), x) for end, x in zip(("", "_lo", "_hi"), slope, strict=True)}
    return Found(
        values | {"clean": clean},
        each=each,
        coords={"component": [str(a) for a in named], "receiver": _names(model, receivers)},
        attrs={"positions": "all" if everywhere else "last", "examples": len(rows), "interval_of_slope": OF_SLOPES}
        | {"metric": "logit of the answer" if foils is None else "logit difference", "sign": SIGN},
    )


def _examples(
    model: Model, prompts: Given, answer: Any, foil: Any, corrupt: Prompt | None
) -> tuple[list[Int[Tensor, " _"]], list[Int[Tensor, " _"]] | None, Sequence[int], Sequence[int] | None]:
    """The tokens of the prompts and of the corrupt ones, and the ids of answers and foils."""
    task = task_of(model, prompts)
    if task is not None:
        pairs = pairs_of(model, task, answer=answer, foil=foil)
        if not pairs.answer_ids:
            raise error(PromptError, "answers are one token each here", got="sets of tokens", do="use another task")
        others = pairs.start("denoise") if corrupt is None else model.to_batch(corrupt).rows
        return pairs.goal("denoise"), others, pairs.answer_ids, pairs.foil_ids or None
    rows: list[Tensor] = model.to_batch(prompts).rows  # pyright: ignore[reportArgumentType]
    if answer is None:
        raise error(PromptError, "there is nothing to read", do="give answer=")
    answers, foils = answers_and_foils(model, answer, foil, rows)
    return rows, None if corrupt is None else model.to_batch(corrupt).rows, answers, foils


def _components(model: Model, components: str | Sequence[str], receivers: str) -> list[Address]:
    """Heads and branches by address, each of one layer, in the order given."""
    if receivers == "heads" and any(part.attn_post_norm for part in model.anatomy.parts.layers):
        raise error(SiteError, "a norm follows the heads", do='use receivers="branches"')
    named: list[Address] = []
    listed = [components] if isinstance(components, str) else components
    for text in [one for name in listed for one in (_names(model, name) if name in RECEIVERS else [name])]:
        address = _component(text)
        named += [address.at(site.layer) for site in model.anatomy.sites(address)]
    return named


def _component(text: str) -> Address:
    """The address of a head or a branch, in one layer or in several."""
    try:
        address = parse(text)
        head = address.name == "attn.z" and not address.units.is_all
        fits = (head or (address.name in BRANCHES and address.units.is_all)) and "@" not in text
    except SiteError:  # which would name other sites
        address, fits = None, False
    if address is None or not fits:
        raise error(
            SiteError, f'"{text}" is not a component',
            allowed='heads "3.attn.z[2]", branches "3.attn_out" and "3.mlp_out", those of all layers "*.mlp_out", or '
            'the words "branches" and "heads"', do="name one of these, without positions",
        )  # fmt: skip
    return address


def _names(model: Model, kind: str) -> list[str]:
    """The components of a kind, layer by layer: two branches, or every head and the MLP."""
    n, heads = model.anatomy.n_layers, range(model.anatomy.n_heads)
    if kind == "branches":
        return [f"{i}.{branch}" for i in range(n) for branch in BRANCHES]
    return [name for i in range(n) for name in (*(f"{i}.attn.z[{h}]" for h in heads), f"{i}.mlp_out")]


def _ablations(
    model: Model,
    rows: list[Int[Tensor, " _"]],
    others: list[Int[Tensor, " _"]] | None,
    named: list[Address],
    ablation: str,
    text: Prompt | None,
    positions: str,
) -> Callable[[int, Address], SiteEdit]:
    """The edit that ablates a component in an example."""
    sites = sorted({_site(a) for a in named})
    if ablation == "zero":
        return lambda i, address: Zero(f"{address}{positions}")
    if ablation == "mean":
        mean_of = means(model, rows if text is None else text, [site + positions for site in sites])

        def mean(i: int, address: Address) -> SiteEdit:
            whole = mean_of[_site(address) + positions]
            units = None if address.units.is_all else address.units.resolve(whole.shape[0])
            return Mean(f"{address}{positions}", mean=whole if units is None else whole[units])

        return mean
    if ablation == "resample":
        drawn = resampled(model, rows, sites, seed=current().seed)
        sources = [{k: x[i : i + 1, : len(row)] for k, x in drawn.items()} for i, row in enumerate(rows)]
    else:
        sources = [{str(k): x for k, x in run.captured.items()} for run in _corrupt_runs(model, rows, others, sites)]
    return lambda i, address: Patch(f"{address}{positions}", source=sources[i])


def _corrupt_runs(
    model: Model, rows: list[Int[Tensor, " _"]], others: list[Int[Tensor, " _"]] | None, sites: list[str]
) -> list[Run]:
    """A run of the corrupt prompt of each example."""
    if others is None:
        raise error(PromptError, "there is nothing to ablate with", do="give corrupt=, one per prompt")
    if len(others) != len(rows):
        what = "there must be one corrupt prompt per prompt"
        raise error(PromptError, what, got=len(others), allowed=str(len(rows)), do="give as many of each")
    pairs = [aligned(model, row, other)[1:] for row, other in zip(rows, others, strict=True)]
    return [model.run(other, capture=sites, logits=False) for other in pairs]


def _site(address: Address) -> str:
    return str(Site(address.name, _layer(address)))


def _layer(address: Address) -> int:
    assert address.layers is not None
    assert address.layers.ranges is not None
    return address.layers.ranges[0][0]


class _Example:
    """One prompt: its clean run, and what ablations change at its last position."""

    def __init__(self, model: Model, row: Int[Tensor, " pos"], answer: int, foil: int | None, receivers: str) -> None:
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

    def _difference(self, logits: Float[Tensor, "at read"]) -> Float[Tensor, "at 1"]:
        """[..., (answer, foil)] to answer minus foil, [..., 1]."""
        return logits if len(self.read) == 1 else logits[..., :1] - logits[..., 1:]

    def _logit(self, run: Run) -> Float[Tensor, " row"]:
        """The logit (difference) that the model gives, [row]."""
        logits = self.model.unembed(run[f"{self.n - 1}.resid_post@-1"][:, 0])
        return self._difference(logits[:, self.read]).squeeze(-1).double()

    def _parts(self, run: Run, layer: int) -> tuple[Float[Tensor, "row branch"], Float[Tensor, "row receiver"]]:
        """What a layer's branches add to the logit, [row, branch], and its receivers, [row, receiver]."""
        branches = torch.stack([run[f"{layer}.{name}@-1"][:, 0].double() @ self.u for name in BRANCHES], dim=1)
        if not self.by_head:
            return branches, branches
        read = torch.einsum("hdm,m->hd", self.model.layers[layer].W_O.double(), self.u)
        read = read * self.model.anatomy.hook_points[Site("attn_out", layer)].scale
        heads = (run[f"{layer}.attn.z@-1"][:, 0].double() * read).sum(-1)
        return branches, torch.cat([heads, branches[:, 1:]], dim=1)

    def measure(self, edits: list[SiteEdit]) -> dict[str, Tensor]:
        """The effects of every ablation, in batches of those of one layer."""
        found: list[dict[str, Tensor]] = [{}] * len(edits)
        layers = [_layer(edit.address) for edit in edits]
        for layer in sorted(set(layers)):
            numbers = [k for k, own in enumerate(layers) if own == layer]
            effects = self._ablate(layer, [edits[k] for k in numbers])
            for i, k in enumerate(numbers):
                found[k] = {name: x[i] for name, x in effects.items()}
        return {name: torch.stack([f[name] for f in found]) for name in found[0]} | {"clean": self.clean}

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


def _control(named: list[Address], x: Float[Tensor, "example component ..."]) -> Float[Tensor, "example component ..."]:
    """The mean of what is like each component: the other heads of its layer, its branch in other layers."""
    kinds = [(a.name, _layer(a) if a.name == "attn.z" else None) for a in named]
    alike = torch.tensor([[float(a == b and i != j) for j, b in enumerate(kinds)] for i, a in enumerate(kinds)])
    share = alike.double() / alike.double().sum(1, keepdim=True)  # NaN where it has no like
    return torch.einsum("cd,ed...->ec...", share, x.double())
