"""Which heads attend from a word to the word that it depends on: each head as a parser of one relation.

Formula:  a word's tokens are summed as keys and averaged as queries: B[w, u] = mean_{q in w} sum_{k in u} A[q, k], the
          first token of a text left out as a key, where sinks are. Of an arc between two words the dependent looks at
          its head where the model sees both ways, else the later word at the earlier; it hits if the other word has the
          largest B of all that it can see but itself.
          accuracy         share of the arcs of a relation that a head hits;
          offset_accuracy  the largest share that a fixed offset in words hits;
          best, best_offset  the same for the head and the offset that are best on one half of the texts, on the other
                           half, so that a choice among hundreds of heads wins nothing by itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.errors import ArgumentError, DataError, SiteError, error
from microtome.model import Model
from microtome.shown import shown
from microtome.stream import difference_interval

MASS = 1e-6
"""Attention below which a word is not attended to at all."""


@shown
@dataclass(frozen=True)
class Sentence:
    """Words with their dependencies.

    Attributes:
        words: in their order.
        arcs: (dependent, head, relation), counting words from 0.
        spaces: whether a space follows each word; behind every one by default.
    """

    words: Sequence[str]
    arcs: Sequence[tuple[int, int, str]]
    spaces: Sequence[bool] = ()

    @property
    def text(self) -> str:
        """Its words as a text."""
        return "".join(w + " " * s for w, s in zip(self.words, self._spaces(), strict=True)).rstrip()

    def places(self) -> list[tuple[int, int]]:
        """The first character of each word in the text, and the one behind it."""
        found: list[tuple[int, int]] = []
        at = 0
        for word, space in zip(self.words, self._spaces(), strict=True):
            found.append((at, at + len(word)))
            at += len(word) + space
        return found

    def _spaces(self) -> list[bool]:
        return list(self.spaces) if self.spaces else [True] * len(self.words)


Pattern = Float[Tensor, "layer head q_pos k_pos"]
Spans = Sequence[tuple[int, int] | None]
"""By word, its tokens (first, end); None where it has none."""


def dependency_heads(
    model: Model, sentences: Sequence[Sentence] | str | os.PathLike[str] | None = None, *, count: int = 96
) -> xr.Dataset:
    """How well each head finds the word that another depends on, by relation, beside the best fixed offset.

    Formula:  see this file's head.
    Source:   Clark et al., "What Does BERT Look At? An Analysis of BERT's Attention", 2019 (1906.04341), section 4.2.
              Departs: a causal model looks from the later word; head and offset are chosen on one half of the texts and
              counted on the other; without sentences of your own they are made from templates.
    Cost:     one forward a sentence, whose patterns are all kept.
    Check:    a head that follows subjects is found, and no offset hits what it hits; tests/laws/test_dependencies.py.

    Args:
        model: an open model with a tokenizer.
        sentences: with their arcs; or a CoNLL-U file; `template_sentences` by default.
        count: how many sentences at most.

    Returns:
        A dataset of `accuracy` [relation, layer, head]; `offset`, `offset_accuracy` [relation]; `best`, `best_offset`
        and their difference `best_diff` [relation] with the ends of its 95 % interval over texts `_lo`, `_hi`;
        `best_layer`, `best_head` [relation], over all texts; `arcs` [relation]. Arcs to the text's first token are left
        out, and so are words without tokens.

    Raises:
        ArgumentError: there is no sentence, an arc names no word, or a sentence has spaces of other words.
        DataError: the file cannot be read as CoNLL-U.
        SiteError: the model has no attention patterns.
        PromptError: it has no tokenizer.
    """
    given = read_conllu(sentences) if isinstance(sentences, str | os.PathLike) else sentences
    some = list(template_sentences(count, seed=current().seed) if given is None else given)[:count]
    _refuse(some)
    layers = [i for i in range(model.anatomy.n_layers) if Site("attn.pattern", i) in model.anatomy.hook_points]
    if not layers:
        why = model.anatomy.missing.get(Site("attn.pattern", 0))
        raise error(SiteError, f"{model.anatomy.name} has no attention patterns", got=why, do="use a model with some")
    patterns = _patterns(model, some, layers)
    data = arc_scores(some, patterns, causal=model.anatomy.causal)
    told = {"method": "dependency_heads", "seed": current().seed}
    best = data["best_layer"]
    data["best_layer"] = best.copy(data=[layers[int(i)] for i in best.values])  # of those with attention, by number
    return data.assign_coords(layer=layers).assign_attrs(dict(model.provenance) | told)


def _patterns(model: Model, sentences: Sequence[Sentence], layers: Sequence[int]) -> Iterator[tuple[Pattern, Spans]]:
    """The patterns of each sentence, with the tokens of its words."""
    for at, sentence in enumerate(sentences):
        encoding = model.encodings(sentence.text)[0]
        spans = [encoding.tokens_at(*place) for place in sentence.places()]
        run = model.run(sentence.text, capture=[f"{i}.attn.pattern" for i in layers], logits=False)
        yield torch.stack([run[f"{i}.attn.pattern"][0] for i in layers]), spans
        current().report("reading sentences", at + 1, len(sentences))


def _refuse(sentences: Sequence[Sentence]) -> None:
    """Refuse sentences that are none.

    Raises:
        ArgumentError: there is none, an arc names no word or goes from a word to itself, or spaces are of other words.
    """
    if not sentences:
        raise error(ArgumentError, "there is no sentence", do="give some, or leave them out for those of templates")
    for sentence in sentences:
        n = len(sentence.words)
        if sentence.spaces and len(sentence.spaces) != n:
            what = f'"{" ".join(sentence.words)}" needs one entry of spaces for each word'
            raise error(ArgumentError, what, got=len(sentence.spaces), allowed=n, do="leave spaces out, or give all")
        bad = next((a for a in sentence.arcs if not (0 <= a[0] < n and 0 <= a[1] < n and a[0] != a[1])), None)
        if bad is not None:
            what = f'an arc of "{sentence.text}" names no two words'
            raise error(ArgumentError, what, got=bad, allowed=f"0 to {n - 1}", do="count words from 0")


def arc_scores(
    sentences: Sequence[Sentence], patterns: Iterator[tuple[Pattern, Spans]] | Sequence[tuple[Pattern, Spans]], *,
    causal: bool = True,
) -> xr.Dataset:  # fmt: skip
    """The same from patterns: see `dependency_heads`."""
    relations = sorted({relation for sentence in sentences for *_, relation in sentence.arcs})
    hits: dict[str, list[Tensor]] = {name: [] for name in relations}  # of each text, of each head
    offsets: dict[str, list[dict[int, int]]] = {name: [] for name in relations}
    counts: dict[str, list[int]] = {name: [] for name in relations}
    shape = (0, 0)
    for sentence, (pattern, spans) in zip(sentences, patterns, strict=True):
        looks, shape = attended(pattern, spans, causal=causal), tuple(pattern.shape[:2])
        for name in relations:
            ends = [_ends(*arc[:2], causal=causal) for arc in sentence.arcs if arc[2] == name]
            ends = [(w, u) for w, u in ends if spans[w] is not None and spans[u] not in (None, (0, 1))]
            right = [looks[..., w] == u for w, u in ends]
            hits[name].append(torch.stack(right).double().sum(0) if right else torch.zeros(shape, dtype=torch.float64))
            offsets[name].append(_counted(u - w for w, u in ends))
            counts[name].append(len(ends))
    return _table(relations, shape, hits, offsets, counts)


def _ends(dependent: int, head: int, *, causal: bool) -> tuple[int, int]:
    """Which word looks, and at which."""
    return (max(dependent, head), min(dependent, head)) if causal else (dependent, head)


def attended(pattern: Pattern, spans: Spans, *, causal: bool = True) -> Int[Tensor, "layer head word"]:
    """[layer, head, word] The word that each word attends to most, itself and the text's first token left out; else -1.

    A causal model's word sees those before it.
    """
    keys = pattern.double().clone()
    keys[..., 0] = 0
    n = len(spans)
    to = torch.stack([keys[..., s[0] : s[1]].sum(-1) if s else keys.new_zeros(keys.shape[:-1]) for s in spans], dim=-1)
    of = torch.stack([to[:, :, s[0] : s[1]].mean(2) if s else to.new_zeros((*to.shape[:2], n)) for s in spans], dim=2)
    barred: Bool[Tensor, "word word"] = torch.eye(n, dtype=torch.bool, device=of.device)
    barred = barred | torch.ones_like(barred).triu(1) if causal else barred
    best = of.masked_fill(barred, -1).max(-1)
    return torch.where(best.values > MASS, best.indices, -1).cpu()


def _counted(offsets: Iterable[int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for offset in offsets:
        found[offset] = found.get(offset, 0) + 1
    return found


def _table(
    relations: Sequence[str],
    shape: tuple[int, ...],
    hits: Mapping[str, Sequence[Tensor]],
    offsets: Mapping[str, Sequence[Mapping[int, int]]],
    counts: Mapping[str, Sequence[int]],
) -> xr.Dataset:
    """Accuracies, and the best head beside the best offset, each chosen on one half and counted on the other."""
    rows: dict[str, list[Any]] = {}
    for name in relations:
        own, n = torch.stack(list(hits[name])), torch.tensor(counts[name], dtype=torch.float64)
        every = sorted({d for of in offsets[name] for d in of}) or [0]
        fixed = torch.tensor([[of.get(d, 0) for d in every] for of in offsets[name]], dtype=torch.float64)
        accuracy, reach = own.sum(0) / n.sum(), fixed.sum(0) / n.sum()
        best = int(accuracy.nan_to_num(0).flatten().argmax())
        head, offset = _on_the_other_half(own.flatten(1)), _on_the_other_half(fixed)
        told: dict[str, Any] = {
            "accuracy": accuracy.numpy(), "offset": every[int(reach.nan_to_num(0).argmax())],
            "offset_accuracy": float(reach.max()), "best_layer": best // shape[1], "best_head": best % shape[1],
            "best": float(head.sum() / n.sum()), "best_offset": float(offset.sum() / n.sum()), "arcs": int(n.sum()),
        }  # fmt: skip
        kept = n > 0
        ends = (torch.full((), torch.nan),) * 3
        if int(kept.sum()) > 1:
            ends = difference_interval(head[kept], offset[kept], weights=n[kept], control_weights=n[kept])
        told |= {f"best_diff{end}": float(x) for end, x in zip(("", "_lo", "_hi"), ends, strict=True)}
        for key, value in told.items():
            rows.setdefault(key, []).append(value)
    units = {"offset": "words", "best_layer": "1", "best_head": "1", "arcs": "arcs"}
    axes = {"accuracy": ("relation", "layer", "head")}
    variables: dict[str, Any] = {
        name: (axes.get(name, ("relation",)), values, {"unit": units.get(name, "share")})
        for name, values in rows.items()
    }
    coords = {"relation": list(relations), "layer": range(shape[0]), "head": range(shape[1])}
    return xr.Dataset(variables, coords=coords)


def _on_the_other_half(hits: Float[Tensor, "text choice"]) -> Float[Tensor, " text"]:
    """By text, the hits of the choice that is best on the texts of the other half: the even and the odd ones."""
    found = torch.zeros(len(hits), dtype=hits.dtype)
    for half in (0, 1):
        chosen = int(hits[1 - half :: 2].sum(0).argmax())
        found[half::2] = hits[half::2, chosen]
    return found


def read_conllu(path: str | os.PathLike[str]) -> list[Sentence]:
    """Sentences with their arcs from a CoNLL-U file; roots, punctuation and empty nodes are left out.

    Of a multiword token the text is its own form and the space behind it its own too. Where its words joined are that
    form ("do" and "n't") they stay words; else ("de" and "le" of "du") it is one word, which has the arcs between them
    and words outside, and those between them are left out.

    Raises:
        DataError: there is no such file, or a line of it is none of CoNLL-U.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as cause:
        raise error(DataError, f'cannot read "{path}"', got=cause, do="give a CoNLL-U file in UTF-8") from cause
    found: list[Sentence] = []
    rows: list[list[str]] = []
    for number, line in enumerate([*lines, ""], 1):
        if line.startswith("#"):
            continue
        if line.strip():
            rows.append(line.split("\t"))
            if len(rows[-1]) != 10:
                what = f'line {number} of "{path}" is none of CoNLL-U'
                raise error(DataError, what, got=f"{len(rows[-1])} columns", allowed="10, with tabs between them")
        elif rows:
            found.append(_sentence(rows, number, path))
            rows = []
    if not found:
        raise error(DataError, f'"{path}" has no sentences', do="give a CoNLL-U file")
    return found


