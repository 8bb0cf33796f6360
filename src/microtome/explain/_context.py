"""Which sentence of a context an answer comes from, and which heads and MLPs carry it.

Formula:  score(s) = sum over answer tokens t of JSD(p(. | context, a_<t), p(. | context without s, a_<t)), in nats;
          loss(s) = log p(answer | context) - log p(answer | context without s), leaving one out;
          random(s): score of as many random tokens of the context, outside of s where there are enough, left out.
          Parts: of the sentence of the largest score, the same JSD of the lens readings of what a head or an MLP writes
          at the positions that predict the answer: softmax(unembed(norm(write))), with its own norm. Their control: the
          same of the sentence of the smallest score. `gated`: log p(answer) without the heads of the largest JSD, which
          write nothing at these positions, minus log p(answer).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.anatomy import at_least_float32
from microtome.context import current
from microtome.edit import Edit, Zero
from microtome.errors import PromptError, error
from microtome.explain._divergence import jensen_shannon
from microtome.explain._spans import one_prompt, one_row, span_of
from microtome.method import Argument, Column, Found, PromptText, Source, Span, question
from microtome.model import Model
from microtome.run import Encoding, Run

SENTENCE = re.compile(r"\S.*?(?:[.!?]+(?=\s|$)|\n|$)", re.DOTALL)
BASE = "none: the baseline of the losses"
Place = tuple[int, int]


@dataclass(frozen=True)
class _Answered:
    """What a context and an answer behind it give.

    Attributes:
        run: of both, but for the last token of the answer.
        log_p: [token, vocab] the predictions of the answer's tokens.
        at: the positions that predict them, as part of an address.
    """

    run: Run
    log_p: Float[Tensor, "token vocab"]
    at: str

    def of(self, answer: Int[Tensor, " token"]) -> float:
        """The log-probability of the answer."""
        return float(self.log_p.gather(1, answer.unsqueeze(1)).sum())


@question(
    "context",
    command="context",
    title="context attribution",
    question="Which sentence of the context does the answer come from, and what carries it?",
    columns=(
        Column("score", "nats", "Jensen-Shannon divergence of the predictions of the answer with and without a "
               "sentence, summed over its tokens", "score_random", (0, None), ("component",), title="sentences"),
        Column("score_random", "nats", "the same for as many random other tokens of the context", range=(0, None),
               dims=("component",)),
        Column("loss", "nats", "log-probability of the answer that is lost without a sentence",
               "none: compare `score`, which needs no particular answer", dims=("component",)),
        Column("heads", "nats", "divergence of what a head says with and without the sentence of the largest score",
               "heads_least", (0, None), ("layer", "head"), title="heads"),
        Column("heads_least", "nats", "the same for the sentence of the smallest score", range=(0, None),
               dims=("layer", "head")),
        Column("mlps", "nats", "divergence of what an MLP says with and without the sentence of the largest score",
               "mlps_least", (0, None), ("layer",), title="MLPs"),
        Column("mlps_least", "nats", "the same for the sentence of the smallest score", range=(0, None),
               dims=("layer",)),
        Column("gated", "nats", "change of the answer's log-probability without the heads of the largest divergence",
               "gated_random", dims=()),
        Column("gated_random", "nats", "the same without as many random heads of the same layers, on average", dims=()),
        Column("log_probability", "nats", "of the answer, with the whole context", BASE, (None, 0), ()),
    ),
    source=Source(
        "Li et al.", "Attributing Response to Context: A Jensen-Shannon Divergence Driven Mechanistic Study of Context "
        "Attribution in Retrieval-Augmented Generation", 2025, "2505.16415",
        departs="the divergence is KL(p | mean), where public code has KL(mean | p); controls are ours",
    ),
    cost="one forward per sentence and (1 + controls) more, on prompt and answer; two unembeddings per head, MLP and "
    "answer token",
    check="tests/laws/test_context.py, tests/planted/test_flow.py",
    call='mt.explain.context(model, "Mary lives in Paris. John lives in Rome. Where does John live? John lives in")',
    reading="The sentence with the largest score is the one that the answer depends on. A head with a large divergence "
    "says something else without it.",
    needs=("lens", "heads", "next token"),
)  # fmt: skip
def context(
    model: Model,
    prompt: PromptText,
    *,
    answer: Annotated[str | int | None, Argument("the answer, of any number of tokens; by default what the model "
                                                 "continues with", from_text=str)] = None,
    sentences: Annotated[Sequence[Span] | None, Argument("parts of the context to leave out, each a text or "
                                                         "positions; by default its sentences but the last",
                                                         command=False)] = None,
    tokens: Annotated[int, Argument("length of the model's own answer", "tokens", least=1)] = 4,
    top: Annotated[int, Argument("how many heads to switch off", "heads", least=1)] = 10,
    controls: Annotated[int, Argument("how many random sets to compare with", "sets", least=1)] = 3,
) -> Found:  # fmt: skip
    """Attribute an answer to the sentences of its context, and to the heads and MLPs that carry them.

    Raises:
        PromptError: there are several prompts, fewer than two sentences to leave out, or a part overlaps another.
        SiteError: the stream, or what heads write, cannot be read as logits.
    """
    row, text = one_row(model.to_batch(prompt).tokens), one_prompt(model, prompt)
    places = _places(model, text, sentences)
    generator = torch.Generator().manual_seed(current().seed)
    with torch.no_grad():
        ids = _answer(model, row, answer, tokens)
        whole = _read(model, row, ids, parts=True)
        without: list[_Answered] = []
        random: list[float] = []
        for done, (first, end) in enumerate(places):
            rest = torch.cat([row[:first], row[end:]])
            without.append(_read(model, rest, ids, parts=False))
            drawn = [_thinned(row, places, done, generator) for _ in range(controls)]
            random.append(sum(_apart(whole, _read(model, some, ids, parts=False)) for some in drawn) / controls)
            current().report("leaving sentences out", done + 1, len(places))
        scores = [_apart(whole, some) for some in without]
        best, least = (scores.index(f(scores)) for f in (max, min))
        parts = [_parts(model, whole, _read(model, _but(row, places[i]), ids, parts=True)) for i in (best, least)]
        gated, by_chance = _gated(model, row, ids, parts[0][0], top, controls, generator)
    base = whole.of(ids)
    values: dict[str, Any] = {
        "score": scores, "score_random": random, "loss": [base - some.of(ids) for some in without],
        "heads": parts[0][0], "heads_least": parts[1][0], "mlps": parts[0][1], "mlps_least": parts[1][1],
        "gated": gated - base, "gated_random": by_chance - base, "log_probability": base,
    }  # fmt: skip
    names = [f"{i} {model.to_text(row[first:end]).strip()}" for i, (first, end) in enumerate(places)]
    coords: dict[str, Any] = {"component": names, "layer": list(range(model.anatomy.n_layers))}
    coords["head"] = list(range(parts[0][0].shape[1]))
    attrs: dict[str, Any] = {"answer": model.to_text(ids), "sentence": names[best], "least": names[least]}
    attrs["loss_agrees"] = int(best == max(range(len(places)), key=lambda i: values["loss"][i]))
    return Found(values, coords=coords, attrs=attrs)


def _places(model: Model, text: Encoding | Tensor, sentences: Sequence[Span] | None) -> list[Place]:
    """Where each part of the context is: those that are given, or the sentences of the text but the last.

    Raises:
        PromptError: there are fewer than two, or one overlaps another.
    """
    if sentences is not None:
        listed: list[Any] = list(sentences)
        found = sorted(span_of(model, text, part, "sentence") for part in listed)
    elif isinstance(text, Encoding):
        found = _sentences(text)[:-1]
    else:
        found = []
    if len(found) < 2:
        do = "give sentences=, parts of the prompt, or a prompt of three sentences or more"
        raise error(PromptError, "there must be two sentences or more to leave out", got=len(found), do=do)
    if any(a[1] > b[0] for a, b in pairwise(found)):
        raise error(PromptError, "sentences overlap", got=str(found), do="name each part once")
    return found


def _sentences(text: Encoding) -> list[Place]:
    """The tokens of each sentence, up to the first of the next."""
    starts = [text.tokens_at(*match.span()) for match in SENTENCE.finditer(text.text)]
    firsts = sorted({place[0] for place in starts if place is not None})
    return list(zip(firsts, [*firsts[1:], len(text.ids)], strict=True))


def _answer(model: Model, row: Int[Tensor, " pos"], answer: str | int | None, tokens: int) -> Int[Tensor, " token"]:
    """The tokens of the answer: given, or the likeliest continuation.

    Raises:
        PromptError: it is empty.
    """
    if answer is not None:
        ids = model.continuation(answer) if isinstance(answer, str) else [model.to_id(answer)]
        if not ids:
            raise error(PromptError, "the answer is empty", got=repr(answer), do="give at least one token")
        return torch.tensor(ids, device=row.device)
    found = row
    for _ in range(tokens):
        found = torch.cat([found, model.run(found[None]).logits[0, -1].argmax().reshape(1)])
    return found[len(row) :]


def _read(
    model: Model, row: Int[Tensor, " pos"], answer: Int[Tensor, " token"], *, parts: bool, edits: Sequence[Edit] = ()
) -> _Answered:
    """The predictions of an answer behind a context, and what wrote them."""
    at = f"@{len(row) - 1}-{len(row) + len(answer) - 2}"
    run = model.run(
        torch.cat([row, answer[:-1]])[None], capture=[f"*.attn.z{at}", f"*.mlp_out{at}"] if parts else (), edits=edits
    )
    return _Answered(run, run.logits[0, len(row) - 1 :].double().log_softmax(-1), at)


def _apart(one: _Answered, other: _Answered) -> float:
    """The divergence of two predictions of an answer, summed over its tokens."""
    return float(jensen_shannon(one.log_p, other.log_p).sum())


def _but(row: Int[Tensor, " pos"], place: Place) -> Int[Tensor, " rest"]:
    return torch.cat([row[: place[0]], row[place[1] :]])


def _thinned(
    row: Int[Tensor, " pos"], places: list[Place], own: int, generator: torch.Generator
) -> Int[Tensor, " rest"]:
    """The prompt without as many random tokens of the other sentences as one sentence has, or all there are."""
    other = torch.tensor([p for k, (a, b) in enumerate(places) if k != own for p in range(a, b)])
    size = min(places[own][1] - places[own][0], len(other))
    gone = other[torch.randperm(len(other), generator=generator)[:size]]
    keep = torch.ones(len(row), dtype=torch.bool)
    keep[gone] = False
    return row[keep.to(row.device)]


def _parts(
    model: Model, one: _Answered, other: _Answered
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, " layer"]]:
    """How far what each head, and each MLP, says of the answer's tokens differs between two contexts."""
    a = model.anatomy
    heads, mlps = (
        torch.full(size, torch.nan, dtype=torch.float64) for size in ((a.n_layers, a.n_heads), (a.n_layers,))
    )
    for i, layer in enumerate(a.parts.layers):
        if layer.attn is not None:
            w = at_least_float32(model.layers[i].W_O)
            z = [some.run[f"{i}.attn.z{some.at}"][0].to(w.dtype) for some in (one, other)]
            writes = [torch.einsum("thd,hdm->thm", x, w) for x in z]
            found = jensen_shannon(*(_said(model, x) for x in writes)).sum(0)
            heads[i, : len(found)] = found.double().cpu()
        if layer.mlp is not None or layer.down is not None:
            said = [_said(model, some.run[f"{i}.mlp_out{some.at}"][0]) for some in (one, other)]
            mlps[i] = float(jensen_shannon(*said).sum())
        current().report("reading heads and MLPs", i + 1, a.n_layers)
    return heads, mlps


