"""What an open model is checked against: plain PyTorch hooks and plain transformers.

Each check takes a `Subject` and returns a `Gap`: the largest difference, and how large what is compared is. It raises
`DoesNotApply` where there is nothing to compare, says why, and a refusal of the engine (`MicrotomeError`) is no fault.
Prompts have 40 tokens, more than every window, top-k and chunk of the recipes in `family_configs`.
"""

import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from family_configs import build, prompt
from torch import Tensor, nn

import microtome as mt
from microtome.anatomy import Site

LENGTH, SHORT, NEW = 40, 23, 6
ANSWER, FOIL = 11, 23
IDS = prompt(2, LENGTH)
TOLERANCE = 1e-3  # of a gap, as a share of the effect


class DoesNotApply(Exception):
    """There is nothing to compare, and why."""


@dataclass(frozen=True)
class Gap:
    """The largest difference, how large what is compared is, and where the difference was."""

    gap: float
    effect: float
    where: str = ""
    exact: bool = False  # to the bit

    @property
    def holds(self) -> bool:
        return self.gap == 0.0 if self.exact else self.gap <= TOLERANCE * self.effect


class Subject:
    """An open model, and what is looked up about it."""

    def __init__(self, model: mt.Model, model_type: str) -> None:
        self.model, self.hf, self.model_type = model, model.hf, model_type
        self.a = model.anatomy
        self.ids = IDS
        self.layers = range(self.a.n_layers)

    def has(self, name: str, layer: int | None = None) -> bool:
        return Site(name, layer) in self.a.hook_points

    def module(self, name: str, layer: int, side: str) -> nn.Module:
        """The module on which a plain hook finds a site.

        Raises:
            DoesNotApply: the site is not simply one side of a module.
        """
        point = self.a.hook_points.get(Site(name, layer))
        if point is None:
            raise DoesNotApply(f"no {name} in layer {layer}")
        if point.side != side or point.split is not None or point.scale != 1.0:
            raise DoesNotApply(f"{layer}.{name} is not the {side} of one module")
        return self.hf.get_submodule(point.module)

    def modules(self, name: str, layers: Iterable[int]) -> dict[int, nn.Module]:
        """The modules on which plain hooks find a site, by layer, of the layers where it is the input of one.

        Raises:
            DoesNotApply: in no layer.
        """
        found, reason = {}, DoesNotApply(f"no {name}")
        for layer in layers:
            try:
                found[layer] = self.module(name, layer, "input")
            except DoesNotApply as problem:
                reason = problem
        if not found:
            raise reason
        return found

    def plain(self, ids: Tensor, **more: Any) -> Any:
        with torch.inference_mode():
            return self.hf(input_ids=ids, **more)


Change = Callable[[Tensor], Tensor]


@contextmanager
def changed_input(module: nn.Module, change: Change) -> Iterator[None]:
    """Change what a module reads, by a plain hook."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args and isinstance(args[0], Tensor):
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def far(one: Tensor, other: Tensor) -> float:
    """The largest difference; two values that are no numbers are the same."""
    if one.shape != other.shape:
        raise AssertionError(f"shapes {tuple(one.shape)} and {tuple(other.shape)}")
    gap = (one.double() - other.double()).abs()
    return (
        float(gap[~(one.isnan() & other.isnan()) & (one != other)].nan_to_num(nan=torch.inf).amax())
        if (gap.numel() and bool((one != other).any()))
        else 0.0
    )


def size(x: Tensor) -> float:
    """The largest size of what is a number."""
    x = x[x.isfinite()]
    return float(x.abs().max()) if x.numel() else 0.0


def widest(gaps: list[Gap]) -> Gap:
    """The worst of several."""
    return max(gaps, key=lambda g: (not g.holds, g.gap / max(g.effect, 1e-12)))


def inert(s: Subject) -> Gap:
    """Logits with every present site watched are those of the model before it was opened, to the bit."""
    sites = [str(site) for site in s.a.hook_points]
    with torch.inference_mode():
        plain = build(s.model_type)(input_ids=s.ids).logits
    return Gap(far(s.model.run(s.ids, capture=sites).logits, plain), size(plain), exact=True)


def stream(s: Subject) -> Gap:
    """`resid_pre` and `resid_post` are the hidden states that transformers returns, but for the last, normed, one.

    Some families return what leaves each layer, all others what enters it.
    """
    given = s.plain(s.ids, output_hidden_states=True)
    states = getattr(given, "hidden_states", None)
    if states is None:
        raise DoesNotApply("transformers returns no hidden states")
    n = s.a.n_layers
    if len(states) != n + 1:
        raise DoesNotApply(f"transformers returns {len(states)} hidden states for {n} layers")
    run = s.model.run(s.ids, capture=["*.resid_pre", "*.resid_post"])
    if any(state.shape != run["0.resid_pre"].shape for state in states):
        raise DoesNotApply(f"transformers returns hidden states of shape {tuple(states[0].shape)}")
    enters = [("resid_pre", layer, states[layer]) for layer in s.layers]
    enters += [("resid_post", layer, states[layer + 1]) for layer in s.layers[:-1]]
    leaves = [("resid_post", layer, states[layer]) for layer in s.layers]
    leaves += [("resid_pre", layer + 1, states[layer]) for layer in s.layers[:-1]]
    either = [
        widest([Gap(far(run[f"{at}.{name}"], x), size(x), f"{at}.{name}") for name, at, x in some])
        for some in (enters, leaves)
    ]
    return min(either, key=lambda gap: gap.gap)


def end(s: Subject) -> Gap:
    """With the last `resid_post` of another prompt in the place of its own, a prompt has that prompt's logits."""
    site = f"{s.a.n_layers - 1}.resid_post"
    other = prompt(2, LENGTH, seed=1)
    given = s.model.run(other, capture=[site])[site]
    edited = s.model.run(s.ids, edits=mt.edit.Set(site, value=given)).logits
    expected = s.plain(other).logits
    return Gap(far(edited, expected), far(s.plain(s.ids).logits, expected))


