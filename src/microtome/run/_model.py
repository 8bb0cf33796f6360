"""An open model: run it, edit it, generate with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from microtome.errors import EditError, PromptError, SiteError, error
from microtome.model import Anatomy, LayerWeights, NormWeights, Weights, integer
from microtome.run._batch import Batch, Prompt, pad_id, to_batch
from microtome.run._cells import Sweep, SweepPlan, plan_sweep, sweep
from microtome.run._edges import Edge
from microtome.run._edits import Edit, SiteEdit
from microtome.run._fingerprint import Fingerprint
from microtome.run._hooks import Rig
from microtome.run._metrics import Metric
from microtome.run._once import Capture, addresses, once
from microtome.run._plan import Plan, plan_of
from microtome.run._result import Run
from microtome.run._session import Live, Observer, Session
from microtome.run._sweep import Cell
from microtome.run._turns import turn_of

if TYPE_CHECKING:
    from microtome.run._proof import Check

_version = cache(version)  # every run records them, and reading a package's metadata takes as long as a small forward

NOT_TEXT = (
    "return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states",
)  # fmt: skip
"""Options of a generation that ask for more than texts."""


class Model:
    """A model that is open: its map is proven, its weights are untouched.

    Attributes:
        hf: the `PreTrainedModel` itself.
        tokenizer: its tokenizer, or None.
        anatomy: sizes, and where every site is.
        proof: the identities that were checked when it was opened.
        pace: floating-point operations a second of its last run, reading the weights counted as if it were some.
    """

    def __init__(self, hf: Any, tokenizer: Any, anatomy: Anatomy) -> None:
        self.hf, self.tokenizer, self.anatomy = hf, tokenizer, anatomy
        self.proof: list[Check] = []
        self._weights = Weights(hf, anatomy)
        self.pace = 2e10
        self._fingerprint = Fingerprint(hf)

    def __repr__(self) -> str:
        a = self.anatomy
        return f"Model({a.name}: {a.n_layers} layers, {a.n_heads} heads, {a.d_mlp} neurons, d_model {a.d_model})"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are made of."""
        return self.hf.dtype

    @property
    def layers(self) -> tuple[LayerWeights, ...]:
        """The weights of each layer, by the field's names, as views."""
        return self._weights.layers

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

    def unembed(self, resid: Tensor, scale: Tensor | None = None) -> Tensor:
        """Logits [..., vocab] that the residual stream resid [..., d_model] would give if the model ended there.

        Args:
            resid: residual stream before the final norm.
            scale: [...] divisor of the final norm, to hold it fixed; its own by default.

        Raises:
            SiteError: no final norm of a known form stands before the unembedding (encoders, for one).
        """
        norm = self.final_norm
        if norm is None or self.W_U.shape[0] != self.anatomy.d_model:
            raise error(
                SiteError,
                f"the residual stream of {self.anatomy.name} cannot be read as logits",
                got="a head with a transform of its own between the stream and the unembedding",
                do="use a causal model with a final norm",
            )
        if resid.shape[-1] != self.anatomy.d_model:
            raise error(
                SiteError,
                "this is no residual stream",
                got=f"shape {list(resid.shape)}",
                allowed=f"[..., {self.anatomy.d_model}]",
                do="give a stream of this model",
            )
        logits = norm.apply(resid, scale) @ self.W_U
        logits = logits if self.b_U is None else logits + self.b_U
        logits = logits * self.anatomy.logit_scale if self.anatomy.logit_scale != 1.0 else logits
        cap = self.anatomy.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @property
    def n_parameters(self) -> int:
        """How many parameters the model has; tied ones count once."""
        return sum(p.numel() for p in self.hf.parameters())

    @property
    def fingerprint(self) -> str:
        """16 hex digits of a hash over the configuration and all weights, as they are now."""
        return self._fingerprint.exact()

    @property
    def provenance(self) -> dict[str, Any]:
        """What every result records: model, fingerprint, dtype and versions.

        The weights are read again only where something shows that they changed; see `Fingerprint`.
        """
        return {
            "model": self.anatomy.name,
            "fingerprint": self._fingerprint.current(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "microtome": _version("microtome"),
            "transformers": _version("transformers"),
            "torch": torch.__version__,
        }

    def to_batch(self, prompt: Prompt, padding: Literal["left", "right"] = "right") -> Batch:
        """Tokens, mask and lengths of a prompt.

        Raises:
            PromptError: it is empty, too long, or not of this vocabulary.
        """
        a = self.anatomy
        return to_batch(prompt, self.tokenizer, n_vocab=a.d_vocab, n_ctx=a.n_ctx, side=padding, device=self.device)

    def to_tokens(self, prompt: Prompt) -> Tensor:
        """Token ids [batch, pos] of a prompt, padded on the right."""
        return self.to_batch(prompt).tokens

    def to_words(self, tokens: Tensor | Sequence[int]) -> list[str]:
        """The text of each token of one row, or its number where there is no tokenizer."""
        ids: list[int] = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        return [str(i) if self.tokenizer is None else self.tokenizer.decode([i]) for i in ids]

    def plan(self, prompt: Prompt, capture: Capture = (), *, logits: bool = True, grad: bool = False) -> Plan:
        """What a run would keep and take, before it runs: bytes by site, operations, seconds at the last run's pace."""
        batch = self.to_batch(prompt)
        return plan_of(self, batch, addresses(capture), logits=logits, grad=grad, pace=self.pace)

    def run(
        self,
        prompt: Prompt,
        capture: Capture = (),
        edits: Edit | Sequence[Edit] = (),
        *,
        stop_at: int | None = None,
        logits: bool = True,
        grad: bool = False,
        padding: Literal["left", "right"] = "right",
        observe: Mapping[str, Observer] | None = None,
        budget: int | None = None,
    ) -> Run:
        """Run the model once, keep what is named, and change what the edits say.

        Args:
            prompt: text, texts, token ids, lists of token ids, an integer tensor [pos] or [batch, pos], or what a
                tokenizer gave.
            capture: addresses of what to keep, such as ``"*.mlp.post"`` or ``["3.attn.pattern", "final@-1"]``.
            edits: what to change: one edit, or several in order.
            stop_at: end before this layer runs; there are no logits then.
            logits: whether to compute logits; without them the unembedding is not run.
            grad: keep a graph, so that `Run.grad` gives gradients at every captured site.
            padding: the side on which shorter rows are padded.
            observe: functions called with (site, tensor) as the forward reaches an address; nothing is kept.
            budget: bytes that the captures and logits may take; 80 % of the free memory by default.

        Returns:
            A `Run`: ``run.logits``, ``run["12.mlp.post"]``, ``run.dataset()``.

        Raises:
            SiteError: an address matches nothing, or is never reached.
            PromptError: the prompt cannot be read.
            EditError: an edit does not fit its site, or never acts; or the model is in use, see `editing`.
            BudgetError: what is named would not fit in memory.
        """
        return once(
            self, prompt, capture, edits, stop_at=stop_at, logits=logits, grad=grad, padding=padding, observe=observe,
            budget=budget,
        )  # fmt: skip

    def sweep(
        self,
        prompt: Prompt,
        cells: Sequence[Cell | Edge],
        metric: Metric,
        *,
        prompts: Sequence[int] | None = None,
        budget: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Sweep:
        """Run many edited copies of prompts and read each with a metric: exact, and many times faster than one by one.

        Args:
            prompt: one prompt or several, of any lengths.
            cells: each an edit, a list of edits, or an `Edge`, of one copy of one prompt; positions are that prompt's.
            metric: what to read, such as `LogitDifference`.
            prompts: the number of each cell's prompt; the first by default.
            budget: bytes that one walk may hold; half of the free memory, at most 2 GiB, by default.
            progress: called with (done, all) cells.

        Returns:
            A `Sweep`: values and effects by cell, values of the unedited prompts, and the plan. Stopped with Ctrl-C it
            keeps the cells that were reached; `Sweep.whole` is for those who need them all.

        Raises:
            SiteError: an address matches nothing, lies outside the layers, or beyond its prompt.
            EditError: a cell is empty, or the metric does not fit; or the model is being edited.
            BudgetError: not even one cell fits.

        >>> cells = [SwapFrom(f"{layer}.resid_pre@{pos}", source=corrupt) for layer in range(30) for pos in range(13)]
        >>> effects = model.sweep(clean, cells, LogitDifference(answer=paris, foil=rome)).effects.reshape(30, 13)
        """
        if turn_of(self.hf).standing:
            raise error(
                EditError,
                "a sweep cannot run inside `editing`, whose rows are not its cells",
                got=", ".join(map(repr, turn_of(self.hf).standing)),
                do="put these edits into every cell",
            )
        return sweep(self, prompt, cells, metric, prompts=prompts, budget=budget, progress=progress)

    def plan_sweep(
        self,
        prompt: Prompt,
        cells: Sequence[Cell | Edge],
        metric: Metric,
        *,
        prompts: Sequence[int] | None = None,
        budget: int | None = None,
    ) -> SweepPlan:
        """What a sweep would take, before it runs: walks, forwards, operations, bytes, and seconds; see `sweep`.

        Raises:
            BudgetError: not even one cell fits.
        """
        return plan_sweep(self, prompt, cells, metric, prompts=prompts, budget=budget)

    @contextmanager
    def editing(self, *edits: Edit) -> Iterator[Model]:
        """Apply edits to every call inside the block, also to `generate` with its key/value cache.

        In a generation, positions mean those of the prompt; ``@last`` is the newest token at every step, ``@prompt``
        and ``@generated`` are what they say, and no positions means all. The edits are gone when the block is left,
        also by an exception or Ctrl-C. An edit that never applied is warned of. The model is in evaluation mode inside
        the block, and refuses other threads until it is left; a run of theirs is waited for.

        >>> with model.editing(Add("12.resid_post@last", direction, strength=4.0)):
        ...     print(model.generate("I think"))
        """
        flow = Live()
        session = Session(self.hf, self.anatomy, flow, edits=edits, stands=True)
        calls = 0

        def begin(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal calls
            calls += 1
            flow.begin(args, kwargs)

        def generate(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
            given = args[0] if args else next((x for x in named if x is not None), None)
            with flow.generating(1 if given is None else len(given), kwargs.get("attention_mask")):
                return own(*args, **kwargs)

        session.rig.before("", begin)
        if hasattr(self.hf, "generate"):
            session.rig.around("", generate, "generate")
        with session.rig:
            yield self
        fired = {number for number, _ in session.fired}
        idle = [e for e in edits if isinstance(e, SiteEdit) and id(e) not in fired]
        if calls and idle:
            warnings.warn(f"these edits never applied: {idle}", stacklevel=3)

    def generate(self, prompt: Prompt, *, max_new_tokens: int = 32, **options: Any) -> str | list[str]:
        """Continue a text, or several; greedy unless told otherwise.

        Args:
            prompt: one text or several.
            max_new_tokens: how many tokens to add at most.
            options: what the `generate` of `transformers` takes, such as ``do_sample=True``.

        Returns:
            What was added: a text for a text, a list for a list.

        Raises:
            PromptError: the model has no tokenizer or looks both ways, the prompt is empty or leaves no room in the
                context, or the options are none.
        """
        if not self.anatomy.causal:
            raise error(
                PromptError, f"{self.anatomy.name} looks both ways, and cannot continue a text", do="use a causal model"
            )
        _refuse_options(max_new_tokens, options)
        if self.tokenizer is None:
            raise error(
                PromptError, "this model was opened without a tokenizer", do="use model.hf.generate on token ids"
            )
        batch = self.to_batch(prompt, "left")
        room = self.anatomy.n_ctx - batch.tokens.shape[1]
        if max_new_tokens > room:
            raise error(
                PromptError,
                "the prompt leaves too little room in the model's context",
                got=f"{max_new_tokens} new tokens",
                allowed=f"{room}",
                do="shorten the prompt",
            )
        pad = pad_id(self.tokenizer, self.anatomy.d_vocab)
        # A model's own settings may ask for more than tokens.
        options = {"do_sample": False, "pad_token_id": pad} | options | {"return_dict_in_generate": False}
        inputs = {"input_ids": batch.tokens, "attention_mask": batch.mask.long(), "max_new_tokens": max_new_tokens}
        rig, began = Rig(self.hf, self.anatomy.attention, self.anatomy.n_heads), False

        def begin(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal began
            began = True

        rig.before("", begin)
        with torch.no_grad(), rig:
            try:
                out = self.hf.generate(**inputs, **options)
            except (ValueError, TypeError) as problem:
                if began:  # it is none of the options
                    raise
                said = " ".join(str(problem).split())
                raise error(
                    PromptError, "transformers cannot generate this way", got=said, do="change options"
                ) from problem
        texts = [self.tokenizer.decode(row[batch.tokens.shape[1] :], skip_special_tokens=True) for row in out]
        return texts[0] if isinstance(prompt, str) and len(texts) == 1 else texts


def _refuse_options(max_new_tokens: int, options: Mapping[str, Any]) -> None:
    """Refuse a generation that adds nothing, or of which more than its texts is asked.

    Raises:
        PromptError: it is one of these.
    """
    try:
        adds = integer(max_new_tokens) >= 1
    except TypeError:
        adds = False
    if not adds:
        got = f"max_new_tokens={max_new_tokens!r}"
        raise error(PromptError, "a generation adds tokens", got=got, allowed="1 or more", do="ask for a whole number")
    asked = [name for name in NOT_TEXT if options.get(name)]
    if asked:
        raise error(
            PromptError,
            "a generation here gives texts and nothing else",
            got=", ".join(f"{name}={options[name]!r}" for name in asked),
            do="use model.hf.generate on token ids",
        )
