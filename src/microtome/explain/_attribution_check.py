"""Whether an attribution map depends on what a model has learned, and how much of it lies where nothing is to be seen.

Formula:  map(t) >= 0, of the model's own answer (see `_attribution_maps.py`);
          kept_l = rank correlation over tokens of the map with that of the model whose layers l .. L - 1 have
          untrained weights: a map that explains what was learned must change, so that kept falls towards shuffled, the
          rank correlation of the map with itself in random order; the length of embeddings is kept whole.
          null_share = sum of the map over a span that the answer does not depend on, as a share of all of it; NaN
          where the map is 0 everywhere.
Cost:     L / every + 1 maps a prompt and kind, and one more model in memory.
Check:    no layer randomised changes nothing; what ignores the layers is kept; tests/laws/test_attribution_check.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.context import current
from microtome.errors import PromptError, error
from microtome.explain._attribution_maps import MAPS, map_of, usual
from microtome.explain._one_prompt import beside
from microtome.explain._spans import span_of
from microtome.method import Argument, Column, Found, PromptText, Source, Span, question, span_from_text
from microtome.model import Model, untrained_of

SHUFFLES = 8
OF = ("estimate",)


@question(
    "attribution_check",
    command="attribution-check",
    title="check of attributions",
    question="Does an attribution map depend on what the model has learned, and how much of it lies on a null span?",
    columns=(
        Column("kept", "correlation", "rank correlation of the map with that of the model whose layers from this one "
               "on are untrained", "shuffled", (-1, 1), ("estimate", "layer"), title="kept with untrained layers"),
        Column("shuffled", "correlation", "rank correlation of the map with itself in random order", range=(-1, 1),
               dims=OF),
        Column("null_share", "share", "share of the map on the null span", "null_even", (0, 1), OF,
               title="share on the null span"),
        Column("null_even", "share", "share of the tokens that are in the null span", range=(0, 1), dims=()),
    ),
    source=(
        Source("Adebayo et al.", "Sanity Checks for Saliency Maps", 2018, "1810.03292", "section 3.1",
               departs="maps of tokens; the blocks from the last one down, not the unembedding"),
        Source("Shah, Jain, Netrapalli", "Do Input Gradients Highlight Discriminative Features?", 2021, "2102.12781",
               "section 5", departs="spans of tokens in place of blocks of an image"),
    ),
    cost="(L / every + 1) maps a prompt and estimate; one more model in memory, and an untrained one",
    check="tests/laws/test_attribution_check.py, tests/planted/test_spans.py",
    call='mt.explain.attribution_check(model, "The capital of France is", estimates=["legrad"])',
    reading="kept near 1 at a layer says that the map hardly depends on what layers from there on have learned.",
    needs=("next token",),
)  # fmt: skip
def attribution_check(
    model: Model,
    prompts: PromptText,
    *,
    estimates: Annotated[
        Sequence[str] | None,
        Argument("attributions to check; by default the usual ones that the model has", choices=tuple(MAPS)),
    ] = None,
    null: Annotated[
        Span | None, Argument("a span of each prompt that the answer does not depend on", from_text=span_from_text)
    ] = None,
    every: Annotated[int | None, Argument("layers between two checks; by default a sixth", "layers", least=1)] = None,
) -> Found:  # fmt: skip
    """Compare attribution maps of a model with those of the same model with untrained layers, from the last one down.

    Raises:
        PromptError: a prompt has fewer than three tokens, or no such span.
        SiteError: an attribution needs what the model lacks.
        ModelUnsupported: it cannot be made with untrained weights.
    """
    rows = list(model.to_batch(prompts).rows)
    short = next((i for i, row in enumerate(rows) if len(row) < 3), None)
    if short is not None:
        what = f"prompt {short} is too short for ranks"
        raise error(PromptError, what, got=f"{len(rows[short])} tokens", allowed="3 or more", do="give a longer prompt")
    answers = [int(model.run(row).logits[0, -1].argmax()) for row in rows]
    names, n = list(dict.fromkeys(estimates or usual(model, rows[0]))), model.anatomy.n_layers
    maps = _maps(model, names, rows, answers)
    step = every or max(1, n // 6)
    firsts = sorted({n, *range(n - step, -1, -step), 0}, reverse=True)
    kept: list[Tensor] = []
    for done, (first, other) in enumerate(randomised(model, firsts)):
        own = maps if first == n else _maps(other, names, rows, answers)
        kept.append(torch.tensor([
            [beside(a, b) for a, b in zip(one, two, strict=True)] for one, two in zip(maps, own, strict=True)
        ], dtype=torch.float64))  # fmt: skip
        current().report("untrained layers", done + 1, len(firsts))
    each: dict[str, Any] = {
        "kept": torch.stack(kept, -1).flip(-1),  # [prompt, estimate, layer]
        "shuffled": torch.tensor([[_in_random_order(x, i) for x in of] for i, of in enumerate(maps)]).double(),
    }
    if null is not None:
        places = [span_of(model, row, null, "null span") for row in rows]
        each["null_share"] = torch.tensor([
            [float(x[a:b].sum() / x.sum()) for x in of]
            for (a, b), of in zip(places, maps, strict=True)
        ]).double()  # fmt: skip
        each["null_even"] = torch.tensor([(b - a) / len(r) for (a, b), r in zip(places, rows, strict=True)]).double()
    coords = {"estimate": names, "layer": sorted(firsts)}
    attrs = {"layers": f"untrained from this layer on; {n} is the model as it is", "prompts": len(rows)}
    return Found(each=each, coords=coords, attrs=attrs | {"answers": model.to_words(answers)})


def _maps(
    model: Model, names: Sequence[str], rows: Sequence[Tensor], answers: Sequence[int]
) -> list[list[Float[Tensor, " pos"]]]:
    """By prompt and name, the map."""
    return [[map_of(name, model, row, a) for name in names] for row, a in zip(rows, answers, strict=True)]


def randomised(model: Model, firsts: Sequence[int]) -> Iterator[tuple[int, Model]]:
    """The model with untrained weights in all layers from `first` on, for falling values of it; a copy, that changes.

    Raises:
        ModelUnsupported: it cannot be made with untrained weights.
    """
    blank = untrained_of(model)
    hf: Any = copy.deepcopy(model.hf)
    own, done = Model(hf, model.tokenizer, model.anatomy), model.anatomy.n_layers
    for first in firsts:
        for layer in range(first, done):
            path = model.anatomy.parts.layers[layer].block
            hf.get_submodule(path).load_state_dict(blank.hf.get_submodule(path).state_dict())
        done = first
        yield first, own


def _in_random_order(x: Float[Tensor, " pos"], number: int) -> float:
    """The mean rank correlation of a map with itself in random orders."""
    rng = torch.Generator().manual_seed(1_000_003 * current().seed + number)
    found = [beside(x, x[torch.randperm(len(x), generator=rng)]) for _ in range(SHUFFLES)]
    return sum(found) / len(found)
