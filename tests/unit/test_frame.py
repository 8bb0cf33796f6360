"""Which rows, columns and positions a frame names."""

from __future__ import annotations

import pytest
import torch

import microtome as mt
from microtome.anatomy import Indices, Rule, parse, parse_indices
from microtome.edit import Frame

CPU = torch.device("cpu")
PADDED = Frame(((2, 3), (0, 5)), 5)
GENERATION = Frame(((2, 3), (0, 5)), 5, generated=2)


def at(text: str) -> Indices | Rule:
    return parse(f"0.mlp_out@{text}").positions


@pytest.mark.parametrize(
    ("frame", "positions", "columns"),
    [
        (PADDED, "0", [[2], [0]]),
        (PADDED, "-1", [[4], [4]]),
        (PADDED, "1-2", [[3, 4], [1, 2]]),
        (PADDED, "last", [[4], [4]]),
        (PADDED, "prompt", None),
        (PADDED, "*", None),
        (GENERATION, "last", [[4, 5, 6], [4, 5, 6]]),
        (GENERATION, "generated", [[5, 6], [5, 6]]),
        (GENERATION, "prompt", [[0, 1, 2, 3, 4]] * 2),
        (GENERATION, "0", [[2], [0]]),
    ],
)
def test_positions_become_columns(frame: Frame, positions: str, columns: list[list[int]] | None) -> None:
    found = frame.columns_of(at(positions))
    assert (None if found is None else found.tolist()) == columns


def test_what_names_no_column_is_refused() -> None:
    with pytest.raises(mt.errors.SiteError, match=r"no positions @3 in row 0; allowed: 0 to 2, or -3 to -1"):
        PADDED.columns_of(at("3"))
    with pytest.raises(mt.errors.SiteError, match=r'"@generated" selects nothing in a run'):
        PADDED.columns_of(at("generated"))
    with pytest.raises(mt.errors.EditError, match=r"no rows \(2,\) in this batch; allowed: 0 to 1"):
        PADDED.select(at("0"), (2,), 5, CPU)
    with pytest.raises(mt.errors.EditError, match=r"no keys 4 at 0.attn.scores in row 0"):
        PADDED.resolve(parse_indices("4"), "keys {} at 0.attn.scores", mt.errors.EditError)
    (second,) = PADDED.select(at("*"), (1,), 5, CPU)
    assert second.resolve(parse_indices("4")) == [[4]]


def test_a_selected_part_is_taken_and_indexed() -> None:
    x = torch.arange(10).reshape(2, 5, 1)
    (cut,) = PADDED.select(at("0-1"), None, 5, CPU)
    assert cut.take(x).squeeze(-1).tolist() == [[2, 3], [5, 6]]
    assert x[cut.index(x)].squeeze(-1).tolist() == [[2, 3], [5, 6]]
    assert cut.positions(2, CPU).tolist() == [[0, 1], [0, 1]]
    (row,) = PADDED.select(at("*"), (0,), 5, CPU)
    assert row.take(x).squeeze(-1).tolist() == [[0, 1, 2, 3, 4]]
    assert row.positions(5, CPU).tolist() == [[-2, -1, 0, 1, 2]]
    assert row.real(5, CPU).tolist() == [[False, False, True, True, True]]
    assert row.last_columns() == {0: 4}


def test_a_tensor_that_begins_later_holds_what_is_named_of_some_rows() -> None:
    last = GENERATION.select(at("-1"), None, 2, CPU)
    assert last == []  # both lie in the cache
    short = Frame(((0, 3), (0, 5)), 5)
    (cut,) = short.select(at("-1"), None, 2, CPU)
    assert cut.rows is not None
    assert cut.rows.tolist() == [1]
    x = torch.tensor([[3, 4], [8, 9]])
    assert cut.take(x).tolist() == [[9]]
    assert cut.take_source(torch.arange(10).reshape(2, 5)).tolist() == [[9]]
    (generated,) = GENERATION.select(at("generated"), None, 1, CPU)
    assert generated.take(torch.tensor([[7], [8]])).tolist() == [[7], [8]]
    assert generated.positions(1, CPU).tolist() == [[4], [6]]
    assert generated.real(1, CPU).all()


def test_rows_of_a_prompt_are_all_of_its_beams() -> None:
    frame = Frame(((0, 2),) * 6, 2, generated=0, beams=3)
    (cut,) = frame.select(at("*"), (1,), 2, CPU)
    assert cut.rows is not None
    assert cut.rows.tolist() == [3, 4, 5]
    assert frame.shape == (6, 2)


def test_columns_of_keys_are_masked_behind_a_cache() -> None:
    assert PADDED.mask([[2], [0, 1]], 5, CPU).int().tolist() == [[0, 0, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert PADDED.mask([[2], [0, 1, 4]], 2, CPU).int().tolist() == [[0, 0], [0, 1]]


def test_a_row_of_another_run_is_cut_to_its_own_tokens() -> None:
    x = torch.arange(10).reshape(2, 5)
    row = Frame(((0, 3),), 3, source_row=0)
    assert row.source_of(x, ("batch", "pos"), [(2, 3), (0, 5)]).tolist() == [[2, 3, 4]]
    assert row.spans_of([(2, 3), (0, 5)]) == [(0, 3)]
    assert row.source_of(x, ("batch", "pos"), None).tolist() == [[0, 1, 2]]
    assert row.source_of(x[:1], ("batch", "pos"), None).tolist() == [[0, 1, 2, 3, 4]]
    assert torch.equal(PADDED.source_of(x, ("batch", "pos"), None), x)
    assert PADDED.spans_of([(1, 4)]) == [(1, 4), (1, 4)]
    assert PADDED.spans_of([(0, 1)] * 3) is None
