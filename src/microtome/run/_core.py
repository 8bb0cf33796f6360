"""A model that is loaded and mapped: its parts, weights, tokenizer and provenance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, cached_property
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor

from microtome.anatomy import (
    Anatomy,
    LayerWeights,
    Norm,
    NormWeights,
    Weights,
    adapters,
    integer,
    is_plain,
    packed,
    runs_on,
    sizes,
)
from microtome.errors import ModelUnsupported, PromptError, SiteError, error
from microtome.run._batch import Batch, Prompt, encodings_of, to_batch
from microtome.run._codec import Codec, Encoding
from microtome.run._fingerprint import Fingerprint
from microtome.shown import in_notebooks

_version = cache(version)  # every run records them, and reading a package's metadata takes as long as a small forward


@in_notebooks
class LoadedModel:
    """A model that is loaded and mapped; its weights are untouched.

    Attributes:
        hf: the `PreTrainedModel` itself.
        tokenizer: its tokenizer, or None.
        anatomy: sizes, and where every site is.
        pace: floating-point operations a second of its last run, reading the weights counted as if it were some.
    """

    def __init__(self, hf: Any, tokenizer: Any, anatomy: Anatomy) -> None:
        self.hf, self.tokenizer, self.anatomy = hf, tokenizer, anatomy
        self.remap(anatomy)
        self.pace = 2e10
        self._fingerprint = Fingerprint(hf)

    def remap(self, anatomy: Anatomy) -> None:
        """Take another map of the same model: what it lacks is missing from now on."""
        self.anatomy, self._weights = anatomy, Weights(self.hf, anatomy)

    def __repr__(self) -> str:
        a = self.anatomy
        numbers = f"{a.n_layers} layers, {a.n_heads} heads, {a.d_mlp} neurons, d_model {a.d_model}"
        return f"{type(self).__name__}({a.name}: {numbers}{f'; weights: {self.stored}' if self.stored else ''})"

    def _facts(self) -> dict[str, str]:
        """Its sizes, where it is, and what reads its text."""
        a, tokenizer = self.anatomy, self.tokenizer
        return {
            "name": a.name,
            "family": a.model_type,
            "layers": str(a.n_layers),
            "heads": f"{a.n_heads}, {a.n_kv_heads} key/value heads of {a.d_head}",
            "neurons": f"{a.d_mlp} a layer",
            "d_model": str(a.d_model),
            "vocabulary": str(a.d_vocab),
            "weights": "; ".join(filter(None, [f"{self.dtype} on {self.device}".removeprefix("torch."), self.stored])),
            "tokenizer": "none" if tokenizer is None else type(tokenizer).__name__,
        }

    @property
    def stored(self) -> str:
        """How weights are stored that are no plain matrices here, and which adapters are on; empty where all are."""
        return "; ".join([*filter(None, [self.anatomy.stored]), *adapters(self.hf)])

    @property
    def device(self) -> torch.device:
        """Where the weights are, or where they are offloaded, where it runs."""
        return runs_on(self.hf)

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are made of."""
        return self.hf.dtype

    @property
    def layers(self) -> tuple[LayerWeights, ...]:
        """The weights of each layer, by the field's names, as views."""
        self.require_mapped()
        return self._weights.layers

    def require_mapped(self) -> None:
        """Refuse a model whose blocks are not those of its map.

        Raises:
            SiteError: blocks were added or taken away after it was opened.
        """
        trunk = self.anatomy.parts.layers[0].block.rpartition(".")[0]
        try:
            held: Any = self.hf.get_submodule(trunk)
            blocks = len(held)
        except (AttributeError, TypeError):  # it is gone, or is no list of blocks any more
            blocks = 0
        if blocks != self.anatomy.n_layers:
            raise error(
                SiteError,
                f"the map of {self.anatomy.name} is stale: its blocks changed after it was opened",
                got=f"{blocks} blocks",
                allowed=f"{self.anatomy.n_layers}, as it was opened",
                do="open it again: mt.open(model.hf)",
            )

    @property
    def W_E(self) -> Tensor:
        """Token embedding [vocab, d_model]."""
        return self._weights.W_E

    @property
    def W_U(self) -> Tensor:
        """Unembedding [d_model, vocab]."""
        return self._weights.W_U

    @property
    def b_U(self) -> Tensor | None:
        """Bias of the unembedding [vocab], or None."""
        return self._weights.b_U

    @property
    def final_norm(self) -> NormWeights | None:
        """The norm before the unembedding."""
        return self._weights.final_norm

    @property
    def read_norm(self) -> Norm | None:
        """The norm whose very output the unembedding reads; None where something stands between, or it is unproven."""
        a, norm = self.anatomy, self.anatomy.parts.final_norm
        if norm is None or norm.times != 1.0 or not a.unproven.keys().isdisjoint(("final_norm", "W_U")):
            return None
        return norm if self.W_U.shape[0] == a.d_model else None

    def require_next_token(self) -> None:
        """Refuse a model that does not predict the next token.

        Raises:
            ModelUnsupported: it attends in both directions.
        """
        if not self.anatomy.causal:
            raise error(
                ModelUnsupported,
                f"{self.anatomy.name} does not predict the next token",
                got="attention in both directions",
                allowed="causal models",
                do="choose a causal model",
            )

    def require_readable(self) -> NormWeights:
        """The final norm, of a model whose residual stream can be read as logits.

        Raises:
            SiteError: no final norm of a known form precedes the unembedding (encoders, for one).
        """
        norm, a = self.final_norm, self.anatomy
        streams = {a.size(site, "d_model") for site in a.hook_points if site.name == "resid_post"}
        if norm is None or {a.d_model, *streams} != {self.W_U.shape[0]}:
            raise error(
                SiteError,
                f"the residual stream of {self.anatomy.name} cannot be read as logits",
                got="a head with its own transform between the stream and the unembedding",
                do="use a causal model with a final norm",
            )
        return norm

    def unembed(self, resid: Tensor, scale: Tensor | None = None) -> Tensor:
        """Logits [..., vocab] that the residual stream resid [..., d_model] would give if the model ended there.

        Args:
            resid: residual stream before the final norm.
            scale: [...] divisor of the final norm, to hold it fixed; its own by default.

        Raises:
            SiteError: no final norm of a known form precedes the unembedding (encoders, for one).
        """
        norm = self.require_readable()
        if resid.shape[-1] != self.anatomy.d_model:
            raise error(
                SiteError,
                "this is not a residual stream",
                got=f"shape {list(resid.shape)}",
                allowed=f"[..., {self.anatomy.d_model}]",
                do="give a stream of this model",
            )
        logits = norm.apply(resid, scale) @ self.W_U
        logits = logits if self.b_U is None else logits + self.b_U
        logits = logits * self.anatomy.logit_scale if self.anatomy.logit_scale != 1.0 else logits
        cap = self.anatomy.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @cached_property
    def n_parameters(self) -> int:
        """How many parameters the model has; tied ones count once."""
        found: dict[int, int] = {}
        for module in self.hf.modules():
            if (how := packed(module)) is not None:
                bias: Any = getattr(module, "bias", None)
                inside = bias() if callable(bias) else None  # with the weight; else it is a parameter
                found[id(module)] = math.prod(sizes(module)) + (inside.numel() if isinstance(inside, Tensor) else 0)
            own = vars(module)["_parameters"].values()
            found |= {id(p): p.numel() for p in own if p is not None and (how is None or is_plain(p))}
        return sum(found.values())

    @property
    def fingerprint(self) -> str:
        """16 hex digits of a hash over the configuration and all weights, as they are now."""
        return self._fingerprint.exact()

    @property
    def provenance(self) -> dict[str, Any]:
        """What every result records: model, fingerprint, dtype, how its weights are stored, and versions.

        The weights are read again only where something shows that they changed; see `Fingerprint`.
        """
        return {
            "model": self.anatomy.name,
            "fingerprint": self._fingerprint.current(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights": self.stored or "plain",
            "microtome": _version("microtome"),
            "transformers": _version("transformers"),
            "torch": torch.__version__,
        }

    def to_batch(self, prompt: Prompt, padding: Literal["left", "right"] = "right") -> Batch:
        """Tokens, mask and lengths of a prompt; a `Batch` stays as it is.

        Raises:
            PromptError: it is empty, too long, or not of this vocabulary; or its rows would change each other.
        """
        a, batch = self.anatomy, self._read(prompt, padding)
        if a.rotary_switch is not None:
            a.rotary_switch.refuse(batch.lengths, a.name)
        if batch.padded:
            self._refuse_padding(batch)
        return batch

    def _read(self, prompt: Prompt, padding: Literal["left", "right"] = "right") -> Batch:
        """The rows of a prompt beside each other, whether or not the model could run them so.

        Raises:
            PromptError: it is empty, too long, or not of this vocabulary.
        """
        a = self.anatomy
        return to_batch(
            prompt, self.codec, n_vocab=a.d_vocab, n_ctx=a.n_ctx, side=padding, device=self.device,
            first_position=a.first_position,
        )  # fmt: skip

    def _refuse_padding(self, batch: Batch) -> None:
        """Refuse pads on a side on which they were seen to change the rows.

        Raises:
            PromptError: they lie on such a side.
        """
        sides = {"left": any(batch.pads), "right": any(first + n < batch.tokens.shape[1] for first, n in batch.spans)}
        bad = next((side for side, there in sides.items() if there and side not in self.anatomy.padding), None)
        if bad is not None:
            known = self.anatomy.padding
            raise error(
                PromptError,
                f"rows of {self.anatomy.name} change where they are padded on the {bad}",
                got=f"rows of {min(batch.lengths)} to {max(batch.lengths)} tokens",
                allowed=f'padding="{known[0]}", or rows of one length' if known else "rows of one length",
                do="run rows of another length by themselves",
            )

    @property
    def codec(self) -> Codec | None:
        """How its tokenizer is asked; None where there is none."""
        return None if self.tokenizer is None else Codec(self.tokenizer, causal=self.anatomy.causal)

    def encodings(self, prompt: Prompt) -> list[Encoding]:
        """The rows of a prompt as text, tokens and the characters of each token; of ids, the text that they decode to.

        Raises:
            PromptError: the prompt cannot be read, or there is no tokenizer.
        """
        codec = self.codec
        found = None if isinstance(prompt, Batch) else encodings_of(prompt, codec)
        if found is not None:
            return found
        if codec is None:
            do = "open it with tokenizer="
            raise error(PromptError, "this model was opened without a tokenizer, so its tokens have no text", do=do)
        return [codec.decode(row.tolist()) for row in self.to_batch(prompt).rows]

    def to_tokens(self, prompt: Prompt) -> Tensor:
        """Token ids [batch, pos] of a prompt, padded on the right."""
        return self.to_batch(prompt).tokens

    def to_words(self, tokens: Tensor | Sequence[int]) -> list[str]:
        """The text of each token of one row, or its number where there is no tokenizer."""
        ids: list[int] = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        codec = self.codec
        return [str(i) for i in ids] if codec is None else codec.words(ids)

    def to_text(self, tokens: Tensor | Sequence[int]) -> str:
        """The text of tokens as it stands inside a longer one, or their numbers where there is no tokenizer."""
        ids: list[int] = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        codec = self.codec
        return " ".join(map(str, ids)) if codec is None else codec.continued(ids)

    def continuation(self, text: str) -> list[int]:
        """The ids that a text becomes inside another one, with its leading space if it has one.

        Raises:
            PromptError: there is no tokenizer, or it is no valid text.
        """
        codec = self.codec
        if codec is None:
            do = "pass token ids, or open the model with tokenizer="
            raise error(PromptError, f'cannot read "{text}": this model was opened without a tokenizer', do=do)
        return list(codec.continuation(text))

    def to_id(self, token: str | int) -> int:
        """The id of a text of one token, as it stands inside a text; an id is itself.

        Raises:
            PromptError: it is several tokens, with the tokens that it is, lies outside the vocabulary, or is none.
        """
        given: Any = token
        if isinstance(given, str):
            codec = self.codec
            if codec is None:
                do = "pass a token id, or open the model with tokenizer="
                raise error(PromptError, f'cannot read "{given}": this model was opened without a tokenizer', do=do)
            return codec.one_token(given)
        try:
            found = integer(given)
        except TypeError:
            do = "give one of these"
            raise error(PromptError, "cannot read a token", got=repr(given), allowed="a text or an id", do=do) from None
        if not 0 <= found < self.anatomy.d_vocab:
            allowed = f"0 to {self.anatomy.d_vocab - 1}"
            raise error(PromptError, f"token id {found} is not in the vocabulary", allowed=allowed, do="choose another")
        return found
