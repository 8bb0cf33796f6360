"""Heads that recall a fact from its subject, from its relation, or from both.

Formula:  d_h(S, t) = sum over positions k of S of (what head h adds from k to the logit of t at the end of the prompt)
          minus the same of the mean logit over the vocabulary: u_t = centre(gain (W_U[:, t] - mean W_U)) / scale.
          subject = d_h(subject's tokens, answer), relation = d_h(all other tokens but the first, answer), mean over
          prompts; their controls, the same of the answers to the other prompts: what a head raises for any subject of
          this relation. A head counts if |subject| + |relation| is at least `least` of the largest; it is a subject
          head where |subject| is at least `ratio` times |relation|, a relation head the other way round, else mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.change import means
from microtome.context import current
from microtome.edit import Mean
from microtome.errors import PromptError, error
from microtome.explain._answers import Answer, answers_of
from microtome.explain._messages import SEEN, Messages, refuse_gated_heads
from microtome.explain._spans import span_of
from microtome.method import Argument, Column, Found, Source, Span, question
from microtome.model import Model
from microtome.run import Prompt, prompt_from_text

KINDS = ("subject", "relation", "mixed")
SETS = (*KINDS, "all")
HEADS = ("layer", "head")


def _source(name: str, what: str) -> tuple[Column, Column]:
    """What heads add from one source to the answer, and to the answers of other prompts."""
    of = f"what a head adds from {what} to the logit of"
    return (
        Column(name, "logits", f"{of} the answer, over the mean token", f"{name}_others", dims=HEADS, test=True,
               title=f"from {what}"),
        Column(f"{name}_others", "logits", f"{of} the other prompts' answers, over the mean token", dims=HEADS),
    )  # fmt: skip


@question(
    "head_sources",
    title="sources of heads",
    question="Which heads recall an answer from the subject, which from the relation, and which from both?",
    columns=(
        *_source("subject", "the subject"),
        *_source("relation", "the other tokens"),
        Column("kind", "1", "1 a subject head, 2 a relation head, 3 mixed, 0 none of these", "none: a class", (0, 3),
               HEADS, title="kind of head"),
        Column("loss", "nats", "how much of the answer's log-probability is lost when the heads of a kind are set to "
               "their mean at the end", "loss_random", dims=("group",), test=True),
        Column("loss_random", "nats", "the same for as many random other heads of the same layers", dims=("group",)),
        Column("count", "heads", "how many heads are of a kind", "none: a count", (0, None), ("group",)),
    ),
    source=Source(
        "Chughtai, Cooney, Nanda", "Summing Up the Facts: Additive Mechanisms Behind Factual Recall in LLMs", 2024,
        "2402.07321", departs="the constants are ours; controls and knock-outs of kinds are added",
    ),
    cost="one forward per prompt and head contributions by source; then 2 x 4 forwards per prompt",
    check="tests/laws/test_head_sources.py",
    call='mt.explain.head_sources(model, ["The capital of France is", "The capital of Japan is"], subject=["France", '
    '"Japan"], answer=[" Paris", " Tokyo"])',
    reading="A subject head raises the attributes of the subject; a relation head raises the answers of the relation, "
    "whoever the subject is. The sum of both picks the answer.",
    needs=("sum", "lens", "heads", "attn.v", "final.scale"),
)  # fmt: skip
def head_sources(
    model: Model,
    prompts: Annotated[Prompt, Argument("prompts of one relation", positional=True, from_text=prompt_from_text)],
    *,
    subject: Annotated[Sequence[Span] | Span, Argument("the subject of each prompt: its text, or positions; or "
                                                        "one for all", command=False)],
    answer: Annotated[Answer, Argument("the answer of each prompt, one token each", command=False)],
    ratio: Annotated[float, Argument("how many times as much as the other source one must give", least=1)] = 4.0,
    least: Annotated[float, Argument("share of the largest head that counts", "share", least=0, most=1)] = 0.1,
) -> Found:  # fmt: skip
    """Split what each head adds to answers by its source: the subject, or the tokens of the relation.

    Raises:
        PromptError: an answer is not one token, a subject is not in its prompt, or there is not one of each per prompt.
        SiteError: what heads add is no sum over positions, or logits are no sum over parts.
    """
    refuse_gated_heads(model, "what heads add")
    batch = model.to_batch(prompts)
    rows, ids = batch.rows, answers_of(model, answer, len(batch.rows))
    given = _given(subject, len(rows))
    texts = rows if model.tokenizer is None else model.encodings(rows)
    spans = [span_of(model, text, span, "subject") for text, span in zip(texts, given, strict=True)]
    every = sorted(set(ids))
    found = [_of_prompt(model, row, span, every) for row, span in zip(rows, spans, strict=True)]
    added = torch.stack(found)  # [prompt, source, layer, head, answer]
    own = torch.tensor([every.index(i) for i in ids])
    mine = added[torch.arange(len(rows)), ..., own]
    each = {name: mine[:, k] for k, name in enumerate(KINDS[:2])}
    if len(every) > 1:
        rest = (added.sum(-1) - mine) / (len(every) - 1)
        each |= {f"{name}_others": rest[:, k] for k, name in enumerate(KINDS[:2])}
    kind = _kinds(mine[:, 0].mean(0), mine[:, 1].mean(0), ratio, least)
    losses = _knocked(model, rows, ids, kind)
    return Found(
        {"kind": kind, "count": [int((kind == k + 1).sum()) if k < 3 else int((kind > 0).sum()) for k in range(4)]},
        each=each | losses,
        coords=_coords(kind),
        attrs={"prompts": len(rows), "answers": len(every), "ratio": ratio, "least": least},
    )


def _coords(kind: Tensor) -> dict[str, Any]:
    return {"layer": list(range(len(kind))), "head": list(range(kind.shape[1])), "group": list(SETS)}


def _given(subjects: Sequence[Span] | Span, n: int) -> list[Span]:
    """The subject of each prompt.

    Raises:
        PromptError: there are not as many as prompts.
    """
    one = isinstance(subjects, str | int) or (len(subjects) == 2 and all(isinstance(p, int) for p in subjects))
    listed: list[Any] = [subjects] * n if one else list(subjects)  # pyright: ignore[reportArgumentType]
    if len(listed) != n:
        raise error(PromptError, "there must be one subject per prompt", got=len(listed), allowed=str(n))
    return listed


def _of_prompt(
    model: Model, row: Tensor, span: tuple[int, int], answers: list[int]
) -> Float[Tensor, "source layer head answer"]:
    """What each head adds from the subject, and from the rest but the first token, to some logits over the mean one."""
    q, norm, n = len(row) - 1, model.require_readable(), model.anatomy.n_layers
    run = model.run(row[None], capture=[*SEEN, f"final.scale@{q}"], logits=False)
    with torch.no_grad():
        w = over_mean(model, answers)  # [d_model, answer]
        u = norm.centre((w.T * norm.gain).double()) / run[f"final.scale@{q}"][0, 0].double() * model.anatomy.logit_scale
        inside = torch.tensor([span[0] <= k < span[1] for k in range(q + 1)], device=u.device)
        rest = ~inside
        rest[0] = False
        found = u.new_zeros(2, n, model.anatomy.n_heads, len(answers))
        messages = Messages(model, run)
        for i in (i for i in range(n) if model.anatomy.parts.layers[i].attn is not None):
            read = torch.einsum("khm,am->kha", messages.layer(i).to(q).double(), u)
            for s, chosen in enumerate((inside, rest)):
                found[s, i, : read.shape[1]] = read[chosen].sum(0)
    return found.cpu()


def over_mean(model: Model, answers: list[int]) -> Float[Tensor, "d_model answer"]:
    """The columns of the unembedding of some tokens, minus the mean column."""
    return model.W_U[:, answers] - model.W_U.mean(1, keepdim=True)


def _kinds(
    subject: Float[Tensor, "layer head"], relation: Float[Tensor, "layer head"], ratio: float, least: float
) -> Tensor:
    """[layer, head] 1 a subject head, 2 a relation head, 3 mixed, 0 none of these."""
    a, b = subject.abs(), relation.abs()
    counts: Bool[Tensor, "layer head"] = (a + b >= least * (a + b).max()) & (a + b > 0)
    kind = torch.where(a >= ratio * b, 1, torch.where(b >= ratio * a, 2, 3))
    return torch.where(counts, kind, 0)


def _knocked(model: Model, rows: list[Tensor], ids: list[int], kind: Tensor) -> dict[str, Tensor]:
    """What each prompt's answer loses without the heads of each kind, and without as many random ones."""
    held = means(model, rows, "*.attn.z@-1")
    sets = [[tuple(p) for p in (kind == k).nonzero().tolist()] for k in (1, 2, 3)]
    sets.append([head for some in sets for head in some])
    generator = torch.Generator().manual_seed(current().seed)
    randoms = [_alike(some, set(sets[3]), kind.shape[1], generator) for some in sets]

    def log_p(heads: list[tuple[int, ...]]) -> Tensor:
        edits = [Mean(f"{i}.attn.z[{h}]@-1", mean=held[f"{i}.attn.z@-1"][h]) for i, h in heads]
        runs = [model.run(row[None], edits=edits).logits[0, -1].double().log_softmax(-1) for row in rows]
        return torch.stack([x[i] for x, i in zip(runs, ids, strict=True)]).cpu()

    with torch.no_grad():
        base = log_p([])
        found = {
            name: torch.stack([log_p(heads) - base if heads else torch.zeros_like(base) for heads in chosen], dim=1)
            for name, chosen in (("loss", sets), ("loss_random", randoms))
        }
    return {name: -x for name, x in found.items()}


def _alike(
    heads: list[tuple[int, ...]], shunned: set[tuple[int, ...]], n_heads: int, generator: torch.Generator
) -> list[tuple[int, ...]]:
    """As many random heads of the same layers, none of those that are shunned where a layer has others."""
    found: list[tuple[int, ...]] = []
    for layer, _ in heads:
        free = [(layer, h) for h in range(n_heads) if (layer, h) not in shunned and (layer, h) not in found]
        if free:
            found.append(free[int(torch.randint(len(free), (), generator=generator))])
    return found
