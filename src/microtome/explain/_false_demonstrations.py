"""What false demonstrations do, layer by layer: where the answers part, and which heads bring the false labels.

Formula:  prompts of `shots` labelled demonstrations and a question, once with true labels and once with every label
          replaced by another, the same in the whole prompt (class c by the next one);
          s_l(c) = log-probability of the label of class c by the logit lens of layer l, minus its mean over prompts
          (calibrated: no label is preferred for itself); accuracy: share of prompts whose true class has the largest;
          the layers part from the first one on from which the interval of true minus false stays above 0.
          score_h = attention from the last token to the labels of demonstrations of the question's class, minus that
          to as many others: of false demonstrations, the false labels that the question would inherit.
          The heads of the largest score are switched off; control: random heads of the same layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.context import current
from microtome.edit import Edit, Zero
from microtome.errors import ArgumentError, DataError, error
from microtome.explain._shots import Piece, cut, pairs_in
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.stream import mean_interval

LAYER = ("layer",)


@question(
    "false_demonstrations",
    title="false demonstrations",
    question="From which layer on do false demonstrations mislead the model, and which heads bring their labels?",
    columns=(
        Column("true_accuracy", "share", "calibrated accuracy of the logit lens behind true demonstrations",
               "false_accuracy", (0, 1), LAYER, title="accuracy behind true and false demonstrations"),
        Column("false_accuracy", "share", "the same behind false demonstrations", range=(0, 1), dims=LAYER),
        Column("score", "share", "attention to the labels of the question's class, behind false demonstrations",
               "other_score", (0, 1), ("layer", "head"), title="false induction"),
        Column("other_score", "share", "the same to the labels of other classes, each counting as often", range=(0, 1),
               dims=("layer", "head")),
        Column("gap", "share", "accuracy behind true minus behind false demonstrations, of the whole model",
               "none: the start", (-1, 1), ()),
        Column("gap_without", "share", "the same without the heads of the largest score", "gap_random", (-1, 1), ()),
        Column("gap_random", "share", "the same without as many random heads of the same layers", range=(-1, 1),
               dims=()),
    ),
    source=Source(
        "Halawi et al.", "Overthinking the Truth: Understanding how Language Models Process False Demonstrations", 2023,
        "2307.09476", departs="calibrated by the mean log-probability of each label over prompts; the layer is told by "
        "an interval; random heads are of the same layers",
    ),
    cost="2 tests few-shot forwards with their patterns, and 2 (1 + controls) tests more",
    check="tests/laws/test_false_demonstrations.py",
    call='mt.explain.false_demonstrations(model, "sentiment.json")',
    reading="true_accuracy beside false_accuracy, layer by layer: where they part, the model has read the false "
    "labels; score says which heads look at them.",
    needs=("next token", "lens", "*.attn.pattern", "*.attn.z"),
)  # fmt: skip
def false_demonstrations(
    model: Model,
    task: Annotated[
        Sequence[tuple[Piece, Piece]] | str,
        Argument("pairs of input and label, texts or token ids, or a JSON file of pairs of texts", positional=True),
    ],
    *,
    shots: Annotated[int, Argument("demonstrations of a prompt", "demonstrations", least=1)] = 8,
    tests: Annotated[int, Argument("questions", "questions", least=2)] = 40,
    heads: Annotated[int, Argument("how many heads are switched off", "heads", least=1)] = 5,
    controls: Annotated[int, Argument("sets of random heads", "sets", least=1)] = 3,
    template: Annotated[
        str, Argument('how a pair of texts is written; a prompt ends where "{output}" begins')
    ] = "{input}\nLabel: {output}\n\n",
) -> Found:
    """Compare true with false demonstrations at every layer, and switch off the heads that look at false labels.

    Raises:
        DataError: the file cannot be read, has too few pairs, or labels of one class.
        ArgumentError: the template does not hold {input} and {output}; two labels begin with one token.
    """  # fmt: skip
    deck = _Labelled.of(model, task, template, shots, tests)
    asked = {kind: [deck.prompt(i, false=kind == "false") for i in range(tests)] for kind in ("true", "false")}
    own = torch.tensor([deck.of_class(i) for i in range(tests)])
    read = {kind: _read(model, deck, prompts) for kind, prompts in asked.items()}
    right = {kind: calibrated_right(scores, own) for kind, (scores, _) in read.items()}
    attention = read["false"][1]
    score, other = attention[:, 0], attention[:, 1]  # [prompt, layer, head]
    n_heads, layers = model.anatomy.n_heads, model.anatomy.n_layers
    difference = (score - other).mean(0)
    best = [divmod(i, n_heads) for i in difference.flatten().argsort(descending=True)[:heads].tolist()]
    generator = torch.Generator().manual_seed(current().seed)

    def without(some: Sequence[tuple[int, int]]) -> Tensor:
        edits: list[Edit] = [Zero(f"{layer}.attn.z[{head}]") for layer, head in some]
        each = [
            calibrated_right(_read(model, deck, asked[kind], edits, last=True)[0], own)[:, -1]
            for kind in ("true", "false")
        ]
        return each[0] - each[1]

    randoms: list[Tensor] = []
    for _ in range(controls):
        drawn: list[tuple[int, int]] = []
        for layer, _ in best:
            free = [h for h in range(n_heads) if (layer, h) not in (*best, *drawn)] or list(range(n_heads))
            drawn.append((layer, free[int(torch.randint(len(free), (), generator=generator))]))
        randoms.append(without(drawn))
    gaps = {"gap": right["true"][:, -1] - right["false"][:, -1], "gap_without": without(best),
            "gap_random": torch.stack(randoms).mean(0)}  # fmt: skip
    each = {
        "true_accuracy": right["true"],
        "false_accuracy": right["false"],
        "score": score,
        "other_score": other,
    } | gaps
    above = mean_interval(right["true"] - right["false"])[1] > 0
    parts = [layer for layer in range(layers) if bool(above[layer:].all())]
    attrs = {"parts_at": parts[0] if parts else "nowhere", "heads": ", ".join(f"L{i}H{h}" for i, h in best),
             "classes": len(deck.ids), "tests": tests}  # fmt: skip
    return Found(each=each, coords={"layer": list(range(layers)), "head": list(range(n_heads))}, attrs=attrs)


@dataclass(frozen=True)
class _Prompt:
    """A prompt as tokens, and where the labels of its demonstrations are, by the true class of each."""

    tokens: Tensor
    labels: list[tuple[int, int]]
    own: int


@dataclass(frozen=True)
class _Labelled:
    """Labelled pairs in the order drawn, the questions first, and the first token of each label."""

    model: Model
    pairs: Sequence[tuple[Piece, Piece]]
    names: list[Any]
    ids: list[int]
    template: tuple[str, str, str]
    shots: int
    tests: int

    @classmethod
    def of(cls, model: Model, task: Any, template: str, shots: int, tests: int) -> _Labelled:
        """Read and shuffle them.

        Raises:
            DataError: the file cannot be read, has too few pairs, or labels of one class.
            ArgumentError: the template lacks something; two labels begin with one token.
        """
        parts, pairs = cut(template), pairs_in(task)
        if len(pairs) < tests + shots:
            do = "give more, or fewer tests and shots"
            raise error(DataError, "the task has too few pairs", got=len(pairs), allowed=f"{tests + shots}", do=do)
        names = sorted({_name(output) for _, output in pairs})
        if len(names) < 2:
            raise error(DataError, "the labels are of one class", got=repr(names[0]), do="give a task of two or more")
        ids = [_ids(model, name, parts[1])[0] for name in names]
        if len(set(ids)) < len(ids):
            do = "rename them, or give a template with another text before {output}"
            raise error(ArgumentError, "two labels begin with one token", got=", ".join(map(str, names)), do=do)
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(current().seed)).tolist()
        return cls(model, [pairs[i] for i in order], names, ids, parts, shots, tests)

    def of_class(self, number: int) -> int:
        """The class of a pair."""
        return self.names.index(_name(self.pairs[number][1]))

    def prompt(self, number: int, *, false: bool) -> _Prompt:
        """A question behind true or false demonstrations, which are drawn from the pairs that are no questions."""
        begins, gap, ends = self.template
        draw = torch.Generator().manual_seed(1_000_003 * current().seed + number)
        chosen = torch.randperm(len(self.pairs) - self.tests, generator=draw)[: self.shots].tolist()
        tokens: list[int] = []
        labels: list[tuple[int, int]] = []

        def write(piece: Piece, before: str = "", behind: str = "") -> None:
            text = before + piece + behind if isinstance(piece, str) else piece
            if isinstance(text, str) and not tokens:
                tokens.extend(self.model.to_batch(text).tokens[0].tolist())
            else:
                tokens.extend(_ids(self.model, text, ""))

        for i in (self.tests + n for n in chosen):
            given, output = self.pairs[i]
            own = self.of_class(i)
            write(begins.replace("{input}", given) if isinstance(given, str) else given)
            labels.append((len(tokens), own))
            said = self.names[(own + 1) % len(self.names)] if false else self.names[own]
            write(said, gap if isinstance(output, str) else "")
            write(ends if isinstance(output, str) else [])
        question_of = self.pairs[number][0]
        write(begins.replace("{input}", question_of) if isinstance(question_of, str) else question_of)
        return _Prompt(torch.tensor(tokens), labels, self.of_class(number))


def _name(output: Piece) -> Any:
    return output if isinstance(output, str) else tuple(output)


def _ids(model: Model, piece: Piece, gap: str) -> list[int]:
    return model.continuation(gap + piece) if isinstance(piece, str) else list(piece)


def _read(
    model: Model, deck: _Labelled, prompts: Sequence[_Prompt], edits: Sequence[Edit] = (), *, last: bool = False
) -> tuple[Float[Tensor, "prompt layer label"], Tensor]:
    """Log-probability of each label after each layer, or the last; attention [prompt, of own class or others, ...].

    Where a prompt has no demonstration of the own class, or none of another, the attention there is 0.
    """
    n = model.anatomy.n_layers
    names = [f"{n - 1}.resid_post@-1"] if last else ["*.resid_post@-1", "*.attn.pattern@-1"]
    scores: list[Tensor] = []
    attention: list[Tensor] = []
    with torch.no_grad():
        for prompt in prompts:
            run = model.run(prompt.tokens, names, edits)
            streams = [run[f"{i}.resid_post@-1"][0, 0] for i in range(n - 1 if last else 0, n)]
            scores.append(model.unembed(torch.stack(streams)).float().log_softmax(-1)[:, deck.ids].double().cpu())
            if last:
                continue
            pattern = torch.stack([run[f"{i}.attn.pattern@-1"][0, :, 0] for i in range(n)]).double().cpu()
            own = [at for at, of in prompt.labels if of == prompt.own]
            others = [at for at, of in prompt.labels if of != prompt.own]
            same = pattern[..., own].sum(-1)
            rest = pattern[..., others].mean(-1) * len(own) if others else torch.zeros_like(same)
            attention.append(torch.stack([same, rest]))
    return torch.stack(scores), torch.stack(attention) if attention else torch.empty(0)


def calibrated_right(scores: Float[Tensor, "prompt layer label"], own: Tensor) -> Float[Tensor, "prompt layer"]:
    """1 where the true class has the largest score, calibrated by the mean of each label over prompts."""
    return ((scores - scores.mean(0)).argmax(-1) == own.unsqueeze(1)).double()
