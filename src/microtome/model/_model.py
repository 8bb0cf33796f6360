"""An open model: run it, edit it, generate with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from microtome.anatomy import Anatomy, integer
from microtome.edit import Edit, Frame, Repeat, SiteEdit, Skip
from microtome.errors import PromptError, error
from microtome.metric import Metric
from microtome.model._identities import IdentityCheck
from microtome.model._map import best_map
from microtome.run import (
    Batch,
    Capture,
    Generation,
    LoadedModel,
    Observer,
    Plan,
    Prompt,
    Run,
    Session,
    addresses,
    pad_id,
    plan_of,
    refusing_gaps,
    run_forward,
)
from microtome.run.hook import HookSet, lock_of
from microtome.sweep import Cell, Edge, Sweep

NOT_TEXT = (
    "return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states",
)  # fmt: skip
"""Options of a generation that ask for more than texts."""


class Model(LoadedModel):
    """An open model: run it, edit it, sweep it, generate with it.

    Attributes:
        proof: the identities that were checked when it was opened.
    """

    def __init__(self, hf: Any, tokenizer: Any, anatomy: Anatomy) -> None:
        super().__init__(hf, tokenizer, anatomy)
        self.proof: list[IdentityCheck] = []
        self._found = anatomy

    def prove(self) -> list[IdentityCheck]:
        """Check the identities of the map on a probe batch, keep the result as `proof`, and leave out what fails.

        Raises:
            ModelUnsupported: the model does not run on token ids alone.
        """
        self.remap(self._found)
        self.proof, self._found, proven = best_map(self)
        self.remap(proven)
        return self.proof

    def plan(self, prompt: Prompt, capture: Capture = (), *, logits: bool = True, grad: bool = False) -> Plan:
        """What a run would keep and take, before it runs: bytes by site, operations, seconds at the last run's pace."""
        batch = self.to_batch(prompt)
        return plan_of(self, batch, addresses(capture), logits=logits, grad=grad, pace=self.pace)

    def run(
        self,
        prompt: Prompt,
        capture: Capture = (),
        edits: Edit | Iterable[Edit] = (),
        *,
        start_at: int | None = None,
        given: Tensor | None = None,
        stop_at: int | None = None,
        logits: bool = True,
        grad: bool = False,
        padding: Literal["left", "right"] = "right",
        observe: Mapping[str, Observer] | None = None,
        budget: int | None = None,
    ) -> Run:
        """Run the model once, keep what is named, and apply the edits.

        Args:
            prompt: text, texts, token ids, lists of token ids, an integer tensor [pos] or [batch, pos], what a
                tokenizer gave, a chat as a list of messages {"role", "content"}, several chats, or a `Batch`, which
                keeps its padding.
            capture: addresses of what to keep, such as ``"*.mlp.post"`` or ``["3.attn.pattern", "final@-1"]``.
            edits: what to change: one edit, or several in order.
            start_at: the first layer to compute; needs `given`. Sites before it cannot be captured or edited.
            given: [batch, pos, d_model] residual stream that enters layer `start_at`, such as its ``resid_pre`` in
                another run of the same prompt.
            stop_at: end before this layer runs; there are no logits then.
            logits: whether to compute logits; without them the unembedding is not run.
            grad: keep a graph, so that `Run.grad` gives gradients at every captured site.
            padding: the side on which shorter rows are padded.
            observe: functions called with (site, tensor) as the forward reaches an address; nothing is kept.
            budget: bytes that the captures and logits may take; that of the settings, or 80 % of the free memory.

        Returns:
            A `Run`: ``run.logits``, ``run["12.mlp.post"]``, ``run.dataset()``.

        Raises:
            SiteError: an address matches nothing, or is never reached.
            PromptError: the prompt cannot be read.
            EditError: an edit does not fit its site, or never acts; `given` has another shape; or the model is in
                use, see `editing`.
            BudgetError: what is named would not fit in memory.
        """
        return run_forward(
            self, prompt, capture, edits, start_at=start_at, given=given, stop_at=stop_at, logits=logits, grad=grad,
            padding=padding, observe=observe, budget=budget,
        )  # fmt: skip

    def sweep(
        self,
        prompt: Prompt,
        cells: Iterable[Cell | Edge],
        metric: Metric,
        *,
        prompts: Iterable[int] | None = None,
        budget: int | None = None,
        start: Tensor | None = None,
    ) -> Sweep:
        """Prepare many edited runs of prompts, each read with a metric: exact, and many times faster than one by one.

        Args:
            prompt: one prompt or several, of any lengths.
            cells: each an edit, a list of edits, or an `Edge`, of one copy of one prompt; positions are that prompt's.
            metric: what to read, such as `LogitDifference`.
            prompts: the number of each cell's prompt; the first by default.
            budget: memory limit per pass in bytes; half of the free memory, at most 2 GiB, by default.
            start: [prompt, pos, d_model] what enters the first layer in every run instead of the embeddings, such as
                the embeddings with noise, as a run captures `0.resid_pre`; for prompts of one length.

        Inside `editing`, the standing edits hold in every cell, before its own, and in the runs without a cell.

        Returns:
            A `Sweep`: its `plan` gives the cost; `run()` gives values and effects by cell, and the values of
            the prompts without a cell.

        Raises:
            SiteError: an address matches nothing, lies outside the layers, or beyond its prompt; or there is an `Edge`
                in a model whose cells share nothing (`plan.shares`).
            EditError: a cell is empty, or the metric does not fit; or an edit of `editing` is none of a site inside
                the layers, names rows, or meets an `Edge` that it
                does not allow.
            BudgetError: not even one cell fits.

        >>> cells = [Patch(f"{layer}.resid_pre@{pos}", source=corrupt) for layer in range(30) for pos in range(13)]
        >>> sweep = model.sweep(clean, cells, LogitDifference(answer=paris, foil=rome))
        >>> effects = sweep.run().effects.reshape(30, 13)
        """
        return Sweep(self, prompt, cells, metric, prompts=prompts, budget=budget, start=start)

    @contextmanager
    def editing(self, *edits: Edit) -> Iterator[Model]:
        """Apply edits to every call inside the block, also to `generate` with its key/value cache.

        In a generation, positions are those of the prompt; ``@last`` is the newest token at every step, ``@prompt``
        and ``@generated`` are the tokens of the prompt and those after it, and no positions means all. This holds in
        whatever parts `generate` reads its prompt and checks its candidates (`prefill_chunk_size`,
        `prompt_lookup_num_tokens`, `assistant_model`); what runs a second prompt (`guidance_scale`) is refused, and so
        is a mask from which it is unclear which tokens are pads. The edits are
        removed when the block is left, also by an exception or Ctrl-C; a warning names those that never applied. Inside
        the block the model is in evaluation mode, and refuses other threads, plain calls of the model among them; a run
        of theirs is waited for.

        >>> with model.editing(Add("12.resid_post@last", direction, strength=4.0)):
        ...     print(model.generate("I think"))
        """
        self.require_mapped()
        generation = Generation(self.hf, edits)
        session = Session(self.hf, self.anatomy, Frame((), 0), edits=edits, active=True)
        calls = 0

        def begin(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal calls
            calls += 1
            session.frame, prompt = generation.frame(args, kwargs), lock_of(self.hf).prompt
            if prompt is not None:
                session.frame = replace(session.frame, source_row=prompt[0], prompts=prompt[1])

        def generate(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with generation.generating(args, kwargs):
                return own(*args, **kwargs)

        def ended(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            generation.ended(output)
            session.frame = Frame((), 0)

        def forward(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with refusing_gaps(self.anatomy.name, changed=True):
                return own(*args, **kwargs)

        session.hooks.before("", begin)
        session.hooks.after("", ended)
        if any(isinstance(edit, Skip | Repeat) for edit in edits):
            session.hooks.around("", forward)
        if hasattr(self.hf, "generate"):
            session.hooks.around("", generate, "generate")
        with session.hooks:
            yield self
        fired = {number for number, _ in session.fired}
        idle = [e for e in edits if isinstance(e, SiteEdit) and id(e) not in fired]
        if calls and idle:
            warnings.warn(f"these edits never applied: {idle}", stacklevel=3)

    def generate(self, prompt: Prompt, *, max_new_tokens: int = 32, **options: Any) -> str | list[str]:
        """Continue a text, or several; greedy by default.

        Args:
            prompt: one text or several, or a chat as a list of messages {"role", "content"}, or several.
            max_new_tokens: how many tokens to add at most.
            options: what the `generate` of `transformers` takes, such as ``do_sample=True``.

        Returns:
            What was added: a text for a text, a list for a list; with ``num_return_sequences``, those of each prompt
            after those of the one before. Prompts of different lengths are generated one after the other where the
            model cannot pad them on the left; rows of edits are their numbers in either case.

        Raises:
            PromptError: the model has no tokenizer or looks both ways, the prompt is empty or leaves no room in the
                context, or the options are not those of a generation of text.
        """
        if not self.anatomy.causal:
            raise error(
                PromptError,
                f"{self.anatomy.name} attends in both directions and cannot continue a text",
                do="use a causal model",
            )
        _refuse_options(max_new_tokens, options)
        codec = self.codec
        if codec is None:
            raise error(
                PromptError, "this model was opened without a tokenizer", do="use model.hf.generate on token ids"
            )
        whole = prompt.rows if isinstance(prompt, Batch) else prompt
        rows = [] if "left" in self.anatomy.padding else self._read(whole).rows
        if len({len(row) for row in rows}) > 1:
            alone = [(self.to_batch(row), (number, len(rows))) for number, row in enumerate(rows)]
        else:
            alone = [(self.to_batch(whole, "left"), None)]
        for batch, _ in alone:
            self._refuse_no_room(batch, max_new_tokens)
        added = [new for batch, number in alone for new in self._added(batch, max_new_tokens, options, number)]
        texts = [codec.continued(row, skip_special_tokens=True) for row in added]
        one = isinstance(prompt, str) or (isinstance(prompt, Sequence) and isinstance(prompt[0], Mapping))
        return texts[0] if one and len(texts) == 1 else texts

    def _refuse_no_room(self, batch: Batch, max_new_tokens: int) -> None:
        """Refuse a prompt after which the context holds too few tokens.

        Raises:
            PromptError: it is such a prompt.
        """
        room = self.anatomy.n_ctx - batch.tokens.shape[1]
        if max_new_tokens > room:
            raise error(
                PromptError,
                "the prompt leaves too little room in the model's context",
                got=f"{max_new_tokens} new tokens",
                allowed=f"{room}",
                do="shorten the prompt",
            )
        if self.anatomy.rotary_switch is not None:
            self.anatomy.rotary_switch.refuse(batch.lengths, self.anatomy.name, max_new_tokens)

    def _added(
        self, batch: Batch, max_new_tokens: int, options: dict[str, Any], prompt: tuple[int, int] | None
    ) -> list[list[int]]:
        """The tokens that are added to each row; of one prompt of several, `prompt` is its number and that of all.

        Raises:
            PromptError: the options are not those of a generation of text.
        """
        pad = pad_id(self.tokenizer, self.anatomy.d_vocab)
        # A model's own settings may ask for more than tokens.
        options = {"do_sample": False, "pad_token_id": pad} | options | {"return_dict_in_generate": False}
        inputs = {"input_ids": batch.tokens, "attention_mask": batch.mask.long(), "max_new_tokens": max_new_tokens}
        hooks, began = HookSet(self.hf, self.anatomy.attention, self.anatomy.n_heads), False

        def begin(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal began
            began = True

        hooks.before("", begin)
        with torch.no_grad(), hooks, lock_of(self.hf).generating(prompt):
            try:
                out = self.hf.generate(**inputs, **options)
            except (ValueError, TypeError) as problem:
                if began:  # it is none of the options
                    raise
                reason = " ".join(str(problem).split())
                raise error(
                    PromptError, "transformers cannot generate this way", got=reason, do="change options"
                ) from problem
        return [row[batch.tokens.shape[1] :].tolist() for row in out]


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
        raise error(
            PromptError, "a generation must add tokens", got=got, allowed="1 or more", do="ask for a whole number"
        )
    asked = [name for name in NOT_TEXT if options.get(name)]
    if asked:
        raise error(
            PromptError,
            "generate returns texts and nothing else",
            got=", ".join(f"{name}={options[name]!r}" for name in asked),
            do="use model.hf.generate on token ids",
        )
