"""Which neurons raise an answer because of a head: what each adds to it, with the head and without.

Formula:  score(n) = log p(answer | x + w_n) - log p(answer | x), p = softmax(unembed(norm(.))), x the stream that the
          MLP of neuron n reads at the last position, and w_n = a_n w_out,n what the neuron adds there;
          change(n) = score(n) in the whole model - score(n) without the heads (their mix of values set to zero there),
          or - score(n) in a tuned copy of the model.
          The neurons of the largest mean change over the first half of the prompts are the chain, by layer; all else is
          measured on the second half. They are ablated together (w_n = 0 at the last
          position): loss = log p(answer) - log p(answer | ablated), beside as many random neurons of the same layers.
          Exact scores are those of the `screen` neurons a layer with the largest |k_n d_n . g - k'_n d_n . g'|, an
          estimate of the change, summed over prompts, with w_n = k_n d_n, g the gradient of log p(answer | x), and '
          without the heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.edit import SiteEdit, Zero
from microtome.errors import ArgumentError, DataError, PromptError, error
from microtome.explain._answers import answers_and_foils
from microtome.explain._head_rank import heads_of
from microtome.explain._neuron_writes import coefficients, directions, refuse_hidden_neurons
from microtome.explain._pairs import AnswerOfClean, Given, task_of
from microtome.method import Argument, Column, Found, Source, question, run_sweep
from microtome.metric import LogProbability
from microtome.model import Model
from microtome.run import Prompt, prompt_from_text

NEURON = ("layer", "neuron")
RANKED = ("component",)
AS_IS = "none: the baseline of the losses"


@question(
    "compare_neurons",
    command="compare-neurons",
    title="comparative neuron analysis",
    question="Which neurons raise an answer because of a head?",
    columns=(
        Column("change", "nats", "what a neuron adds to the answer's log-probability at its own stream, minus the same "
               "without the heads", "none: compare the neurons; 0 where nothing depends on the heads", dims=NEURON,
               title="neurons that need the heads"),
        Column("score", "nats", "what a neuron adds to the answer's log-probability at its own stream", "score_without",
               dims=NEURON, drawn=False),
        Column("score_without", "nats", "the same without the heads", dims=NEURON, drawn=False),
        Column("ranked", "nats", "the change of each neuron of the chain, on average over prompts",
               "none: they were chosen by it, on other prompts if there are any", dims=RANKED, title="the chain"),
        Column("alone", "nats", "log-probability of the answer that is lost when this neuron alone adds nothing",
               "alone_random", dims=RANKED),
        Column("alone_random", "nats", "the same for a random neuron of its layer", dims=RANKED),
        Column("loss", "nats", "log-probability of the answer that is lost without the whole chain", "loss_random",
               dims=(), test=True),
        Column("loss_random", "nats", "the same without as many random neurons of the same layers", dims=()),
        Column("text_loss", "nats", "rise of the mean next-token loss on plain text without the chain",
               "text_loss_random", dims=()),
        Column("text_loss_random", "nats", "the same without the random neurons", dims=()),
        Column("without", "nats", "log-probability of the answer that is lost without the heads, or by tuning", AS_IS,
               dims=()),
    ),
    source=(
        Source("Yu and Ananiadou",
               "Interpreting Arithmetic Mechanism in Large Language Models through Comparative Neuron Analysis", 2024,
               "2409.14144", departs="exact scores of neurons that an estimate has screened; random sets are ablated "
               "too"),
        Source("Zhang et al.", "Interpreting and Improving Large Language Models in Arithmetic Calculation", 2024,
               "2409.01659", departs="sets of neurons; the loss on plain text beside that of the answer"),
    ),
    cost="two forwards per prompt and their unembeddings by layer; screen x d_model x vocabulary per layer, and 2 "
    "screen x vocabulary per layer and prompt; then a sweep of 2 top + 1 + controls cells per prompt",
    check="tests/laws/test_compare_neurons.py, tests/planted/test_flow.py",
    call='mt.explain.compare_neurons(model, "The capital of France is", without="23.attn.z[4]", answer=" Paris")',
    reading="Above 0, a neuron raises the answer more with the heads than without them. The chain is worth something "
    "if it loses more than random neurons do, and little on plain text.",
    needs=("sum", "lens", "attn.z", "mlp.post", "attention and MLP", "next token"),
)  # fmt: skip
def compare_neurons(
    model: Model,
    prompts: Annotated[
        Given,
        Argument("prompts, a task, or a .csv or .jsonl file of pairs", positional=True, from_text=prompt_from_text),
    ],
    *,
    without: Annotated[str | Sequence[str] | None, Argument('heads that are switched off, such as "14.attn.z[3]"',
                                                            from_text=str)] = None,
    tuned: Annotated[Model | None, Argument("a tuned copy of the model to compare with instead", command=False)] = None,
    answer: AnswerOfClean = None,
    top: Annotated[int, Argument("how many neurons make the chain", "neurons", least=1)] = 20,
    screen: Annotated[int, Argument("neurons a layer that are scored exactly", "neurons", least=1)] = 128,
    controls: Annotated[int, Argument("how many random sets to ablate", "sets", least=1)] = 5,
    text: Annotated[Prompt | None, Argument("plain text to measure the loss on", from_text=prompt_from_text)] = None,
) -> Found:  # fmt: skip
    """Rank neurons by how much what they add to an answer depends on some heads, and ablate the best.

    The first half of the prompts chooses the chain, the others measure everything that is told; a single prompt does
    both. Neurons that are not scored, and those of layers before the heads, have NaN.

    Raises:
        ArgumentError: neither heads nor a tuned model are given, or both.
        SiteError: a name is not that of a head, or neurons are not seen.
        PromptError: there is no answer, or it does not fit.
        DataError: the tuned model is not one of the same family, shape and vocabulary.
    """
    refuse_hidden_neurons(model)
    if (without is None) == (tuned is None):
        got = "neither" if tuned is None else "both"
        raise error(ArgumentError, "give the heads to switch off, or a tuned model", got=got, do="give one of them")
    rows, ids = _asked(model, prompts, answer)
    heads = [] if without is None else heads_of(model, without)
    if tuned is not None:
        _require_copy(model, tuned)
    off = [Zero(f"{i}.attn.z[{h}]@-1") for i, h in heads]
    first, n = min((i for i, _ in heads), default=0), model.anatomy.n_layers
    whole = [_state(model, row, answer, [], first) for row, answer in zip(rows, ids, strict=True)]
    cut = [_state(tuned or model, row, answer, off, first) for row, answer in zip(rows, ids, strict=True)]
    chooses = max(1, len(rows) // 2)  # the others measure; a single prompt has to do both
    kept = slice(chooses % len(rows), None)
    shape = (len(rows), n, model.anatomy.d_mlp)
    scores = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name in ("score", "score_without")}
    with torch.no_grad():
        for i in range(first, n):
            chosen = _screened(model, tuned or model, i, whole[:chooses], cut[:chooses], screen)
            if tuned is None:
                both = _exact(model, i, chosen, whole + cut).split(len(rows))
            else:
                both = _exact(model, i, chosen, whole), _exact(tuned, i, chosen, cut)
            for name, found in zip(scores, both, strict=True):
                scores[name][:, i, chosen.cpu()] = found
            current().report("scoring neurons", i + 1 - first, n - first)
    change = scores["score"] - scores["score_without"]
    chain = _best(change[:chooses].mean(0), top)
    base = torch.tensor([state.log_p for state in whole], dtype=torch.float64)
    lost = base - torch.tensor([state.log_p for state in cut], dtype=torch.float64)
    each, drawn = _ablated(model, rows[kept], ids[kept], chain, controls)
    values = {} if text is None else _on_text(model, text, chain, drawn)
    mean = change[kept].mean(0)
    coords, attrs = _labels(model, chain, heads, len(rows), first)
    return Found(
        values | {"ranked": [float(mean[i, j]) for i, j in chain]},
        each={name: x[kept] for name, x in (scores | {"change": change, "without": lost}).items()} | each,
        coords=coords,
        attrs=attrs
        | {"chosen_on": chooses if kept.start else "the prompt that is measured, so that no p-value is known"},
    )


def _require_copy(model: Model, tuned: Model) -> None:
    """Refuse a tuned model of another family, shape or vocabulary.

    Raises:
        DataError: it is one.
    """
    for what in ("model_type", "n_layers", "d_model", "d_mlp", "d_vocab"):
        own, other = (getattr(m.anatomy, what) for m in (model, tuned))
        if own != other:
            got, do = f"{what} {other}", "give a tuned copy of the model"
            raise error(DataError, "the tuned model is no copy of this one", got=got, allowed=str(own), do=do)
    known = [None if m.tokenizer is None else m.tokenizer.get_vocab() for m in (model, tuned)]
    if None not in known and known[0] != known[1]:
        raise error(DataError, "the tuned model has another vocabulary", got=tuned.anatomy.name, do="give a tuned copy")


Neuron = tuple[int, int]


@dataclass(frozen=True)
class _State:
    """One prompt in one model: streams [layer, d_model], activations by layer, the gradient of the answer's lens."""

    streams: Float[Tensor, "layer d_model"]
    post: dict[int, Float[Tensor, " neuron"]]
    slopes: Float[Tensor, "layer d_model"]
    answer: int
    log_p: float


