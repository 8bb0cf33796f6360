"""Who wrote the answer: a logit as an exact sum over embedding, heads, MLPs and biases.

Formula:  x_final = embed + sum_l (attn_out_l + mlp_out_l),  logit_t = u . x_final + constant,
          u = centre(gain * W_U[:, t]) / scale,  the final norm's scale held at its value in this run.
          A head gives z_h W_O^h . u, split over sources s as pattern[q, s] v_s W_O^h . u; a neuron a_n w_out,n . u.
          Where a branch has a norm behind it, u is drawn back through that norm with its scale held as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from microtome.anatomy import NormWeights, Site, at_least_float32
from microtome.errors import SiteError, error
from microtome.explain._answers import one_token
from microtome.model import Model
from microtome.run import Prompt, Run

if TYPE_CHECKING:
    import xarray as xr

Detail = Literal["component", "source", "neuron"]


def contributions(
    model: Model,
    prompt: Prompt,
    *,
    answer: str | int | None = None,
    foil: str | int | None = None,
    position: int = -1,
    detail: tuple[Detail, ...] = (),
) -> xr.Dataset:
    """How much each part of the model adds to a logit at one position; the parts sum to the logit.

    Formula:  logit_t = constant + embed.u + sum_l [ sum_h head_lh.u + attn_bias_l.u + mlp_l.u ]
    Source:   direct logit attribution, as in Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021.
              Departs: norms behind a branch (Gemma 2) are drawn through too, with their scale held.
    Cost:     one forward; memory for one position of every layer, and the patterns if sources are asked for.
    Check:    the sum equals the logit to 1e-4, for every family with a final norm; tests/laws/test_explain.py.

    Args:
        model: an open model with a final norm.
        prompt: one prompt, or several.
        answer: the token whose logit is explained, as text of one token or an id; by default the model's own answer.
        foil: explain the difference to this token's logit instead.
        position: where, counted from the end of each row if negative.
        detail: also "source" (each head by the position that it reads) and "neuron".

    Returns:
        Dataset, in logits: `embed` (batch), `attn` (batch, layer, head), `attn_bias` and `mlp` (batch, layer),
        `constant` (batch), `logit` (batch), and `gap` = logit minus the sum of all parts; with detail, `attn_source`
        (batch, layer, head, k_pos) and `mlp_neuron` (batch, layer, neuron), `mlp_bias` (batch, layer). A positive part
        raises the answer. For models that cap logits, `logit` is before the cap.

    Raises:
        SiteError: the model adds to a stream in a way that has no such sum (norms on the stream itself), or there is no
            such detail.
        PromptError: the answer or the foil is not one token.
    """
    refuse_unless_sum(model)
    detail = _details(detail)
    at = f"@{position}"
    said = "logits" if model.anatomy.logit_softcap is None else "final"
    wanted = [f"embed{at}", f"*.attn.z{at}", f"*.mlp_out{at}", f"final.scale{at}", f"{said}{at}"]
    wanted += [f"*.mlp.post{at}"] if "neuron" in detail else []
    wanted += [f"*.attn.pattern{at}", "*.attn.v"] if "source" in detail else []
    run = model.run(prompt, capture=wanted)
    with torch.no_grad():
        reader = _Reader(model, run, at, answer, foil)
        return _dataset(reader, reader.parts(detail)).assign_attrs(position=position)


def refuse_unless_sum(model: Model) -> None:
    """Refuse a model whose logits are not a sum over what its parts add.

    Raises:
        SiteError: there are norms on the residual stream itself, or a head with a transform of its own.
    """
    a = model.anatomy
    if a.parts.form == "post_norm" or model.final_norm is None or model.W_U.shape[0] != a.d_model:
        raise error(
            SiteError,
            f"the logits of {a.name} are not a sum over its parts",
            got="norms on the residual stream itself, or a head with a transform of its own",
            do="use a causal model with norms before its branches",
        )


def _details(given: Any) -> tuple[Detail, ...]:
    """The details asked for, one alone or several.

    Raises:
        SiteError: one of them is none.
    """
    asked: tuple[Any, ...] = (given,) if isinstance(given, str) else tuple(given)
    wrong = [name for name in asked if name not in get_args(Detail)]
    if wrong:
        allowed = ", ".join(f'"{name}"' for name in get_args(Detail))
        raise error(
            SiteError, "contributions have no such detail", got=repr(wrong[0]), allowed=allowed, do="name one of these"
        )
    return asked


def _dataset(reader: _Reader, parts: dict[str, Tensor]) -> xr.Dataset:
    """The parts with their axes, the gap that they leave, and the words that they are about."""
    import xarray as xr

    model, run = reader.model, reader.run
    dims = {
        "embed": (), "constant": (), "logit": (), "attn": ("layer", "head"), "attn_bias": ("layer",), "mlp": ("layer",),
        "attn_source": ("layer", "head", "k_pos"), "mlp_neuron": ("layer", "neuron"), "mlp_bias": ("layer",),
    }  # fmt: skip
    data = xr.Dataset({k: (("batch", *dims[k]), v.cpu().numpy(), {"unit": "logits"}) for k, v in parts.items()})
    whole = data["embed"] + data["constant"] + data["attn"].sum(("layer", "head"))
    data["gap"] = data["logit"] - whole - data["attn_bias"].sum("layer") - data["mlp"].sum("layer")
    labels = {"layer": range(model.anatomy.n_layers), "head": range(model.anatomy.n_heads)}
    data = data.assign_coords({k: list(v) for k, v in labels.items()})
    data = data.assign_coords(answer=("batch", model.to_words(reader.answers)))
    if reader.foils is not None:
        data = data.assign_coords(foil=("batch", model.to_words(reader.foils)))
    if "attn_source" in data:
        data = data.assign_coords(source=(("batch", "k_pos"), run.words))
    held = "scale held at its value in this run"
    return data.assign_attrs(model.provenance | {"method": "direct logit attribution", "final_norm": held})


class _Reader:
    """Reads what was written at one position through the final norm, in the direction of the answer."""

    def __init__(self, model: Model, run: Run, at: str, answer: str | int | None, foil: str | int | None) -> None:
        self.model, self.run, self.at = model, run, at
        self.a = model.anatomy
        norm = model.final_norm
        assert norm is not None
        batch = run.tokens.shape[0]
        logits = self._before_cap()
        self.answers: Tensor = logits.argmax(-1) if answer is None else torch.full((batch,), one_token(model, answer))
        self.answers = self.answers.to(run.tokens.device)
        self.foils = None if foil is None else torch.full_like(self.answers, one_token(model, foil))
        unembed = model.W_U[:, self.answers].T.double()
        if self.foils is not None:
            unembed = unembed - model.W_U[:, self.foils].T.double()
        unembed = unembed * self.a.logit_scale
        scale = run[f"final.scale{at}"].double()
        self.u = norm.centre(unembed * norm.gain) / scale
        self.constant = torch.zeros(batch, dtype=torch.float64, device=self.u.device)
        if norm.bias is not None:
            self.constant = self.constant + unembed @ norm.bias.double()
        if model.b_U is not None:
            bias = model.b_U.double() * self.a.logit_scale
            self.constant = self.constant + bias[self.answers]
            self.constant = self.constant - (0.0 if self.foils is None else bias[self.foils])
        self.logit = self._logit(logits.double())

    def _before_cap(self) -> Tensor:
        """Logits [batch, vocab] as the model gave them; under a cap, as they enter it.

        A cap cannot be undone: far beyond it every logit is the cap itself. So they are formed anew from what the
        unembedding reads.
        """
        if self.a.logit_softcap is None:
            return self.run[f"logits{self.at}"][:, 0]
        logits = at_least_float32(self.run[f"final{self.at}"][:, 0]) @ at_least_float32(self.model.W_U)
        return (logits if self.model.b_U is None else logits + self.model.b_U) * self.a.logit_scale

    def _logit(self, logits: Tensor) -> Tensor:
        own = logits.gather(1, self.answers.unsqueeze(1)).squeeze(1)
        return own if self.foils is None else own - logits.gather(1, self.foils.unsqueeze(1)).squeeze(1)

    def parts(self, detail: tuple[Detail, ...]) -> dict[str, Tensor]:
        rows: dict[str, list[Tensor]] = {}
        for i in range(self.a.n_layers):
            for name, value in (self._attention(i, "source" in detail) | self._mlp(i, "neuron" in detail)).items():
                rows.setdefault(name, []).append(value)
        found = {name: torch.stack(values, dim=1) for name, values in rows.items()}
        embed = (self.run[f"embed{self.at}"][:, 0].double() * self.u).sum(-1)
        return {"embed": embed, "constant": self.constant, "logit": self.logit} | found

    def _through(self, norm: NormWeights | None, name: str, i: int, raw: Tensor) -> tuple[Tensor, Tensor]:
        """The direction u drawn back through what stands behind a branch, and that norm's own bias read by u."""
        scale = self.a.hook_points[Site(name, i)].scale
        if norm is None:
            return self.u * scale, torch.zeros_like(self.constant)
        u = norm.centre(self.u * norm.gain) / norm.scale(raw).double().unsqueeze(-1) * scale
        bias = torch.zeros_like(self.constant) if norm.bias is None else (self.u * norm.bias).sum(-1) * scale
        return u, bias

    def _attention(self, i: int, sources: bool) -> dict[str, Tensor]:
        weights = self.model.layers[i]
        z = self.run[f"{i}.attn.z{self.at}"][:, 0]
        raw = torch.einsum("bhd,hdm->bm", at_least_float32(z), at_least_float32(weights.W_O))
        raw = raw if weights.b_O is None else raw + weights.b_O
        u, bias = self._through(weights.attn_post_norm, "attn_out", i, raw)
        read = torch.einsum("hdm,bm->bhd", weights.W_O.double(), u)
        found = {"attn": (z.double() * read).sum(-1), "attn_bias": bias}
        if weights.b_O is not None:
            found["attn_bias"] = bias + u @ weights.b_O.double()
        if sources:
            pattern, v = self.run[f"{i}.attn.pattern{self.at}"][:, :, 0].double(), self.run[f"{i}.attn.v"].double()
            v = v.repeat_interleave(z.shape[1] // v.shape[2], dim=2)
            found["attn_source"] = pattern * torch.einsum("bkhd,bhd->bhk", v, read)
        return found

    def _mlp(self, i: int, neurons: bool) -> dict[str, Tensor]:
        weights = self.model.layers[i]
        out = self.run[f"{i}.mlp_out{self.at}"][:, 0].double()
        found = {"mlp": (out * self.u).sum(-1)}
        if neurons:
            post = self.run[f"{i}.mlp.post{self.at}"][:, 0]
            raw = at_least_float32(post) @ at_least_float32(weights.W_out)
            raw = raw if weights.b_out is None else raw + weights.b_out
            u, bias = self._through(weights.mlp_post_norm, "mlp_out", i, raw)
            found["mlp_neuron"] = post.double() * (u @ weights.W_out.double().T)
            found["mlp_bias"] = bias if weights.b_out is None else bias + u @ weights.b_out.double()
        return found
