"""How few neurons a model needs: at a stated rise of its perplexity, and when the largest of each token stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site, at_least_float32, parse
from microtome.context import current
from microtome.edit import Apply, Edit
from microtome.errors import ArgumentError, error
from microtome.measurements._sparsity import THRESHOLDS
from microtome.method import Batches, Bound, Measure, Pass, Text, declared
from microtome.metric import token_loss
from microtome.model import Model
from microtome.stream import ExampleMeans, mean_interval


def _dropping(layers: Iterable[int], keep: Callable[[int, Tensor], Tensor]) -> list[Edit]:
    """Edits that keep, in each layer, the activations for which a function says so."""

    def edit(layer: int) -> Edit:
        return Apply(f"{layer}.mlp.post", lambda x: torch.where(keep(layer, x), x, 0.0))

    return [edit(layer) for layer in layers]


def _mean_loss(model: Model, read: Batches, edits: list[Edit]) -> ExampleMeans:
    """The loss by row."""
    kept = ExampleMeans(1)
    for batch in read.parts:
        loss = token_loss(model.run(batch.tokens, edits=edits).logits, batch.tokens.to(model.device))
        mask = None if batch.text is None else batch.text[:, 1:]
        kept.update(loss.double().unsqueeze(-1).cpu(), batch.start, mask)
    return kept


def sparsity_at_loss(
    model: Model,
    text: Any = None,
    *,
    rise: float = 0.01,
    tokens: int = 2_000,
    length: int = 128,
    rows: int = 4,
    steps: int = 12,
) -> xr.Dataset:
    """How few neurons the whole model needs when its perplexity may rise by a share: PPL-p%.

    Formula:  in every layer the neurons that add at most t_l are dropped at each token, t_l such that the layer's error
              `cett` is c, the same c in all layers, along straight lines in log t between the thresholds of the measure
              `sparsity`; the largest c, by bisection, with exp(loss' - loss) - 1 <= rise.
    Source:   Luo et al., "Sparsing Law: Towards Large Language Models with Greater Activation Sparsity", 2024 (arXiv
              2411.02335), PPL-p%. Departs: thresholds are interpolated; so many steps of bisection; errors are measured
              and losses compared on the same text.
    Cost:     about 5 forwards for the errors, and steps + 3 forwards.
    Check:    the rise keeps to its budget, and more of it needs no more neurons; tests/laws/test_sparsity.py.

    Args:
        model: an open causal model.
        text: whatever a measure reads; the documentation topics of the standard library by default.
        rise: by which share the perplexity may rise.
        tokens: of the text to read.
        length: tokens of a row.
        rows: rows of a batch.
        steps: of the bisection.

    Returns:
        A dataset: `active` [layer], the share of neurons that are kept, and `threshold` [layer]; `cett`, the error of
        every layer; `loss`, `rise`, what the perplexity then rises by, and its control `rise_random`, without as many
        neurons of each layer drawn anew at every token.

    Raises:
        ArgumentError: the rise is not above 0.
        SiteError: the model has no neurons in its MLPs.
        ModelUnsupported: the model does not predict the next token.
    """
    if not rise > 0:
        raise error(ArgumentError, "rise must be above 0", got=rise, do="give a share, such as 0.01")
    model.require_next_token()
    read = Text(text, tokens=tokens, length=length, rows=rows).batches(model)
    cuts = _Cuts(model, read)
    low, high, best = 0.0, 1.0, (0.0, dict.fromkeys(cuts.layers, 1.0))
    for step in range(steps):
        middle = (low + high) / 2
        made = cuts.at(middle)
        low, high, best = (middle, high, made) if made[0] <= rise else (low, middle, best)
        current().report("bisecting the error", step + 1, steps)
    limits, layers = cuts.thresholds(low), cuts.layers
    variables: dict[str, Any] = {
        "active": ("layer", [best[1][i] for i in layers], _about("share", "share of neurons that are kept")),
        "threshold": ("layer", [limits[i] for i in layers], _about("norm", "what a neuron adds at most if dropped")),
        "cett": ((), low, _about("ratio", "error of every MLP relative to its output")),
        "loss": ((), float(cuts.base), _about("nats", "mean next-token loss")),
        "rise": ((), best[0], _about("ratio", "relative rise of the perplexity")),
        "rise_random": ((), cuts.random(best[1]), _about("ratio", "the same without as many drawn at random")),
    }
    return _told(model, variables, {"layer": layers}, "sparsity_at_loss", read)


class _Cuts:
    """Losses of a text when every layer drops the neurons that add least, to one error."""

    def __init__(self, model: Model, read: Batches) -> None:
        self.model, self.read = model, read
        measured = declared("sparsity")
        assert isinstance(measured, Measure)
        bound = Bound(measured, measured.statistic({}), measured.layers(model))
        made = Pass(model, [bound], measured.on)
        for batch in read.parts:
            made.update(batch)
        curves = made.results()["sparsity"]
        self.layers = [int(i) for i in curves["layer"].values]
        self.cett = np.maximum.accumulate(curves["cett"].values, axis=1)
        self.norms = {i: at_least_float32(model.layers[i].W_out.detach()).norm(dim=1) for i in self.layers}
        self.base = _mean_loss(model, read, []).mean

    def thresholds(self, c: float) -> dict[int, float]:
        """By layer, the threshold at an error."""
        grid = THRESHOLDS.log2().numpy()
        return {i: float(2.0 ** np.interp(c, self.cett[row], grid)) for row, i in enumerate(self.layers)}

    def at(self, c: float) -> tuple[float, dict[int, float]]:
        """The rise of the perplexity at an error, and the share of neurons kept in each layer."""
        limits = self.thresholds(c)
        kept: dict[int, list[float]] = {i: [] for i in self.layers}

        def keep(layer: int, x: Tensor) -> Tensor:
            flags = x.abs() * self.norms[layer].to(x) > limits[layer]
            kept[layer].append(float(flags.double().sum()))
            return flags

        rise = self._rise(keep)
        size = sum(batch.tokens.numel() for batch in self.read.parts)
        return rise, {i: sum(some) / (size * len(self.norms[i])) for i, some in kept.items()}

    def random(self, share: Mapping[int, float]) -> float:
        """The rise with such shares of neurons, drawn anew at every token."""
        rng = torch.Generator().manual_seed(current().seed)
        return self._rise(lambda layer, x: torch.rand(x.shape, generator=rng).to(x) < share[layer])

    def _rise(self, keep: Callable[[int, Tensor], Tensor]) -> float:
        after = _mean_loss(self.model, self.read, _dropping(self.layers, keep)).mean
        return float(torch.expm1(after - self.base))


def loss_at_topk(
    model: Model,
    text: Any = None,
    *,
    shares: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    tokens: int = 2_000,
    length: int = 128,
    rows: int = 4,
) -> xr.Dataset:
    """The loss, and how well its probabilities are calibrated, when only the largest activations of a token stay.

    Formula:  in every layer and at every token the k largest |a_n| stay, k = share x neurons, rounded, at least 1;
              rise = loss' - loss; calibration = sum over 15 equal bins of the top probability of (tokens in the bin /
              tokens) |share that is right - mean probability|.
    Source:   Li et al., "The Lazy Neuron Phenomenon", 2022 (arXiv 2210.06313), the k largest; Naeini et al., 2015, and
              Guo et al., 2017, calibration error. Departs: sizes of activations, as gated MLPs have both signs.
    Cost:     one forward for each share, and one.
    Check:    with all neurons nothing changes; tests/laws/test_sparsity.py.

    Args:
        model: an open causal model.
        text: whatever a measure reads; the documentation topics of the standard library by default.
        shares: of the neurons that stay.
        tokens: of the text to read.
        length: tokens of a row.
        rows: rows of a batch.

    Returns:
        A dataset with the axis `share`: `rise` with its 95 % interval over rows as `_lo` and `_hi`, and `calibration`.

    Raises:
        ArgumentError: a share is not above 0 and at most 1.
        ModelUnsupported: the model does not predict the next token.
    """
    if not shares or not all(0 < share <= 1 for share in shares):
        raise error(ArgumentError, "shares must be above 0 and at most 1", got=list(shares), do="give such")
    model.require_next_token()
    layers = [i for i in range(model.anatomy.n_layers) if Site("mlp.post", i) in model.anatomy.hook_points]
    if not layers:
        model.anatomy.sites(parse("*.mlp.post"))  # says why there are none
    read = Text(text, tokens=tokens, length=length, rows=rows).batches(model)
    rises, calibrations = list[tuple[Tensor, Tensor, Tensor]](), list[float]()
    base = [token_loss(model.run(b.tokens).logits, b.tokens.to(model.device)) for b in read.parts]
    for done, share in enumerate(shares):

        def keep(layer: int, x: Tensor, share: float = share) -> Tensor:
            best = x.abs().topk(max(1, round(share * x.shape[-1])), dim=-1).indices
            return torch.zeros_like(x, dtype=torch.bool).scatter(-1, best, True)

        kept, bins = ExampleMeans(1), torch.zeros(3, 15, dtype=torch.float64)
        edits = _dropping(layers, keep)
        for batch, whole in zip(read.parts, base, strict=True):
            logits = model.run(batch.tokens, edits=edits).logits
            mask = torch.ones(whole.shape, dtype=torch.bool) if batch.text is None else batch.text[:, 1:]
            rise = (token_loss(logits, batch.tokens.to(logits.device)) - whole).double().cpu()
            kept.update(rise.unsqueeze(-1), batch.start, mask)
            bins += _calibration(logits, batch.tokens, mask)
        found = kept.result()
        rises.append(mean_interval(found.total, weights=found.count))
        calibrations.append(float((bins[1] - bins[2]).abs().sum() / bins[0].sum()))
        current().report("keeping the largest", done + 1, len(shares))
    ends = [torch.cat([one[i] for one in rises]).numpy() for i in range(3)]
    about = _about("nats", "rise of the loss when only the largest activations stay")
    variables: dict[str, Any] = {
        f"rise{end}": ("share", x, about) for end, x in zip(("", "_lo", "_hi"), ends, strict=True)
    }
    variables["calibration"] = ("share", calibrations, _about("probability", "calibration error in 15 bins"))
    return _told(model, variables, {"share": list(shares)}, "loss_at_topk", read)


def _calibration(logits: Tensor, tokens: Tensor, mask: Tensor) -> Float[Tensor, "3 bin"]:
    """By bin of the top probability: tokens, how many are right, and the sum of the probabilities."""
    found = torch.zeros(3, 15, dtype=torch.float64)
    for row, words, counted in zip(logits, tokens, mask, strict=True):
        top, guess = (x.cpu() for x in row[:-1].float().softmax(-1).max(-1))
        place = (top.double() * 15).long().clamp(max=14)[counted]
        parts = torch.ones_like(top), guess == words[1:].cpu(), top
        for i, x in enumerate(parts):
            found[i].index_add_(0, place, x[counted].double())
    return found


def _about(unit: str, meaning: str) -> dict[str, str]:
    return {"unit": unit, "meaning": meaning}


def _told(model: Model, variables: Any, coords: Any, method: str, read: Batches) -> xr.Dataset:
    told = {"method": method, "text": read.source, "seed": current().seed}
    return xr.Dataset(variables, coords=coords).assign_attrs(dict(model.provenance) | told)
