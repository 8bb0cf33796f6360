"""What holds of every method that is declared; a method is named here only where it needs other prompts."""

from __future__ import annotations

import copy
import itertools
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from tests import families, twins
from tests.contract.refused import REFUSED

import microtome as mt
from microtome.explain._forward_tuning import WINDOWS
from microtome.method import Change, Measure, Parameter, Question, RepeatedTokens, Text, choices_of, declared
from microtome.method._result import column_of
from microtome.method.runner import measure
from microtome.stream import OF_MEANS, TokenBatch
from microtome.tasks import Pair, Task

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("scenario_traces",)
"""What asks in texts, which the tokenizer here has none of: tests/real and the tests of the method itself try it."""
METHODS = {name: method for name, method in mt.methods().items() if name not in TEXTS}
KINDS = ("llama-gqa", "gpt2", "bloom", "gpt_neox-parallel", "falcon-mqa", "mistral", "gpt_bigcode-mqa")
"""A tiny model of each kind: grouped heads, one key per head, attention of its own, parallel, shared keys, a window, a
trunk that gives what it returns the shape of the tokens."""

OF_EXPERTS = ("expert_neurons",)
"""What only mixtures have."""

PROMPT = [7, 20, 33, 41, 52, 60]
OTHER = [7, 20, 34, 41, 52, 60]
GIVEN: dict[str, Any] = {
    "prompt": PROMPT, "clean": PROMPT, "prompts": [PROMPT, OTHER, PROMPT[::-1]], "answer": 11, "foil": 23,
    "subject": (1, 3), "keys": (1, 3), "samples": 3, "controls": 8, "top": 3, "verify": 3,
    "sites": ["mlp_out", "attn.z[head]"], "tokens": 60, "pairs": 4, "span": (1, 3),
    "heads": "1.attn.z[0]", "without": "1.attn.z[0]", "sentences": [(0, 2), (2, 4)],
    "texts": [PROMPT, OTHER, PROMPT[::-1]],
    "data": [{"text": [7 + 5 * i, 20 + i, 33, 41 + i % 5, 52 + 3 * i % 7], "label": "ab"[i % 2]} for i in range(12)],
    "folds": 3,
    "context": OTHER, "query": PROMPT, "tests": 8,
    "numbers": list(range(5, 25)), "task": [([i], [100 - i % 4]) for i in range(5, 50)],
    "tasks": {name: [([i + 9 * k], [(i * k) % 90 + 5]) for i in range(5, 50)] for k, name in enumerate("abcd", 1)},
}  # fmt: skip
"""Arguments by name, for every method that has them; a new method is tried with these and its own defaults."""


class Reader:
    """A tokenizer without text: every fifth token is a mark, all others are words."""

    bos_token_id, eos_token_id, all_special_ids = None, None, ()

    def decode(self, ids: list[int], **_: object) -> str:
        return "," if ids[0] % 5 == 0 else f" w{ids[0]}"


@cache
def model(kind: str) -> mt.Model:
    return mt.open(twins.build(kind), tokenizer=Reader(), prove=False)


@cache
def untold(kind: str) -> mt.Model:
    return mt.open(twins.build(kind), prove=False)


def rows(count: int = 8, length: int = 12) -> torch.Tensor:
    return torch.randint(5, families.VOCAB, (count, length), generator=torch.Generator().manual_seed(0))


def batches() -> list[TokenBatch]:
    tokens = rows(8)
    return [TokenBatch.of(tokens[i : i + 2], torch.arange(i, i + 2) * 12) for i in (0, 2, 4, 6)]


def two_groups() -> dict[str, torch.Tensor]:
    """For measures that compare groups."""
    return {"one": rows(), "two": rows().flip(0, 1) % 60 + 5}


def parameters(name: str) -> tuple[Parameter, ...]:
    made: Any = declared(name)
    return (*made.parameters, *made.look_parameters) if isinstance(made, Measure) else made.parameters


@cache
def said(kind: str) -> dict[int, int]:
    """What a tiny model says behind each of some prompts, by the word in which they differ."""
    words = range(20, 44)
    logits = untold(kind).run([[7, word, 33, 41] for word in words]).logits
    assert logits is not None
    return dict(zip(words, logits[:, -1].argmax(-1).tolist(), strict=True))


def answered(kind: str) -> Task:
    """Pairs that a tiny model answers: what it says of its own."""
    own = said(kind)
    pairs = [(a, b) for a, b in itertools.pairwise(own) if own[a] != own[b]]
    made = tuple(
        Pair("", "", (7, a, 33, 41), (7, b, 33, 41), str(own[a]), str(own[b]), (own[a],), (own[b],), {"end": (3, 4)})
        for a, b in pairs
    )
    return Task("own", "its own answers", made, {"seed": 0})


