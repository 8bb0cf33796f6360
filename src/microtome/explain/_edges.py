"""The effect of every node and every edge of the graph, measured exactly.

Formula:  node: effect(u) = m(base, u's output taken from the other run at all positions) - m(base);
          edge: effect(u -> v) = m(base, v alone reading the stream plus what u writes in the other run minus what it
          writes in the base run) - m(base).
          Denoising starts at the corrupt prompt and takes from the clean one, noising the reverse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from microtome.context import current, settings
from microtome.edit import Patch
from microtome.errors import EditError, PromptError, error
from microtome.explain._answers import Answer, answer_metric, metric_in_words, metric_of
from microtome.explain._graph import Graph, graph
from microtome.explain._pair import CleanPrompt, CorruptOrRun, one_pair
from microtome.explain._pairs import AnswerOfClean, Direction, FoilOfCorrupt, ReadMetric
from microtome.method import Argument, Column, Found, Source, question, run_sweep
from microtome.metric import Metric
from microtome.model import Model
from microtome.run import Prompt, Run
from microtome.sweep import Edge

TOGETHER = 4096
"""Edges of how many are held in one sweep; what a stopped measurement loses at most."""
WRITTEN = ("embed", "*.attn.z", "*.mlp_out")
MEASURED = "none: every cell is measured, and most are near 0"
READING = (
    "Each value is how the {metric} of the {start} prompt changes when this part alone is taken from the {given} "
    "run: below 0, it falls."
)
PAIR = 'model, "The capital of France is", "The capital of Italy is", answer=" Paris", foil=" Rome"'
BASE = Column("base", "logits", "the metric before any change", "none: the baseline of the effects", dims=())


@question(
    "node_effects",
    command="nodes",
    title="node effects",
    question="How much does each part of the model matter to the answer: the embedding, each head, each MLP?",
    columns=(Column("effect", "logits", "change of the metric when this part is taken from the other run", MEASURED,
                    dims=("sender",)), BASE),
    source=Source(
        "Wang et al.", "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small",
        2022, "2211.00593",
    ),
    cost="two forwards and one sweep of 1 + L (H + 1) cells",
    check="tests/laws/test_edges.py",
    call=f"mt.explain.node_effects({PAIR})",
    needs=("sum", "attention and MLP", "*.attn.q", "*.attn.k", "*.attn.v", "*.attn.z"),
)  # fmt: skip
def node_effects(
    model: Model,
    clean: CleanPrompt,
    corrupt: CorruptOrRun,
    *,
    answer: AnswerOfClean = None,
    foil: FoilOfCorrupt = None,
    metric: ReadMetric = None,
    direction: Direction = "denoise",
) -> Found:
    """Take each part of the model alone from the other run, and measure how that changes the answer.

    A run in place of the corrupt prompt has captured ``embed``, ``*.attn.z`` and ``*.mlp_out``. NaN where it was
    stopped.

    Raises:
        PromptError: the prompts do not align, the run has several rows, or the answer is not one token.
        SiteError: the stream of the model is not a sum over its parts, or the metric reads only what comes before the
            prompts differ.
        EditError: a run is given where "denoise" would start.
        BudgetError: not even one cell fits.
    """
    parts = graph(model)
    start, source, metric = _ends(model, clean, corrupt, direction, answer, foil, metric)
    cells = [Patch(sender, source=source) for sender in parts.senders]
    swept = run_sweep(model, start, cells, metric, stage="measuring nodes")
    return _found(swept.effects, {"sender": parts.senders}, swept.base, metric, direction)


@question(
    "edge_effects",
    command="edges",
    title="edge effects",
    question="How much does each edge matter, from each part to the queries, keys, values, MLPs and logits it feeds?",
    columns=(Column("effect", "logits", "change of the metric when the receiver alone reads the sender's output from "
                    "the other run", MEASURED, dims=("sender", "receiver")), BASE),
    source=Source(
        "Conmy et al.", "Towards Automated Circuit Discovery for Mechanistic Interpretability", 2023, "2304.14997",
        departs="every edge is measured alone; none is permanently removed",
    ),
    cost="per layer two forwards, and for each sender its attention three times and its MLP once; one cell per edge; "
    "123,211 edges of 30 layers of 9 heads cost about as much as 42,000 forwards",
    check="tests/laws/test_edges.py",
    call=f"mt.explain.edge_effects({PAIR})",
    needs=("sum", "attention and MLP", "*.attn.q", "*.attn.k", "*.attn.v", "*.attn.z"),
)  # fmt: skip
def edge_effects(
    model: Model,
    clean: CleanPrompt,
    corrupt: CorruptOrRun,
    *,
    answer: AnswerOfClean = None,
    foil: FoilOfCorrupt = None,
    metric: ReadMetric = None,
    direction: Direction = "denoise",
    embeddings: Annotated[
        Mapping[str, Tensor] | None,
        Argument("senders that replace `embed`: what each changes in it [pos, d_model]", command=False),
    ] = None,
) -> Found:
    """For each edge, let the receiver alone read what the sender writes in the other run, and measure the answer.

    A run in place of the corrupt prompt is as for `node_effects`. NaN where there is no edge or where it was stopped.

    Raises:
        PromptError: the prompts do not align, the run has several rows, or the answer is not one token.
        SiteError: the stream of the model is not a sum over its parts, or the metric reads only what comes before the
            prompts differ.
        EditError: a run is given where "denoise" would start, or a part of the embedding has the name of a sender.
        BudgetError: not even one edge fits.
    """
    parts = graph(model)
    start, source, metric = _ends(model, clean, corrupt, direction, answer, foil, metric)
    changes, own = dict(embeddings or {}), list(embeddings or ["embed"])
    names = [*own, *parts.senders[1:]]
    if taken := [name for name in own if name in parts.senders[1:]]:
        what = "a part of the embedding has the name of another sender"
        raise error(EditError, what, got=taken[0], do="rename it")
    mask = torch.cat([parts.mask[:1].expand(len(own), -1), parts.mask[1:]])
    effects = torch.full(mask.shape, torch.nan, dtype=torch.float64)
    base, done, everything = torch.full((1,), torch.nan), 0, int(mask.sum())
    report = current().counting("measuring edges")
    for places in _by_layer(parts, mask):
        edges = [
            Edge("embed", receiver, change=changes[name]) if name in changes else Edge(name, receiver, source=source)
            for name, receiver in ((names[u], parts.receivers[v]) for u, v in places.tolist())
        ]
        with settings(progress=lambda stage, now, part, before=done: report(before + now, everything)):
            swept = run_sweep(model, start, edges, metric)
        effects[places[:, 0], places[:, 1]] = swept.effects.double()
        base, done = swept.base, done + swept.done
        if swept.done < len(edges):  # stopped
            break
    found = _found(effects, {"sender": names, "receiver": parts.receivers}, base, metric, direction)
    found.attrs = {**found.attrs, "n_edges": everything, "measured": done}
    return found


def _by_layer(parts: Graph, mask: Bool[Tensor, "sender receiver"]) -> list[Int[Tensor, "edge 2"]]:
    """The edges into the receivers of a layer, of several layers together while they are few."""
    layers = [receiver.partition(".")[0] for receiver in parts.receivers]
    groups: list[Tensor] = []
    for layer in dict.fromkeys(layers):
        into = torch.tensor([other == layer for other in layers])
        places = (mask & into).nonzero()
        if groups and len(groups[-1]) + len(places) <= TOGETHER:
            places = torch.cat([groups.pop(), places])
        groups.append(places)
    return groups


def _ends(
    model: Model,
    clean: Prompt,
    corrupt: Prompt | Run,
    direction: str,
    answer: Answer | None,
    foil: Answer | None,
    metric: Metric | None,
) -> tuple[Any, Run, Metric]:
    """The prompt that cells change, the run that they take from, and what is read."""
    if not isinstance(corrupt, Run):
        pair = one_pair(model, clean, corrupt, answer=answer, foil=foil, metric=metric)
        return pair.start(direction), model.run(pair.goal(direction), capture=WRITTEN, logits=False), pair.metric
    if direction != "noise":
        what = "a run can only supply values, not receive them"
        do = 'give direction="noise", or the corrupt prompt instead of its run'
        raise error(EditError, what, got=f'direction="{direction}"', allowed="noise", do=do)
    tokens = model.to_tokens(clean)
    if (rows := (len(tokens), len(corrupt.tokens))) != (1, 1):
        got = f"{rows[0]} prompts and a run of {rows[1]} rows"
        what, do = "one prompt can only take values from a run of one row", "run the corrupt prompt alone"
        raise error(PromptError, what, got=got, allowed="one each", do=do)
    if metric is None:
        return tokens, corrupt, answer_metric(model, answer, foil, [tokens[0]])
    return tokens, corrupt, metric_of(model, metric, [tokens[0]])


def _found(effects: Tensor, axes: Mapping[str, Sequence[str]], base: Tensor, metric: Metric, direction: str) -> Found:
    words, unit = metric_in_words(metric)
    start, given = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
    reading = READING.format(metric=words, start=start, given=given)
    return Found(
        {"effect": effects.double(), "base": float(base[0])},
        coords={name: list(labels) for name, labels in axes.items()},
        attrs={"metric": words, "direction": direction, "reading": reading}, units={"effect": unit, "base": unit},
    )  # fmt: skip
