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

from microtome.edit import Patch
from microtome.errors import EditError, SiteError, error
from microtome.explain._answers import answer_metric
from microtome.explain._layout import BY_POSITION, BY_UNIT, Layout, every_position, layout
from microtome.explain._pairs import aligned, require_effect_on_metric
from microtome.metric import Metric
from microtome.model import Model
from microtome.run import Prompt
from microtome.sweep import SweepPlan

if TYPE_CHECKING:
    import xarray as xr

DIRECTIONS = ("noise", "denoise")


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
    require_effect_on_metric(model, metric, tokens)
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
    parts = shares.split([len(part.addresses) for part in layouts.values()])
    for (site, part), x in zip(layouts.items(), parts, strict=True):
        variables[site] = (part.dims, x.reshape(part.shape).double().numpy(), {"unit": "share of the gap"})
    data = xr.Dataset(variables)  # pyright: ignore[reportArgumentType]
    return data.assign_coords(layer=list(range(data.sizes["layer"])))


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