def _sentence(rows: Sequence[Sequence[str]], number: int, path: Any) -> Sentence:
    """One sentence of a CoNLL-U file.

    Raises:
        DataError: a head is no number of a word, or the words of a multiword token are not those that follow it.
    """
    given = [row for row in rows if row[0].isdigit()]
    ranges = _ranges(rows, len(given), number, path)
    words: list[str] = []
    spaces: list[bool] = []
    place: list[int] = []  # of each row among the words
    for at, row in enumerate(given):
        first, end, whole = ranges.get(at, (at, at + 1, row))
        split = "".join(x[1] for x in given[first:end]) == whole[1]
        if split or at == first:
            words.append(row[1] if split else whole[1])
            spaces.append((at == end - 1 or not split) and not _joined(whole))
        place.append(len(words) - 1)
    arcs: list[tuple[int, int, str]] = []
    for at, row in enumerate(given):
        if not row[6].isdigit() or int(row[6]) > len(given):
            what = f'the sentence that ends before line {number} of "{path}" has a word without a head'
            raise error(DataError, what, got=f"head {row[6]} of {row[1]}", allowed=f"0 to {len(given)}")
        relation = row[7].split(":")[0]
        if int(row[6]) > 0 and relation != "punct" and place[at] != place[int(row[6]) - 1]:
            arcs.append((place[at], place[int(row[6]) - 1], relation))
    return Sentence(words, arcs, spaces)


