"""Activation patching: which parts carry what makes two prompts answered differently.

Formula:  effect(cell) = (m(cell) - m(start)) / (m(goal) - m(start)), where a cell is one run with one activation taken
          from the other prompt. Denoising starts at the corrupt prompt and takes from the clean one: 1 means that this
          part alone restores the clean answer. Noising starts at the clean prompt and takes from the corrupt one: 1
          means that without this part's clean value nothing of the answer is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from microtome.anatomy import Site
from microtome.edit import Patch
from microtome.errors import EditError, PromptError, SiteError, error
from microtome.explain._examples import answer_and_foil
from microtome.explain._spans import at
from microtome.metric import LogitDifference, LogProbability, Metric
from microtome.model import Model
from microtome.run import Prompt
from microtome.sweep import SweepPlan

if TYPE_CHECKING:
    import xarray as xr

DIRECTIONS = ("noise", "denoise")
BY_POSITION = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "attn.q", "attn.k", "attn.v", "attn.z")
BY_UNIT = ("attn.q[head]", "attn.k[head]", "attn.v[head]", "attn.z[head]", "attn.pattern[head]", "mlp.post[neuron]")


def activation_patching(
    model: Model,
    clean: Prompt,
    corrupt: Prompt,
    *,
    answer: str | int | None = None,
    foil: str | int | None = None,
    metric: Metric | None = None,
    sites: Sequence[str] = ("resid_pre", "attn_out", "mlp_out", "attn.z[head]"),
    direction: str = "denoise",
    budget: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_plan: Callable[[SweepPlan], None] | None = None,
) -> xr.Dataset:
    """Patch every layer and position (or head) between a clean and a corrupt prompt, exactly.

    Formula:  see the head of this file; m is the logit difference of answer and foil, or the answer's log-probability.
    Source:   causal mediation as in Meng et al., "Locating and Editing Factual Associations in GPT", 2022 (arXiv
              2202.05262), and Wang et al., 2022 (arXiv 2211.00593); both directions after Heimersheim and Nanda, "How
              to use and interpret activation patching", 2024 (arXiv 2404.15255). Departs: every cell is measured, none
              approximated.
    Cost:     two forwards and one sweep: a cell of layer l and position p costs (L - l)/L (T - p)/T of a forward.
    Check:    all of the stream gives exactly 1; a cell equals its literal forward; tests/laws/test_patching.py.

    Args:
        model: an open model.
        clean: the prompt with the answer.
        corrupt: the same number of tokens, with another answer.
        answer: the clean prompt's answer, one token.
        foil: the corrupt prompt's answer; without it the answer's log-probability is read.
        metric: what to read instead, such as `SpanLoss` for an answer of several tokens that ends both prompts.
        sites: site names, patched by layer and position; with ``[head]`` behind (``mlp.post[neuron]`` for neurons), by
            layer and unit at all positions.
        direction: "denoise" puts clean values into the corrupt run, "noise" the reverse.
        budget: bytes that one walk may hold.
        progress: called with (done, all) cells.
        on_plan: called with the plan of the sweep, before its first cell.

    Returns:
        Dataset of effects as shares of the gap between the two prompts: a variable a site, over (layer, pos) or (layer,
        unit); `clean` and `corrupt` hold the metric of the two prompts, in logits or nats.

    Raises:
        PromptError: the prompts do not align (the first difference and both lengths are named), answer or foil is not
            one token, or the foil is the answer.
        SiteError: there is no site, one cannot be patched this way, both prompts give the same metric, or it reads only
            what comes before they differ.
        EditError: there is no such direction; BudgetError: not even one cell fits.
    """
    refuse_wrong(direction, sites)
    tokens = aligned(model, clean, corrupt)
    start, goal = (tokens[1:], tokens[:1]) if direction == "denoise" else (tokens[:1], tokens[1:])
    own = {"metric": metric_words(foil) if metric is None else type(metric).__name__, "reading": READING[direction]}
    metric = answer_metric(model, answer, foil) if metric is None else metric
    refuse_blind(model, metric, tokens)
    layouts = {site: layout(model, site, every_position(tokens.shape[1])) for site in sites}
    source = model.run(goal, capture=sorted({part.capture for part in layouts.values()}))
    cells = [Patch(address, source=source) for layout in layouts.values() for address in layout.addresses]
    if on_plan is not None:
        on_plan(model.sweep(start, cells, metric, budget=budget).plan)
    swept = model.sweep(start, cells, metric, budget=budget).run(progress)
    last = source.logits[:, metric.columns(0, tokens.shape[1])]
    reached = float(metric.read(last, torch.zeros(1, dtype=torch.long, device=last.device))[0])
    began = float(swept.base[0])
    data = _dataset(layouts, swept.effects.double() / _gap(began, reached))
    data["clean"], data["corrupt"] = (reached, began) if direction == "denoise" else (began, reached)
    words = [model.to_words(row) for row in tokens]
    data = data.assign_coords(clean_token=("pos", words[0]), corrupt_token=("pos", words[1]))
    said = {k: _word(model, token) for k, token in (("answer", answer), ("foil", foil)) if token is not None}
    return data.assign_attrs(model.provenance | {"method": "activation patching", "direction": direction} | said | own)


READING = {
    "denoise": "Each cell is one run of the corrupt prompt with one activation taken from the clean run: 0 leaves the "
    "corrupt answer, 1 restores the clean one.",
    "noise": "Each cell is one run of the clean prompt with one activation taken from the corrupt run: 0 leaves the "
    "clean answer, 1 turns it into the corrupt one.",
}


def metric_words(foil: object) -> str:
    """What is read off each run, in words."""
    return "log-probability of the answer" if foil is None else "logit difference"


def _gap(began: float, reached: float) -> float:
    """The difference between the metrics of two prompts, where there is one."""
    if abs(reached - began) < 1e-4:  # less than rounding leaves of it
        raise error(
            SiteError,
            "both prompts give the same metric, so that there is no gap to explain",
            got=f"{began:.4g}",
            do="choose prompts that are answered differently",
        )
    return reached - began


def _word(model: Model, token: str | int) -> str:
    return token if isinstance(token, str) else model.to_words([token])[0]


def _dataset(layouts: dict[str, Layout], shares: Tensor) -> xr.Dataset:
    """The cells of all sites, cut apart and given their axes."""
    import xarray as xr

    variables: dict[str, tuple[tuple[str, str], object, dict[str, str]]] = {}
    parts = shares.split([len(layout.addresses) for layout in layouts.values()])
    for (site, layout), part in zip(layouts.items(), parts, strict=True):
        variables[site] = (layout.dims, part.reshape(layout.shape).double().numpy(), {"unit": "share of the gap"})
    data = xr.Dataset(variables)  # pyright: ignore[reportArgumentType]
    return data.assign_coords(layer=list(range(data.sizes["layer"])))


class Layout:
    """The addresses of a site's cells, the axes that they fill, and what to capture for them."""

    def __init__(self, name: str, addresses: list[str], dims: tuple[str, str], shape: tuple[int, int]) -> None:
        self.addresses, self.dims, self.shape, self.capture = addresses, dims, shape, f"*.{name}"


