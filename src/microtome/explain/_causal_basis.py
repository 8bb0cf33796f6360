"""The causal basis of a lens: the directions of the stream that its prediction depends on most.

Formula:  r_V(h) = h + V V^T (mean - h), the directions of V set to their mean over tokens; f the lens of a layer;
          influence(V) = mean over tokens of KL(softmax f(h) || softmax f(r_V(h)));
          v_j maximises influence(v) among unit vectors orthogonal to v_1 .. v_{j-1}, by L-BFGS from the best of the
          principal directions of h and of those of the gradients of f; then the directions are put in order.
          On other tokens: influence of each, of the first k together, and what the model itself says when the same
          directions of its stream are set to their mean. Control: random directions, as many and orthogonal.
Trap:     a direction need not lie in what the lens reads: where the stream varies most, even a small part of it there
          has influence. A lens that does not read what the model reads finds directions that the model does not use:
          compare the two columns, and their rank correlation over the directions that were found: random ones have
          little of either, so that they would make any lens look right.
Cost:     `directions` x `steps` x at most 25 forwards and backwards of the lens at `tokens` tokens; two forwards of
          the text, and one of the layers behind for every direction.
Check:    orthonormal; all of them leave a constant; a planted plane; tests/laws/test_causal_basis.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.context import current
from microtome.edit import Apply
from microtome.errors import ArgumentError, DataError, error
from microtome.explain._fit_lens import after_layer, divergence
from microtome.explain._lens_value import Lens
from microtome.explain._verify import rank_correlation
from microtome.method import Argument, Column, Found, Source, Text, question
from microtome.model import Model
from microtome.stream import TokenBatch
from microtome.training import fit

STARTS = 6
"""Principal directions of each kind that are tried as a start."""
ROWS = 4
FEWEST = 3
"""Directions below which a rank correlation says nothing."""
ONE, FIRST = ("component",), "the first so many directions together"


@question(
    "causal_basis",
    command="causal-basis",
    title="causal basis of a lens",
    question="Which directions of the stream does a lens's prediction depend on most, and does the model's too?",
    columns=(
        Column("influence", "nats", "divergence of the lens's prediction when the direction is set to its mean",
               "random_influence", (0, None), ONE, title="influence on the lens"),
        Column("random_influence", "nats", "the same of random directions, on average", range=(0, None), dims=()),
        Column("model_influence", "nats", "divergence of the model's own prediction when the same is done to its "
               "stream", "random_model_influence", (0, None), ONE, title="influence on the model"),
        Column("random_model_influence", "nats", "the same of random directions, on average", range=(0, None), dims=()),
        Column("together", "nats", f"divergence of the lens's prediction with {FIRST} set to their mean",
               "random_together", (0, None), ONE, title="the first together"),
        Column("random_together", "nats", "the same of as many random directions", range=(0, None), dims=ONE),
        Column("fitted", "nats", "influence at the tokens that the directions were found on, by which they are ordered",
               "none: compare influence, at other tokens", (0, None), ONE, drawn=False),
        Column("promotes", "token", "tokens that the direction raises most, and behind | those that its opposite does",
               "none: words", dims=ONE),
        Column("vector", "1", "the direction, of length 1", "none: a direction", (-1, 1), ("component", "d_model"),
               drawn=False),
        Column("rank_correlation", "correlation", "between the influences on the lens and on the model, over the "
               "directions that were found; none of fewer than 3", "none: 1 is a lens that reads what the model reads",
               (-1, 1), ()),
    ),
    source=Source(
        "Belrose et al.", "Eliciting Latent Predictions from Transformers with the Tuned Lens", 2023, "2303.08112",
        "section 4.1", departs="starts are principal directions; influences are measured on other tokens than those "
        "that the directions were found on",
    ),
    cost="directions x steps x 25 forwards and backwards of the lens at most, and directions + controls forwards",
    check="tests/laws/test_causal_basis.py",
    call="mt.explain.causal_basis(model, layer=20)",
    reading="influence says how much a direction matters to the lens, model_influence to the model; a lens worth its "
    "name has both large for the same directions, and near 0 for random ones.",
    needs=("lens", "next token"),
)  # fmt: skip
def causal_basis(
    model: Model,
    lens: Annotated[
        Lens | str | None, Argument("a lens of `fit_lens`, or its file; by default the logit lens", from_text=str)
    ] = None,
    *,
    layer: Annotated[
        int | None, Argument("the stream after which layer; -1 is the embedding; by default half way", "layer")
    ] = None,
    text: Annotated[
        Any, Argument("text, as a measure takes it, or a file; by default the standard library's", from_text=str)
    ] = None,
    directions: Annotated[int, Argument("how many to find", "directions", least=1)] = 4,
    size: Annotated[int, Argument("tokens to find them on, and as many to measure on", "tokens", least=2)] = 256,
    steps: Annotated[int, Argument("steps of L-BFGS for each", "steps", least=1)] = 2,
    skip: Annotated[
        int,
        Argument("first positions of a row to leave out, where a few entries outweigh all others", "tokens", least=0),
    ] = 1,
    length: Annotated[int, Argument("tokens per row", "tokens", least=2)] = 32,
    controls: Annotated[int, Argument("random directions", "directions", least=1)] = 8,
) -> Found:
    """Find the directions that a lens depends on, in order, and measure each in the lens and in the model.

    Raises:
        ArgumentError: there is no such layer, or more directions are asked for than the stream has; the lens has no map
            for the layer or is one of heads.
        DataError: the lens is of another model, or there is too little text.
        SiteError: the stream cannot be read as logits.
    """
    n, width = model.anatomy.n_layers, model.anatomy.d_model
    where = n // 2 if layer is None else layer
    if not -1 <= where < n:
        raise error(ArgumentError, "no such layer", got=where, allowed=f"-1 to {n - 1}", do="choose another")
    most = max(directions, controls)
    if most > width:
        what = "the stream has fewer directions"
        raise error(ArgumentError, what, got=most, allowed=f"1 to {width}", do="ask for fewer")
    held = lens if isinstance(lens, Lens) or lens is None else Lens.load(lens)
    view = View.of(model, None if held is None else held.require(model), where, skip)
    if skip >= length - 1:
        what, allowed = "rows are too short to leave out so many positions", f"under {length - 1}"
        raise error(ArgumentError, what, got=skip, allowed=allowed, do="give a larger length")
    parts = list(Text(text, tokens=2 * size + length, length=length, rows=ROWS).batches(model).parts)
    if len(parts) < 2:
        parts = [part for batch in parts for part in _split(batch)]
    if len(parts) < 2:
        do = "give more text, or a smaller length"
        raise error(DataError, "too little text to find directions and to measure them elsewhere", do=do)
    half = len(parts) // 2
    mean, basis, fitted = _found(view, parts[:half], directions, steps)
    rng = torch.Generator().manual_seed(current().seed)
    random = torch.linalg.qr(torch.randn(width, most, generator=rng, dtype=torch.float64)).Q.T.to(basis)
    each = _measured(view, parts[half:], mean, {"": basis, "random_": random}, directions, controls)
    alone, in_model = (each[kind].mean(0).numpy() for kind in ("influence", "model_influence"))
    for name in ("random_influence", "random_model_influence"):
        each[name] = each[name].mean(-1)
    values: dict[str, Any] = {
        "fitted": fitted, "vector": basis.double(), "promotes": [_words(model, v) for v in basis],
        "rank_correlation": rank_correlation(alone, in_model) if directions >= FEWEST else float("nan"),
    }  # fmt: skip
    attrs = {"stream": "embedding" if where < 0 else f"after layer {where}", "size": size}
    attrs["lens"] = "the logit lens" if held is None else f"{held.kind}, of {held.attrs.get('tokens')} tokens"
    return Found(values, each=each, coords={"component": [f"direction {i}" for i in range(directions)]}, attrs=attrs)


@dataclass(frozen=True)
class View:
    """One layer's stream as a lens reads it."""

    model: Model
    lens: Lens | None
    layer: int
    skip: int = 0

    @classmethod
    def of(cls, model: Model, lens: Lens | None, layer: int, skip: int = 0) -> View:
        """It, with a lens that has a map for the layer; the last layer's stream has none to have.

        Raises:
            ArgumentError: the lens has none, is of heads, or predicts a token further ahead.
        """
        model.require_readable()
        if lens is not None and (lens.kind == "heads" or lens.ahead > 1):
            got = lens.kind if lens.kind == "heads" else f"a lens of the token {lens.ahead} ahead"
            raise error(ArgumentError, "a lens of the stream and of the next token is needed", got=got, do="fit one")
        if lens is not None and layer < model.anatomy.n_layers - 1:
            lens.place(layer)
            return cls(model, lens, layer, skip)
        return cls(model, None, layer, skip)

    @property
    def site(self) -> str:
        """The address of the stream."""
        return after_layer(self.layer, self.model.anatomy.n_layers)

    def stream(self, batch: TokenBatch) -> Float[Tensor, "row pos d_model"]:
        """What it holds on a batch, without the first positions of every row."""
        with torch.no_grad():
            run = self.model.run(batch.tokens.to(self.model.device), capture=self.site, logits=False)
        return run[self.site][:, self.first(batch) :].detach()

    def first(self, batch: TokenBatch) -> int:
        """The first position that counts."""
        return batch.lead + self.skip

    def read(self, h: Float[Tensor, "*at d_model"]) -> Float[Tensor, "*at d_model"]:
        """What the unembedding is to read in place of it."""
        return h if self.lens is None else self.lens.apply(self.layer, h)

    def log_p(self, h: Float[Tensor, "*at d_model"]) -> Float[Tensor, "*at vocab"]:
        """What the lens predicts."""
        with torch.no_grad():
            return self.model.unembed(self.read(h)).float().log_softmax(-1)

    def influence(
        self, h: Float[Tensor, "token d_model"], log_p: Float[Tensor, "token vocab"], mean: Tensor, basis: Tensor
    ) -> Float[Tensor, " token"]:
        """By token, what setting directions [k, d_model] to their mean does to the prediction, in nats."""
        p = log_p.exp()
        return divergence(self.model, self.read(ablated(h, mean, basis)), p, -(p * log_p).sum(-1))