def _asked(model: Model, prompts: Given, answer: Any) -> tuple[list[Int[Tensor, " _"]], list[int]]:
    """The tokens of the prompts, and the answer of each.

    Raises:
        PromptError: there is none.
    """
    task = task_of(model, prompts)
    if task is not None:
        rows, given = [torch.tensor(row, device=model.device) for row in task.clean_tokens], answer
        given = [pair.answer_ids[0] for pair in task] if given is None else given
    else:
        rows, given = model.to_batch(prompts).rows, answer  # pyright: ignore[reportArgumentType]
    if given is None:
        raise error(PromptError, "there is nothing to read", do="give answer=")
    return rows, answers_and_foils(model, given, None, rows)[0]


def _state(model: Model, row: Int[Tensor, " pos"], answer: int, edits: Sequence[SiteEdit], first: int) -> _State:
    """What the neurons of a prompt from a layer on read and do at its last position."""
    n = model.anatomy.n_layers
    own = [_before_mlp(model, i) for i in range(n)]
    run = model.run(row[None], [*own, f"{first}-{n - 1}.mlp.post@-1"], edits)
    streams = torch.stack([run[name][0, 0] for name in own]).detach().float().requires_grad_(True)
    with torch.enable_grad():
        log_p = torch.stack([model.unembed(x.to(model.dtype)).float().log_softmax(-1)[answer] for x in streams])
        (slopes,) = torch.autograd.grad(log_p.sum(), streams)
    post = {i: run[f"{i}.mlp.post@-1"][0, 0] for i in range(first, n)}
    end = float(run.logits[0, -1].double().log_softmax(-1)[answer])
    return _State(streams.detach(), post, slopes, answer, end)


