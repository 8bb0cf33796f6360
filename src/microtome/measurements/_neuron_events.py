"""What makes each neuron fire: nothing, a few tokens, a few n-grams, or a place in the row.

Formula:  an event is a token with gate > 0 (activation > 0 in plain MLPs), or with |activation| > `above` where that is
          given: gates of gated MLPs are a little above 0 on many tokens, so that their signs alone say little.
          dead        no event in the text; the true rate is then below 3 / tokens at 95 %
          cover_k     the fewest of 64 buckets, into which k-grams are put by a hash of their ids, that hold 95 % of the
                      events: at most the number of k-grams that cover these events, and much smaller only where these
                      are many. Counts in buckets merge exactly, and do not grow with text and vocabulary.
          trigger     the tokens with most events, each counted as the smallest of three buckets of different hashes and
                      of its own occurrences (a count-min sketch), as far as they reach 95 % of the events
          trigger_rate  events at the triggers over occurrences of the triggers
          trigger_promotion  share of 1,000 tokens drawn from the vocabulary whose logit under the neuron's output is
                      lower than the trigger's, a mean over triggers: near 0 the neuron suppresses what it fires at
          ngram_order the smallest k with cover_k <= few and 2 cover_k <= token_cover_elsewhere, of which order 1 also
                      asks for a trigger_rate of 0.5, since a neuron of one bigram fires at one token too; 0 if none,
                      or under `least` events
          position_bits  mutual information of event and place in the row, p // 4 up to 63, in bits, without the first
                      token of each row; its control is what chance gives, (places - 1) / (2 n ln 2) (Miller, 1955)
          Control of the covers: the same with the event of each token put to the token half the row away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.anatomy import at_least_float32
from microtome.context import current
from microtome.errors import SiteError
from microtome.measurements._neuron_weights import output_directions
from microtome.method import Argument, Column, Kept, Seen, Source, Statistic, measure
from microtome.model import Model
from microtome.stream import Counter, Histogram

BUCKETS, PLACES, SPAN = 64, 64, 4
SHARE = 0.95
SAMPLE = 1000
TABLES = ("token", "token_1", "token_2")
ORDERS = {"token": 1, "bigram": 2, "trigram": 3}
_ODD = (-7046029254386353131, -4417276706812531889, -8663945395140668459)
PLAIN = "none: describes one neuron, to compare with others of its layer"


def bucket(ids: Int[Tensor, "*at"], table: int = 0) -> Int[Tensor, "*at"]:
    """The bucket of each id, 0 to 63, by a multiplicative hash; one of three."""
    mixed = (ids + 1) * _ODD[table]
    mixed = (mixed ^ (mixed >> 29)) * _ODD[(table + 1) % 3]
    return (mixed >> 58) & (BUCKETS - 1)


def cover(counts: Int[Tensor, "bucket neuron"]) -> Float[Tensor, " neuron"]:
    """[neuron] The fewest buckets that hold 95 % of the counts [bucket, neuron]; NaN where there are none."""
    sums = counts.sort(0, descending=True).values.cumsum(0)
    few = (sums < torch.ceil(SHARE * sums[-1].double())).sum(0) + 1
    return torch.where(sums[-1] > 0, few.double(), torch.nan)


def information(events: Int[Tensor, "place neuron"], tokens: Int[Tensor, " place"]) -> Float[Tensor, " neuron"]:
    """[neuron] Mutual information in bits of event and place, of events [place, neuron] among tokens [place]."""
    n = tokens.sum().double()
    joint = torch.stack([events.double(), tokens[:, None].double() - events]) / n  # [event or not, place, neuron]
    entropy = torch.special.entr
    bits = entropy(joint.sum(1)).sum(0) + entropy(tokens.double() / n).sum() - entropy(joint).sum((0, 1))
    return (bits / math.log(2)).clamp(min=0)


def _cover(name: str, what: str, control: str = "token_cover_elsewhere") -> Column:
    meaning = f"fewest of 64 buckets of {what} that hold 95 % of the neuron's events: no more than as many {what}"
    return Column(name, "buckets", meaning, control, (1, BUCKETS), interval=False)


@measure(
    "neuron_events",
    of="neuron",
    sites="mlp.post",
    optional=("mlp.gate", "mlp.pre"),
    needs=("mlp_out", "W_out"),
    atlas="full",
    title="what neurons fire at",
    question="Which neurons never fire, fire at a few tokens or n-grams, or at some places of a text?",
    columns=(
        Column("events", "tokens", "tokens of the text on which the neuron's gate (its activation in plain MLPs) is "
               "positive", PLAIN, (0, None), interval=False),
        Column("dead", "1", "1 where the neuron never fires in the text", PLAIN, (0, 1), interval=False),
        _cover("token_cover", "tokens"),
        _cover("token_cover_elsewhere", "tokens half a row away", ""),
        _cover("bigram_cover", "bigrams"),
        _cover("trigram_cover", "trigrams"),
        Column("ngram_order", "tokens", "1, 2 or 3 for a neuron of a few tokens, bigrams or trigrams; 0 for no such",
               "none: made of the covers and their control", (0, 3), interval=False),
        Column("trigger", "token", "the tokens at which the neuron fires most, up to 95 % of its events", PLAIN,
               extra=("rank",), interval=False),
        Column("trigger_rate", "share", "share of occurrences of its trigger tokens on which the neuron fires",
               "firing_share", (0, 1), interval=False),
        Column("firing_share", "share", "share of all tokens on which it fires", range=(0, 1), interval=False),
        Column("trigger_promotion", "share", "share of 1,000 drawn tokens whose logits the neuron's output raises less "
               "than its triggers'", "none: 0.5 for tokens that have nothing to do with it", (0, 1), interval=False),
        Column("position_bits", "bits", "mutual information of firing and the place in the row",
               "position_bits_chance", (0, 1), interval=False),
        Column("position_bits_chance", "bits", "what it would be on average if they were independent", range=(0, None),
               interval=False),
    ),
    source=(
        Source("Voita, Ferrando and Nalmpantis", "Neurons in Large Language Models: Dead, N-gram, Positional", 2023,
               "2309.04827", departs="n-grams are counted in 64 buckets; gates of gated MLPs; at most 5 n-grams, 10 "
               "events, twice the control and a rate of 0.5 are constants of ours"),
        Source("Cormode and Muthukrishnan", "An Improved Data Stream Summary: The Count-Min Sketch and its "
               "Applications", 2005),
    ),
    cost="seven counts of the events, about one more forward; 4 kB per neuron; then d_model x 1,000 operations per "
    "neuron",
    check="tests/laws/test_neuron_events.py, tests/planted/test_neurons.py",
)  # fmt: skip
class NeuronEvents(Statistic):
    """Counts of each neuron's events by token, n-gram and place, and what these say it is."""

    def __init__(
        self,
        few: Annotated[int, Argument("n-grams that a neuron of n-grams has at most", "n-grams", 1, 32)] = 5,
        least: Annotated[int, Argument("events below which it is of no order", "tokens", least=1)] = 10,
        above: Annotated[
            float | None, Argument("size of the activation above which it fires; by default the gate's sign", "1", 0)
        ] = None,
    ) -> None:
        """Ask for so few n-grams and so many events."""
        self.few, self.least, self.above = few, least, above

    def prepare(self, model: Model, layers: Sequence[int | None]) -> None:
        """What each neuron does to the logits of every token: its output directions, and a sample of the vocabulary."""
        try:
            norm = model.require_readable()
        except SiteError:
            self._outputs: dict[int, Tensor] = {}
            return
        self._outputs = {i or 0: norm.centre(output_directions(model, i or 0)) * norm.gain for i in layers}
        self._unembed = at_least_float32(model.W_U)
        rng = torch.Generator().manual_seed(current().seed)
        self._sample = torch.randint(self._unembed.shape[1], (SAMPLE,), generator=rng)

    def start(self, model: Model, layer: int | None) -> Kept:
        """Counters of events; the names of their groups say the layer."""
        n, a = model.anatomy.d_mlp, model.anatomy
        names = [f"layer {layer}, {i}" for i in range(BUCKETS)]
        kept: Kept = {name: Counter(names, n) for name in (*TABLES, "bigram", "trigram", "elsewhere")}
        kept["place"] = Counter([f"layer {layer}, {i}" for i in range(PLACES)], n)
        kept["tokens"] = Histogram(1, torch.arange(a.d_vocab + 1) - 0.5)
        return kept

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in the tokens that count."""
        gate = next(seen[name] for name in ("mlp.gate", "mlp.pre", "mlp.post") if name in seen)
        flags = gate > 0 if self.above is None else seen["mlp.post"].abs() > self.above
        fires, tokens = flags.cpu(), seen.tokens.cpu()
        mask = torch.ones(tokens.shape, dtype=torch.bool) if seen.mask is None else seen.mask
        width, lead = tokens.shape[1], seen.lead
        for table, name in enumerate(TABLES):
            kept[name].update(fires, bucket(tokens, table), mask)
        away = tokens.clone()
        away[:, lead:] = tokens[:, lead:].roll((width - lead) // 2, 1)
        kept["elsewhere"].update(fires, bucket(away), mask)
        ids = tokens
        for order, name in ((2, "bigram"), (3, "trigram")):
            ids = ids + 1_000_003 * order * torch.nn.functional.pad(tokens, (order - 1, 0))[:, :width]
            whole = mask.clone()
            whole[:, : lead + order - 1] = False
            kept[name].update(fires, bucket(ids), whole)
        place = (torch.arange(width) // SPAN).clamp(max=PLACES - 1).expand_as(tokens)
        kept["place"].update(fires, place, mask & seen.later)
        kept["tokens"].update(tokens.unsqueeze(-1), mask)

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """The counts, and what they say."""
        tokens = kept["tokens"].result().count[0]
        counts = {name: held.result().count for name, held in kept.items() if name != "tokens"}
        events = counts["token"].sum(0)
        covers = {f"{name}_cover": cover(counts[name]) for name in ORDERS}
        for other in TABLES[1:]:  # what shares a bucket in one table is apart in another
            covers["token_cover"] = torch.fmax(covers["token_cover"], cover(counts[other]))
        elsewhere = cover(counts["elsewhere"])
        trigger, at = _triggers([counts[name] for name in TABLES], tokens, events, self.few)
        there = trigger >= 0
        rate = at.sum(1) / torch.where(there, tokens[trigger], 0).sum(1)
        places = kept["place"].result().total
        found = {
            "events": events, "dead": (events == 0).double(), "token_cover_elsewhere": elsewhere, **covers,
            "trigger": trigger, "trigger_rate": rate, "firing_share": events / tokens.sum(),
            "position_bits": information(counts["place"], places),
            "position_bits_chance": _chance(places, events),
        }  # fmt: skip
        order = torch.zeros_like(elsewhere)
        for name, n in sorted(ORDERS.items(), key=lambda item: -item[1]):
            own = covers[f"{name}_cover"]
            small = (own <= self.few) & (2 * own <= elsewhere) & (events >= self.least)
            order[small & ((rate >= 0.5) if n == 1 else True)] = n
        layer = int(kept["token"].groups[0].split()[1].rstrip(","))
        promoted = self._promotion(layer, trigger) if self._outputs else {}
        return found | {"ngram_order": order} | promoted

    def _promotion(self, layer: int, trigger: Int[Tensor, "neuron rank"]) -> dict[str, Tensor]:
        """How a neuron's output ranks its triggers among tokens of the sample."""
        w, u = self._outputs[layer], self._unembed
        sample, own = self._sample.to(u.device), trigger.clamp(min=0).to(u.device)
        others = w @ u[:, sample]
        ranks: list[Tensor] = []
        for column in own.unbind(1):  # a trigger at a time
            logit = (w * u[:, column].T).sum(1, keepdim=True)
            same = sample == column.unsqueeze(1)  # which rounding may put on either side
            ranks.append((((others < logit) & ~same).double() + 0.5 * same).mean(1))
        rank = torch.where(trigger >= 0, torch.stack(ranks, dim=1).cpu(), torch.nan)
        return {"trigger_promotion": rank.nanmean(1)}


