"""Fine-tuning of some neurons and heads alone, beside as many random ones, and what it makes a model forget.

Formula:  theta = W_gate[:, n], W_in[:, n], W_out[n] of each neuron and W_Q[h], W_O[h] of each head, all else held;
          theta minimises the mean over a batch of  L(x) = - log sum_{a in answers(x)} p(a | x), through `fit`;
          gain = L before - L after, over pairs that were not trained on;
          forgetting = loss of a plain text after - before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from microtome.context import current, seed_of
from microtome.errors import ArgumentError, DataError, error
from microtome.model import Model
from microtome.stream import TokenBatches, corpus_of, mean_interval, standard_library_text
from microtome.tasks import Pair, Task
from microtome.training._fit import fit
from microtome.training._slices import Unit, others, places_of, units_of

Places = Mapping[str, Tensor]
ROWS = 8
MEANT = {
    "gain": ("nats", "loss of held-out pairs before minus after, positive where the task is learnt"),
    "accuracy": ("share", "held-out pairs whose answer is the model's first choice"),
    "loss": ("nats", "minus the log-probability of the answer, over held-out pairs"),
    "text_loss": ("nats", "next-token loss of a plain text"),
    "forgetting": ("nats", "loss of the plain text after minus before, positive where something was forgotten"),
    "parameters": ("1", "how many weights were trained"),
}


def tune(
    model: Model, task: Task, parts: str | Sequence[str], *, steps: int = 50, lr: float = 1e-3, batch: int = 8,
    tests: int | None = None, sets: int = 3, text: Any = None, tokens: int = 2048, length: int = 64, keep: bool = False,
    optimizer: str = "adamw", clip: float | None = 1.0, seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None, every: int = 100,
) -> xr.Dataset:  # fmt: skip
    """Fine-tune only some neurons and heads on a task, and compare with random ones and with what is forgotten.

    Formula:  theta, the weights of the parts: W_gate[:, n], W_in[:, n], W_out[n] of a neuron, W_Q[h], W_O[h] of a head
              (keys and values may be shared); theta minimises the mean of L(x) = - log sum_{a in answers} p(a | x);
              gain = L before - L after over held-out pairs; forgetting = loss of a text after - before.
              Random sets: as many other units of the same layers and sites, tuned from the same start alike.
    Source:   selective fine-tuning of Zhang et al., "Interpreting and Improving Large Language Models in Arithmetic
              Calculation", 2024 (arXiv 2409.01659). Departs: beside random sets of equal size; single neurons too.
    Cost:     (1 + sets) steps forwards and backwards of a batch, and 2 + sets forwards of held-out pairs and text.
    Check:    weights of all else stay to the bit, 0 steps gain 0, a resumed tuning equals one that ran through;
              tests/laws/test_tune.py.

    Args:
        model: an open model, whose weights are as before afterwards, unless they are kept.
        task: pairs; the clean prompts and their answers are what is learnt.
        parts: addresses of neurons ("12.mlp.post[431]") and heads ("9.attn.z[3]"), such as the ranked ones of another
            method.
        steps: updates.
        lr: the learning rate.
        batch: pairs of a step.
        tests: the last pairs, which are held out; half of them by default.
        sets: random sets of equal size, the control.
        text: what forgetting is measured on: a corpus, texts, or ids [row, pos]; the standard library's by default.
        tokens: of that text.
        length: tokens of a row of it.
        keep: whether the model keeps the weights of `parts` as tuned.
        optimizer: as `fit` takes it, and so are the next two.
        clip: the largest norm of the gradient of all parts together.
        every: steps between two checkpoints.
        seed: of the order of the pairs and of the random sets; that of the settings by default.
        checkpoint: a file for the state of the tuning, beside which those of random sets are; as `fit` takes it.

    Returns:
        Dataset over `set`, "tuned" and "random 0" ...: `loss`, `accuracy`, `text_loss`, and `gain` and `forgetting`
        with 95 % intervals over pairs and rows; `gain_diff`, tuned minus the mean of the random sets in the same
        pairs, whose interval is over pairs alone, not over sets; before any tuning `loss_before`, `accuracy_before`,
        `text_loss_before`; `parameters`. The attributes hold the parts of each set.

    Raises:
        ArgumentError: a part is no neuron or head, a number is outside its limits, or there are too few others.
        SiteError: the model has no such part, or its weights are quantised.
        DataError: the task has too few pairs, or there is no text.
        FitError: the loss is not finite.
    Whatever is raised, Ctrl-C too, leaves the weights as they were.

    >>> mt.training.tune(model, mt.tasks.build("addition", model), ["12.mlp.post[431]", "9.attn.z[3]"])["gain_diff"]
    """
    _check(batch=batch, steps=steps, sets=sets, tokens=tokens, length=length)
    seed = seed_of(current().seed if seed is None else seed)
    held = _Held.of(task, tests, _rows(model, text, tokens, length))
    train = task.pairs[: len(task) - len(held.pairs)]
    options: dict[str, Any] = {"optimizer": optimizer, "lr": lr, "clip": clip, "seed": seed, "every": every}
    generator, order = (torch.Generator().manual_seed(s) for s in (seed, 1_000_003 * (seed + 1)))
    own = units_of(model, parts)
    chosen = {"tuned": own} | {f"random {i}": others(model, own, generator) for i in range(sets)}
    batches = _batches(train, steps, batch, order)
    data, kept = _compared(model, chosen, held, batches, steps, checkpoint, options)
    if keep:
        _write(model, *kept)
    attrs = {"method": "tuning of parts", "task": task.name, "steps": steps, "lr": lr, "seed": seed, "kept": keep}
    attrs |= {name.replace(" ", "_"): ", ".join(f"{i}.{s}[{n}]" for i, s, n in units) for name, units in chosen.items()}
    return data.assign_attrs(dict(model.provenance) | attrs)


def _compared(
    model: Model,
    chosen: Mapping[str, Sequence[Unit]],
    held: _Held,
    batches: Callable[[int], Sequence[Pair]],
    steps: int,
    checkpoint: str | os.PathLike[str] | None,
    options: Mapping[str, Any],
) -> tuple[xr.Dataset, tuple[Places, Mapping[str, Tensor]]]:
    """Tune each set from the same start; what it gains and forgets, and the weights of the first."""
    before = held.read(model)
    after: dict[str, _Read] = {}
    made: list[tuple[Places, Mapping[str, Tensor]]] = []
    for name, units in chosen.items():
        places = places_of(model, units)
        values = {key: _parameter(model, key).detach().flatten()[at].clone() for key, at in places.items()}
        place = None if checkpoint is None else _beside(Path(checkpoint), name)
        loss = _loss(model, places, values)
        fitted = fit(
            values, loss, batches, steps, model=model, checkpoint=place, name=f"tuning, {name}", **options
        )  # fmt: skip
        made.append((places, fitted.values))
        with _written(model, *made[-1]):
            after[name] = held.read(model)
    return _dataset(before, after, sum(len(at) for at in made[0][0].values())), made[0]


def _batches(
    train: Sequence[Pair], steps: int, batch: int, generator: torch.Generator
) -> Callable[[int], Sequence[Pair]]:
    """The pairs of each step: all of them in a random order, and then again in another."""
    rounds = 1 + steps * batch // len(train)
    order = [i for _ in range(rounds) for i in torch.randperm(len(train), generator=generator).tolist()]
    return lambda step: [train[i] for i in order[step * batch : (step + 1) * batch]]


def _check(**numbers: Any) -> None:
    """Refuse numbers below what they can be.

    Raises:
        ArgumentError: one is.
    """
    for name, value in numbers.items():
        least = {"steps": 0, "sets": 0, "length": 2}.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise error(ArgumentError, f"{name} must be an integer of {least} or more", got=repr(value))


def _rows(model: Model, text: Any, tokens: int, length: int) -> list[Tensor]:
    """Tokens [row, pos] of the plain text, some rows at a time.

    Raises:
        DataError: there is no tokenizer to read it with.
    """
    if isinstance(text, Tensor):
        return list(text.split(ROWS))
    if model.tokenizer is None:
        do = "give text= as ids [row, pos]"
        raise error(DataError, f"{model.anatomy.name} has no tokenizer to read a text with", do=do)
    corpus = standard_library_text() if text is None else corpus_of(text)
    made = TokenBatches(corpus, model.tokenizer, length=length, rows=ROWS, tokens=tokens)
    return [part.tokens for part in made]


def _beside(path: Path, name: str) -> Path:
    """The checkpoint of a set."""
    return path if name == "tuned" else path.with_name(f"{path.stem}-{name.replace(' ', '-')}{path.suffix}")


def _parameter(model: Model, name: str) -> Tensor:
    return model.hf.get_parameter(name)


def _loss(model: Model, places: Places, values: Mapping[str, Tensor]) -> Callable[[Sequence[Pair]], Tensor]:
    """The mean loss of some pairs, with the values in their places and all other weights as they are."""

    def loss(pairs: Sequence[Pair]) -> Tensor:
        put = {
            name: (p := _parameter(model, name).detach()).flatten().index_put((at,), values[name]).view_as(p)
            for name, at in places.items()
        }

        def logits(tokens: Tensor) -> Tensor:
            return functional_call(model.hf, put, kwargs={"input_ids": tokens, "use_cache": False}).logits

        return _losses(model, pairs, logits)[0].mean()

    return loss


def _losses(
    model: Model, pairs: Sequence[Pair], logits: Callable[[Tensor], Tensor]
) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    """Of each pair, minus the log-probability of its answers, and whether one of them is the first choice."""
    found: list[Tensor | None] = [None] * len(pairs)
    right: list[Tensor | None] = [None] * len(pairs)
    by_length: dict[int, list[int]] = {}
    for i, pair in enumerate(pairs):
        by_length.setdefault(len(pair.clean_tokens), []).append(i)
    for numbers in by_length.values():
        for some in (numbers[first : first + ROWS] for first in range(0, len(numbers), ROWS)):
            tokens = torch.tensor([pairs[i].clean_tokens for i in some], device=model.device)
            log_p = logits(tokens)[:, -1].float().log_softmax(-1)
            for row, i in enumerate(some):
                of_answers = log_p[row, list(pairs[i].answer_ids)]
                found[i] = -of_answers.logsumexp(-1)
                right[i] = (of_answers.max() >= log_p[row].max()).double()
    return torch.stack([x for x in found if x is not None]), torch.stack([x for x in right if x is not None])


def _write(model: Model, places: Places, values: Mapping[str, Tensor]) -> None:
    """Put values in their places."""
    with torch.no_grad():
        for name, at in places.items():
            _parameter(model, name).view(-1)[at] = values[name]


@contextmanager
def _written(model: Model, places: Places, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with tuned weights inside the block, and as before behind it."""
    before = {name: _parameter(model, name).detach().view(-1)[at].clone() for name, at in places.items()}
    try:
        _write(model, places, values)
        yield
    finally:
        _write(model, places, before)