def patterns(s: Subject) -> Gap:
    """`attn.pattern` is what transformers returns as attentions under its eager attention."""
    there = [layer for layer in s.layers if s.has("attn.pattern", layer)]
    if not there:
        raise DoesNotApply("no attn.pattern")
    try:
        eager = build(s.model_type, "eager")
        with torch.inference_mode():
            out = eager(input_ids=s.ids, output_attentions=True)
    except Exception as problem:
        raise DoesNotApply(f"transformers: {first_line(problem)}") from problem
    plain = s.plain(s.ids).logits
    if far(out.logits, plain) > TOLERANCE * size(plain):
        raise DoesNotApply(f"transformers' eager attention gives logits that differ by {far(out.logits, plain):.1e}")
    given = [x for x in (out.attentions or ()) if isinstance(x, Tensor)]
    if len(given) == s.a.n_layers:
        given = [given[layer] for layer in there]
    if len(given) != len(there):
        raise DoesNotApply(f"transformers returns {len(given)} attentions for {len(there)} layers")
    run = s.model.run(s.ids, capture=[f"{layer}.attn.pattern" for layer in there])
    gaps = []
    for layer, expected in zip(there, given, strict=True):
        got = run[f"{layer}.attn.pattern"]
        if got.shape != expected.shape:
            raise DoesNotApply(f"transformers returns attentions of shape {tuple(expected.shape)}")
        gap = Gap(far(got, expected), size(expected), f"layer {layer}")
        if not gap.holds:  # some return what a sink would have been told of, before it takes its part
            gap = Gap(
                far(got / got.sum(-1, keepdim=True), expected), size(expected), f"layer {layer}, without its sink"
            )
        gaps.append(gap)
    return widest(gaps)


def head(s: Subject) -> Gap:
    """Zeroing one head is zeroing its part of what the output projection reads, in each layer."""
    layers = [layer for layer in s.layers if s.has("attn.z", layer)]
    base, gaps, modules = s.plain(s.ids).logits, [], s.modules("attn.z", layers)
    for layer, projection in modules.items():
        heads = s.a.units(Site("attn.z", layer))
        last = heads - 1

        def ablate(x: Tensor, heads: int = heads, last: int = last) -> Tensor:
            x = x.clone()
            x.unflatten(-1, (heads, -1))[..., last, :] = 0
            return x

        with changed_input(projection, ablate):
            literal = s.plain(s.ids).logits
        edited = s.model.run(s.ids, edits=mt.edit.Zero(f"{layer}.attn.z[{last}]")).logits
        gaps.append(Gap(far(edited, literal), far(base, literal), f"layer {layer}"))
    return widest(gaps)


