"""The rules of the house, read from the source itself.

Each rule is a function from one `Module` to the faults it finds. The second half of this file shows every rule a bad
snippet, because a rule that cannot fail is no rule.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "microtome"
SOURCE = ROOT / "src" / PACKAGE
HOOKS = f"{PACKAGE}.run.hook._hooks"  # the one module that may register hooks

FLOORS = (
    ("errors", "axes", "shown", "later", "progress"),
    ("catalogue", "cluster", "context", "files"),
    ("anatomy",),
    ("edit",),
    ("run",),
    ("metric",),
    ("sweep",),
    ("model",),
    ("stream", "tasks", "planted", "training"),
    ("view",),
    ("method",),
    ("measurements", "explain", "features", "probes", "change", "circuits", "subspaces"),
    ("claims",),
    ("claims",),
    ("atlas",),
    ("",),  # the public face: microtome/__init__.py
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

MOST_LINES_OF_FILE = 500
MOST_LINES_OF_FUNCTION = 70
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "misc", "common", "cfg"}
PICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
DEVICES = re.compile(r"(cpu|cuda|mps|xpu|hpu)(:\d+)?")
NARROW_DTYPES = {"float16", "bfloat16", "half"}  # float64 and float32 are where statistics accumulate
CITED = re.compile(r"(?<![\w./-])tests/\w+(?:/\w+)*(?:\.py)?")
MACHINE_PATH = re.compile(r"(?<![\w.~/])/(?:home|root|work|Users)/\w|(?<!\w)[A-Z]:\\Users")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One module of the package: its dotted name and its text."""

    name: str
    text: str
    is_package: bool = False

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @property
    def room(self) -> str:
        return [*self.name.split("."), ""][1]

    def imports(self) -> Iterator[tuple[int, str, str | None]]:
        """Every import of this package, wherever it stands: line, module, and the name taken from it if one is."""
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found = [(alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [(self._absolute(node), alias.name) for alias in node.names]
            elif isinstance(node, ast.Call) and _last(node.func) in {"import_module", "__import__"} and node.args:
                first = node.args[0]
                found = (
                    [(first.value, None)] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
                )
            else:
                continue
            for module, name in found:
                if module.split(".")[0] == PACKAGE:
                    yield node.lineno, module, name

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        here = self.name.split(".")
        up = node.level - (1 if self.is_package else 0)
        return ".".join(here[: len(here) - up] + ([node.module] if node.module else []))


def _last(node: ast.AST) -> str:
    """The last name of a dotted expression: `load` of `torch.load`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _room_of_import(module: str, name: str | None) -> str:
    """The room that an import reaches; '' is the public face."""
    parts = module.split(".")
    if len(parts) > 1:
        return parts[1]
    return name if name is not None and name in FLOOR else ""


# ---------------------------------------------------------------------------------------------------------- the rules


def floors(module: Module) -> Iterator[str]:
    """Imports only point down; rooms of one floor see each other's public face."""
    if module.room not in FLOOR:
        yield f"1: room {module.room!r} stands on no floor"
        return
    for line, target, name in module.imports():
        room = _room_of_import(target, name)
        if room not in FLOOR:
            yield f"{line}: import of {target}: room {room!r} stands on no floor"
        elif FLOOR[room] > FLOOR[module.room]:
            yield f"{line}: {module.room or PACKAGE} may not import {room or PACKAGE}, which stands above it"


def privacy(module: Module) -> Iterator[str]:
    """Private modules and names stay in their room."""
    borrowed: set[str] = set()
    for line, target, name in module.imports():
        room = _room_of_import(target, name)
        if room == module.room:
            continue
        parts = target.split(".") + ([name] if name else [])
        if any(_private(part) for part in parts):
            yield f"{line}: {'.'.join(parts)} is private to {room or PACKAGE}"
        borrowed.add(name or parts[0])
    for node in module.nodes:
        if isinstance(node, ast.Attribute) and _private(node.attr):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            if isinstance(base, ast.Name) and base.id in borrowed:
                yield f"{node.lineno}: {node.attr} is private to where {base.id} comes from"


def sizes(module: Module) -> Iterator[str]:
    """Files and functions stay small."""
    lines = module.text.count("\n") + (not module.text.endswith("\n"))
    if lines > MOST_LINES_OF_FILE:
        yield f"1: {lines} lines, at most {MOST_LINES_OF_FILE}"
    for node in module.nodes:
        if isinstance(node, Function):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MOST_LINES_OF_FUNCTION:
                yield f"{node.lineno}: {node.name} has {length} lines, at most {MOST_LINES_OF_FUNCTION}"


def names(module: Module) -> Iterator[str]:
    """No module of odds and ends, nothing called cfg."""
    for part in module.name.split("."):
        if part.strip("_") in FORBIDDEN_NAMES:
            yield f"1: a module may not be called {part}"
    for node in module.nodes:
        name = node.arg if isinstance(node, ast.arg) else node.id if isinstance(node, ast.Name) else ""
        if name == "cfg" or (isinstance(node, ast.Attribute) and node.attr == "cfg"):
            yield f"{node.lineno}: say config, not cfg"


def no_pickle(module: Module) -> Iterator[str]:
    """Artefacts are safetensors, Parquet, Zarr and JSON."""
    for node in module.nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: import of {n}" for n in found if n.split(".")[0] in PICKLERS)
        elif isinstance(node, ast.Call):
            called, keywords = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
            safe = keywords.get("weights_only")
            if called == "torch.load" and not (isinstance(safe, ast.Constant) and safe.value is True):
                yield f"{node.lineno}: torch.load without weights_only=True"
            if called == "torch.save" or _last(node.func) in {"read_pickle", "to_pickle"}:
                yield f"{node.lineno}: {called} writes or reads pickles"
            allow = keywords.get("allow_pickle")
            if allow is not None and not (isinstance(allow, ast.Constant) and allow.value is False):
                yield f"{node.lineno}: allow_pickle"


def hooks_in_one_place(module: Module) -> Iterator[str]:
    """Only `run/hook/_hooks.py` registers hooks."""
    if module.name == HOOKS:
        return
    for node in module.nodes:
        name = node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else ""
        if isinstance(name, str) and re.fullmatch(r"_?register_\w*hook\w*", name):
            yield f"{node.lineno}: {name} outside {HOOKS}"


def no_device_or_dtype(module: Module) -> Iterator[str]:
    """Devices and narrow dtypes come from the model or the user; comparing with one chooses nothing."""
    if module.room == "cli":
        return
    compared = {id(n) for node in module.nodes if isinstance(node, ast.Compare) for n in ast.walk(node)}
    for node in module.nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in compared:
            if DEVICES.fullmatch(node.value):
                yield f"{node.lineno}: device literal {node.value!r}"
        elif isinstance(node, ast.Call):
            if _last(node.func) in {"cuda", "half", "bfloat16"} and isinstance(node.func, ast.Attribute):
                yield f"{node.lineno}: .{_last(node.func)}() chooses a device or dtype"
            chosen = [k.value for k in node.keywords if k.arg in {"dtype", "torch_dtype"}]
            chosen += node.args if _last(node.func) in {"to", "type", "astype"} else []
            for value in chosen:
                name = value.value if isinstance(value, ast.Constant) else _last(value)
                if name in NARROW_DTYPES:
                    yield f"{value.lineno}: dtype literal {name}"


def no_print(module: Module) -> Iterator[str]:
    """Only the command line prints."""
    if module.room == "cli":
        return
    for node in module.nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{node.lineno}: print"


def docstrings(module: Module) -> Iterator[str]:
    """Modules with code, and every public class, function and method, say what they are."""
    if module.tree.body and not ast.get_docstring(module.tree):
        yield "1: the module has no docstring"

    def inside(body: list[ast.stmt]) -> Iterator[str]:
        for node in body:
            if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
                continue
            decorators = {_last(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list}
            if not ast.get_docstring(node) and not decorators & {"overload", "setter", "override"}:
                yield f"{node.lineno}: {node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                yield from inside(node.body)

    yield from inside(module.tree.body)


def no_machine_paths(module: Module) -> Iterator[str]:
    """No path of somebody's machine, not even in a comment."""
    for number, line in enumerate(module.text.splitlines(), 1):
        if found := MACHINE_PATH.search(line):
            yield f"{number}: path of a machine: {found.group()}"


def cited_tests(module: Module) -> Iterator[str]:
    """A test that is named as a check exists."""
    for number, line in enumerate(module.text.splitlines(), 1):
        for path in CITED.findall(line):
            if not (ROOT / path).exists():
                yield f"{number}: there is no {path}"


Rule = Callable[[Module], Iterator[str]]
RULES: tuple[Rule, ...] = (
    floors, privacy, sizes, names, no_pickle, hooks_in_one_place, no_device_or_dtype, no_print, docstrings,
    no_machine_paths, cited_tests,
)  # fmt: skip

# ----------------------------------------------------------------------------------------------------- the house today


def modules() -> list[tuple[Path, Module]]:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = (PACKAGE, *path.relative_to(SOURCE).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        found.append((path, Module(name, path.read_text(encoding="utf-8"), is_package)))
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house(rule: Rule) -> None:
    found = modules()
    assert found, "there is no source to judge"
    faults = [f"{path.relative_to(ROOT)}:{fault}" for path, module in found for fault in rule(module)]
    assert not faults, f"{rule.__doc__}\n" + "\n".join(faults)


def circles(found: list[Module]) -> list[list[str]]:
    """Modules that import each other, directly or through others; imports for types and inside functions count too."""
    names = {module.name for module in found}
    graph = TopologicalSorter[str]()
    for module in found:
        for _, target, name in module.imports():
            inner = f"{target}.{name}"
            to = inner if inner in names else target
            # A package is imported with its modules: its own `__init__` is the face of all of them.
            if to in names and to != module.name and not module.name.startswith(f"{to}."):
                graph.add(module.name, to)
    try:
        graph.prepare()
    except CycleError as problem:
        return [problem.args[1]]
    return []


def test_no_import_circle() -> None:
    assert not circles([module for _, module in modules()])


def test_a_circle_is_found() -> None:
    lower = "if TYPE_CHECKING:\n    from microtome.run._b import B"
    pair = [Module("microtome.run._a", lower), Module("microtome.run._b", "def f():\n    from microtome.run import _a")]
    assert circles(pair)
    assert not circles(pair[:1])


COLLECTIONS = ("measurements", "explain", "change", "circuits", "subspaces")
"""Rooms of methods, which grow with what is published; what keeps them small is that their files know few others."""


def test_no_room_holds_more_than_a_fifth() -> None:
    lines: Counter[str] = Counter()
    for _, module in modules():
        lines[module.room] += module.text.count("\n") * (module.room not in COLLECTIONS)
    room, most = lines.most_common(1)[0]
    assert most <= 0.2 * lines.total(), f"{room} holds {most} of {lines.total()} lines"


def test_methods_know_few_others() -> None:
    """A method imports at most five files of its room, and two of three at most one."""
    known: dict[str, int] = {}
    for _, module in modules():
        if module.room in COLLECTIONS and not module.is_package:
            room = f"{PACKAGE}.{module.room}._"
            known[module.name] = len({name for _, name, _ in module.imports() if name.startswith(room)} - {module.name})
    assert len(known) > 50
    assert max(known.values()) <= 5, max(known, key=lambda name: known[name])
    assert sum(n <= 1 for n in known.values()) >= 2 / 3 * len(known)


def test_the_face_is_small() -> None:
    import microtome

    assert len(microtome.__all__) <= 30  # ten names and a room for each kind of work
    assert all(hasattr(microtome, name) for name in microtome.__all__)


def test_every_array_type_is_of_use() -> None:
    """A name of `axes` that nothing imports is dead."""
    found = [module for _, module in modules()]
    taken = {name for module in found for _, target, name in module.imports() if target == f"{PACKAGE}.axes"}
    (axes,) = (module for module in found if module.name == f"{PACKAGE}.axes")
    made = {ast.unparse(node.target) for node in axes.nodes if isinstance(node, ast.AnnAssign)}
    assert made <= taken, f"nothing imports {', '.join(sorted(made - taken))}"


def test_tests_cited_in_the_documents_exist() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    faults = [f"{p.name}:{f}" for p in pages for f in cited_tests(Module("x", p.read_text(encoding="utf-8")))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("folder", ["tests", "docs", "examples", "benchmarks", "tools", ".ci", "."])
def test_no_machine_paths_elsewhere(folder: str) -> None:
    kinds = {".py", ".md", ".toml", ".json", ".yml", ".txt", ".html", ".ipynb", ""}
    found = (ROOT / folder).glob("*") if folder == "." else (ROOT / folder).rglob("*")
    files = [path for path in found if path.is_file() and path.suffix in kinds and path.name != ".git"]
    faults = [f"{p}:{f}" for p in files for f in no_machine_paths(Module("x", p.read_text(encoding="utf-8")))]
    assert not faults, "\n".join(faults)


def test_import_loads_nothing_heavy() -> None:
    """What makes an import slow is what it loads: `import microtome` loads itself and the standard library."""
    code = "import sys; before = set(sys.modules); import microtome; print(*sorted(set(sys.modules) - before))"
    environment = os.environ | {"PYTHONPATH": str(SOURCE.parent)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    foreign = {name.partition(".")[0] for name in run.stdout.split()} - set(sys.stdlib_module_names)
    assert foreign == {"microtome"}


# --------------------------------------------------------------------------------------------- every rule can be broken

BAD: list[tuple[Rule, str, str, str]] = [
    (floors, "anatomy._load", "from microtome.run import Run", "anatomy may not import run"),
    (floors, "anatomy._load", "def f():\n    from ..run import Run", "anatomy may not import run"),
    (floors, "run._sweep", "import microtome.view", "run may not import view"),
    (floors, "run._sweep", "from microtome import atlas", "run may not import atlas"),
    (floors, "run._sweep", "from microtome import open", "run may not import microtome"),
    (floors, "run._sweep", "from .. import claims", "run may not import claims"),
    (floors, "run._sweep", "import importlib\nimportlib.import_module('microtome.cli')", "run may not import cli"),
    (floors, "run._sweep", "from microtome.attic import x", "'attic' stands on no floor"),
    (floors, "attic._old", "x = 1", "'attic' stands on no floor"),
    (privacy, "measurements._heads", "from microtome.run._plan import Plan", "is private to run"),
    (privacy, "measurements._heads", "from ..explain import _lens", "explain._lens is private to explain"),
    (privacy, "change.edit._rome", "from microtome.features import _fit", "is private to features"),
    (privacy, "measurements._heads", "from microtome import run\nrun._hooks.put()", "_hooks is private to where run"),
    (sizes, "run._a", "x = 1\n" * 501, "501 lines, at most 500"),
    (sizes, "run._a", "def f():\n" + "    x = 1\n" * 70, "f has 71 lines, at most 70"),
    (sizes, "run._a", "class A:\n    async def f(self):\n" + "        x = 1\n" * 70, "f has 71 lines"),
    (names, "run.utils", "", "may not be called utils"),
    (names, "run._helpers", "", "may not be called _helpers"),
    (names, "run._a", "def f(cfg): ...", "say config"),
    (names, "run._a", "x.cfg = 1", "say config"),
    (no_pickle, "run._a", "import pickle", "import of pickle"),
    (no_pickle, "run._a", "from joblib import dump", "import of joblib"),
    (no_pickle, "run._a", "torch.load(p)", "without weights_only"),
    (no_pickle, "run._a", "torch.load(p, weights_only=False)", "without weights_only"),
    (no_pickle, "run._a", "torch.save(x, p)", "torch.save"),
    (no_pickle, "run._a", "np.load(p, allow_pickle=True)", "allow_pickle"),
    (hooks_in_one_place, "run._a", "m.register_forward_hook(f)", "register_forward_hook outside"),
    (hooks_in_one_place, "run._a", "m.register_full_backward_pre_hook(f)", "register_full_backward_pre_hook"),
    (hooks_in_one_place, "run._a", "t.register_hook(f)", "register_hook outside"),
    (hooks_in_one_place, "run._a", "getattr(m, 'register_forward_pre_hook')(f)", "register_forward_pre_hook"),
    (no_device_or_dtype, "run._a", "x.to('cuda:1')", "device literal 'cuda:1'"),
    (no_device_or_dtype, "run._a", "def f(device='cpu'): ...", "device literal 'cpu'"),
    (no_device_or_dtype, "run._a", "x.cuda()", "chooses a device"),
    (no_device_or_dtype, "run._a", "x.half()", "chooses a device or dtype"),
    (no_device_or_dtype, "run._a", "torch.zeros(3, dtype=torch.bfloat16)", "dtype literal bfloat16"),
    (no_device_or_dtype, "run._a", "x.to(torch.float16)", "dtype literal float16"),
    (no_print, "run._a", "print(1)", "print"),
    (docstrings, "run._a", "x = 1", "module has no docstring"),
    (docstrings, "run._a", "'''M.'''\ndef f(): ...", "f has no docstring"),
    (docstrings, "run._a", "'''M.'''\nclass A:\n    '''A.'''\n    def f(self): ...", "f has no docstring"),
    (no_machine_paths, "run._a", "x = '/" + "home/ada/model'", "path of a machine"),
    (no_machine_paths, "run._a", "# see /" + "work/notes", "path of a machine"),
    (cited_tests, "run._a", "# Check: it holds; tests/unit/test_gone.py", "1: there is no tests/unit/test_gone.py"),
]

GOOD: list[tuple[Rule, str, str]] = [
    (
        floors,
        "measurements._heads",
        "from microtome.run import Run\nfrom ..explain import lens\nfrom . import _rows",
    ),
    (floors, "cli._app", "import microtome\nfrom microtome.atlas import write"),
    (privacy, "run._sweep", "from microtome.run.hook._hooks import HookSet\nfrom ._hooks import _inner\nself._x = 1"),
    (sizes, "run._a", "def f():\n" + "    x = 1\n" * 69),
    (sizes, "run._a", "x = 1\n" * 500),
    (names, "run._commonality", "config = 1"),
    (no_pickle, "run._a", "torch.load(p, weights_only=True)\nnp.load(p, allow_pickle=False)\njson.load(f)"),
    (hooks_in_one_place, "run.hook._hooks", "m.register_forward_hook(f)"),
    (hooks_in_one_place, "run._a", "'''Calls register_hook for you.'''\nregister('hook')"),
    (no_device_or_dtype, "run._a", "if x.device.type == 'cuda': ...\ny = x.to(dtype=torch.float64, device=x.device)"),
    (no_device_or_dtype, "cli._app", "device = 'cpu'"),
    (no_print, "cli._app", "print(1)"),
    (docstrings, "run._a", "'''M.'''\ndef _f(): ...\nclass A:\n    '''A.'''\n    def __len__(self): return 1"),
    (docstrings, "run", ""),
    (no_machine_paths, "run._a", "x = 'docs/work/notes'  # https://a.org/home/x and ~/work/x"),
    (cited_tests, "run._a", "# Check: it holds; tests/unit/test_house.py, tests/unit, and not mytests/x"),
]


@pytest.mark.parametrize(("rule", "name", "text", "fault"), BAD)
def test_rule_fails_on_bad(rule: Rule, name: str, text: str, fault: str) -> None:
    assert fault in "\n".join(rule(Module(f"{PACKAGE}.{name}", text)))


@pytest.mark.parametrize(("rule", "name", "text"), GOOD)
def test_rule_passes_good(rule: Rule, name: str, text: str) -> None:
    assert not list(rule(Module(f"{PACKAGE}.{name}", text)))


def test_every_rule_has_a_bad_and_a_good_snippet() -> None:
    assert {rule for rule, *_ in BAD} == set(RULES) == {rule for rule, *_ in GOOD}
