"""What is captured is what the model computed: against transformers' own outputs, hand-made hooks, and itself cut."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt
from microtome.run._batch import rows_of

CAUSAL = [n for n in families.NAMES if families.KIND[n] == "causal"]
EAGER = ["gpt2", "llama-gqa", "qwen3", "phi", "opt-prenorm", "gemma3", "stablelm-parallel"]


def ids(rows: int = 2, length: int = 9, seed: int = 3) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", families.some(2))
def test_the_stream_is_what_transformers_reports(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    with torch.no_grad():
        states = model.hf(input_ids=ids(), output_hidden_states=True).hidden_states
    run = model.run(ids(), capture="*.resid_pre")
    for layer in range(model.anatomy.n_layers):
        assert torch.equal(run[f"{layer}.resid_pre"], states[layer])


@pytest.mark.parametrize("name", families.some(2, EAGER))
def test_patterns_are_those_of_eager_attention(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    run = model.run(ids(), capture="*.attn.pattern")
    eager = families.build(name)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        expected = eager(input_ids=ids(), output_attentions=True).attentions
    for layer, pattern in enumerate(expected):
        assert (run[f"{layer}.attn.pattern"] - pattern).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "falcon-gqa", "bloom", "phi3", "mixtral"])
def test_a_cut_address_is_the_cut_of_the_whole(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    sites = [s for s in model.anatomy.hook_points if s.layer == 1 and s.spec.unit != "batch"]
    cut = [f"{s}[0]@2-4,-1" for s in sites]
    whole = model.run(ids(), capture=[str(s) for s in sites])
    part = model.run(ids(), capture=cut)
    assert {str(a) for a in part.captured} == set(cut)
    for site, address in zip(sites, cut, strict=True):
        pos = site.spec.dims.index(site.spec.pos)
        unit = site.spec.dims.index(site.spec.unit)
        x = whole[str(site)].index_select(pos, torch.tensor([2, 3, 4, 8])).narrow(unit, 0, 1)
        assert torch.equal(part[address], x), address
        assert torch.equal(whole[address], x), address


def test_layers_stack_and_negative_layers_count_from_the_end() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    run = model.run(ids(), capture="*.mlp.post")
    assert run["*.mlp.post"].shape == (3, 2, 9, families.D_MLP)
    assert torch.equal(run["1-2.mlp.post"][1], run["-1.mlp.post"])
    assert run.dims("*.mlp.post") == ("layer", "batch", "pos", "neuron")
    with pytest.raises(mt.errors.SiteError, match=r'"0\.resid_pre" was not captured; got'):
        run["0.resid_pre"]


@pytest.mark.parametrize(
    ("options", "layers"), [({"stop_at": 2}, [0, 1]), ({"edits": [mt.edit.Skip(1)]}, [0, 2]), ({}, [0, 1, 2])]
)
def test_all_layers_of_a_run_are_those_that_it_reached(options: dict[str, Any], layers: list[int]) -> None:
    run = mt.open(families.build("llama-gqa"), prove=False).run(ids(), capture="*.mlp.post", **options)
    assert torch.equal(run["*.mlp.post"], torch.stack([run[f"{i}.mlp.post"] for i in layers]))
    assert torch.equal(run["*.mlp.post[3]@-1"], run["*.mlp.post"][:, :, -1:, 3:4])
    assert run.dataset("*.mlp.post")["layer"].values.tolist() == layers
    assert "*.mlp.post" in run
    with pytest.raises(mt.errors.SiteError, match=r'"0\.mlp_out" was not captured'):
        run["*.mlp_out"]


def test_what_is_not_wanted_is_not_computed() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    seen: list[int] = []
    for i, block in enumerate(model.hf.model.layers):
        block.register_forward_hook(lambda m, a, o, i=i: seen.append(i))
    model.hf.lm_head.register_forward_hook(lambda m, a, o: seen.append(99))
    whole = model.run(ids(), capture="2.resid_pre")
    assert seen == [0, 1, 2, 99]
    seen.clear()
    stopped = model.run(ids(), capture="2.resid_pre", stop_at=2)
    assert seen == [0, 1]
    assert torch.equal(whole["2.resid_pre"], stopped["2.resid_pre"])
    with pytest.raises(mt.errors.SiteError, match="this run has no logits"):
        _ = stopped.logits
    seen.clear()
    model.run(ids(), logits=False, capture="final")
    assert 99 not in seen
    with pytest.raises(mt.errors.SiteError, match="cannot stop at layer 3"):
        model.run(ids(), stop_at=3)


def test_observers_see_what_captures_keep() -> None:
    model = mt.open(families.build("gpt2"), prove=False)
    seen: dict[str, Tensor] = {}
    run = model.run(ids(), capture="*.mlp.post", observe={"*.mlp.post": lambda site, x: seen.update({str(site): x})})
    assert all(torch.equal(run[name], x) for name, x in seen.items())
    assert len(seen) == 3


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "deepseek_v3-qlora", "phi3", "falcon-gqa", "bloom", "codegen"])
def test_the_plan_is_what_is_kept(name: str) -> None:
    """Counted in whole storages: a tensor cut out of a larger one would keep all of that."""
    model = mt.open(families.build(name), prove=False)
    everywhere = [str(site) for site in model.anatomy.hook_points if site.layer in (None, 1)]
    for address in ("*.resid_post", "1.attn.pattern[2]@-1", "*.mlp_out[0-4]@2-5", "1.attn.z@last", *everywhere):
        plan = model.plan(ids(), address)
        run = model.run(ids(), capture=address)
        kept = sum(x.untyped_storage().nbytes() for x in run.captured.values())
        assert plan.bytes_by_address[address] == kept, address
        assert plan.logits_bytes == run.logits.untyped_storage().nbytes()
    with pytest.raises(
        mt.errors.BudgetError,
        match=r"most of it logits; got [\d.,]+ (B|KiB); allowed: 10 B, which is [\d.,]+ (B|KiB) less",
    ):
        model.run(ids(), budget=10)


def test_only_what_is_cut_out_of_a_larger_tensor_is_copied() -> None:
    model, seen = mt.open(families.build("phi3"), prove=False), dict[str, Tensor]()
    sites = ["1.mlp.gate", "1.mlp.post", "1.resid_post", "1.attn.z"]
    look = dict.fromkeys(sites, lambda site, x: seen.update({str(site): x}))
    for grad in (False, True):
        run = model.run(ids(), capture=sites, observe=look, grad=grad)
        same = {name for name, x in seen.items() if run[name].data_ptr() == x.data_ptr()}
        assert same == set(sites if grad else sites[1:])
        assert all(torch.equal(run[name], x) for name, x in seen.items())
    grads = run.grad(run["1.mlp.gate"].sum())  # through the capture itself
    assert torch.equal(grads["1.mlp.gate"], torch.ones_like(run["1.mlp.gate"]))


def test_a_dataset_has_axes_coordinates_and_provenance() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    data = model.run(ids(), capture=["*.attn.z[1,3]", "*.mlp.post"]).dataset()
    assert data["attn.z"].dims == ("layer", "batch", "pos", "head", "d_head")
    assert data["head"].values.tolist() == [1, 3]
    assert data.attrs["fingerprint"] == model.fingerprint
    assert data["mlp.post"].attrs["meaning"].startswith("neuron activations")


def test_captures_that_select_differently_have_axes_of_their_own() -> None:
    """The README's mixed capture: every value stands once, under its own labels, beside the tokens of its positions."""
    model = mt.open(families.build("llama-gqa"), prove=False)
    run = model.run(ids(), capture=["*.resid_post", "1.mlp.post[4]@-1", "2.attn.pattern[3]", "1.mlp.post@2,0", "final"])
    data = run.dataset()
    dims = {name: array.dims for name, array in data.items()}
    assert dims == {
        "resid_post": ("layer", "batch", "pos", "d_model"),
        "mlp.post": ("layer_2", "batch", "pos_3", "neuron_2"),
        "attn.pattern": ("layer_3", "batch", "head", "q_pos", "k_pos"),
        "1.mlp.post@2,0": ("layer_2", "batch", "pos_2", "neuron"),
        "final": ("batch", "pos", "d_model"),
    }
    kept = {"layer": [0, 1, 2], "layer_2": [1], "layer_3": [2], "pos_2": [2, 0], "pos_3": [8], "neuron_2": [4]}
    assert {dim: data[dim].values.tolist() for dim in kept} == kept
    for name, array in data.items():
        assert np.array_equal(array.values.squeeze(), run[array.attrs["address"]].numpy().squeeze()), name
        assert not np.isnan(array.values).any()
    for end, columns in (("", slice(None)), ("_2", [2, 0]), ("_3", [-1])):
        assert data[f"token{end}"].dims == ("batch", f"pos{end}")
        assert data[f"token{end}"].values.tolist() == [[str(i) for i in row] for row in ids()[:, columns].tolist()]
        assert data[f"mask{end}"].values.all()
    assert run.dataset("1.mlp.post[4]@-1")["pos"].values.tolist() == [8]