@dataclass(frozen=True)
class _Read:
    """What a model makes of held-out pairs and of a plain text."""

    loss: Float[Tensor, " pair"]
    right: Float[Tensor, " pair"]
    text: Float[Tensor, " row"]


@dataclass(frozen=True)
class _Held:
    """Pairs that are not trained on, and a plain text."""

    pairs: Sequence[Pair]
    rows: Sequence[Tensor]

    @classmethod
    def of(cls, task: Task, tests: int | None, rows: Sequence[Tensor]) -> _Held:
        """The last pairs of a task.

        Raises:
            DataError: none is left to train on, or to test.
        """
        held = len(task) // 2 if tests is None else tests
        if not 1 <= held < len(task):
            got = f"{len(task)} pairs, {held} of them held out"
            raise error(DataError, "a tuning needs pairs to train on and others to test", got=got, do="give more pairs")
        return cls(task.pairs[len(task) - held :], rows)

    @torch.no_grad()
    def read(self, model: Model) -> _Read:
        """Read off runs of the model as it is now."""
        loss, right = _losses(model, self.pairs, lambda tokens: model.run(tokens).logits)
        text: list[Tensor] = []
        for tokens in self.rows:
            given = tokens.to(model.device)
            log_p = model.run(given).logits[:, :-1].float().log_softmax(-1)
            text.append(-log_p.gather(-1, given[:, 1:, None]).squeeze(-1).double().mean(1))
        return _Read(loss.double().cpu(), right.cpu(), torch.cat(text).cpu())


