"""Padding changes no row: every site of every family, padded on either side, is that of the row run alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt
from microtome.anatomy import parse_indices

CAUSAL = [n for n in families.NAMES if families.KIND[n] == "causal"]
LENGTHS = (5, 9, 7)
NEAR = {"rtol": 1e-4, "atol": 2e-5}
Side = Literal["left", "right"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def row(n: int) -> list[int]:
    return torch.randint(5, families.VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist()


ROWS = [row(n) for n in LENGTHS]


def real(x: Tensor, site: str, mask: Tensor) -> Tensor:
    """A row of a captured tensor at its real tokens only."""
    for axis, dim in enumerate(mt.anatomy.parse(site).spec.dims[1:]):
        if dim in ("pos", "q_pos", "k_pos"):
            x = x.index_select(axis, mask.nonzero().squeeze(1))
    return x


@pytest.mark.parametrize("name", families.some(2))
def test_every_site_of_a_padded_row_is_that_of_the_row_alone(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    sites = [str(site) for site in model.anatomy.hook_points if site.layer in (None, 1)]
    alone = [model.run([tokens], capture=sites) for tokens in ROWS[:2]]
    for side, pads in (("left", (4, 0)), ("right", (0, 0))):
        together = model.run(ROWS[:2], capture=sites, padding=side)
        assert together.batch.pads == pads
        for i, one in enumerate(alone):
            mask = together.mask[i]
            for site in sites:
                got, expected = real(together[site][i], site, mask), one[site][0]
                if site == "1.attn.scores":  # what a mask forbids is some number near the lowest
                    got, expected = got.clamp(min=-1e4), expected.clamp(min=-1e4)
                    if name == "mpt":  # whose position bias counts from the end of the batch: a constant a row
                        got, expected = got - got.amax(-1, keepdim=True), expected - expected.amax(-1, keepdim=True)
                        got, expected = got.clamp(min=-1e3), expected.clamp(min=-1e3)
                torch.testing.assert_close(got, expected, **NEAR, msg=lambda text, at=(side, site): f"{at}: {text}")
            pattern = together["1.attn.pattern"][i][:, mask]
            assert pattern[..., ~mask].abs().sum() == 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bert", "mixtral", "bloom"])
def test_the_order_of_rows_changes_nothing(name: str, side: Side) -> None:
    model = mt.open(families.build(name), prove=False)
    one = model.run(ROWS, capture="*.resid_post@-1", padding=side)
    other = model.run([ROWS[i] for i in (2, 0, 1)], capture="*.resid_post@-1", padding=side)
    for k, i in enumerate((2, 0, 1)):
        torch.testing.assert_close(other.logits[k][other.mask[k]], one.logits[i][one.mask[i]], **NEAR)
        torch.testing.assert_close(other["*.resid_post@-1"][:, k], one["*.resid_post@-1"][:, i], **NEAR)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "opt-prenorm", "roberta", "bert"])
def test_positions_count_the_tokens_of_each_row(name: str, side: Side) -> None:
    model = mt.open(families.build(name), prove=False)
    run = model.run(ROWS, capture=["1.resid_post", "1.attn.pattern"], padding=side)
    for i, n in enumerate(LENGTHS):
        first = run.batch.pads[i]
        for position, column in ((0, first), (4, first + 4), (-1, first + n - 1), (-5, first + n - 5)):
            assert torch.equal(run[f"1.resid_post@{position}"][i, 0], run["1.resid_post"][i, column])
            assert torch.equal(run[f"1.attn.pattern@{position}"][i, :, 0], run["1.attn.pattern"][i, :, column])
        assert torch.equal(run["1.resid_post@last"][i, 0], run["1.resid_post"][i, first + n - 1])


EDITS: list[mt.edit.Edit] = [
    mt.edit.Scale("1.resid_post@-1", 2.0),
    mt.edit.Zero("0.attn.z[1]@0"),
    mt.edit.Add("1.mlp_out@1,-2", torch.linspace(-1, 1, families.D_MODEL)),
    mt.edit.KnockOut("1.attn.scores[0,2]@-1", keys="0"),
    mt.edit.KnockOut("1.attn.scores@-2--1", keys="-3,1"),
    mt.edit.KnockOut("*.attn.scores[3]", keys="*"),
    mt.edit.Scale("1.attn.pattern[1]@2", 0.5),
    mt.edit.Scale("1.attn.scale@3", 0.5),
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "falcon-mqa", "gpt_neo", "bloom", "mistral"])
def test_an_edit_of_a_padded_batch_is_the_edit_of_each_row(name: str, side: Side) -> None:
    model = mt.open(families.build(name), prove=False)
    plain = model.run(ROWS, padding=side)
    for edit in EDITS:
        together = model.run(ROWS, edits=[edit], padding=side)
        for i, tokens in enumerate(ROWS):
            alone = model.run([tokens], edits=[edit])
            got = together.logits[i][together.mask[i]]
            torch.testing.assert_close(got, alone.logits[0], **NEAR, msg=lambda text, e=edit: f"{e}: {text}")
            if name not in ("gpt_neo", "mistral"):  # whose windows do not reach all keys that are cut
                assert not torch.allclose(got, plain.logits[i][plain.mask[i]], atol=1e-4)


def test_a_key_outside_a_row_is_refused() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.EditError, match=r"no keys 6 at 1\.attn\.scores in row 0; allowed: 0 to 4"):
        model.run(ROWS, edits=[mt.edit.KnockOut("1.attn.scores", keys="6")], padding="left")


def test_a_source_padded_otherwise_is_refused() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    left, right = (model.run(ROWS, capture="1.resid_post", padding=side) for side in ("left", "right"))
    with pytest.raises(mt.errors.EditError, match=r"names other columns in the source.*pad both runs alike"):
        model.run(ROWS, edits=[mt.edit.Patch("1.resid_post@0", left)])
    same = model.run(ROWS, edits=[mt.edit.Patch("1.resid_post@0,-1", right)])
    torch.testing.assert_close(same.logits, right.logits, **NEAR)
    longer = model.run([row(9)], capture="1.resid_post")
    with pytest.raises(mt.errors.EditError, match="names other columns in the source"):
        model.run([row(7)], edits=[mt.edit.Patch("1.resid_post@-1", longer)])
    run = model.run([row(7)], capture="1.resid_post", edits=[mt.edit.Patch("1.resid_post@3", longer)])
    assert torch.equal(run["1.resid_post@3"], longer["1.resid_post@3"])


@pytest.mark.parametrize("name", families.some(2, CAUSAL))
def test_a_generation_of_padded_rows_is_that_of_each_row(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    edit = mt.edit.Add("1.resid_post@-2", torch.linspace(-2, 2, model.anatomy.d_model))
    batch = model.to_batch(ROWS, "left")
    with model.editing(edit):
        together = model.hf.generate(input_ids=batch.tokens, attention_mask=batch.mask.long(), **options)
        for i, tokens in enumerate(ROWS):
            alone = model.hf.generate(input_ids=torch.tensor([tokens]), **options)
            assert together[i, max(LENGTHS) :].tolist() == alone[0, len(tokens) :].tolist()


CUTS = {
    "a key": mt.edit.KnockOut("1.attn.scores", keys="1"),
    "keys from the end": mt.edit.KnockOut("*.attn.scores[0,2]", keys="-2--1"),
    "queries of the prompt": mt.edit.KnockOut("1.attn.scores@-1", keys="0,2"),
    "queries to come": mt.edit.KnockOut("1.attn.scores@generated", keys="-1"),
    "zeros": mt.edit.Zero("1.attn.scores[1]"),
    "a value": mt.edit.Scale("1.attn.v@1", 3.0),
    "a key's vector": mt.edit.Scale("0.attn.k@-2", 3.0),
}


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize(
    "name", ["llama-gqa", "gpt2", "mistral", "gemma2", "gpt_oss", "falcon-gqa", "bloom", "gpt_neo"]
)
def test_cuts_in_a_generation_of_padded_rows_are_those_of_each_row(name: str, cache: str | None) -> None:
    hf = families.build(name)
    if cache is not None and not hf._can_compile_fullgraph:
        pytest.skip("the family takes no static cache")
    model = mt.open(hf, prove=False)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    padded = options if cache is None else options | {"cache_implementation": cache, "disable_compile": True}
    batch = model.to_batch(ROWS, "left")
    for what, edit in CUTS.items():
        with model.editing(edit):
            together = torch.stack(
                model.hf.generate(input_ids=batch.tokens, attention_mask=batch.mask.long(), **padded).logits, dim=1
            )
            for i, tokens in enumerate(ROWS):
                alone = model.hf.generate(input_ids=torch.tensor([tokens]), **options)
                text = f"{what}, row {i}: "
                torch.testing.assert_close(
                    together[i], torch.cat(alone.logits), **NEAR, msg=lambda more, text=text: text + more
                )
        if "generated" not in edit.site:  # the loop of runs, which knows no cache
            rest = alone.sequences[0, :-1].unsqueeze(0)
            whole = model.run(rest, edits=[_from_start(edit, len(tokens))])
            torch.testing.assert_close(torch.cat(alone.logits), whole.logits[0, len(tokens) - 1 :], **NEAR, msg=what)


def _from_start(edit: mt.edit.Edit, length: int) -> mt.edit.Edit:
    """The same edit with positions that count from the start, so that they mean the same in a longer row."""
    assert isinstance(edit, mt.edit.SiteEdit)

    def counted(selection: str) -> str:
        chosen = parse_indices(selection).resolve(length)
        return ",".join(map(str, chosen or ()))

    site, at, positions = edit.site.partition("@")
    changed = {"site": f"{site}@{counted(positions)}"} if at else {}
    if isinstance(edit, mt.edit.KnockOut):
        changed["keys"] = counted(edit.keys)
    return dataclasses.replace(edit, **changed)


def test_a_swap_in_a_generation_is_the_swap_in_a_run() -> None:
    model = mt.open(families.build("mistral"), prove=False)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    others = [[*tokens[:2], 7, *tokens[3:]] for tokens in ROWS]
    batch = model.to_batch(ROWS, "left")
    for site in ("1.resid_post@2", "1.attn.v@2", "1.attn.k@2", "0.attn.z[1]@2,3", "1.attn.scores[2]@3"):
        source = model.run(others, capture=site.partition("[")[0].partition("@")[0], padding="left")
        if "scores" in site:  # keys that the window has dropped are not those of the source
            with model.editing(mt.edit.Patch(site, source)):
                out = model.hf.generate(input_ids=batch.tokens, attention_mask=batch.mask.long(), **options)
            first = model.run(ROWS, edits=[mt.edit.Patch(site, source)], padding="left").logits[:, -1]
            torch.testing.assert_close(out.logits[0], first, **NEAR)
            continue
        with model.editing(mt.edit.Patch(site, source)):
            out = model.hf.generate(input_ids=batch.tokens, attention_mask=batch.mask.long(), **options)
        for i, tokens in enumerate(ROWS):
            alone = model.run([others[i]], capture=list({site.partition("[")[0].partition("@")[0]}))
            length = len(tokens)
            rest = out.sequences[i, batch.pads[i] : -1].unsqueeze(0)
            name = site.partition("[")[0].partition("@")[0]
            value = alone[name]
            longer = torch.cat([value, value[:, -1:].expand(-1, 3, *value.shape[2:])], dim=1)
            run = model.run(rest, edits=[mt.edit.Patch(site, {name: longer})])
            got = torch.stack(out.logits, dim=1)[i]
            torch.testing.assert_close(got, run.logits[0, length - 1 :], **NEAR, msg=lambda more, s=site: s + more)


def test_a_swap_that_reaches_past_its_source_is_refused() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    source = model.run([row(7)], capture=["1.resid_post", "1.attn.k", "1.attn.scores"])
    for site in ("1.resid_post", "1.resid_post@generated", "1.attn.k", "1.attn.scores"):
        with pytest.raises(mt.errors.EditError), model.editing(mt.edit.Patch(site, source)):
            model.hf.generate(input_ids=torch.tensor([row(7)]), max_new_tokens=3, do_sample=False, pad_token_id=0)