def test_positions_named_one_by_one_are_the_same_axis_as_all_of_them() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    data = model.run(ids()[:1], capture=["0.mlp.post@0-8", "0.resid_pre"]).dataset()
    assert data["mlp.post"].dims[:3] == data["resid_pre"].dims[:3] == ("layer", "batch", "pos")
    rows = model.run([[5, 6, 7], [8, 9, 10, 11]], capture=["0.attn.z@-1", "0.mlp.post@0"], padding="left").dataset()
    assert (rows["attn.z"].dims[2], rows["mlp.post"].dims[2]) == ("pos", "pos_2"), "one position each, not the same one"
    assert rows["token"].values.tolist() == [["7"], ["11"]]
    assert rows["token_2"].values.tolist() == [["5"], ["8"]]


def test_a_head_goes_to_pandas() -> None:
    """A table of one head, one row a value, that keeps its token and its numbers."""
    model = mt.open(families.build("llama-gqa"), prove=False)
    run = model.run(ids()[:1], capture=["1.attn.z[3]", "1.attn.pattern[3]", "0.mlp.post[2]@-1"])
    frame = run.dataset("1.attn.z[3]").to_dataframe().reset_index()
    assert len(frame) == run["1.attn.z[3]"].numel()
    row = frame[(frame.pos == 4) & (frame.d_head == 2)].iloc[0]
    assert (row["layer"], row["head"], row["token"]) == (1, 3, str(int(ids()[0, 4])))
    assert row["attn.z"] == run["1.attn.z[3]"][0, 4, 0, 2]
    one = run.dataset()["mlp.post"].to_dataframe()
    assert len(one) == 1
    assert float(one["mlp.post"].iloc[0]) == float(run["0.mlp.post[2]@-1"])


