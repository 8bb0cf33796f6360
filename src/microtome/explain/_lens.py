"""Lenses: what the model would predict if it ended after each layer, or if only one branch or head had spoken.

Formula:  logits_l = unembed(final_norm(m_l(x_l))), where x_l is resid_post_l, l = 0 .. L - 1, so that those of the last
          layer are the model's own, and l = -1 is the stream before the first layer, the embedding; or x_l is what a
          branch or a head of layer l writes, by itself.
          m_l is the identity (logit lens), or a map that was fitted: see `_fit_lens.py`.
          kl = KL(p_final || p_lens), at the token that is read ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from microtome.anatomy import Site
from microtome.errors import ArgumentError, PromptError, error
from microtome.explain._fit_lens import after_layer
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
OF = {"resid_post": "the stream after each layer", "resid_mid": "the stream between the branches of each layer",
      "attn_out": "what attention writes", "mlp_out": "what the MLP writes"}  # fmt: skip


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
    return _of_stream(model, _batch(model, prompt), "resid_post", None, top)


@question(
    "lens",
    command="lens",
    title="lens",
    question="What would the model predict from the stream after each layer, or from one branch or head alone?",
    columns=(
        *COLUMNS,
        Column("kl", "nats", "divergence of the model's own prediction from that of the lens", "logit_lens_kl",
               (0, None), PLACED, title="divergence from the model's own output"),
        Column("logit_lens_kl", "nats", "the same of the logit lens, of what the lens reads", range=(0, None),
               dims=PLACED),
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
    check="tests/laws/test_lenses.py, tests/laws/test_explain.py",
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
        Literal["resid_post", "resid_mid", "attn_out", "mlp_out"], Argument("what the plain lens reads")
    ] = "resid_post",
    fitted: Annotated[Lens | str | None, Argument("a lens of `fit_lens`, or the file of one")] = None,
    position: Annotated[int, Argument("where heads are read, counted from the end if negative", "positions")] = -1,
    top: Top = 1,
) -> Found:
    """Read the stream, branches or heads of every layer as logits, through a fitted lens if there is one.

    Of heads, every variable has the axes (layer, head) in place of (layer, pos). A lens that was fitted to predict the
    k-th token ahead is compared with what the model says k - 1 positions on, and the last k - 1 positions are left out.

    Raises:
        PromptError: the prompts have several lengths, or are too short for what is read ahead.
        SiteError: the stream cannot be read as logits, or the model has no such site.
        ArgumentError: the lens that was given is not of this kind, or there is none where one is needed.
        DataError: it is of another model, or its file cannot be read.
    """  # fmt: skip
    batch = _batch(model, prompt)
    held = _lens_of(model, kind, of, fitted)
    if kind == "heads":
        return _of_heads(model, batch, held, position, top)
    return _of_stream(model, batch, of, held, top, compared=True)


def _batch(model: Model, prompt: Any) -> Batch:
    batch = model.to_batch(prompt)
    if batch.padded:
        lengths = str(sorted(set(batch.lengths)))
        raise error(PromptError, "the lens reads prompts of one length", got=lengths, do="run them one by one")
    return batch


def _lens_of(model: Model, kind: str, of: str, fitted: Any) -> Lens | None:
    """The fitted lens of a call, if it has one.

    Raises:
        ArgumentError: there is none and must be one, or one of another kind than is asked for.
    """
    if of != "resid_post" and kind != "logit":
        do = "leave out of="
        raise error(ArgumentError, f"a lens of the kind {kind} has its own site", got=f"of={of!r}", do=do)
    if fitted is None:
        if kind in ("tuned", "ahead"):
            more = ", ahead=2" if kind == "ahead" else ""
            do = f"give fitted=mt.explain.fit_lens(model, text{more}), or its file"
            raise error(ArgumentError, f"a lens of the kind {kind} must be fitted first", do=do)
        return None
    held = fitted.require(model) if isinstance(fitted, Lens) else Lens.load(fitted, model)
    its = "heads" if held.kind == "heads" else "ahead" if held.ahead > 1 else "tuned"
    if its != kind:
        raise error(
            ArgumentError, "the lens that was given is of another kind", got=its, allowed=kind, do=f"kind={its!r}"
        )
    return held


def _of_stream(model: Model, batch: Batch, of: str, held: Lens | None, top: int, *, compared: bool = False) -> Found:
    """The lens over (layer, batch, pos), of the stream or of a branch."""
    n, late = model.anatomy.n_layers, 0 if held is None else held.ahead - 1
    length = batch.tokens.shape[1]
    if late >= length:
        got = f"{length} tokens"
        raise error(PromptError, f"the lens reads {late + 1} tokens ahead", got=got, allowed=f"over {late} tokens")
    if of == "resid_post":
        names = {i: after_layer(i, n) for i in range(-1, n)}
    else:
        names = {i: f"{i}.{of}" for i in range(n) if Site(of, i) in model.anatomy.hook_points}
    if held is not None:
        names = {i: name for i, name in names.items() if i in held.layers or (i == n - 1 and held.ahead == 1)}
    run = model.run(batch.tokens, capture=list(names.values()))
    own = run.logits[:, late:]
    place = slice(0, length - late)

    def read(layer: int) -> tuple[Tensor, Tensor]:
        x = run[names[layer]][:, place]
        if held is None:
            return x, x
        return x, held.apply(layer, x) if layer in held.layers else x.clone()

    found = _rows(model, read, list(names), own, top, compared=compared)
    words = [row[: length - late] for row in run.words]
    answer = [model.to_words(row) for row in own.argmax(-1)]
    coords = {
        "layer": ("layer", list(names), {"before": "embed"}), "pos": list(range(length - late)),
        "prompt": (("batch", "pos"), words), "answer": (("batch", "pos"), answer),
    }  # fmt: skip
    attrs = {"layers": "after each layer; -1 is the embedding"} if of == "resid_post" else {"layers": OF[of]}
    return Found(found, coords=coords, attrs=attrs | _said(held))


def _of_heads(model: Model, batch: Batch, held: Lens | None, position: int, top: int) -> Found:
    """The lens over (layer, head), at one position of one prompt."""
    if len(batch.tokens) > 1:
        raise error(PromptError, "the lens of heads reads one prompt", got=f"{len(batch.tokens)}", do="ask one by one")
    length = batch.tokens.shape[1]
    if not -length <= position < length:
        allowed = f"-{length} to {length - 1}"
        raise error(
            ArgumentError, "no such position in this prompt", got=position, allowed=allowed, do="choose another"
        )
    layers = [i for i in range(model.anatomy.n_layers) if Site("attn.result", i) in model.anatomy.hook_points]
    layers = layers if held is None else [i for i in layers if i in held.layers]
    run: Run = model.run(batch.tokens, capture=[f"{i}.attn.result@{position}" for i in layers])
    own = run.logits[:, position].unsqueeze(1)

    def read(layer: int) -> tuple[Tensor, Tensor]:
        x = run[f"{layer}.attn.result@{position}"][0, 0]  # [head, d_model]
        if held is None:
            x = x.unsqueeze(0)
            return x, x
        y = torch.stack([held.apply(layer, one, h) for h, one in enumerate(x)])
        return x.unsqueeze(0), y.unsqueeze(0)

    heads = model.anatomy.n_heads
    found = _rows(model, read, layers, own.expand(-1, heads, -1), top, compared=True)
    axes = {name: ("layer", "head", *(("rank",) if name in ("word", "token", "probability") else ())) for name in found}
    values = {name: (axes[name], _first(x)) for name, x in found.items()}
    word = model.to_words(own[0].argmax(-1))[0]
    attrs = {"layers": "what each head writes, by itself", "at": position, "answer": word} | _said(held)
    coords = {"layer": layers, "head": list(range(heads)), "prompt": ("pos", run.words[0])}
    return Found(values, coords=coords, attrs=attrs)


def _first(x: Any) -> Any:
    """The values of the only prompt."""
    return x[:, 0] if isinstance(x, Tensor) else [layer[0] for layer in x]


def _said(held: Lens | None) -> dict[str, Any]:
    if held is None:
        return {}
    said = f"{held.kind}, fitted on {held.attrs.get('tokens')} tokens of {held.attrs.get('text')}"
    return {"lens": said, "ahead": held.ahead}


def _rows(
    model: Model,
    read: Callable[[int], tuple[Tensor, Tensor]],
    layers: list[int],
    own: Tensor,
    top: int,
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
        compared: whether to add the divergence from those; where the two vectors differ, that of the first too.
    """
    rows: dict[str, list[Tensor]] = {}
    answer = own.argmax(-1, keepdim=True)
    with torch.no_grad():
        said = own.float().log_softmax(-1) if compared else own
        for layer in layers:
            plain, x = read(layer)
            log_p = model.unembed(x).float().log_softmax(-1)
            best, chance = log_p.topk(min(top, log_p.shape[-1]), dim=-1), log_p.gather(-1, answer)
            found = {
                "token": best.indices, "probability": best.values.exp(), "answer_probability": chance.exp().squeeze(-1),
                "answer_rank": (log_p > chance).sum(-1), "entropy": -(log_p.exp() * log_p).sum(-1),
            }  # fmt: skip
            if compared:
                found["kl"] = _kl(said, log_p)
            if compared and x is not plain:
                found["logit_lens_kl"] = _kl(said, model.unembed(plain).float().log_softmax(-1))
            for name, value in found.items():
                rows.setdefault(name, []).append(value)
    values: dict[str, Any] = {name: torch.stack(x).cpu() for name, x in rows.items()}
    ids = values["token"]
    words = {t: model.to_words([t])[0] for t in ids.unique().tolist()}
    return values | {"word": [[[[words[t] for t in p] for p in b] for b in layer] for layer in ids.tolist()]}


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) along the last axis."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)
