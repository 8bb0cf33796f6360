"""Print the house as text: its rooms from the top floor down, their lines, which rooms each imports, and any circle.

    python tools/house.py [FOLDER]

Read from the source of the package alone; imports for types and those inside functions count like any other.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = "microtome"


def modules(folder: Path) -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = (PACKAGE, *path.relative_to(folder).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules of the package that a module imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE}
    return found & known


def room(name: str) -> str:
    """The room of a module; that of the public face is the package itself."""
    return [*name.split("."), PACKAGE][1]


def main() -> None:
    """Print it."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("src") / PACKAGE
    found = modules(folder)
    lines: dict[str, int] = defaultdict(int)
    files: dict[str, int] = defaultdict(int)
    arrows: dict[str, set[str]] = defaultdict(set)
    graph: TopologicalSorter[str] = TopologicalSorter()
    for name, path in found.items():
        lines[room(name)] += path.read_text(encoding="utf-8").count("\n")
        files[room(name)] += 1
        for target in imports(path, set(found)) - {name}:
            if not name.startswith(f"{target}."):  # a package is the face of its own modules
                graph.add(name, target)
            if room(target) != room(name):
                arrows[room(name)].add(room(target))
    total = sum(lines.values())
    floors: dict[str, int] = {}

    def floor(of: str) -> int:
        if of not in floors:
            floors[of] = 0
            floors[of] = 1 + max((floor(below) for below in arrows[of]), default=-1)
        return floors[of]

    for name in sorted(lines, key=lambda n: (-floor(n), n)):
        share = 100 * lines[name] / total
        below = ", ".join(sorted(arrows[name])) or "nothing"
        print(
            f"{floors[name]:2}  {name:14} {lines[name]:6,} lines {share:4.1f} %  {files[name]:3} files  imports {below}"
        )
    try:
        graph.prepare()
        print(f"{len(lines)} rooms, {total:,} lines, {sum(map(len, arrows.values()))} arrows, no circle")
    except CycleError as problem:
        print(f"{len(lines)} rooms, {total:,} lines, a circle: {' -> '.join(problem.args[1])}")


if __name__ == "__main__":
    main()
