"""Every method of Microtome on one open model: it runs, is refused by name, or fails in any other way."""

from typing import Any

import torch
from family_checks import ANSWER, FOIL, first_line, place
from family_configs import VOCAB, prompt

import microtome as mt
from microtome.method import Change, Measure, Question, RepeatedTokens, Text, declared
from microtome.method.runner import measure

CLEAN = prompt(1, 12, seed=1)[0].tolist()
CORRUPT = [*CLEAN[:4], 7, *CLEAN[5:]]
GIVEN: dict[str, Any] = {
    "prompt": CLEAN, "clean": CLEAN, "corrupt": CORRUPT, "prompts": [CLEAN, CORRUPT, CLEAN[::-1]], "answer": ANSWER,
    "foil": FOIL, "subject": (4, 6), "keys": (4, 6), "samples": 2, "controls": 4, "top": 3, "verify": 2,
    "tokens": 60, "pairs": 2,
    "data": [{"text": [7 + 5 * i, 20 + i, 33, 41 + i % 5, 52 + 3 * i % 7], "label": "ab"[i % 2]} for i in range(12)],
    "folds": 3,
}  # fmt: skip
"""Arguments by name; a new method is tried with these and its own defaults."""
OTHERS = ("circuit_recovery", "node_recovery")  # of planted models


class Reader:
    """A tokenizer without text: every seventh token is a mark, all others are words."""

    bos_token_id, eos_token_id, all_special_ids = None, None, ()

    def decode(self, ids: list[int], **_: object) -> str:
        return "," if ids[0] % 7 == 0 else f" w{ids[0]}"


def outcome(model: mt.Model, name: str) -> tuple[str, str]:
    """What becomes of one method: "runs", "refused" or "crashes", and the first line of why."""
    try:
        _run(model, name)
    except mt.errors.MicrotomeError as problem:
        return "refused", first_line(problem)
    except Exception as problem:  # noqa: BLE001 - every other exception is what we look for
        return "crashes", f"{first_line(problem)} ({place(problem)})"
    return "runs", ""


def _run(model: mt.Model, name: str) -> Any:
    made: Any = declared(name)
    parameters = (*made.parameters, *made.look_parameters) if isinstance(made, Measure) else made.parameters
    own = {p.name: GIVEN[p.name] for p in parameters if p.name in GIVEN}
    text = torch.randint(5, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
    if isinstance(made, Measure):
        options = {k: v for k, v in own.items() if k in ("top",)}
        if isinstance(made.on, RepeatedTokens):
            return measure(model, name, sequences=8, period=12)
        given: Any = {"one": text, "two": text.flip(0, 1)} if made.compares else text
        return measure(model, name, **({"text": given} if isinstance(made.on, Text) else {}), **options)
    if isinstance(made, Question):
        if "scores" in {p.name for p in parameters}:
            scores = mt.explain.attribute(model, CLEAN, CORRUPT, answer=ANSWER, foil=FOIL, verify=0)
            own = {"scores": scores, "top": 3}
        return made.ask(model, own)
    assert isinstance(made, Change)
    return made.make(model, own | {"sites": "1.mlp_out", "text": text})


def outcomes(model: mt.Model) -> dict[str, tuple[str, str]]:
    """What becomes of each method, by name."""
    return {name: outcome(model, name) for name in mt.methods() if name not in OTHERS}
