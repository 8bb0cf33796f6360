"""Interchange interventions run: the base prompts with a vector of the site replaced, exact and differentiable.

Only what comes after the site is computed: the stream that enters its layer is kept for every base prompt, once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.anatomy import Site, at_least_float32, parse
from microtome.context import current
from microtome.edit import Apply, Edit
from microtome.errors import EditError, PromptError, SiteError, error
from microtome.model import Model
from microtome.subspaces._subspace import Subspace, site_of
from microtome.subspaces._swaps import Swap

T = TypeVar("T")

AT_ONCE = 2048
"""Tokens, pads included, per forward."""
CLOSE = 1e-3
"""How far apart the logits of a whole run and of one from the site's layer on may lie, in standard deviations."""
ROUNDINGS = 16
"""Likewise, in units of the rounding of the model's numbers, where these are coarser."""


class Kept(NamedTuple):
    """What is kept of the run of one prompt.

    Attributes:
        held: by address, [pos, d] of the site, and the stream that enters the first layer to be run again.
        said: the likeliest next token.
        last: the logits behind the prompt, if they were asked for.
    """

    held: dict[str, Tensor]
    said: int
    last: Tensor | None


class Runs:
    """Runs of prompts of one model, kept for any number of exchanges at some sites: no prompt is run twice.

    Cost:     a forward a prompt; of each, a vector of every site and position, and of the stream behind each site.
    Check:    exchanges with kept runs equal those without; tests/laws/test_subspaces.py.

    Args:
        model: a causal model.
        sites: addresses, each one site of one layer.
    """

    def __init__(self, model: Model, sites: Sequence[str]) -> None:
        self.model, self._kept = model, dict[tuple[int, ...], Kept]()
        self._enters = {str(parse(site)): _enters(model, site) for site in sites}
        self._wanted = list(dict.fromkeys([*self._enters, *filter(None, self._enters.values())]))

    @property
    def sites(self) -> tuple[str, ...]:
        """Their addresses."""
        return tuple(self._enters)

    def __len__(self) -> int:
        return len(self._kept)

    def run(self, rows: Iterable[tuple[int, ...]], logits: Collection[tuple[int, ...]] = ()) -> None:
        """Run those of some prompts that were not run yet, and keep the logits behind some of them."""
        every = {**dict.fromkeys(rows), **dict.fromkeys(logits)}
        new = [r for r in every if r not in self._kept or (r in logits and self._kept[r].last is None)]
        done = 0
        for some in _parts(sorted(new, key=len), AT_ONCE, len):
            run = self.model.run([list(tokens) for tokens in some], capture=self._wanted)
            for i, (tokens, (first, n)) in enumerate(zip(some, run.batch.spans, strict=True)):
                held = {a: run[a][i, first : first + n].reshape(n, -1).clone() for a in self._wanted}
                last = run.logits[i, first + n - 1]
                self._kept[tokens] = Kept(held, int(last.argmax()), last.clone() if tokens in logits else None)
            done += len(some)
            current().report("running prompts", done, len(new))

    def __getitem__(self, tokens: tuple[int, ...]) -> Kept:
        return self._kept[tokens]

    def enters(self, site: str, tokens: tuple[int, ...]) -> Tensor:
        """The stream [pos, d_model] that enters the first layer to be run again when a site is changed."""
        return self._kept[tokens].held[self._enters[site]]


