"""The frame of forwards that others call, such as those of `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from itertools import count
from typing import Any

import torch
from torch import Tensor

from microtome.edit import Edit, Frame, Repeat, Skip, Span
from microtome.errors import EditError, error
from microtome.run._mask import spans_of

_BLOCKS = count(1)
_MARK = "_microtome_prompt"
"""The attribute by which a cache, or a copy of it, is known again."""

_CACHES = ("past_key_values", "cache_params", "state")
"""The names under which models take and return what they keep of earlier tokens."""

_Prompt = tuple[tuple[Span, ...], int]
"""The real tokens of each row of a prompt, and its width."""


class Generation:
    """Follows the forwards of one `editing` block, with a key/value cache or without, and gives the frame of each.

    Inside `generate` the prompt is what the call was given, in however many forwards it is read, and positions are the
    prompt's from then on. `generated` names what came after it; `last` names every token that was the newest when it
    was computed: the prompt's last one, and all that came after it. Outside of `generate` a forward with an empty cache
    is a prompt of its own, which the forwards that read its cache continue; what a cache brings into the block is part
    of the prompt.
    """

    def __init__(self, hf: Any, edits: Sequence[Edit] = ()) -> None:
        self._hf, self._edits = hf, edits
        self._block = next(_BLOCKS)
        self._call: _Call | None = None
        self._latest: tuple[_Prompt, int] | None = None
        self._given: Any = None
        self._unmarked: tuple[Any, tuple[_Prompt, int]] | None = None
        self._forward, self._generate = _names(type(hf).forward), _names(getattr(hf, "generate", _nothing))

    @contextmanager
    def generating(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Treat the forwards of this block as one generation: a call of `generate` with these arguments.

        Raises:
            EditError: the generation runs forwards of other tokens than its prompt and what follows it.
        """
        outer = self._call
        self._call = _Call(self._hf, dict(zip(self._generate, args, strict=False)) | kwargs, outer)
        try:
            yield
        finally:
            self._call = outer

    def frame(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Frame:
        """The frame of a forward of the model with these arguments.

        Raises:
            EditError: its mask or its cache leaves unclear which position is which.
        """
        given = dict(zip(self._forward, args, strict=False)) | kwargs
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor):
            got = ", ".join(name for name, value in given.items() if value is not None) or "nothing"
            raise error(EditError, "an edited forward needs tokens", got=got, do="pass input_ids or inputs_embeds")
        cache, mask = _cache_of(given.get), given.get("attention_mask")
        before, self._given = self._length(cache), cache
        end = before + int(tokens.shape[1])
        if self._call is not None:
            frame = self._call.frame(tokens, cache, mask, before, end)
        else:
            known = self._known(cache) if before else None
            spans, width = known[0] if known else (spans_of(mask, int(tokens.shape[0]), before, end), end)
            frame = _framed(spans, width, int(tokens.shape[0]), before, end)
        self._latest = (frame.spans, frame.width), end
        self._mark(cache)
        return frame

    def ended(self, output: Any) -> None:
        """Remember the prompt of the cache that a forward has filled.

        Raises:
            EditError: what is skipped or repeated leaves it wrong.
        """
        returned, self._given, given = _cache_of(lambda name: getattr(output, name, None)), None, self._given
        cache = given if returned is None else returned
        if cache is not None and self._latest is not None:
            self._refuse_wrong_cache(cache, self._latest[1])
        self._mark(cache)

    def _refuse_wrong_cache(self, cache: Any, end: int) -> None:
        paths = [edit for edit in self._edits if isinstance(edit, Skip | Repeat)]
        wrong = next((edit for edit in paths if isinstance(edit, Repeat) and edit.times > 1), None)
        why = "a block cannot be repeated while what it keeps of earlier tokens is cached"
        if wrong is None and paths and _counts(cache) and (held := int(cache.get_seq_length())) != end:
            wrong, why = paths[0], f"a cache counts positions by {_counting(cache)}, which cannot be skipped"
            why = f"{why}: it holds {held} of {end} tokens"
        if wrong is not None:
            raise error(EditError, why, got=repr(wrong), do="pass use_cache=False")

    def _mark(self, cache: Any) -> None:
        if cache is None or self._latest is None:
            return
        if hasattr(cache, "__dict__"):
            setattr(cache, _MARK, (self._block, self._latest))
        else:
            self._unmarked = cache, self._latest

    def _known(self, cache: Any) -> tuple[_Prompt, int] | None:
        """The prompt and the columns of a cache that a forward of this block has filled."""
        if self._unmarked is not None and cache is self._unmarked[0]:
            return self._unmarked[1]
        block, latest = getattr(cache, _MARK, (None, None))
        return latest if block == self._block else None

    def _length(self, cache: Any) -> int:
        """The number of columns that a cache holds; states do not count them, and are followed from forward to forward.

        Raises:
            EditError: it cannot be told.
        """
        if cache is None:
            return 0
        if _counts(cache):
            return int(cache.get_seq_length())
        known = self._known(cache)
        if known is not None:
            return known[1]
        if _is_empty(cache):
            return 0
        raise error(
            EditError,
            "edits cannot follow this cache: it does not count tokens, and was filled where no edit was active",
            got=type(cache).__name__,
            allowed="a Cache with keys and values, or what a forward inside this block has returned",
            do="read the whole prompt inside the block",
        )


