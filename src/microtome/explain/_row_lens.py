"""Rows of an MLP's weights read as tokens: the logit lens of what a neuron reads, and whether the neuron says it.

Formula:  z_n = (gain * row_n) W_U, gain that of the MLP's norm, row_n the column of W_in (or W_gate) that the neuron
          reads with, or of W_out, which it writes; peak_n = (largest of z_n - mean of z_n) / standard deviation of z_n.
          The neurons of the largest peaks in all layers are each set, at the last token of a prompt, to the value at
          which they write `strength` of the length of the stream there; rise: log-probability of the decoded token
          then, minus before. Control: random neurons of the same layer that write as much, read at the same token.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import at_least_float32
from microtome.context import current
from microtome.edit import Set
from microtome.errors import PromptError, error
from microtome.explain._lens_reads import rows_of
from microtome.method import Argument, Column, Found, PromptText, Source, question, run_sweep
from microtome.metric import FunctionMetric
from microtome.model import Model

NAMED = ("component",)
CHUNK = 512


@question(
    "row_lens",
    command="rows",
    title="tokens that neurons read",
    question="Which neurons read or write one token more than all others, and do they say it?",
    columns=(
        Column("peak", "deviations", "how far the decoded token stands above the mean of all", "shuffled_peak",
               (0, None), NAMED, title="peak"),
        Column("shuffled_peak", "deviations", "the same of the row with its entries in random order", range=(0, None),
               dims=NAMED),
        Column("token", "token", "the decoded token, by id", "none: a name", dims=NAMED, drawn=False),
        Column("rise", "nats", "rise of the token's log-probability with the neuron set to a constant", "random_rise",
               dims=NAMED, title="rise of the token"),
        Column("random_rise", "nats", "the same of random neurons of the layer that write as much", dims=NAMED),
        Column("risen", "share", "how many of these neurons raise their token more than the random ones do",
               "none: a half is chance", (0, 1), ()),
    ),
    source=Source(
        "Davies", "Decoding specialised feature neurons in LLMs with the final projection layer", 2025, "2501.02688",
        departs="the norm's gain is folded in; neurons are set to what writes as much as the random ones beside them",
    ),
    cost="2 d_model vocab operations for each neuron, and a sweep of neurons (1 + controls) cells",
    check="tests/laws/test_row_lens.py",
    call='mt.explain.row_lens(model, "I went to see the")',
    reading="peak says how far a neuron's row stands out at one token; rise, what setting the neuron does to it, "
    "beside random neurons that write as much.",
    needs=("next token", "lens", "*.mlp.post", "*.resid_post", "W_in", "W_out"),
)  # fmt: skip
def row_lens(
    model: Model,
    prompt: PromptText,
    *,
    rows: Annotated[
        Literal["W_in", "W_gate", "W_out"], Argument("what is decoded: what neurons read with, or what they write")
    ] = "W_in",
    neurons: Annotated[int, Argument("of the largest peaks", "neurons", least=1)] = 10,
    strength: Annotated[float, Argument("length of what is written, in that of the stream", "share", least=0)] = 0.5,
    controls: Annotated[int, Argument("random neurons for each", "neurons", least=1)] = 8,
) -> Found:
    """Decode the rows of all neurons, and set those that peak on one token.

    Raises:
        PromptError: several prompts.
        SiteError: the stream cannot be read as logits, or an MLP has no such matrix.
    """
    tokens = model.to_batch(prompt).tokens
    if len(tokens) > 1:
        raise error(PromptError, "neurons are set in one prompt", got=len(tokens), do="ask one by one")
    generator = torch.Generator().manual_seed(current().seed)
    order = torch.randperm(model.anatomy.d_model, generator=generator)
    every = [_peaks(model, i, rows, order) for i in range(model.anatomy.n_layers)]
    found = [(float(p), i, n) for i, (peaks, _, _) in enumerate(every) for n, p in enumerate(peaks.tolist())]
    best = sorted(found, reverse=True)[:neurons]
    ids = [int(every[i][1][n]) for _, i, n in best]
    run = model.run(tokens, "*.resid_post@-1")
    length = {i: float(run[f"{i}.resid_post@-1"][0, 0].norm()) for _, i, _ in best}
    cells: list[Set] = []
    for _, i, n in best:
        size = at_least_float32(model.layers[i].W_out.detach()).norm(dim=1)
        others = [m for m in torch.randperm(len(size), generator=generator)[: controls + 1].tolist() if m != n]
        values = {m: strength * length[i] / max(float(size[m]), 1e-12) for m in (n, *others[:controls])}
        cells += [Set(f"{i}.mlp.post[{m}]@-1", value) for m, value in values.items()]
    wanted = torch.tensor(ids)
    metric = FunctionMetric(lambda logits, _: logits[:, 0].float().log_softmax(-1)[:, wanted.to(logits.device)])
    effects = run_sweep(model, tokens, cells, metric, stage="setting neurons").whole().effects.double()
    each = len(cells) // len(best)
    own = torch.stack([effects[k * each : (k + 1) * each, k] for k in range(len(best))])  # [neuron, itself and others]
    columns = {
        "peak": torch.tensor([p for p, _, _ in best]), "token": wanted, "rise": own[:, 0],
        "shuffled_peak": torch.tensor([float(every[i][2][n]) for _, i, n in best]), "random_rise": own[:, 1:].mean(1),
        "risen": (own[:, 0] > own[:, 1:].mean(1)).double().mean(),
    }  # fmt: skip
    names = [f"L{i}N{n} {word}" for (_, i, n), word in zip(best, model.to_words(ids), strict=True)]
    return Found(columns, coords={"component": names}, attrs={"rows": rows})


@torch.no_grad()
def _peaks(model: Model, layer: int, rows: str, order: Tensor) -> tuple[Tensor, Tensor, Float[Tensor, " neuron"]]:
    """By neuron of a layer: the peak, its token, and the peak of the row with its entries in another order."""
    unembed = at_least_float32(model.W_U) * torch.as_tensor(model.require_readable().gain).reshape(-1, 1)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for chunk in rows_of(model, layer, rows).split(CHUNK):
        z = chunk @ unembed
        top = z.max(-1)
        other = chunk[:, order.to(chunk.device)] @ unembed
        parts.append(
            ((top.values - z.mean(-1)) / z.std(-1), top.indices, (other.amax(-1) - other.mean(-1)) / other.std(-1))
        )
    peaks, tokens, shuffled = (torch.cat(of).cpu() for of in zip(*parts, strict=True))
    return peaks, tokens, shuffled
