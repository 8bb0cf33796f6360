"""One clean and one corrupt prompt: how a question takes them, and how scores keep them to be verified by."""

from __future__ import annotations

from collections.abc import Iterable
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


def record(pairs: Pairs, direction: str) -> dict[str, Any]:
    """What a result must say of its pairs to be verified later; of several, one after the other, with their lengths."""
    sides = [[i for pair in pairs.tokens for i in pair[side].tolist()] for side in (0, 1)]
    one = len(pairs) == 1
    ids = {name: own[0] if one else list(own) for name, own in
           (("answer_id", pairs.answer_ids), ("foil_id", pairs.foil_ids)) if own}  # fmt: skip
    ids |= {} if one else {"lengths": pairs.lengths}
    return pairs.attrs() | {"clean_ids": sides[0], "corrupt_ids": sides[1], "direction": direction} | ids


def recorded(model: Model, scores: xr.Dataset) -> tuple[Pairs, str]:
    """The pairs that scores are about, and their direction.

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
    sides = [[int(i) for i in attrs[key]] for key in ("clean_ids", "corrupt_ids")]
    lengths = [int(n) for n in attrs.get("lengths", [len(sides[0])])]
    firsts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows = [[side[first : first + n] for first, n in zip(firsts, lengths, strict=True)] for side in sides]
    ids = {name: _listed(attrs.get(f"{name}_id")) for name in ("answer", "foil")}
    return pairs_of(model, *rows, **ids), str(attrs["direction"])


def _listed(ids: Any) -> list[int] | None:
    return None if ids is None else [int(i) for i in (ids if isinstance(ids, Iterable) else [ids])]