@cache
def circuit_of(kind: str) -> str:
    """A file of a circuit of the model."""
    path = Path(tempfile.mkdtemp()) / "circuit.safetensors"
    mt.circuits.find(model(kind), PROMPT, OTHER, method="eap", answer=11, foil=23, edges=0.3).save(path)
    return str(path)


def own_of(name: str, kind: str) -> dict[str, Any]:
    """Arguments that only some methods have: a circuit of the model, or a program that says what it says."""
    if name in ("faithfulness", "completeness", "roles"):
        return {"circuit": circuit_of(kind), "corrupt": list(OTHER)}
    if name == "signals":
        return {"head": "1.attn.z[2]", "query": -1}
    if name == "repair":
        return {"query": -1}
    if name == "condition_heads":
        other = {"clean": OTHER, "corrupt": PROMPT, "answer": 12, "foil": 24}
        return {"other": other, "edges": 0.3, "resamples": 4}
    if name == "patching_grid":  # which needs a probability that changes clearly
        logits = model(kind).run(PROMPT).logits
        assert logits is not None
        return {"answer": int(logits[0, -1].argmax()), "foil": int(logits[0, -1].argmin())}
    if name in ("interchange", "token_interchange"):
        own = said(kind)
        write = (
            (lambda given, *_: [7, given["word"], 33, 41])
            if name == "interchange"
            else (lambda given, held: [7, held["word"], 33, 41])
        )
        given = {"program": lambda word, let: own[let("word", word)], "inputs": [{"word": w} for w in own]}
        return given | {"write": write, "answer": int, "at": {"word": "1.resid_post@1"}, "swaps": 12}
    if name == "das":
        return {"data": answered(kind), "methods": ["das", "random"], "rank": 2, "steps": 2, "controls": ["placebo"]}
    if name == "assess":
        vector = torch.randn(model(kind).anatomy.d_model, generator=torch.Generator().manual_seed(2))
        given = {"after": mt.edit.Add("1.mlp_out", value=vector), "text": rows(), "tokens": 96, "length": 12}
        return given | {"of": ["induction"], "pairs": 8, "sequences": 8, "prompts": 8, "new": 8}
    if name == "split_direction":
        return {"swaps": answered(kind), "site": "1.mlp.post", "steps": 2, "rank": 1}
    return {}


def arguments(name: str, kind: str) -> dict[str, Any]:
    """Arguments with which a method can be tried on a tiny model."""
    found = {p.name: copy.deepcopy(GIVEN[p.name]) for p in parameters(name) if p.name in GIVEN}
    names = {p.name for p in parameters(name)}
    if "corrupt" in names and "clean" in names:
        found["corrupt"] = list(OTHER)
    if name in ("function_vector", "false_demonstrations", "task_vectors"):
        found["heads"] = 3
    if name == "on_off":
        found["text"] = rows(1)
    if name == "forward_tuning" and any(getattr(model(kind).hf.config, window, None) for window in WINDOWS):
        found["rounds"] = 1
    if name in ("causal_basis", "exits"):
        found |= {"text": rows(), "size": 48, "length": 12, "directions": 3, "controls": 2, "steps": 1}
    if name == "exits":
        found |= {"tokens": [11, 23], "without": [PROMPT[1:], OTHER[1:], PROMPT[:1]]}
    if name in ("attribution_check", "diff_roar"):
        found |= {"estimates": ["gradient", "random"], "null": (1, 3), "every": 1}
    if name == "diff_roar":
        own = int(model(kind).run(rows(12)[-1:]).logits[0, -1].argmax())
        found |= {"prompts": rows(12).tolist(), "answers": [own] * 12, "steps": 12, "rows": 4, "lr": 0.02}
    found |= own_of(name, kind)
    if name == "referee":
        found = {"of": ["induction"], "pairs": 1, "top": 3, "programs": 0, "trained": 0, "estimates": ["atp", "eap"]}
        names = set(found)
    if name == "excite":
        found |= {"unit": "1.mlp.post[2]", "steps": 2, "starts": 2}
    if name == "helix":  # which needs more numbers than other questions need prompts
        found |= {"prompts": [[7, 20 + i, 33] for i in range(24)], "numbers": list(range(24)), "position": 1}
        found |= {"periods": [2.0, 5.0], "layers": [0, 2]}
    if name == "fourier_neurons":  # whose prompts have every number at some place
        found["prompts"] = [[7, number, 33] for number in found["numbers"]]
        found |= {"answers": [0] * 20, "shares": [0.5], "controls": 2}
    if name == "weight_mask":  # which at its default steps learns longer than it must here
        found |= {"text": rows(12), "sites": ["1.mlp_out"], "steps": 12, "sparsity": 0.01, "draws": 1}
    if name == "circuit":
        found["edges"] = 0.3  # of some 260: the default is a share of many thousands
    if "scores" in names:
        found["scores"] = mt.explain.attribute(model(kind), PROMPT, OTHER, answer=11, foil=23, verify=0)
        found = {"scores": found["scores"], "top": 3}
    return {k: v for k, v in found.items() if k in names}


