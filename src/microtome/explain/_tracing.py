"""Causal tracing: which states, when restored in a run with a corrupted subject, restore the answer.

Formula:  corrupted run: embed[subject] + noise sigma n, n ~ N(0, 1), sigma the std of the subject's embeddings, drawn
          `samples` times; or the tokens of another prompt of the same length.
          effect(kind, l, p) = mean over samples of p(answer | state of l, p restored) - p(answer | corrupted), where
          resid restores resid_post of layer l at position p, and mlp, attn and mixer restore what that branch adds
          at p in those layers of the window max(0, l - w//2) .. min(L, l + ceil(w/2)) - 1 that have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Annotated

import torch

from microtome.anatomy import Site
from microtome.edit import Patch, SiteEdit
from microtome.errors import SiteError, error
from microtome.explain._answers import own_answer
from microtome.explain._corruption import embedding_std, first_difference, noised
from microtome.explain._pairs import aligned
from microtome.explain._spans import one_prompt, span_of, windows_of
from microtome.method import (
    AnswerToken,
    Argument,
    Column,
    Found,
    PromptText,
    Source,
    Span,
    question,
    run_sweep,
    span_from_text,
)
from microtome.metric import Probability
from microtome.model import Model
from microtome.run import Prompt, Run, prompt_from_text

SITES = {"resid": "resid_post", "mlp": "mlp_out", "attn": "attn_out", "mixer": "mixer_out"}
KINDS = tuple(SITES)
CONTROL = "none: 0 before the subject, where clean and corrupted states are equal"
AS_IS = "none: the baseline of the gains"


def _gain(kind: str, what: str) -> Column:
    return Column(kind, "probability", f"gain of the answer's probability when {what}", CONTROL, dims=("layer", "pos"))


@question(
    "causal_trace",
    command="trace",
    title="causal tracing",
    question="Where is a fact about a subject stored?",
    columns=(
        _gain("resid", "the stream after one layer is restored at one position"),
        _gain("mlp", "what the MLPs of a window of layers add at one position is restored"),
        _gain("attn", "what the attention of a window of layers adds at one position is restored"),
        _gain("mixer", "what other mixers than attention, in a window of layers, add at one position is restored"),
        Column("clean", "probability", "probability of the answer in the clean run", AS_IS, (0, 1), dims=()),
        Column("corrupt", "probability", "probability of the answer in the corrupted run", AS_IS, (0, 1), dims=()),
    ),
    source=(
        Source("Meng et al.", "Locating and Editing Factual Associations in GPT", 2022, "2202.05262", "section 2",
               departs="the noise is scaled to this subject's embeddings unless `subjects` are given"),
        Source("Zhang and Nanda", "Towards Best Practices of Activation Patching in Language Models: Metrics and "
               "Methods", 2023, "2309.16042", "symmetric token replacement, with `corrupt`"),
    ),
    cost="three forwards and a sweep of kinds x samples x L x (T - first) cells: one of layer l and position p costs "
    "(L - l)/L (T - p)/T of a forward, a branch from the first layer of its window on",
    check="tests/laws/test_tracing.py, tests/planted/test_causal.py",
    call='mt.explain.causal_trace(model, "The Colosseum is in the city of", subject="The Colosseum")',
    reading="Each cell restores one state of the clean run in the run with the corrupted subject, and shows by how "
    "much that raises the answer's probability. Branches are restored over `window` layers around the one named.",
)  # fmt: skip
def causal_trace(
    model: Model,
    prompt: PromptText,
    *,
    subject: Annotated[Span, Argument("the subject: its text in the prompt, or positions", from_text=span_from_text)],
    answer: AnswerToken = None,
    corrupt: Annotated[Prompt | None, Argument("prompt of another subject instead", from_text=prompt_from_text)] = None,
    window: Annotated[int, Argument("how many layers of a branch to restore at once", "layers", least=1)] = 10,
    noise: Annotated[float, Argument("size of the noise", "standard deviations of the embeddings", least=0)] = 3.0,
    samples: Annotated[int, Argument("how many draws of the noise to average over", "draws", least=1)] = 10,
    subjects: Annotated[Sequence[str], Argument("texts that set the noise's scale", command=False)] = (),
    kinds: Annotated[Sequence[str], Argument("what is restored, of what the model has", choices=KINDS)] = KINDS,
) -> Found:
    """Where a fact about a subject is stored: the states that restore the answer after the subject is corrupted.

    Where no layer of a window has a branch there is NaN.

    Raises:
        PromptError: the subject is not in the prompt, the answer is several tokens, or `corrupt` does not align.
        SiteError: no layer has a branch that is asked for.
    """
    kinds = _kinds(model, kinds)
    rows = [model.to_batch(prompt).tokens] if corrupt is None else list(aligned(model, prompt, corrupt).split(1))
    span = span_of(model, one_prompt(model, prompt), subject, "subject")
    token, attrs = own_answer(model, rows[0][0], answer)
    clean = model.run(rows[0], capture=[f"*.{SITES[kind]}" for kind in kinds])
    if corrupt is None:
        attrs["std"] = noise * embedding_std(model, clean.tokens, span, subjects)
        first, lost = span[0], noised(model, clean.tokens, span, attrs["std"], samples)
    else:
        attrs |= {"replaced": model.to_text(rows[1][0]), "noise": 0.0, "samples": 1}
        first, lost = first_difference(model, rows[0][0], rows[1][0], span), model.run(rows[1])
    first, n, length = first if model.anatomy.causal else 0, model.anatomy.n_layers, clean.tokens.shape[1]
    before = lost.logits[:, -1].float().softmax(-1)[:, token].double().cpu()
    one = {kind: _cells(model, clean, kind, window, range(first, length)) for kind in kinds}
    cells = [cell for own in one.values() for _ in before for cell in own.values()]
    which = [sample for own in one.values() for sample in range(len(before)) for _ in own]
    prompts, start = rows[-1].expand(len(before), -1), None if corrupt is not None else lost["0.resid_pre"]
    stage = "restoring states"
    swept = run_sweep(model, prompts, cells, Probability(token), prompts=which, start=start, stage=stage).whole()
    parts = swept.values.double().split([len(before) * len(own) for own in one.values()])
    effects = {kind: torch.full((len(before), n, length), torch.nan, dtype=torch.float64) for kind in kinds}
    for (kind, own), values in zip(one.items(), parts, strict=True):
        layers, places = (list(x) for x in zip(*own, strict=True))
        effects[kind][:, layers, :first] = 0.0
        effects[kind][:, layers, places] = values.reshape(len(before), -1) - before[:, None]
    inside = [span[0] <= p < span[1] for p in range(length)]
    return Found(
        {"clean": float(clean.logits[0, -1].float().softmax(-1)[token])},
        each={"corrupt": before} | effects,
        coords={"layer": list(range(n)), "token": ("pos", model.to_words(rows[0][0])), "subject": ("pos", inside)},
        attrs=attrs | {"metric": "probability of the answer"},
    )


def _kinds(model: Model, kinds: Sequence[str]) -> list[str]:
    """The kinds that are asked for; of all, those of which a model has the site in some layer.

    Raises:
        SiteError: no layer has the site of one that is asked for.
    """
    points = model.anatomy.hook_points
    there = {site.name for site in points}
    gone = next((SITES[kind] for kind in kinds if SITES[kind] not in there), None)
    if gone is not None and tuple(kinds) != KINDS:
        why = model.anatomy.missing.get(Site(gone, 0))
        raise error(SiteError, f"{model.anatomy.name} has {gone} in no layer", got=why, do="name other kinds")
    return [kind for kind in kinds if SITES[kind] in there]


def _cells(
    model: Model, clean: Run, kind: str, window: int, positions: Iterable[int]
) -> dict[tuple[int, int], SiteEdit]:
    """By layer and position: what is restored in a run that starts with the corruption.

    Nothing before a cell's layer and position is run again: up to there its run is the corrupted one.
    """
    layers = windows_of(model, SITES[kind], 1 if kind == "resid" else window)
    places = product(layers, positions)
    return {(i, p): Patch(f"{layers[i]}.{SITES[kind]}@{p}", source=clean) for i, p in places}
