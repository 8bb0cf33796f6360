"""One pass over a text: norms, branch shares, cosines, firing, and the tokens that move each neuron most.

Formula:  over all tokens but the first of each row (which attention sinks inflate):
          attn_share = mean |attn_out| / |resid_pre|,   mlp_share = mean |mlp_out| / |resid before the MLP's sum|,
          attn_cos = mean cos(resid_pre, attn_out),     mlp_cos = mean cos(resid before, mlp_out),
          block_cos = mean cos(resid_pre, resid_post),  block_influence = 1 - block_cos,
          max_abs of |resid_post| over all tokens, median_abs the mean over 32 positions a row of each one's median;
          out_norm of a head = mean |scale * gain * centre(result_h) / divisor|: what the head adds to the stream, the
          branch's scale included, and where a norm stands behind the branch that norm too, its divisor held.
          Neurons, over all tokens of the text (a beginning-of-text token is none): firing_rate = share with gate > 0
          (activation > 0 in plain MLPs), moments of the activation, and the k rows in which it peaks highest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.measurements._skip import token_loss
from microtome.model import Model
from microtome.stream import Firing, Moments, TokenBatch, TopExamples

if TYPE_CHECKING:
    import xarray as xr

TOKEN_METRICS = (
    "resid_pre_norm", "resid_mid_norm", "resid_post_norm", "attn_share", "mlp_share", "attn_cos", "mlp_cos",
    "block_cos",
)  # fmt: skip


class TextStatistics:
    """What one pass over a text measures, fed batch by batch with `update`.

    Cost:   per batch, one forward with logits and about a tenth of it for the statistics; nothing is kept but sums.
    Check:  any split into batches gives the same result; equals the same numbers from kept captures;
            tests/laws/test_measure.py.

    Args:
        model: an open causal model.
        examples: how many top examples to keep a neuron.
    """

    def __init__(self, model: Model, examples: int = 5) -> None:
        self.model = model
        a = model.anatomy
        self._neural = [i for i, p in enumerate(a.parts.layers) if p.experts is None]
        self._tokens = [Moments(len(TOKEN_METRICS)) for _ in range(a.n_layers)]
        self._first = [Moments(1) for _ in range(a.n_layers)]
        self._medians = [Moments(1) for _ in range(a.n_layers)]
        self._peaks = torch.zeros(a.n_layers, a.d_model, dtype=torch.float64)
        self._heads = [Moments(a.n_heads) for _ in range(a.n_layers)]
        self._after = [layer.attn_post_norm for layer in model.layers]
        self._grams: list[Tensor] = [self._gram(i) for i in range(a.n_layers)]
        self._moments = {i: Moments(a.d_mlp) for i in self._neural}
        self._firing = {i: Firing(a.d_mlp) for i in self._neural}
        self._top = {i: TopExamples(a.d_mlp, examples) for i in self._neural}
        self._loss = Moments(1)
        self._held: dict[str, Tensor] = {}
        self._start = torch.zeros(0, dtype=torch.int64)
        self._text: Tensor | None = None

    def _gram(self, layer: int) -> Tensor:
        """[head, d_head, d_head] G of |what a head adds|^2 = z G z, but for the divisor of a norm behind the branch."""
        after, scale = self._after[layer], self.model.anatomy.hook_points[Site("attn_out", layer)].scale
        write = at_least_float32(self.model.layers[layer].W_O) * scale
        write = write if after is None else after.centre(write) * after.gain
        return write @ write.transpose(1, 2)

    def update(self, batch: TokenBatch) -> None:
        """Run one batch and take in what it shows."""
        self._start, self._text = batch.start, batch.text
        parallel = self.model.anatomy.parts.form == "parallel"
        hold = ["*.resid_pre", "*.attn_out", "*.mlp_out"] + ([] if parallel else ["*.resid_mid"])
        observe: dict[str, Callable[[Site, Tensor], None]] = dict.fromkeys(hold, self._hold)
        observe |= {"*.resid_post": self._residual, "*.attn.z": self._head_norms}
        if self._neural:
            some = ",".join(map(str, self._neural))
            gated = any(Site("mlp.gate", i) in self.model.anatomy.hook_points for i in self._neural)
            observe |= {f"{some}.mlp.post": self._neurons}
            observe |= {f"{some}.mlp.gate" if gated else f"{some}.mlp.pre": self._fires}
        with torch.no_grad():
            run = self.model.run(batch.tokens, observe=observe)
            self._loss.update(token_loss(run.logits, run.tokens).reshape(-1, 1))
        self._held.clear()

    def _hold(self, site: Site, x: Tensor) -> None:
        self._held[site.name] = x

    def _residual(self, site: Site, post: Tensor) -> None:
        layer, held = site.layer or 0, self._held
        pre, attn, mlp = (at_least_float32(held[name]) for name in ("resid_pre", "attn_out", "mlp_out"))
        mid, post = at_least_float32(held["resid_mid"]) if "resid_mid" in held else None, at_least_float32(post)
        before = pre if mid is None else mid
        norms = {name: x.norm(dim=-1) for name, x in (("pre", pre), ("post", post), ("attn", attn), ("mlp", mlp))}
        norms["before"] = norms["pre"] if mid is None else mid.norm(dim=-1)
        floor = torch.finfo(post.dtype).tiny
        rows = torch.stack(
            [
                norms["pre"],
                norms["before"],
                norms["post"],
                norms["attn"] / norms["pre"].clamp(min=floor),
                norms["mlp"] / norms["before"].clamp(min=floor),
                (pre * attn).sum(-1) / (norms["pre"] * norms["attn"]).clamp(min=floor),
                (before * mlp).sum(-1) / (norms["before"] * norms["mlp"]).clamp(min=floor),
                (pre * post).sum(-1) / (norms["pre"] * norms["post"]).clamp(min=floor),
            ],
            dim=-1,
        )
        self._tokens[layer].update(rows[:, 1:])
        self._first[layer].update(norms["post"][:, :1])
        size = post.abs()
        self._peaks[layer] = torch.maximum(self._peaks[layer], size.amax((0, 1)).cpu())
        step = max(1, size.shape[1] // 32)
        self._medians[layer].update(size[:, step - 1 :: step].median(-1, keepdim=True).values)

    def _head_norms(self, site: Site, z: Tensor) -> None:
        layer = site.layer or 0
        z = at_least_float32(z[:, 1:])
        square = torch.einsum("bphd,hde,bphe->bph", z, self._grams[layer], z)
        norm = square.clamp(min=0).sqrt()
        after, weights = self._after[layer], self.model.layers[layer]
        if after is not None:
            raw = z.flatten(2) @ at_least_float32(weights.W_O).flatten(0, 1)
            norm = norm / after.scale(raw if weights.b_O is None else raw + weights.b_O).unsqueeze(-1)
        self._heads[layer].update(norm)

    def _neurons(self, site: Site, post: Tensor) -> None:
        layer = site.layer or 0
        self._moments[layer].update(post, self._text)
        self._top[layer].update(post, self._start, self._text)

    def _fires(self, site: Site, gate: Tensor) -> None:
        # A plain activation (GELU, ReLU) has the sign of its pre-activation, so that one rule serves both.
        self._firing[site.layer or 0].update(gate, self._text)

    @property
    def loss(self) -> float:
        """Mean loss of the next token, in nats."""
        return float(self._loss.result().mean[0])

    def layers(self) -> xr.Dataset:
        """Dataset over (layer): the token metrics, `resid_post_norm_first`, `max_abs`, `max_abs_dim`, `median_abs`."""
        import xarray as xr

        means = torch.stack([m.result().mean for m in self._tokens])
        variables = {name: ("layer", means[:, j].numpy()) for j, name in enumerate(TOKEN_METRICS)}
        if self.model.anatomy.parts.form == "parallel":
            variables["resid_mid_norm"] = ("layer", torch.full((len(means),), torch.nan).numpy())
        variables["block_influence"] = ("layer", 1 - variables["block_cos"][1])
        variables["resid_post_norm_first"] = ("layer", torch.cat([m.result().mean for m in self._first]).numpy())
        variables["max_abs"] = ("layer", self._peaks.amax(1).numpy())
        variables["max_abs_dim"] = ("layer", self._peaks.argmax(1).numpy())
        variables["median_abs"] = ("layer", torch.cat([m.result().mean for m in self._medians]).numpy())
        return xr.Dataset(variables, coords={"layer": list(range(len(means)))}, attrs=self._attrs("layers"))

    def heads(self) -> xr.Dataset:
        """Dataset over (layer, head): `out_norm`, the mean norm of what each head adds to the stream."""
        import xarray as xr

        norms = torch.stack([m.result().mean for m in self._heads]).numpy()
        return xr.Dataset({"out_norm": (("layer", "head"), norms)}, attrs=self._attrs("heads"))

    def neurons(self) -> xr.Dataset:
        """Dataset over (layer, neuron): firing rate and moments; over (layer, neuron, rank): the top examples.

        `example_index` is the global index of the peak token, `example_start` that of the first token of its row,
        `example_value` the activation there. There are as many as asked for, or as rows were read if those are fewer.
        """
        import xarray as xr

        layers = self._neural
        moments = [self._moments[i].result() for i in layers]
        tops = [self._top[i].result() for i in layers]
        filled = min((self._top[i].rows for i in layers), default=0)
        flat = ("layer", "neuron")
        one = {
            "firing_rate": [self._firing[i].result().rate for i in layers],
            "mean": [m.mean for m in moments],
            "std": [m.std for m in moments],
            "max": [m.max for m in moments],
            "min": [m.min for m in moments],
        }
        many = {
            "example_value": [t.values[:, :filled] for t in tops],
            "example_index": [t.index[:, :filled] for t in tops],
            "example_start": [t.start[:, :filled] for t in tops],
        }
        variables = {k: (flat, torch.stack(v).numpy()) for k, v in one.items() if v}
        variables |= {k: ((*flat, "rank"), torch.stack(v).numpy()) for k, v in many.items() if v}
        return xr.Dataset(variables, coords={"layer": layers}, attrs=self._attrs("neurons"))

    def _attrs(self, what: str) -> dict[str, Any]:
        return self.model.provenance | {"method": f"text statistics: {what}", "tokens": self._loss.result().count}
