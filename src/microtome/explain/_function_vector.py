"""Task activations: what a few demonstrations put into the stream, and whether it does the task without them.

Formula:  z_lh = mean over few-shot prompts of a head's mix of values at the last token; its effect is the mean, over
          the same questions behind demonstrations with answers of other pairs, of p(answer) with the mean of the other
          questions (all but its own) in the head's place at the last token minus p(answer) without, exactly, for every
          head. The function vector is v = sum over the `heads` best
          of z_lh W_O_h; it is added to the stream after a layer at the last token of a prompt without demonstrations.
          The task's state beside it: the mean over few-shot prompts of the stream after a layer, put in its place.
          Accuracy: share of held-out inputs of which the first token of the answer is the model's first choice.
          Control: as many random heads, of those that are not among the best, `controls` times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.context import current
from microtome.edit import Add, Set, SiteEdit
from microtome.errors import ArgumentError, error
from microtome.explain._shots import Deck, Piece
from microtome.method import Argument, Column, Found, Source, question, run_sweep
from microtome.metric import Probability, Rank
from microtome.model import Model
from microtome.stream import mean_interval, sign_flip

LAYER = ("layer",)
Behind = Annotated[
    Literal["shuffled", "nothing"],
    Argument("what effects are measured behind: demonstrations with answers of other pairs, or none at all"),
]
CHOICE = 24
"""Inputs, none of those that are tested, on which the layer is chosen."""


@question(
    "function_vector",
    command="icl",
    title="function vector",
    question="Which heads carry a task from its demonstrations, and does what they write do the task without them?",
    columns=(
        Column("effect", "probability", "rise of the answer's probability, behind shuffled demonstrations, with the "
               "head's mean over true ones in its place", "none: 0 is no effect; see the random heads", (-1, 1),
               ("layer", "head"), test=True, title="effect of each head"),
        Column("accuracy", "share", "accuracy without demonstrations with the vector added after this layer",
               "random_accuracy", (0, 1), LAYER, title="accuracy by layer"),
        Column("random_accuracy", "share", "the same with the vector of random heads", range=(0, 1), dims=LAYER),
        Column("state_accuracy", "share", "the same with the mean state of few-shot prompts in place of the stream",
               "random_accuracy", (0, 1), LAYER, title="accuracy of the task's state by layer"),
        Column("with_vector", "share", "accuracy with the vector at the layer chosen on other inputs", "with_random",
               (0, 1), ()),
        Column("with_random", "share", "the same with random heads", range=(0, 1), dims=()),
        Column("with_state", "share", "accuracy with the task's state at the layer chosen on other inputs",
               "with_random", (0, 1), ()),
        Column("zero_shot", "share", "accuracy without demonstrations", "none: the start", (0, 1), ()),
        Column("few_shot", "share", "accuracy behind demonstrations", "shuffled_shot", (0, 1), ()),
        Column("shuffled_shot", "share", "accuracy behind demonstrations with answers of other pairs",
               range=(0, 1), dims=()),
        Column("vector", "1", "the function vector", "none: a vector", dims=("d_model",), drawn=False),
    ),
    source=(
        Source("Todd et al.", "Function Vectors in Large Language Models", 2023, "2310.15213",
               departs="the best heads are those of this task alone; the layer is chosen on other inputs"),
        Source("Hendel et al.", "In-Context Learning Creates Task Vectors", 2023, "2310.15916",
               departs="the mean state over prompts in place of that of one prompt"),
    ),
    cost="(samples + 2 tests) few-shot forwards; a sweep of H L samples cells, and one of about (2 + controls) L "
    "tests, each cell one token",
    check="tests/laws/test_function_vector.py",
    call='mt.explain.function_vector(model, "country-capital.json")',
    reading="effect is measured exactly for every head; with_vector beside with_random is what adding the vector of "
    "the best heads, or of random ones, does to held-out inputs without any demonstration.",
    needs=("next token", "*.attn.z", "*.resid_post", "W_O"),
)  # fmt: skip
def function_vector(
    model: Model,
    task: Annotated[
        Sequence[tuple[Piece, Piece]] | str,
        Argument("pairs of input and output, texts or token ids, or a JSON file of pairs of texts", positional=True),
    ],
    *,
    shots: Annotated[int, Argument("demonstrations of a prompt", "demonstrations", least=1)] = 8,
    heads: Annotated[int, Argument("how many of the best heads make the vector", "heads", least=1)] = 10,
    samples: Annotated[int, Argument("few-shot prompts that means and effects are taken of", "prompts", least=2)] = 16,
    tests: Annotated[int, Argument("held-out inputs", "inputs", least=2)] = 48,
    controls: Annotated[int, Argument("sets of random heads", "sets", least=1)] = 3,
    behind: Behind = "shuffled",
    template: Annotated[
        str, Argument('how a pair of texts is written; a prompt ends where "{output}" begins')
    ] = "Q: {input}\nA: {output}\n\n",
) -> Found:
    """Find the heads that carry a task, and add what they write to prompts without demonstrations.

    `vector` is an edit: ``Add(f"{layer}.resid_post@-1", vector)``, with the `layer` of the attributes.

    Raises:
        DataError: the file cannot be read, or has too few pairs.
        ArgumentError: the template does not hold {input} and {output}, or there are fewer heads than are asked for.
        SiteError: the model has no heads.
    """  # fmt: skip
    deck = Deck.of(model, task, template, shots, samples + tests + CHOICE)
    a = model.anatomy
    if 2 * heads > a.n_layers * a.n_heads:
        what, allowed = "too many heads to draw as many others", f"{a.n_layers * a.n_heads // 2} or fewer"
        raise error(ArgumentError, what, got=heads, allowed=allowed, do="choose fewer")
    sampled = range(samples)
    chosen_on, tested = range(samples, samples + CHOICE), range(samples + CHOICE, samples + CHOICE + tests)
    runs = [model.run(deck.prompt(i), ["*.attn.z@-1", "*.resid_post@-1"], logits=False) for i in sampled]
    every = torch.stack([run["*.attn.z@-1"][:, 0, 0] for run in runs])  # [prompt, layer, head, d_head]
    z = every.mean(0)
    state = torch.stack([run["*.resid_post@-1"][:, 0, 0] for run in runs]).mean(0)  # [layer, d_model]
    effects = effects_of_heads(
        model, deck, list(sampled), (samples * z - every) / (samples - 1), shots=behind == "shuffled"
    )
    order = effects.mean(0).flatten().argsort(descending=True).tolist()
    best, others = order[:heads], order[heads:]
    generator = torch.Generator().manual_seed(current().seed)
    drawn = [torch.randperm(len(others), generator=generator)[:heads].tolist() for _ in range(controls)]
    vector, *randoms = (
        written_by(model, z, some) for some in (best, *([others[i] for i in set_of] for set_of in drawn))
    )
    layers = range(a.n_layers)

    def adding(v: Tensor) -> list[SiteEdit]:
        return [Add(f"{i}.resid_post@-1", v) for i in layers]

    edits = [*adding(vector), *(Set(f"{i}.resid_post@-1", state[i]) for i in layers)]
    trial, found = (_right(model, deck, inputs, edits) for inputs in (chosen_on, tested))
    layer, of_layer = (int(part.mean(1).argmax()) for part in trial[1:].split(a.n_layers))
    plain, accuracy, of_state = found[0], *found[1:].split(a.n_layers)
    random = torch.stack([_right(model, deck, tested, adding(v))[1:] for v in randoms]).mean(0)
    shot, shuffled = (
        _right(model, deck, tested, [], prompts=[deck.prompt(i, shuffled=s) for i in tested])[0] for s in (False, True)
    )
    each = {
        "accuracy": accuracy.T, "random_accuracy": random.T, "state_accuracy": of_state.T, "zero_shot": plain,
        "with_vector": accuracy[layer], "with_state": of_state[of_layer], "with_random": random[layer],
        "few_shot": shot, "shuffled_shot": shuffled,
    }  # fmt: skip
    values = _summary(effects) | {"vector": vector.double()}
    named = ", ".join(f"L{i // a.n_heads}H{i % a.n_heads}" for i in best)
    attrs = {"layer": layer, "state_layer": of_layer, "best_heads": named, "inputs": len(tested), "behind": behind}
    return Found(values, each=each, coords={"layer": list(layers), "head": list(range(a.n_heads))}, attrs=attrs)


def _summary(effects: Float[Tensor, "item layer head"]) -> dict[str, Tensor]:
    """Mean, interval and p-value over prompts, which are other examples than those of the accuracies."""
    mean, low, high = mean_interval(effects)
    return {"effect": mean, "effect_lo": low, "effect_hi": high, "effect_p": sign_flip(effects, seed=current().seed)}


def effects_of_heads(
    model: Model, deck: Deck, items: Sequence[int], z: Float[Tensor, "item layer head d_head"], *, shots: bool
) -> Tensor:
    """[item, layer, head] rise of the answer's probability with a head's mean over others in its place."""
    prompts = [deck.prompt(i, shots=shots, shuffled=True) for i in items]
    layers, heads = z.shape[1:3]
    places = [(i, h) for i in range(layers) for h in range(heads)]
    cells = [Set(f"{i}.attn.z[{h}]@-1", own[i, h]) for own in z for i, h in places]
    numbers = [n for n in range(len(prompts)) for _ in places]
    metric = Probability([deck.answer(i) for i in items])
    swept = run_sweep(model, prompts, cells, metric, prompts=numbers, stage="effects of heads")
    return swept.whole().effects.double().reshape(len(prompts), layers, heads)


@torch.no_grad()
def written_by(model: Model, z: Float[Tensor, "layer head d_head"], chosen: Sequence[int]) -> Float[Tensor, " d_model"]:
    """What some heads, numbered through all layers, write of these means together."""
    heads = z.shape[1]
    writes = [z[i // heads, i % heads] @ model.layers[i // heads].W_O[i % heads] for i in chosen]
    return torch.stack(writes).sum(0)


def _right(
    model: Model, deck: Deck, items: Sequence[int], edits: Sequence[SiteEdit], prompts: Sequence[Any] | None = None
) -> Float[Tensor, "edit item"]:
    """1 where the answer is the first choice: without an edit, then with each; of prompts without demonstrations."""
    asked = [deck.prompt(i, shots=False) for i in items] if prompts is None else list(prompts)
    answers = [deck.answer(i) for i in items]
    if not edits:
        logits = [model.run(prompt).logits[0, -1] for prompt in asked]
        first = [float(x[a] >= x.max()) for x, a in zip(logits, answers, strict=True)]  # as `Rank`, which takes ties
        return torch.tensor(first, dtype=torch.float64).unsqueeze(0)
    numbers = [n for n in range(len(asked)) for _ in edits]
    swept = run_sweep(model, asked, list(edits) * len(asked), Rank(answers), prompts=numbers, stage="adding vectors")
    ranks = swept.whole()
    with_edits = ranks.values.reshape(len(asked), len(edits)).T
    return torch.cat([ranks.base.unsqueeze(0), with_edits]).eq(0).double().cpu()
