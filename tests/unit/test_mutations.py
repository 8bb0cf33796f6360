"""The mutants of a piece of code: each kind of change is found, each applies, and what only speaks is left alone."""

from __future__ import annotations

import ast

import pytest
from tests.scripts import ROOT, script

MUTATIONS = script("tools/mutations.py")


def changes(code: str) -> set[tuple[str, str]]:
    return {(m.kind, m.applied(code)) for m in MUTATIONS.mutants("file.py", code)}


@pytest.mark.parametrize(
    ("code", "kind", "after"),
    [
        ("x = a < b", "comparison", "x = (a <= b)"),
        ("x = a in b", "comparison", "x = (a not in b)"),
        ("x = a * gain", "part left out", "x = (a)"),
        ("x = a - a.mean()", "part left out", "x = (a)"),
        ("x = a * gain", "arithmetic", "x = (a / gain)"),
        ("x = -a", "sign", "x = (a)"),
        ("x = not a", "negation", "x = (a)"),
        ("x = 3", "constant", "x = 4"),
        ("x = 0.5", "constant", "x = 0.25"),
        ("x = True", "constant", "x = False"),
        ("x = a if b else c", "condition", "x = (c if b else a)"),
        ("if a:\n    b()", "condition", "if (not a):\n    b()"),
        ("x = a and b", "and or", "x = (a or b)"),
        ("x = a[1:]", "slice", "x = (a[:])"),
        ("x = a[1:]", "reversed", "x = (a[1:][::-1])"),
        ("x = a[::-1]", "slice", "x = (a[:])"),
        ("x = w.T", "transpose", "x = (w)"),
        ("x = f(a, b)", "arguments", "x = (f(b, a))"),
        ("x = min(a, b)", "least most", "x = (max(a, b))"),
        ("x = a.abs()", "call left out", "x = (a)"),
        ("x = a.sum(dim=-1)", "axis", "x = (a.sum(dim=0))"),
        ("x = (a, b)", "order", "x = ((b, a))"),
        ("SITES = {'mlp': 'mlp_out', 'attn': 'attn_out'}", "order", "SITES = ({'mlp': 'attn_out', 'attn': 'mlp_out'})"),
        ("x += 1", "statement", "pass"),
        ("check(a)", "statement", "pass"),
    ],
)
def test_each_kind_of_change_is_found(code: str, kind: str, after: str) -> None:
    assert (kind, after) in changes(code)


@pytest.mark.parametrize(
    "code",
    [
        '"""1 < 2"""',
        "def f(x: Tensor = None) -> Float[Tensor, 1 + 2]: ...",
        "raise error(Kind, 'text', got=1 + 2)",
        "from a import b",
        "assert a < b",
        "@column(1, 2)\ndef f(): ...",
        "Values = Tensor | float",
        "x = f'{a + b}'",
        "if TYPE_CHECKING:\n    x = 1",
    ],
)
def test_what_only_speaks_is_left_alone(code: str) -> None:
    assert not changes(code)


def test_every_mutant_of_a_file_is_code_and_another_one() -> None:
    path = ROOT / "src" / "microtome" / "explain" / "_contributions.py"
    text = path.read_text(encoding="utf-8")
    found = MUTATIONS.mutants("x.py", text)
    assert len({m.key(text) for m in found}) == len(found) > 100
    plain = ast.dump(ast.parse(text))
    for mutant in found[::7]:
        assert ast.dump(ast.parse(mutant.applied(text))) != plain, mutant
        assert mutant.lines[0] <= mutant.line <= mutant.lines[1]


def test_a_sample_has_every_kind_and_depends_on_the_seed_alone() -> None:
    tool_ = script("tools/mutants.py")
    text = (ROOT / "src" / "microtome" / "explain" / "_effects.py").read_text(encoding="utf-8")
    every = MUTATIONS.mutants("x.py", text)
    first, again, other = (tool_.sampled(every, 15, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 15
    assert len({m.kind for m in first}) >= 10


def test_a_mutant_is_tried_on_the_tests_that_execute_it_the_quickest_of_each_first() -> None:
    tool_ = script("tools/mutants.py")
    (mutant,) = [m for m in MUTATIONS.mutants("a.py", "x = 1\n\n\ndef f():\n    return -y\n") if m.kind == "sign"]
    tests = [
        tool_.Covering("t.py::slow", 5.0, {"a.py": frozenset({5})}),
        tool_.Covering("t.py::two[b]", 2.0, {"a.py": frozenset({5})}),
        tool_.Covering("t.py::two[a]", 1.0, {"a.py": frozenset({5, 6})}),
        tool_.Covering("t.py::other", 0.1, {"b.py": frozenset({5})}),
        tool_.Covering("t.py::long", 500.0, {"a.py": frozenset({5})}),
    ]
    assert [test.name for test in tool_.tests_of(mutant, tests, 90.0)] == ["t.py::two[a]", "t.py::slow", "t.py::two[b]"]
