"""A prediction as a sum of linear maps of its tokens: what is left of the model when its non-linear parts are held.

Formula:  with the divisors of norms, the attention patterns and act(gate) held at their values in this run,
          y = sum_t J_t x_t + c, where y is the last stream at one position, centred and divided as the final norm does
          and without its gain, x_t is the stream of token t that enters the first layer (or another), J_t [d_model,
          d_model] = dy/dx_t, and c is what biases add: 0 without any. J_t = sum_k s_k u_k v_k^T (SVD): u_k is read
          through the unembedding, v_k through the embedding.
          share_t = (J_t x_t) . y / |y|^2, and that of c; they sum to 1 (the sharing ratio: a part's share is its
          projection on the sum).
          effective rank = exp of the entropy of s / sum(s).
Cost:     one forward; d_model gradients of the whole model, `TOGETHER` at a time, and an SVD a token; a sweep of as
          many cells as tokens.
Check:    the sum is the output to rounding where there are no biases; the matrix of a network that is linear;
          tests/laws/test_linear_map.py.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.context import current
from microtome.edit import Freeze, Zero
from microtome.errors import SiteError, error
from microtome.explain._one_prompt import asked, beside
from microtome.method import AnswerToken, Argument, Column, Found, PromptText, Source, question, run_sweep
from microtome.metric import FunctionMetric
from microtome.model import Model
from microtome.run import Run

TOGETHER = 32
"""Gradients that are drawn back together."""
PROBED = 32
"""Coordinates of y of which the ordinary Jacobian is taken, as a control."""
WORDS = 3
HELD = Freeze(norms=True, patterns=True, activations=True)


@question(
    "linear_map",
    command="linear",
    title="locally linear map",
    question="Which token contributed what to a prediction, as a sum of linear maps of the tokens' embeddings?",
    columns=(
        Column("share", "share", "part of what the unembedding reads that came from this token: its projection on the "
               "sum, as a share", "none: with that of biases they sum to 1", dims=("pos",)),
        Column("logit", "logits", "contribution of this token to the logit of the answer, before a final cap if there "
               "is one", "gradient", dims=("pos",)),
        Column("gradient", "logits", "the plain gradient of that logit times the token's stream, which does not add up",
               dims=("pos",)),
        Column("deletion", "logits", "how much the same logit falls when what this token brings is zeroed, "
               "exactly", "none: the truth that contributions stand beside", dims=("pos",)),
        Column("effective_rank", "directions", "effective rank of the token's map", "effective_rank_random",
               (1, None), dims=("pos",)),
        Column("effective_rank_random", "directions", "that of a random matrix of the same size", range=(1, None),
               dims=()),
        Column("singular", "1", "size of a direction of a token's map: its singular value", "none: see the rank",
               (0, None), dims=("component",)),
        Column("writes", "token", "tokens that the direction promotes, as text", "none: words", dims=("component",)),
        Column("reads", "token", "tokens whose embeddings it reads most, as text", "none: words", dims=("component",)),
        Column("constant", "share", "share of the output that biases add", "none: 0 without biases", dims=()),
        Column("error", "share", "what the maps leave of the output, |y - sum J x| / |y|: biases and rounding",
               "error_plain", (0, None), dims=()),
        Column("error_plain", "share", "the same for the ordinary Jacobian, over some coordinates",
               range=(0, None), dims=()),
        Column("rank_correlation", "correlation", "between the contributions to the logit and the deletions",
               "rank_correlation_plain", (-1, 1), dims=()),
        Column("rank_correlation_plain", "correlation", "the same for gradient times input", range=(-1, 1), dims=()),
    ),
    source=(
        Source(
            "Golden", "Large Language Models are Locally Linear Mappings", 2025, "2505.24293",
            departs="parts are held by an edit, not by the train flag; contributions stand beside deletions",
        ),
        Source(
            "Han et al.",
            "Respect the model: Fine-grained and Robust Explanation with Sharing Ratio Decomposition", 2024,
            "2402.03348", departs="shares are of tokens through the whole network, not layer by layer",
        ),
    ),
    cost="one forward, d_model + 33 gradients of the whole model, and a sweep of one cell a token",
    check="tests/laws/test_linear_map.py",
    call='mt.explain.linear_map(model, "The capital of France is")',
    reading="Each share is the part of the prediction that came from this token along frozen attention and gates; all "
    "of them add up to 1.",
    needs=("lens",),
)  # fmt: skip
def linear_map(
    model: Model,
    prompt: PromptText,
    *,
    answer: AnswerToken = None,
    layer: Annotated[int, Argument("the layer whose input the maps read; 0 is the embedding", "layer", least=0)] = 0,
    position: Annotated[int, Argument("the position whose prediction is explained", "token")] = -1,
    top: Annotated[int, Argument("directions to name for each token", "directions", least=1)] = 2,
) -> Found:
    """Write a prediction as a sum of linear maps of its tokens, and name the directions of each map.

    Raises:
        PromptError: there are several prompts, or the answer is not one token.
        SiteError: the model has no such layer or position, or its output is not read from the stream.
        EditError: some part of the model cannot be held.
    """
    n = model.anatomy.n_layers
    if layer >= n:
        raise error(SiteError, f"no layer {layer}", allowed=f"0 to {n - 1}", do="name a layer of the model")
    tokens, (token,), attrs = asked(model, prompt, answer, position=position)
    site = f"{layer}.resid_pre"
    words = model.to_words(tokens)
    last = f"{n - 1}.resid_post"
    run = model.run(tokens.unsqueeze(0), capture=[site, last], edits=[HELD], grad=True)
    out = Output(model, run[last].detach()[0, -1])
    x, y = run[site].detach()[0].double(), out.y
    maps = jacobian(run, site, out)
    parts = torch.einsum("tij,tj->ti", maps, x)
    plain = model.run(tokens.unsqueeze(0), capture=[site, last], grad=True)
    unembed = out.unembed[:, token] * model.anatomy.logit_scale
    gradient = (_drawn_back(plain, site, out.rows(unembed.unsqueeze(0), held=False))[0].double() * x).sum(-1)
    deletion = _deletion(model, tokens, site, token)
    size = float(y.pow(2).sum())
    values: dict[str, Any] = {
        "share": parts @ y / size, "logit": parts @ unembed, "gradient": gradient,
        "deletion": deletion, "constant": float((y - parts.sum(0)) @ y) / size,
        "error": float((y - parts.sum(0)).norm() / y.norm()), "error_plain": _error_plain(plain, site, x, out),
    }  # fmt: skip
    for name, own in (("", values["logit"]), ("_plain", gradient)):
        values[f"rank_correlation{name}"] = beside(own, deletion)
    named, components = _directions(model, out, maps, words, top)
    before = "" if model.anatomy.logit_softcap is None else ", before the cap"
    return Found(
        values | named, coords={"token": ("pos", words), "component": components},
        attrs=attrs | {"layer": layer, "position": len(tokens) - 1, "metric": f"logit of the answer{before}"},
    )  # fmt: skip


class Output:
    """What is explained, y: the last stream at one position, as the final norm divides it and without its gain.

    Attributes:
        y: [d_model] in float64.
        unembed: [d_model, vocab] what reads it: the gain times the unembedding.
    """

    def __init__(self, model: Model, stream: Float[Tensor, " d_model"]) -> None:
        self.norm = model.require_readable()
        self.scale = self.norm.scale(stream).double()
        self.y = self.norm.centre(stream.double()) / self.scale
        gain = self.norm.gain
        weights = model.W_U.detach().double()
        self.unembed = weights * (gain.detach().double().unsqueeze(1) if isinstance(gain, Tensor) else gain)

    def rows(self, directions: Float[Tensor, "n d_model"], *, held: bool) -> Float[Tensor, "n d_model"]:
        """Directions of y as gradients at the last stream, with its divisor held or not."""
        found = self.norm.centre(directions) / self.scale
        if held or self.norm.norm.identity:
            return found
        # The divisor is the root of the mean square, so that a step along y changes nothing but rounding.
        along = (directions @ self.y).unsqueeze(1) * self.y / len(self.y)
        return found - self.norm.centre(along) / self.scale


def jacobian(run: Run, site: str, out: Output) -> Float[Tensor, "pos out d_model"]:
    """[pos, out, d_model] The derivative of the output at the last position by a stream."""
    width = len(out.y)
    rows = out.rows(torch.eye(width, dtype=torch.float64, device=out.y.device), held=True)
    found: list[Tensor] = []
    for first in range(0, width, TOGETHER):
        found.append(_drawn_back(run, site, rows[first : first + TOGETHER]).double())
        current().report("drawing gradients back", min(first + TOGETHER, width), width)
    return torch.cat(found).transpose(0, 1)


def _drawn_back(run: Run, site: str, rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n pos d_model"]:
    """Gradients at the last position of the last stream, drawn back to an earlier one."""
    last = f"{run.anatomy.n_layers - 1}.resid_post"
    stream = run[last]
    given = torch.zeros(len(rows), *stream.shape, dtype=stream.dtype, device=stream.device)
    given[:, 0, -1] = rows.to(stream.dtype)
    return run.vjp(given, last, site)[:, 0]


def _error_plain(run: Run, site: str, x: Tensor, out: Output) -> float:
    """How far the ordinary Jacobian times the stream is from the output, over coordinates drawn at random."""
    drawn = torch.randperm(len(out.y), generator=torch.Generator().manual_seed(current().seed))[:PROBED]
    eye = torch.eye(len(out.y), dtype=torch.float64, device=out.y.device)[drawn.to(out.y.device)]
    given = (_drawn_back(run, site, out.rows(eye, held=False)).double() * x).sum((1, 2))
    own = out.y[drawn.to(out.y.device)]
    return float((own - given).norm() / own.norm())


def _deletion(model: Model, tokens: Tensor, site: str, token: int) -> Float[Tensor, " pos"]:
    """How much the logit of the answer, before a final cap, falls when the stream of a token is zeroed, for each."""
    cells = [Zero(f"{site}@{p}") for p in range(len(tokens))]
    cap = model.anatomy.logit_softcap

    def before_cap(logits: Tensor, _: Any) -> Tensor:
        """The logit as the unembedding gives it: with a cap c, c artanh(logit / c)."""
        own = logits[:, 0, token]
        if cap is None:
            return own
        inside = (own.double() / cap).clamp(-1 + 1e-12, 1 - 1e-12)
        return (cap * torch.atanh(inside)).to(own.dtype)

    logit = FunctionMetric(before_cap, positions=(-1,))
    swept = run_sweep(model, tokens.unsqueeze(0), cells, logit, stage="deleting tokens")
    return -swept.effects.double()


def _directions(
    model: Model, out: Output, maps: Float[Tensor, "pos out d_model"], words: list[str], top: int
) -> tuple[dict[str, Any], list[str]]:
    """The largest directions of every token's map in words, largest first, and the effective rank of each map."""
    y, embed = out.y, model.W_E.detach()
    left, sizes, right = torch.linalg.svd(maps)
    random = torch.randn(maps.shape[1:], generator=torch.Generator().manual_seed(current().seed), dtype=torch.float64)
    rows: list[tuple[float, str, str, str]] = []
    for t in range(len(maps)):
        for k in range(min(top, sizes.shape[1])):
            u, v = left[t, :, k], right[t, k]
            sign = 1.0 if float(u @ y) >= 0 else -1.0  # of both: the one that adds to this prediction
            writes = _words(model, sign * u @ out.unembed)
            fits = v.shape[0] == embed.shape[1]
            reads = _words(model, embed @ (sign * v).to(embed.dtype)) if fits else ""
            rows.append((float(sizes[t, k]), writes, reads, f"{words[t]} ({t}), {k + 1}"))
    rows.sort(key=lambda row: -row[0])
    singular, writes, reads, names = (list(column) for column in zip(*rows, strict=True))
    ranks = torch.stack([_effective_rank(s) for s in sizes])
    found = {"singular": singular, "writes": writes, "reads": reads, "effective_rank": ranks}
    return found | {"effective_rank_random": float(_effective_rank(torch.linalg.svdvals(random)))}, names


def _words(model: Model, scores: Float[Tensor, " vocab"]) -> str:
    return " ".join(repr(word) for word in model.to_words(scores.topk(min(WORDS, len(scores))).indices))


def _effective_rank(sizes: Float[Tensor, " k"]) -> Float[Tensor, ""]:
    p = sizes / sizes.sum().clamp(min=1e-300)
    return torch.special.entr(p).sum().exp()
