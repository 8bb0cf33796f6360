"""One clean and one corrupt prompt: how a question takes them, and how scores keep them to be verified by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from microtome.errors import DataError, PromptError, error
from microtome.explain._answers import Answer
from microtome.explain._pairs import Pairs, pairs_of
from microtome.method import Argument
from microtome.metric import Metric
from microtome.model import Model
from microtome.run import Prompt, Run, prompt_from_text

if TYPE_CHECKING:
    import xarray as xr

CleanPrompt = Annotated[Prompt, Argument("the prompt with the answer", positional=True, from_text=prompt_from_text)]
CorruptPrompt = Annotated[
    Prompt, Argument("a prompt of as many tokens with another answer", positional=True, from_text=prompt_from_text)
]
CorruptOrRun = Annotated[
    Prompt | Run,
    Argument("a prompt of as many tokens with another answer, or its run", positional=True, from_text=prompt_from_text),
]


def one_pair(
    model: Model,
    clean: Prompt,
    corrupt: Prompt,
    *,
    answer: Answer | None,
    foil: Answer | None,
    metric: Metric | None = None,
) -> Pairs:
    """The pair that is meant, alone.

    Raises:
        PromptError: there are several, or what `pairs_of` refuses.
    """
    pairs = pairs_of(model, clean, corrupt, answer=answer, foil=foil, metric=metric)
    if len(pairs) != 1:
        what = "this takes one clean and one corrupt prompt"
        raise error(PromptError, what, got=f"{len(pairs)} of each", do="ask about each pair by itself")
    return pairs


def record(pair: Pairs, direction: str) -> dict[str, Any]:
    """What a result must say of its pair to be verified later."""
    clean, corrupt = pair.tokens[0].tolist()
    ids = {name: own[0] for name, own in (("answer_id", pair.answer_ids), ("foil_id", pair.foil_ids)) if own}
    return pair.attrs() | {"clean_ids": clean, "corrupt_ids": corrupt, "direction": direction} | ids


def recorded(model: Model, scores: xr.Dataset) -> tuple[Pairs, str]:
    """The pair that scores are about, and their direction.

    Raises:
        DataError: the scores are of another model, or of no pair.
    """
    attrs = scores.attrs
    missing = [k for k in ("fingerprint", "clean_ids", "corrupt_ids", "direction", "answer_id") if k not in attrs]
    if missing:
        got, do = f"a dataset without {', '.join(missing)}", "pass what `attribute` returned"
        raise error(DataError, "these are not scores that can be verified", got=got, do=do)
    if attrs["fingerprint"] != model.fingerprint:
        raise error(
            DataError, "these scores come from another model",
            got=f"{attrs.get('model')} ({attrs['fingerprint']})",
            allowed=f"{model.anatomy.name} ({model.fingerprint})", do="open that model, or attribute again",
        )  # fmt: skip
    rows = [[int(i) for i in attrs[key]] for key in ("clean_ids", "corrupt_ids")]
    foil = attrs.get("foil_id")
    ids = {"answer": int(attrs["answer_id"]), "foil": None if foil is None else int(foil)}
    return one_pair(model, *rows, **ids), str(attrs["direction"])
