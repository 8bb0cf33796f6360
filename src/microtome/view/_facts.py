"""What was run, in words: the attributes of a result as a reader is told them."""

from __future__ import annotations

from microtome.view._page_values import DIGITS

WORDS: dict[str, tuple[str, str]] = {
    "std": ("standard deviation of the noise", "{}"),
    "noise": ("size of the noise", "{} standard deviations of the embeddings"),
    "samples": ("draws of the noise", "{}"),
    "window": ("layers restored together", "{}"),
    "verify": ("cells of each site to be measured exactly", "{}"),
    "verified_top": ("strongest cells of each site measured exactly", "{}"),
    "answer_id": ("token id of the answer", "{}"),
    "foil_id": ("token id of the foil", "{}"),
    "pairs": ("pairs of prompts", "{}"),
    "rules": ("backward rules", "{}"),
    "dtype": ("type of the weights", "{}"),
    "weights": ("weights as used", "{}"),
    "seconds": ("time", "{} s"),
    "plan": ("cost as planned", "{}"),
}
"""By attribute, what it is called, and what its value counts."""

CHOICES: dict[str, tuple[str, dict[str, str]]] = {
    "known": ("is the answer the model's own", {"1": "yes", "0": "no"}),
    "direction": (
        "direction",
        {
            "denoise": "clean values are put into the corrupt run",
            "noise": "corrupt values are put into the clean run",
        },
    ),
}
"""By attribute, what each of its values means."""


def fact(name: str, value: object) -> tuple[str, str]:
    """An attribute of a result: what it is called and its value, in words where the name alone would not say it."""
    text = _text(value)
    if name in CHOICES and text in CHOICES[name][1]:
        called, meanings = CHOICES[name]
        return called, meanings[text]
    called, counted = WORDS.get(name, (name.replace("_", " "), "{}"))
    return called, counted.format(text)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.{DIGITS}g}"
    return f'"{value}"' if isinstance(value, str) and value != value.strip() else str(value)
