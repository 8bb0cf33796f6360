"""The command line: thin commands over the public interface."""

from __future__ import annotations


def main() -> None:
    """Run the command line and exit with its code."""
    from microtome.cli._app import run

    raise SystemExit(run())
