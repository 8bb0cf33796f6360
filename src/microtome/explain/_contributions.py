"""Which parts wrote the answer: a logit as an exact sum over embedding, heads, MLPs and biases.

Formula:  x_final = embed + sum_l (attn_out_l + mixer_out_l + mlp_out_l),  logit_t = u . x_final + constant,
          u = centre(gain * W_U[:, t]) / scale,  the final norm's scale held at its value in this run.
          A head gives z_h W_O^h . u, split over sources s as pattern[q, s] v_s W_O^h . u; a neuron a_n w_out,n . u.
          Where a branch has a norm behind it, u is drawn back through that norm with its scale held as well.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from microtome.anatomy import NormWeights, Site, at_least_float32
from microtome.errors import SiteError, error
from microtome.explain._answers import Answer, answers_and_foils
from microtome.method import Argument, Column, Found, PromptText, Source, question
from microtome.model import Model
from microtome.run import Run

Detail = Literal["source", "neuron"]

PARTS = ("embed", "constant", "attn", "attn_bias", "mixer", "mlp")
"""What sums to the logit, of a model that has it."""

TERM = "none: the terms of a sum are compared with each other"
WHOLE = "none: what the parts sum to"
BATCH, LAYER, HEAD = ("batch",), ("batch", "layer"), ("batch", "layer", "head")


def _column(name: str, meaning: str, dims: tuple[str, ...] = BATCH, title: str = "", control: str = TERM) -> Column:
    return Column(name, "logits", meaning, control, dims=dims, title=title)


@question(
    "contributions",
    command="contributions",
    title="direct logit attribution",
    question="How much does each part of the model add to a logit?",
    columns=(
        _column("logit", "the answer's logit, or its difference from the foil's, before any soft cap", control=WHOLE),
        _column("embed", "what the embedding adds", title="embedding"),
        _column("attn", "what each head adds", HEAD, "heads"),
        _column("attn_bias", "what the output biases of attention and any norm after it add", LAYER, "attention bias"),
        _column("mixer", "what each mixer that is no attention adds", LAYER, "mixer"),
        _column("mlp", "what each MLP adds", LAYER, "MLP"),
        _column("constant", "what the biases of the final norm and of the unembedding add"),
        _column("gap", "the logit minus the sum of all parts", control="none: 0 up to rounding"),
        _column("attn_source", "what each head adds, split by the position it reads from", (*HEAD, "k_pos")),
        _column("mlp_neuron", "what each neuron adds", (*LAYER, "neuron"), "neurons"),
        _column("mlp_bias", "what the output bias of each MLP adds, where it is split into neurons", LAYER, "MLP bias"),
    ),
    source=Source(
        "Elhage et al.", "A Mathematical Framework for Transformer Circuits", 2021,
        departs="norms after a branch (Gemma 2) are included, with their scale held fixed",
    ),
    cost="one forward; memory for one position per layer, and for all patterns and values if split by source",
    check="tests/laws/test_explain.py",
    call='mt.explain.contributions(model, "The capital of France is", answer=" Paris", foil=" Rome")',
    reading="A positive part raises the answer; embedding, heads, MLPs and biases sum to the logit.",
    needs=("sum", "lens", "heads", "final.scale"),
)  # fmt: skip
def contributions(
    model: Model,
    prompt: PromptText,
    *,
    answer: Annotated[
        Answer | None, Argument("one token, or one per prompt; by default the model's own", from_text=str)
    ] = None,
    foil: Annotated[Answer | None, Argument("explain the difference to this token's logit", from_text=str)] = None,
    position: Annotated[int, Argument("position to explain, counted from the end of the prompt if negative")] = -1,
    detail: Annotated[tuple[Detail, ...], Argument("split heads by source position, MLPs by neuron")] = (),
) -> Found:
    """Split a logit at one position exactly into what each part of the model adds to it.

    Of parts that a layer has not there is NaN.

    Raises:
        SiteError: the model's logits are no such sum (norms on the stream itself).
        PromptError: the answer or the foil is not one token, or they are the same.
    """
    refuse_unless_sum(model)
    _refuse_detail(model, detail)
    at = f"@{position}"
    last_site = "logits" if model.anatomy.logit_softcap is None else "final"
    there = {site.name for site in model.anatomy.hook_points}
    wanted = [f"embed{at}", f"final.scale{at}", f"{last_site}{at}"]
    wanted += [f"*.{name}{at}" for name in ("attn.z", "mixer_out", "mlp_out") if name in there]
    wanted += [f"*.mlp.post{at}"] if "neuron" in detail else []
    wanted += [f"*.attn.pattern{at}", "*.attn.v"] if "source" in detail else []
    run = model.run(prompt, capture=wanted)
    with torch.no_grad():
        reader = _Reader(model, run, answer, foil, position)
        values = reader.values(detail)
    coords: dict[str, Any] = {"layer": list(range(model.anatomy.n_layers))}
    coords |= {"head": list(range(values["attn"].shape[-1]))} if "attn" in values else {}
    words = {"answer": reader.answers, "foil": reader.foils}
    attributes = {name: model.to_words(ids) for name, ids in words.items() if ids is not None}
    coords |= {name: ("batch", text) for name, text in attributes.items()}
    if "source" in detail:
        coords["source"] = (("batch", "k_pos"), run.words)
    attrs = {name: text[0] if len(text) == 1 else text for name, text in attributes.items()}
    attrs["metric"] = "logit of the answer" if reader.foils is None else "logit difference"
    parts = [name for name in PARTS if name in values]
    parts = [*(name for name in parts if name != "mlp"), "mlp_neuron", "mlp_bias"] if "neuron" in detail else parts
    attrs |= {"parts": parts, "sum_of": "logit"}
    return Found(values, coords=coords, attrs=run.provenance | attrs)


def refuse_unless_sum(model: Model) -> None:
    """Refuse a model whose logits are not a sum over what its parts add.

    Raises:
        SiteError: there are norms on the residual stream itself, or a head with its own transform.
    """
    a = model.anatomy
    why = a.why_no_sum
    if why is None and (model.final_norm is None or model.W_U.shape[0] != a.d_model):
        why = "a head with its own transform"
    if why is not None:
        raise error(
            SiteError, f"the logits of {a.name} are not a sum over its parts", got=why,
            do="use a causal model with norms before its branches",
        )  # fmt: skip


def _refuse_detail(model: Model, detail: tuple[Detail, ...]) -> None:
    """Refuse to split what cannot be split.

    Raises:
        SiteError: heads are gated, so that what they add is no sum over positions; or some MLP's neurons are not seen.
    """
    a = model.anatomy
    gated = next((why for name, why in a.unproven.items() if name.endswith(".attn.mix")), None)
    layers = enumerate(a.parts.layers)
    unseen = [i for i, own in layers if (own.mlp or own.down) and Site("mlp.post", i) not in a.hook_points]
    if "source" in detail and gated is not None:
        what = f"what heads of {a.name} add cannot be split by source position"
        raise error(SiteError, what, got=gated, do='leave "source" out of detail=')
    if "neuron" in detail and unseen:
        what = f"what MLPs of {a.name} add cannot be split by neuron"
        why = f"no mlp.post in layer {unseen[0]}: {a.missing.get(Site('mlp.post', unseen[0]))}"
        raise error(SiteError, what, got=why, do='leave "neuron" out of detail=')


class _Reader:
    """Reads what was written at one position through the final norm, in the direction of the answer."""

    def __init__(self, model: Model, run: Run, answer: Answer | None, foil: Answer | None, position: int) -> None:
        self.model, self.run, self.at, self.a = model, run, f"@{position}", model.anatomy
        norm = model.final_norm
        assert norm is not None
        logits = self._before_cap()
        own = logits.argmax(-1).tolist() if answer is None else answer
        ends = [range(n)[position] + 1 for n in run.batch.lengths]
        prompts = [row[:end] for row, end in zip(run.batch.rows, ends, strict=True)]
        self.answers, self.foils = answers_and_foils(model, own, foil, prompts)
        unembed = self._difference(model.W_U.T).double() * self.a.logit_scale
        self.u = norm.centre(unembed * norm.gain) / run[f"final.scale{self.at}"].double()
        self.constant = self.zero = unembed.new_zeros(len(logits))
        if norm.bias is not None:
            self.constant = self.constant + unembed @ norm.bias.double()
        if model.b_U is not None:
            self.constant = self.constant + self._difference(model.b_U).double() * self.a.logit_scale
        self.logit = self._difference(logits.T).diagonal()

    def _difference(self, x: Shaped[Tensor, " vocab *of"]) -> Float[Tensor, " batch *of"]:
        """[row, ...] What x [vocab, ...] holds for the answer of each row, minus what it holds for the foil."""
        own = x[self.answers].double()
        return own if self.foils is None else own - x[self.foils].double()

    def _before_cap(self) -> Float[Tensor, "batch vocab"]:
        """The logits as the model gave them; under a cap, as they enter it.

        A cap cannot be undone: far beyond it every logit is the cap itself. So they are formed anew from what the
        unembedding reads.
        """
        if self.a.logit_softcap is None:
            return self.run[f"logits{self.at}"][:, 0]
        logits = at_least_float32(self.run[f"final{self.at}"][:, 0]) @ at_least_float32(self.model.W_U)
        return (logits if self.model.b_U is None else logits + self.model.b_U) * self.a.logit_scale

    def values(self, detail: tuple[Detail, ...]) -> dict[str, Tensor]:
        """All columns, [batch, ...] in float64."""
        rows: dict[str, dict[int, Tensor]] = {}
        for i, layer in enumerate(self.a.parts.layers):
            own = {} if layer.attn is None else self._attention(i, "source" in detail)
            own |= {} if layer.mixer is None else {"mixer": self._written("mixer_out", i)}
            if layer.mlp is not None or layer.down is not None:
                own |= {"mlp": self._written("mlp_out", i)} | (self._neurons(i) if "neuron" in detail else {})
            for name, value in own.items():
                rows.setdefault(name, {})[i] = value
        found = {name: self._by_layer(values) for name, values in rows.items()}
        found["embed"] = (self.run[f"embed{self.at}"][:, 0].double() * self.u).sum(-1)
        found |= {"constant": self.constant, "logit": self.logit}
        parts = [found[name].reshape(len(self.logit), -1).nansum(1) for name in PARTS if name in found]
        return found | {"gap": self.logit - sum(parts)}

    def _by_layer(self, values: dict[int, Float[Tensor, "batch ..."]]) -> Float[Tensor, "batch layer ..."]:
        """Values of some layers, of the most units that one of them has, as float64; NaN where there are none."""
        sizes = [max(n) for n in zip(*(x.shape for x in values.values()), strict=True)]
        found = self.u.new_full((sizes[0], self.a.n_layers, *sizes[1:]), torch.nan)
        for i, x in values.items():
            found[(slice(None), i, *map(slice, x.shape[1:]))] = x.double()
        return found

    def _written(self, name: str, i: int) -> Float[Tensor, " batch"]:
        """What a branch of a layer adds."""
        return (self.run[f"{i}.{name}{self.at}"][:, 0].double() * self.u).sum(-1)

    def _attention(self, i: int, sources: bool) -> dict[str, Tensor]:
        weights, z = self.model.layers[i], self.run[f"{i}.attn.z{self.at}"][:, 0]  # [batch, head, d_head]
        w, b = at_least_float32(weights.W_O).flatten(0, 1), weights.b_O
        u, bias = self._through("attn_out", i, weights.attn_post_norm, z.flatten(1), w, b)
        read = (u.to(w.dtype) @ w.T).reshape(z.shape)
        found = {"attn": (z * read).sum(-1), "attn_bias": bias}
        if sources:
            pattern, v = self.run[f"{i}.attn.pattern{self.at}"][:, :, 0].double(), self.run[f"{i}.attn.v"]
            v = v.repeat_interleave(z.shape[1] // v.shape[2], dim=2).double()
            found["attn_source"] = pattern * torch.einsum("bkhd,bhd->bhk", v, read.double())
        return found

    def _neurons(self, i: int) -> dict[str, Tensor]:
        weights = self.model.layers[i]
        post, w, b = self.run[f"{i}.mlp.post{self.at}"][:, 0], at_least_float32(weights.W_out), weights.b_out
        u, bias = self._through("mlp_out", i, weights.mlp_post_norm, post, w, b)
        return {"mlp_neuron": post.double() * (u.to(w.dtype) @ w.T), "mlp_bias": bias}

    def _through(
        self, name: str, i: int, norm: NormWeights | None, x: Float[Tensor, "batch unit"],
        w: Float[Tensor, "unit d_model"], b: Float[Tensor, " d_model"] | None,
    ) -> tuple[Float[Tensor, "batch d_model"], Float[Tensor, " batch"]]:  # fmt: skip
        """The direction u drawn back to what x @ w + b gives, through a norm behind it; and what the biases add."""
        scale = self.a.hook_points[Site(name, i)].scale
        u, bias = self.u if scale == 1.0 else self.u * scale, self.zero
        if norm is not None:
            raw = x.to(w.dtype) @ w if b is None else x.to(w.dtype) @ w + b
            u = norm.centre(self.u * norm.gain) / norm.scale(raw).double().unsqueeze(-1) * scale
            bias = bias if norm.bias is None else self.u @ norm.bias.double() * scale
        return u, bias if b is None else bias + u @ b.double()