class Exchange:
    """Swaps at one site of one model, ready to be run.

    Attributes:
        swaps: the interchanges.
        base, source: [swap, d] what the site holds at their two places, in float32 or finer.
        said: the token by which the model continues each base prompt without a swap.
        known: whether that is the base's own answer; of a pair, whether the model prefers that to the label.
    """

    def __init__(self, model: Model, site: str, swaps: Sequence[Swap], runs: Runs | None = None) -> None:
        if not swaps:
            raise error(PromptError, "there is nothing to swap", do="give at least one swap")
        for number, s in enumerate(swaps):
            for tokens, place in ((s.base, s.base_at), (s.source, s.source_at)):
                if not 0 <= place < len(tokens):
                    got, allowed = f"position {place}", f"0 to {len(tokens) - 1}"
                    what = f"swap {number} has a place outside its prompt"
                    raise error(PromptError, what, got=got, allowed=allowed, do="count tokens")
        self.model, self.swaps, self._site = model, tuple(swaps), site_of(model, site)
        self.address = str(parse(site))
        self._dims = len(self._site.spec.dims)
        last = model.anatomy.n_layers - 1
        layer = self._site.layer
        self._direct = self._site.name == "resid_pre" or (self._site.name == "resid_post" and layer != last)
        self._start = start_of(model, self._site)
        self._final = f"{last}.resid_post"
        self._readable = _readable(model) and (layer is not None or self._site.name == "embed")
        self._streams: list[Tensor] = []
        self.runs = Runs(model, [self.address]) if runs is None else runs
        self.base, self.source, self.said, self.known = self._look()

    def __len__(self) -> int:
        return len(self.swaps)

    @property
    def width(self) -> int:
        """Of the site's vectors."""
        return self.base.shape[1]

    @property
    def labels(self) -> Int[Tensor, " swap"]:
        """The token that each should give."""
        return torch.tensor([s.label for s in self.swaps], device=self.model.device)

    def with_swaps(self, swaps: Sequence[Swap]) -> Exchange:
        """The same prompts and places with other labels; nothing is run again."""
        made = object.__new__(Exchange)
        made.__dict__ |= self.__dict__ | {"swaps": tuple(swaps)}
        return made

    def _look(self) -> tuple[Tensor, Tensor, list[int], list[bool]]:
        """What the site holds at the places of all swaps, and what the model says; keeps the streams it starts from."""
        runs, pairs = self.runs, {s.base for s in self.swaps if s.pair}
        runs.run([tokens for s in self.swaps for tokens in (s.base, s.source)], pairs)
        said = [runs[s.base].said for s in self.swaps]
        known = [self._prefers(s) if s.pair else one == s.own for s, one in zip(self.swaps, said, strict=True)]
        if self._start is not None:
            self._streams = [runs.enters(self.address, s.base) for s in self.swaps]
            self._check()
        base = torch.stack([runs[s.base].held[self.address][s.base_at] for s in self.swaps])
        source = torch.stack([runs[s.source].held[self.address][s.source_at] for s in self.swaps])
        return at_least_float32(base), at_least_float32(source), said, known

    def _prefers(self, swap: Swap) -> bool:
        """Whether the model prefers a base's own answer to the label."""
        last = self.runs[swap.base].last
        return last is not None and bool(last[swap.own] > last[swap.label])

    def _check(self) -> None:
        """Start in the middle only where that gives what a whole run gives; else run whole."""
        few = list(range(min(2, len(self.swaps))))
        whole = self.model.run([list(self.swaps[i].base) for i in few])
        wanted = torch.stack([whole.logits[i, a + n - 1] for i, (a, n) in zip(few, whole.batch.spans, strict=True)])
        try:
            found = self.logits(few)
            allowed = max(CLOSE, ROUNDINGS * torch.finfo(self.model.dtype).eps)
            near = (found - wanted).abs().max() <= allowed * wanted.float().std()
        except (EditError, SiteError):
            near = False
        if not bool(near):
            self._start, self._streams, self._direct, self._readable = None, [], False, False

    def logits(
        self, which: Sequence[int], new: Float[Tensor, "n d"] | None = None, *, grad: bool = False
    ) -> Float[Tensor, "n vocab"]:
        """The logits after the base prompts of some swaps, where the site holds new vectors at their places.

        Args:
            which: the numbers of the swaps.
            new: a vector for each; none leaves the runs as they are.
            grad: whether gradients reach `new`.
        """
        swaps = [self.swaps[i] for i in which]
        batch = self.model.to_batch([list(s.base) for s in swaps])
        columns = torch.tensor([a + s.base_at for s, (a, _) in zip(swaps, batch.spans, strict=True)])
        columns = columns.to(self.model.device)

        def put(x: Tensor) -> Tensor:
            if new is None:
                return x
            index = (torch.arange(len(x), device=x.device), columns)
            return x.index_put(index, new.to(x.dtype).reshape(len(x), *x.shape[2:]))

        options: dict[str, Any] = {}
        edits: list[Edit] = []
        if self._start is not None:
            width = batch.tokens.shape[1]
            enters = torch.stack(
                [_padded(self._streams[i], a, width) for i, (a, _) in zip(which, batch.spans, strict=True)]
            )
            options = {"start_at": self._start, "given": put(enters) if self._direct else enters}
        if not (self._direct and self._start is not None) and new is not None:
            edits = [Apply(self.address, put)]
        last = torch.tensor([a + n - 1 for a, n in batch.spans], device=self.model.device)
        rows = torch.arange(len(swaps), device=self.model.device)
        if self._readable and self._final != self.address:
            run = self.model.run(batch, self._final, edits, logits=False, grad=grad, **options)
            return self.model.unembed(run[self._final][rows, last])
        return self.model.run(batch, (), edits, grad=grad, **options).logits[rows, last]

    def gaps(
        self, part: Subspace | Callable[[Tensor], Tensor], *, stage: str = "swapping"
    ) -> tuple[Int[Tensor, " swap"], Float[Tensor, " swap"]]:
        """What the model says with a subspace, or part(source - base), swapped, and logit(label) - logit(own)."""
        said = torch.zeros(len(self), dtype=torch.long)
        gaps = torch.zeros(len(self), dtype=torch.float64)
        own = torch.tensor([s.own for s in self.swaps], device=self.model.device)
        order = sorted(range(len(self)), key=lambda i: len(self.swaps[i].base))
        done = 0
        for some in _parts(order, AT_ONCE, lambda i: len(self.swaps[i].base)):
            with torch.no_grad():
                base, source = self.base[some], self.source[some]
                moved = part.moved(base, source) if isinstance(part, Subspace) else part(source - base)
                logits = self.logits(some, base + moved).double()
            said[some] = logits.argmax(-1).cpu()
            both = (logits.gather(-1, ids[some].unsqueeze(-1)).squeeze(-1) for ids in (self.labels, own))
            label, rest = both
            gaps[some] = (label - rest).cpu()
            done += len(some)
            current().report(stage, done, len(self))
        return said, gaps

    def hits(self, part: Subspace | Callable[[Tensor], Tensor], *, stage: str = "swapping") -> Float[Tensor, " swap"]:
        """[swap] 1 where the model then says the label, of a pair prefers it to the base's own answer; else 0."""
        said, gaps = self.gaps(part, stage=stage)
        return self.reached(said, gaps)

    def reached(self, said: Int[Tensor, " swap"], gaps: Float[Tensor, " swap"]) -> Float[Tensor, " swap"]:
        """[swap] 1 where a label is reached, by what `gaps` gives."""
        pair = torch.tensor([s.pair for s in self.swaps])
        return torch.where(pair, gaps > 0, said == self.labels.cpu()).double()


def start_of(model: Model, site: Site) -> int | None:
    """The first layer to be run again when a site is changed; None where all are."""
    last = model.anatomy.n_layers - 1
    return None if site.layer is None else site.layer + int(site.name == "resid_post" and site.layer != last)


def _enters(model: Model, site: str) -> str:
    """The address of the stream that enters the first layer to be run again; empty where all are."""
    found = site_of(model, site)
    start = start_of(model, found)
    if start is None:
        return ""
    return f"{start}.resid_pre" if start == found.layer else str(parse(site))


def _readable(model: Model) -> bool:
    try:
        model.require_readable()
    except SiteError:
        return False
    return True


def _padded(x: Tensor, first: int, width: int) -> Tensor:
    """A stream [pos, d] in a row of `width` columns that begins at a column; zeros, which nothing sees, elsewhere."""
    row = x.new_zeros(width, x.shape[1])
    row[first : first + len(x)] = x
    return row


def _parts(items: Sequence[T], most: int, length: Callable[[T], int]) -> Iterator[list[T]]:
    """Items, sorted by length, in parts of at most so many tokens."""
    part: list[T] = []
    for item in items:
        if part and (len(part) + 1) * length(item) > most:
            yield part
            part = []
        part.append(item)
    if part:
        yield part
