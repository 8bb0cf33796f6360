"""Heads that write something of their own where the answer can be predicted, by discrete codes, without ablation.

Formula:  c(z) = argmax of z E, one of K codes, and z' = the codebook's row c; E and the codebook minimise |z' - z|^2
          over all heads and prompts, gradients passing the argmax as those of a softmax. Outputs z of a head, at the
          last position, are centred over its prompts and divided by their root mean square.
          score of a head = share of its codes that stand on clean prompts alone, none of them on a corrupt one;
          difference = |mean clean - mean corrupt| of the same z, the baseline without codes.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.context import current
from microtome.explain import AnswerOfClean, Clean, Corrupt, FoilOfCorrupt, ReadMetric, pairs_of
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.training import fit

SHUFFLES = 20
"""Times that clean and corrupt are swapped at random in each pair."""


@question(
    "code_scores",
    title="discrete codes of heads",
    question="Which heads write something where the answer can be predicted that they do not write elsewhere?",
    columns=(
        Column("score", "1", "share of the head's codes that occur on clean prompts alone", "score_control", (0, 1),
               ("layer", "head")),
        Column("score_control", "1", "the same with clean and corrupt swapped at random in each pair", range=(0, 1),
               dims=("layer", "head")),
        Column("difference", "1", "distance of the mean clean and corrupt output, standardised",
               "none: it is the baseline of the score", (0, None), ("layer", "head")),
    ),
    source=Source(
        "O'Neill, Bui", "Sparse Autoencoders Enable Scalable and Reliable Circuit Identification in Language Models",
        2024, "2405.12522",
        departs="outputs are standardised by head, and pairs are the task's clean and corrupt prompts",
    ),
    cost="two forwards a pair, and a small training",
    check="tests/laws/test_codes.py",
    call='mt.circuits.code_scores(model, mt.tasks.build("fact", model, n=10))',
    reading="1: every code that the head takes on clean prompts is one that it never takes on corrupt ones.",
    needs=("attention and MLP", "*.attn.z"),
)  # fmt: skip
def code_scores(
    model: Model,
    clean: Clean,
    corrupt: Corrupt = None,
    *,
    answer: AnswerOfClean = None,
    foil: FoilOfCorrupt = None,
    metric: ReadMetric = None,
    codes: Annotated[int, Argument("how many codes there are", "codes", least=2)] = 64,
    steps: Annotated[int, Argument("steps of the training", "steps", least=1)] = 300,
) -> Found:
    """Give every head's output at the last position a discrete code, and compare clean with corrupt prompts.

    Raises:
        PromptError: the pairs do not align, or there is nothing to read.
    """
    pairs = pairs_of(model, clean, corrupt, answer=answer, foil=foil, metric=metric)
    sides: list[Tensor] = []
    with torch.no_grad():
        for side in (0, 1):
            runs = [model.run(pair[side : side + 1], capture="*.attn.z@-1", logits=False) for pair in pairs.tokens]
            layers = range(model.anatomy.n_layers)
            sides.append(torch.stack([torch.stack([r[f"{i}.attn.z@-1"][0, 0] for i in layers]) for r in runs], dim=2))
    outputs = torch.cat(sides, dim=2).flatten(0, 1).float().cpu()  # [head, example, d_head]
    outputs = standardised(outputs)
    found = codes_of(outputs, codes, steps)
    positive = torch.arange(2 * len(pairs)) < len(pairs)
    generator = torch.Generator().manual_seed(current().seed)
    mixed = torch.stack([scores_of(found, _swapped(positive, generator)) for _ in range(SHUFFLES)]).mean(0)
    shape = (model.anatomy.n_layers, -1)
    values = {
        "score": scores_of(found, positive).view(shape), "score_control": mixed.view(shape),
        "difference": (outputs[:, positive].mean(1) - outputs[:, ~positive].mean(1)).norm(dim=-1).double().view(shape),
    }  # fmt: skip
    attrs = {"pairs": len(pairs), "codes": codes, "codes_in_use": int(found.unique().numel())}
    return Found(values, attrs=attrs)


def standardised(outputs: Float[Tensor, "head example d_head"]) -> Float[Tensor, "head example d_head"]:
    """Centred over examples, and of root mean square 1 in each head."""
    centred = outputs - outputs.mean(1, keepdim=True)
    return centred / centred.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)


def codes_of(outputs: Float[Tensor, "head example d_head"], codes: int, steps: int) -> Int[Tensor, "head example"]:
    """The code of each output, by an autoencoder that is trained on all of them."""
    x, generator = outputs.flatten(0, 1), torch.Generator().manual_seed(current().seed)
    drawn = x[torch.randperm(len(x), generator=generator)[:codes]]
    held = {
        "encoder": drawn.T.clone() / drawn.norm(dim=1).clamp(min=1e-6),
        "codebook": drawn.clone() + 0.01 * torch.randn(drawn.shape, generator=generator),
    }

    def loss(rows: Tensor) -> Tensor:
        some = x[rows]
        share = (some @ held["encoder"]).softmax(-1)
        hard = torch.nn.functional.one_hot(share.argmax(-1), share.shape[-1]).to(share)
        return ((hard + share - share.detach()) @ held["codebook"] - some).square().mean()

    def batch(step: int) -> Tensor:
        return torch.randint(len(x), (min(len(x), 256),), generator=torch.Generator().manual_seed(step))

    fit(held, loss, batch, steps, lr=1e-2, name="training codes")
    with torch.no_grad():
        return (x @ held["encoder"]).argmax(-1).view(outputs.shape[:2])


def scores_of(found: Int[Tensor, "head example"], positive: Bool[Tensor, " example"]) -> Float[Tensor, " head"]:
    """The share of each head's codes that no example has which is not positive."""
    scores: list[float] = []
    for row in found:
        own, other = set(row[positive].tolist()), set(row[~positive].tolist())
        scores.append(len(own - other) / len(own | other))
    return torch.tensor(scores, dtype=torch.float64)


def _swapped(positive: Bool[Tensor, " example"], generator: torch.Generator) -> Bool[Tensor, " example"]:
    """The two of each pair in either order."""
    n = len(positive) // 2
    swap = torch.rand(n, generator=generator) < 0.5
    return torch.cat([positive[:n] ^ swap, positive[n:] ^ swap])
