"""Activation patching under every combination of its settings, and whether the maps agree.

Formula:  effect(c, m, w; l, p) = (m(cell) - m(corrupted)) / (m(clean) - m(corrupted)): a run with corruption c in which
          what one kind of part adds at position p in a window of w layers around l is as in the clean run, read by m.
          agreement(s, t) = Spearman's rank correlation of the maps of two settings over the cells from the first
          corrupted position on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.edit import Patch
from microtome.errors import ArgumentError, PromptError, SiteError, error
from microtome.explain._corruption import embedding_std, noised
from microtome.explain._pairs import SMALLEST_GAP, AnswerOfClean, Clean, Corrupt, FoilOfCorrupt, Pairs, pairs_of
from microtome.explain._spans import windows_of
from microtome.method import Argument, Column, Found, Source, question, run_sweep
from microtome.metric import FunctionMetric
from microtome.model import Model

CORRUPTIONS = ("replace", "noise")
METRICS = ("difference", "probability", "divergence")
KINDS = {"mlp": "mlp_out", "attn": "attn_out", "resid": "resid_post"}


@question(
    "patching_grid",
    command="patching-grid",
    title="patching under every setting",
    question="Do corruption, metric and window decide what activation patching finds?",
    columns=(
        Column("effect", "share of the gap", "gain of the metric when this part is as in the clean run, by setting",
               "none: 0 is the corrupted run, 1 the clean one", dims=("setting", "layer", "pos")),
        Column("agreement", "rank correlation", "of the maps of two settings, over layers and positions",
               "none: 1 with itself", (-1, 1), dims=("setting", "other")),
        Column("gap", "units of the metric", "metric of the clean run minus that of the corrupted one", "none: the "
               "denominator of the effects", dims=("setting",)),
    ),
    source=Source(
        "Zhang and Nanda", "Towards Best Practices of Activation Patching in Language Models: Metrics and Methods",
        2023, "2309.16042", departs="effects are shares of the gap in all metrics; divergence is from the clean run",
    ),
    cost="per pair and corruption, a sweep of samples x windows x L x (T - first) cells, all metrics at once",
    check="tests/planted/test_grid.py",
    call='mt.explain.patching_grid(model, "The capital of France is", "The capital of Italy is", answer=" Paris", '
    'foil=" Rome")',
    reading="agreement near 1 means that the choice does not matter; recommended are replaced tokens, the logit "
    "difference and a window of 1, where the prompts allow it.",
)  # fmt: skip
def patching_grid(
    model: Model,
    clean: Clean,
    corrupt: Corrupt = None,
    *,
    answer: AnswerOfClean = None,
    foil: FoilOfCorrupt = None,
    kind: Annotated[str, Argument("which parts are restored", choices=tuple(KINDS))] = "mlp",
    corruptions: Annotated[Sequence[str], Argument("how the prompt is corrupted", choices=CORRUPTIONS)] = CORRUPTIONS,
    metrics: Annotated[Sequence[str], Argument("what is read", choices=METRICS)] = METRICS,
    windows: Annotated[Sequence[int], Argument("layers restored at once", "layers")] = (1, 5),
    noise: Annotated[float, Argument("size of the noise", "standard deviations of the embeddings", least=0)] = 3.0,
    samples: Annotated[int, Argument("how many draws of the noise to average over", "draws", least=1)] = 3,
) -> Found:
    """Maps of activation patching under every combination of corruption, metric and window, and their agreement.

    Noise is put on the tokens in which the two prompts differ. Pairs must be of one length; several are averaged.

    Raises:
        PromptError: a pair does not align, answers and foils are missing, or lengths differ.
        SiteError: no layer has the part, or a setting leaves no gap.
        ArgumentError: a window is no number of layers, or there is none.
    """
    _require_windows(windows)
    pairs = pairs_of(model, clean, corrupt, answer=answer, foil=foil)
    if not pairs.foil_ids:
        raise error(PromptError, "the logit difference needs a foil for every answer", do="give answer= and foil=")
    if len(set(pairs.lengths)) > 1:
        got = str(sorted(set(pairs.lengths)))
        raise error(PromptError, "pairs of several lengths have no positions in common", got=got, do="take one length")
    if not any(s.name == KINDS[kind] for s in model.anatomy.hook_points):
        raise error(SiteError, f"{model.anatomy.name} has {KINDS[kind]} in no layer", do="name another kind")
    settings = [f"{c}, {m}, {w}" for c, w, m in product(corruptions, windows, metrics)]
    maps: list[Tensor] = []
    agree: list[Tensor] = []
    gaps: list[Tensor] = []
    for i in range(len(pairs)):
        parts = [
            _effects(model, pairs, i, c, KINDS[kind], windows, metrics, noise, samples) for c in corruptions
        ]  # fmt: skip
        found, first = torch.cat([p[0] for p in parts]), parts[0][2]
        maps.append(found)
        gaps.append(torch.cat([p[1] for p in parts]))
        agree.append(_agreement(found[:, :, first:].flatten(1)))
    one = len(pairs) == 1
    each = {"effect": torch.stack(maps), "agreement": torch.stack(agree), "gap": torch.stack(gaps)}
    coords: dict[str, Any] = {"setting": settings, "other": settings, "layer": list(range(model.anatomy.n_layers)),
                              "pos": list(range(pairs.lengths[0]))}  # fmt: skip
    attrs = {"kind": kind, "samples": samples, "noise": noise, "examples": len(pairs)}
    words = model.to_words(pairs.tokens[0][0])
    return Found(
        {name: x[0] for name, x in each.items()} if one else {}, each={} if one else each,
        coords=coords | ({"token": ("pos", words)} if one else {}), attrs=attrs,
    )  # fmt: skip


def _require_windows(windows: Any) -> None:
    """Refuse windows that are none.

    Raises:
        ArgumentError: they are no integers of 1 or more, or there are none.
    """
    listed = list(windows) if isinstance(windows, Sequence) and not isinstance(windows, str) else [None]
    if not listed or any(not isinstance(w, int) or isinstance(w, bool) or w < 1 for w in listed):
        allowed = "integers of 1 or more, such as (1, 5)"
        raise error(ArgumentError, "windows are numbers of layers", got=repr(windows), allowed=allowed, do="give some")


def _effects(
    model: Model,
    pairs: Pairs,
    i: int,
    corruption: str,
    site: str,
    windows: Sequence[int],
    metrics: Sequence[str],
    noise: float,
    samples: int,
) -> tuple[Float[Tensor, "setting layer pos"], Float[Tensor, " setting"], int]:
    """The maps of one pair and corruption, by window and metric, their gaps, and the first corrupted position.

    Raises:
        SiteError: a metric is the same in the clean and in the corrupted run.
    """
    tokens = pairs.tokens[i]
    clean = model.run(tokens[:1], capture=f"*.{site}")
    places = (tokens[0] != tokens[1]).nonzero().flatten().tolist()
    first, length = (places[0] if model.anatomy.causal else 0), tokens.shape[1]
    start, prompts = None, tokens[1:]
    if corruption == "noise":
        std = noise * embedding_std(model, tokens[:1], (places[0], places[-1] + 1), ())
        lost = noised(model, tokens[:1], (places[0], places[-1] + 1), std, samples)
        start, prompts = lost["0.resid_pre"], tokens[:1].expand(samples, -1)
    metric = FunctionMetric(_reader(clean.logits[0, -1], pairs.answer_ids[i], pairs.foil_ids[i], metrics))
    layers = {w: windows_of(model, site, 1 if site == "resid_post" else w) for w in windows}
    keys = [(w, layer, p) for w in windows for layer in layers[w] for p in range(first, length)]
    cells = [Patch(f"{layers[w][layer]}.{site}@{p}", source=clean) for w, layer, p in keys]
    which = [s for s in range(len(prompts)) for _ in cells]
    swept = run_sweep(
        model, prompts, cells * len(prompts), metric, prompts=which, start=start, stage=f"patching, {corruption}"
    ).whole()
    values = swept.values.double().reshape(len(prompts), len(cells), len(metrics)).mean(0)
    base = swept.base.double().reshape(len(prompts), len(metrics)).mean(0)
    ends = metric.read(clean.logits[:, -1:], torch.zeros(1, dtype=torch.long))[0].double().cpu()
    gap = ends - base
    flat = next((m for m, x in zip(metrics, gap.tolist(), strict=True) if abs(x) < SMALLEST_GAP), None)
    if flat is not None:
        raise error(
            SiteError, f"the {flat} is the same in the clean and in the corrupted run ({corruption})",
            got=f"{float(ends[metrics.index(flat)]):.4g}", do="choose prompts that are answered differently",
        )  # fmt: skip
    found = torch.zeros(len(windows), len(metrics), model.anatomy.n_layers, length, dtype=torch.float64)
    found[:, :, [n for n in range(model.anatomy.n_layers) if all(n not in own for own in layers.values())]] = torch.nan
    for (w, layer, p), value in zip(keys, (values - base) / gap, strict=True):
        found[list(windows).index(w), :, layer, p] = value
    return found.flatten(0, 1), gap.repeat(len(windows)), first


def _reader(clean: Float[Tensor, " vocab"], answer: int, foil: int, metrics: Sequence[str]) -> Any:
    """A function of logits [row, 1, vocab] that gives all metrics at once, [row, metric]; higher is nearer to clean."""
    base = clean.detach().float().log_softmax(-1)

    def read(logits: Float[Tensor, "row 1 vocab"], prompts: Int[Tensor, " row"]) -> Float[Tensor, "row metric"]:
        z = logits[:, 0].float()
        log = z.log_softmax(-1)
        found = {
            "difference": z[:, answer] - z[:, foil], "probability": log[:, answer].exp(),
            "divergence": -(base.exp() * (base - log)).nan_to_num(nan=0.0).sum(-1),
        }  # fmt: skip
        return torch.stack([found[name] for name in metrics], dim=-1)

    return read


def _agreement(maps: Float[Tensor, "setting cell"]) -> Float[Tensor, "setting setting"]:
    """Spearman's rank correlation between all maps, over the cells that they have."""
    from scipy.stats import rankdata

    x = maps[:, maps.isfinite().all(0)].numpy()
    ranks = np.stack([rankdata(row) for row in x])
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.atleast_2d(np.corrcoef(ranks)).copy())