def test_the_axes_of_an_address_are_those_of_its_tensor() -> None:
    run = mt.open(families.build("llama-gqa"), prove=False).run(ids(), capture=["*.mlp.post", "final"])
    for address in ("*.mlp.post", "1.mlp.post", "0-1.mlp.post[3]@-1", "final", "logits"):
        assert len(run.dims(address)) == run[address].dim()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_dataset_of_padded_rows_shows_no_pad_as_data(side: str) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    rows = [[5, 6, 7], [8, 9, 10, 11, 12]]
    run = model.run(rows, capture=["*.mlp.post", "*.attn.pattern"], padding=side)
    data = run.dataset()
    assert data["mask"].values.tolist() == run.mask.tolist()
    assert np.isnan(data["mlp.post"].values).any(axis=(0, 3)).tolist() == (~run.mask).tolist()
    pattern = np.isnan(data["attn.pattern"].values[0, :, 0])
    assert pattern.any(axis=2).all(axis=1).tolist() == [True, False]  # a pad is no key, and no query
    assert pattern.all(axis=2).tolist() == (~run.mask).tolist()
    # A position is one over real tokens, so that the label finds the same token in every row.
    assert data["pos"].values.tolist() == ([0, 1, 2, 3, 4] if side == "right" else [-5, -4, -3, -2, -1])
    same = 0 if side == "right" else -1
    assert data["token"].sel(pos=same).values.tolist() == [str(row[same]) for row in rows]
    assert (data["token"].values == "").tolist() == (~run.mask).tolist()


def test_a_dataset_names_the_tokens_that_were_selected() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    data = model.run([[5, 6]], capture="0.mlp.post@1,0").dataset()
    assert data["token"].values.tolist() == [[str(5 + p) for p in data["pos"].values.tolist()]]
    padded = model.run([[5, 6, 7], [8, 9, 10, 11]], capture=["0.mlp.post@-1", "0.attn.z@0"], padding="left")
    last = padded.dataset("0.mlp.post@-1")
    assert last["token"].values.tolist() == [["7"], ["11"]]
    assert last["pos"].values.tolist() == [-1]
    first = padded.dataset("0.attn.z@0")
    assert first["token"].values.tolist() == [["5"], ["8"]]
    assert first["pos"].values.tolist() == [0]


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ([[6.7, 8.9]], "a token id must be an integer; got 6.7"),
        ([True, False], "a token id must be an integer; got True"),
        ([[5, None]], "a token id must be an integer; got None"),
        (torch.tensor([True, False]), "a prompt tensor must hold integer token ids; got torch.bool"),
        (None, "cannot read the prompt; got NoneType"),
        (3, "cannot read the prompt; got int"),
        (["a", 5], "cannot read the prompt; got list"),
    ],
)
def test_prompts_that_are_no_ids_are_refused(prompt: Any, told: str) -> None:
    with pytest.raises(mt.errors.PromptError, match=re.escape(told)):
        rows_of(prompt, None)


