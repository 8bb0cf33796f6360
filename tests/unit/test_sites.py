"""The site grammar: every address prints as it parses, and every mistake is told with what would be right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import families

import microtome as mt
from microtome.anatomy import RULES, SITES, Address, Indices, parse

integers = st.integers(-40, 40)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    low, high = draw(integers), draw(integers)
    return (min(low, high), max(low, high)) if (low < 0) == (high < 0) else (low, high)


# Plain data: what is built of it is built in the tests, because checked constructors draw random numbers of their own.
selections = st.none() | st.lists(ranges(), min_size=1, max_size=4).map(tuple)
positions = selections | st.sampled_from(sorted(RULES))


def selected(data: tuple[tuple[int, int], ...] | None) -> Indices:
    return Indices(data)


@given(st.sampled_from(sorted(SITES)), selections, selections, positions)
def test_every_address_prints_as_it_parses(name: str, layers: object, units: object, at: object) -> None:
    where = selected(layers) if SITES[name].scope == "layer" else None
    address = Address(name, where, selected(units), at if isinstance(at, str) else selected(at))
    assert parse(str(address)) == address


@given(selections, st.integers(1, 50))
def test_a_selection_resolves_inside_or_not_at_all(data: object, size: int) -> None:
    chosen = selected(data).resolve(size)
    if chosen is not None:
        assert all(0 <= i < size for i in chosen)
        assert len(set(chosen)) == len(chosen) > 0


@given(st.text(max_size=12))
def test_any_text_is_an_address_or_a_site_error(text: str) -> None:
    told = ""
    try:
        parse(text)
    except mt.errors.SiteError as problem:
        told = str(problem)
    assert not told or len(told) > 20


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("12.mlp.psot", 'no site is called "mlp.psot" in "12.mlp.psot". Did you mean "mlp.post"'),
        ("mlp.post", '"mlp.post" names no layer. To do: write "*.mlp.post" for all layers or "0.mlp.post" for one.'),
        ("3.logits", '"logits" belongs to the model, not to a layer'),
        ("3.mlp.post[a]", 'cannot read units in "3.mlp.post[a]"; got "a"'),
        ("7-3.resid_post", 'the range "7-3" in "7-3.resid_post" runs backwards. To do: write "3-7".'),
        ("", 'cannot read the address ""'),
    ],
)
def test_mistakes_are_told(text: str, told: str) -> None:
    with pytest.raises(mt.errors.SiteError) as caught:
        parse(text)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("name", "address", "told"),
    [
        ("llama-gqa", "3.mlp.post", 'no layers 3 for "3.mlp.post" in LlamaForCausalLM; allowed: layers 0 to 2.'),
        ("llama-gqa", "0.attn.k[2]", "allowed: kv_head 0 to 1"),
        ("llama-gqa", "0.attn.scale[0]", "has no units to choose from"),
        ("gpt2", "0.mlp.gate", "no site 0.mlp.gate in GPT2LMHeadModel: the MLP is not gated: see mlp.pre."),
        ("gptj", "*.resid_mid", "both branches read resid_pre (parallel block)"),
        ("mixtral", "1.mlp.post", "the layer is a mixture: see mlp.router and mlp.experts.post"),
        ("bert", "final.scale", "there is no norm of a known form"),
    ],
)
def test_what_a_model_lacks_is_told_with_its_reason(name: str, address: str, told: str) -> None:
    model = mt.open(families.build(name), prove=False)
    with pytest.raises(mt.errors.SiteError) as caught:
        model.anatomy.sites(parse(address))
    assert told in str(caught.value)
