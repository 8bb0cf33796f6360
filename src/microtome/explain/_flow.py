"""Where information flows from on its way to one prediction: by token, and by route.

Formula:  Tokens (ALTI). T_q(k) = sum_h m[h, q <- k] + [q = k] x_q is what position k brings to y_q, the stream behind
          attention; near(q, k) = max(|y_q|_1 - |y_q - T_q(k)|_1, 0), share(q, k) = near(q, k) / sum_k near(q, k).
          C_l = share_l C_(l-1), C_(-1) = 1: its row at the position explained is `tokens`. MLPs mix no positions.
          ALTI-Logit: sum_k (sum_h m[h, q <- k] . u) C_(l-1)[k, :], u the direction of the answer as in `contributions`.
          Routes. A node is whole = sum of parts: behind attention, the messages m[h, q <- k] and the stream before it;
          behind the MLP, its output (or a_n w_out,n by neuron) and the stream before it. near_j = max(|whole|_1 -
          |whole - part_j|_1, 1e-5), c_j = near_j / sum near; what is at most `threshold` is dropped and the rest
          divided by its sum. From 1 at the end of the position explained, the share of a part is that of its node times
          c_j; what all parts bring to a position of the stream is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.context import current
from microtome.edit import Add
from microtome.errors import PromptError, error
from microtome.explain._answers import Answer, own_answer
from microtome.explain._contributions import contributions
from microtome.explain._messages import SEEN, Layer, Messages
from microtome.explain._neuron_writes import neuron_writes, refuse_hidden_neurons
from microtome.method import Argument, Column, Found, PromptText, Source, question, run_sweep
from microtome.metric import LogitDifference, LogProbability, Metric
from microtome.model import Model
from microtome.run import Run

FLOOR = 1e-5
"""The nearness that every part of a node has at least."""

PLACED = ("layer", "pos")
ONE_FLOW = "none: shares of one flow are compared with each other"
TERM = "none: the terms of a sum are compared with each other"


def nearness(
    whole: Float[Tensor, "*of d_model"], parts: Float[Tensor, "*of part d_model"], floor: float = 0.0
) -> Float[Tensor, "*of part"]:
    """How much nearer to a whole each part brings, in the sum of absolute differences, and at least `floor`."""
    gaps = (whole.unsqueeze(-2) - parts).abs().sum(-1, dtype=torch.float64)
    return (whole.abs().sum(-1, dtype=torch.float64).unsqueeze(-1) - gaps).clamp(min=floor)


def shares(
    whole: Float[Tensor, "*of d_model"], parts: Float[Tensor, "*of part d_model"], floor: float = 0.0
) -> Float[Tensor, "*of part"]:
    """The nearness of each part as a share of that of all; even where no part is nearer than nothing."""
    near = nearness(whole, parts, floor)
    total = near.sum(-1, keepdim=True)
    return torch.where(total > 0, near / total.clamp(min=torch.finfo(near.dtype).tiny), 1 / near.shape[-1])


def kept(share: Float[Tensor, " part"], threshold: float) -> Float[Tensor, " part"]:
    """Shares above a threshold, divided by their sum; all are 0 where none is above it."""
    large = torch.where(share > threshold, share, 0.0)
    total = float(large.sum())
    return large / total if total > 0 else large


@dataclass
class Flow:
    """What a walk back from one position has found.

    Attributes:
        stream: [layer + 1, pos] the share that is in the stream before each layer, the last behind all of them.
        mlp: [layer, pos] the share that goes through each MLP.
        heads: [layer, head] through each head.
        neurons: [layer, neuron] through each neuron; empty where MLPs are not split.
        routes: (layer, head, from, to) and its share.
        lost: the share of nodes of which no part is above the threshold.
    """

    stream: Float[Tensor, "layers pos"]
    mlp: Float[Tensor, "layer pos"]
    heads: Float[Tensor, "layer head"]
    neurons: Float[Tensor, "layer neuron"]
    routes: dict[tuple[int, int, int, int], float] = field(default_factory=dict[tuple[int, int, int, int], float])
    lost: float = 0.0


@question(
    "flow",
    command="flow",
    title="information flow",
    question="From which tokens, and by which routes, does information reach the prediction?",
    columns=(
        Column("tokens", "share", "share of each prompt token in the stream at the position explained, after each "
               "layer (ALTI)", "rollout", (0, 1), PLACED, title="tokens in the stream (ALTI)"),
        Column("rollout", "share", "the same from attention weights alone: half the mean head, half the token itself",
               range=(0, 1), dims=PLACED, title="attention rollout"),
        Column("token_logit", "logits", "what the attention of a layer adds to the logit, by prompt token (ALTI-Logit)",
               TERM, dims=PLACED, title="logit by token"),
        Column("mlp_logit", "logits", "what the MLP of a layer adds to the logit", TERM, dims=("layer",), title="MLP"),
        Column("embed", "logits", "what the embedding of the position's own token adds", TERM, dims=()),
        Column("constant", "logits", "what the biases of attention, of the final norm and of the unembedding add", TERM,
               dims=()),
        Column("logit", "logits", "the answer's logit, or its difference from the foil's, before any soft cap",
               "none: what the parts sum to", dims=()),
        Column("gap", "logits", "the logit minus the sum of all parts", "none: 0 up to rounding", dims=()),
        Column("stream", "share", "share of the flow that is in the stream before each layer, by position", ONE_FLOW,
               (0, 1), PLACED, title="routes: the stream"),
        Column("through_mlp", "share", "share of the flow that an MLP writes, by position", ONE_FLOW, (0, 1), PLACED,
               title="routes: through MLPs"),
        Column("heads", "share", "share of the flow that a head moves, summed over positions", ONE_FLOW, (0, 1),
               ("layer", "head"), title="routes: through heads"),
        Column("neurons", "share", "share of the flow that a neuron writes, summed over positions", ONE_FLOW, (0, 1),
               ("layer", "neuron"), title="routes: through neurons"),
        Column("route", "share", "share of the flow that a head moves from one position to another: the largest, and "
               "as many random others, which have 0", "none: random others are measured beside the largest", (0, 1),
               ("component",), title="routes, with the effect of each measured exactly"),
        Column("rank_correlation", "correlation", "between shares of routes and the size of their exact effects, of "
               "the largest and the random others", "none: 0 is chance", (-1, 1), ()),
    ),
    source=(
        Source("Ferrando et al.", "Explaining How Transformers Use Context to Build Predictions", 2023, "2305.12535",
               departs="the biases of attention stand apart; norms after a branch are included, with their "
               "scale held"),
        Source("Ferrando and Voita", "Information Flow Routes: Automatically Interpreting Language Models at Scale",
               2024, "2403.00824", departs="shares are multiplied along the way back; the default threshold is ours; "
               "effects of routes are measured"),
    ),
    cost="two forwards; T^2 H d_model additions per layer, of T tokens; and a sweep of 2 * verify cells",
    check="tests/laws/test_flow.py, tests/planted/test_flow.py",
    call='mt.explain.flow(model, "The capital of France is", answer=" Paris", foil=" Rome")',
    reading="Shares by token sum to 1 after each layer. A route is a head that moves something from one position to "
    "another; its effect is what the metric loses when exactly that is taken away.",
    needs=("sum", "lens", "heads", "attention and MLP", "attn.v", "final.scale"),
)  # fmt: skip
def flow(
    model: Model,
    prompt: PromptText,
    *,
    answer: Annotated[Answer | None, Argument("one token; by default the model's own", from_text=str)] = None,
    foil: Annotated[Answer | None, Argument("explain the difference to this token's logit", from_text=str)] = None,
    position: Annotated[int, Argument("position to explain, counted from the end of the prompt if negative")] = -1,
    threshold: Annotated[float, Argument("share of a node below which a part is dropped", "share", least=0, most=1)]
    = 0.01,
    neurons: Annotated[bool, Argument("split MLPs by neuron")] = False,
    verify: Annotated[int, Argument("how many routes to measure exactly, beside as many others", "routes", least=0)]
    = 20,
) -> Found:  # fmt: skip
    """From which tokens and by which routes information reaches one position.

    The effect of a route, `route_exact`, is the metric without its message minus the metric: below 0, the route helps.
    It is in logits where there is a foil, else in nats of the answer's log-probability.

    Raises:
        SiteError: the logits are not a sum over parts, or what heads and neurons add cannot be split so.
        PromptError: there are several prompts, there is no such position, or the answer or the foil does not fit.
    """
    tokens = model.to_batch(prompt).tokens
    if len(tokens) != 1:
        raise error(PromptError, "one prompt at a time", got=f"{len(tokens)}", do="call it once per prompt")
    length = tokens.shape[1]
    if not -length <= position < length:
        raise error(
            PromptError, f"the prompt has no position {position}", allowed=f"{-length} to {length - 1}", do="choose one"
        )
    at = position % length
    token, said = own_answer(model, tokens[0, : at + 1], None if answer is None else _one(answer))
    split = contributions(model, tokens, answer=token, foil=foil, position=at, detail=("source",)).isel(batch=0)
    if neurons:
        refuse_hidden_neurons(model)
    wanted = [*SEEN, "*.resid_pre", "*.attn_out", "*.mlp_out", *(["*.mlp.post"] if neurons else [])]
    run = model.run(tokens, capture=wanted)
    with torch.no_grad():
        mixing, rollout, found = _walk(model, run, at, threshold, neurons)
    logit = np.nan_to_num(split["attn_source"].values).sum(1)  # [layer, k_pos]
    before = torch.cat([torch.eye(length, dtype=torch.float64)[None], mixing[:-1]])
    metric = LogProbability(token, at) if foil is None else LogitDifference(token, at, foil=model.to_id(_one(foil)))
    values: dict[str, Any] = {
        "tokens": mixing[:, at], "rollout": rollout[:, at],
        "token_logit": torch.einsum("lk,lkp->lp", torch.from_numpy(logit), before), "mlp_logit": split["mlp"].values,
        "stream": found.stream[:-1], "through_mlp": found.mlp, "heads": found.heads,
    }  # fmt: skip
    values |= {name: float(split[name]) for name in ("logit", "embed")}
    values["constant"] = float(split["constant"]) + float(split["attn_bias"].sum())
    parts = float(values["token_logit"].sum()) + float(np.nansum(split["mlp"].values))
    values["gap"] = values["logit"] - parts - values["embed"] - values["constant"]
    values |= {"neurons": found.neurons} if neurons else {}
    routes, effects = _measured(model, run, found, at, metric, verify)
    values |= effects
    words = model.to_words(tokens[0])
    coords: dict[str, Any] = {"layer": list(range(model.anatomy.n_layers)), "token": ("pos", words)}
    coords |= {"component": [_named(route, words) for route in routes]} if routes else {}
    attrs = {name: split.attrs[name] for name in ("answer", "foil", "metric") if name in split.attrs}
    attrs |= {"position": at, "lost": found.lost, "routes": len(found.routes), "known": said["known"]}
    unit = "nats" if foil is None else "logits"
    return Found(values, coords=coords, attrs=attrs, units={"route_exact": unit} if routes else {})


def _one(answer: Answer) -> str | int:
    """The one token that is given, alone or in a list."""
    if isinstance(answer, str | int):
        return answer
    if len(answer) != 1:
        raise error(PromptError, "there must be one answer, and one foil", got=f"{len(answer)}", do="give one token")
    return answer[0]


def _walk(
    model: Model, run: Run, at: int, threshold: float, neurons: bool
) -> tuple[Float[Tensor, "layer pos pos"], Float[Tensor, "layer pos pos"], Flow]:
    """Shares of tokens after each layer by both mixings, forwards; and the routes, backwards."""
    a, length = model.anatomy, run.tokens.shape[1]
    messages, eye = Messages(model, run), torch.eye(length, dtype=torch.float64)
    by_token, rolled = [eye], [eye]
    for i in range(a.n_layers):
        layer, x, y = messages.layer(i), *_streams(run, i)
        mixed = torch.stack([_token_shares(layer, x, y, q) for q in range(length)])
        even = 0.5 * eye + 0.5 * layer.pattern.double().mean(0).cpu()
        by_token.append(mixed.cpu() @ by_token[-1])
        rolled.append(even / even.sum(1, keepdim=True) @ rolled[-1])
        current().report("mixing tokens", i + 1, a.n_layers)
    zeros = torch.zeros(a.n_layers + 1, length, dtype=torch.float64)
    found = Flow(zeros, zeros[1:].clone(), zeros.new_zeros(a.n_layers, a.n_heads), zeros.new_zeros(a.n_layers, a.d_mlp))
    found.stream[a.n_layers, at] = 1.0
    for i in reversed(range(a.n_layers)):
        _step_back(model, run, messages.layer(i), i, threshold, neurons, found)
        current().report("walking back", a.n_layers - i, a.n_layers)
    return torch.stack(by_token[1:]), torch.stack(rolled[1:]), found


def _streams(run: Run, i: int) -> tuple[Float[Tensor, "pos d_model"], Float[Tensor, "pos d_model"]]:
    """The stream before a layer, and behind its attention."""
    x = at_least_float32(run[f"{i}.resid_pre"][0])
    return x, x + run[f"{i}.attn_out"][0]


def _token_shares(
    layer: Layer, x: Float[Tensor, "pos d_model"], y: Float[Tensor, "pos d_model"], q: int
) -> Float[Tensor, " pos"]:
    """How much each position brings to one, of the stream behind attention."""
    parts = layer.to(q).sum(1)
    parts[q] += x[q]
    return shares(y[q], parts)


def _step_back(model: Model, run: Run, layer: Layer, i: int, threshold: float, neurons: bool, found: Flow) -> None:
    """One layer of the walk: from the stream behind it to the stream before it."""
    (x, y), out = _streams(run, i), run[f"{i}.mlp_out"][0]
    parallel = Site("resid_mid", i) not in model.anatomy.hook_points
    after, before = found.stream[i + 1], found.stream[i]
    middle = torch.zeros_like(after)
    for q in after.nonzero().flatten().tolist():
        size = float(after[q])
        parts = torch.cat(
            [y[q][None], neuron_writes(model, i, run[f"{i}.mlp.post"][0, q]) if neurons else out[q][None]]
        )
        c = kept(shares(y[q] + out[q], parts, FLOOR), threshold)
        found.lost += size * (1.0 - float(c.sum()))
        found.mlp[i, q] = size * float(c[1:].sum())
        if neurons:
            found.neurons[i, : len(c) - 1] += size * c[1:].cpu()
        middle[q] += size * float(c[0])
        (before if parallel else middle)[q] += found.mlp[i, q]
    for q in middle.nonzero().flatten().tolist():
        size, parts = float(middle[q]), layer.to(q)
        c = kept(shares(y[q], torch.cat([x[q][None], parts.flatten(0, 1)]), FLOOR), threshold)
        found.lost += size * (1.0 - float(c.sum()))
        before[q] += size * float(c[0])
        moved = (size * c[1:]).reshape(parts.shape[:2]).cpu()  # [k_pos, head]
        before += moved.sum(1)
        found.heads[i, : moved.shape[1]] += moved.sum(0)
        for k, head in moved.nonzero().tolist():
            found.routes[i, head, k, q] = float(moved[k, head])


Route = tuple[int, int, int, int]


def _measured(
    model: Model, run: Run, found: Flow, at: int, metric: Metric, verify: int
) -> tuple[list[Route], dict[str, Any]]:
    """The largest routes and as many random others, with their shares and what the metric loses without each."""
    from scipy.stats import spearmanr

    best = sorted(found.routes, key=lambda route: -found.routes[route])[:verify]
    chosen = [*best, *_others(model, found, at, len(best))]
    if not chosen:
        return [], {}
    messages = Messages(model, run)
    layers = {i: messages.layer(i) for i in {route[0] for route in chosen}}
    with torch.no_grad():
        cells = [Add(f"{i}.attn_out@{q}", -layers[i].to(q)[k, h]) for i, h, k, q in chosen]
    swept = run_sweep(model, run.tokens, cells, metric, stage="taking messages away").whole()
    effects, share = swept.effects.double().cpu(), [found.routes.get(route, 0.0) for route in chosen]
    values: dict[str, Any] = {"route": share, "route_exact": (("component",), effects)}
    varied = len(set(share)) > 1 and len(effects.unique()) > 1
    fit: Any = spearmanr(share, effects.abs().numpy()) if varied else None
    return chosen, values | {"rank_correlation": float("nan") if fit is None else float(fit.statistic)}


def _others(model: Model, found: Flow, at: int, count: int) -> list[Route]:
    """Messages that are on no route, drawn at random from those that can reach the position explained."""
    a, generator = model.anatomy, torch.Generator().manual_seed(current().seed)
    drawn: list[Route] = []
    for _ in range(20 * count):
        if len(drawn) == count:
            break
        i, h = (int(torch.randint(n, (), generator=generator)) for n in (a.n_layers, a.n_heads))
        q = int(torch.randint(at + 1, (), generator=generator)) if i < a.n_layers - 1 else at
        k = int(torch.randint(q + 1, (), generator=generator))
        if (i, h, k, q) not in found.routes and (i, h, k, q) not in drawn:
            drawn.append((i, h, k, q))
    return drawn


def _named(route: Route, words: Sequence[str]) -> str:
    """A route in words: "14.attn.z[3] @4 France > @7 is"."""
    i, h, k, q = route
    return f"{i}.attn.z[{h}] @{k}{words[k]} > @{q}{words[q]}"