def test_ids_of_other_integer_types_are_read() -> None:
    for prompt in (np.array([5, 6]), [np.int64(5), np.int32(6)], [torch.tensor([5, 6])], [torch.tensor(5), 6]):
        assert [row.tolist() for row in rows_of(prompt, None)] == [[5, 6]]
    assert [row.tolist() for row in rows_of(np.array([[5, 6], [7, 8]]), None)] == [[5, 6], [7, 8]]


@pytest.mark.parametrize(
    "asked", [{"dtype": torch.float64}, {"device": "cpu"}, {"revision": "main"}, {"trust_remote_code": True}]
)
def test_a_loaded_model_is_not_silently_left_as_it_is(asked: dict[str, Any]) -> None:
    with pytest.raises(mt.errors.ModelError, match=rf"already loaded is left as it is; got {next(iter(asked))}="):
        mt.open(families.build("gpt2"), **asked, prove=False)


def test_a_plan_is_printed_in_units_that_show_it() -> None:
    text = str(mt.open(families.build("gpt2"), prove=False).plan(ids(), "0.mlp.post[0]@0"))
    assert " 0.0 " not in text
    assert "8 B" in text


def test_nothing_given_is_changed() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    tokens = ids()
    before = tokens.clone()
    first = model.run(tokens, capture="*.mlp.post").logits
    assert torch.equal(tokens, before)
    assert torch.equal(first, model.run(tokens).logits)


# ------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", families.some(3, CAUSAL))
def test_padding_changes_no_row(name: str, side: str) -> None:
    model = mt.open(families.build(name), prove=False)
    rows = [ids(1, n, seed=n)[0].tolist() for n in (5, 9, 7)]
    together = model.run(rows, capture=["2.resid_post@-1", "1.attn.z@0", "0.mlp_out"], padding=side)
    for i, row in enumerate(rows):
        alone = model.run([row], capture=["2.resid_post@-1", "1.attn.z@0", "0.mlp_out"])
        real = together.mask[i]
        assert (together.logits[i, real] - alone.logits[0]).abs().max() < 1e-4
        assert (together["2.resid_post@-1"][i] - alone["2.resid_post@-1"][0]).abs().max() < 1e-4
        assert (together["1.attn.z@0"][i] - alone["1.attn.z@0"][0]).abs().max() < 1e-4
        assert (together["0.mlp_out"][i, real] - alone["0.mlp_out"][0]).abs().max() < 1e-4


def test_positions_beyond_the_shortest_row_are_refused() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.SiteError, match="no positions @6 in row 0; allowed: 0 to 2"):
        model.run([[5, 6, 7], [5, 6, 7, 8, 9, 10, 11]], capture="0.resid_pre@6")


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No garbage is collected: what is freed is freed because nothing refers to it any more."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("grad", [False, True])
def test_captures_are_freed_with_the_run_and_not_while_anything_of_it_is_alive(grad: bool) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    addresses = ["*.mlp.post", "*.resid_post", "1.attn.z[2]@-1"]
    first = model.run(ids(), capture=addresses, grad=grad)
    expected = {address: x.detach().clone() for address, x in first.captured.items()}
    held = [weakref.ref(x) for x in first.captured.values()]
    kept, view, array = first["0.mlp.post"], first["1.mlp.post"][:, 2:], first["1.resid_post"].detach().numpy()
    del first
    if not grad:  # autograd's graph refers to the tensors too, from tensors that are alive
        assert [ref() is not None for ref in held].count(True) <= 3
    for seed in (4, 5):
        model.run(ids(seed=seed), capture=addresses, grad=grad)
    of = {str(address): x for address, x in expected.items()}
    assert torch.equal(kept.detach(), of["0.mlp.post"])
    assert torch.equal(view.detach(), of["1.mlp.post"][:, 2:])
    assert np.array_equal(array, of["1.resid_post"].numpy())
    del kept, view, array
    assert not any(ref() is not None for ref in held)