def ablated(
    h: Float[Tensor, "*at d_model"], mean: Float[Tensor, " d_model"], basis: Float[Tensor, "k d_model"]
) -> Float[Tensor, "*at d_model"]:
    """h with the directions of an orthonormal basis set to what the mean has there."""
    return h + (mean - h) @ basis.T @ basis


def _split(batch: TokenBatch) -> list[TokenBatch]:
    """The rows of a batch in two."""
    half = len(batch.tokens) // 2
    if not half:
        return [batch]
    return [
        TokenBatch.of(batch.tokens[rows], batch.start[rows], batch.lead) for rows in (slice(half), slice(half, None))
    ]


def _found(
    view: View, parts: Sequence[TokenBatch], directions: int, steps: int
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "component d_model"], Float[Tensor, " component"]]:
    """The mean of the stream on some batches, the directions in the order of their influence there, and that."""
    h = torch.cat([view.stream(batch).flatten(0, 1) for batch in parts])
    mean, log_p = h.double().mean(0).to(h.dtype), view.log_p(h)
    starts = _starts(view, h, log_p)
    basis, reached = h.new_zeros(0, h.shape[1]), list[float]()

    def unit(u: Tensor) -> Tensor:
        for _ in range(2):  # once leaves what rounding leaves
            u = u - u @ basis.T @ basis
        return u / u.norm().clamp(min=1e-12)

    def score(v: Tensor) -> Tensor:
        return view.influence(h, log_p, mean, v.unsqueeze(0)).mean()

    for number in range(directions):
        with torch.no_grad():
            tried = [unit(u) for u in starts]
            tried = [v for v in tried if float(v.norm()) > 0.5] or [unit(torch.eye(h.shape[1]).to(h)[number])]
            u = max(tried, key=lambda v: float(score(v))).clone()
        fit({"u": u}, lambda held: -score(unit(held)), [u], steps, optimizer="lbfgs", lr=1.0, model=view.model,
            name=f"finding direction {number + 1} of {directions}")  # fmt: skip
        with torch.no_grad():
            v = unit(u)
            reached.append(float(score(v)))
            basis = torch.cat([basis, v.unsqueeze(0)])
    influence = torch.tensor(reached, dtype=torch.float64)
    order = influence.argsort(descending=True, stable=True)
    return mean, basis[order], influence[order]


