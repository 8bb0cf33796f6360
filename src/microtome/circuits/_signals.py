"""The signal of one attention score: the few directions that carry it, who wrote them, and what they do."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.circuits._qk import HELD, READ, SHARE, Attention, Terms, agreement, fewest, largest
from microtome.context import current
from microtome.edit import Add
from microtome.errors import ArgumentError, SiteError, error
from microtome.explain import asked, graph, heads_of, reading
from microtome.method import AnswerToken, Argument, Column, Found, PromptText, Source, question, run_sweep
from microtome.metric import Metric
from microtome.model import Model
from microtome.run import Run
from microtome.sweep import written

FRANCO = Source(
    "Franco, Crovella", "Sparse Attention Decomposition Applied to Circuit Tracing", 2024, "2410.00340",
    departs="norms, rotation and biases are in the form that is split; the best directions of random bases, chosen as "
    "those of the signal, are beside it",
)  # fmt: skip
DRAWS = 20
"""Random bases of the head, and random removals."""
CANCEL = 0.05
"""Agreement of terms below which shares of their sum mean nothing."""
SIDES = ("query", "key")
WROTE = ("embed", "*.attn.z", "*.attn_out", "*.mlp_out")


def _writers(side: str) -> tuple[Column, ...]:
    """What each part wrote of the signal at one of the two positions."""
    return (
        Column(side, "share", f"part of the signal at the {side} that this part of the model wrote", f"{side}_random",
               dims=("sender",), title=f"who wrote the signal at the {side}"),
        Column(f"{side}_random", "share", "the same along random directions of the stream: its projection on the "
               "stream's sum", dims=("sender",)),
        Column(f"{side}_loss", "share", "attention lost if what this part wrote of the signal is taken out",
               "none: shares of the signal stand beside it", dims=("sender",)),
    )  # fmt: skip


@question(
    "signals",
    command="signals",
    title="signal of an attention score",
    question="Which few directions carry an attention score, who wrote them, and what goes without them?",
    columns=(
        Column("term", "1", "what each pair of singular directions adds to the score, largest first",
               "none: they sum to the score", dims=("rank",)),
        Column("score", "1", "the score before the softmax", "none: what terms and bias sum to", dims=()),
        Column("bias", "1", "what the model adds to the score by position alone", "none: 0 without such a bias",
               dims=()),
        Column("gap", "1", "the score minus the sum of all terms and the bias", "none: 0 up to rounding", dims=()),
        Column("dimension", "directions", "how many directions the signal has", "dimension_random", (1, None), ()),
        Column("dimension_random", "directions", "how many a random basis of the head needs, its largest terms first "
               "too, in the mean", range=(1, None), dims=()),
        Column("agreement", "share", "size of the terms' sum over the sum of their sizes: 1 where all have one sign, "
               "near 0 where they cancel", "agreement_random", (0, 1), ()),
        Column("agreement_random", "share", "the same of random bases of the head, in the mean", range=(0, 1), dims=()),
        Column("carried", "1", "the signal over the terms' sum: above 1 where others are against it, NaN where they "
               "cancel", "carried_random", (0, None), ()),
        Column("carried_random", "1", "the same of the largest terms of a random basis, as many, in the mean",
               range=(0, None), dims=()),
        *(column for side in SIDES for column in _writers(side)),
        Column("attention", "share", "attention of the head from the query to the key", "attention_without", (0, 1),
               ()),
        Column("attention_without", "share", "the same where the signal is taken out of the score",
               "attention_random", (0, 1), ()),
        Column("attention_random", "share", "the same where as many largest terms of a random basis are, in the mean",
               range=(0, 1), dims=()),
        Column("base", "logits", "the metric before anything is removed", "none: what effects are changes of", dims=()),
        Column("effect", "logits", "change of the metric where the signal is taken out of this score alone",
               "effect_random", dims=()),
        Column("effect_random", "logits", "the same for as many largest terms of a random basis, in the mean", dims=()),
    ),
    source=FRANCO,
    cost=f"two forwards, 2 d_head products of one layer, one SVD, and a sweep of {DRAWS + 1} cells",
    check="tests/laws/test_signals.py, tests/planted/test_signals.py",
    call='mt.circuits.signals(model, "The capital of France is", head="20.attn.z[3]")',
    reading="Shares of the writers at a position sum to 1. A small number of directions says something only where "
    "random bases of the head, whose largest terms are taken in the same way, need more; where terms cancel "
    "(agreement near 0) few of any basis reach the sum.",
    needs=("sum", "attention and MLP", "*.attn.q", "*.attn.k", "*.attn.v", "*.attn.z", "next token"),
)  # fmt: skip
def signals(
    model: Model,
    prompt: PromptText,
    *,
    head: Annotated[str, Argument('the head, such as "20.attn.z[3]"')],
    query: Annotated[int, Argument("the position that attends", "token")] = -1,
    key: Annotated[int | None, Argument("the position attended to; by default the one that gets most, not counting "
                                        "the first", "token")] = None,
    share: Annotated[float, Argument("part of the score that the signal must reach", "share", least=0, most=1)] = SHARE,
    answer: AnswerToken = None,
    foil: Annotated[str | int | None, Argument("read the difference to this token's logit")] = None,
) -> Found:  # fmt: skip
    """Split the score of a head between two positions into singular directions, and keep the fewest that carry it.

    Raises:
        SiteError: the name is not that of one head, the scores of the model are no sum over directions, or the head
            cannot look there.
        PromptError: there are several prompts, or answer or foil is not one token.
        ArgumentError: there is no such position.
    """
    tokens, ids, attrs = asked(model, prompt, answer, foil)
    layer, number = _one_head(model, head)
    q = _position(query, len(tokens), "query")
    run = model.run(tokens[None], capture=[*READ, *WROTE], edits=[HELD], grad=True, logits=False)
    attention = Attention(model, run)
    row = attention.scores(layer)[number, q]
    k = _key(row, key, len(tokens))
    terms = attention.terms(layer, number, q, k)
    generator = torch.Generator().manual_seed(current().seed)
    random = attention.random_terms(layer, number, q, k, DRAWS, generator)
    kept = fewest(terms.values, share)
    signal, whole = terms.values[kept].sum(), terms.values.sum()
    drawn = largest(random, len(kept))
    bases = torch.tensor([float(len(fewest(row, share))) for row in random])
    known = float(agreement(terms.values)) >= CANCEL
    values: dict[str, Any] = {
        "term": terms.values[terms.values.abs().argsort(descending=True, stable=True)], "score": float(row[k]),
        "bias": terms.bias, "gap": float(row[k] - whole - terms.bias), "dimension": float(len(kept)),
        "dimension_random": float(bases.mean()), "agreement": float(agreement(terms.values)),
        "agreement_random": float(agreement(random).mean()), "carried": float(signal / whole) if known else torch.nan,
        "carried_random": float((drawn / whole).mean()) if known else torch.nan,
        "attention": float(attention.without(layer, number, q, k, torch.zeros(()))),
        "attention_without": float(attention.without(layer, number, q, k, signal)),
        "attention_random": float(attention.without(layer, number, q, k, drawn).mean()),
    }  # fmt: skip
    names, wrote = _wrote(model, run, layer)
    for side, at in zip(SIDES, (q, k), strict=True):
        found = _shares(terms, side, kept, wrote[:, at], attention.stream(layer, at))
        lost = values["attention"] - attention.without(layer, number, q, k, found[0] * signal)
        values |= {side: found[0], f"{side}_random": found[1], f"{side}_loss": lost}
    metric, unit = reading(ids)
    site, less = f"{layer}.attn.scores[{number}]@{q}", torch.cat([signal[None], drawn])
    changed, base = _removed(model, tokens, site, k, less, metric)
    values |= {"base": base, "effect": float(changed[0]), "effect_random": float(changed[1:].mean())}
    words = model.to_words(tokens)
    attrs |= {"head": f"{layer}.attn.z[{number}]", "query": f"{words[q]} ({q})", "key": f"{words[k]} ({k})",
              "share": share, "draws": DRAWS}  # fmt: skip
    coords = {"rank": list(range(1, len(terms.values) + 1)), "sender": names}
    return Found(values, coords=coords, attrs=attrs, units=dict.fromkeys(("base", "effect", "effect_random"), unit))


def _one_head(model: Model, head: str) -> tuple[int, int]:
    """Layer and number of a head.

    Raises:
        SiteError: it is none, or several.
    """
    found = heads_of(model, head)
    if len(found) != 1:
        raise error(SiteError, f'"{head}" is not one head', got=f"{len(found)} heads", do='name one: "3.attn.z[5]"')
    return found[0]


def _position(given: int, length: int, name: str) -> int:
    """A position from the start.

    Raises:
        ArgumentError: there is none.
    """
    if not -length <= given < length:
        raise error(ArgumentError, f"{name} is no position of the prompt", got=given,
                    allowed=f"{-length} to {length - 1}", do="name a token")  # fmt: skip
    return given % length


def _key(row: Float[Tensor, " k_pos"], key: int | None, length: int) -> int:
    """The key that is meant: by default the one of the largest score but the first.

    Raises:
        ArgumentError: there is no such position.
        SiteError: a mask hides it.
    """
    if key is None:
        later = row[1:].isfinite().any()
        return int(row[1:].argmax()) + 1 if bool(later) else int(row.argmax())
    k = _position(key, length, "key")
    if not bool(row[k].isfinite()):
        raise error(
            SiteError, "the head cannot look there", got=f"key {k}, which a mask hides", do="name an earlier key"
        )
    return k


def _wrote(model: Model, run: Run, layer: int) -> tuple[list[str], Float[Tensor, "writer pos d_model"]]:
    """What each part wrote to the stream before a layer, and behind them what the biases of attention did."""
    with torch.no_grad():
        parts = written(model, run)[0].double().cpu()
        senders, before = graph(model).senders, 1 + layer * (model.anatomy.n_heads + 1)
        heads = torch.tensor(["attn.z" in name for name in senders[:before]])
        parts = parts[:before]
        attention = sum((run[f"{i}.attn_out"][0].double().cpu() for i in range(layer)), torch.zeros_like(parts[0]))
    return [*senders[:before], "biases", "constant"], torch.cat([parts, (attention - parts[heads].sum(0))[None]])


def _shares(
    terms: Terms, side: str, kept: Tensor, wrote: Float[Tensor, "writer d_model"], whole: Float[Tensor, " width"]
) -> tuple[Float[Tensor, " one_more"], Float[Tensor, " one_more"]]:
    """The share of each writer, and of the constant behind them, of the signal, and along random directions."""
    read, x = getattr(terms, side)[kept].sum(0), whole[:-1]
    parts = torch.cat([wrote @ read[:-1], read[-1:]])
    along = torch.cat([wrote @ x, x.new_zeros(1)])
    return parts / terms.values[kept].sum(), along / x.square().sum()


def _removed(
    model: Model, tokens: Tensor, site: str, key: int, less: Float[Tensor, " cell"], metric: Metric
) -> tuple[Float[Tensor, " cell"], float]:
    """How the metric changes where a score is less by so much, for each, and the metric before."""
    at = torch.zeros(len(tokens), dtype=less.dtype)
    at[key] = 1.0
    swept = run_sweep(model, tokens[None], [Add(site, value=-x * at) for x in less], metric, stage="removing signals")
    return swept.effects.double().cpu(), float(swept.base[0])
