"""The token lens: what attention from some tokens promotes and suppresses, and what MLPs make of it.

Formula:  update_l = sum over heads h and positions k of the span of m[h, q <- k], of layer l at the position q read;
          logit_l(t) = update_l . u_t, u_t = centre(gain * W_U[:, t]) / scale, the final norm's scale held at its value;
          the same of all other positions and of the biases; the three sum to the logit of attn_out.
          MLPs: mlp_out_l . u_t in this run, and in one where q cannot attend to the span in any layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.edit import KnockOut
from microtome.errors import PromptError, error
from microtome.explain._messages import SEEN, Messages, refuse_gated_heads
from microtome.explain._spans import one_prompt, one_row, span_of
from microtome.method import Argument, Column, Found, PromptText, Source, Span, question, span_from_text
from microtome.model import Model
from microtome.run import Run

READ = ("layer", "answer")
TERM = "none: the terms of a sum are compared with each other"
WHOLE = "none: what span, others and bias sum to"


def _number(name: str, meaning: str, control: str, title: str) -> Column:
    return Column(name, "logits", meaning, control, dims=READ, title=title)


def _words(name: str, meaning: str) -> Column:
    return Column(name, "token", meaning, "none: the words of one update", dims=("layer", "rank"))


@question(
    "token_lens",
    title="token lens",
    question="Which answers does attention from some tokens promote or suppress, and what do MLPs make of it?",
    columns=(
        _number("span", "what all heads move from the span adds to an answer's logit", TERM, "attention from the span"),
        _number("others", "what all heads move from other positions adds", TERM, "attention from other positions"),
        _number("bias", "what the biases of attention add", TERM, "attention bias"),
        _number("attn", "what attention adds", WHOLE, "attention"),
        _number("mlp", "what the MLP adds", "mlp_cut", "MLP"),
        _number("mlp_cut", "what the MLP adds where the position cannot attend to the span", "", "MLP, span cut"),
        _words("promoted", "the tokens that the update from the span raises most"),
        _words("suppressed", "the tokens that the update from the span lowers most"),
    ),
    source=Source(
        "Yan and Jia", "Promote, Suppress, Iterate: How Language Models Answer One-to-Many Factual Queries", 2025,
        "2502.20475",
        departs="the final norm's scale is held, so that the parts of attention sum to its logit",
    ),
    cost="two forwards, and 2 L unembeddings of one position",
    check="tests/laws/test_token_lens.py",
    call='mt.explain.token_lens(model, "The capital of France is", span="France", answers=[" Paris", " Rome"])',
    reading="Above 0, what reaches the position raises that answer. `mlp_diff` is what the MLP adds because the "
    "position could attend to the span.",
    needs=("sum", "lens", "heads", "attention and MLP", "attn.scores", "final.scale"),
)  # fmt: skip
def token_lens(
    model: Model,
    prompt: PromptText,
    *,
    span: Annotated[Span, Argument("the tokens that are read: a text in the prompt, or positions",
                                   from_text=span_from_text)],
    answers: Annotated[
        str | int | Sequence[str | int] | None,
        Argument("tokens whose logits are read; by default the model's own first five", command=False),
    ] = None,
    position: Annotated[int, Argument("position to explain, counted from the end of the prompt if negative")] = -1,
    top: Annotated[int, Argument("how many tokens to name as promoted and suppressed", "tokens", least=1)] = 5,
) -> Found:  # fmt: skip
    """What attention from a span promotes and suppresses at one position, layer by layer.

    Raises:
        PromptError: the span is not in the prompt or not before the position, or an answer is not one token.
        SiteError: what heads add is no sum over positions, or logits are no sum over parts.
    """
    refuse_gated_heads(model, "what heads add")
    tokens, text = one_row(model.to_batch(prompt).tokens), one_prompt(model, prompt)
    q, _ = span_of(model, text, position, "position")
    first, end = span_of(model, text, span, "span")
    if first > q and model.anatomy.causal:
        what = "the position cannot attend to the span"
        raise error(PromptError, what, got=f"position {q}, span from {first}", do="name tokens before it")
    keys = f"{first}-{end - 1}"
    wanted = [f"*.attn_out@{q}", f"*.mlp_out@{q}"]
    run = model.run(tokens[None], capture=[*SEEN, *wanted, f"final.scale@{q}"])
    cut = model.run(tokens[None], capture=wanted[1:], edits=KnockOut(f"*.attn.scores@{q}", keys=keys), logits=False)
    own = run.logits[0, q].topk(min(5, run.logits.shape[-1])).indices.tolist()
    listed: Any = [answers] if isinstance(answers, str) or not isinstance(answers, Sequence) else answers
    ids = own if answers is None else [model.to_id(a) for a in listed]
    with torch.no_grad():
        values = _layers(model, run, cut, q, slice(first, end), ids, top)
    words = model.to_words(tokens)
    coords: dict[str, Any] = {"layer": list(range(model.anatomy.n_layers)), "answer": model.to_words(ids)}
    coords |= {"token": ("pos", words), "subject": ("pos", [first <= p < end for p in range(len(words))])}
    return Found(values, coords=coords, attrs={"span": model.to_text(tokens[first:end]), "position": q})


def _layers(
    model: Model, run: Run, cut: Run, q: int, span: slice, ids: list[int], top: int
) -> dict[str, Tensor | list[list[str]]]:
    """The columns, layer by layer."""
    norm, scale = model.require_readable(), run[f"final.scale@{q}"][0, 0].double()

    def read(x: Float[Tensor, " d_model"], of: list[int] | None = None) -> Float[Tensor, " token"]:
        """The logits of a part of the stream, of some tokens or of all."""
        y = norm.centre(x.double()) / scale * norm.gain
        w = model.W_U if of is None else model.W_U[:, of]
        return (y @ w.double() if of is not None else (y.to(w.dtype) @ w).double()) * model.anatomy.logit_scale

    rows: dict[str, list[Tensor]] = {}
    words: dict[str, list[list[str]]] = {"promoted": [], "suppressed": []}
    messages = Messages(model, run)
    for i in range(model.anatomy.n_layers):
        moved, whole = messages.layer(i).to(q).double().sum(1), run[f"{i}.attn_out@{q}"][0, 0]
        update = moved[span].sum(0)
        attn, here, all_of = read(whole, ids), read(update, ids), read(moved.sum(0), ids)
        found = {"span": here, "others": all_of - here, "attn": attn, "bias": attn - all_of}
        found |= {name: read(r[f"{i}.mlp_out@{q}"][0, 0], ids) for name, r in (("mlp", run), ("mlp_cut", cut))}
        for name, x in found.items():
            rows.setdefault(name, []).append(x)
        logits = read(update)
        for name, sign in (("promoted", 1), ("suppressed", -1)):
            words[name].append(model.to_words((sign * logits).topk(min(top, len(logits))).indices))
    return {name: torch.stack(x) for name, x in rows.items()} | words