def _starts(view: View, h: Float[Tensor, "token d_model"], log_p: Tensor) -> list[Float[Tensor, " d_model"]]:
    """Directions worth trying: those in which the stream varies most, and in which the prediction changes most."""
    x = h.detach().clone().requires_grad_()
    drawn = log_p.exp().multinomial(1, generator=_generator(h)).squeeze(-1)
    with torch.enable_grad():
        y = view.read(x)
        total = torch.stack([
            view.model.unembed(part).float().log_softmax(-1).gather(-1, t.unsqueeze(-1)).sum()
            for part, t in zip(y.split(128), drawn.split(128), strict=True)
        ]).sum()  # fmt: skip
    slope = torch.autograd.grad(total, x)[0]
    found: list[Tensor] = []
    for rows in (h - h.mean(0), slope):
        vectors = torch.linalg.svd(rows.double(), full_matrices=False).Vh
        found += list(vectors[:STARTS].to(h))
    draw = torch.randn(STARTS, h.shape[1], generator=torch.Generator().manual_seed(current().seed))
    return found + list(draw.to(h))


def _generator(h: Tensor) -> torch.Generator:
    return torch.Generator(h.device).manual_seed(current().seed)


def _measured(
    view: View, parts: Sequence[TokenBatch], mean: Tensor, sets: dict[str, Tensor], directions: int, controls: int
) -> dict[str, Float[Tensor, "row ..."]]:
    """By row of a text: influences on the lens, alone and together, and on the model; of what was found and random."""
    rows: dict[str, list[Tensor]] = {}
    for batch in parts:
        x = view.stream(batch)
        flat, count = x.flatten(0, 1), len(x)
        log_p = view.log_p(flat)
        with torch.no_grad():
            own = (
                view.model.run(batch.tokens.to(view.model.device))
                .logits[:, view.first(batch) :]
                .float()
                .log_softmax(-1)
            )
            for name, basis in sets.items():
                many = directions if name == "" else controls
                alone = [view.influence(flat, log_p, mean, basis[i : i + 1]) for i in range(many)]
                first = [view.influence(flat, log_p, mean, basis[: i + 1]) for i in range(directions)]
                for key, kl in (("influence", alone), ("together", first)):
                    by_row = torch.stack([k.double().reshape(count, -1).mean(1) for k in kl], -1)
                    rows.setdefault(f"{name}{key}", []).append(by_row.cpu())
                model = [_in_model(view, batch, own, mean, basis[i]) for i in range(many)]
                rows.setdefault(f"{name}model_influence", []).append(torch.stack(model, -1))
    return {name: torch.cat(x).clamp(min=0) for name, x in rows.items()}


def _in_model(
    view: View, batch: TokenBatch, own: Float[Tensor, "row pos vocab"], mean: Tensor, v: Tensor
) -> Float[Tensor, " row"]:
    """By row, the divergence of the model's prediction with a direction of its stream set to the mean."""
    begin = view.first(batch)

    def change(x: Tensor) -> Tensor:
        return torch.cat([x[:, :begin], ablated(x[:, begin:], mean.to(x), v.unsqueeze(0).to(x))], dim=1)

    edit = Apply(view.site, function=change)
    run = view.model.run(batch.tokens.to(view.model.device), edits=[edit])
    log_q = run.logits[:, view.first(batch) :].float().log_softmax(-1)
    return (own.exp() * (own - log_q)).sum(-1).double().mean(1).cpu()


def _words(model: Model, v: Float[Tensor, " d_model"]) -> str:
    """The tokens that a direction raises and lowers most, through the final norm's gain."""
    norm = model.require_readable()
    with torch.no_grad():
        logits = (norm.centre(v) * norm.gain).to(model.W_U.dtype) @ model.W_U
    ends = [model.to_words(logits.mul(sign).topk(min(3, len(logits))).indices) for sign in (1, -1)]
    return " | ".join(" ".join(words) for words in ends)
