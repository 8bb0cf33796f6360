"""The loop that trains: parameters, a loss, batches; with edits that stay, a checkpoint that resumes, and a way back.

Formula:  step k:  theta_{k+1} = optimizer(theta_k, gradient of loss(batches(k)) at theta_k, lr_k).
Law:      a training that is resumed after step k equals one that ran through, to the bit; 0 steps change nothing; after
          any exception the tensors hold what they held before; tests/laws/test_fit.py.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from microtome.context import current, drawn, seed_of
from microtome.edit import Edit, digest_of
from microtome.errors import ArgumentError, DataError, FitError, error
from microtome.model import Model
from microtome.training._fitted import Fitted, flattened, read, restored, table, write
from microtome.training._optimizers import Rule

B = TypeVar("B")
Metrics = Mapping[str, float | Tensor]
Loss = Callable[[B], Tensor | tuple[Tensor, Metrics]]
Parameters = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]
Observe = Callable[[int, Mapping[str, float]], bool | None]


def fit(
    parameters: Parameters, loss: Loss[B], batches: Callable[[int], B] | Sequence[B], steps: int = 1000, *,
    optimizer: str = "adamw", lr: float = 1e-3, schedule: str = "constant", warmup: int = 0,
    clip: float | None = None, weight_decay: float = 0.0, momentum: float = 0.9, seed: int | None = None,
    model: Model | None = None, edits: Sequence[Edit] = (), after: Callable[[], None] | None = None,
    observe: Observe | None = None, checkpoint: str | os.PathLike[str] | None = None, every: int = 100,
    name: str = "training",
) -> Fitted:  # fmt: skip
    """Train tensors in place: lenses, masks, rotations, vectors, small networks, parts of a model, tiny models.

    Formula:  theta_{k+1} = optimizer(theta_k, gradient of loss(batches(k)) at theta_k, lr_k), k = 0 .. steps - 1.
    Source:   the optimizers are those of PyTorch: AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101), SGD with
              Nesterov momentum, L-BFGS with a strong Wolfe line search, Muon (Jordan et al., 2024). Departs: none.
    Cost:     a forward and a backward a step (L-BFGS: up to 25), and two copies of the parameters.
    Check:    tests/laws/test_fit.py.

    Args:
        parameters: tensors by name, a list of them, or the parameters of a module. They need not require gradients.
        loss: a function of a batch that gives a scalar, or a scalar and further metrics by name.
        batches: a function of the step, from 0, that gives its batch, the same whenever it is asked; or a sequence,
            which is repeated.
        steps: how many updates.
        optimizer: "adamw", "sgd" (Nesterov), "lbfgs" (one batch, no noise) or "muon" (matrices).
        lr: the learning rate that the schedule starts from.
        schedule: "constant", or falling to 0 after the last step, "linear" or "cosine".
        warmup: steps in which the rate rises.
        clip: the largest norm of the gradient of all parameters together.
        weight_decay: decoupled for AdamW and Muon.
        momentum: of SGD and Muon.
        seed: of PyTorch's generators inside the loss; that of the settings by default. Outside they are as before.
        model: the model that the loss runs; it is in evaluation mode meanwhile, and in no other thread.
        edits: what is done to that model in every step, in addition to what the loss does.
        after: called after each update, without gradients: to project or normalise what was trained.
        observe: called with the step and its metrics; True ends the training there.
        checkpoint: a file for the state, written also at the end and when the training is stopped. If it holds this
            training, that goes on where it stood; a finished one is given back as it is.
        every: steps between two checkpoints.
        name: what its progress is called.

    Returns:
        A `Fitted`: the tensors, the metrics by step, how it was trained.

    Raises:
        FitError: the loss is not finite, or depends on none of the parameters. `fitted` of the error holds the values
            of the last step whose loss was finite.
        ArgumentError: an argument is outside what is allowed, or there is nothing to train.
        DataError: the checkpoint is damaged, or is that of another training.
    Whatever is raised, Ctrl-C too, leaves tensors and buffers as they were before; the checkpoint has what was done.

    >>> def loss(prompt):
    ...     run = model.run(prompt, edits=[Add("12.resid_post@-1", vector)], grad=True)
    ...     return -run.logits[0, -1].log_softmax(-1)[rome]
    >>> mt.fit({"vector": vector}, loss, ["The capital of France is"], steps=50, lr=0.1, model=model)
    """
    rule = Rule(optimizer, lr, schedule, warmup, clip, weight_decay, momentum)
    _check_counts(steps, every, model, edits)
    loop = _Loop(_named(parameters), loss, _of_step(batches), steps, rule, after, observe, name, every)
    loop.place = None if checkpoint is None else Path(checkpoint)
    loop.buffers = dict(parameters.named_buffers()) if isinstance(parameters, nn.Module) else {}
    return _trained(loop, seed_of(current().seed if seed is None else seed), model, edits)


def _check_counts(steps: int, every: int, model: Model | None, edits: Sequence[Edit]) -> None:
    """Refuse numbers of steps below what they can be, and edits of no model.

    Raises:
        ArgumentError: it is one of these.
    """
    if steps < 0 or every < 1:
        got = f"steps={steps}, every={every}"
        raise error(ArgumentError, "a training takes steps", got=got, allowed="steps of 0 or more, every of 1 or more")
    if edits and model is None:
        raise error(ArgumentError, "edits need a model", got=f"{len(edits)} edits and no model", do="give model=")


def _trained(loop: _Loop, seed: int, model: Model | None, edits: Sequence[Edit]) -> Fitted:
    """Run a training; after any exception its tensors hold what they held before."""
    held = loop.held
    start = {key: x.detach().clone() for key, x in held.items()}
    moved = {key: x.detach().clone() for key, x in loop.buffers.items()}
    loop.attrs, loop.good = _attributes(loop.rule, loop.steps, seed, model, edits, start), start
    try:
        with _trainable(held), _seeded(seed), _editing(model, edits), drawn():
            loop.run()
    except BaseException as problem:
        if isinstance(problem, FitError):
            problem.fitted = replace(loop.fitted(loop.good), step=max(0, loop.step - 1))
        with torch.no_grad():
            for key, x in (*held.items(), *loop.buffers.items()):
                x.copy_((start if x is held.get(key) else moved)[key])
        raise
    return loop.fitted({key: x.detach() for key, x in held.items()})


@dataclass
class _Loop:
    """The state of a training."""

    held: dict[str, Tensor]
    loss: Loss[Any]
    batch: Callable[[int], Any]
    steps: int
    rule: Rule
    after: Callable[[], None] | None
    observe: Observe | None
    name: str
    every: int
    place: Path | None = None
    attrs: dict[str, Any] = field(default_factory=dict[str, Any])
    rows: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    good: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    step: int = 0
    ended: bool = False
    whole: bool = True
    noise: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    buffers: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def run(self) -> None:
        """All steps, from the checkpoint on if there is one."""
        optimizer = self.rule.build(self.held)
        if self.place is not None and self.place.exists():
            self._resume(optimizer)
        self.noise = _noise()
        report = current().counting(self.name)
        try:
            while self.step < self.steps and not self.ended:
                self._one(optimizer)
                if self.step % self.every == 0:
                    self._save(optimizer)
                report(self.step, self.steps)
        except FitError:
            raise
        except BaseException:
            if self.whole:  # between two updates: all of it is as the last whole step left it
                self._save(optimizer)
            raise
        self._save(optimizer)

    def _one(self, optimizer: Optimizer) -> None:
        """One update."""
        batch, first = self.batch(self.step), dict[str, float]()
        lr = self.rule.rate(self.step, self.steps)

        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                found = self.loss(batch)
                value, more = found if isinstance(found, tuple) else (found, dict[str, float]())
                self._require(value)
                value.backward()  # pyright: ignore[reportUnknownMemberType]
            if not first:
                if all(x.grad is None for x in self.held.values()):
                    raise self._unreached()
                first.update({"loss": float(value.detach()), "lr": lr} | {k: float(x) for k, x in more.items()})
                self.good = {key: x.detach().clone() for key, x in self.held.items()}
            self.whole = False  # what follows changes the parameters
            return value.detach()

        self.rule.step(optimizer, closure, list(self.held.values()), lr)
        optimizer.zero_grad(set_to_none=True)
        if self.after is not None:
            with torch.no_grad():
                self.after()
        self._require_finite()
        for key in first.keys() | self.rows.keys():
            column = self.rows.setdefault(key, [math.nan] * self.step)
            column.append(first.get(key, math.nan))
        self.step += 1
        self.noise, self.whole = _noise(), True
        if self.observe is not None:
            with torch.random.fork_rng(_devices()):  # whatever it draws, the next step draws as without it
                self.ended = bool(self.observe(self.step - 1, first))

    def _require_finite(self) -> None:
        """Refuse an update that left no numbers: a finite loss may have a gradient that is none.

        Raises:
            FitError: it did.
        """
        for name, x in self.held.items():
            if not bool(x.detach().isfinite().all()):
                raise error(
                    FitError, f'"{name}" is not finite after step {self.step}',
                    do="lower the learning rate or clip gradients, and keep the loss away from where it has no slope; "
                    "the values before are in `fitted` of this error",
                )  # fmt: skip

    def _require(self, value: Any) -> None:
        """Refuse a loss that cannot be followed.

        Raises:
            FitError: it is no scalar, not finite, or has no gradient.
        """
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise error(FitError, "the loss of a training must be one number", got=got, do="return its mean")
        if not bool(value.detach().isfinite()):
            raise error(
                FitError, f"the loss is not finite at step {self.step}", got=float(value.detach()),
                do="lower the learning rate or clip gradients; the values before are in `fitted` of this error",
            )  # fmt: skip
        if not value.requires_grad:
            raise self._unreached()

    def _unreached(self) -> FitError:
        names = ", ".join(list(self.held)[:5])
        do = "let the loss use the tensors that were given, and runs with grad=True"
        return error(FitError, "the loss depends on none of the parameters", got=names, do=do)

    def _require_same_loss(self, losses: Sequence[float]) -> None:
        """Refuse a checkpoint whose first loss is not that of this loss and this batch, from the same start.

        Raises:
            DataError: it is another.
        """
        if not losses:
            return
        before = {key: x.detach().clone() for key, x in self.buffers.items()}
        with torch.enable_grad():
            found = self.loss(self.batch(0))
        own = float((found[0] if isinstance(found, tuple) else found).detach())
        for key, x in self.buffers.items():
            x.copy_(before[key])
        if not math.isclose(own, losses[0], rel_tol=1e-3, abs_tol=1e-6):
            raise error(
                DataError, f"{self.place} is the checkpoint of another training",
                got=f"a first loss of {losses[0]:.6g}",
                allowed=f"{own:.6g}, that of this loss and these batches", do="name another file, or delete this one",
            )  # fmt: skip

    def fitted(self, values: Mapping[str, Tensor]) -> Fitted:
        """What the training gave, with these values."""
        return Fitted(dict(values), table(self.rows), self.step, self.attrs)

    def _save(self, optimizer: Optimizer) -> None:
        """Write the state as the last whole step left it."""
        if self.place is None:
            return
        tensors = {f"value.{key}": x for key, x in self.held.items()}
        tensors |= {f"noise.{key}": x for key, x in self.noise.items()}
        tensors |= {f"buffer.{key}": x for key, x in self.buffers.items()}
        state = flattened(optimizer.state_dict(), tensors, "state")
        rest = {"step": self.step, "attrs": self.attrs, "metrics": self.rows, "state": state, "ended": self.ended}
        write(self.place, tensors, rest)

    def _resume(self, optimizer: Optimizer) -> None:
        """Go on where the checkpoint stands.

        Raises:
            DataError: it is damaged, or that of another training.
        """
        assert self.place is not None
        tensors, rest = read(self.place)
        mine, its = self.attrs, rest["attrs"]
        longer = mine["schedule"] == "constant" and rest["step"] <= self.steps
        other = [k for k in mine if mine[k] != its.get(k) and not (k == "steps" and longer)]
        if other:
            raise error(
                DataError, f"{self.place} is the checkpoint of another training",
                got=", ".join(f"{k} {its.get(k)}" for k in other),
                allowed=", ".join(f"{k} {mine[k]}" for k in other), do="name another file, or delete this one",
            )  # fmt: skip
        self._require_same_loss(rest["metrics"].get("loss", []))
        with torch.no_grad():
            for kind, held in (("value", self.held), ("buffer", self.buffers)):
                for key, x in held.items():
                    x.copy_(tensors[f"{kind}.{key}"])
        if rest["state"] is not None:
            optimizer.load_state_dict(restored(rest["state"], tensors))
        self.step, self.rows = rest["step"], {k: list(x) for k, x in rest["metrics"].items()}
        self.ended = rest["ended"]
        _set_noise({k.removeprefix("noise."): x for k, x in tensors.items() if k.startswith("noise.")})


def _named(parameters: Parameters) -> dict[str, Tensor]:
    """What is trained, by name, each once.

    Raises:
        ArgumentError: there is nothing, or something that cannot be trained.
    """
    given: Any = parameters
    found: dict[str, Any]
    if isinstance(given, nn.Module):
        found = dict(given.named_parameters())
    else:
        found = dict(given) if isinstance(given, Mapping) else {str(i): x for i, x in enumerate(given)}
    if not found:
        raise error(ArgumentError, "there is nothing to train", got="no tensor", do="give tensors by name")
    for name, x in found.items():
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.is_leaf):
            got = f'"{name}", {"the result of a computation" if isinstance(x, Tensor) and not x.is_leaf else _kind(x)}'
            allowed = "tensors of floating-point numbers that are no results of others"
            raise error(ArgumentError, "this cannot be trained", got=got, allowed=allowed, do="use x.detach().clone()")
    return found


def _kind(x: Any) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def _of_step(batches: Callable[[int], B] | Sequence[B]) -> Callable[[int], B]:
    """The batch of a step.

    Raises:
        ArgumentError: there are none, or they cannot be asked for again.
    """
    if callable(batches):
        return batches
    given: Any = batches
    if not isinstance(given, Sequence) or not len(batches):
        got = "none" if isinstance(given, Sequence) else type(given).__name__
        allowed = "a function of the step, or a sequence"
        raise error(ArgumentError, "a training needs batches that can be asked for again", got=got, allowed=allowed)
    return lambda step: batches[step % len(batches)]


def _attributes(
    rule: Rule, steps: int, seed: int, model: Model | None, edits: Sequence[Edit], start: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What is recorded of a training, and makes another one another."""
    parts = [f"{name}{list(x.shape)}".encode() + digest_of(x) for name, x in start.items()]
    found: dict[str, Any] = asdict(rule) | {"steps": steps, "seed": seed, "edits": [edit.digest() for edit in edits]}
    found["start"] = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    return found if model is None else found | {"model": model.anatomy.name, "fingerprint": model.fingerprint}


