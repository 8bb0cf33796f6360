"""Demonstrations that are read several times: the keys and values that they leave, moved round by round.

Formula:  X_t = (K_t, V_t), the keys and values of the context's tokens at every layer in round t; the tokens attend
          to their own X_t up to themselves and, from round 2 on, to all of the stored S_{t-1} as well, at the same
          positions.
              S_1 = X_1;   M_1 = 0;   M_t = momentum M_{t-1} + X_t - S_{t-1};   S_t = S_{t-1} + rate M_t.
          After a round the question alone is read behind S_t. Nothing is trained.
          gain_t = log p(answer) after round t minus that after round 1, which is the ordinary prompt.
          Control: rounds over the same demonstrations with answers of other pairs.
          Questions of one draw share their demonstrations: intervals are over questions, for these draws, and do not
          hold what other demonstrations would change.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from microtome.context import current
from microtome.errors import ArgumentError, PromptError, SiteError, error
from microtome.explain._shots import Deck, Piece
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.run import Prompt
from microtome.run.hook import HookSet
from microtome.shown import shown
from microtome.stream import bos_id

ROUND = ("round",)
RATE, MOMENTUM = 0.01, 0.9
WINDOWS = ("sliding_window", "window_size", "local_attention", "attention_chunk_size")
"""How configurations name the number of tokens that some layer sees."""
TURNED = "the same of demonstrations with answers of other pairs"


@shown
@dataclass(frozen=True, eq=False)
class StoredContext:
    """A context as keys and values, which questions can be read behind without it.

    Attributes:
        keys, values: by layer, [1, kv_head, pos, d_head].
        model: whose they are.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    model: Model = field(repr=False)

    @property
    def length(self) -> int:
        """Tokens of the context."""
        return int(self.keys[0].shape[-2])

    def logits(self, query: Prompt) -> Float[Tensor, " vocab"]:
        """What the model says next behind the context and this question.

        Raises:
            PromptError: it is not one prompt with tokens.
        """
        tokens = _one(self.model, query, "query")
        bos = bos_id(self.model.tokenizer)
        tokens = tokens[:, int(bos is not None and int(tokens[0, 0]) == bos and tokens.shape[1] > 1) :]
        return _forward(self.model, tokens, self.length, self)[0]


def tuned_context(
    model: Model, context: Prompt, rounds: int = 5, *, rate: float = RATE, momentum: float = MOMENTUM
) -> tuple[StoredContext, ...]:
    r"""The keys and values that a context leaves after each of some rounds of reading it, without training.

    Formula:  X_t = keys and values of the context's tokens, which attend to their own up to themselves and, from round
              2 on, to all of the stored S_{t-1};  S_1 = X_1;  M_t = momentum M_{t-1} + X_t - S_{t-1};
              S_t = S_{t-1} + rate M_t.
    Source:   Yang et al., "Iterative Forward Tuning Boosts In-Context Learning in Language Models", 2023
              (arXiv 2305.13016). Departs: the form of the momentum and the rate are ours, as the paper's were not
              verified; where positions are no input of the model (ALiBi), the stored tokens stand before the others.
              A window counts stored tokens too, so that longer contexts are refused.
    Cost:     `rounds` forwards of the context, each behind itself; `rounds` times its cache.
    Check:    after one round the logits are those of the prompt with its context, at rate 0 after every round, and two
              rounds are one forward of the context written twice; tests/laws/test_forward_tuning.py.

    Args:
        model: an open model whose every layer has keys and values.
        context: one prompt, such as demonstrations.
        rounds: how often it is read.
        rate: how far the stored keys and values go towards what is read.
        momentum: the share of the last move that is kept.

    Returns:
        The stored context after each round.

    Raises:
        ArgumentError: no round, or a rate or momentum that is no number from 0 on.
        PromptError: the context is not one prompt with tokens.
        SiteError: some layer keeps no keys and values, or twice the context is longer than its window.

    >>> mt.explain.tuned_context(model, "big -> small\nhot -> cold\n", rounds=3)[-1].logits("tall ->").argmax()
    """
    given: dict[str, Any] = {"rounds": rounds, "rate": rate, "momentum": momentum}
    if not isinstance(given["rounds"], int) or isinstance(given["rounds"], bool) or rounds < 1:
        raise error(ArgumentError, "a context is read in rounds", got=repr(rounds), allowed="an integer of 1 or more")
    for name in ("rate", "momentum"):
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise error(ArgumentError, f"{name} must be a number of 0 or more", got=repr(value), do="choose another")
    return _rounds(model, _one(model, context, "context"), rounds, rate, momentum)


def _one(model: Model, prompt: Prompt, what: str) -> Int[Tensor, "1 pos"]:
    """The tokens of the only prompt.

    Raises:
        PromptError: there are several, or it has none.
    """
    batch = model.to_batch(prompt)
    if len(batch.tokens) != 1 or not batch.tokens.shape[1]:
        got = f"{len(batch.tokens)} prompts of {batch.tokens.shape[1]} tokens"
        raise error(PromptError, f"the {what} must be one prompt with tokens", got=got, do="give one")
    return batch.tokens