def _ranges(
    rows: Sequence[Sequence[str]], words: int, number: int, path: Any
) -> dict[int, tuple[int, int, Sequence[str]]]:
    """By word of a multiword token, the first of its words, the one behind them, and its row.

    Raises:
        DataError: see `_sentence`.
    """
    found: dict[int, tuple[int, int, Sequence[str]]] = {}
    seen = 0
    for row in rows:
        seen += row[0].isdigit()
        ends = row[0].split("-")
        if len(ends) == 1:
            continue
        first, end = (int(x) if x.isdigit() else -1 for x in ends) if len(ends) == 2 else (-1, -1)
        if not (first == seen + 1 and first <= end <= words) or seen in found:
            what = f'the sentence that ends before line {number} of "{path}" has a multiword token of other words'
            raise error(DataError, what, got=f"{row[0]} {row[1]}", allowed="the words that follow it, such as 3-4")
        found |= dict.fromkeys(range(first - 1, end), (first - 1, end, row))
    return found


def _joined(row: Sequence[str]) -> bool:
    """Whether no space follows."""
    return "SpaceAfter=No" in row[9].split("|")


SUBJECTS = [
    "boy",
    "teacher",
    "dog",
    "doctor",
    "student",
    "farmer",
    "bird",
    "author",
    "king",
    "woman",
    "child",
    "soldier",
]
OBJECTS = ["key", "book", "letter", "picture", "house", "car", "ring", "ball", "box", "table", "bottle", "horse"]
PLACES = ["river", "wall", "garden", "door", "tree", "building", "window", "cabinet"]
VERBS = ["saw", "found", "took", "lost", "sold", "held", "carried", "painted", "watched", "followed"]
ADJECTIVES = ["old", "small", "heavy", "green", "quiet", "strange", "young", "new", "dark", "little"]
BETWEEN = ("", "", "near the {place}", "behind the {adjective} {place}", "who stood by the {place}")
"""What may stand between a subject and its verb."""