def _before_mlp(model: Model, layer: int) -> str:
    """The stream that an MLP reads: behind attention, or where both branches read one stream, before the layer."""
    name = "resid_mid" if Site("resid_mid", layer) in model.anatomy.hook_points else "resid_pre"
    return f"{layer}.{name}@-1"


def _screened(
    model: Model, other: Model, i: int, whole: list[_State], cut: list[_State], most: int
) -> Int[Tensor, " neuron"]:
    """The neurons of a layer of which the estimated change is largest, summed over prompts."""
    total = None
    for a, b in zip(whole, cut, strict=True):
        estimates = [
            coefficients(of, i, x.post[i]).float() * (directions(of, i).float() @ x.slopes[i])
            for of, x in ((model, a), (other, b))
        ]
        change = (estimates[0] - estimates[1]).abs()
        total = change if total is None else total + change
    assert total is not None
    return total.topk(min(most, len(total))).indices.sort().values


def _exact(
    model: Model, i: int, chosen: Int[Tensor, " neuron"], states: list[_State]
) -> Float[Tensor, "prompt neuron"]:
    """The scores of some neurons of a layer: logits of x + w_n are those of x and of w_n, over the new scale."""
    norm, a, w_u = model.require_readable(), model.anatomy, model.W_U.float()
    d = directions(model, i)[chosen].float()
    written = (norm.centre(d) * norm.gain) @ w_u  # [neuron, vocab]
    constant = 0.0 if norm.bias is None else norm.bias.float() @ w_u
    constant = constant if model.b_U is None else constant + model.b_U.float()

    def log_p(raw: Float[Tensor, "*of vocab"], scale: Float[Tensor, "*of"], answer: int) -> Float[Tensor, "*of"]:
        logits = (raw / scale.unsqueeze(-1) + constant) * a.logit_scale
        cap = a.logit_softcap
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        return (logits[..., answer] - logits.logsumexp(-1)).double()

    found: list[Tensor] = []
    for state in states:
        x, k = state.streams[i], coefficients(model, i, state.post[i])[chosen].float()
        raw = (norm.centre(x) * norm.gain) @ w_u
        after = log_p(raw + k.unsqueeze(1) * written, norm.scale(x + k.unsqueeze(1) * d), state.answer)
        found.append((after - log_p(raw, norm.scale(x), state.answer)).cpu())
    return torch.stack(found)


