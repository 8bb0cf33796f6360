"""Optimizers by name, and learning rates by step in closed form, so that a resumed training needs no schedule state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, AdamW, Muon, Optimizer

from microtome.errors import ArgumentError, error, nearest

OPTIMIZERS = ("adamw", "sgd", "lbfgs", "muon")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Rule:
    """How parameters move.

    Attributes:
        optimizer: "adamw"; "sgd" with Nesterov momentum; "lbfgs", for a loss without noise; "muon", for matrices.
        lr: the learning rate that the schedule starts from.
        schedule: "constant", or falling to 0 after the last step, "linear" or "cosine".
        warmup: steps in which the rate rises linearly from 0.
        clip: the largest norm of the gradient of all parameters together; longer ones are shortened to it.
        weight_decay: decoupled for AdamW and Muon, added to the gradient for SGD.
        momentum: of SGD and Muon.

    Raises:
        ArgumentError: one of them cannot have this value.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    schedule: str = "constant"
    warmup: int = 0
    clip: float | None = None
    weight_decay: float = 0.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            got = getattr(self, name)
            if got not in known:
                do = f"choose one.{nearest(str(got), list(known))}"
                raise error(ArgumentError, f"no {name} {got!r}", allowed=", ".join(known), do=do)
        within = {
            "lr": self.lr > 0, "warmup": self.warmup >= 0, "clip": self.clip is None or self.clip > 0,
            "weight_decay": self.weight_decay >= 0, "momentum": 0 <= self.momentum < 1,
        }  # fmt: skip
        limits = {"lr": "above 0", "clip": "above 0", "momentum": "0 to below 1"}
        for name, fits in within.items():
            if not fits:
                allowed = limits.get(name, "0 or more")
                raise error(ArgumentError, f"{name} of a training", got=getattr(self, name), allowed=allowed)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step `step` of `steps`, counted from 0.

        Formula:  lr * min(1, (step + 1) / (warmup + 1)) * s,  with p = (step - warmup) / (steps - warmup) in 0..1 and
                  s = 1, 1 - p or (1 + cos(pi p)) / 2.
        """
        risen = min(1.0, (step + 1) / (self.warmup + 1))
        past = max(0.0, (step - self.warmup) / max(1, steps - self.warmup))
        fall = {"constant": 1.0, "linear": 1.0 - past, "cosine": (1.0 + math.cos(math.pi * past)) / 2}
        return self.lr * risen * fall[self.schedule]

    def build(self, parameters: Mapping[str, Tensor]) -> Optimizer:
        """The optimizer of these parameters.

        Raises:
            ArgumentError: Muon is asked to train what is no matrix.
        """
        held = list(parameters.values())
        if self.optimizer == "adamw":
            return AdamW(held, lr=self.lr, weight_decay=self.weight_decay)
        if self.optimizer == "sgd":
            nesterov = self.momentum > 0
            return SGD(held, lr=self.lr, momentum=self.momentum, nesterov=nesterov, weight_decay=self.weight_decay)
        if self.optimizer == "lbfgs":
            return LBFGS(held, lr=self.lr, line_search_fn="strong_wolfe")
        other = next((f'"{name}" {list(x.shape)}' for name, x in parameters.items() if x.dim() != 2), None)
        if other is not None:
            do = "train the rest with another optimizer"
            raise error(ArgumentError, "muon trains matrices alone", got=other, allowed="two axes", do=do)
        return Muon(held, lr=self.lr, weight_decay=self.weight_decay, momentum=self.momentum)

    def step(
        self, optimizer: Optimizer, closure: Callable[[], Tensor], parameters: Sequence[Tensor], lr: float
    ) -> None:
        """One step; `closure` gives the loss and leaves its gradients."""
        for group in optimizer.param_groups:
            group["lr"] = lr

        def clipped() -> Tensor:
            found = closure()
            if self.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, self.clip)
            return found

        optimizer.step(clipped)  # pyright: ignore[reportArgumentType, reportCallIssue]