def _said(model: Model, x: Float[Tensor, "*of d_model"]) -> Float[Tensor, "*of vocab"]:
    """The log-probabilities that a part of the stream says by itself."""
    return model.unembed(x).float().log_softmax(-1)


def _gated(
    model: Model, row: Int[Tensor, " pos"], answer: Int[Tensor, " token"], heads: Float[Tensor, "layer head"], top: int,
    controls: int, generator: torch.Generator,
) -> tuple[float, float]:  # fmt: skip
    """The answer's log-probability without the heads of the largest divergence, and without random ones."""
    width, at = heads.shape[1], f"@{len(row) - 1}-{len(row) + len(answer) - 2}"
    order = heads.flatten().nan_to_num(-1.0).argsort(descending=True)[: min(top, int(heads.isfinite().sum()) // 2)]
    best = [divmod(int(i), width) for i in order]

    def without(chosen: Sequence[Place]) -> float:
        edits = [Zero(f"{i}.attn.z[{h}]{at}") for i, h in chosen]
        return _read(model, row, answer, parts=False, edits=edits).of(answer)

    drawn: list[float] = []
    for _ in range(controls):
        some: list[Place] = []
        for i, _h in best:
            there = [h for h in range(width) if heads[i, h].isfinite()]
            free = [(i, h) for h in there if (i, h) not in best and (i, h) not in some]
            if free:
                some.append(free[int(torch.randint(len(free), (), generator=generator))])
        drawn.append(without(some))
    return without(best), sum(drawn) / len(drawn)