@contextmanager
def _trainable(held: Mapping[str, Tensor]) -> Iterator[None]:
    """Let tensors require gradients inside the block, and put back what they had."""
    before = {name: (x.requires_grad, x.grad) for name, x in held.items()}
    try:
        for x in held.values():
            x.requires_grad_()
            x.grad = None
        yield
    finally:
        for name, x in held.items():
            x.requires_grad_(before[name][0])
            x.grad = before[name][1]


@contextmanager
def _editing(model: Model | None, edits: Sequence[Edit]) -> Iterator[None]:
    """The model with its edits, and the mode of each of its modules put back."""
    with ExitStack() as stack:
        if model is not None:
            modes = [(module, module.training) for module in model.hf.modules()]
            stack.callback(lambda: [setattr(module, "training", mode) for module, mode in modes])
            stack.enter_context(model.editing(*edits))
        yield


def _devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """PyTorch's generators seeded inside the block, and as before behind it."""
    with torch.random.fork_rng(_devices()):
        torch.manual_seed(seed)
        yield


def _noise() -> dict[str, Tensor]:
    """The states of PyTorch's generators."""
    return {"host": torch.get_rng_state()} | {str(i): torch.cuda.get_rng_state(i) for i in _devices()}


def _set_noise(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["host"])
    for i in _devices():
        if str(i) in states:
            torch.cuda.set_rng_state(states[str(i)], i)
