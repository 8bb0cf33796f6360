"""Neurons that add and neurons that remember: how concentrated their weights over the numbers are in frequency.

Formula:  row_s(n) = mean over the prompts with number n at place s of what enters a neuron's non-linearity at the last
          token, for each place s of the prompts that holds a number: of a network whose pre-activation is a sum over
          the places, its row of weights but for a constant. row_out(n) = what the neuron writes to the logit of n.
          share_k = the share of frequency k in a row (see `spectrum`);  IPR = sum_k share_k^2, its mean over the rows.
          One wave has 1; white noise over an odd number N of numbers 2 / (K + 1) on average, K = (N - 1) / 2.
          A neuron of which a row is constant has none. The neurons of the lowest IPR are set to zero at every token.
          Controls: the numbers in a random order; as many random neurons of those that have an IPR.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.edit import Edit, Zero
from microtome.errors import ArgumentError, PromptError, error
from microtome.explain._fourier import answers_of, directions_of
from microtome.explain._neuron_writes import directions
from microtome.explain._waves import Answers, Prompts, rows_of, spectrum, tokens_of_numbers
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.stream import mean_interval, share_interval

NEURON, PRUNED = ("layer", "neuron"), ("group", "share")
FLAT = 1e-4
"""A row whose standard deviation is below this share of the largest of its layer is constant."""


@question(
    "fourier_neurons",
    command="fourier-neurons",
    title="neurons as waves",
    question="Which neurons read and write numbers as one wave, and which of the answers need the others?",
    columns=(
        Column("ipr", "1", "inverse participation ratio of the frequencies of the neuron's rows", "shuffled_ipr",
               (0, 1), NEURON, title="concentration in frequency"),
        Column("shuffled_ipr", "1", "the same with the numbers in a random order", range=(0, 1), dims=NEURON),
        Column("top_frequency", "1", "the frequency of the largest share", "none: see ipr", (0, None), NEURON),
        Column("accuracy", "share", "how often the answer has the largest logit of the numbers",
               "none: what pruning takes away is beside it", (0, 1), ("group",)),
        Column("pruned_accuracy", "share", "the same without this share of the neurons, those of the lowest ratio",
               "random_accuracy", (0, 1), PRUNED, title="without neurons of low ratio"),
        Column("random_accuracy", "share", "the same without as many random neurons; the interval is over 8 sets "
               "or more", range=(0, 1), dims=PRUNED),
    ),
    source=Source(
        "Doshi et al.", "To grok or not to grok: Disentangling generalization and memorization on corrupted "
        "algorithmic datasets", 2023, "2310.13061", departs="rows are means of pre-activations, which are rows of "
        "weights where these are sums over the places; both phases of a frequency count as one",
    ),
    cost="one forward of each prompt, and of those with answers shares (1 + controls) more",
    check="tests/planted/test_grokking.py",
    call='mt.explain.fourier_neurons(model, "{0-9} + {0-9} = ", "0-9")',
    reading="ipr is 1 for a neuron of one wave; what falls without the neurons of the lowest ratio is what they "
    "remember.",
    needs=("next token", "lens", "mlp.post", "W_out"),
)  # fmt: skip
def fourier_neurons(
    model: Model,
    prompts: Prompts,
    numbers: Annotated[
        Sequence[str | int] | str,
        Argument('tokens of the numbers in their order, as "0-9" or "mon,tue,wed,thu"', positional=True),
    ],
    *,
    answers: Answers = None,
    groups: Annotated[
        Sequence[str] | None, Argument("for each prompt, the group that its accuracy counts in", command=False)
    ] = None,
    layers: Annotated[Sequence[int] | None, Argument("layers whose neurons are read; all by default")] = None,
    shares: Annotated[Sequence[float], Argument("shares of the neurons to leave out")] = (0.25, 0.5, 0.75),
    controls: Annotated[int, Argument("random sets of neurons", "sets", least=1)] = 5,
) -> Found:
    """Find neurons of one frequency, and leave out those without.

    Raises:
        ArgumentError: too few numbers, an answer that is none of them, no such layer or share.
        PromptError: prompts differ in length, or none of their places holds all of the numbers.
        SiteError: the stream cannot be read as logits.
    """
    ids, rows = tokens_of_numbers(model, numbers), rows_of(model, prompts)
    chosen = _chosen(model, layers)
    _require_shares(shares)
    at = _places(rows, ids)
    generator = torch.Generator().manual_seed(current().seed)
    order = torch.randperm(len(ids), generator=generator)
    batches = torch.stack(rows).split(64)
    sites = {i: next(s for s in ("mlp.gate", "mlp.pre") if Site(s, i) in model.anatomy.hook_points) for i in chosen}
    runs = [model.run(part, [f"{i}.{s}@-1" for i, s in sites.items()]) for part in batches]
    first = torch.cat([run.logits[:, -1, ids].argmax(-1) for run in runs]).cpu()
    shape = (model.anatomy.n_layers, model.anatomy.d_mlp)
    values = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name in ("ipr", "shuffled_ipr")}
    values["top_frequency"] = torch.full(shape, torch.nan, dtype=torch.float64)
    for i, site in sites.items():
        pre = torch.cat([run[f"{i}.{site}@-1"][:, 0] for run in runs]).double()
        table = _rows_of_neurons(model, i, pre, at, ids)
        found = _ratios(table)
        size = table.shape[1]
        values["ipr"][i, :size], values["top_frequency"][i, :size] = found
        values["shuffled_ipr"][i, :size] = _ratios(table[..., order.to(table.device)])[0]
    coords: dict[str, Any] = {"layer": list(range(shape[0]))}
    attrs = {"numbers": len(ids), "prompts": len(rows), "places": ", ".join(map(str, at))}
    if answers is not None:
        wanted = answers_of(model, answers, prompts, len(rows), ids)
        names, member = _groups(groups, len(rows))
        some = [(i, n) for i in chosen for n in range(shape[1]) if bool(values["ipr"][i, n].isfinite())]
        lowest = sorted(some, key=lambda unit: float(values["ipr"][unit]))
        after = _pruned(model, batches, ids, lowest, shares, controls, generator)
        right = {"accuracy": first, "pruned_accuracy": after[0], "random_accuracy": after[1]}
        for name, first_choice in right.items():
            values |= _shares_right(name, first_choice == wanted, member, len(names))
        coords |= {"group": names, "share": list(shares)}
    return Found(values, coords=coords, attrs=attrs)


def _shares_right(name: str, right: Tensor, member: Int[Tensor, " prompt"], groups: int) -> dict[str, Any]:
    """By group, the share of right answers [..., prompt] with its interval over prompts.

    Of sets [share, set, prompt] their mean, and its interval over sets, NaN where they are too few for one.
    """
    means = torch.stack([right.double()[..., member == g].mean(-1) for g in range(groups)])
    if right.dim() > 2:
        found = mean_interval(means.movedim(-1, 0))
        return {f"{name}{end}": (PRUNED, x.clamp(0, 1)) for end, x in zip(("", "_lo", "_hi"), found, strict=True)}
    counts = torch.tensor([int((member == g).sum()) for g in range(groups)])
    ends = torch.empty(2, *means.shape, dtype=torch.float64)
    for at in product(*map(range, means.shape)):
        low, high = share_interval(float(means[at] * counts[at[0]]), int(counts[at[0]]))
        ends[(0, *at)], ends[(1, *at)] = low, high
    dims = PRUNED if means.dim() > 1 else ("group",)
    return {name: (dims, means), f"{name}_lo": (dims, ends[0]), f"{name}_hi": (dims, ends[1])}


def _chosen(model: Model, layers: Sequence[int] | None) -> list[int]:
    """The layers whose neurons are read.

    Raises:
        ArgumentError: one does not exist or has no plain neurons, or there is none.
    """
    there = [i for i in range(model.anatomy.n_layers) if Site("mlp.post", i) in model.anatomy.hook_points]
    chosen = there if layers is None else list(layers)
    if not chosen or any(i not in there for i in chosen):
        allowed = ", ".join(map(str, there))
        raise error(ArgumentError, "no such layers of neurons", got=str(chosen), allowed=allowed, do="choose of these")
    return chosen


def _require_shares(shares: Any) -> None:
    """Refuse shares that are none.

    Raises:
        ArgumentError: they are no numbers between 0 and 1, or there is none.
    """
    listed = list(shares) if isinstance(shares, Sequence) and not isinstance(shares, str) else [None]
    if not listed or any(isinstance(x, bool) or not isinstance(x, int | float) or not 0 < x < 1 for x in listed):
        allowed = "numbers between 0 and 1, such as (0.5,)"
        raise error(ArgumentError, "these are no shares of the neurons", got=repr(shares), allowed=allowed)


def _places(rows: Sequence[Tensor], ids: Sequence[int]) -> dict[int, Int[Tensor, " prompt"]]:
    """By place at which the prompts hold all the numbers and nothing else, the number of each prompt there.

    Raises:
        PromptError: they differ in length, or there is no such place.
    """
    if len({len(row) for row in rows}) > 1:
        got = str(sorted({len(row) for row in rows}))
        raise error(PromptError, "prompts of several lengths have no places in common", got=got, do="take one length")
    tokens = torch.stack(list(rows)).cpu()
    axis = torch.tensor(list(ids))
    same = tokens.unsqueeze(-1) == axis  # [prompt, pos, number]
    whole = same.any(-1).all(0) & same.any(0).all(-1)
    if not bool(whole.any()):
        do = "let some place of the prompts take every number"
        raise error(PromptError, "no place of the prompts holds all of the numbers", got=f"{len(rows)} prompts", do=do)
    return {int(p): same[:, p].int().argmax(-1) for p in whole.nonzero().flatten()}


@torch.no_grad()
def _rows_of_neurons(
    model: Model, layer: int, pre: Float[Tensor, "prompt neuron"], at: dict[int, Tensor], ids: Sequence[int]
) -> Float[Tensor, "row neuron number"]:
    """What each number adds to a neuron, by the place where it stands; and what the neuron writes to its logit."""
    found: list[Tensor] = []
    for number in at.values():
        member = torch.nn.functional.one_hot(number, len(ids)).double().to(pre.device)
        found.append((pre.T @ member) / member.sum(0))
    return torch.stack([*found, directions(model, layer).double() @ directions_of(model, ids).T])


def _ratios(rows: Float[Tensor, "row neuron number"]) -> tuple[Float[Tensor, " neuron"], Float[Tensor, " neuron"]]:
    """The mean inverse participation ratio of a neuron's rows, and their frequency of the largest share."""
    spread = rows.std(-1)
    whole = (spread > FLAT * spread.amax(-1, keepdim=True)).all(0)
    share = spectrum(rows)
    ratio = share.square().sum(-1).mean(0)
    top = share.mean(0).argmax(-1).double() + 1
    none = torch.full_like(ratio, torch.nan)
    return torch.where(whole, ratio, none).cpu(), torch.where(whole, top, none).cpu()


