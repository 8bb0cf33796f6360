"""Attention knock-out: what an answer loses when some positions can no longer read others, layer by layer.

Formula:  in the window of layers w(l) = max(0, l - w//2) .. min(L, l + ceil(w/2)) - 1, every head's score from q in the
          query span to k in the key span becomes -inf before the softmax;
          effect(l) = m(cut in w(l)) - m(whole), m the probability or log-probability of the answer.
          Control: as many keys, drawn at random among those that the queries can read and that are not cut, `controls`
          times; nothing where there are not enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from microtome.edit import KnockOut
from microtome.errors import EditError, PromptError, error
from microtome.explain._contributions import one_token
from microtome.explain._spans import Span, at, layers_at, one_row, span_of, window_of
from microtome.metric import LogProbability
from microtome.model import Model
from microtome.run import Prompt
from microtome.stream import mean_interval
from microtome.sweep import SweepPlan

if TYPE_CHECKING:
    import xarray as xr


def attention_knockout(
    model: Model,
    prompt: Prompt,
    *,
    queries: Span = -1,
    keys: Span,
    answer: str | int | None = None,
    window: int = 9,
    controls: int = 5,
    seed: int = 0,
    budget: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_plan: Callable[[SweepPlan], None] | None = None,
) -> xr.Dataset:
    """In which layers some positions must read others for the answer to come out.

    Formula:  see the head of this file.
    Source:   Geva et al., "Dissecting Recall of Factual Associations in Auto-Regressive Language Models", 2023 (arXiv
              2304.14767), section 5. Departs: a control of other keys; absolute changes, the relative one beside them.
    Cost:     one forward and a sweep of (1 + controls) x L cells.
    Check:    equals literal forwards; cutting keys after the queries changes nothing; tests/laws/test_knockout.py.

    Args:
        model: an open model whose attention scores can be seen.
        prompt: one prompt.
        queries: which positions can no longer read: a text in the prompt, a position, or (first, end).
        keys: what they can no longer read.
        answer: one token; the model's own answer by default.
        window: how many layers are cut at once; 9, as in the paper.
        controls: how many random sets of other keys.
        seed: of the controls and their interval.
        budget: bytes that one walk may hold.
        progress: called with (done, all) cells.
        on_plan: called with the plan of the sweep, before its first cell.

    Returns:
        Dataset over (layer), the middle of each window: `probability` and `log_probability` (nats), the change by the
        cut, and `relative`, the change of probability as a share of it; for each `_control`, the mean over the random
        keys, and `_control_lo`, `_control_hi`, its 95 % bootstrap interval (NaN where fewer than two sets exist);
        `clean` and `clean_log`, of the whole run. Negative: the answer needs what was cut.

    Raises:
        PromptError: a span is not in the prompt, or queries cannot read the keys anyway.
        SiteError: the model's attention scores are not seen.
        EditError: a number is too small; BudgetError: not even one cell fits.
    """
    _check(window, controls)
    tokens = one_row(model.to_batch(prompt).tokens)
    asked, cut = span_of(model, tokens, queries, "queries"), span_of(model, tokens, keys, "keys")
    _refuse_unread(model, asked, cut)
    own = int(model.run(tokens.unsqueeze(0)).logits[0, -1].argmax())
    token = own if answer is None else one_token(model, answer)
    sets = [list(range(*cut)), *_other_keys(model, asked, cut, len(tokens), controls, seed)]
    n = model.anatomy.n_layers
    windows = [layers_at(*window_of(i, window, n)) for i in range(n)]
    cells = [KnockOut(f"{w}.attn.scores{at(*asked)}", keys=",".join(map(str, s))) for s in sets for w in windows]
    if on_plan is not None:
        on_plan(model.sweep(tokens.unsqueeze(0), cells, LogProbability(token), budget=budget).plan)
    swept = model.sweep(tokens.unsqueeze(0), cells, LogProbability(token), budget=budget).run(progress)
    data = _dataset(swept.values.double().reshape(len(sets), n), float(swept.base[0]), seed)
    words = model.to_words(tokens)
    said = {
        "answer": model.to_words([token])[0],
        "known": int(token == own),
        "window": window,
        "controls": len(sets) - 1,
    }
    spans = {"queries": "".join(words[slice(*asked)]), "keys": "".join(words[slice(*cut)])}
    said |= {"metric": "probability of the answer", "reading": READING}
    return data.assign_attrs(model.provenance | {"method": "attention knock-out", "seed": seed} | said | spans)


READING = (
    "By how much the answer changes where the queries may not read the keys, in a window of layers around each layer; "
    "the control cuts random other keys. Below 0 the answer needs what was cut."
)


def _check(window: int, controls: int) -> None:
    if window < 1 or controls < 0:
        got = f"window {window}, controls {controls}"
        raise error(
            EditError, "a knock-out cannot take these", got=got, allowed="1 or more, and 0 or more", do="raise it"
        )


def _refuse_unread(model: Model, asked: tuple[int, int], cut: tuple[int, int]) -> None:
    if model.anatomy.causal and cut[0] >= asked[1]:
        raise error(
            PromptError,
            "the queries cannot read the keys anyway",
            got=f"queries {asked}, keys {cut}",
            allowed="keys before the last query",
            do="name queries that come later",
        )


def _other_keys(
    model: Model, asked: tuple[int, int], cut: tuple[int, int], length: int, controls: int, seed: int
) -> list[list[int]]:
    """Random sets of as many keys as are cut, among those that the first query can read but itself."""
    last = asked[0] if model.anatomy.causal else length
    free = [k for k in range(last) if not cut[0] <= k < cut[1] and not asked[0] <= k < asked[1]]
    size = cut[1] - cut[0]
    if len(free) < size:
        return []
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        tuple(sorted(free[i] for i in torch.randperm(len(free), generator=generator)[:size])) for _ in range(controls)
    }
    return [list(s) for s in sorted(drawn)]


def _dataset(values: Tensor, base: float, seed: int) -> xr.Dataset:
    """Changes [set, layer] of log-probability, and of probability, the first set the one that was asked for."""
    import xarray as xr

    whole = torch.tensor(base, dtype=torch.float64).exp()
    changes = {
        "probability": (values.exp() - whole, "probability"),
        "log_probability": (values - base, "nats"),
        "relative": (values.exp() / whole - 1, "share of the probability"),
    }
    variables: dict[str, object] = {}
    for name, (x, unit) in changes.items():
        variables[name] = ("layer", x[0].numpy(), {"unit": unit, "control": f"{name}_control"})
        control = mean_interval(x[1:], seed=seed) if len(x) > 1 else [torch.full_like(x[0], torch.nan)] * 3
        for suffix, y in zip(("_control", "_control_lo", "_control_hi"), control, strict=True):
            variables[name + suffix] = ("layer", y.numpy(), {"unit": unit})
    data = xr.Dataset(variables, coords={"layer": list(range(values.shape[1]))})  # pyright: ignore[reportArgumentType]
    return data.assign(clean=float(whole), clean_log=base)