def _best(change: Float[Tensor, "layer neuron"], top: int) -> list[Neuron]:
    """The neurons of the largest change above 0, ordered by layer and then by change."""
    flat = change.flatten().nan_to_num(-torch.inf)
    order = flat.argsort(descending=True)[:top].tolist()
    kept = [divmod(i, change.shape[1]) for i in order if float(flat[i]) > 0]
    return sorted(kept, key=lambda unit: unit[0])


def _ablated(
    model: Model, rows: list[Int[Tensor, " _"]], ids: list[int], chain: list[Neuron], controls: int
) -> tuple[dict[str, Tensor], list[list[Neuron]]]:
    """What answers lose without the chain, without each of its neurons, and without random ones; and which."""
    if not chain:
        return {}, []
    generator = torch.Generator().manual_seed(current().seed)
    sizes = {i: model.anatomy.units(Site("mlp.post", i)) for i, _ in chain}
    drawn: list[list[Neuron]] = []
    for _ in range(controls):
        some: list[Neuron] = []
        for i, _n in chain:
            free = [j for j in range(sizes[i]) if (i, j) not in chain and (i, j) not in some]
            if free:
                some.append((i, free[int(torch.randint(len(free), (), generator=generator))]))
        drawn.append(some)
    sets = [chain, *drawn, *([unit] for unit in chain), *([unit] for unit in drawn[0])]
    cells = [_silent(some, "@-1") for _ in rows for some in sets]
    which = [e for e in range(len(rows)) for _ in sets]
    swept = run_sweep(model, rows, cells, LogProbability(ids), prompts=which, stage="ablating neurons").whole()
    lost = -swept.effects.double().cpu().reshape(len(rows), len(sets))
    n, single = len(chain), 1 + controls
    each = {"loss": lost[:, 0], "loss_random": lost[:, 1:single].mean(1), "alone": lost[:, single : single + n]}
    each |= {"alone_random": lost[:, single + n :]} if len(drawn[0]) == n else {}
    return each, drawn


def _silent(some: Sequence[Neuron], at: str) -> list[Zero]:
    """Edits under which some neurons add nothing, one a layer."""
    layers = {i: ",".join(str(j) for k, j in some if k == i) for i in sorted({i for i, _ in some})}
    return [Zero(f"{i}.mlp.post[{units}]{at}") for i, units in layers.items()]


def _on_text(model: Model, text: Prompt, chain: list[Neuron], drawn: list[list[Neuron]]) -> dict[str, float]:
    """What neurons that add nothing anywhere cost on plain text, in nats a token."""
    rows = model.to_batch(text).rows
    if not chain:
        return {}

    def loss(some: Sequence[Neuron]) -> float:
        total, count = 0.0, 0
        for row in rows:
            log_p = model.run(row[None], edits=_silent(some, "")).logits[0, :-1].double().log_softmax(-1)
            total -= float(log_p.gather(1, row[1:, None]).sum())
            count += len(row) - 1
        return total / count

    with torch.no_grad():
        base = loss([])
        random = sum(loss(some) for some in drawn) / len(drawn)
        return {"text_loss": loss(chain) - base, "text_loss_random": random - base}


def _labels(
    model: Model, chain: list[Neuron], heads: Sequence[tuple[int, int]], prompts: int, first: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Coordinates and attributes: each neuron of the chain by address, with the tokens that it raises most."""
    norm = model.require_readable()
    coords: dict[str, Any] = {"layer": list(range(model.anatomy.n_layers))}
    if chain:
        with torch.no_grad():
            raised = [(norm.centre(directions(model, i)[j]) * norm.gain).to(model.W_U) @ model.W_U for i, j in chain]
        coords["component"] = [f"{i}.mlp.post[{j}]" for i, j in chain]
        coords["raises"] = ("component", [" ".join(model.to_words(x.topk(min(5, len(x))).indices)) for x in raised])
    attrs = {"heads": [f"{i}.attn.z[{h}]" for i, h in heads], "prompts": prompts, "first_layer": first}
    return coords, attrs
