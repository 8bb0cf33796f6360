"""What heads read and write in terms of the vocabulary, from the weights alone: the parts that several measures share.

Formula:  a token alone: x_0 = its embedding; x_l = the stream after layer 0 without attention, x_0 + MLP_0(x_0), for
          l > 0; what head h of layer l would move of it, had it attended to it alone:  norm_l(x_l) W_V W_O, times the
          branch's scale, through the gain of a norm behind the branch; read as logits by the final norm's gain and W_U,
          relative to the mean token. Divisors of the norms behind are left out: they scale the logits
          of a head alike. Biases too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.edit import Edit, Zero
from microtome.errors import SiteError, error
from microtome.model import Model
from microtome.stream import bos_id

ROWS = 1024
"""How many tokens are run alone at once, and how many are read as logits at once."""

_WORDS: WeakKeyDictionary[Model, dict[str, int]] = WeakKeyDictionary()


def alone(model: Model, tokens: Int[Tensor, " token"], layer: int) -> Float[Tensor, "token d_model"]:
    """[token, d_model] What a layer's attention reads at each token that stands alone: see this file's head."""
    rows, points = tokens.unsqueeze(1), model.anatomy.hook_points
    site, mute = "0.resid_pre" if layer == 0 else "0.resid_post", list[Edit]()
    if layer > 0:
        mute += [Zero(f"0.{name}") for name in ("attn_out", "mixer_out") if Site(name, 0) in points]
    end = 1 if model.anatomy.n_layers > 1 else None
    found = [
        model.run(some, capture=site, edits=mute, stop_at=end, logits=False)[site][:, 0] for some in rows.split(ROWS)
    ]
    return at_least_float32(torch.cat(found))


def read(model: Model, layer: int, x: Float[Tensor, "*at d_model"]) -> Float[Tensor, "*at d_model"]:
    """The stream as a layer's attention reads it, through its norm."""
    norm = model.layers[layer].attn_norm
    return x if norm is None else at_least_float32(norm.apply(x))


def values(model: Model, layer: int) -> Float[Tensor, "head d_model d_head"]:
    """[head, d_model, d_head] W_V of every query head.

    Raises:
        SiteError: values have no weights of their own, as those of latent attention.
    """
    a = model.anatomy
    try:
        value = model.layers[layer].W_V
    except SiteError as problem:
        what = f"the heads of {a.name} have no map from tokens to tokens by their weights"
        do = "leave the measure out"
        raise error(SiteError, what, got=str(problem).removesuffix("."), do=do) from problem
    return at_least_float32(value).repeat_interleave(a.n_heads // a.n_kv_heads, dim=0)


def gained(model: Model, layer: int) -> Float[Tensor, "head d_model d_head"]:
    """[head, d_model, d_head] W_V of every query head, times the gain of the norm that it reads through."""
    norm, value = model.layers[layer].attn_norm, values(model, layer)
    gain = 1.0 if norm is None else norm.gain
    return value * (gain.unsqueeze(1) if isinstance(gain, Tensor) else gain)


def writes(model: Model, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """[head, d_head, d_model] What each head writes to the stream: W_O, the scale, and the gain of a norm behind."""
    weights, point = model.layers[layer], model.anatomy.hook_points[Site("attn_out", layer)]
    write = at_least_float32(weights.W_O) * point.scale
    after = weights.attn_post_norm
    return write if after is None else after.centre(write) * after.gain


def unembedding(model: Model) -> Float[Tensor, "d_model vocab"]:
    """[d_model, vocab] Logits of what is written to the stream, by the final norm's gain, relative to the mean token.

    Raises:
        SiteError: the model's residual stream cannot be read as logits.
    """
    norm = model.require_readable()
    unembed = at_least_float32(model.W_U) * model.anatomy.logit_scale
    unembed = unembed - unembed.mean(1, keepdim=True)
    gain = norm.gain
    unembed = unembed * (gain.unsqueeze(1) if isinstance(gain, Tensor) else gain)
    return unembed - unembed.mean(0) if norm.norm.centred else unembed


def ordinary(model: Model) -> Int[Tensor, " token"]:
    """The tokens of the vocabulary that are not special."""
    special = set(getattr(model.tokenizer, "all_special_ids", None) or ()) | {bos_id(model.tokenizer)}
    return torch.tensor([t for t in range(model.W_U.shape[1]) if t not in special])


def single_tokens(model: Model, words: Sequence[str]) -> list[int | None]:
    """The token that each word is, behind a space if there is one, else without; None where it is none or several."""
    if model.tokenizer is None:
        return [None] * len(words)
    if model not in _WORDS:
        every = range(min(model.anatomy.d_vocab, model.W_E.shape[0]))
        known: dict[str, int] = {}
        for token, word in zip(every, model.to_words(list(every)), strict=True):
            known.setdefault(word, token)
        _WORDS[model] = known
    known = _WORDS[model]
    return [known.get(f" {word}", known.get(word)) for word in words]


def above_shuffled(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with every column minus its control, as measures of a text have it."""
    ends = {name: f"{name}_shuffled" for name in found if f"{name}_shuffled" in found}
    return {**found, **{f"{name}_diff": found[name].double() - found[end] for name, end in ends.items()}}
