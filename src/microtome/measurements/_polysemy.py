"""How many kinds of tokens a neuron tells from all others: what a neuron of one meaning does for one kind.

Formula:  every token of the text has one class by its text alone, the first that fits: see `class_of`;
          A_nc = P(a_n at a token of c > a_n at a token of another class) + 1/2 P(equal), the area under the curve of
          how well the activation tells class c from the rest; activations are counted in bins, within which they tie;
          polysemy_n = number of classes with A_nc > 0.9 or A_nc < 0.1;  a class of fewer than `least` tokens, or
          beside fewer others, is undecided: NaN, and not counted.
          Control: the same with the classes of each row's tokens in another order.
          First tokens of rows are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated
from unicodedata import category, normalize

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.context import current
from microtome.errors import DataError, error
from microtome.method import Argument, Column, Kept, Seen, Source, Statistic, Text, measure
from microtome.model import Model
from microtome.stream import Histogram

CLASSES = (
    "whitespace", "digits", "punctuation", "code", "letter", "function word", "capital", "word", "inside", "other",
)  # fmt: skip
PUNCTUATION = frozenset(".,;:!?'\"()-–—…«»“”‘’„¿¡、。，；：？！（）")
_FREQUENT = (
    "a an the this that these those and or but if because as than so of to in on at by for from with without into over "
    "under about after before between through i you he she it we they me him her us them my your his its our their is "
    "are was were be been being am do does did have has had will would can could shall should may might must not no "
    "there here what which who whom when where why how all any some each both such only also then more most other"
)
FUNCTION_WORDS = frozenset(_FREQUENT.split())
FAR = 0.4
"""How far from 1/2 the area of a class that a neuron tells from the rest is."""
_UP = torch.logspace(-2, 1, 13, dtype=torch.float64)
EDGES = torch.cat([-_UP.flip(0), _UP])
"""Four bins in each power of ten of either sign, from 0.01 to 10."""


def class_of(word: str) -> int:
    """Which of `CLASSES` a token's text is of.

    Blanks alone; digits alone; punctuation alone; signs of code, alone or among others; one letter; a frequent English
    function word; a word that begins with a capital; a word that begins in the token; a piece inside of a word; all
    else, such as parts of a character. Combining marks are of the letter before them. A token is classed by itself: a
    word without a blank before it, such as at the start of a line, counts as inside.
    """
    bare = word.strip()
    if not word or "\ufffd" in word:
        return CLASSES.index("other")
    if not bare:
        return CLASSES.index("whitespace")
    if bare.isdigit():
        return CLASSES.index("digits")
    if all(c in PUNCTUATION for c in bare):
        return CLASSES.index("punctuation")
    if not all(c.isalnum() or c in PUNCTUATION or c.isspace() or _combines(c) for c in bare):
        return CLASSES.index("code")
    if not any(c.isalnum() for c in bare):  # marks without their letter
        return CLASSES.index("other")
    if bare.lower() in FUNCTION_WORDS and word != bare:
        return CLASSES.index("function word")
    if len(normalize("NFC", bare)) == 1:
        return CLASSES.index("letter")
    if word == bare:  # nothing before it: a piece of the word that the token before began
        return CLASSES.index("inside")
    return CLASSES.index("capital" if bare[0].isupper() else "word")


def _combines(c: str) -> bool:
    """Whether a character changes or joins letters: vowel signs, accents, the joiners of Persian and Hindi."""
    return category(c)[0] == "M" or c in "\u200c\u200d"


@measure(
    "polysemy",
    of="neuron",
    on=Text(sequences=32, width=128),
    sites="mlp.post",
    atlas=False,
    title="kinds of tokens that neurons tell apart",
    question="How many kinds of tokens does each neuron tell from all others?",
    columns=(
        Column("polysemy", "classes", "classes of tokens that the activation tells from the rest, at an area under the "
               "curve beyond 0.9, or below 0.1", "polysemy_shuffled", (0, len(CLASSES)), interval=False),
        Column("polysemy_shuffled", "classes", "the same with the classes of each row's tokens in another order",
               range=(0, len(CLASSES)), interval=False),
        Column("class_auroc", "1", f"area under the curve of each class against the rest: {', '.join(CLASSES)}",
               "class_auroc_shuffled", (0, 1), extra=("token_class",), interval=False, drawn=False),
        Column("class_auroc_shuffled", "1", "the same with the classes in another order", range=(0, 1),
               extra=("token_class",), interval=False, drawn=False),
        Column("best_class", "index", "class whose area is farthest from 1/2, from 0; -1 where all are undecided",
               "none: an index", interval=False),
    ),
    source=(
        Source("Aravindan et al.", "Do VLMs Have Bad Eyes? Diagnosing Compositional Failures via Mechanistic "
               "Interpretability", 2025, "2508.16652", "neurons that several features excite",
               departs="the paper gives no number: classes of tokens, the area under the curve and 0.9 are ours"),
        Source("Mann and Whitney", "On a Test of Whether one of Two Random Variables is Stochastically Larger than the "
               "Other", 1947),
    ),
    cost="two histograms of the activations at the first sequences of the text; 4.3 kB per neuron",
    check="tests/laws/test_polysemy.py, tests/planted/test_neurons.py",
)  # fmt: skip
class Polysemy(Statistic):
    """How well each neuron tells each class of tokens from the rest, and how many it tells.

    Raises:
        DataError: the model has no tokenizer to class tokens with.
    """

    def __init__(
        self,
        least: Annotated[int, Argument("tokens below which a class is undecided", "tokens", least=2)] = 10,
    ) -> None:
        """Leave classes of fewer tokens out."""
        self.least = least
        self._class_of: dict[int, int] = {}

    def start(self, model: Model, layer: int | None) -> Kept:
        """Histograms of every class, in both orders."""
        names = [f"{order}{c}" for order in ("own.", "shuffled.") for c in range(len(CLASSES))]
        return {name: Histogram(model.anatomy.d_mlp, EDGES) for name in names}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in the tokens of each class."""
        post, later = seen["mlp.post"], seen.later
        own = self._classes(seen).where(later, -1)
        shuffled = own.clone()
        for row, example in enumerate(seen.examples.tolist()):
            generator = torch.Generator().manual_seed(current().seed * 1_000_003 + example)
            places = later[row].nonzero().squeeze(1)
            shuffled[row, places] = own[row, places[torch.randperm(len(places), generator=generator)]]
        for order, classes in (("own.", own), ("shuffled.", shuffled)):
            for c in range(len(CLASSES)):
                if bool((mask := classes == c).any()):
                    kept[f"{order}{c}"].update(post, mask)

    def _classes(self, seen: Seen) -> Int[Tensor, "row pos"]:
        """The class of every token."""
        if seen.model.tokenizer is None:
            what = f"{seen.model.anatomy.name} has no tokenizer to class tokens with"
            raise error(DataError, what, do="open the model with its tokenizer")
        ids, place = seen.tokens.cpu().unique(return_inverse=True)
        new = [i for i in ids.tolist() if i not in self._class_of]
        self._class_of |= dict(zip(new, map(class_of, seen.model.to_words(new)), strict=True))
        return torch.tensor([self._class_of[i] for i in ids.tolist()])[place]

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """Areas of every class, and how many are far from 1/2."""
        found: dict[str, Tensor] = {}
        for order, end in (("own.", ""), ("shuffled.", "_shuffled")):
            counts = torch.stack([_counts(kept[f"{order}{c}"]) for c in range(len(CLASSES))], dim=1)
            area = areas(counts, self.least)
            decided = ~area.isnan()
            told = ((area - 0.5).abs() > FAR).sum(1).double()
            found[f"class_auroc{end}"] = area
            found[f"polysemy{end}"] = told.masked_fill(~decided.any(1), torch.nan)
        away = (found["class_auroc"] - 0.5).abs().nan_to_num(-1.0)
        best = away.argmax(1)
        return found | {"best_class": torch.where(away.amax(1) < 0, -1, best)}


def areas(counts: Float[Tensor, "neuron kind bin"], least: int = 1) -> Float[Tensor, "neuron kind"]:
    """The area under the curve of each kind of values against all others, counted in bins, lowest first."""
    own, rest = counts.double(), counts.double().sum(1, keepdim=True) - counts
    below = rest.cumsum(-1) - rest / 2  # those in one bin tie
    p, n = own.sum(-1), rest.sum(-1)
    found = (own * below).sum(-1) / (p * n)
    return found.masked_fill((p < least) | (n < least), torch.nan)


def _counts(rows: Histogram) -> Float[Tensor, "neuron bin"]:
    """Counts by bin, those outside the edges at the ends."""
    held = rows.result()
    return torch.cat([held.below.unsqueeze(1), held.count, held.above.unsqueeze(1)], dim=1).double()
