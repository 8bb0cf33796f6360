"""`microtome patch` on a tiny saved model: its maps, its page, its plan, and a user's mistakes."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import families

import microtome as mt

Cli = Callable[..., Any]
PAIR = ("the cat sat on the", "the dog sat on the")


def check(done: Any, code: int, *texts: str) -> None:
    assert done.code == code, done.err
    for text in texts:
        assert text in done.err, done.err


def test_json_holds_what_the_method_returned(cli: Cli, saved: Path) -> None:
    done = cli("patch", *PAIR, "--answer", "mat", "--foil", "barn", "-m", saved, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    model = mt.open(str(saved))
    data = mt.explain.activation_patching(model, *PAIR, answer="mat", foil="barn")
    assert list(told["maps"]) == ["resid_pre", "attn_out", "mlp_out", "attn.z[head]"]
    for name, held in told["maps"].items():
        assert tuple(held["dims"]) == data[name].dims
        np.testing.assert_allclose(held["values"], data[name].values, atol=1e-4)
    assert told["clean"] == pytest.approx(float(data["clean"]), abs=1e-5)
    assert told["tokens"]["clean"] == [str(w) for w in data["clean_token"].values]
    assert told["provenance"]["answer"] == "mat"
    assert told["provenance"]["fingerprint"] == model.fingerprint


def test_the_plan_comes_first_on_stderr(cli: Cli, saved: Path) -> None:
    done = cli("patch", *PAIR, "--answer", "mat", "-m", saved, "--json")
    cells = 3 * families.N_LAYERS * 5 + families.N_LAYERS * 4
    assert done.err.startswith(f"plan: {cells} cells in ")
    for word in ("walks", "forwards", "operations", "MiB", " s"):
        assert word in done.err
    assert json.loads(done.out)["provenance"]["plan"] in done.err
    assert cli("patch", *PAIR, "--answer", "mat", "-m", saved, "--quiet", "--json").err == ""


def test_maps_in_the_terminal_and_as_a_page(cli: Cli, saved: Path, tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    arguments = ("patch", *PAIR, "--answer", "mat", "--foil", "barn", "-m", saved, "-o", page)
    done = cli(*arguments)
    assert done.code == 0, done.err
    for text in (
        "residual stream",
        "attention output",
        "MLP output",
        "heads",
        "strongest",
        "cat/Ġdog",
        "page written",
    ):
        assert text in done.out
    assert max(map(len, done.out.splitlines()[:-1])) <= 80
    assert [p.name for p in tmp_path.iterdir()] == ["p.html"]
    check(cli(*arguments), 9, "p.html exists", "--force")
    assert cli(*arguments, "--force", "--top", 0).code == 0
    told = json.loads(cli(*arguments, "--force", "--json").out)
    assert told["page"] == str(page)


def test_directions_and_sites(cli: Cli, saved: Path) -> None:
    common = ("patch", *PAIR, "--answer", "mat", "--foil", "barn", "-m", saved, "--json")
    told = json.loads(cli(*common, "--direction", "noise", "--site", "resid_post", "--site", "attn.v[head]").out)
    assert list(told["maps"]) == ["resid_post", "attn.v[head]"]
    assert told["provenance"]["direction"] == "noise"
    assert told["maps"]["resid_post"]["values"][-1][-1] == pytest.approx(1, abs=1e-4)
    assert told["maps"]["attn.v[head]"]["dims"] == ["layer", "kv_head"]
    done = cli(*common, "--site", "attn.pattern")
    check(done, 5, 'SiteError: cannot patch "attn.pattern" by layer', "allowed: resid_pre")


def test_prompts_and_answers_that_do_not_fit(cli: Cli, saved: Path, tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    for arguments, code, *texts in (
        (
            (PAIR[0], "the dog sat on", "--answer", "mat"),
            6,
            "do not align: they differ first at token 1",
            "5 and 4 tokens",
        ),
        ((*PAIR, "--answer", "mat", "--foil", "mat"), 6, "the foil equals the answer", "choose another foil"),
        ((*PAIR, "--answer", "the mat"), 6, '"the mat" is not one token', "got ["),
        ((*PAIR, "--answer", "mat", "--foil", "old barn"), 6, '"old barn" is not one token'),
        ((PAIR[0], PAIR[0], "--answer", "mat"), 6, "are the same, so that there is nothing to patch"),
        (("", PAIR[0], "--answer", "mat"), 6, "the prompt is empty"),
    ):
        done = cli("patch", *arguments, "-m", saved, "-o", page)
        check(done, code, *texts)
    assert not list(tmp_path.iterdir())
    check(cli("patch", *PAIR, "-m", saved), 2, "Missing option '--answer'")
    check(cli("patch", *PAIR, "--answer", "mat", "--direction", "both", "-m", saved), 2, "'denoise'", "'noise'")


def test_pages_that_cannot_be_written_are_refused_before_anything_runs(cli: Cli, tmp_path: Path) -> None:
    for output, *texts in (
        (tmp_path / "none" / "p.html", f"no folder {tmp_path / 'none'}", "make it first"),
        (tmp_path / "p.pdf", "cannot write p.pdf; got .pdf; allowed: .html"),
        (tmp_path / "p", "got no ending"),
    ):
        done = cli("patch", *PAIR, "--answer", "mat", "-m", tmp_path / "no-model", "-o", output)
        check(done, 9, "OutputError", *texts)
    (tmp_path / "d.html").mkdir()
    check(cli("patch", *PAIR, "--answer", "mat", "-o", tmp_path / "d.html", "--force"), 9, "d.html exists")
    assert [p.name for p in tmp_path.iterdir()] == ["d.html"]


def test_a_full_disk_leaves_nothing(cli: Cli, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str, **kwargs: object) -> None:
        self.write_bytes(text[:99].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    done = cli("patch", *PAIR, "--answer", "mat", "-m", saved, "-o", tmp_path / "p.html")
    check(done, 9, "OutputError: cannot write", "No space left on device", "check the folder and its free space")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("walk", [0, 1])
def test_ctrl_c_in_the_middle(
    cli: Cli, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walk: int
) -> None:
    from microtome.sweep import _sweep as _cells

    own, calls = _cells._run_pass, [0]
    monkeypatch.setattr(_cells, "FIXED", 0)  # several walks

    def stopped(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] > walk:
            raise KeyboardInterrupt
        return own(*arguments)

    monkeypatch.setattr(_cells, "_run_walk", stopped)
    done = cli("patch", *PAIR, "--answer", "mat", "-m", saved, "-o", tmp_path / "p.html", "--json")
    check(done, 130, "stopped; nothing is left half-written")
    assert calls[0] == walk + 1
    assert done.out == ""
    assert re.search(r"plan: \d+ cells in [2-9]", done.err)
    assert not list(tmp_path.iterdir())