def _dataset(before: _Read, after: Mapping[str, _Read], count: int) -> xr.Dataset:
    names = list(after)
    gain = torch.stack([before.loss - after[name].loss for name in names], dim=1)  # [pair, set]
    lost = torch.stack([after[name].text - before.text for name in names], dim=1)
    found: dict[str, tuple[tuple[str, ...], Any, str]] = {}
    for name, each in (("gain", gain), ("forgetting", lost)):
        for end, x in zip(("", "_lo", "_hi"), mean_interval(each), strict=True):
            found[name + end] = (("set",), x.numpy(), name)
    if len(names) > 1:
        ends = mean_interval(gain[:, 0] - gain[:, 1:].mean(1))
        found |= {f"gain_diff{end}": ((), float(x), "gain") for end, x in zip(("", "_lo", "_hi"), ends, strict=True)}
    for name, part in (("loss", "loss"), ("accuracy", "right"), ("text_loss", "text")):
        found[name] = (("set",), [float(getattr(after[one], part).mean()) for one in names], name)
        found[f"{name}_before"] = ((), float(getattr(before, part).mean()), name)
    found["parameters"] = ((), count, "parameters")
    variables = {n: (dims, x, {"unit": MEANT[of][0], "meaning": MEANT[of][1]}) for n, (dims, x, of) in found.items()}
    return xr.Dataset(variables, coords={"set": names})
