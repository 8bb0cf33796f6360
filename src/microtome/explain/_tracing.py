"""Causal tracing: which states, when given back to a run that lost its subject, bring the answer back.

Formula:  corrupted run: embed[subject] + noise sigma n, n ~ N(0, 1), sigma the std of the subject's embeddings, drawn
          `samples` times; or the tokens of another prompt of the same length.
          effect(kind, l, p) = mean over samples of p(answer | state of l, p restored) - p(answer | corrupted), where
          resid restores resid_post of layer l at position p, and mlp and attn restore what that branch adds at p in
          the window of layers max(0, l - w//2) .. min(L, l + ceil(w/2)) - 1.

A restored run differs from the corrupted one only after the state that is restored. So a cell starts there, from the
corrupted stream, and nothing before it is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from microtome.edit import Edit, Noise, Patch, SiteEdit
from microtome.errors import EditError, PromptError, SiteError, error
from microtome.explain._answers import one_token
from microtome.explain._pairs import aligned
from microtome.explain._spans import Span, at, layers_at, one_row, span_of, window_of
from microtome.metric import Probability
from microtome.model import Model
from microtome.run import Prompt, Run
from microtome.stream import mean_interval
from microtome.sweep import SweepPlan

if TYPE_CHECKING:
    import xarray as xr

Kind = Literal["resid", "mlp", "attn"]
SITES: dict[str, str] = {"resid": "resid_post", "mlp": "mlp_out", "attn": "attn_out"}


def causal_trace(
    model: Model,
    prompt: Prompt,
    *,
    subject: Span,
    answer: str | int | None = None,
    corrupt: Prompt | None = None,
    window: int = 10,
    noise: float = 3.0,
    samples: int = 10,
    subjects: Sequence[str] = (),
    kinds: Sequence[Kind] = ("resid", "mlp", "attn"),
    seed: int = 0,
    budget: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_plan: Callable[[SweepPlan], None] | None = None,
) -> xr.Dataset:
    """Where a fact about a subject is held: the states that restore the answer after the subject is corrupted.

    Formula:  see the head of this file.
    Source:   Meng et al., "Locating and Editing Factual Associations in GPT", 2022 (arXiv 2202.05262), section 2; with
              `corrupt`, symmetric token replacement as in Zhang and Nanda, "Towards Best Practices of Activation
              Patching in Language Models", 2023 (arXiv 2309.16042). Departs: the noise's scale is that of this
              subject's embeddings unless `subjects` are given, and it is measured where the noise is added.
    Cost:     two forwards and a sweep of kinds x samples x L x (T - first) cells, each about half a forward.
    Check:    equals literal forwards; 0 before the subject and without noise; the whole stream gives the clean
              probability; tests/laws/test_tracing.py.

    Args:
        model: an open model.
        prompt: one prompt, which the model should answer.
        subject: its text, or its tokens (first, end).
        answer: one token; the model's own answer by default.
        corrupt: a prompt of as many tokens with another subject, used instead of noise.
        window: how many layers of a branch are restored at once.
        noise: the noise's standard deviation, in standard deviations of the embeddings.
        samples: how many noises.
        subjects: texts whose embeddings set the noise's scale; this subject alone by default.
        kinds: what to restore.
        seed: of the noise (each sample's own seed is drawn from it) and of the bootstrap.
        budget: bytes that one walk may hold.
        progress: called with (done, all) cells.
        on_plan: called with the plan of the sweep, before its first cell.

    Returns:
        Dataset of probabilities: a variable a kind (layer, pos) with `_lo` and `_hi`, the 95 % bootstrap interval over
        samples (NaN for one), and `_each` (example, layer, pos), by sample; `clean`; `corrupt` and `corrupt_each`.
        Positive: restoring helps. The attribute `known` says whether the answer is the model's own.

    Raises:
        PromptError: the subject is not in the prompt, the answer is not one token, or `corrupt` does not align.
        SiteError: a kind is unknown; EditError: a number is too small; BudgetError: not even one cell fits.
    """
    _check(kinds, window, samples, noise, seed)
    _check_subjects(model, subjects)
    rows = [model.to_batch(prompt).tokens] if corrupt is None else list(aligned(model, prompt, corrupt).split(1))
    span = span_of(model, one_row(rows[0]), subject, "subject")
    clean = model.run(rows[0], capture=[f"*.{SITES[kind]}" for kind in kinds])
    own = int(clean.logits[0, -1].argmax())
    token = own if answer is None else one_token(model, answer)
    std = noise * _spread(model, clean.tokens, span, subjects) if corrupt is None else 0.0
    broken = _noised(model, clean, span, std, samples, seed) if corrupt is None else _replaced(model, rows, span)
    data = _measure(model, clean, broken, Probability(token), _Plan(kinds, window, seed, budget, progress, on_plan))
    data["clean"] = float(clean.logits[0, -1].float().softmax(-1)[token])
    inside = [span[0] <= p < span[1] for p in range(clean.tokens.shape[1])]
    data = data.assign_coords(token=("pos", model.to_words(clean.tokens[0])), subject=("pos", inside))
    said = {"answer": model.to_words([token])[0], "known": int(token == own), "window": window, "seed": seed}
    noised = {"noise": noise, "std": std, "samples": samples}
    how = noised if corrupt is None else {"replaced": "".join(model.to_words(rows[1][0]))}
    return data.assign_attrs(model.provenance | {"method": "causal tracing"} | _read(window) | said | how)


def _read(window: int) -> dict[str, str]:
    """What is read off each run, and how a cell is to be read."""
    branches = f" Branches are given back over {window} layers at once." if window > 1 else ""
    return {"metric": "probability of the answer", "reading": READING + branches}


READING = (
    "Each cell is the run whose subject is corrupted, with one state given back as the clean run had it: by how much "
    "that raises the probability of the answer."
)


@dataclass(frozen=True)
class _Broken:
    """The corrupted run.

    Attributes:
        tokens: [1, pos] what the sweep starts from.
        first: the first position that may differ from the clean run.
        logits: [sample, vocab] at the last position.
        streams: what entered and left every layer, by site, for each sample; none where the tokens are the corruption,
            because the sweep then starts from the corrupted run itself.
    """

    tokens: Tensor
    first: int
    logits: Tensor
    streams: tuple[Mapping[str, Tensor], ...] = ()


@dataclass(frozen=True)
class _Plan:
    """What to restore, over how many layers, and how to go about it."""

    kinds: Sequence[Kind]
    window: int
    seed: int
    budget: int | None
    progress: Callable[[int, int], None] | None
    on_plan: Callable[[SweepPlan], None] | None


def _check(kinds: Sequence[str], window: int, samples: int, noise: float, seed: int) -> None:
    unknown = next((k for k in kinds if k not in SITES), None)
    if unknown is not None or not kinds:
        raise error(SiteError, "causal tracing cannot restore this", got=unknown or "nothing", allowed=", ".join(SITES))
    for name, value, least in (("window", window, 1), ("samples", samples, 1), ("noise", noise, 0), ("seed", seed, 0)):
        if not value >= least:
            allowed = f"{least} or more"
            raise error(EditError, f"causal tracing cannot take this {name}", got=value, allowed=allowed, do="raise it")


def _check_subjects(model: Model, subjects: object) -> None:
    if isinstance(subjects, str):
        raise error(PromptError, "subjects are several texts", got=repr(subjects), do="give a list of them")
    if subjects and model.tokenizer is None:
        do = "leave subjects= out, or open the model with tokenizer="
        raise error(PromptError, "subjects are texts, but the model has no tokenizer", do=do)


def _spread(model: Model, tokens: Tensor, span: tuple[int, int], subjects: Sequence[str]) -> float:
    """The standard deviation of all numbers in the embeddings of the subjects."""
    if subjects:
        rows: list[list[int]] = [model.tokenizer(s, add_special_tokens=False)["input_ids"] for s in subjects]
        run = model.run(rows, capture="embed", logits=False)
        return float(run["embed"][run.mask].double().std())
    site = f"embed{at(*span)}"
    return float(model.run(tokens, capture=site, logits=False)[site].double().std())


def noise_seed(seed: int, sample: int) -> int:
    """The seed of one sample's noise: no two samples share it, of one seed or of neighbouring ones."""
    return int(np.random.SeedSequence([seed, sample]).generate_state(1, np.uint64)[0])


def _noised(model: Model, clean: Run, span: tuple[int, int], std: float, samples: int, seed: int) -> _Broken:
    """All samples of the noise in one run, and the streams that they leave."""
    edits: list[Edit] = [
        Noise(f"embed{at(*span)}", std=std, seed=noise_seed(seed, i), rows=(i,)) for i in range(samples)
    ]
    run = model.run(clean.tokens.expand(samples, -1), capture=["*.resid_pre", "*.resid_post"], edits=edits)
    held = {str(address): x for address, x in run.captured.items()}
    streams = tuple({site: x[i : i + 1] for site, x in held.items()} for i in range(samples))
    return _Broken(clean.tokens, span[0] if model.anatomy.causal else 0, run.logits[:, -1], streams)


def _replaced(model: Model, rows: Sequence[Tensor], span: tuple[int, int]) -> _Broken:
    differs = (rows[0] != rows[1])[0].nonzero().flatten().tolist()
    if not differs:
        raise error(PromptError, "the corrupt prompt is the prompt itself", do="replace the subject by another")
    outside = [p for p in differs if not span[0] <= p < span[1]]
    if outside:
        raise error(
            PromptError,
            "the prompts differ outside of the subject",
            got=f"token {outside[0]}, {model.to_words(rows[0][0])[outside[0]]!r}",
            allowed=f"tokens {span[0]} to {span[1] - 1}",
            do="replace the subject alone, or name all that is replaced",
        )
    first = differs[0] if model.anatomy.causal else 0
    return _Broken(rows[1], first, model.run(rows[1]).logits[:, -1])


def _measure(model: Model, clean: Run, broken: _Broken, metric: Probability, plan: _Plan) -> xr.Dataset:
    """The effect of every cell, by sample and on average; 0 where clean and corrupted states are the same."""
    import xarray as xr

    n, length, first = model.anatomy.n_layers, clean.tokens.shape[1], broken.first
    samples = max(1, len(broken.streams))
    places = list(product(plan.kinds, range(samples), range(n), range(first, length)))
    cells = [_cell(model, clean, broken, place, plan.window) for place in places]
    if plan.on_plan is not None:
        plan.on_plan(model.sweep(broken.tokens, cells, metric, budget=plan.budget).plan)
    swept = model.sweep(broken.tokens, cells, metric, budget=plan.budget).run(plan.progress)
    zeros = torch.zeros(samples, dtype=torch.long, device=broken.logits.device)
    corrupt = metric.read(broken.logits.unsqueeze(1), zeros).double().cpu()
    effects = torch.zeros(len(plan.kinds), samples, n, length, dtype=torch.float64)
    effects[..., first:] = swept.values.double().reshape(len(plan.kinds), samples, n, -1) - corrupt[:, None, None]
    unit = {"unit": "probability"}
    variables: dict[str, object] = {
        "corrupt": float(corrupt.mean()),
        "corrupt_each": ("example", corrupt.numpy(), unit),
    }
    for kind, values in zip(plan.kinds, effects, strict=True):
        for suffix, x in zip(("", "_lo", "_hi"), mean_interval(values, seed=plan.seed), strict=True):
            variables[kind + suffix] = (("layer", "pos"), x.numpy(), unit)
        variables[f"{kind}_each"] = (("example", "layer", "pos"), values.numpy(), unit)
    return xr.Dataset(variables, coords={"layer": list(range(n))})  # pyright: ignore[reportArgumentType]


def _cell(model: Model, clean: Run, broken: _Broken, place: tuple[Kind, int, int, int], window: int) -> list[SiteEdit]:
    """The corrupted stream where the restored layers begin, then what is restored."""
    kind, sample, layer, position = place
    low, high = (layer, layer) if kind == "resid" else window_of(layer, window, model.anatomy.n_layers)
    restored = Patch(f"{layers_at(low, high)}.{SITES[kind]}@{position}", source=clean)
    if not broken.streams:
        return [restored]
    start = f"{layer}.resid_post" if kind == "resid" else f"{low}.resid_pre"
    everywhere = at(broken.first, clean.tokens.shape[1])
    return [Patch(start + everywhere, source=broken.streams[sample]), restored]