PLANTED: dict[str, Callable[[], mt.planted.Planted]] = {
    "circuit_recovery": lambda: mt.planted.program("successors"),
    "node_recovery": lambda: mt.planted.trained("repeats"),
}
"""What methods of planted models are tried on."""


def subject(name: str, kind: str) -> Any:
    """What a method is tried on: a tiny model, or for those that take a planted one, that."""
    if name in ("assess", "referee"):  # whose tasks are of random ids where there is no tokenizer
        return untold(kind)
    return PLANTED[name]() if name in PLANTED else model(kind)


def run(name: str, kind: str, *, seed: int = 0, given: Mapping[str, Any] | None = None) -> Any:
    made = declared(name)
    own = arguments(name, kind) if given is None else dict(given)
    with mt.settings(seed=seed):
        if isinstance(made, Measure):
            options = {p.name for p in parameters(name)} & {"top", "period", "sequences", "examples"}
            chosen = {k: v for k, v in own.items() if k in options}
            if isinstance(made.on, RepeatedTokens):
                return measure(subject(name, kind), name, sequences=8, period=12)
            text = {"text": two_groups() if made.compares else rows()} if isinstance(made.on, Text) else {}
            return measure(subject(name, kind), name, **text, **chosen)
        if isinstance(made, Question):
            return made.ask(subject(name, kind), own)
        assert isinstance(made, Change)
        return made.make(subject(name, kind), own | {"sites": "1.mlp_out", "text": rows()})


def kinds(name: str) -> tuple[str, ...]:
    own = {**dict.fromkeys(PLANTED, KINDS[:1]), "mlp_roles": KINDS[:3]}
    own |= dict.fromkeys(OF_EXPERTS, ("mixtral", "gpt_oss"))
    return own.get(name, KINDS)


RESULTS = [name for name, method in METHODS.items() if method.kind != "change"]
QUICK = ("llama-gqa", "gpt_neox-parallel", "gpt_bigcode-mqa", "mixtral", "deepseek_v3-qlora", "opt-postnorm", "bert")
"""Kinds that every run of the tests tries; the others are in the slow tier. Besides three of those above: experts,
latent attention, norms that lie on the stream, and attention both ways."""


def slow_but(names: tuple[str, ...], *values: str) -> Any:
    """Parameters of a test, slow where the last of them is not among some names."""
    return pytest.param(*values, marks=[] if values[-1] in names else pytest.mark.slow)


EVERY = [slow_but(QUICK, name, kind) for name in RESULTS for kind in kinds(name)]


@cache
def result(name: str, kind: str) -> xr.Dataset:
    return run(name, kind)


def numbers(data: xr.Dataset) -> dict[str, np.ndarray]:
    return {str(n): v.values.astype(float) for n, v in data.data_vars.items() if v.dtype.kind in "fiub"}


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_its_variables_are_those_it_declares(name: str, kind: str) -> None:
    method, data = METHODS[name], result(name, kind)
    assert data.data_vars
    for variable, x in data.data_vars.items():
        column, ending = column_of(method, str(variable))
        assert column is not None, variable
        exact = None if ending else column if column.name == variable else None
        assert x.attrs["unit"], variable
        assert x.attrs["meaning"], variable
        if column.dims is not None and exact is not None:
            assert tuple(x.dims) == (*column.dims, *column.extra), variable
        values = x.values.astype(float) if x.dtype.kind in "fiu" else None
        if exact is not None and values is not None:
            low, high = column.range
            known = values[np.isfinite(values)]
            assert low is None or (known >= low - 1e-6).all(), variable
            assert high is None or (known <= high + 1e-6).all(), variable
        if f"{variable}_lo" in data:
            low, high = (data[f"{variable}_{end}"].values for end in ("lo", "hi"))
            there = np.isfinite(low)
            slack = 1e-9 + 1e-9 * np.abs(values[there])
            assert (low[there] <= values[there] + slack).all(), variable
            assert (values[there] <= high[there] + slack).all(), variable
    told = data.attrs.get("interval")
    ends = any(str(v).endswith("_lo") for v in data.data_vars)
    assert told == (OF_MEANS if ends else None) or (ends and told.startswith("95 % over groups: "))
    for attribute in ("fingerprint", "seed", "source", "question", "seconds"):
        assert attribute in data.attrs


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_each_column_is_given_minus_its_control(name: str, kind: str) -> None:
    data = result(name, kind)
    for column in METHODS[name].columns:
        pair = [data[of] for of in (column.name, column.control) if of in data]
        if len(pair) == 2 and all(x.dtype.kind in "fiu" for x in pair) and set(pair[1].dims) <= set(pair[0].dims):
            less = data[f"{column.name}_diff"]
            assert less.dims == pair[0].dims
            assert np.allclose(less, (pair[0] - pair[1]).transpose(*less.dims), atol=1e-9, equal_nan=True)
        else:
            assert f"{column.name}_diff" not in data