def _groups(groups: Sequence[str] | None, prompts: int) -> tuple[list[str], Int[Tensor, " prompt"]]:
    """The names of the groups, and which one each prompt is of.

    Raises:
        ArgumentError: not one for each prompt.
    """
    named = ["all"] * prompts if groups is None else [str(name) for name in groups]
    if len(named) != prompts:
        raise error(ArgumentError, "there must be one group for each prompt", got=len(named), allowed=str(prompts))
    names = list(dict.fromkeys(named))
    return names, torch.tensor([names.index(name) for name in named])


def _pruned(
    model: Model,
    batches: Sequence[Tensor],
    ids: Sequence[int],
    lowest: Sequence[tuple[int, int]],
    shares: Sequence[float],
    controls: int,
    generator: torch.Generator,
) -> tuple[Int[Tensor, "share prompt"], Int[Tensor, "share set prompt"]]:
    """What the model says without the first neurons of a list, and without as many random ones of it."""
    report, total = current().counting("leaving neurons out"), len(shares) * (1 + controls)

    def choices(units: Sequence[tuple[int, int]]) -> Tensor:
        by_layer: dict[int, list[int]] = {}
        for layer, n in units:
            by_layer.setdefault(layer, []).append(n)
        edits: list[Edit] = [Zero(f"{i}.mlp.post[{','.join(map(str, sorted(n)))}]") for i, n in by_layer.items()]
        return torch.cat([model.run(part, edits=edits).logits[:, -1, list(ids)].argmax(-1) for part in batches]).cpu()

    own: list[Tensor] = []
    other: list[Tensor] = []
    for done, share in enumerate(shares):
        count = round(share * len(lowest))
        own.append(choices(lowest[:count]))
        drawn = [torch.randperm(len(lowest), generator=generator)[:count].tolist() for _ in range(controls)]
        other.append(torch.stack([choices([lowest[i] for i in some]) for some in drawn]))
        report((done + 1) * (1 + controls), total)
    return torch.stack(own), torch.stack(other)