def sweep(s: Subject) -> Gap:
    """A sweep that zeroes the stream in each layer and position reads what literal forwards read."""
    row = s.ids[:1]
    metric = mt.metric.LogitDifference(ANSWER, foil=FOIL)
    blocks = s.modules("resid_pre", s.layers)
    cells = [mt.edit.Zero(f"{layer}.resid_pre@{at}") for layer in blocks for at in range(LENGTH)]
    literal = []
    for block in blocks.values():

        def ablate(x: Tensor) -> Tensor:  # row r of the batch loses position r
            if x.shape[:2] != (LENGTH, LENGTH):
                raise DoesNotApply(f"blocks read states of shape {tuple(x.shape)}")
            x = x.clone()
            x[torch.arange(LENGTH), torch.arange(LENGTH)] = 0
            return x

        with changed_input(block, ablate):
            logits = s.plain(row.expand(LENGTH, -1)).logits[:, -1]
        literal.append(logits[:, ANSWER] - logits[:, FOIL])
    values = torch.cat(literal)
    base = s.plain(row).logits[0, -1]
    swept = s.model.sweep(row, cells, metric).run()
    worst = int((swept.values - values).abs().nan_to_num(nan=torch.inf).argmax())
    where = f"{list(blocks)[worst // LENGTH]}.resid_pre@{worst % LENGTH}"
    return Gap(far(swept.values, values), size(values - (base[ANSWER] - base[FOIL])), where)


def padding(s: Subject) -> Gap:
    """A short row beside a longer one, padded on either side, has the logits that it has alone."""
    short, long = s.ids[0, :SHORT].tolist(), s.ids[1].tolist()
    alone, gaps = s.plain(s.ids[:1, :SHORT]).logits[0], []
    for side in ("left", "right"):
        run = s.model.run([short, long], padding=side)
        got = run.logits[0][run.mask[0].bool()]
        gaps.append(Gap(far(got, alone), size(alone), f"padded {side}"))
    return widest(gaps)


def generation(s: Subject) -> Gap:
    """A generation under an edit has the logits of full forwards, without a cache, under the same edit by a hook.

    Where `transformers` itself differs with a cache, those of a generation under the hook.
    """
    if not s.a.causal:
        raise DoesNotApply("it looks both ways")
    layer = s.a.n_layers // 2
    block = s.module("resid_pre", layer, "input")
    ids = s.ids[:1]
    with changed_input(block, lambda x: 0.3 * x):
        try:
            row, own = _generated(s.hf, ids)
        except Exception as problem:
            raise DoesNotApply(f"transformers cannot generate: {first_line(problem)}") from problem
        literal = _loop(s, row, ids.shape[1])
    effect = far(_loop(s, row, ids.shape[1]), literal)
    with s.model.editing(mt.edit.Scale(f"{layer}.resid_pre", 0.3)):
        edited, steps = _generated(s.hf, ids)
    if not torch.equal(edited, row):
        return Gap(torch.inf, effect, "in other tokens")
    if far(own, literal) > TOLERANCE * effect:  # transformers' own cache is no cache of what a forward computes
        return Gap(far(steps, own), effect, "beside a generation under the hook")
    return Gap(far(steps, literal), effect, "beside forwards under the hook")


def _generated(hf: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The row with its new tokens, and the logits of each of these."""
    out = hf.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
        num_beams=1, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)[0]


def _loop(s: Subject, row: Tensor, start: int) -> Tensor:
    """The logits of each new token, by a forward of everything before it."""
    return torch.stack([s.plain(row[:, :end], use_cache=False).logits[0, -1] for end in range(start, row.shape[1])])


def contributions(s: Subject) -> Gap:
    """What embedding, heads, MLPs and biases add sums to the difference of two logits, those of the plain model."""
    found = mt.explain.contributions(s.model, s.ids[0].tolist(), answer=ANSWER, foil=FOIL)
    logits = s.plain(s.ids[:1]).logits[0, -1]
    parts = sum(float(found[name].sum()) for name in found.attrs["parts"] if name in found)
    cap = s.a.logit_softcap
    if cap is not None:
        logits = cap * torch.atanh(logits / cap)
    return Gap(abs(parts - float(logits[ANSWER] - logits[FOIL])), size(logits))


CHECKS: dict[str, Callable[[Subject], Gap]] = {
    "no-op": inert,
    "stream": stream,
    "end of the stream": end,
    "patterns": patterns,
    "head": head,
    "sweep": sweep,
    "padding": padding,
    "generation": generation,
    "contributions": contributions,
}


def first_line(problem: BaseException) -> str:
    """One line on an exception: its kind and what it says first, without advice."""
    text = str(problem).strip().partition(" To do: ")[0].splitlines()
    return f"{type(problem).__name__}: {text[0] if text else ''}".rstrip(": ")[:300]


def place(problem: BaseException) -> str:
    """The last line of the package, or of these tools, that an exception passed."""
    own = [f for f in traceback.extract_tb(problem.__traceback__) if "microtome" in f.filename or "tools" in f.filename]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"


def summary(check: Callable[..., Any]) -> str:
    """What a check checks, in one line."""
    return " ".join((inspect.getdoc(check) or "").split())
