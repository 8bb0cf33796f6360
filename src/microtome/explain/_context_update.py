"""What the context does to a branch, as a change of its weights: a rank-one update that stands in for it.

Formula:  at the last token of a query, u and u0 are what the MLP of a layer reads with and without a context before it,
          A and A0 the stream between the branches. For each matrix W that the MLP reads with (gate and up, or one)
              dW = u0 (u - u0)^T W / |u0|^2        so that  u0 (W + dW) = u W   (rows times matrices)
          and the MLP with W + dW writes on u0 what it writes on u; A - A0 is added to the stream beside it.
          The paper has no norm: its update is made of A and A0. Where a norm stands between, that update leaves the
          scale of the run without context, and the branch reads norm(A) s / s0 in place of norm(A).
          All layers together: layer by layer, A0 and u0 are those of the query alone behind all earlier updates, so
          that the last token's stream, and with it the output, becomes that of the query with its context; where
          positions are learned, the embedding of the token's place is that behind the context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.edit import Add, Edit, Set
from microtome.errors import PromptError, SiteError, error
from microtome.method import Argument, Column, Found, PromptText, Source, question
from microtome.model import Model
from microtome.run import Prompt, Run, prompt_from_text
from microtome.stream import bos_id

LAYER = ("layer",)
READS = {"mlp.gate": "W_gate", "mlp.up": "W_in", "mlp.pre": "W_in"}
"""By site, the matrix whose product with what the MLP reads is there."""
SIZE = "none: a size; see the errors beside it"


@question(
    "context_update",
    command="context-update",
    title="context as a change of weights",
    question="Which change of the weights of each MLP would do what the context does?",
    columns=(
        Column("error", "share", "relative error of what the MLP writes without context and with the update",
               "unchanged_error", (0, None), LAYER, title="error with the update"),
        Column("unchanged_error", "share", "the same without an update", range=(0, None), dims=LAYER),
        Column("norm_error", "share", "error of the update made of the stream in front of the norm, whose scale stays "
               "that without context", "unchanged_error", (0, None), LAYER, title="error that the norm leaves"),
        Column("shuffled_error", "share", "error of the update that the same context with its tokens shuffled would "
               "make", "unchanged_error", (0, None), LAYER, title="error with the update of a shuffled context"),
        Column("update", "share", "Frobenius norm of the update in that of the weights, all matrices together",
               SIZE, (0, None), LAYER),
        Column("bias", "share", "|A - A0| / |A0|, what is added to the stream beside the MLP", SIZE, (0, None), LAYER),
        Column("kl", "nats", "divergence of the output with context from that without, all layers updated",
               "unchanged_kl", (0, None), ()),
        Column("unchanged_kl", "nats", "the same, no layer updated", range=(0, None), dims=()),
        Column("reads", "1", "u0 / |u0|^2, the left factor of the updates", SIZE, dims=("layer", "d_model"),
               drawn=False),
        Column("<site>", "1", "the right factor of the update of the matrix that writes this site", SIZE,
               dims=("layer", "neuron"), drawn=False),
        Column("added", "1", "A - A0", SIZE, dims=("layer", "d_model"), drawn=False),
    ),
    source=Source(
        "Dherin et al.", "Learning without training: The implicit dynamics of in-context learning", 2025, "2507.16003",
        departs="gate and up are both updated; the update is made of what the MLP reads, behind its norm, where it is "
        "exact, and the paper's own beside it with the error that the norm leaves; all layers together too",
    ),
    cost="four forwards, and five times every layer alone",
    check="tests/laws/test_context_update.py",
    call='mt.explain.context_update(model, "Paris is in France. Rome is in", " Italy. Madrid is in")',
    reading="error is how far the MLP without context and with the update is from the MLP with context: rounding "
    "alone; unchanged_error is how far it is without the update.",
    needs=("next token", "sum", "*.mlp.in", "*.mlp.scale", "*.mlp_out", "*.attn_out"),
)  # fmt: skip
def context_update(
    model: Model,
    context: PromptText,
    query: Annotated[Prompt, Argument("what follows the context", positional=True, from_text=prompt_from_text)],
) -> Found:
    """Find the rank-one change of every MLP's weights that stands in for a context, and check that it does.

    Raises:
        PromptError: several prompts, or a query or context without tokens.
        SiteError: an MLP is a mixture, or has no matrices to update.
    """  # fmt: skip
    told, alone, mixed = _tokens(model, context, query)
    n = model.anatomy.n_layers
    sites = [_reads(model, i) for i in range(n)]
    capture = ["*.resid_pre", "*.mlp.in", "*.mlp.scale", "*.mlp_out", "*.resid_post"]
    capture += [f"{i}.{site}" for i, of in enumerate(sites) for site in of]
    with_it, without = (model.run(tokens, capture=capture) for tokens in (told, alone))
    other = model.run(mixed, capture="*.mlp.in")
    layers = [_of_layer(model, i, sites[i], with_it, without, _last(other, f"{i}.mlp.in")) for i in range(n)]
    values: dict[str, Any] = {
        name: torch.stack([torch.as_tensor(layer[name]).double().cpu() for layer in layers])
        for name in layers[0]
        if len({torch.as_tensor(layer.get(name)).shape if name in layer else None for layer in layers}) == 1
    }
    final = with_it.logits[0, -1].double().log_softmax(-1)
    updated = _all_updated(model, sites, with_it, without)
    for name, logits in (("kl", updated), ("unchanged_kl", without.logits[0, -1])):
        values[name] = (final.exp() * (final - logits.double().log_softmax(-1))).sum().clamp(min=0)
    ends = {"answer": with_it, "without_context": without}
    said: dict[str, Any] = {name: model.to_words(run.logits[0, -1:].argmax(-1))[0] for name, run in ends.items()}
    said |= {"context_tokens": told.shape[1] - alone.shape[1], "query_tokens": alone.shape[1]}
    return Found(values, coords={"layer": list(range(n)), "prompt": ("pos", model.to_words(told[0]))}, attrs=said)


@dataclass(frozen=True)
class Update:
    """A rank-one change dW = left right^T of a matrix W [d_model, neuron], and what W + dW makes of u0."""

    left: Float[Tensor, " d_model"]
    right: Float[Tensor, " neuron"]
    made: Float[Tensor, " neuron"]

    @classmethod
    def of(cls, before: Tensor, after: Tensor, matrix: Tensor) -> Update:
        """The update with which a branch makes of `before` [d_model] what it makes of `after`."""
        left, right = before / before.square().sum(), (after - before) @ matrix
        return cls(left, right, before @ (matrix + torch.outer(left, right)))


def _of_layer(
    model: Model, layer: int, sites: Sequence[str], with_it: Run, without: Run, wrong: Tensor
) -> dict[str, Any]:
    """The update of one layer, and how well it and its controls stand in for the context."""
    u, u0 = (_last(run, f"{layer}.mlp.in") for run in (with_it, without))
    scale, scale0 = (_last(run, f"{layer}.mlp.scale") for run in (with_it, without))
    wanted, plain = (_last(run, f"{layer}.mlp_out") for run in (with_it, without))
    a, a0 = (_last(run, f"{layer}.resid_post") - _last(run, f"{layer}.mlp_out") for run in (with_it, without))
    norm = model.layers[layer].mlp_norm
    shift = 0.0 if norm is None or norm.bias is None else norm.bias.double()
    matrices = {site: _matrix(model, layer, site) for site in sites}
    own = {site: Update.of(u0, u, matrix) for site, matrix in matrices.items()}
    found: dict[str, Any] = {"unchanged_error": (plain - wanted).norm() / wanted.norm()}
    for name, reads in (
        ("error", u),
        ("norm_error", (u - shift) * (scale / scale0) + shift),
        ("shuffled_error", wrong),
    ):
        made = {site: Update.of(u0, reads, matrix) for site, matrix in matrices.items()}
        edits = _edits(model, layer, u0, matrices, made, without)
        run = _alone(model, layer, [f"{layer}.mlp_out"], without.tokens, without[f"{layer}.resid_pre"], edits)
        found[name] = (_last(run, f"{layer}.mlp_out") - wanted).norm() / wanted.norm()
    change = sum(float(up.left.norm() * up.right.norm()) ** 2 for up in own.values())
    size = sum(float(matrix.norm()) ** 2 for matrix in matrices.values())
    found |= {"update": (change / size) ** 0.5, "bias": (a - a0).norm() / a0.norm(), "added": a - a0}
    found |= {"reads": u0 / u0.square().sum()}
    return found | {site: up.right for site, up in own.items()}


def _edits(
    model: Model, layer: int, u0: Tensor, matrices: Mapping[str, Tensor], made: Mapping[str, Update], without: Run
) -> list[Edit]:
    """What the MLP of a layer computes of u0 at the last token with updated weights; biases stay as they are."""
    edits: list[Edit] = []
    for site, update in made.items():
        address = f"{layer}.{site}"
        rest = _last(without, address) - u0 @ matrices[site]  # the bias, and what rounding makes of the product
        edits.append(Set(f"{address}@-1", (update.made + rest).to(model.dtype)))
    return edits


def _all_updated(model: Model, sites: Sequence[Sequence[str]], with_it: Run, without: Run) -> Tensor:
    """[vocab] the output for the query alone with every MLP updated, and the stream beside it shifted."""
    start = with_it["0.resid_pre"][0, -1] - without["0.resid_pre"][0, -1]  # of a position that is learned
    edits: list[Edit] = [Add("0.resid_pre@-1", start)]
    tokens = without.tokens
    for i, of in enumerate(sites):
        stream = without[f"{i}.resid_pre"].clone()
        stream[:, -1] = with_it[f"{i}.resid_pre"][:, -1]  # so far the updates reproduce the stream with the context
        names = [f"{i}.mlp.in", f"{i}.mlp_out", f"{i}.resid_post", *(f"{i}.{site}" for site in of)]
        here = _alone(model, i, names, tokens, stream)
        u, u0 = (_last(run, f"{i}.mlp.in") for run in (with_it, here))
        a, a0 = (_last(run, f"{i}.resid_post") - _last(run, f"{i}.mlp_out") for run in (with_it, here))
        matrices = {site: _matrix(model, i, site) for site in of}
        made = {site: Update.of(u0, u, matrix) for site, matrix in matrices.items()}
        held = {site: _last(here, f"{i}.{site}") - u0 @ matrix for site, matrix in matrices.items()}
        edits.append(Add(f"{i}.attn_out@-1", (a - a0).to(model.dtype)))
        edits += [Set(f"{i}.{site}@-1", (made[site].made + held[site]).to(model.dtype)) for site in of]
    return model.run(tokens, edits=edits).logits[0, -1]


def _alone(
    model: Model, layer: int, capture: list[str], tokens: Tensor, stream: Tensor, edits: Sequence[Edit] = ()
) -> Run:
    """One layer by itself, on a stream [1, pos, d_model] that enters it."""
    end = layer + 1 if layer + 1 < model.anatomy.n_layers else None
    return model.run(tokens, capture, edits, start_at=layer, given=stream, stop_at=end, logits=False)


def _last(run: Run, address: str) -> Tensor:
    """What a site holds at the last token of the only prompt, in float64."""
    return run[address][0, -1].double()


def _matrix(model: Model, layer: int, site: str) -> Float[Tensor, "d_model neuron"]:
    return getattr(model.layers[layer], READS[site]).detach().double()


def _reads(model: Model, layer: int) -> list[str]:
    """The sites where the products of what an MLP reads are: its gate and its up, or the one that it has.

    Raises:
        SiteError: there is none, or it is a mixture of experts.
    """
    found = [site for site in READS if Site(site, layer) in model.anatomy.hook_points]
    if not found or model.anatomy.parts.layers[layer].experts is not None:
        what = f"layer {layer} of {model.anatomy.name} has no MLP whose weights could be updated"
        raise error(SiteError, what, got="a mixture, or no such sites", do="ask a model with plain or gated MLPs")
    return found


def _tokens(model: Model, context: Prompt, query: Prompt) -> tuple[Tensor, Tensor, Tensor]:
    """[1, pos] the query behind its context, the query alone, and behind the context with its tokens shuffled.

    Raises:
        PromptError: there are several prompts, or nothing to read.
    """
    first, second = model.to_batch(context), model.to_batch(query)
    for name, batch in (("context", first), ("query", second)):
        if len(batch.tokens) != 1:
            raise error(PromptError, f"the {name} must be one prompt", got=len(batch.tokens), do="ask one by one")
    bos = bos_id(model.tokenizer)
    lead = [int(bos is not None and int(batch.tokens[0, 0]) == bos) for batch in (first, second)]
    before, after = first.tokens[:, lead[0] :], second.tokens[:, lead[1] :]
    if not before.shape[1] or not after.shape[1]:
        raise error(PromptError, "the context and the query must have tokens", do="write more")
    start = second.tokens[:, : lead[1]]
    order = torch.randperm(before.shape[1], generator=torch.Generator().manual_seed(current().seed))
    mixed = before[:, order.to(before.device)]
    told, shuffled = (torch.cat([start, x, after], dim=1) for x in (before, mixed))
    return told, second.tokens, shuffled
