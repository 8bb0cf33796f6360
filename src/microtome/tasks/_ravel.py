"""RAVEL: entities with several attributes each, and prompts that ask for one; read from its published archive.

A question is one entity in one prompt. It counts as known where the likeliest next token is the first token of the
attribute's value; a value with alternatives ("Arabic,Berberi") is known by any of them.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from microtome.context import current
from microtome.errors import ArgumentError, DataError, PromptError, error, nearest
from microtome.model import Model
from microtome.shown import shown
from microtome.stream import share_interval
from microtome.tasks._tokens import Ids, Misfit, Tokens

KINDS = ("city", "nobel_prize_winner", "verb", "physical_object", "occupation")
PARTS = ("entity_attributes", "attribute_to_prompts", "entity_to_split", "prompt_to_split")
SLOT = "%s"
AT_ONCE = 2048
"""Tokens, pads included, per forward."""


@shown
@dataclass(frozen=True)
class Asked:
    """One question: an entity in one prompt of an attribute.

    Attributes:
        entity, attribute, template: what was asked, the entity's place in the template written as %s.
        tokens: ids of the prompt.
        at: position of the entity's last token.
        answers: ids of the first tokens of the values that are right.
        said: the likeliest next token.
    """

    entity: str
    attribute: str
    template: str
    tokens: Ids
    at: int
    answers: Ids
    said: int

    @property
    def known(self) -> bool:
        """Whether the model answered it."""
        return self.said in self.answers


@shown
@dataclass(frozen=True)
class Ravel:
    """Entities of one kind with their attributes, and the prompts that ask for them.

    Attributes:
        kind: of the entities.
        values: by entity, its value of each attribute.
        templates: by attribute, prompts with %s in the entity's place.
        split: by entity, "train", "val" or "test".
        template_split: by prompt, the same.
    """

    kind: str
    values: Mapping[str, Mapping[str, str]]
    templates: Mapping[str, tuple[str, ...]]
    split: Mapping[str, str]
    template_split: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def attributes(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.templates)

    def require(self, attributes: Sequence[str]) -> tuple[str, ...]:
        """The attributes that are named, or all where none are.

        Raises:
            ArgumentError: there is no such attribute.
        """
        chosen = tuple(attributes) or self.attributes
        for name in chosen:
            if name not in self.templates:
                what = (
                    f'entities of the kind "{self.kind}" have no attribute "{name}".{nearest(name, [*self.templates])}'
                )
                allowed = ", ".join(self.templates)
                raise error(ArgumentError, what.removesuffix("."), allowed=allowed, do="name some of these")
        return chosen

    def ask(
        self,
        model: Model,
        attributes: Sequence[str] = (),
        *,
        entities: int = 400,
        templates: int = 2,
        tried: int = 8,
        trial: int = 16,
        seed: int = 0,
    ) -> tuple[Asked, ...]:
        """Ask a model for attributes of entities, in the prompts that it answers best.

        Of each attribute the `tried` shortest prompts are tried on `trial` training entities, and the best `templates`
        of them are asked of `entities` entities, drawn from all splits by the seed.

        Formula:  known = the likeliest next token is the first token of a value of the attribute.
        Source:   Huang et al., "RAVEL: Evaluating Interpretability Methods on Disentangling Language Model
                  Representations", 2024 (arXiv 2402.17700). Departs: the first token is read, not a generated text;
                  prompts are chosen on training entities by the model's own accuracy.
        Cost:     attributes x (tried x trial + templates x entities) forwards, in batches.
        Check:    equal to one prompt at a time; tests/unit/test_ravel.py.

        Args:
            model: a causal model with a tokenizer.
            attributes: which; all by default.
            entities: how many; all where there are no more.
            templates: prompts per attribute that are kept.
            tried: prompts per attribute that are tried.
            trial: entities that they are tried on.
            seed: of the choice of entities.

        Raises:
            ArgumentError: there is no such attribute.
            PromptError: the model has no tokenizer, or no question fits its tokens.
            ModelUnsupported: it is not causal.
        """
        model.require_next_token()
        chosen, tokens = self.require(attributes), Tokens.of(model)
        tokens.require("ravel")
        order = [self._names[i] for i in np.random.default_rng(seed).permutation(len(self._names))]
        first = [name for name in order if self.split[name] == "train"][:trial]
        kept: dict[str, list[str]] = {}
        for name in chosen:
            shortest = sorted(self.templates[name], key=lambda text: (len(tokens.ids(text)), text))[:tried]
            said = self._said(
                model, tokens, [(e, name, t) for t in shortest for e in first], f"trying prompts of {name}"
            )
            right = {t: sum(q.known for q in said if q.template == t) for t in shortest}
            kept[name] = sorted(shortest, key=lambda text: -right[text])[:templates]
        wanted = [(e, name, t) for e in order[:entities] for name in chosen for t in kept[name]]
        found = self._said(model, tokens, wanted, "asking for attributes")
        if not found:
            do = "choose other attributes"
            raise error(PromptError, f"no question about a {self.kind} fits the tokens of {model.anatomy.name}", do=do)
        return tuple(found)

    @property
    def _names(self) -> list[str]:
        return list(self.values)

    def _said(self, model: Model, tokens: Tokens, wanted: list[tuple[str, str, str]], stage: str) -> list[Asked]:
        """The questions that fit the tokens, with what the model says."""
        drafts = [d for w in wanted if (d := self._draft(tokens, *w)) is not None]
        drafts.sort(key=lambda d: len(d.tokens))
        found: list[Asked] = []
        for some in _parts(drafts):
            logits = model.run([list(d.tokens) for d in some])
            for row, d, (first, n) in zip(logits.logits, some, logits.batch.spans, strict=True):
                said = int(row[first + n - 1].argmax())
                found.append(Asked(d.entity, d.attribute, d.template, d.tokens, d.at, d.answers, said))
            current().report(stage, len(found), len(drafts))
        place = {w: i for i, w in enumerate(wanted)}
        return sorted(found, key=lambda q: place[q.entity, q.attribute, q.template])

    def _draft(self, tokens: Tokens, entity: str, attribute: str, template: str) -> Asked | None:
        """A question whose answer is not read yet; None where it does not fit the tokens."""
        before, _, after = template.partition(SLOT)
        text, first = before + entity + after, len(before)
        space = "" if after[-1:] in ("", " ", '"', "'", "(", "/") else " "
        values = [space + v.strip() for v in self.values[entity].get(attribute, "").split(",") if v.strip()]
        try:
            span = tokens.spans(text, {"entity": (first, first + len(entity))})["entity"]
            answers = tuple(dict.fromkeys(ids[0] for ids in tokens.continuations(text, values)))
        except Misfit:
            return None
        own = tokens.ids(text)
        short = tokens.n_ctx is None or len(own) <= tokens.n_ctx
        return Asked(entity, attribute, template, own, span[1] - 1, answers, -1) if answers and short else None


def _parts(drafts: Sequence[Asked]) -> Iterator[Sequence[Asked]]:
    """The drafts, sorted by length, in parts of at most `AT_ONCE` tokens."""
    at = 0
    while at < len(drafts):
        end = at + 1
        while end < len(drafts) and (end + 1 - at) * len(drafts[end].tokens) <= AT_ONCE:
            end += 1
        yield drafts[at:end]
        at = end


def shares(asked: Sequence[Asked]) -> dict[str, tuple[float, float, float]]:
    """By attribute, the share of questions that were answered, with the ends of its interval."""
    found: dict[str, tuple[float, float, float]] = {}
    for name in dict.fromkeys(q.attribute for q in asked):
        own = [q.known for q in asked if q.attribute == name]
        found[name] = (sum(own) / len(own), *share_interval(sum(own), len(own)))
    return found


def ravel(path: str | os.PathLike[str], kind: str = "city") -> Ravel:
    """Read entities, attributes, prompts and splits of RAVEL.

    Source:   Huang et al., "RAVEL: Evaluating Interpretability Methods on Disentangling Language Model
              Representations", 2024 (arXiv 2402.17700); its file data.tgz. Departs: prompts about no attribute, taken
              from Wikipedia, are not read.
    Check:    the published numbers of entities; tests/unit/test_ravel.py.

    Args:
        path: the archive data.tgz, or the folder that it unpacks to.
        kind: "city", "nobel_prize_winner", "verb", "physical_object" or "occupation".

    Returns:
        A `Ravel`.

    Raises:
        DataError: the file or folder is missing or damaged, or holds no entities of this kind.
    """
    held = _read(Path(path), kind)
    values, prompts, split, prompt_split = (held[part] for part in PARTS)
    templates = {name: tuple(t for t in own if t.count(SLOT) == 1) for name, own in prompts.items()}
    if not values or not any(templates.values()):
        raise error(DataError, f'"{path}" has no entities of the kind "{kind}"', do="give data.tgz of RAVEL")
    return Ravel(kind, values, templates, {name: split.get(name, "train") for name in values}, prompt_split)


def _read(path: Path, kind: str) -> dict[str, dict[str, Any]]:
    """The four tables of a kind, from an archive or a folder."""
    names = {part: f"ravel_{kind}_{part}.json" for part in PARTS}
    if not path.exists():
        raise error(DataError, f'cannot read "{path}": it does not exist', do="give data.tgz of RAVEL")
    try:
        texts = _from_folder(path, names) if path.is_dir() else _from_archive(path, names)
        held = {part: json.loads(text) for part, text in texts.items()}
    except (OSError, tarfile.TarError, ValueError, EOFError) as problem:
        raise error(
            DataError, f'cannot read "{path}" as RAVEL', got=str(problem), do="give data.tgz of RAVEL"
        ) from problem
    missing = [names[part] for part in PARTS if not isinstance(held.get(part), dict)]
    if missing:
        got, allowed = f"no {missing[0]}", ", ".join(KINDS)
        raise error(DataError, f'"{path}" has no entities of the kind "{kind}"', got=got, allowed=allowed)
    return held


def _from_folder(path: Path, names: Mapping[str, str]) -> dict[str, str]:
    inner = path / "data" if (path / "data").is_dir() else path
    return {p: (inner / n).read_text(encoding="utf-8") for p, n in names.items() if (inner / n).is_file()}


def _from_archive(path: Path, names: Mapping[str, str]) -> dict[str, str]:
    """The tables of an archive; nothing of it is written to the disk."""
    found: dict[str, str] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            part = next((p for p, n in names.items() if member.isfile() and Path(member.name).name == n), None)
            file = None if part is None else archive.extractfile(member)
            if part is not None and file is not None:
                found[part] = file.read().decode("utf-8")
    return found
