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
    data = mt.explain.patch(model, *PAIR, answer="mat", foil="barn")
    assert list(told) == ["variables", "coords", "provenance"]
    assert told["variables"].keys() == {"clean", "corrupt", "resid_pre", "attn_out", "mlp_out", "attn.z[head]"}
    for name, held in told["variables"].items():
        assert tuple(held["dims"]) == data[name].dims
        assert held["unit"] == data[name].attrs["unit"]
        np.testing.assert_allclose(held["values"], data[name].values, atol=1e-4)
    assert told["coords"]["clean_token"] == {"dims": ["pos"], "values": data["clean_token"].values.tolist()}
    assert told["provenance"]["answer"] == "\u0120mat"
    assert told["provenance"]["fingerprint"] == model.fingerprint


def test_the_plan_comes_first_on_stderr(cli: Cli, saved: Path) -> None:
    done = cli("patch", *PAIR, "--answer", "mat", "-m", saved, "--json")
    cells = 3 * families.N_LAYERS * 5 + families.N_LAYERS * 4
    assert done.err.startswith(f"plan: {cells} cells in ")
    for word in ("passes", "forwards", "operations", "MiB", " s"):
        assert word in done.err
    assert done.err == f"plan: {json.loads(done.out)['provenance']['plan']}"
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
    assert list(told["variables"]) == ["clean", "corrupt", "resid_post", "attn.v[head]"]
    assert told["provenance"]["direction"] == "noise"
    assert told["variables"]["resid_post"]["values"][-1][-1] == pytest.approx(1, abs=1e-4)
    assert told["variables"]["attn.v[head]"]["dims"] == ["layer", "kv_head"]
    check(cli(*common, "--site", "attn.pattern"), 2, "'attn.pattern' is not one of 'resid_pre'")
    lacking = cli(*common, "--site", "mlp.post[neuron]", "--no-share")
    assert lacking.code == 0, lacking.err
    told = json.loads(lacking.out)["variables"]
    gap = told["clean"]["values"] - told["corrupt"]["values"]
    assert told["mlp.post[neuron]"]["unit"] == "logits"
    shares = json.loads(cli(*common, "--site", "mlp.post[neuron]").out)["variables"]["mlp.post[neuron]"]["values"]
    np.testing.assert_allclose(told["mlp.post[neuron]"]["values"], gap * np.array(shares), atol=1e-4)


def test_layers_and_positions_that_are_shown(cli: Cli, saved: Path) -> None:
    common = ("patch", *PAIR, "--answer", "mat", "--foil", "barn", "-m", saved, "--json")
    whole, some = (json.loads(cli(*common, *cut).out) for cut in ((), ("--every", 2, "--positions", "1,-1")))
    assert some["coords"]["layer"]["values"] == [0, 2]
    assert some["coords"]["pos"]["values"] == [1, 4]
    expected = np.array(whole["variables"]["resid_pre"]["values"])[::2][:, [1, 4]]
    np.testing.assert_allclose(some["variables"]["resid_pre"]["values"], expected, atol=1e-5)
    check(cli(*common, "--positions", "7"), 5, "no positions 7 in this prompt", "allowed: 0 to 4, or -5 to -1")
    check(cli(*common, "--positions", "x", "-m", saved / "none"), 5, "SiteError")  # before a model is opened


def test_a_file_of_pairs(cli: Cli, saved: Path, tmp_path: Path) -> None:
    rows = ["clean,corrupt,answer,foil", *(f"{' '.join(PAIR[:1])},{PAIR[1]}, mat, barn" for _ in range(2))]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    done = cli("patch", tmp_path / "pairs.csv", "-m", saved, "--site", "mlp_out", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)["variables"]
    assert np.shape(told["mlp_out_each"]["values"]) == (2, families.N_LAYERS, 5)
    one = json.loads(cli("patch", *PAIR, "--answer", " mat", "--foil", " barn", "-m", saved, "--json").out)["variables"]
    np.testing.assert_allclose(told["mlp_out"]["values"], one["mlp_out"]["values"], atol=1e-4)


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
    check(cli("patch", *PAIR, "-m", saved), 6, "there is nothing to read. To do: give --answer.")
    check(cli("patch", "-m", saved), 2, "Missing argument 'clean'")
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


@pytest.mark.parametrize("begun", [0, 1])
def test_ctrl_c_in_the_middle(
    cli: Cli, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: int
) -> None:
    from microtome.sweep import _groups
    from microtome.sweep import _sweep as _cells

    own, calls = _cells._run_pass, [0]
    monkeypatch.setattr(_groups, "FIXED", 0)  # several passes

    def stopped(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > begun:
            raise KeyboardInterrupt
        return own(*arguments, **options)

    monkeypatch.setattr(_cells, "_run_pass", stopped)
    done = cli("patch", *PAIR, "--answer", "mat", "-m", saved, "-o", tmp_path / "p.html", "--json")
    check(done, 130, "stopped; nothing is left half-written")
    assert calls[0] == begun + 1
    assert done.out == ""
    assert re.search(r"plan: \d+ cells in [2-9]", done.err)
    assert not list(tmp_path.iterdir())
