"""What a change costs: a model before and after it, beside a random change of the same size.

Formula:  every score of `_scores` in three states, before, after and random; a change of a score is the mean over
          examples (rows of text, pairs of tasks, prompts) of its difference to before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome import tasks
from microtome.axes import Tokens
from microtome.change._scores import (
    TextScores,
    calibration,
    continuations,
    distinct,
    divergences,
    entropy,
    induction_losses,
    repeated,
    sizes,
    speeds,
    task_scores,
    text_scores,
)
from microtome.change._states import states_of
from microtome.context import current
from microtome.errors import ArgumentError, PromptError, error
from microtome.method import Argument, Column, Found, Source, Text, question
from microtome.model import Model
from microtome.stream import mean_interval, share_difference_interval, share_interval
from microtome.tasks import Task

TASKS = ("fact", "needle", "subject_verb_agreement", "indirect_object", "addition")
KEPT = 2**28
"""Bytes that log-probabilities of the model before may take."""
PROMPT = 16
"""Tokens of the prompts that are continued."""
CHANGES = ("after", "random")
STATE, CHANGED = ("state",), ("changed",)
RANDOM = "none: compare random"


def _both(name: str, unit: str, meaning: str, limits: tuple[float | None, float | None] = (None, None),
          more: Sequence[str] = ()) -> tuple[Column, Column]:  # fmt: skip
    """A score in every state, and how it changes."""
    return (
        Column(name, unit, meaning, "none: compare before", limits, (*STATE, *more)),
        Column(f"{name}_change", unit, f"how much that changes: {meaning}", RANDOM, dims=(*CHANGED, *more)),
    )


@question(
    "assess",
    command="assess",
    title="assessment of a change",
    question="What does a change of a model gain and break, beside a random change of the same size?",
    columns=(
        *_both("loss", "nats", "next-token loss on a text", (0, None)),
        *_both("group_loss", "nats", "the same by group of the text", (0, None), ("group",)),
        Column("kl", "nats", "KL from before, of next-token distributions on the text", RANDOM, (0, None), CHANGED),
        Column("agreement", "share", "positions with the same likeliest next token as before", RANDOM, (0, 1), CHANGED),
        *_both("context_gain", "nats", "loss of the first quarter of a row less that of its last quarter"),
        *_both("induction_loss", "nats", "loss on random tokens that have come once before", (0, None)),
        *_both("overconfidence", "share", "probability of the likeliest next token less how often it comes", (-1, 1)),
        Column("calibration", "share", "expected calibration error of next tokens on the text, 15 bins",
               "none: compare before", (0, 1), STATE, interval=False),
        *_both("accuracy", "share", "pairs of a task whose answer is the likeliest token", (0, 1), ("task",)),
        *_both("preference", "logits", "logit of the answer less that of the foil, by task", more=("task",)),
        *_both("repeated", "share", "4-grams of greedy continuations that came before in them", (0, 1)),
        *_both("distinct", "share", "different 2-grams of greedy continuations", (0, 1)),
        *_both("entropy", "bits", "weighted entropy of 2-grams and 3-grams of greedy continuations", (0, None)),
        Column("bytes", "bytes", "of all parameters", RANDOM, (0, None), STATE),
        Column("parameters", "1", "how many", RANDOM, (0, None), STATE),
        Column("nonzero", "share", "parameters that are not zero", RANDOM, (0, 1), STATE),
    ),
    source=(
        Source("Meng et al.", "Locating and Editing Factual Associations in GPT", 2022, "2202.05262",
               departs="the entropy of n-grams alone; the rest is of its own sources"),
        Source("Guo et al.", "On Calibration of Modern Neural Networks", 2017, "1706.04599"),
        Source("Olsson et al.", "In-context Learning and Induction Heads", 2022, "2209.11895",
               departs="quarters of rows instead of the 50th and the 500th token"),
    ),
    cost="three times: one forward of the text, of the tasks and of repeated tokens, and the continuations",
    check="tests/laws/test_assess.py",
    call='mt.assess(model, "edit.safetensors")',
    reading="A change is worth what it does more than the random one does; a model beside itself changes nothing. "
    "Seconds, on this machine, are attributes: they differ from run to run.",
)  # fmt: skip
def assess(
    model: Model,
    after: Annotated[Any, Argument("a change, edits (.safetensors), or another model", positional=True)],
    *,
    text: Annotated[Any, Argument("text to read: a file, or what `mt.measure` takes", from_text=Path)] = None,
    tokens: Annotated[int, Argument("tokens of the text", "tokens", least=16)] = 4_096,
    length: Annotated[int, Argument("tokens of a row", "tokens", least=8)] = 256,
    of: Annotated[Sequence[str], Argument("tasks whose pairs are scored")] = TASKS,
    pairs: Annotated[int, Argument("pairs of each task", "pairs", least=1)] = 16,
    sequences: Annotated[int, Argument("sequences of repeated tokens", "sequences", least=1)] = 16,
    prompts: Annotated[int, Argument("prompts that are continued", "prompts", least=0)] = 8,
    new: Annotated[int, Argument("tokens of each continuation", "tokens", least=8)] = 32,
) -> Found:  # fmt: skip
    """Score a model before and after a change, and after a random change of equal norm.

    Over (state): before, after, random, NaN where there is no control; over (changed) after and random. The text is
    read in rows of one length, shorter ones are left out; KL is taken at as many evenly spaced positions of each row as
    256 MiB hold. Tasks that do not fit the tokenizer are left out, and named in the attributes.

    Raises:
        ModelUnsupported: the model does not predict the next token.
        ArgumentError: what comes after is no change, edits or model of the same tokens.
        EditError: a change for another model.
        DataError: there is too little text.
    """
    model.require_next_token()
    states, control = states_of(model, after, current().seed)
    batches = Text(text, tokens=tokens, length=length).batches(model)
    rows, groups = _rows(batches.parts)
    built, misfits = _built(model, of, pairs)
    chosen = torch.linspace(0, len(rows) - 1, min(prompts, len(rows))).long()
    start = min(PROMPT, rows.shape[1], model.anatomy.n_ctx - new)
    if prompts and start < 1:
        raise error(ArgumentError, "the continuations do not fit the context", got=f"new={new}",
                    allowed=f"{model.anatomy.n_ctx - 1} tokens or fewer", do="ask for fewer")  # fmt: skip
    plan = _Plan(rows, groups, list(batches.groups), built, sequences, rows[chosen, :start], new)
    board, report = _Board(plan), current().counting("states")
    for i, state in enumerate(states):
        with state.entered() as one:
            board.take(state.name, one)
        report(i + 1, len(states))
    attrs = {"control": control, "rows": len(rows), "tasks_left_out": ", ".join(misfits) or "none"}
    return board.found(attrs)


def _rows(parts: Any) -> tuple[Tokens, Tensor]:
    """[row, pos] The whole rows of a text, and the group of each."""
    held = [(part.tokens, part.group[:, -1]) for part in parts]
    width = max(tokens.shape[1] for tokens, _ in held)
    whole = [(tokens, group) for tokens, group in held if tokens.shape[1] == width]
    return torch.cat([tokens for tokens, _ in whole]), torch.cat([group for _, group in whole])


def _built(model: Model, of: Sequence[str], pairs: int) -> tuple[dict[str, Task], list[str]]:
    """Tasks, and the names of those that do not fit the tokenizer."""
    built: dict[str, Task] = {}
    misfits: list[str] = []
    for name in of:
        try:
            built[name] = tasks.build(name, model, pairs, seed=current().seed, fewer=True)
        except PromptError as problem:
            if name not in tasks.names():
                raise
            misfits.append(f"{name} ({problem.told})")
    return built, misfits


@dataclass(frozen=True)
class _Plan:
    """What every state is scored on."""

    rows: Tokens
    group: Tensor
    groups: list[str]
    tasks: dict[str, Task]
    sequences: int
    prompts: Tokens
    new: int


@dataclass
class _Board:
    """Scores by state."""

    plan: _Plan
    each: dict[str, dict[str, Float[Tensor, " example"]]] = field(default_factory=dict[str, Any])
    text: dict[str, TextScores] = field(default_factory=dict[str, TextScores])
    single: dict[str, dict[str, float]] = field(default_factory=dict[str, Any])
    speeds: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])

    def take(self, state: str, model: Model) -> None:
        """Score one state."""
        plan = self.plan
        kept = KEPT // (4 * model.anatomy.d_vocab * len(plan.rows))
        text = text_scores(model, plan.rows, kept)
        own = {"loss": text.loss, "context_gain": text.context}
        own["overconfidence"] = (text.confidence - text.right).mean(1)
        own["induction_loss"] = induction_losses(model, plan.sequences)
        for name, task in plan.tasks.items():
            own[f"accuracy/{name}"], own[f"preference/{name}"] = task_scores(model, task)
        written = continuations(model, plan.prompts, plan.new)
        for name, score in (("repeated", repeated), ("distinct", distinct), ("entropy", entropy)):
            own[name] = torch.tensor([score(tokens) for tokens in written], dtype=torch.float64)
        if "before" in self.text:
            own["kl"], own["agreement"] = divergences(self.text["before"], text)
        self.each[state], self.text[state] = own, text
        size, count, nonzero = sizes(model)
        self.single[state] = {"bytes": size, "parameters": count, "nonzero": nonzero}
        if state != "random":
            self.speeds[state] = speeds(model)

    def found(self, attrs: dict[str, Any]) -> Found:
        """All columns."""
        values: dict[str, Any] = {}
        for name in ("loss", "context_gain", "induction_loss", "overconfidence", "repeated", "distinct", "entropy"):
            values |= self._both(name, [name])
        for name in ("accuracy", "preference"):
            values |= self._both(name, [f"{name}/{task}" for task in self.plan.tasks], several=True)
        values |= self._by_group()
        values["calibration"] = torch.tensor([
            calibration(self.text[s]) if s in self.text else torch.nan for s in ("before", *CHANGES)
        ])  # fmt: skip
        for name in ("kl", "agreement"):
            values |= _columns(name, torch.stack([_ends_of(self.each.get(s, {}).get(name)) for s in CHANGES]))
        for name in self.single["before"]:
            found = [self.single.get(state, {}).get(name, torch.nan) for state in ("before", *CHANGES)]
            values[name] = torch.tensor(found, dtype=torch.float64)
        for state, (read, written) in self.speeds.items():
            attrs |= {f"seconds_of_1000_tokens_read_{state}": float(f"{read:.3g}")}
            attrs |= {f"seconds_of_1000_tokens_written_{state}": float(f"{written:.3g}")}
        coords = {"state": ["before", *CHANGES], "changed": list(CHANGES), "task": list(self.plan.tasks)}
        return Found(values, coords=coords | {"group": self.plan.groups}, attrs=attrs)

    def _both(self, name: str, parts: Sequence[str], *, several: bool = False) -> dict[str, Any]:
        """A score by state, and its change, of one part or of several."""
        before, by_part, share = self.each["before"], list[tuple[Tensor, Tensor]](), name == "accuracy"
        for part in parts:
            own = [_ends_of(self.each.get(s, {}).get(part), share=share) for s in ("before", *CHANGES)]
            less = [
                _ends_of(None if s not in self.each else self.each[s][part] - before[part], difference=share)
                for s in CHANGES
            ]
            by_part.append((torch.stack(own), torch.stack(less)))
        if not by_part:
            return {}
        scores, changes = (torch.stack([one[i] for one in by_part], 1) for i in (0, 1))  # [state, part, 3]
        scores, changes = (x if several else x[:, 0] for x in (scores, changes))
        return _columns(name, scores) | _columns(f"{name}_change", changes)

    def _by_group(self) -> dict[str, Any]:
        """The loss of each group, and its change."""
        for one in self.each.values():
            for i, group in enumerate(self.plan.groups):
                one[f"group/{group}"] = one["loss"][self.plan.group == i]
        return self._both("group_loss", [f"group/{group}" for group in self.plan.groups], several=True)


def _ends_of(each: Tensor | None, *, share: bool = False, difference: bool = False) -> Float[Tensor, " 3"]:
    """Mean over examples with its ends, NaN where nothing is known: of successes, or of what two ways differ by."""
    if each is None or not len(each):
        return torch.full((3,), torch.nan, dtype=torch.float64)
    if share or difference:
        gained, lost, n = int((each > 0).sum()), int((each < 0).sum()), len(each)
        ends = share_difference_interval(gained, lost, n) if difference else share_interval(gained, n)
        return torch.tensor([float(each.mean()), *ends], dtype=torch.float64)
    return torch.stack([x.reshape(()) for x in mean_interval(each.double())])


def _columns(name: str, found: Float[Tensor, "*of 3"]) -> dict[str, Any]:
    """Mean and ends of an interval as columns."""
    return {f"{name}{end}": found[..., i] for i, end in enumerate(("", "_lo", "_hi"))}