def _rounds(
    model: Model, tokens: Int[Tensor, "1 pos"], rounds: int, rate: float, momentum: float
) -> tuple[StoredContext, ...]:
    """The stored context after each round.

    Raises:
        SiteError: some layer keeps no keys and values, or its window is too short for two rounds of them.
    """
    if rounds > 1:
        _require_room(model, tokens.shape[1])
    found = [_forward(model, tokens, 0, None)[1]]
    moves: list[tuple[Tensor, Tensor]] = [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in _pairs(found[0])]
    for _ in range(rounds - 1):
        old = found[-1]
        new = _forward(model, tokens, 0, old)[1]
        moves = [
            (momentum * m + k - a, momentum * n + v - b)
            for (m, n), (k, v), (a, b) in zip(moves, _pairs(new), _pairs(old), strict=True)
        ]
        keys = tuple(a + rate * m for (a, _), (m, _) in zip(_pairs(old), moves, strict=True))
        values = tuple(b + rate * n for (_, b), (_, n) in zip(_pairs(old), moves, strict=True))
        found.append(StoredContext(keys, values, model))
    return tuple(found)


def _require_room(model: Model, length: int) -> None:
    """Refuse a context whose stored tokens would push each other out of a layer's window.

    Raises:
        SiteError: they would.
    """
    config: Any = model.hf.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    given = [getattr(config, name, None) for name in WINDOWS] if set(kinds) != {"full_attention"} else []
    sizes = [n for n in given if isinstance(n, int) and not isinstance(n, bool)]
    if sizes and 2 * length > min(sizes):
        what = f"two rounds of this context are longer than a window of {model.anatomy.name}"
        got, allowed = f"2 x {length} tokens", f"{min(sizes)} or fewer"
        raise error(SiteError, what, got=got, allowed=allowed, do="give a shorter context, or read it in one round")


def _pairs(stored: StoredContext) -> list[tuple[Tensor, Tensor]]:
    return list(zip(stored.keys, stored.values, strict=True))


@torch.no_grad()
def _forward(
    model: Model, tokens: Int[Tensor, "1 pos"], first: int, before: StoredContext | None
) -> tuple[Float[Tensor, " vocab"], StoredContext]:
    """Logits after tokens from position `first` on behind what is stored, and the keys and values that they leave.

    Raises:
        SiteError: some layer keeps none.
    """
    cache: Any = DynamicCache()
    for i, (keys, values) in enumerate(() if before is None else _pairs(before)):
        cache.update(keys, values, i)
    inputs: dict[str, Any] = {"input_ids": tokens, "past_key_values": cache, "use_cache": True}
    if "position_ids" in inspect.signature(model.hf.forward).parameters:
        inputs["position_ids"] = torch.arange(first, first + tokens.shape[1], device=tokens.device).unsqueeze(0)
    with HookSet(model.hf, model.anatomy.attention, model.anatomy.n_heads):  # in evaluation mode, alone
        logits = model.hf(**inputs).logits[0, -1]
    held, length = list(cache.layers), 0 if before is None else before.length
    sizes = [x.shape[-2] if isinstance(x := getattr(layer, "keys", None), Tensor) else 0 for layer in held]
    if len(held) != model.anatomy.n_layers or any(n != length + tokens.shape[1] for n in sizes):
        got = f"{sum(n == length + tokens.shape[1] for n in sizes)} of {model.anatomy.n_layers} layers"
        what = f"not every layer of {model.anatomy.name} keeps keys and values of all tokens"
        raise error(SiteError, what, got=got, do="ask a model whose layers all attend")
    keys, values = (tuple(getattr(layer, name)[..., length:, :] for layer in held) for name in ("keys", "values"))
    return logits, StoredContext(keys, values, model)


