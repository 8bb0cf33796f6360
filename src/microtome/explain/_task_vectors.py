"""Published recipes for putting a task into a prompt without demonstrations, side by side.

Formula:  of few-shot prompts, at the last token: s_l the mean stream after layer l, b_l that without demonstrations,
          z_lh the mean mix of values of a head; v the sum over the `heads` best heads of z_lh W_O_h. At the last token
          of a prompt without demonstrations:
              heads            v is added after a layer;
              heads scaled     c v is added after a layer, c = 2, 4, 8;
              heads in place   z_lh is put in the place of each best head's own, of all of them at once;
              state            s_l is put in the place of the stream after a layer;
              difference       c (s_l - b_l) is added after a layer, c = 1, 2;
              every layer      c (s_l - b_l) is added after every layer, c = 0.05, 0.1, 0.2.
          Layer and c are those of the largest mean log p(answer) on other inputs than those that are tested.
          The heads scaled and the difference added after one layer are of neither paper; every layer differs from the
          one that it is named after, see the sources.
          Control, with the layer and c that were chosen for the recipe itself: of the three of heads, one set of as
          many random heads; of the others, demonstrations with answers of other pairs. So the recipe has a choice that
          its control has not: compare gains of several nats, not accuracies of an input or two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.context import current
from microtome.edit import Add, Set, SiteEdit
from microtome.errors import ArgumentError, error
from microtome.explain._function_vector import Behind, effects_of_heads, written_by
from microtome.explain._shots import Deck, Piece
from microtome.method import Argument, Column, Found, Source, question, run_sweep
from microtome.metric import FunctionMetric
from microtome.model import Model

RECIPE = ("recipe",)
OF_HEADS = ("heads", "heads scaled", "heads in place")
RECIPES = (*OF_HEADS, "state", "difference", "every layer")
CHOOSE, ROWS = 12, 8
"""Inputs, none of those that are tested, on which layer and scale are chosen; and prompts of one batch."""
Candidate = tuple[str, list[SiteEdit]]
"""A setting in words, and its edits."""


@question(
    "task_vectors",
    command="task-vectors",
    title="task vectors by recipe",
    question="Which of the published recipes makes the model do a task without demonstrations?",
    columns=(
        Column("accuracy", "share", "accuracy without demonstrations with the recipe", "control_accuracy", (0, 1),
               RECIPE, title="accuracy by recipe"),
        Column("control_accuracy", "share", "the same of random heads, or of demonstrations with answers of "
               "other pairs", range=(0, 1), dims=RECIPE),
        Column("gain", "nats", "rise of the answer's log-probability with the recipe", "control_gain", dims=RECIPE,
               test=True, title="gain by recipe"),
        Column("control_gain", "nats", "the same of random heads, or of demonstrations with answers of other pairs",
               dims=RECIPE),
        Column("zero_shot", "share", "accuracy without demonstrations", "none: the start", (0, 1), ()),
        Column("few_shot", "share", "accuracy behind demonstrations", "shuffled_shot", (0, 1), ()),
        Column("shuffled_shot", "share", "accuracy behind demonstrations with answers of other pairs",
               range=(0, 1), dims=()),
    ),
    source=(
        Source("Todd et al.", "Function Vectors in Large Language Models", 2023, "2310.15213",
               departs="the best heads are those of this task alone; layer and scale are chosen on other inputs; heads "
               "scaled are ours"),
        Source("Hendel et al.", "In-Context Learning Creates Task Vectors", 2023, "2310.15916",
               departs="the mean state over prompts in place of that of one prompt; the difference is ours"),
        Source("Liu et al.", "In-context Vectors: Making In Context Learning More Effective and Controllable Through "
               "Latent Space Steering", 2023, "2311.06668",
               departs="the mean stream at the end of prompts with demonstrations minus that without, in place of the "
               "first principal component of h(output) - h(input) over the demonstrations; added at the last token "
               "alone, in place of all; norms are not put back"),
    ),
    cost="about (4 samples + 4 tests) few-shot forwards, a sweep of H L samples cells, one of 7 L choice cells, and "
    "batches of tests inputs for each recipe",
    check="tests/laws/test_task_vectors.py",
    call='mt.explain.task_vectors(model, "country-capital.json")',
    reading="accuracy beside zero_shot, few_shot and control_accuracy: what a recipe adds without any demonstration.",
    needs=("next token", "*.attn.z", "*.resid_post", "W_O"),
)  # fmt: skip
def task_vectors(
    model: Model,
    task: Annotated[
        Sequence[tuple[Piece, Piece]] | str,
        Argument("pairs of input and output, texts or token ids, or a JSON file of pairs of texts", positional=True),
    ],
    *,
    shots: Annotated[int, Argument("demonstrations of a prompt", "demonstrations", least=1)] = 8,
    heads: Annotated[int, Argument("how many of the best heads are used", "heads", least=1)] = 10,
    samples: Annotated[int, Argument("few-shot prompts that means and effects are taken of", "prompts", least=2)] = 12,
    tests: Annotated[int, Argument("held-out inputs", "inputs", least=2)] = 32,
    behind: Behind = "shuffled",
    template: Annotated[
        str, Argument('how a pair of texts is written; a prompt ends where "{output}" begins')
    ] = "Q: {input}\nA: {output}\n\n",
) -> Found:
    """Try every recipe on the same held-out inputs.

    Raises:
        DataError: the file cannot be read, or has too few pairs.
        ArgumentError: the template does not hold {input} and {output}, or there are fewer heads than are asked for.
        SiteError: the model has no heads.
    """
    deck, a = Deck.of(model, task, template, shots, samples + tests + CHOOSE), model.anatomy
    if 2 * heads > a.n_layers * a.n_heads:
        what, allowed = "too many heads to draw as many others", f"{a.n_layers * a.n_heads // 2} or fewer"
        raise error(ArgumentError, what, got=heads, allowed=allowed, do="choose fewer")
    choose, held = range(samples, samples + CHOOSE), range(samples + CHOOSE, samples + CHOOSE + tests)
    z, state, wrong, base = _means(model, deck, samples)
    effects = effects_of_heads(model, deck, list(range(samples)), z, shots=behind == "shuffled").mean(0)
    best = effects.flatten().argsort(descending=True).tolist()
    mean = z.mean(0)
    generator = torch.Generator().manual_seed(current().seed)
    drawn = [best[heads:][i] for i in torch.randperm(len(best) - heads, generator=generator)[:heads].tolist()]
    made = _recipes(model, mean, best[:heads], state - base, state)
    control = _recipes(model, mean, drawn, wrong - base, wrong)
    plain = _read(model, deck, held, [])
    each: dict[str, list[Tensor]] = {name: [] for name in ("accuracy", "control_accuracy", "gain", "control_gain")}
    chosen: dict[str, str] = {}
    for name in RECIPES:
        at = _best(model, deck, choose, made[name])
        chosen[name] = made[name][at][0]
        for kind, recipe in (("", made[name][at]), ("control_", control[name][at])):
            hit, log_p = _read(model, deck, held, recipe[1])
            each[f"{kind}accuracy"].append(hit)
            each[f"{kind}gain"].append(log_p - plain[1])
    found = {name: torch.stack(several, dim=1) for name, several in each.items()} | {"zero_shot": plain[0]}
    for name, mixed in (("few_shot", False), ("shuffled_shot", True)):
        found[name] = _read(model, deck, held, [], lambda i, mixed=mixed: deck.prompt(i, shuffled=mixed))[0]
    named = ", ".join(f"L{i // a.n_heads}H{i % a.n_heads}" for i in best[:heads])
    attrs = {"best_heads": named, "inputs": tests} | {f"setting_{k}".replace(" ", "_"): x for k, x in chosen.items()}
    return Found(each=found, coords={"recipe": list(RECIPES)}, attrs=attrs)


def _means(
    model: Model, deck: Deck, samples: int
) -> tuple[Float[Tensor, "item layer head d_head"], Tensor, Tensor, Tensor]:
    """Of each few-shot prompt, the mean mix of values over the others.

    And the mean stream of all [layer, d_model], that behind answers of other pairs, and that without demonstrations.
    """
    kinds: dict[str, Callable[[int], Any]] = {
        "shots": deck.prompt, "shuffled": lambda i: deck.prompt(i, shuffled=True),
        "none": lambda i: deck.prompt(i, shots=False),
    }  # fmt: skip
    streams: dict[str, Tensor] = {}
    mixes: list[Tensor] = []
    for kind, prompt in kinds.items():
        runs = [model.run(prompt(i), ["*.attn.z@-1", "*.resid_post@-1"], logits=False) for i in range(samples)]
        streams[kind] = torch.stack([run["*.resid_post@-1"][:, 0, 0] for run in runs]).mean(0)
        if kind == "shots":
            mixes = [run["*.attn.z@-1"][:, 0, 0] for run in runs]
    every = torch.stack(mixes)
    others = (every.sum(0) - every) / (samples - 1)
    return others, streams["shots"], streams["shuffled"], streams["none"]


def _recipes(
    model: Model, z: Float[Tensor, "layer head d_head"], some: Sequence[int], change: Tensor, state: Tensor
) -> Mapping[str, list[Candidate]]:
    """By recipe, its settings: some heads by number, the change of the stream [layer, d_model], and the stream."""
    v, layers, heads = written_by(model, z, some), range(len(z)), z.shape[1]

    def after(i: int, x: Tensor) -> list[SiteEdit]:
        return [Add(f"{i}.resid_post@-1", x)]

    return {
        "heads": [(f"layer {i}", after(i, v)) for i in layers],
        "heads scaled": [(f"layer {i}, {c} times", after(i, c * v)) for c in (2, 4, 8) for i in layers],
        "heads in place": [
            ("at once", [Set(f"{n // heads}.attn.z[{n % heads}]@-1", z[n // heads, n % heads]) for n in some])
        ],
        "state": [(f"layer {i}", [Set(f"{i}.resid_post@-1", state[i])]) for i in layers],
        "difference": [(f"layer {i}, {c} times", after(i, c * change[i])) for c in (1, 2) for i in layers],
        "every layer": [
            (f"{c} times", [edit for i in layers for edit in after(i, c * change[i])]) for c in (0.05, 0.1, 0.2)
        ],
    }


def _best(model: Model, deck: Deck, items: Sequence[int], candidates: Sequence[Candidate]) -> int:
    """The number of the setting with the largest mean log-probability of the answer."""
    if len(candidates) == 1:
        return 0
    if any(len(edits) > 1 for _, edits in candidates):
        return max(range(len(candidates)), key=lambda k: float(_read(model, deck, items, candidates[k][1])[1].mean()))
    answers = torch.tensor([deck.answer(i) for i in items])

    def read(logits: Float[Tensor, "row 1 vocab"], prompts: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        log_p = logits[:, 0].float().log_softmax(-1)
        return log_p.gather(-1, answers.to(log_p.device)[prompts].unsqueeze(-1)).squeeze(-1)

    asked = [deck.prompt(i, shots=False) for i in items]
    cells = [edits[0] for _ in asked for _, edits in candidates]
    numbers = [n for n in range(len(asked)) for _ in candidates]
    swept = run_sweep(model, asked, cells, FunctionMetric(read), prompts=numbers, stage="choosing layers").whole()
    return int(swept.values.double().reshape(len(asked), len(candidates)).mean(0).argmax())


def _read(
    model: Model,
    deck: Deck,
    items: Sequence[int],
    edits: Sequence[SiteEdit],
    prompt: Callable[[int], Any] | None = None,
) -> tuple[Float[Tensor, " item"], Float[Tensor, " item"]]:
    """Whether the answer is the first choice, and its log-probability: without demonstrations, or of other prompts."""
    asked = [deck.prompt(i, shots=False) if prompt is None else prompt(i) for i in items]
    rows: list[Tensor] = []
    for first in range(0, len(asked), ROWS):
        run = model.run(asked[first : first + ROWS], edits=edits)
        ends = [pads + length - 1 for pads, length in run.batch.spans]
        rows += list(run.logits[range(len(ends)), ends].double())
    answers = [deck.answer(i) for i in items]
    hit = torch.tensor([float(x[a] >= x.max()) for x, a in zip(rows, answers, strict=True)], dtype=torch.float64)
    log_p = torch.stack([x.log_softmax(-1)[a] for x, a in zip(rows, answers, strict=True)])
    return hit, log_p.cpu()
