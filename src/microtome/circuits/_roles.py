"""What the nodes of a circuit do: what they write in words, where they look, and at which tokens they matter.

Formula:  words: the mean over pairs of what a node writes at the last position w, read as centre(w) gain / scale W_U,
          the final norm's scale of each run, minus its mean over the vocabulary; the largest entries; answer: the same
          of the answer, less that of the foil.
          effect[place]: how the metric changes where the node gives the corrupt run's values at the tokens in which the
          prompts differ, at the last one, or at all others; the mean over the pairs that have such tokens.
          look[place]: attention from the last position to tokens that differ, to itself, to the first one, to others.
          role: "none" below `LEAST` of the gap; where its largest effect is at the tokens that differ, "subject"; at
          the others, "between"; at the last one, an MLP is "answer", a head "mover" if it looks at least as much at
          tokens that differ as at others, else "relation".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site, parse
from microtome.circuits._accuracy import share_of
from microtome.circuits._judge import OfCircuit, circuit_of
from microtome.context import current
from microtome.edit import Patch
from microtome.errors import DataError, error
from microtome.explain import AnswerOfClean, Clean, Corrupt, FoilOfCorrupt, Pairs, ReadMetric, pairs_of
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.run import Run
from microtome.stream import mean_interval
from microtome.sweep import written

PLACES = ("what differs", "between", "end")
LOOKS = ("what differs", "itself", "first", "others")
LEAST = 0.02
"""Share of the gap between clean and corrupt that a node must be worth to have a role."""
WRITES = ("embed", "*.attn.z", "*.mlp_out")

YAO = Source(
    "Yao et al.", "Knowledge Circuits in Pretrained Transformers", 2024, "2405.17969",
    departs="where a node acts is measured by exact patches at three kinds of tokens; the subject is what the prompts "
    "of a pair differ in; words are read through the final norm",
)  # fmt: skip


@question(
    "roles",
    title="roles of a circuit's nodes",
    question="What does each node of a circuit write, where does it look, and at which tokens does it matter?",
    columns=(
        Column("role", "1", "subject: acts at the tokens that differ; mover, relation: heads at the end that look "
               "there or elsewhere; answer: an MLP at the end; between: acts at other tokens; none: matters little",
               "none: a class", dims=("component",)),
        Column("writes", "token", "tokens that it promotes most at the end, in the mean, as text", "none: words",
               dims=("component",)),
        Column("answer", "logits", "what it adds at the end to the answer over the foil, or over the mean token",
               "answer_corrupt", dims=("component",)),
        Column("answer_corrupt", "logits", "the same in the corrupt prompts, of the clean prompts' answers",
               dims=("component",)),
        Column("effect", "logits", "change of the metric where it gives the corrupt run's values at these tokens; NaN "
               "where no pair has any",
               "none: no other nodes are patched; its places stand beside each other", dims=("component", "group")),
        Column("look", "share", "attention of a head from the end to these tokens; NaN of an MLP", "look_others",
               (0, 1), ("component", "span")),
        Column("look_others", "share", "the same of the other heads of the layer, in the mean", range=(0, 1),
               dims=("component", "span")),
        Column("answered", "share", "pairs that the model answers", "none: of what circuits are judged by", (0, 1),
               ()),
    ),
    source=YAO,
    cost="two forwards a pair, and a sweep of three cells a node and pair",
    check="tests/laws/test_roles.py, tests/planted/test_conditions.py",
    call='mt.circuits.roles(model, "circuit.safetensors", "The capital of France is", "The capital of Italy is", '
    'answer=" Paris", foil=" Rome")',
    reading="A mover carries what differs to the end; a relation head brings what is asked; a node at the subject "
    "works where the prompts differ.",
    needs=("sum", "lens", "attention and MLP", "*.attn.q", "*.attn.k", "*.attn.v", "*.attn.z", "final.scale"),
)  # fmt: skip
def roles(
    model: Model,
    circuit: OfCircuit,
    clean: Clean,
    corrupt: Corrupt = None,
    *,
    answer: AnswerOfClean = None,
    foil: FoilOfCorrupt = None,
    metric: ReadMetric = None,
    nodes: Annotated[int, Argument("how many, those of the largest scores first", "nodes", least=1)] = 30,
    words: Annotated[int, Argument("how many tokens to name", "tokens", least=1)] = 4,
) -> Found:
    """Decode every node of a circuit into words, and measure where it looks and where it matters.

    Raises:
        PromptError: the pairs do not align, or there is nothing to read.
        DataError: the circuit is one of another model, or has no heads and MLPs.
    """
    chosen = circuit_of(model, circuit)
    pairs = pairs_of(model, clean, corrupt, answer=answer, foil=foil, metric=metric)
    inner = [name for name in chosen.nodes if "." in name]
    if not inner:
        raise error(
            DataError, "this circuit has no heads and MLPs", got=f"{chosen.n_edges} edges", do="use a larger one"
        )
    worth = chosen.scores.masked_fill(~chosen.kept, 0.0).abs().sum(1)
    by = {name: float(worth[chosen.senders.index(name)]) for name in inner}
    names = sorted(sorted(inner, key=lambda name: -by[name])[:nodes], key=chosen.senders.index)
    reader = _Nodes(model, pairs, names, [chosen.senders.index(name) for name in names])
    found = reader.all()
    gap = float((found["clean"] - found["corrupt"]).mean().abs())
    effect, look = found["effect"], found["look"]
    over_pairs = _where_known(effect)
    values: dict[str, Any] = {
        "role": [role_of(*x, gap) for x in zip(names, over_pairs[0], look.mean(0), strict=True)],
        "writes": [" ".join(model.to_words(row.topk(min(words, len(row))).indices)) for row in found["logits"]],
        "answered": float("nan"),
    }  # fmt: skip
    dims = ("component", "group")
    values |= {f"effect{end}": (dims, x) for end, x in zip(("", "_lo", "_hi"), over_pairs, strict=True)}
    values["effect_each"] = (("example", *dims), effect)
    if pairs.answer_ids:
        values |= share_of("answered", pairs.answered(model) * len(pairs), len(pairs))
    each = {"look": look, "look_others": found["look_others"]}
    if pairs.answer_ids:
        each |= {"answer": found["answer"], "answer_corrupt": found["answer_corrupt"]}
    coords = {"component": names, "group": list(PLACES), "span": list(LOOKS)}
    attrs = pairs.attrs() | {"gap": gap, "nodes": len(inner), "shown": len(names)}
    return Found(values, each=each, coords=coords, attrs=attrs, units={"effect": pairs.unit})


def role_of(name: str, effect: Float[Tensor, " place"], look: Float[Tensor, " span"], gap: float) -> str:
    """What a node is called."""
    effect = effect.nan_to_num(0.0)
    if float(effect.abs().max()) < LEAST * gap:
        return "none"
    place = PLACES[int(effect.abs().argmax())]
    if place != "end":
        return "subject" if place == PLACES[0] else "between"
    if parse(name).name != "attn.z":
        return "answer"
    return "mover" if float(look[0]) >= float(look[3]) else "relation"


def _where_known(
    effect: Float[Tensor, "pair node place"],
) -> tuple[Float[Tensor, "node place"], Float[Tensor, "node place"], Float[Tensor, "node place"]]:
    """The mean over the pairs that have tokens of a place, with its interval."""
    found = [mean_interval(x[x.isfinite().all(1)]) for x in effect.unbind(2)]
    mean, low, high = (torch.stack(list(parts), dim=1) for parts in zip(*found, strict=True))
    return mean, low, high


class _Nodes:
    """Reads some nodes in every pair."""

    def __init__(self, model: Model, pairs: Pairs, names: Sequence[str], numbers: Sequence[int]) -> None:
        self.model, self.pairs, self.names, self.numbers = model, pairs, names, list(numbers)
        self.norm = model.require_readable()
        gain = self.norm.gain
        self.unembed = (
            (model.W_U.detach().T * gain).T.double().cpu()
            if isinstance(gain, Tensor)
            else model.W_U.detach().double().cpu() * gain
        )

    def all(self) -> dict[str, Tensor]:
        """By name, [pair, ...]; `logits` [node, vocab] in the mean."""
        rows: dict[str, list[Tensor]] = {}
        total, report = torch.zeros(()), current().counting("reading nodes")
        for i in range(len(self.pairs)):
            own, logits = self._of_pair(self.pairs.take([i]))
            total = total + logits / len(self.pairs)
            for name, x in own.items():
                rows.setdefault(name, []).append(x)
            report(i + 1, len(self.pairs))
        return {name: torch.stack(x) for name, x in rows.items()} | {"logits": total}

    def _of_pair(self, one: Pairs) -> tuple[dict[str, Tensor], Float[Tensor, "node vocab"]]:
        with torch.no_grad():
            runs = [
                self.model.run(side[None], capture=[*WRITES, "*.attn.pattern", "final.scale@-1"])
                for side in one.tokens[0]
            ]
            logits = [self._read(run) for run in runs]
            look, others = self._look(runs[0], one)
            values = [one.read(run)[0].double().cpu() for run in runs]
        found = {"clean": values[0], "corrupt": values[1], "look": look, "look_others": others}
        found["effect"] = self._effects(one, runs[1])
        if one.answer_ids:
            less = [x[:, one.foil_ids[0]] if one.foil_ids else x.mean(1) for x in logits]
            found["answer"], found["answer_corrupt"] = (
                x[:, one.answer_ids[0]] - y for x, y in zip(logits, less, strict=True)
            )
        return found, logits[0] - logits[0].mean(1, keepdim=True)

    def _read(self, run: Run) -> Float[Tensor, "node vocab"]:
        """What each node adds to the logits at the last position."""
        wrote = written(self.model, run)[0, self.numbers, -1].double().cpu()
        scale = float(run["final.scale@-1"].reshape(-1)[0])
        return self.norm.centre(wrote) / scale @ self.unembed * self.model.anatomy.logit_scale

    def _look(self, run: Run, one: Pairs) -> tuple[Float[Tensor, "node span"], Float[Tensor, "node span"]]:
        """Where heads look from the end, and where the other heads of their layer do; NaN of MLPs."""
        sets = _places(one)[1]
        found = torch.full((2, len(self.names), len(LOOKS)), torch.nan, dtype=torch.float64)
        for n, name in enumerate(self.names):
            address = parse(name)
            if address.name != "attn.z":
                continue
            (site,) = self.model.anatomy.sites(address)
            (head,) = address.units.resolve(self.model.anatomy.units(site)) or [0]
            pattern = run[str(Site("attn.pattern", site.layer))][0, :, -1].double().cpu()
            masses = torch.stack([pattern[:, where].sum(-1) for where in sets], dim=-1)
            found[0, n] = masses[head]
            found[1, n] = torch.cat([masses[:head], masses[head + 1 :]]).mean(0)
        return found[0], found[1]

    def _effects(self, one: Pairs, source: Run) -> Float[Tensor, "node place"]:
        """How the metric changes where each node gives the corrupt run's values at some tokens; NaN without any."""
        sets = _places(one)[0]
        cells = [(n, p, Patch(f"{name}@{','.join(map(str, at.tolist()))}", source=source))
                 for n, name in enumerate(self.names) for p, at in enumerate(sets) if len(at)]  # fmt: skip
        found = torch.full((len(self.names), len(PLACES)), torch.nan, dtype=torch.float64)
        swept = self.model.sweep(one.tokens[0][:1], [cell for *_, cell in cells], one.metric).run()
        for (n, p, _), effect in zip(cells, swept.effects.double().tolist(), strict=True):
            found[n, p] = effect
        return found


def _places(one: Pairs) -> tuple[list[Tensor], list[Tensor]]:
    """The positions of `PLACES`, and of `LOOKS`."""
    clean, corrupt = one.tokens[0]
    last = len(clean) - 1
    at = torch.arange(len(clean), device=clean.device)
    differs = (clean != corrupt) & (at < last)
    rest = ~differs & (at < last)
    sets = [differs, rest, at == last]
    looks = [differs, at == last, rest & (at == 0), rest & (at > 0)]
    return [s.nonzero().flatten().cpu() for s in sets], [s.nonzero().flatten().cpu() for s in looks]
