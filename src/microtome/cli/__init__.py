"""The command line: thin commands over the public interface."""

from __future__ import annotations


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from microtome.cli._app import run

        code = run()
    except KeyboardInterrupt:  # while the command line itself is being imported
        code = 130
    raise SystemExit(code)
