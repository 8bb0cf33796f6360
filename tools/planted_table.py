"""What measures find in models whose truth is known: every planted case, with what was found where nothing was planted.

    python tools/planted_table.py [--docs]

Cases are functions in the modules of tools/planted_cases, each listed in its module's `CASES`. With --docs the table
is written to docs/planted-measures.md.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "planted-measures.md"
HEAD = """# Planted truth for measures

Each measure on a model whose weights were set so that the answer is known: what was planted and found, and what was
reported where nothing was planted. Made by `python tools/planted_table.py --docs`.

| measure | planted | found | false |
|---|---|---|---|
"""


def cases() -> list[Any]:
    """The cases of all modules, in the order of their names."""
    found: list[Any] = []
    for path in sorted((ROOT / "tools" / "planted_cases").glob("*.py")):
        spec = spec_from_file_location(f"planted_cases_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        found += module.CASES
    return found


def main() -> None:
    """Run every case, print its row, and write the page where that is asked for."""
    import torch

    torch.set_num_threads(1)  # the models are tiny: threads that wait for each other take most of the time else
    rows: list[str] = []
    for case in cases():
        made = case()
        rows.append("| " + " | ".join(str(made[key]) for key in ("measure", "planted", "found", "false")) + " |")
        print(rows[-1], flush=True)
    if "--docs" in sys.argv[1:]:
        DOCS.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
