"""How alike two models see one text: by layers, by single units, and by what their heads attend to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from microtome.anatomy import SITES, Site, at_least_float32
from microtome.context import current
from microtome.errors import ArgumentError, DataError, SiteError, error
from microtome.measurements._cka import LEAST, centred_gram, hsic
from microtome.method import Column, Result, Text
from microtome.model import Model
from microtome.stream import Covariance, CrossCovariance

SITE: dict[str, str] = {"layer": "resid_post", "neuron": "mlp.post", "attention": "attn.pattern"}
SVCCA = 0.99
"""Share of the variance that is kept of either layer."""
ROOM = 2**29
"""Bytes that the products of units may take at a time: layers that do not fit are read in another pass."""
PROBE = "The 3 quick brown foxes, naïvely, jumped (over) 17 dogs.\n"


def similarity(
    a: Model, b: Model, text: Any = None, *, grain: str = "layer", site: str | None = None, sequences: int = 16,
    width: int = 128,
) -> Result:  # fmt: skip
    """How alike two models, or two checkpoints of one, see the same text.

    Formula:  layer: `cka` of all pairs of layers as the measure `layer_similarity`;  `svcca` of the layers at the same
              depth: the components that hold 99 % of the variance of either, whitened, P and Q; the mean of the
              singular values of P^T cov(x, y) Q;
              neuron: `best_correlation` of each unit of a, the largest |correlation| over tokens with a unit of b in
              the layer at the same depth, `best_unit` that one;
              attention: `overlap` of each head of a with each of b in the layer at the same depth, the mean over
              queries of sum_k sqrt(A[q, k] B[q, k]), 1 where the patterns are one.
              Controls: `.._shuffled`, the same with the tokens of b half the row on;  `overlap_uniform`, of each head
              of a with uniform attention. Each row's first token is left out of all.
              The layer at the same depth as layer i of L is round(i (M - 1) / (L - 1)) of M.
    Source:   Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019 (arXiv 1905.00414); Raghu
              et al., "SVCCA: Singular Vector Canonical Correlation Analysis for Deep Learning Dynamics and
              Interpretability", 2017 (arXiv 1706.05806); El Kheir, Ali and Chowdhury, "Speech Representation Analysis
              based on Inter- and Intra-Model Similarities", 2023. Departs: text in place of speech; the unbiased CKA;
              patterns by their overlap (Bhattacharyya).
    Cost:     one forward of either model over the rows, of neurons one for every 512 MiB of products; float64 products
              [d, d] per layer, whatever the length of the text.
    Check:    a copy in another basis has CKA 1 and other units, one with its neurons in another order has both 1;
              tests/laws/test_similarity.py.

    Args:
        a: an open model.
        b: another, which reads the same tokens.
        text: whatever a measure reads; the documentation topics of the standard library by default.
        grain: "layer", "neuron" or "attention".
        site: what is compared, by layers or units: "resid_post" and "mlp.post" by default.
        sequences: how many rows to read.
        width: tokens of a row.

    Returns:
        A dataset: cka, cka_shuffled [layer, other], svcca, svcca_shuffled [layer]; or best_correlation, best_unit,
        best_correlation_shuffled [layer, unit]; or overlap [layer, head, other_head], overlap_uniform [layer, head].
        `other_layer` [layer] is the layer at the same depth.

    Raises:
        ArgumentError: there is no such grain, or patterns are asked for at another site.
        SiteError: a model lacks the site.
        DataError: the tokenizers differ, or there is too little text.

    >>> mt.measurements.similarity(model, tuned, grain="neuron")["best_correlation"].median("unit")
    """
    if grain not in SITE:
        raise error(ArgumentError, "grain must be a word", got=repr(grain), allowed=", ".join(SITE), do="choose one")
    name = SITE[grain] if site is None else site
    spec = SITES.get(name)
    if spec is None or spec.scope != "layer" or (grain == "attention") != (name == "attn.pattern"):
        allowed = "attn.pattern" if grain == "attention" else "sites of layers with one vector a token"
        raise error(ArgumentError, f"site does not go with the grain {grain}", got=repr(name), allowed=allowed,
                    do="leave it out")  # fmt: skip
    require_one_tokenizer(a, b)
    pair = _Pair(a, b, name, Text(text, sequences=sequences, width=width))
    found = {"layer": _by_layer, "neuron": _by_unit, "attention": _by_head}[grain](pair)
    data = xr.Dataset(found, coords={"layer": pair.layers[0]})
    depth = ("layer", pair.matched, Column("other_layer", "index", "the layer of the other model at that depth").attrs)
    attrs = {f"other_{key}": value for key, value in b.provenance.items()}
    said = {"grain": grain, "site": name, "sequences": sequences, "width": width, "seed": current().seed}
    return Result.of(data.assign(other_layer=depth)).assign_attrs(dict(a.provenance) | attrs | said)


def require_one_tokenizer(a: Model, b: Model) -> None:
    """Refuse models whose tokenizers read a text differently.

    Raises:
        DataError: they do.
    """
    if a.tokenizer is None or b.tokenizer is None:
        return
    read = [list(m.tokenizer(PROBE, add_special_tokens=True)["input_ids"]) for m in (a, b)]
    if read[0] != read[1]:
        what = f"{a.anatomy.name} and {b.anatomy.name} read a text as other tokens"
        raise error(DataError, what, do="compare models with one tokenizer")


@dataclass
class _Pair:
    """Two models on one text.

    Attributes:
        layers: of either, those that have the site.
        matched: for each of the first's, the second's at the same depth.
    """

    a: Model
    b: Model
    site: str
    look: Text
    layers: tuple[list[int], list[int]] = field(init=False)
    matched: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = (self._having(self.a), self._having(self.b))
        mine, theirs = self.layers
        steps = max(1, len(mine) - 1)
        self.matched = [theirs[round(i * (len(theirs) - 1) / steps)] for i in range(len(mine))]

    def _having(self, model: Model) -> list[int]:
        points = model.anatomy.hook_points
        found = [i for i in range(model.anatomy.n_layers) if Site(self.site, i) in points]
        if not found:
            what = f"{model.anatomy.name} has {self.site} in no layer"
            raise error(SiteError, what, do="choose another site")
        return found

    def size(self, second: bool, layer: int) -> int:
        """Units of the site."""
        model, spec = (self.b if second else self.a), SITES[self.site]
        sizes = [model.anatomy.size(Site(self.site, layer), dim) for dim in spec.dims[2:]]
        return torch.Size(sizes).numel()

    def batches(
        self, layers: Sequence[int], others: Sequence[int]
    ) -> Iterator[tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]]:
        """The tokens that count [row, pos] of each batch, and the site in some layers of either model."""
        parts = self.look.batches(self.a).parts
        for number in range(len(parts)):
            batch = parts[number]
            later = torch.ones(batch.tokens.shape, dtype=torch.bool)
            later[:, 0] = False
            states: list[dict[int, Tensor]] = []
            for model, wanted in ((self.a, layers), (self.b, others)):
                unique = sorted(set(wanted))
                run = model.run(
                    batch.tokens.to(model.device), capture=f"{','.join(map(str, unique))}.{self.site}", logits=False
                )
                states.append({i: at_least_float32(run[f"{i}.{self.site}"]).cpu() for i in unique})
            yield later, states[0], states[1]
            current().report("comparing two models", number + 1, len(parts))


def _by_layer(pair: _Pair) -> dict[str, Any]:
    """CKA of all pairs of layers, and SVCCA of those at the same depth."""
    mine, theirs = pair.layers
    sums = {name: torch.zeros(len(mine), len(theirs), dtype=torch.float64) for name in ("cka", "cka_shuffled")}
    own = torch.zeros(len(mine), dtype=torch.float64), torch.zeros(len(theirs), dtype=torch.float64)
    spreads = [Covariance(pair.size(False, i)) for i in mine], [Covariance(pair.size(True, i)) for i in pair.matched]
    sizes = [(pair.size(False, i), pair.size(True, j)) for i, j in zip(mine, pair.matched, strict=True)]
    crosses = {end: [CrossCovariance(*size) for size in sizes] for end in ("", "_shuffled")}
    rows = 0
    for later, first, second in pair.batches(mine, theirs):
        for row, mask in enumerate(later):
            if int(mask.sum()) < LEAST:
                continue
            rows += 1
            k, other = (_grams(some, row, mask) for some in (first, second))
            order = _on(k.shape[1])
            sums["cka"] += hsic(k, other)
            sums["cka_shuffled"] += hsic(k, other[:, order][:, :, order])
            for total, gram in zip(own, (k, other), strict=True):
                total += gram.flatten(1).square().sum(1) / (gram.shape[1] * (gram.shape[1] - 3))
        for n, (i, j) in enumerate(zip(mine, pair.matched, strict=True)):
            x, y = first[i].flatten(2), second[j].flatten(2)
            spreads[0][n].update(x, later)
            spreads[1][n].update(y, later)
            crosses[""][n].update(x, y, later)
            crosses["_shuffled"][n].update(x, _rolled(y), later)
    if not rows:
        raise error(DataError, f"no row has {LEAST + 1} tokens or more", do="give longer texts")
    scale = torch.outer(own[0].sqrt(), own[1].sqrt())
    found: dict[str, Any] = {}
    for name, total in sums.items():
        means = "linear CKA of a layer of either model", "the same with the other's tokens half the row on"
        column = Column(name, "1", means[name != "cka"], control="" if name != "cka" else "cka_shuffled", range=(-1, 1))
        found[name] = (("layer", "other"), (total / scale).clamp(-1, 1).numpy(), column.attrs)
    for end, accumulators in crosses.items():
        values = [
            svcca(x.result().covariance, y.result().covariance, c.result().covariance)
            for x, y, c in zip(*spreads, accumulators, strict=True)
        ]
        meaning = "mean canonical correlation of the components that hold 99 % of the variance of either layer"
        column = Column(f"svcca{end}", "correlation", meaning, control="" if end else "svcca_shuffled", range=(0, 1))
        found[f"svcca{end}"] = ("layer", values, column.attrs)
    return found


def _grams(states: dict[int, Tensor], row: int, mask: Tensor) -> Tensor:
    """[layer, n, n] The Gram matrices of the tokens of one row that count."""
    return torch.stack([centred_gram(x[row][mask].flatten(1)) for x in states.values()])


def svcca(x: Tensor, y: Tensor, cross: Tensor, share: float = SVCCA) -> float:
    """The mean canonical correlation of two kinds of vectors from their covariances [x, x], [y, y], [x, y].

    Of either only the components that hold `share` of its variance are kept; the mean is over as many as the fewer.
    """
    whitened: list[Tensor] = []
    for covariance in (x, y):
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        held = values.cumsum(0) / values.sum().clamp(min=1e-300)
        n = min(int((held < share - 1e-12).sum()) + 1, int((values > values[0] * 1e-14).sum()) or 1)
        whitened.append(vectors[:, :n] / values[:n].sqrt().clamp(min=1e-150))
    found = torch.linalg.svdvals(whitened[0].T @ cross @ whitened[1])
    return float(found.clamp(max=1).mean())


def _by_unit(pair: _Pair) -> dict[str, Any]:
    """The largest correlation of each unit with one of the other model, some layers at a time."""
    mine, ends = pair.layers[0], ("", "_shuffled")
    sizes = {(pair.size(False, i), pair.size(True, j)) for i, j in zip(mine, pair.matched, strict=True)}
    if len(sizes) > 1:
        what = f"layers of {pair.site} differ in their number of units and make no one table"
        raise error(SiteError, what, got=", ".join(map(str, sorted(sizes))), do="choose another site")
    x, y = next(iter(sizes))
    step = max(1, ROOM // (16 * x * y))
    best: dict[str, list[Tensor]] = {f"best_correlation{end}": [] for end in ends} | {"best_unit": []}
    for start in range(0, len(mine), step):
        some = list(zip(mine, pair.matched, strict=True))[start : start + step]
        crosses = {end: [CrossCovariance(x, y) for _ in some] for end in ends}
        for later, first, second in pair.batches([i for i, _ in some], [j for _, j in some]):
            for n, (i, j) in enumerate(some):
                one, other = first[i].flatten(2), second[j].flatten(2)
                crosses[""][n].update(one, other, later)
                crosses["_shuffled"][n].update(one, _rolled(other), later)
        for end in ends:
            for cross in crosses[end]:
                value, unit = cross.result().correlation.abs().nan_to_num(0.0).max(1)
                best[f"best_correlation{end}"].append(value.clamp(max=1))
                if not end:
                    best["best_unit"].append(unit)
    told = {
        "best_correlation": Column("best_correlation", "correlation", "largest size of the correlation with a unit of "
                                   "the other model", control="best_correlation_shuffled", range=(0, 1)),
        "best_correlation_shuffled": Column("best_correlation_shuffled", "correlation", "the same with the other's "
                                            "tokens half the row on", range=(0, 1)),
        "best_unit": Column("best_unit", "index", "the unit of the other model that it is of"),
    }  # fmt: skip
    return {name: (("layer", "unit"), torch.stack(best[name]).numpy(), told[name].attrs) for name in told}


def _by_head(pair: _Pair) -> dict[str, Any]:
    """The overlap of the patterns of all pairs of heads at the same depth."""
    mine = pair.layers[0]
    heads = [(pair.a.anatomy.n_heads, pair.b.anatomy.n_heads) for _ in mine]
    sums = [torch.zeros(size, dtype=torch.float64) for size in heads]
    even = [torch.zeros(size[0], dtype=torch.float64) for size in heads]
    queries = 0
    for later, first, second in pair.batches(mine, pair.matched):
        rows, width = later.shape
        queries += rows * (width - 1)
        keys = torch.ones(width, width, dtype=torch.float64)
        keys = keys.tril() if pair.a.anatomy.causal else keys
        uniform = (keys / keys.sum(1, keepdim=True)).sqrt()[1:]
        for n, (i, j) in enumerate(zip(mine, pair.matched, strict=True)):
            p, q = (x.double().clamp(min=0).sqrt()[:, :, 1:] for x in (first[i], second[j]))
            sums[n] += torch.einsum("bhqk,bgqk->hg", p, q)
            even[n] += torch.einsum("bhqk,qk->h", p, uniform)
    overlap, uniform = (torch.stack(some) / queries for some in (sums, even))
    column = Column("overlap", "share", "overlap of what two heads attend to", control="overlap_uniform", range=(0, 1))
    control = Column("overlap_uniform", "share", "overlap of a head with uniform attention", range=(0, 1))
    return {
        "overlap": (("layer", "head", "other_head"), overlap.clamp(max=1).numpy(), column.attrs),
        "overlap_uniform": (("layer", "head"), uniform.clamp(max=1).numpy(), control.attrs),
    }


def _on(n: int) -> Tensor:
    """[n] Each place half of all on, round the end."""
    return (torch.arange(n) + n // 2) % n


def _rolled(x: Tensor) -> Tensor:
    """x [row, pos, ...] with the tokens behind each row's first half of these on."""
    return torch.cat([x[:, :1], x[:, 1:][:, _on(x.shape[1] - 1)]], dim=1)