def _chance(places: Int[Tensor, " place"], events: Int[Tensor, " neuron"]) -> Float[Tensor, " neuron"]:
    """The mean of `information` under independence; 0 for what always or never fires."""
    n = int(places.sum())
    value = (int((places > 0).sum()) - 1) / (2 * max(n, 1) * math.log(2))
    return torch.where((events > 0) & (events < n), value, 0.0).double()


def _triggers(
    tables: Sequence[Int[Tensor, "bucket neuron"]], tokens: Int[Tensor, " vocab"], events: Int[Tensor, " neuron"],
    few: int,
) -> tuple[Int[Tensor, "neuron rank"], Float[Tensor, "neuron rank"]]:  # fmt: skip
    """The tokens with most events, up to 95 % of them, -1 behind; and how many events each has, 0 behind."""
    seen = tokens.nonzero().flatten()
    own = tokens[seen]
    best: list[Any] = []
    for part in range(0, len(events), 512):
        units = slice(part, part + 512)
        at = own[:, None].expand(-1, len(events[units]))
        for table, counts in enumerate(tables):
            at = torch.minimum(at, counts[:, units][bucket(seen, table)])
        best.append(at.topk(min(few, len(seen)), dim=0))
    count = torch.cat([one.values for one in best], dim=1).T
    found = seen[torch.cat([one.indices for one in best], dim=1).T]
    before = count.cumsum(1) - count
    keep = (count > 0) & (before < SHARE * events[:, None])
    short = few - found.shape[1]
    found, count = torch.where(keep, found, -1), torch.where(keep, count, 0).double()
    pad = torch.nn.functional.pad
    return pad(found, (0, short), value=-1), pad(count, (0, short))