def every_position(length: int) -> list[tuple[int, int]]:
    """Each position of a prompt as a place (first, end) of its own."""
    return [(p, p + 1) for p in range(length)]


def layout(model: Model, site: str, places: Sequence[tuple[int, int]], axis: str = "pos", units_at: str = "") -> Layout:
    """The cells of a site: every layer by every place (first, end), or by every unit at some positions.

    Raises:
        SiteError: the site has no positions, no units, or is not in every layer.
    """
    name, by_unit = site.partition("[")[0], site.endswith("]")
    n = model.anatomy.n_layers
    if site not in (*BY_POSITION, *BY_UNIT):
        raise error(
            SiteError,
            f'cannot patch "{site}" by layer',
            allowed=", ".join((*BY_POSITION, *BY_UNIT)),
            do="name one of these",
        )
    absent = next((i for i in range(n) if Site(name, i) not in model.anatomy.hook_points), None)
    if absent is not None:
        raise error(SiteError, f"no {name} in layer {absent}", got=model.anatomy.missing.get(Site(name, absent)))
    if by_unit:
        units = model.anatomy.units(Site(name, 0))
        addresses = [f"{i}.{name}[{u}]{units_at}" for i in range(n) for u in range(units)]
        return Layout(name, addresses, ("layer", Site(name, 0).spec.unit), (n, units))
    addresses = [f"{i}.{name}{at(*place)}" for i in range(n) for place in places]
    return Layout(name, addresses, ("layer", axis), (n, len(places)))


