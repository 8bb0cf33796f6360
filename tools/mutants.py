"""Break the code on purpose, one small change at a time, and count how often no test notices.

    python tools/mutants.py [--count 60] [--seed 0] [--room explain ...] [--only TEXT] [--again]

Each sampled mutant is written into a copy of the repository, and the tests that execute its lines run there, quickest
first, until one fails. What each test executes is found once, and again for each test file that changed. Results are
kept in `.mutants/`, so that a run that was stopped goes on; a finished one writes `benchmarks/results/mutants.json`.
Survivors that change nothing are explained in `tools/mutants.toml`. The exit status is 1 where more than 10 % survive.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from mutations import Mutant, mutants

ROOT = Path(__file__).resolve().parents[1]
STATE, RESULTS = ROOT / ".mutants", ROOT / "benchmarks" / "results" / "mutants.json"
ROOMS = ("explain", "measurements", "atlas", "sweep", "edit", "change")
TESTS = ("laws", "contract", "planted", "unit", "cli")
MOST_SURVIVE = 0.10
SECONDS = 90.0
"""Of tests, as they took when they were mapped: how long a mutant is looked for."""
QUIETLY = ("-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
BROKEN = 3
"""The exit status of pytest, or of the process around it, where neither a test nor the code failed."""
FAMILIES = 4
"""Of models, that a test is mapped on where it is run on more."""
IMPORTED_FIRST = (
    "torch", "transformers", "pytest", "xarray", "scipy.stats", "sklearn", "pyarrow.parquet", "jaxtyping", "beartype",
    "transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2",
)  # fmt: skip
"""What every test needs and no mutant is in: imported once, before the processes of the mutants part."""


@dataclass(frozen=True)
class Covering:
    """A test and what it executes.

    Attributes:
        name: as pytest names it.
        seconds: that it took.
        lines: by file.
    """

    name: str
    seconds: float
    lines: dict[str, frozenset[int]]


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def source_digest() -> str:
    """Of all files of the package."""
    return digest(*(path.read_bytes() for path in sorted((ROOT / "src").rglob("*.py"))))


# ---------------------------------------------------------------------------------------------- what each test executes


def covering(some: list[str], *, stale: bool) -> list[Covering]:
    """What each quick test executes, mapped anew for the test files that changed, or all if the package did."""
    found: list[Covering] = []
    (STATE / "cover").mkdir(parents=True, exist_ok=True)
    source = source_digest().encode()
    files = sorted(path for room in TESTS for path in (ROOT / "tests" / room).glob("test_*.py"))
    for i, path in enumerate(files):
        name = str(path.relative_to(ROOT))
        if some and not any(part in name for part in some):
            continue
        kept = STATE / "cover" / (name.replace("/", ".") + ".json")
        key = digest(source, path.read_bytes())
        if not kept.exists() or (json.loads(kept.read_text())["key"] != key and not stale):
            print(f"mapping {i + 1} of {len(files)}: {name}", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--map", name, str(kept), key]
            subprocess.run(command, cwd=ROOT, check=True, env=environment(ROOT), stdout=subprocess.DEVNULL)
        for test, (seconds, lines) in json.loads(kept.read_text())["tests"].items():
            found.append(Covering(test, seconds, {file: frozenset(own) for file, own in lines.items()}))
    return found


class Mapping:
    """What each test of a run executes: a plugin of pytest that gives every test a context of coverage.

    What a test takes from a cache counts as its own, whichever test came first to compute it.
    """

    def __init__(self, cover: Any) -> None:
        self.cover, self.now, self.seconds = cover, "", defaultdict[str, float](float)
        self.uses, self.passed = defaultdict[str, set[str]](set), set[str]()
        self._cache, self._begun = functools.cache, 0.0
        functools.cache = self._told  # type: ignore[assignment]

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Of a test that is run on many families of models, keep some: a change shows on most, or on none."""
        from tests import families

        groups: dict[str, list[Any]] = defaultdict(list)
        for item in items:
            given: dict[str, Any] = (getattr(item, "callspec", None) and item.callspec.params) or {}
            other = {k: v for k, v in given.items() if not isinstance(v, str) or v.split("/")[0] not in families.NAMES}
            groups[f"{item.nodeid.split('[')[0]} {other!r}"].append(item)
        kept = {id(item) for own in groups.values() for item in own[:: -(-len(own) // FAMILIES)]}
        items[:] = [item for item in items if id(item) in kept]

    def _enter(self, context: str) -> str:
        """Go on in another context; the one that was left."""
        left, self.now = self.now, context
        self.seconds[left] += time.process_time() - self._begun
        self._begun = time.process_time()
        self.cover.switch_context(context)
        return left

    def _told(self, function: Any) -> Any:
        if not function.__module__.startswith("tests"):
            return self._cache(function)
        kept: dict[tuple[Any, ...], Any] = {}

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            context = f"{function.__module__}.{function.__name__}{arguments!r}"
            self.uses[self.now].add(context)
            if arguments not in kept:
                left = self._enter(context)
                try:
                    kept[arguments] = function(*arguments)
                finally:
                    self._enter(left)
            return kept[arguments]

        return call

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._enter(nodeid)

    def pytest_runtest_logfinish(self) -> None:
        self._enter("")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)

    def contexts(self, test: str) -> set[str]:
        """Of a test, and of all that it took from caches."""
        found, new = set[str](), {test}
        while new:
            found |= new
            new = {inner for context in new for inner in self.uses[context]} - found
        return found


def map_tests(name: str, kept: Path, key: str) -> None:
    """Run the tests of one file, and keep which lines of the mutated rooms each of them executes."""
    import coverage
    import pytest

    watched = [f"src/microtome/{room}/*" for room in ROOMS]
    cover = coverage.Coverage(data_file=None, include=watched, config_file=False)
    mapping = Mapping(cover)
    cover.start()
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not browser and not real"]
    status = pytest.main([name, *options], plugins=[mapping])
    cover.stop()
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        print(f"{name} does not pass: only its tests that do are used", file=sys.stderr)
    data, by_context = cover.get_data(), defaultdict[str, dict[str, list[int]]](lambda: defaultdict(list))
    for file in data.measured_files():
        for line, contexts in data.contexts_by_lineno(file).items():
            for context in contexts:
                by_context[context][str(Path(file).relative_to(ROOT))].append(line)
    tests: dict[str, Any] = {}
    for test in sorted(mapping.passed):
        lines: dict[str, set[int]] = defaultdict(set)
        for context in mapping.contexts(test):
            for file, own in by_context[context].items():
                lines[file].update(own)
        seconds = sum(mapping.seconds[context] for context in mapping.contexts(test))
        if lines:
            tests[test] = (seconds, {file: sorted(own) for file, own in lines.items()})
    kept.with_suffix(".part").write_text(json.dumps({"key": key, "tests": tests}))
    kept.with_suffix(".part").replace(kept)


def tests_of(mutant: Mutant, every: list[Covering], seconds: float) -> list[Covering]:
    """The tests that execute a mutant's lines, quickest first, the files by turns and in each its functions by turns.

    What runs at import (a table of a module, a default) is executed by all tests that execute anything of the file.
    """
    first, last = mutant.lines
    own = [test for test in every if any(first <= line <= last for line in test.lines.get(mutant.file, ()))]
    own = own or [test for test in every if test.lines.get(mutant.file)]
    own.sort(key=lambda test: test.seconds)
    by_function = _by_turns(own, lambda test: test.name.split("[")[0])
    chosen: list[Covering] = []
    for test in _by_turns(by_function, lambda test: test.name.split("::")[0]):
        if chosen and sum(t.seconds for t in chosen) + test.seconds > seconds:
            continue
        chosen.append(test)
    return chosen


def _by_turns(tests: list[Covering], group: Callable[[Covering], str]) -> list[Covering]:
    """The first of every group, then the second of every group, and so on; else in the order given."""
    seen: dict[str, int] = defaultdict(int)
    turns: list[tuple[int, int, Covering]] = []
    for place, test in enumerate(tests):
        turns.append((seen[group(test)], place, test))
        seen[group(test)] += 1
    return [test for _, _, test in sorted(turns, key=lambda turn: turn[:2])]


# ----------------------------------------------------------------------------------------------------------- one mutant


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{folder / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def tried(mutant: Mutant, tests: list[Covering], copy: Path, number: int) -> dict[str, Any]:
    """Whether a test fails of the copy with this change: killed, survived or timeout, and which test it was."""
    if not tests:
        return {"status": "survived", "test": "", "tests": 0, "seconds": 0.0}
    path, begun = copy / mutant.file, time.monotonic()
    text = path.read_text(encoding="utf-8")
    path.write_text(mutant.applied(text), encoding="utf-8")
    stamp = 1_000_000_000 + 2 * number  # of its own, since compiled files are told apart by whole seconds
    os.utime(path, (stamp, stamp))
    limit = 30 + 3 * sum(test.seconds for test in tests)
    try:
        status, name = _forked([test.name for test in tests], copy, int(limit))
    finally:
        path.write_text(text, encoding="utf-8")
        os.utime(path, (stamp + 1, stamp + 1))
    return {"status": status, "test": name, "tests": len(tests), "seconds": round(time.monotonic() - begun, 1)}


def _forked(names: list[str], copy: Path, limit: int) -> tuple[str, str]:
    """Run tests in a child process of its own, which is stopped after so many seconds of the processor."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        code = BROKEN
        try:
            code = _run(names, copy, write)
        except BaseException as problem:  # noqa: BLE001 - whatever it was, the parent says it
            os.write(write, repr(problem).encode())
        finally:
            os._exit(code)
    os.close(write)
    deadline = time.monotonic() + 10 * limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.1)
    with os.fdopen(read) as pipe:
        failed = pipe.read()
    if os.WIFSIGNALED(status):
        return "timeout", ""
    if os.WEXITSTATUS(status) == BROKEN:
        raise SystemExit(f"the tests could not be run: {failed}")
    return ("survived", "") if os.WEXITSTATUS(status) == 0 else ("killed", failed or "at import")


def _run(names: list[str], copy: Path, write: int) -> int:
    import pytest

    os.chdir(copy)
    os.environ.update(environment(copy))
    sys.path[:0] = [str(copy), str(copy / "src")]
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)

    class First:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                os.write(write, report.nodeid.encode())

    return int(pytest.main([*QUIETLY, *names], plugins=[First()]))


# -------------------------------------------------------------------------------------------------------------- the run


def sampled(every: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """So many mutants, of every kind of change alike."""
    draw = random.Random(seed)
    kinds: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in every:
        kinds[mutant.kind].append(mutant)
    for own in kinds.values():
        draw.shuffle(own)
    order = sorted(kinds)
    draw.shuffle(order)
    chosen: list[Mutant] = []
    while len(chosen) < min(count, len(every)):
        chosen += [kinds[kind].pop() for kind in order if kinds[kind]][: count - len(chosen)]
    return chosen


def copied(folder: Path) -> Path:
    """A copy of the repository without what is made from it."""
    left = shutil.ignore_patterns(".venv*", ".git", ".mutants", "__pycache__", "site", "atlas.part", "*.egg-info")
    return Path(shutil.copytree(ROOT, folder / "copy", ignore=left))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="how many mutants to sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--room", action="append", choices=ROOMS, help="only of this room; may be repeated")
    parser.add_argument("--only", help="instead of a sample, all mutants whose line holds this text")
    parser.add_argument("--kind", action="append", help="only of this kind of change; may be repeated")
    parser.add_argument("--again", action="store_true", help="try survivors of an earlier run again")
    parser.add_argument("--stale", action="store_true", help="do not map tests that changed anew")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of tests, that a mutant is looked for at most")
    parser.add_argument("--tests", action="append", default=[], help="only test files whose path holds this text")
    parser.add_argument("--map", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.map:
        map_tests(given.map[0], Path(given.map[1]), given.map[2])
        return 0
    texts = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for room in given.room or ROOMS
        for path in sorted((ROOT / "src" / "microtome" / room).rglob("*.py"))
    }
    every = [m for file, text in texts.items() for m in mutants(file, text) if not given.kind or m.kind in given.kind]
    if given.only:
        chosen = [m for m in every if given.only in texts[m.file].splitlines()[m.line - 1]]
    else:
        chosen = sampled(every, given.count, given.seed)
    tests = covering(given.tests, stale=given.stale)
    found = run(chosen, texts, tests, again=given.again, seconds=given.seconds)
    return told(chosen, found, texts, len(every), None if given.only or given.kind or given.room else given.seed)


def run(
    chosen: list[Mutant], texts: dict[str, str], tests: list[Covering], *, again: bool, seconds: float
) -> list[dict[str, Any]]:
    """What became of each mutant, from an earlier run where it was tried before."""
    kept = STATE / "results.jsonl"
    lines = kept.read_text().splitlines() if kept.exists() else []
    before = {record["key"]: record for record in map(json.loads, lines)}
    for name in IMPORTED_FIRST:
        __import__(name)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder))
        control = [test.name for test in sorted(tests, key=lambda test: test.seconds)[:5]]
        if _forked(control, copy, 120) != ("survived", ""):
            raise SystemExit(f"without any change these do not pass: {', '.join(control)}")
        for i, mutant in enumerate(chosen):
            key = mutant.key(texts[mutant.file])
            if key not in before or (again and before[key]["status"] == "survived"):
                before[key] = {"key": key} | tried(mutant, tests_of(mutant, tests, seconds), copy, i)
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(before[key]) + "\n")
            found.append(before[key])
            said = " ".join(f"{mutant.before} -> {mutant.after}".split())
            say = f"{i + 1:3} of {len(chosen)}  {before[key]['status']:8}  {mutant.file}:{mutant.line}  {said[:110]}"
            print(say, f"  [{before[key]['test']}]", flush=True)
    return found


def told(chosen: list[Mutant], found: list[dict[str, Any]], texts: dict[str, str], every: int, seed: int | None) -> int:
    """Print how many survived, write the record of a sample of everything, and return the exit status."""
    explained = explanations()
    counts = {status: sum(f["status"] == status for f in found) for status in ("killed", "survived", "timeout")}
    share = counts["survived"] / max(len(found), 1)
    survivors: list[dict[str, Any]] = []
    for mutant, result in zip(chosen, found, strict=True):
        if result["status"] != "survived":
            continue
        line = texts[mutant.file].splitlines()[mutant.line - 1].strip()
        why = explained.get((mutant.file, line, mutant.after), "")
        one = {"file": mutant.file, "line": mutant.line, "code": line, "before": mutant.before, "after": mutant.after}
        survivors.append(
            one | {"kind": mutant.kind, "why": why or ("no test executes it" if not result["tests"] else "")}
        )
    for s in survivors:
        print(f"\n{s['file']}:{s['line']}  {s['code']}\n    {s['before']} -> {s['after']}")
        print(f"    {s['why'] or 'unexplained'}")
    print(
        f"\n{len(found)} mutants of {every:,}: " + ", ".join(f"{n} {status}" for status, n in counts.items()), end="; "
    )
    print(f"surviving share {share:.1%}, allowed {MOST_SURVIVE:.0%}")
    if seed is not None:
        record = {"seed": seed, "of": every, "sampled": len(found)} | counts
        record |= {"surviving_share": round(share, 4), "survivors": survivors}
        RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(share > MOST_SURVIVE)


def explanations() -> dict[tuple[str, str, str], str]:
    """Why a mutant changes nothing that could be seen, by file, line and what stands there instead."""
    path = Path(__file__).with_suffix(".toml")
    records = tomllib.loads(path.read_text(encoding="utf-8")).get("same", []) if path.exists() else []
    return {(record["file"], record["code"], record["after"]): record["why"] for record in records}


if __name__ == "__main__":
    sys.exit(main())
