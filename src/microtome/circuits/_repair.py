"""Repairing a task: heads are made to look where they look in another task, or at given keys.

Formula:  at one query of each prompt the pattern of a chosen head becomes
          keys     1 / n at the n keys of a span, 0 elsewhere;
          like     over the spans that both tasks name, what the head gives each of them in the other task in the mean,
                   spread inside a span as the head does here; all other keys keep their proportions and get the rest.
          A random head gets the pattern of the head that it stands for; NaN where a layer has too few other heads.
          right: the answer is above the foil, or where there is none, no token is above the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.circuits._new_patterns import masses_of, require_position, require_seen, rows_of
from microtome.context import current
from microtome.edit import Edit, Set
from microtome.errors import ArgumentError, PromptError, error
from microtome.explain import (
    AnswerOfClean,
    Clean,
    Corrupt,
    FoilOfCorrupt,
    Pairs,
    ReadMetric,
    heads_of,
    pairs_of,
    span_of,
)
from microtome.method import Argument, Column, Found, Source, Span, question
from microtome.model import Model

MERULLO = Source(
    "Merullo, Eickhoff, Pavlick", "Circuit Component Reuse Across Tasks in Transformer Language Models", 2024,
    "2310.08744", departs="patterns may come from the other task by its named spans; as many random heads of the same "
    "layers get the same patterns",
)  # fmt: skip
Heads = list[tuple[int, int]]


def _column(name: str, meaning: str, control: str = "", unit: str = "logits") -> Column:
    limits = (0, 1) if unit == "share" else (None, None)
    return Column(name, unit, meaning, control, range=limits, dims=())


@question(
    "repair",
    title="repair by another pattern",
    question="Does a task improve where some heads look as they do in another task, or at given tokens?",
    columns=(
        _column("before", "the metric of the clean prompts", "none: what the repaired runs are compared with"),
        _column("after", "the same with the patterns of the heads overwritten", "random"),
        _column("random", "the same with those of as many random heads of the same layers, in the mean"),
        _column("right_before", "pairs that are answered: above the foil, or above all tokens where there is none",
                "none: what the repaired runs are compared with", "share"),
        _column("right", "the same with the patterns overwritten", "right_random", "share"),
        _column("right_random", "the same of the random heads, in the mean", "", "share"),
    ),
    source=MERULLO,
    cost="one forward a pair, one with the heads, and one a random set; one a pair of the other task",
    check="tests/laws/test_repair.py, tests/planted/test_conditions.py",
    call='mt.circuits.repair(model, mt.tasks.build("indirect_object", model, n=8), heads="20.attn.z[3]", keys="to")',
    reading="A repair is one where the metric rises with these heads and not with random ones.",
    needs=("attn.pattern", "attn.z", "next token"),
)  # fmt: skip
def repair(
    model: Model,
    clean: Clean,
    corrupt: Corrupt = None,
    *,
    heads: Annotated[str | Sequence[str], Argument('heads, such as "20.attn.z[3]"', from_text=str)],
    keys: Annotated[Span | Sequence[Span] | None, Argument("where they are to look: a named span of the task, a text, "
                                                           "or positions; one for all, or one a pair",
                                                           command=False)] = None,
    like: Annotated[Any, Argument("the other task, whose patterns they get: as pairs, or a file of pairs",
                                  from_text=str)] = None,
    answer: AnswerOfClean = None,
    foil: FoilOfCorrupt = None,
    metric: ReadMetric = None,
    query: Annotated[int, Argument("the position that looks", "token")] = -1,
    draws: Annotated[int, Argument("random sets of as many heads", "sets", least=1)] = 5,
) -> Found:  # fmt: skip
    """Overwrite the pattern of some heads at one position, and measure the task before and after.

    Raises:
        SiteError: a name is not that of a head.
        PromptError: pairs do not align, there is nothing to read, a span is not in its prompt or lies behind the
            query, or the tasks name no span in common.
        ArgumentError: neither `keys` nor `like` is given, or both are; or there is no such position in either task.
    """
    if (keys is None) == (like is None):
        raise error(ArgumentError, "repair needs one of keys= and like=", got="both" if keys is not None else "neither",
                    do="say where heads are to look, or give the other task")  # fmt: skip
    pairs = pairs_of(model, clean, corrupt, answer=answer, foil=foil, metric=metric)
    require_position(pairs, query, "every prompt")
    named, generator = heads_of(model, heads), torch.Generator().manual_seed(current().seed)
    random = [_alike(model, named, generator) for _ in range(draws)]
    sets = [[], named, *(drawn for drawn in random if drawn)]
    targets = _targets(model, pairs, keys, query) if like is None else []
    masses = {} if like is None else masses_of(model, pairs, like, named, query)
    report, values, right = current().counting("repairing"), list[Tensor](), list[Tensor]()
    with torch.no_grad():
        for i in range(len(pairs)):
            one, tokens = pairs.take([i]), pairs.tokens[i][:1]
            rows = rows_of(model, one, named, query, targets[i] if targets else None, masses)
            read: list[Tensor] = []
            for chosen in sets:
                edits = _edits(chosen, rows if chosen else [], range(tokens.shape[1])[query])
                run = model.run(tokens, edits=edits)
                value = one.read(run)[0].double().cpu()
                read.append(torch.stack([value, _right(one, run.logits[0, -1], value)]))
            both = torch.stack(read)
            values.append(both[:, 0])
            right.append(both[:, 1])
            report(i + 1, len(pairs))
    each: dict[str, Tensor] = {}
    for names, found in ((("before", "after", "random"), values), (("right_before", "right", "right_random"), right)):
        x = torch.stack(found)
        each |= dict(zip(names, (x[:, 0], x[:, 1], x[:, 2:].mean(1)), strict=True))
    attrs = pairs.attrs() | {"heads": [f"{i}.attn.z[{h}]" for i, h in named], "query": query, "draws": draws}
    attrs["random_heads"] = len(random[0])
    attrs |= {f"{i}.attn.z[{h}]": ", ".join(f"{n} {x:.2f}" for n, x in own.items()) for (i, h), own in masses.items()}
    return Found(each=each, attrs=attrs, units=dict.fromkeys(("before", "after", "random"), pairs.unit))


def _right(one: Pairs, logits: Float[Tensor, " vocab"], value: Tensor) -> Tensor:
    """1 where the pair is answered, 0 where it is not, NaN where that has no meaning."""
    if one.foil_ids:
        return (value > 0).double()
    return (
        (logits.argmax().cpu() == one.answer_ids[0]).double() if one.answer_ids else torch.full_like(value, torch.nan)
    )


def _alike(model: Model, named: Heads, generator: torch.Generator) -> Heads:
    """In the place of each head a random other one of its layer; none where a layer has too few others."""
    found = dict[tuple[int, int], tuple[int, int]]()
    for layer in dict.fromkeys(i for i, _ in named):
        own = [h for i, h in named if i == layer]
        free = [h for h in range(model.anatomy.n_heads) if h not in own]
        if len(free) < len(own):
            return []
        drawn = torch.randperm(len(free), generator=generator)[: len(own)].tolist()
        found |= {(layer, h): (layer, free[j]) for h, j in zip(own, drawn, strict=True)}
    return [found[head] for head in named]


def _targets(model: Model, pairs: Pairs, keys: Any, query: int) -> list[tuple[int, int]]:
    """The span of keys of each pair.

    Raises:
        PromptError: there is not one a pair, one is not in its prompt, or lies behind the query.
    """
    found = list(pairs.spans[keys]) if isinstance(keys, str) and keys in pairs.spans else _placed(model, pairs, keys)
    require_seen(model, found, pairs.lengths, query)
    return found


def _placed(model: Model, pairs: Pairs, keys: Any) -> list[tuple[int, int]]:
    """Spans by text or positions."""
    given: list[Any] = [keys] * len(pairs) if _one(keys) else [*keys]
    if len(given) != len(pairs):
        raise error(PromptError, "there must be one place to look at per pair", got=len(given), allowed=str(len(pairs)))
    texts = [pair[0] for pair in pairs.tokens]
    texts = texts if model.tokenizer is None else model.encodings(texts)
    return [span_of(model, text, span, "keys") for text, span in zip(texts, given, strict=True)]


def _one(keys: Any) -> bool:
    """Whether it is one place for all pairs."""
    return isinstance(keys, str | int) or (isinstance(keys, tuple) and all(isinstance(p, int) for p in keys))


def _edits(chosen: Heads, rows: Sequence[Tensor], query: int) -> list[Edit]:
    """The patterns of some heads overwritten, the first with the first row, and so on."""
    return [Set(f"{i}.attn.pattern[{h}]@{query}", value=row) for (i, h), row in zip(chosen, rows, strict=True)]
