"""Inputs that excite a unit: soft tokens, raised by gradient and kept near what the model would say.

Formula:  p_t = softmax(theta_t / tau), a distribution over tokens at each of T positions; its embedding is that of the
          mean token, sum_v p_t(v) e(v).
          theta maximises  a(T) / sigma - fluency . L,  a(T) the unit at the last position, sigma its standard deviation
          over random tokens, L = - mean over t > 1 of sum_v p_t(v) log q(v | p_1 .. p_{t-1}) the model's own loss of
          the soft text. tau falls from 1 to 0.1 geometrically, so that distributions become tokens.
          Then the likeliest tokens are taken, and the unit is read on them, as on any text.
          theta starts at random; or, by facets, at log((1 - eps) m_t + eps / V), m_t the share of the contexts of a
          facet that have a token at t places from the peak: the mean of the facet; further ones with noise added.
Control:  as many random texts as there are starts, times `RANDOM`; the best place of a text, if one is given; and of
          a start from a facet the best of its contexts.
Cost:     `steps` forwards and backwards of `starts` rows of T tokens.
Check:    the token of a planted detector is found; tests/laws/test_excite.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from microtome.anatomy import Address, at_least_float32, parse
from microtome.context import current
from microtome.edit import Set
from microtome.errors import ArgumentError, SiteError, error
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.run import Prompt, prompt_from_text
from microtome.training import fit

RANDOM = 32
"""Random texts for each start, as a control."""
COLD = 0.1
"""The last temperature; the first is 1."""
ROWS = 16
EVEN = 0.1
"""The share of all tokens alike in what starts from a facet."""


@question(
    "excite",
    command="excite",
    title="exciting inputs",
    question="Which text excites a unit most?",
    columns=(
        Column("reached", "activation", "the unit at the last position of the text that was found", "random",
               dims=("start",)),
        Column("random", "activation", "its mean on random texts of the same length", dims=()),
        Column("random_most", "activation", "its largest value on them", "none: a control", dims=()),
        Column("soft", "activation", "the unit on the soft tokens, before the likeliest ones were taken",
               "none: see `reached`", dims=("start",)),
        Column("loss", "nats", "the model's own mean loss of the text that was found", "loss_random", (0, None),
               dims=("start",)),
        Column("loss_random", "nats", "that of random texts", range=(0, None), dims=()),
        Column("text", "token", "the text that was found", "none: words", dims=("start",)),
        Column("facet", "1", "the facet that the text was started from", "none: a name", dims=("start",)),
        Column("facet_most", "activation", "the largest value of the unit in the contexts of that facet",
               "none: compare `reached`", dims=("start",)),
        Column("corpus_most", "activation", "the largest value of the unit in the text that was given",
               "none: compare `reached`", dims=()),
        Column("corpus_text", "token", "the words before that place", "none: words", dims=()),
    ),
    source=(
        Source(
            "Nguyen, Dosovitskiy, Yosinski, Brox, Clune",
            "Synthesizing the preferred inputs for neurons in neural networks via deep generator networks", 2016,
            "1605.09304", departs="for text: distributions over tokens, and the model's own loss in place of a "
            "generator",
        ),
        Source("Nguyen, Yosinski, Clune", "Multifaceted Feature Visualization: Uncovering the Different Types of "
               "Features Learned By Each Neuron in Deep Neural Networks", 2016, "1602.03616",
               departs="starts are mean tokens of the contexts of a facet, not mean images"),
        Source("Nguyen, Yosinski, Clune", "Understanding Neural Networks via Feature Visualization: A survey", 2019,
               "1904.08939", departs="one of the priors it lists, for text"),
    ),
    cost="steps forwards and backwards of as many rows as starts",
    check="tests/laws/test_excite.py",
    call='mt.explain.excite(model, "12.mlp.post[431]")',
    reading="Each start ends in a text of its own; above what random texts and a corpus reach, it excites the unit.",
    needs=("next token",),
)  # fmt: skip
def excite(
    model: Model,
    unit: Annotated[
        str, Argument('the unit, such as "12.mlp.post[431]"', positional=True, from_text=str)
    ],
    *,
    length: Annotated[int, Argument("tokens of the text", "tokens", least=2)] = 8,
    starts: Annotated[int, Argument("texts to find, from different starts", "texts", least=1)] = 4,
    steps: Annotated[int, Argument("updates", "steps", least=1)] = 150,
    fluency: Annotated[float, Argument("weight of the model's own loss of the text", least=0)] = 0.3,
    lr: Annotated[float, Argument("learning rate", least=0)] = 0.3,
    text: Annotated[
        Prompt | None, Argument("a text to compare with, or several", from_text=prompt_from_text)
    ] = None,
    facets: Annotated[
        xr.Dataset | None,
        Argument("facets of the neuron to start from, as `neuron_facets` finds them; `starts` each", command=False),
    ] = None,
) -> Found:  # fmt: skip
    """Find texts that excite a unit, by gradient, and compare them with random texts and with a text of your own.

    Raises:
        SiteError: the address is not one unit of one layer, or embeddings are not a sum over tokens.
        ArgumentError: the facets are not those of this neuron, or are none.
        FitError: the unit is not finite.
    """
    address = _one_unit(model, unit)
    rng = torch.Generator().manual_seed(current().seed)
    own = [] if facets is None else facets_of(facets, address)
    starts *= max(len(own), 1)
    rows = torch.randint(model.anatomy.d_vocab, (RANDOM * starts, length), generator=rng).to(model.device)
    random, random_loss = _read(model, address, rows)
    sigma = float(random.std().clamp(min=1e-6))
    embed = _Embedding.of(model, length)
    theta = torch.randn(starts, length, model.anatomy.d_vocab, generator=rng)
    for k, contexts in enumerate(own):
        theta[k] = 0.0  # the first of each is the mean itself
        theta[k :: len(own)] += mean_of(contexts, length, model.anatomy.d_vocab)
    theta = theta.to(model.device)
    soft = torch.zeros(starts, dtype=torch.float64)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        p = (theta / COLD ** (step / max(steps - 1, 1))).softmax(-1)
        edit = Set("embed", value=embed(p))
        run = model.run(rows[:starts], capture=str(address), edits=[edit], grad=True)
        value = at_least_float32(run[str(address)])[:, -1].reshape(starts)
        loss_of_text = -(p[:, 1:] * at_least_float32(run.logits[:, :-1]).log_softmax(-1)).sum(-1).mean(1)
        soft.copy_(value.detach().double())
        return (fluency * loss_of_text - value / sigma).sum(), {
            "unit": value.detach().mean(), "text_loss": loss_of_text.detach().mean(),
        }  # fmt: skip

    fitted = fit({"theta": theta}, loss, lambda step: step, steps, lr=lr, model=model, name="raising the unit")
    found = theta.argmax(-1)
    reached, losses = _read(model, address, found)
    order = reached.argsort(descending=True)
    values: dict[str, Any] = {
        "reached": reached[order], "loss": losses[order], "soft": soft[order.cpu()], "random": float(random.mean()),
        "random_most": float(random.max()), "loss_random": float(random_loss.mean()),
        "text": [model.to_text(found[i]) for i in order.tolist()] if model.tokenizer is not None else
        [" ".join(model.to_words(found[i])) for i in order.tolist()],
    }  # fmt: skip
    values |= {} if text is None else _of_corpus(model, address, text, length)
    if own:
        best = [_of_corpus(model, address, [c], length)["corpus_most"] for contexts in own for c in contexts]
        most = [max(part) for part in _in_turn(best, list(map(len, own)))]
        facet = (order % len(own)).tolist()
        values |= {"facet": facet, "facet_most": [most[f] for f in facet]}
    attrs = {"unit": str(address), "steps": fitted.step, "sigma": sigma, "fluency": fluency}
    return Found(values, coords={"start": list(range(starts))}, attrs=attrs)


def _one_unit(model: Model, unit: str) -> Address:
    """The address of one unit of one layer.

    Raises:
        SiteError: it is something else, or the model has no such unit.
    """
    address = parse(unit)
    try:
        sites = model.anatomy.sites(address)
    except SiteError as problem:
        what, do = f"{model.anatomy.name} has no unit {unit} to excite", "name a unit that it has"
        raise error(SiteError, what, got=problem.told.rstrip("."), do=do) from None
    three = len(address.spec.dims) == 3 and address.spec.dims[1] == "pos"
    plain = isinstance(address.positions, str) or not address.positions.is_all
    if len(sites) != 1 or not address.units.is_one or not three or plain:
        raise error(
            SiteError, f'"{unit}" is not one unit of one layer', allowed='such as "12.mlp.post[431]"',
            do="name a layer and one unit, without positions",
        )  # fmt: skip
    return address


def facets_of(facets: Any, address: Address) -> list[list[list[int]]]:
    """By facet of a neuron, its contexts: tokens up to the peak.

    Raises:
        ArgumentError: these are no facets, or not of this neuron, or it has none.
    """
    do = "give mt.measurements.neuron_facets(model, [(layer, neuron)])"
    if not isinstance(facets, xr.Dataset) or not {"facet", "context"} <= set(facets.data_vars):
        raise error(ArgumentError, "these are no facets of neurons", got=type(facets).__name__, do=do)
    pairs = list(zip(facets["layer"].values.tolist(), facets["neuron"].values.tolist(), strict=True))
    wanted = next((at for at, (i, n) in enumerate(pairs) if str(address) == f"{i}.mlp.post[{n}]"), None)
    if wanted is None:
        got = ", ".join(f"{i}.mlp.post[{n}]" for i, n in pairs[:5])
        raise error(ArgumentError, f"these are no facets of {address}", got=got, do=do)
    number, rows = facets["facet"].values[wanted], facets["context"].values[wanted]
    members = [np.flatnonzero(number == f) for f in range(number.max() + 1)]
    found = [[[int(t) for t in rows[r] if t >= 0] for r in member] for member in members]
    if not found:
        raise error(ArgumentError, f"{address} peaks in no context", got="no facet", do="read more text")
    return found


def mean_of(contexts: Sequence[Sequence[int]], length: int, vocab: int) -> Float[Tensor, "pos vocab"]:
    """Log of the share of the contexts that have each token at each place before their end, mixed with all alike."""
    counts = torch.zeros(length, vocab)
    for context in contexts:
        for back, token in enumerate(reversed(context[-length:])):
            counts[length - 1 - back, token] += 1.0
    many = counts.sum(-1, keepdim=True)
    share = torch.where(many > 0, counts / many.clamp(min=1.0), torch.full_like(counts, 1.0 / vocab))
    return ((1 - EVEN) * share + EVEN / vocab).log()


def _in_turn(values: Sequence[float], sizes: Sequence[int]) -> list[list[float]]:
    """Values in parts of these sizes."""
    ends = list(accumulate(sizes))
    return [list(values[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


def _read(model: Model, address: Address, rows: Int[Tensor, "row pos"]) -> tuple[Tensor, Tensor]:
    """The unit at the last position of each row, and the model's mean loss of each."""
    values: list[Tensor] = []
    losses: list[Tensor] = []
    for part in rows.split(ROWS):
        run = model.run(part, capture=f"{address}@-1")
        values.append(run[f"{address}@-1"].double().reshape(len(part)))
        log_p = at_least_float32(run.logits[:, :-1]).log_softmax(-1)
        losses.append(-log_p.gather(-1, part[:, 1:].unsqueeze(-1)).squeeze(-1).double().mean(1))
    return torch.cat(values), torch.cat(losses)


