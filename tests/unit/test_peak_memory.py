"""The memory that an atlas says it took is this process's own."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc, which Linux alone has")
def test_a_parent_with_much_memory_is_not_counted() -> None:
    held = bytearray(b"x") * (3 * 2**30 // 2)
    code = "from microtome.atlas._manifest import peak_memory; print(peak_memory())"
    own = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 2**25 < own < 2**30 < len(held)
