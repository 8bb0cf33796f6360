"""`python -m microtome` is the command line."""

from __future__ import annotations

from microtome.cli import main

if __name__ == "__main__":
    main()