class _Call:
    """One call of `generate`: its prompt, which its forwards read in one piece or in several."""

    def __init__(self, hf: Any, options: Mapping[str, Any], outer: _Call | None) -> None:
        self.options = _Options(hf, options)
        self.options.refuse_other_prompts()
        self.ids, self.embeds = self.options.prompt
        self.mask = options.get("attention_mask")
        given = self.ids if self.embeds is None else self.embeds
        self.prompts, self.width = (1, 1) if given is None else (int(given.shape[0]), int(given.shape[1]))
        if isinstance(self.mask, Tensor) and self.mask.dim() == 2:
            # Of a filled cache only what comes after it may be given, with the mask of all.
            self.width = max(self.width, int(self.mask.shape[1]))
        self.start: int | None = None
        self.cache: Any = None
        self.spans: tuple[Span, ...] | None = None
        if outer is not None and outer.begins(self.ids):  # the model drafts for itself
            self.ids, self.width, self.spans = outer.ids, outer.width, outer.spans

    def begins(self, ids: Tensor | None) -> bool:
        """Whether the prompt of another call is this one, followed by what was generated so far."""
        own = self.ids
        if own is None or ids is None or self.spans is None or own.shape[1] != self.width:
            return False
        return ids.shape[1] >= self.width and torch.equal(ids[:, : self.width].to(own.device), own)

    def frame(self, tokens: Tensor, cache: Any, mask: Any, before: int, end: int) -> Frame:
        """The frame of a forward of this generation.

        Raises:
            EditError: it is one of other tokens.
        """
        rows = int(tokens.shape[0])
        if self.spans is not None and cache is None and end < self.width:
            raise error(
                EditError,
                "the model kept nothing of the tokens that it has read, as where the block that keeps it is skipped, "
                "and this forward reads others alone",
                got=f"{end} of {self.width} tokens or more",
                do="pass use_cache=False",
            )
        self._refuse_others(tokens, cache, before, end)
        if self.start is None:
            self.start = before
        if self.spans is None:
            self.spans = self._spans(mask, rows, before, end)
        # Several parts of what is otherwise one forward, or one where there are otherwise several.
        split = end < self.width or self.start < before < self.width or (end > self.width and end - before > 1)
        beams = max(1, rows // self.prompts)
        return _framed(self.spans, self.width, rows, before, end, beams, split=split and cache is not None)

    def _refuse_others(self, tokens: Tensor, cache: Any, before: int, end: int) -> None:
        own = cache is None or self.cache is None or cache is self.cache  # a cache may be left for good midway
        whole = cache is not None or end >= self.width
        if own and whole and tokens.shape[0] % self.prompts == 0 and self._matches(tokens, before, end):
            self.cache = cache if self.cache is None else self.cache
            return
        raise error(
            EditError,
            "a forward inside this generation reads other tokens than its prompt and what follows it, so that the "
            "positions of edits are unclear",
            do="leave out what runs the model on a second prompt, or call model.hf forward by forward",
        )

    def _matches(self, tokens: Tensor, before: int, end: int) -> bool:
        """Whether the tokens of a forward that belong to the prompt are the prompt's; embeddings are believed."""
        if self.ids is None or self.embeds is not None or tokens.dim() != 2:
            return True
        offset = self.width - int(self.ids.shape[1])
        first, last = max(before, offset), min(end, self.width)
        if first >= last:
            return True
        own = self.ids[:, first - offset : last - offset].repeat_interleave(tokens.shape[0] // self.prompts, dim=0)
        return torch.equal(tokens[:, first - before : last - before], own.to(tokens.device))

    def _spans(self, mask: Any, rows: int, before: int, end: int) -> tuple[Span, ...]:
        """The real tokens of each row of the prompt."""
        if isinstance(self.mask, Tensor) and self.mask.dim() == 2:
            return spans_of(self.mask, int(self.mask.shape[0]), 0, self.width)
        if mask is None or not (self.ids is None or self.options.may_hold_pads(self.ids)):
            return ((0, self.width),) * rows  # no mask is left where nothing is padded
        if end >= self.width:
            return spans_of(mask, rows, before, end, self.width)
        raise error(
            EditError,
            "which tokens of this prompt are pads is unclear, as it is read in parts",
            do="pass attention_mask= to generate",
        )


class _Options:
    """The arguments of a call of `generate`, with those of its configuration and of the model's behind them."""

    def __init__(self, hf: Any, given: Mapping[str, Any]) -> None:
        self.given = given
        self.behind = [x for x in (given.get("generation_config"), getattr(hf, "generation_config", None)) if x]

    def __getitem__(self, name: str) -> Any:
        values = (self.given.get(name), *(getattr(config, name, None) for config in self.behind))
        return next((value for value in values if value is not None), None)

    @property
    def prompt(self) -> tuple[Tensor | None, Tensor | None]:
        """Token ids [prompt, pos] and embeddings [prompt, pos, d_model], as far as they are given."""
        ids = self.given.get("inputs")
        ids = self.given.get("input_ids") if ids is None else ids
        return ids, self.given.get("inputs_embeds")

    def refuse_other_prompts(self) -> None:
        """Refuse what runs the model on another prompt than the one given, so that positions are unclear.

        Raises:
            EditError: it is asked for.
        """
        asked = {
            "guidance_scale": self["guidance_scale"] not in (None, 1),
            "token_healing": bool(self["token_healing"]),
            "cache_implementation": self["cache_implementation"] == "paged",
        }
        for name, wrong in asked.items():
            if wrong:
                raise error(
                    EditError,
                    f"a generation with {name} runs the model on another prompt than the one given, so that the "
                    "positions of edits are unclear",
                    got=f"{name}={self[name]!r}",
                    do="leave it out inside `editing`",
                )

    def may_hold_pads(self, ids: Tensor) -> bool:
        """Whether a prompt without a mask holds a token that `generate` may take for a pad."""
        pads = [self[name] for name in ("pad_token_id", "eos_token_id")]
        flat = [torch.as_tensor(x).reshape(-1) for x in pads if x is not None]
        return bool(flat) and bool(torch.isin(ids.cpu(), torch.cat(flat).cpu()).any())


def _framed(
    spans: tuple[Span, ...], width: int, rows: int, before: int, end: int, beams: int = 1, split: bool = False
) -> Frame:
    """A frame in which the rows of a prompt stand once for each row of the forward that continues them."""
    repeated = tuple(spans[row * len(spans) // rows] for row in range(rows))
    return Frame(repeated, width, generated=end - width, begin=before, beams=beams, split=split)


def _cache_of(get: Callable[[str], Any]) -> Any:
    """What is kept of earlier tokens, among the arguments or outputs of a forward."""
    return next((cache for name in _CACHES if (cache := get(name)) is not None), None)


def _counts(cache: Any) -> bool:
    """Whether a cache says how many columns it holds; one that holds states of mixers alone does not."""
    layers = getattr(cache, "layers", None)
    states = bool(layers) and not any(hasattr(layer, "get_seq_length") for layer in layers)
    return hasattr(cache, "get_seq_length") and not states


def _counting(cache: Any) -> str:
    """The layer whose keys and values say how many columns a cache holds."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None) or ()
    return next((f"layer {i}" for i, layer in enumerate(layers) if hasattr(layer, "get_seq_length")), "layer 0")


def _is_empty(cache: Any) -> bool:
    """Whether a cache of states is as it was made."""
    if hasattr(cache, "has_previous_state"):
        return not any(any(layer.has_previous_state.values()) for layer in cache.layers)
    return hasattr(cache, "seqlen_offset") and int(cache.seqlen_offset) == 0 and cache.rnn_state_initial


def _nothing() -> None:
    """What a model without `generate` generates."""


def _names(function: Any) -> list[str]:
    """The names of the positional parameters of a method."""
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, p in signature(function).parameters.items() if p.kind in kinds and name != "self"]
