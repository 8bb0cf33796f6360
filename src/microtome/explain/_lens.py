"""Lenses: what the model would predict if it ended after each layer, or from one branch, head or neuron alone.

Formula:  logits_l = unembed(final_norm(m_l(x_l))), where x_l is resid_post_l, l = 0 .. L - 1, so that those of the last
          layer are the model's own, and l = -1 is the stream before the first layer, the embedding; or x_l is what a
          branch or a head of layer l writes, or a row of its MLP's weights, by itself: see `_lens_reads.py`.
          m_l is the identity (logit lens), or a map that was fitted: see `_fit_lens.py`.
          kl = KL(p_final || p_lens), at the token that is read ahead.
          answer_logit: with the final norm's divisor held at that of the run, so that those of the embedding, of all
          branches and of the biases sum to the model's logit, and those of heads to that of their branch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from microtome.errors import ArgumentError, PromptError, error
from microtome.explain._fit_lens import after_layer
from microtome.explain._lens_reads import HEADS, ROWS, Part, Reading, chosen_rows, head_writes, part_of
from microtome.explain._lens_value import Lens
from microtome.method import Argument, Column, Found, PromptText, Source, question
from microtome.model import Model
from microtome.run import Batch, Run

PLACED = ("layer", "batch", "pos")
LAST = "none: the last layer gives the model's own output"
NOSTALGEBRAIST = Source("nostalgebraist", "interpreting GPT: the logit lens", 2020)
READING = (
    "Each cell is the token predicted from the stream after a layer, its resid_post; embed is the stream before the "
    "first layer, and the last layer's row is the model's output."
)
Top = Annotated[int, Argument("tokens per position", "tokens", least=1)]
STREAM = Part("resid_post")


def _number(name: str, unit: str, meaning: str, *extra: str) -> Column:
    return Column(name, unit, meaning, LAST, dims=(*PLACED, *extra), drawn=False)


COLUMNS = (
    Column(
        "word", "token", "the most likely tokens, as text", LAST, dims=(*PLACED, "rank"), shade="probability",
        title="top tokens",
    ),
    _number("token", "token", "the most likely tokens, by id", "rank"),
    _number("probability", "probability", "probability of the most likely tokens", "rank"),
    _number("answer_probability", "probability", "probability of the model's own answer"),
    _number("answer_rank", "tokens", "how many tokens outrank the model's own answer"),
    _number("entropy", "nats", "entropy of the predicted distribution"),
)  # fmt: skip


@question(
    "logit_lens",
    title="logit lens",
    question="What would the model predict if it ended after each layer?",
    columns=COLUMNS,
    source=NOSTALGEBRAIST,
    cost="one forward, and L + 1 unembeddings of every position",
    check="tests/laws/test_explain.py",
    call='mt.explain.logit_lens(model, "The capital of France is")',
    reading=READING,
    needs=("lens",),
)
def logit_lens(model: Model, prompt: PromptText, *, top: Top = 1) -> Found:
    """Read the residual stream after every layer as logits.

    Raises:
        PromptError: the prompts have several lengths.
        SiteError: the stream cannot be read as logits.
    """
    return _of_stream(model, _batch(model, prompt), STREAM, None, top)


@question(
    "lens",
    command="lens",
    title="lens",
    question="What would the model predict from the stream after each layer, or from one branch, head or neuron alone?",
    columns=(
        *COLUMNS,
        Column("kl", "nats", "divergence of the model's own prediction from that of the lens", "logit_lens_kl",
               (0, None), PLACED, title="divergence from the model's own output"),
        Column("logit_lens_kl", "nats", "the same of the logit lens, of what the lens reads", range=(0, None),
               dims=PLACED),
        Column("answer_logit", "logits", "logit of the model's own answer before any cap, with the final norm's "
               "divisor held at that of the run; the biases of norm and unembedding count to a whole stream alone",
               "none: the parts of the stream sum to the whole", dims=PLACED, drawn=False),
    ),
    source=(
        NOSTALGEBRAIST,
        Source("Belrose et al.", "Eliciting Latent Predictions from Transformers with the Tuned Lens", 2023,
               "2303.08112"),
        Source(
            "Sakarvadia et al.",
            "Attention Lens: A Tool for Mechanistically Interpreting the Attention Head Information Retrieval "
            "Mechanism", 2023, "2310.16270", departs="a map of low rank into the stream, read by the model's own "
            "unembedding, in place of a map to the vocabulary",
        ),
        Source(
            "Vilas et al.", "Analyzing Vision Transformers for Image Classification in Class Embedding Space", 2023,
            "2310.18969", departs="a language model and its unembedding; of branches too",
        ),
    ),
    cost="one forward, and L + 1 unembeddings of every position (of heads: of one position, H L)",
    check="tests/laws/test_lenses.py, tests/laws/test_lens_reads.py, tests/laws/test_explain.py",
    call='mt.explain.lens(model, "The capital of France is")',
    reading="Each cell is the token predicted from what the lens reads at a layer; of the stream, embed is what enters "
    "the first layer, and the last layer's row is the model's output.",
    needs=("lens", "next token"),
)  # fmt: skip
def lens(
    model: Model,
    prompt: PromptText,
    *,
    kind: Annotated[
        Literal["logit", "tuned", "heads", "ahead"],
        Argument(
            "which lens: the plain one; a fitted one; of each head, at one position; a fitted one that predicts a "
            "token further ahead"
        ),
    ] = "logit",
    of: Annotated[
        str,
        Argument(
            "what the plain lens reads: resid_post, resid_mid, attn_out, mlp_out, mixer_out; attn.z, each head at one "
            "position, or attn.z[3], one head at all; or rows of weights, such as W_in[431] or W_out[0-9]"
        ),
    ] = "resid_post",
    lens: Annotated[Lens | str | None, Argument("a lens of `fit_lens`, or the file of one", from_text=str)] = None,
    scale: Annotated[
        Literal["own", "run"], Argument("the divisor of the final norm: that of each vector, or that of the run")
    ] = "own",
    position: Annotated[
        int, Argument("where heads are read and rows are compared, from the end if negative", "positions")
    ] = -1,
    top: Top = 1,
) -> Found:
    """Read the stream, branches, heads or neurons of every layer as logits, through a fitted lens if there is one.

    Of heads, every variable has the axes (layer, head) in place of (layer, pos), of rows (layer, neuron). A lens that
    was fitted to predict the k-th token ahead is compared with what the model says k - 1 positions on, and the last
    k - 1 positions are left out; with ``scale="run"`` its divisor is that of the position k - 1 on, too.

    Raises:
        PromptError: the prompts have several lengths, or are too short for what is read ahead.
        SiteError: the stream cannot be read as logits, or the model has no such site or matrix.
        ArgumentError: a lens reads no such part; the lens that was given is not of this kind, or there is none where
            one is needed.
        DataError: it is of another model, or its file cannot be read.
    """  # fmt: skip
    batch, part = _batch(model, prompt), part_of(model, of)
    held = _lens_of(model, kind, part, lens)
    if kind == "heads" or part == Part(HEADS):
        return _of_units(model, batch, Part(HEADS), held, position, top, scale == "run")
    if part.name in ROWS:
        return _of_units(model, batch, part, held, position, top, scale == "run")
    return _of_stream(model, batch, part, held, top, compared=True, fixed=scale == "run")


def _batch(model: Model, prompt: Any) -> Batch:
    batch = model.to_batch(prompt)
    if batch.padded:
        lengths = str(sorted(set(batch.lengths)))
        raise error(PromptError, "the lens reads prompts of one length", got=lengths, do="run them one by one")
    return batch


def _lens_of(model: Model, kind: str, part: Part, given: Any) -> Lens | None:
    """The fitted lens of a call, if it has one.

    Raises:
        ArgumentError: there is none and must be one, or one of another kind than is asked for.
    """
    if part != STREAM and kind != "logit" and (kind, part) != ("heads", Part(HEADS)):
        do = "leave out of="
        raise error(ArgumentError, f"a lens of the kind {kind} has its own site", got=f"of={part.name!r}", do=do)
    if given is None:
        if kind in ("tuned", "ahead"):
            more = ", ahead=2" if kind == "ahead" else ""
            do = f"give lens=mt.explain.fit_lens(model, text{more}), or its file"
            raise error(ArgumentError, f"a lens of the kind {kind} must be fitted first", do=do)
        return None
    held = given.require(model) if isinstance(given, Lens) else Lens.load(given, model)
    its = "heads" if held.kind == "heads" else "ahead" if held.ahead > 1 else "tuned"
    if its != kind:
        raise error(
            ArgumentError, "the lens that was given is of another kind", got=its, allowed=kind, do=f"kind={its!r}"
        )
    return held


def _of_stream(
    model: Model, batch: Batch, part: Part, held: Lens | None, top: int, *, compared: bool = False, fixed: bool = False
) -> Found:
    """The lens over (layer, batch, pos), of the stream, of a branch, or of one head."""
    n, late = model.anatomy.n_layers, 0 if held is None else held.ahead - 1
    length = batch.tokens.shape[1]
    if late >= length:
        got = f"{length} tokens"
        raise error(PromptError, f"the lens reads {late + 1} tokens ahead", got=got, allowed=f"over {late} tokens")
    if part == STREAM:
        names = {i: after_layer(i, n) for i in range(-1, n)}
    else:
        site = "attn.result" if part.name == HEADS else part.name
        names = {i: f"{i}.{site}" for i in part.layers(model)}
    if held is not None:
        names = {i: name for i, name in names.items() if i in held.layers or (i == n - 1 and held.ahead == 1)}
    run = model.run(batch.tokens, capture=[*names.values(), after_layer(n - 1, n)])
    own, place = run.logits[:, late:], slice(0, length - late)
    divisor = model.require_readable().scale(run[after_layer(n - 1, n)])[:, late:].detach()
    reading = Reading(model, divisor, fixed, part.whole)

    def read(layer: int) -> tuple[Tensor, Tensor]:
        x = run[names[layer]][:, place]
        if part.name == HEADS:
            x = head_writes(model, layer, x)[:, :, part.units[0]]
        if held is None:
            return x, x
        return x, held.apply(layer, x) if layer in held.layers else x.clone()

    found = _rows(model, read, list(names), own, top, reading if compared else Reading(model, divisor, False, True),
                  compared=compared)  # fmt: skip
    words = [row[: length - late] for row in run.words]
    answer = [model.to_words(row) for row in own.argmax(-1)]
    coords = {
        "layer": ("layer", list(names), {"before": "embed"}), "pos": list(range(length - late)),
        "prompt": (("batch", "pos"), words), "answer": (("batch", "pos"), answer),
    }  # fmt: skip
    attrs = {"layers": "after each layer; -1 is the embedding" if part == STREAM else part.meaning}
    return Found(found, coords=coords, attrs=attrs | _fitted(held))


def _of_units(
    model: Model, batch: Batch, part: Part, held: Lens | None, position: int, top: int, fixed: bool
) -> Found:  # fmt: skip
    """The lens over (layer, head) or (layer, neuron), at one position of one prompt."""
    of_heads, length = part.name == HEADS, batch.tokens.shape[1]
    kind = "heads" if of_heads else "rows"
    if len(batch.tokens) > 1:
        raise error(
            PromptError, f"the lens of {kind} reads one prompt", got=f"{len(batch.tokens)}", do="ask one by one"
        )
    if not -length <= position < length:
        allowed = f"-{length} to {length - 1}"
        raise error(
            ArgumentError, "no such position in this prompt", got=position, allowed=allowed, do="choose another"
        )
    n = model.anatomy.n_layers
    layers = [i for i in part.layers(model) if held is None or i in held.layers]
    names = [f"{i}.attn.result@{position}" for i in layers] if of_heads else []
    last = f"{n - 1}.resid_post@{position}"
    run: Run = model.run(batch.tokens, capture=[*names, last])
    units = list(range(model.anatomy.n_heads)) if of_heads else list(part.units)
    own = run.logits[:, position].unsqueeze(1).expand(-1, len(units), -1)
    divisor = model.require_readable().scale(run[last]).detach().expand(-1, len(units))

    def read(layer: int) -> tuple[Tensor, Tensor]:
        if of_heads:
            x = head_writes(model, layer, run[f"{layer}.attn.result@{position}"][:, 0])  # [1, head, d_model]
        else:
            x = chosen_rows(model, layer, part).unsqueeze(0)
        if held is None:
            return x, x
        return x, torch.stack([held.apply(layer, one, h) for h, one in enumerate(x[0])]).unsqueeze(0)

    reading = Reading(model, divisor, fixed, False)
    found = _rows(model, read, layers, own, top, reading, compared=True)
    axis = "head" if of_heads else "neuron"
    ranked = ("word", "token", "probability")
    values = {name: (("layer", axis, *(("rank",) if name in ranked else ())), _first(x)) for name, x in found.items()}
    word = model.to_words(own[0, :1].argmax(-1))[0]
    attrs = {"layers": part.meaning, "at": position, "answer": word} | _fitted(held)
    coords = {"layer": layers, axis: units, "prompt": ("pos", run.words[0])}
    return Found(values, coords=coords, attrs=attrs)


def _first(x: Any) -> Any:
    """The values of the only prompt."""
    return x[:, 0] if isinstance(x, Tensor) else [layer[0] for layer in x]


def _fitted(held: Lens | None) -> dict[str, Any]:
    if held is None:
        return {}
    text = f"{held.kind}, fitted on {held.attrs.get('tokens')} tokens of {held.attrs.get('text')}"
    return {"lens": text, "ahead": held.ahead}


def _rows(
    model: Model,
    read: Callable[[int], tuple[Tensor, Tensor]],
    layers: list[int],
    own: Tensor,
    top: int,
    reading: Reading,
    *,
    compared: bool,
) -> dict[str, Any]:
    """By column: what the lens predicts at each layer, beside the model's own logits [batch, pos, vocab].

    Args:
        model: the model.
        read: of a layer, the vectors [batch, pos, d_model] that it has, and those that the unembedding is to read.
        layers: in their order.
        own: the logits that they are compared with.
        top: tokens a cell.
        reading: how vectors become logits.
        compared: whether to add the answer's logit with the divisor held, and the divergence from the model's own;
            where the two vectors differ, that of the first too.
    """
    rows: dict[str, list[Tensor]] = {}
    answer = own.argmax(-1, keepdim=True)
    with torch.no_grad():
        final = own.float().log_softmax(-1) if compared else own
        for layer in layers:
            plain, x = read(layer)
            log_p = reading.logits(x).float().log_softmax(-1)
            best, chance = log_p.topk(min(top, log_p.shape[-1]), dim=-1), log_p.gather(-1, answer)
            found = {
                "token": best.indices, "probability": best.values.exp(), "answer_probability": chance.exp().squeeze(-1),
                "answer_rank": (log_p > chance).sum(-1), "entropy": -(log_p.exp() * log_p).sum(-1),
            }  # fmt: skip
            if compared:
                found["kl"] = _kl(final, log_p)
                found["answer_logit"] = reading.of_tokens(x, answer.squeeze(-1))
            if compared and x is not plain:
                found["logit_lens_kl"] = _kl(final, reading.logits(plain).float().log_softmax(-1))
            for name, value in found.items():
                rows.setdefault(name, []).append(value)
    values: dict[str, Any] = {name: torch.stack(x).cpu() for name, x in rows.items()}
    ids = values["token"]
    words = {t: model.to_words([t])[0] for t in ids.unique().tolist()}
    return values | {"word": [[[[words[t] for t in p] for p in b] for b in layer] for layer in ids.tolist()]}


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) along the last axis."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)