def refuse_unknown(what: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a word that is none of those allowed.

    Raises:
        EditError: names the word and what is allowed.
    """
    if value not in allowed:
        raise error(EditError, f'no {what} "{value}"', allowed=", ".join(allowed), do="name one of these")


def refuse_wrong(direction: str, sites: Sequence[str] = BY_POSITION, seed: int = 0) -> None:
    """Refuse a direction that is none, an empty choice of sites, and a seed that no generator takes.

    Raises:
        EditError: there is no such direction, or no such seed.
        SiteError: there is no site.
    """
    refuse_unknown("direction", direction, DIRECTIONS)
    refuse_seed(seed)
    if not sites:
        raise error(
            SiteError,
            "there is no site to patch",
            got=repr(sites),
            allowed=", ".join((*BY_POSITION, *BY_UNIT)),
            do="name one of these, or leave sites= out",
        )


def refuse_seed(seed: int) -> None:
    """Refuse a seed that no generator takes.

    Raises:
        EditError: it is below 0.
    """
    if seed < 0:
        raise error(EditError, "there is no such seed", got=seed, allowed="0 or more", do="choose another")


def refuse_blind(model: Model, metric: Metric, tokens: Tensor, number: int | None = None) -> None:
    """Refuse a metric that no patch can reach: the prompts [2, pos] are one, or differ after what it reads of them.

    Raises:
        PromptError: there is nothing to patch.
        SiteError: it reads only what comes before they differ; says where.
    """
    differ = (tokens[0] != tokens[1]).nonzero().flatten().tolist()
    pair = "" if number is None else f"pair {number}: "
    if not differ:
        raise error(
            PromptError, f"{pair}the clean and the corrupt prompt are the same, so that there is nothing to patch",
            do="change what the answer depends on",
        )  # fmt: skip
    reads = metric.columns(number or 0, tokens.shape[1])
    if model.anatomy.causal and max(reads) < differ[0]:
        raise error(
            SiteError,
            f"{pair}the metric does not depend on what is patched, so that every effect would be 0",
            got=f"it reads positions {reads}, and the prompts differ from token {differ[0]} on",
            do="read a later position",
        )


def answer_metric(model: Model, answer: str | int | None, foil: str | int | None) -> Metric:
    """The logit difference of answer and foil at the last position, or without a foil the answer's log-probability.

    Raises:
        PromptError: there is no answer, one of them is not one token, or they are the same.
    """
    if answer is None:
        raise error(PromptError, "there is nothing to read", do="give answer= or metric=")
    answers, foils = answer_and_foil(model, answer, foil, 1)
    return LogProbability(answers[0]) if foils is None else LogitDifference(answers[0], foil=foils[0])


def aligned(model: Model, clean: Prompt, corrupt: Prompt) -> Tensor:
    """Tokens [2, pos] of two prompts of one length.

    Raises:
        PromptError: their lengths differ; names the first difference.
    """
    rows = [model.to_batch(p).tokens for p in (clean, corrupt)]
    if any(r.shape[0] != 1 for r in rows):
        raise error(PromptError, "patching takes one clean and one corrupt prompt", got=str([r.shape[0] for r in rows]))
    lengths = [r.shape[1] for r in rows]
    if lengths[0] != lengths[1]:
        words = [model.to_words(r[0]) for r in rows]
        at = next((i for i, (a, b) in enumerate(zip(*words, strict=False)) if a != b), min(lengths))
        there = [str(row[at : at + 3]) if row[at:] else "its end" for row in words]
        raise error(
            PromptError,
            f"the prompts do not align: they differ first at token {at}",
            got=f"{lengths[0]} and {lengths[1]} tokens, {there[0]} against {there[1]}",
            allowed="the same number of tokens",
            do="reword one so that every token has its counterpart",
        )
    return torch.cat(rows)