def _of_corpus(model: Model, address: Address, text: Prompt, length: int) -> dict[str, Any]:
    """The largest value of the unit anywhere in a text, and the words before that place."""
    batch = model.to_batch(text)
    most, words = -torch.inf, ""
    for row in batch.rows:
        value = model.run(row.unsqueeze(0), capture=str(address), logits=False)[str(address)].double().reshape(-1)
        at = int(value.argmax())
        if float(value[at]) > most:
            most, words = float(value[at]), "".join(model.to_words(row[max(0, at + 1 - length) : at + 1]))
    return {"corpus_most": most, "corpus_text": words}


class _Embedding:
    """What enters the first block for distributions over tokens: a multiple of the mean embedding, and positions."""

    def __init__(self, table: Float[Tensor, "vocab d"], scale: float, positions: Float[Tensor, "pos d"]) -> None:
        self.table, self.scale, self.positions = table, scale, positions

    def __call__(self, p: Float[Tensor, "row pos vocab"]) -> Float[Tensor, "row pos d"]:
        """[row, pos, d_model]"""
        return (p.to(self.table.dtype) @ self.table) * self.scale + self.positions

    @classmethod
    def of(cls, model: Model, length: int) -> _Embedding:
        """Read off a run of a few tokens.

        Raises:
            SiteError: what enters the first block is not a multiple of the tokens' embeddings plus positions.
        """
        ids = torch.tensor([i % model.anatomy.d_vocab for i in (1, 5, 11, 17)], device=model.device)
        rows = ids.unsqueeze(1).expand(-1, length)
        given = model.run(rows, capture="embed", logits=False)["embed"].double()
        table = model.W_E.detach()
        if table.shape[1] != given.shape[-1]:
            raise error(
                SiteError, f"embeddings of {model.anatomy.name} do not enter its first layer as they are",
                got=f"{table.shape[1]} wide, in a stream of {given.shape[-1]}", do="use another model",
            )  # fmt: skip
        own = table[ids].double()
        between, wanted = own[1:] - own[:1], given[1:, 0] - given[:1, 0]
        scale = float((between * wanted).sum() / between.pow(2).sum())
        positions = given[0] - scale * own[0]
        gap = float((given - scale * own.unsqueeze(1) - positions).norm() / given.norm())
        if gap > 1e-3:
            raise error(
                SiteError, f"embeddings of {model.anatomy.name} are no sum of tokens and positions",
                got=f"{gap:.1%} are something else, such as a norm behind them", do="use another model",
            )  # fmt: skip
        return cls(table, scale, positions.to(table.dtype))