@question(
    "forward_tuning",
    command="forward-tuning",
    title="forward tuning",
    question="Does the model answer better behind demonstrations that it has read several times?",
    columns=(
        Column("accuracy", "share", "accuracy behind the demonstrations' keys and values after each round",
               "shuffled_accuracy", (0, 1), ROUND, title="accuracy by round"),
        Column("shuffled_accuracy", "share", TURNED, range=(0, 1), dims=ROUND),
        Column("log_probability", "nats", "log-probability of the answer after each round",
               "shuffled_log_probability", (None, 0), ROUND, title="log-probability by round"),
        Column("shuffled_log_probability", "nats", TURNED, range=(None, 0), dims=ROUND),
        Column("gain", "nats", "log-probability of the answer after this round minus that after the first",
               "shuffled_gain", dims=ROUND, test=True, title="gain over the first round"),
        Column("shuffled_gain", "nats", TURNED, dims=ROUND),
        Column("moved", "share", "|S_t - S_1| / |S_1| of all keys and values", "none: a size", (0, None), ROUND),
        Column("zero_shot", "share", "accuracy without demonstrations", "none: the start", (0, 1), ()),
    ),
    source=Source(
        "Yang et al.", "Iterative Forward Tuning Boosts In-Context Learning in Language Models", 2023, "2305.13016",
        departs="the form of the momentum and the rate are ours, as the paper's were not verified; demonstrations are "
        "few and drawn `draws` times, and intervals are over questions alone",
    ),
    cost="2 draws rounds forwards of the demonstrations, and (2 rounds + 1) tests of a question",
    check="tests/laws/test_forward_tuning.py",
    call='mt.explain.forward_tuning(model, "country-capital.json")',
    reading="round 1 is the ordinary prompt with demonstrations; gain says what further rounds change.",
    needs=("next token", "*.attn.k", "*.attn.v"),
)  # fmt: skip
def forward_tuning(
    model: Model,
    task: Annotated[
        Sequence[tuple[Piece, Piece]] | str,
        Argument("pairs of input and output, texts or token ids, or a JSON file of pairs of texts", positional=True),
    ],
    *,
    rounds: Annotated[int, Argument("how often the demonstrations are read", "rounds", least=1)] = 5,
    rate: Annotated[float, Argument("how far stored keys and values go towards what is read", least=0)] = RATE,
    momentum: Annotated[float, Argument("share of the last move that is kept", least=0)] = MOMENTUM,
    shots: Annotated[int, Argument("demonstrations of a prompt", "demonstrations", least=1)] = 8,
    draws: Annotated[int, Argument("sets of demonstrations, questions taking turns", "sets", least=1)] = 4,
    tests: Annotated[int, Argument("questions", "questions", least=2)] = 32,
    template: Annotated[
        str, Argument('how a pair of texts is written; a prompt ends where "{output}" begins')
    ] = "Q: {input}\nA: {output}\n\n",
) -> Found:
    """Read demonstrations in several rounds, and ask questions behind what each round leaves.

    Raises:
        DataError: the file cannot be read, or has too few pairs.
        ArgumentError: the template does not hold {input} and {output}.
        SiteError: some layer keeps no keys and values, or twice the demonstrations are longer than its window.
    """
    deck = Deck.of(model, task, template, shots, tests)
    kinds = ("", "shuffled_")
    log_p = {kind: torch.empty(tests, rounds, dtype=torch.float64) for kind in kinds}
    right = {kind: torch.empty(tests, rounds, dtype=torch.float64) for kind in kinds}
    moved: list[Tensor] = []
    report = current().counting("reading demonstrations")
    draws = min(draws, tests)
    for draw in range(draws):
        asked = list(range(draw, tests, draws))
        for kind in kinds:
            context, queries = _cut(deck, draw, asked, shuffled=kind != "")
            rows = _rounds(model, context, rounds, rate, momentum)
            for i, query in zip(asked, queries, strict=True):
                for t, stored in enumerate(rows):
                    logits = _forward(model, query, stored.length, stored)[0].double()
                    log_p[kind][i, t] = float(logits.log_softmax(-1)[deck.answer(i)])
                    right[kind][i, t] = float(logits[deck.answer(i)] >= logits.max())
            if not kind:
                moved.append(_moved(rows))
        report(draw + 1, draws)
    plain = [model.run(deck.prompt(i, shots=False)).logits[0, -1] for i in range(tests)]
    zero = [float(x[deck.answer(i)] >= x.max()) for i, x in enumerate(plain)]
    each = {f"{kind}accuracy": right[kind] for kind in kinds}
    each |= {f"{kind}log_probability": log_p[kind] for kind in kinds}
    each |= {f"{kind}gain": log_p[kind] - log_p[kind][:, :1] for kind in kinds}
    each["zero_shot"] = torch.tensor(zero, dtype=torch.float64)
    coords = {"round": list(range(1, rounds + 1))}
    return Found({"moved": torch.stack(moved).mean(0)}, each=each, coords=coords, attrs={"inputs": tests})


def _cut(
    deck: Deck, draw: int, asked: Sequence[int], *, shuffled: bool
) -> tuple[Int[Tensor, "1 pos"], list[Int[Tensor, "1 _"]]]:
    """The tokens of one draw of demonstrations that all its prompts begin with, and what each has behind them."""
    lead = deck.shown(draw, shuffled=shuffled)
    rows = [deck.model.to_batch(lead + deck.prompt(i, shots=False)).tokens[0] for i in asked]
    context = deck.model.to_batch(lead).tokens[0]
    end = len(context)
    for row in rows:
        own = min(end, len(row) - 1)  # a question keeps a token at least
        differ = (row[:own] != context[:own]).nonzero().flatten().tolist()
        end = differ[0] if differ else own
    return context[None, :end], [row[None, end:] for row in rows]


def _moved(rows: Sequence[StoredContext]) -> Float[Tensor, " round"]:
    """How far the stored keys and values are from those of the first round, in the size of these."""
    first = [x.double() for pair in _pairs(rows[0]) for x in pair]
    size = sum(x.square().sum() for x in first)
    gaps = [
        sum((x.double() - own).square().sum() for x, own in zip((x for p in _pairs(r) for x in p), first, strict=True))
        for r in rows
    ]
    return torch.stack([torch.as_tensor(gap / size).sqrt().cpu() for gap in gaps])