@pytest.mark.parametrize("name", METHODS)
def test_it_depends_on_the_seed_alone(name: str) -> None:
    one, two = (run(name, kinds(name)[0], seed=5) for _ in range(2))
    if isinstance(one, list):
        assert one == two
    else:
        assert one.equals(two)
        assert _untimed(one.attrs) == _untimed(two.attrs)


def _untimed(attrs: Mapping[Any, Any]) -> dict[Any, Any]:
    """Attributes without what depends on the speed of the machine."""
    return {k: v for k, v in attrs.items() if not k.startswith("seconds") and k != "plan"}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one.identical(other) if isinstance(one, xr.Dataset) else one == other


@pytest.mark.parametrize("name", METHODS)
def test_it_changes_neither_its_arguments_nor_the_model(name: str) -> None:
    own = subject(name, kinds(name)[0])
    held = own if isinstance(own, mt.Model) else own.model
    before, given = held.fingerprint, arguments(name, kinds(name)[0])
    kept = copy.deepcopy(given)
    run(name, kinds(name)[0], given=given)
    assert given.keys() == kept.keys()
    assert all(_same(given[key], kept[key]) for key in kept)
    assert held.fingerprint == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in held.hf.modules())


MEASURES = [n for n, m in METHODS.items() if m.kind == "measure" and isinstance(declared(n).on, Text)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", MEASURES)
def test_the_order_of_the_batches_does_not_matter(name: str) -> None:
    given = batches()
    if declared(name).compares:  # type: ignore[attr-defined]
        given = [replace(b, group=b.group + number % 2) for number, b in enumerate(given)]
    forth, back = (measure(model(kinds(name)[0]), name, text=some) for some in (given, given[::-1]))
    looked = declared(name).on  # type: ignore[attr-defined]
    if looked.sequences is not None:
        assert looked.sequences >= 8, "then it would read other rows"
    for key, x in numbers(forth).items():
        assert np.allclose(x, numbers(back)[key], rtol=1e-9, atol=1e-9, equal_nan=True), key


SEVERAL = [
    n for n in RESULTS if {"prompts", "clean"} & {p.name for p in parameters(n)} and n in ("patch", "component_effects")
]


@pytest.mark.parametrize("name", SEVERAL)
def test_the_order_of_the_prompts_does_not_matter(name: str) -> None:
    first = "prompts" if "prompts" in {p.name for p in parameters(name)} else "clean"
    own = arguments(name, "llama-gqa") | {"answer": [11, 12, 13], "foil": [23, 24, 25]}
    own[first] = [PROMPT, OTHER, PROMPT[::-1]]
    if first == "clean":
        own["corrupt"] = [OTHER, PROMPT, [60, 52, 41, 34, 20, 7]]
        own["share"] = False
    turned = {k: v[::-1] if isinstance(v, list) and len(v) == 3 else v for k, v in own.items()}
    forth, back = (run(name, "llama-gqa", given=given) for given in (own, turned))
    for key, x in numbers(forth).items():
        if not key.endswith(("_lo", "_hi", "_p", "_each")) and "example" not in forth[key].dims:
            assert np.allclose(x, numbers(back)[key], atol=1e-6, equal_nan=True), key


LIMITS = [
    (name, p.name, wrong)
    for name in METHODS
    for p in parameters(name)
    if p.argument is not None
    for wrong in (
        [p.argument.least - 1] if p.argument.least is not None else []
    ) + ([p.argument.most + 1] if p.argument.most is not None else []) + (["sideways"] if choices_of(p) else [])
]  # fmt: skip


def tried(made: Any, name: str, change: Mapping[str, Any]) -> None:
    """Call a method with one argument changed."""
    given = arguments(name, "llama-gqa") | change
    if isinstance(made, Measure):
        measure(model("llama-gqa"), name, text=rows(), **change)
    elif isinstance(made, Question):
        made.ask(subject(name, "llama-gqa"), given)
    else:
        made.make(model("llama-gqa"), given | {"sites": "1.mlp_out", "text": rows()})


@pytest.mark.parametrize(("name", "argument", "wrong"), LIMITS)
def test_each_limit_is_refused_by_its_text(name: str, argument: str, wrong: Any) -> None:
    value = wrong if isinstance(wrong, str) else int(wrong)
    with pytest.raises(mt.errors.ArgumentError) as refused:
        tried(declared(name), name, {argument: value})
    assert re.match(rf"{argument} (must be|names nothing)", str(refused.value))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_what_it_measures_is_not_all_below_rounding(name: str, kind: str) -> None:
    sizes = {key: np.nanmax(np.abs(x)) for key, x in numbers(result(name, kind)).items() if np.isfinite(x).any()}
    assert max(sizes.values(), default=0.0) > 1e-5


UNTOLD = {"das": ("isolate", "disentangle"), "completeness": ("minimal_control",), "probe": ("selectivity",)}
UNTOLD |= {"condition_heads": ("damage", "damage_random", "selective", "selective_random")}
"""Columns of which nothing is known here: pairs isolate nothing, no node may lie outside, and no label repeats."""


@pytest.mark.parametrize(
    "kind",
    [slow_but(QUICK[2:], name) for name in families.NAMES],
)
def test_every_method_runs_on_every_family_that_opens(kind: str) -> None:
    """Or it is refused by name, and just those that cannot be asked are."""
    refused: dict[str, str] = {}
    for name in METHODS:
        if name in PLANTED:
            continue
        try:
            made = run(name, kind)
        except mt.errors.MicrotomeError as problem:
            refused[name] = str(problem)
            continue
        if isinstance(made, xr.Dataset):  # intervals of few examples may have no ends
            own = {column.name for column in METHODS[name].columns}
            empty = {key for key, x in numbers(made).items() if key in own and not np.isfinite(x).any()}
            assert empty <= set(UNTOLD.get(name, ())), name
    lacks = set() if "mlp.experts.post" in {site.name for site in model(kind).anatomy.hook_points} else set(OF_EXPERTS)
    assert refused.keys() == REFUSED.get(kind, set()) | lacks
    assert all("To do: " in text and "\n" not in text for text in refused.values())


NOUGHT = {
    "gap", "circuit_recovery.score", "memorised", "dead", "ngram_order", "zeros", "sink_tokens", "sink_births",
    "unselectable", "unselectable_equal", "polysemy", "polysemy_shuffled", "error", "kl", "outlier", "accuracy",
    "random_accuracy", "state_accuracy", "with_vector", "with_random", "with_state", "zero_shot", "few_shot",
    "shuffled_shot", "shuffled_accuracy", "control_accuracy", "gap_without", "gap_random", "follows_unchanged", "keeps",
    "accuracy_control", "answered", "right_before", "right", "right_random",
}  # fmt: skip
"""Columns that are zero on every tiny model: what exact sums leave, by their law; what random weights have not, or
cannot do; and keys inside the hull of others, of which a dozen in ten dimensions has none."""


@pytest.mark.parametrize("name", RESULTS)
def test_each_column_is_more_than_rounding_somewhere(name: str) -> None:
    most: dict[str, float] = {}
    for kind in kinds(name):
        for key, x in numbers(result(name, kind)).items():
            if np.isfinite(x).any():
                most[key] = max(most.get(key, 0.0), float(np.nanmax(np.abs(x))))
        silent = {column.name for column in METHODS[name].columns if most.get(column.name, 1.0) < 1e-5}
        if silent <= NOUGHT:
            return
    raise AssertionError(silent)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.kind == "change"])
def test_a_change_is_edits_that_change_something(name: str, kind: str) -> None:
    edits = run(name, kind)
    assert edits
    plain, edited = (model(kind).run([PROMPT], edits=some).logits for some in ([], edits))
    assert float((plain - edited).abs().max()) > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_its_check_exists_and_its_call_is_code(name: str) -> None:
    method = METHODS[name]
    for part in method.check.split(","):
        assert (ROOT / part.strip()).exists(), part
    compile(method.call, name, "eval")


def test_the_page_of_all_methods_is_current() -> None:
    from microtome.method.__main__ import text

    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == text(), "run `make methods`"