def template_sentences(count: int = 96, *, seed: int = 0) -> list[Sentence]:
    """Sentences of known structure: determiners, adjectives, subjects with something behind them, verbs and objects.

    >>> template_sentences(1)[0].text
    'Today the ... key ...'
    """
    rng = torch.Generator().manual_seed(seed)

    def one(of: Sequence[str]) -> str:
        return of[int(torch.randint(len(of), (), generator=rng))]

    found: list[Sentence] = []
    for _ in range(count):
        words, arcs = ["Today"], list[tuple[int, int, str]]()

        def noun_phrase(nouns: Sequence[str], words: list[str] = words, arcs: list[tuple[int, int, str]] = arcs) -> int:
            adjectives = [one(ADJECTIVES) for _ in range(int(torch.randint(3, (), generator=rng)))]
            first, noun = len(words), len(words) + 1 + len(adjectives)
            words += ["the", *adjectives, one(nouns)]
            arcs.append((first, noun, "det"))
            arcs += [(first + 1 + i, noun, "amod") for i in range(len(adjectives))]
            return noun

        subject = noun_phrase(SUBJECTS)
        words += one(BETWEEN).format(place=one(PLACES), adjective=one(ADJECTIVES)).split()
        verb = len(words)
        words.append(one(VERBS))
        arcs += [(subject, verb, "nsubj"), (noun_phrase(OBJECTS), verb, "obj")]
        found.append(Sentence([*words, "."], arcs, [True] * (len(words) - 1) + [False, False]))
    return found
