"""A model is itself again whatever was done with it: hooks, mode and weights; and one thread at a time runs it."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import families
from torch import Tensor, nn
from transformers import configuration_utils

import microtome as mt
from microtome.run.hook import _attention

NEAR = {"rtol": 1e-4, "atol": 2e-5}
READ = mt.metric.FunctionMetric(lambda logits, prompts: logits.flatten(1))


def ids(rows: int = 2, length: int = 8, seed: int = 3) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def traces(hf: nn.Module) -> dict[str, Any]:
    """All that could be left on a model."""
    state: dict[str, Any] = {"watched": dict(_attention._ACTIVE)}
    for path, module in hf.named_modules():
        hooks = [k for k, v in vars(module).items() if k.endswith("_hooks") and v]
        config = getattr(module, "config", None)
        state[path] = (
            hooks, module.training, sorted(vars(module)), {"forward", "generate"} & set(vars(module)),
            getattr(config, "_attn_implementation", None),
        )  # fmt: skip
    return state | {name: p.requires_grad for name, p in hf.named_parameters()}


def everything(model: mt.Model) -> None:
    """Every way to run a model, those that fail among them."""
    sites = [str(site) for site in model.anatomy.hook_points if site.layer in (None, 1)]
    base = model.run(ids(), capture=sites)
    model.run(
        ids(),
        edits=[
            mt.edit.Zero("1.attn.scores"),
            mt.edit.Skip(0),
            mt.edit.Freeze(activations=False),
            mt.edit.ScaleBlock(2, 0.5),
        ],
    )
    model.run(ids(), capture="1.attn.pattern", grad=True).logits.sum().backward()
    model.run(ids(), stop_at=1, capture="0.mlp_out")
    cells = [mt.edit.Zero("1.attn.z[0]@3"), mt.edit.Patch("1.resid_pre@2", base)]
    model.sweep(ids(), cells, READ, prompts=[0, 1]).run()
    with model.editing(mt.edit.Zero("1.mlp_out"), mt.edit.KnockOut("1.attn.scores", keys="0")):
        model.hf.generate(input_ids=ids(1), max_new_tokens=2, do_sample=False, pad_token_id=0)
        model.run(ids(), edits=[mt.edit.Zero("1.attn.z")])
    failing: list[Callable[[], Any]] = [
        lambda: model.run(ids(), edits=[mt.edit.Set("1.resid_post", torch.zeros(3))]),
        lambda: model.run(ids(), edits=[mt.edit.Apply("1.attn.scores", _raise)]),
        lambda: model.run(ids(), edits=[mt.edit.Apply("1.mlp_out", _interrupt)]),
        lambda: model.run(ids(), capture="2.mlp_out", stop_at=1),
        lambda: model.run(ids(), observe={"1.attn.pattern": _raise}),
        lambda: model.sweep(ids(), [mt.edit.Apply("1.mlp_out", _raise)], READ, prompts=[0]).run(),
        lambda: model.run(ids(), edits=[mt.edit.Zero("1.attn.z"), mt.edit.Skip(9)]),
        lambda: _editing(model, mt.edit.Apply("1.mlp_out", _raise)),
        lambda: _editing(model, mt.edit.Zero("1.nothing")),
    ]
    for fail in failing:
        with pytest.raises((mt.errors.MicrotomeError, ValueError, KeyboardInterrupt)):
            fail()


def _raise(*args: Any) -> Tensor:
    raise ValueError("on purpose")


def _interrupt(x: Tensor) -> Tensor:
    raise KeyboardInterrupt


def _editing(model: mt.Model, edit: mt.edit.Edit) -> None:
    with model.editing(edit):
        model.hf(input_ids=ids())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bloom", "mixtral", "falcon-mqa"])
def test_nothing_is_left_on_a_model(name: str, training: bool) -> None:
    hf = families.build(name).train(training)
    hf.get_input_embeddings().train(not training)  # modes need not be the same everywhere
    weights = {k: v.clone() for k, v in hf.state_dict().items()}
    before, logits = traces(hf), None
    for opened in (mt.open(hf, prove=False), mt.open(hf)):
        everything(opened)
        assert traces(hf) == before
        assert all(torch.equal(weights[k], v) for k, v in hf.state_dict().items())
        logits = opened.run(ids()).logits
    with ThreadPoolExecutor(1) as other:  # nobody holds the model
        torch.testing.assert_close(other.submit(lambda: mt.open(hf, prove=False).run(ids()).logits).result(5), logits)


@pytest.mark.parametrize("name", ["gpt2", "opt-prenorm", "bert"])
def test_a_model_in_training_runs_without_dropout_and_stays_in_training(name: str) -> None:
    hf = families.build(name)
    expected = mt.open(hf, prove=False).run(ids()).logits
    hf.train()
    assert not torch.allclose(hf(input_ids=ids()).logits, expected, atol=1e-3)  # it does have dropout
    model = mt.open(hf)
    assert hf.training
    assert torch.equal(model.run(ids()).logits, expected)
    base = model.sweep(ids(), [mt.edit.Scale("1.mlp_out", 1.0)], READ, prompts=[0]).run().base
    torch.testing.assert_close(base[0], expected[0, -1], **NEAR)
    with model.editing(mt.edit.Scale("1.mlp_out", 1.0)):
        torch.testing.assert_close(hf(input_ids=ids()).logits, expected, **NEAR)
    assert all(m.training for m in hf.modules())


# ------------------------------------------------------------------------------------- threads


def test_runs_in_threads_are_those_of_one_thread() -> None:
    model, again = (lambda hf: (mt.open(hf, prove=False), mt.open(hf, prove=False)))(families.build("llama-gqa"))
    sites = ["1.resid_post", "1.attn.pattern"]
    edits: list[list[mt.edit.Edit]] = [
        [],
        [mt.edit.Zero("0.mlp_out")],
        [mt.edit.KnockOut("1.attn.scores", keys="0")],
        [mt.edit.Skip(2)],
    ]
    expected = [model.run(ids(), capture=sites, edits=e) for e in edits]

    def one(i: int) -> mt.Run:
        return (model if i % 3 else again).run(ids(), capture=sites, edits=edits[i % 4])

    with ThreadPoolExecutor(4) as pool:
        for i, run in enumerate(pool.map(one, range(64))):
            assert torch.equal(run.logits, expected[i % 4].logits)
            assert all(torch.equal(run[s], expected[i % 4][s]) for s in sites)


def test_sweeps_in_threads_leave_edits_to_act() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    cells = [mt.edit.Zero(f"{layer}.mlp_out@{p}") for layer in range(2) for p in range(3)]
    metric, plain = mt.metric.LogitDifference(4, foil=6), model.run(ids()).logits
    expected = model.sweep(ids()[:1], cells, metric).run().values

    def sweeps(_: int) -> bool:
        return all(torch.equal(model.sweep(ids()[:1], cells, metric).run().values, expected) for _ in range(30))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(sweeps, range(2)))
    with model.editing(mt.edit.Zero("1.mlp_out")):
        assert not torch.allclose(model.hf(ids()).logits, plain, atol=1e-3)


def test_a_model_that_is_edited_elsewhere_is_refused() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    expected = model.run(ids()).logits
    with model.editing(mt.edit.Zero("1.mlp_out")), ThreadPoolExecutor(1) as other:
        for work in (lambda: model.run(ids()), lambda: _editing(model, mt.edit.Zero("0.mlp_out"))):
            with pytest.raises(mt.errors.EditError, match="is being edited by another thread.*open the model twice"):
                other.submit(work).result(5)
    with ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(lambda: model.run(ids()).logits).result(5), expected)


def test_a_plain_call_elsewhere_is_refused_while_the_model_is_edited() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    expected = model.hf(ids()).logits
    calls = (lambda: model.hf(ids()), lambda: model.hf.generate(ids(), max_new_tokens=2))
    with model.editing(mt.edit.Zero("1.mlp_out"), mt.edit.KnockOut("1.attn.scores", keys="0")):
        assert not torch.allclose(model.hf(ids()).logits, expected, atol=1e-2)
        with ThreadPoolExecutor(1) as other:
            for call in calls:
                with pytest.raises(mt.errors.EditError, match="is being edited by another thread.*in the thread that"):
                    other.submit(call).result(5)
            # A part of the model called by itself is let through, unedited.
            inner = other.submit(lambda: model.hf.model(ids()).last_hidden_state).result(5)
    assert torch.equal(model.hf.lm_head(inner), expected)
    with ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(lambda: model.hf(ids()).logits).result(5), expected)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt_neo"])
def test_a_plain_call_elsewhere_neither_sees_a_run_nor_is_seen(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    sites = ["2.attn.pattern", "2.mlp_out"]
    edits = [mt.edit.Zero("1.mlp_out"), mt.edit.KnockOut("2.attn.scores", keys="1"), mt.edit.ScaleBlock(2, 0.5)]
    expected, plain = model.run(ids(), sites, edits), model.hf(ids(seed=5)).logits
    inside, go = threading.Event(), threading.Event()

    def wait(site: mt.anatomy.Site, x: Tensor) -> None:
        inside.set()
        go.wait(0.2)  # as long as the other call could need to come through

    def call(module: nn.Module, args: object) -> None:
        if threading.get_ident() != main:
            begun.set()
            assert inside.wait(5)

    main, begun = threading.get_ident(), threading.Event()
    # The other call has begun when the run does: it is between the blocks while the hooks are installed.
    handle = model.hf.get_submodule(model.anatomy.parts.layers[1].block).register_forward_pre_hook(call)
    with ThreadPoolExecutor(1) as other:
        early = other.submit(lambda: model.hf(ids(seed=5)).logits)
        assert begun.wait(5)
        run = model.run(ids(), sites, edits, observe={"0.resid_pre": wait})
        assert torch.equal(early.result(5), plain)
        handle.remove()
        inside.clear()
        late = other.submit(lambda: inside.wait(5) and model.hf(ids(seed=5)).logits)
        again = model.run(ids(), sites, edits, observe={"0.resid_pre": wait})
        assert torch.equal(late.result(5), plain)
    for one in (run, again):
        assert torch.equal(one.logits, expected.logits)
        assert all(torch.equal(one[site], expected[site]) for site in sites)


def test_an_edit_waits_for_the_run_of_another_thread() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    expected = model.run(ids()).logits
    inside, go = threading.Event(), threading.Event()

    def wait(site: mt.anatomy.Site, x: Tensor) -> None:
        inside.set()
        assert go.wait(5)

    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(model.run, ids(), observe={"0.resid_pre": wait})
        assert inside.wait(5)
        edited = pool.submit(_editing, model, mt.edit.Zero("1.mlp_out"))
        assert not edited.done()
        go.set()
        assert torch.equal(slow.result(5).logits, expected)
        edited.result(5)


def test_a_run_inside_a_run_is_refused() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.EditError, match="inside another run"):
        model.run(
            ids(), edits=[mt.edit.Apply("1.mlp_out", lambda x: model.run(ids(), capture="1.mlp_out")["1.mlp_out"])]
        )


@pytest.mark.parametrize("edit", [mt.edit.Skip(0), mt.edit.Repeat(1, 2)])
def test_a_run_inside_editing_needs_no_cache(edit: mt.edit.Edit) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    expected = model.run(ids(), edits=[edit]).logits
    with model.editing(edit):
        assert torch.equal(model.run(ids()).logits, expected)


# -------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_follows_every_weight() -> None:
    hf = families.build("llama-gqa")
    model = mt.open(hf, prove=False)
    own = model.fingerprint
    assert own == mt.open(families.build("llama-gqa"), prove=False).fingerprint == model.fingerprint
    for name, parameter in hf.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 0.25  # the last of them, in place
        changed = model.fingerprint
        assert changed != own, name
        assert model.run(ids()).provenance["fingerprint"] == changed
        assert changed == mt.open(hf, prove=False).fingerprint
        parameter.data = kept  # and back, by another way
        assert model.fingerprint == own, name
    weight = hf.model.layers[1].mlp.down_proj.weight
    weight.data[:, 3] = 0.0  # a neuron, behind the back of autograd
    assert model.fingerprint != own
    hf.model.layers[1].mlp.down_proj = nn.Linear(56, 40, bias=False)
    assert model.fingerprint == mt.open(hf, prove=False).fingerprint != own


def test_a_fingerprint_knows_types_and_places() -> None:
    hf = families.build("llama-gqa")
    own = mt.open(hf, prove=False).fingerprint
    q = hf.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():  # two weights change places: same sums, another model
        flat = q.view(-1)
        flat[[0, 1]] = flat[[1, 0]]
    assert mt.open(hf, prove=False).fingerprint != own
    assert mt.open(families.build("llama-gqa").double(), prove=False).fingerprint != own
    assert mt.open(families.build("llama-gqa").bfloat16(), prove=False).fingerprint != own


@pytest.mark.parametrize("name", families.some(3))
def test_a_model_that_is_saved_and_opened_or_copied_has_the_same_fingerprint(name: str, tmp_path: Path) -> None:
    hf = families.build(name)
    hf.save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    assert (
        mt.open(hf, prove=False).fingerprint
        == mt.open(tmp_path / "one", prove=False).fingerprint
        == mt.open(tmp_path / "other", prove=False).fingerprint
    )


SILENT = {
    "transformers_version": "4.1", "use_cache": False, "attention_dropout": 0.25, "initializer_range": 0.5,
    "architectures": ["Other"], "dtype": "bfloat16", "return_dict": False, "output_attentions": True,
    "id2label": {"0": "yes"}, "resid_pdrop": 0.5, "_name_or_path": "elsewhere",
}  # fmt: skip
HEARD = {
    "hidden_act": "gelu", "rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    "sliding_window": 7, "output_multiplier": 2.0, "token_dropout": True, "pad_token_id": 5, "unheard_of": 1,
}  # fmt: skip


@pytest.mark.parametrize("entry", [*SILENT, *HEARD])
def test_a_fingerprint_hears_of_what_changes_numbers_alone(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = families.build("llama-gqa")
    model = mt.open(hf, prove=False)
    own, told = model.fingerprint, hf.config.to_dict()
    assert told.get(entry, "none") != (SILENT | HEARD)[entry]
    deep = {"text_config": {**told, entry: (SILENT | HEARD)[entry]}}
    for config, other in ((told | {entry: (SILENT | HEARD)[entry]}, told), (deep, {"text_config": told})):
        found: list[str] = []
        for text in (json.dumps(config), json.dumps(other)):
            monkeypatch.setattr(type(hf.config), "to_json_string", lambda self, use_diff=True, text=text: text)
            found.append(model.fingerprint)
        assert (found[0] == found[1]) == (entry in SILENT)
        assert found[1] == own or other is not told


def test_another_version_of_transformers_gives_the_same_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    own = model.fingerprint
    monkeypatch.setattr(configuration_utils, "__version__", "9.9.9")
    assert "9.9.9" in model.hf.config.to_json_string(use_diff=False)
    assert model.fingerprint == own


# ---------------------------------------------------------------------- what can never happen


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"edits": [mt.edit.Zero("2.mlp_out")], "stop_at": 2}, r"Zero\('2.mlp_out'\) can never act: .* before layer 2"),
        ({"edits": [mt.edit.Zero("1-2.mlp_out")], "stop_at": 2}, "can never act"),
        ({"edits": [mt.edit.Zero("final")], "stop_at": 2}, "can never act"),
        ({"edits": [mt.edit.Skip(2)], "stop_at": 2}, r"Skip\(2\) can never act"),
        ({"edits": [mt.edit.Zero("logits")], "logits": False}, "can never act: the run ends before the unembedding"),
        ({"capture": "2.attn_out", "stop_at": 2}, '"2.attn_out" is never reached: the run ends before layer 2'),
        ({"capture": "2.attn_out", "stop_at": 0}, "is never reached"),
        ({"capture": "*.attn_out", "stop_at": 0}, "is never reached"),
        ({"capture": "logits", "logits": False}, '"logits" is never reached'),
        ({"observe": {"final": lambda site, x: None}, "stop_at": 1}, '"final" is never reached'),
        ({"edits": [mt.edit.Skip(1), mt.edit.Zero("1.mlp_out")]}, r"Zero\('1.mlp_out'\) never acted in this run"),
        ({"edits": [mt.edit.Skip("*")], "capture": "*.attn.z"}, r'this run never reached "\*.attn.z"'),
        ({"edits": [mt.edit.Skip(1)], "capture": "0-1.attn.z"}, 'this run never reached "0-1.attn.z"'),
        ({"edits": [mt.edit.Zero("1.mlp_out@9")]}, "no positions @9"),
        ({"edits": [mt.edit.Zero("1.mlp_out@generated")]}, "selects nothing in a run"),
    ],
)
def test_what_can_never_happen_in_a_run_is_refused(options: dict[str, Any], text: str) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises((mt.errors.EditError, mt.errors.SiteError), match=text):
        model.run(ids(), **options)


def test_an_edit_of_no_rows_is_refused() -> None:
    with pytest.raises(mt.errors.EditError, match="names no rows"):
        mt.edit.Zero("1.mlp_out", rows=())


@pytest.mark.parametrize("name", families.some(3))
def test_what_ends_early_reaches_all_before_its_end(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    whole = model.run(ids(), capture=["*.resid_pre", "*.mlp_out", "final"])
    run = model.run(
        ids(), capture=["embed", "2.resid_pre", "*.mlp_out"], stop_at=2, edits=[mt.edit.Scale("*.mlp_out", 1.0)]
    )
    assert [str(a) for a in run.captured if a.name == "mlp_out"] == ["0.mlp_out", "1.mlp_out"]
    for site in ("2.resid_pre", "1.mlp_out"):
        torch.testing.assert_close(run[site], whole[site], **NEAR)
    run = model.run(ids(), capture=["final", "2.resid_pre"], logits=False)
    assert torch.equal(run["final"], whole["final"])
