"""Every column of every table of an atlas against plain sums over one run, and each of its mutations against those.

The model's layers, heads and neurons all differ, so a column that is reversed along any axis, shifted, or swapped with
another is told apart: the second half of this file does each of these to each column and asks for the fault.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from tests import families
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

import microtome as mt
from microtome.atlas import _tables
from microtome.method import RepeatedTokens

AXES = {"layers": ("layer",), "heads": ("layer", "head"), "neurons": ("layer", "neuron")}
SAME_FOR_ALL = {"delimiter_uniform", "self_uniform", "uniform_share", "uniform_entropy"}
"""Controls that are the same for every head: reversed, they are what they were."""

TEXT = "the cat , sat on the mat . and the dog ran to the cat ; while the sun shone , on the old red barn by the sea ."
OPTIONS: dict[str, Any] = {"tokens": 240, "length": 20, "rows": 4}
Columns = dict[str, Any]
MEASURES = (
    "stream", "massive", "effective_rank", "ablation_loss", "induction", "attention_targets", "head_norms",
    "activations", "firing", "top_examples", "kurtosis", "neuron_weights", "promoted_tokens", "loss",
)  # fmt: skip
"""Those that were there when the atlas was: every other one has plain numbers in tests of its own."""
PASSAGE = re.compile(r"^drawn_|_around$")
"""Columns whose right values are in tests/laws/test_atlas_read.py."""


def tokenizer() -> Any:
    """One that reads a word or a mark a token."""
    from transformers import PreTrainedTokenizerFast

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<unk>": 0, "<eos>": 1} | {f"\u0120{word}": i + 2 for i, word in enumerate(sorted(set(TEXT.split())))}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<eos>")


class Atlas:
    """An atlas, its model, and the rows of tokens that it read."""

    def __init__(self, folder: Path) -> None:
        hf: Any = families.build("llama-gqa")
        for module in hf.modules():  # gains that would be noticed if they were left out
            if "Norm" in type(module).__name__:
                module.weight.data.uniform_(0.2, 3.0, generator=torch.Generator().manual_seed(0))
        for i, block in enumerate(hf.model.layers):  # so that the largest dimension differs from layer to layer
            block.mlp.down_proj.weight.data[7 + 5 * i] *= 10 * 4**i
        self.model = mt.open(hf, tokenizer=tokenizer(), prove=False)
        self.folder = folder / "atlas"
        mt.atlas.write_atlas(self.model, self.folder, text=[TEXT] * 20, measures=MEASURES, **OPTIONS)
        corpus = mt.stream.Corpus.of("text", [TEXT] * 20)
        batches = mt.stream.TokenBatches(corpus, self.model.tokenizer, **OPTIONS)
        self.tokens = torch.cat([batch.tokens for batch in batches])
        tables = {name: pq.read_table(self.folder / f"{name}.parquet") for name in AXES}
        self.tables = {name: table.drop_columns(list(filter(PASSAGE.search, table.column_names)))
                       for name, table in tables.items()}  # fmt: skip
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        measured = mt.measure(self.model, *self.manifest["measures"], text=[TEXT] * 20, **OPTIONS)
        ends = {name: array.values for name, array in measured.items() if str(name).endswith(("_lo", "_hi"))}
        self.ends = {str(name): values for name, values in ends.items()}
        plain = {"layers": layers(self), "heads": heads(self), "neurons": neurons(self)}
        self.expected = {name: found | differences(found) for name, found in plain.items()}


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return Atlas(tmp_path_factory.mktemp("atlas"))


# -------------------------------------------------------------------------------------------------- the plain numbers


def differences(found: Columns) -> Columns:
    """Each column minus its control."""
    controls = {column.name: column.control for method in mt.measures().values() for column in method.columns}
    pairs = {name: controls.get(name, "") for name in found}
    return {f"{name}_diff": found[name] - found[control] for name, control in pairs.items() if control in found}


def loss_by_row(logits: Tensor, tokens: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)


def layers(atlas: Atlas) -> Columns:
    model, tokens = atlas.model, atlas.tokens
    names = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    run = model.run(tokens, capture=[f"*.{name}" for name in names])
    pre, mid, post, attn, mlp = (run[f"*.{name}"].double() for name in names)  # [layer, row, pos, d_model]
    found: dict[str, Tensor] = {}
    for name, x in (("resid_pre_norm", pre), ("resid_mid_norm", mid), ("resid_post_norm", post)):
        found[name] = x[:, :, 1:].norm(dim=-1).mean((1, 2))
    found["resid_post_norm_first"] = post[:, :, 0].norm(dim=-1).mean(1)
    found["attn_share"] = (attn.norm(dim=-1) / pre.norm(dim=-1))[:, :, 1:].mean((1, 2))
    found["mlp_share"] = (mlp.norm(dim=-1) / mid.norm(dim=-1))[:, :, 1:].mean((1, 2))
    pairs = {"attn_cos": (pre, attn), "mlp_cos": (mid, mlp), "block_cos": (pre, post)}
    found |= {name: cosine_similarity(*pair, dim=-1)[:, :, 1:].mean((1, 2)) for name, pair in pairs.items()}
    away = -((tokens.shape[1] - 1) // 2)  # half a row on, the first token left out
    for name, (read, added) in pairs.items():
        other = torch.roll(added[:, :, 1:], away, dims=2)
        found[f"{name}_elsewhere"] = cosine_similarity(read[:, :, 1:], other, dim=-1).mean((1, 2))
    for end in ("", "_elsewhere"):
        found[f"block_influence{end}"] = 1 - found[f"block_cos{end}"]
    found["median_abs"] = post.abs().median(-1).values.mean((1, 2))  # rows of 20: every position is one of the 32
    found["max_abs"], found["max_abs_dim"] = post.abs().amax((1, 2)).max(-1)
    for name, values in (("effective_rank", covariance_roots(post)), ("effective_rank_diagonal", variances(post))):
        shares = values / values.sum(-1, keepdim=True)
        found[name] = (-(shares * shares.log()).nansum(-1)).exp()
    first = tokens[:8]
    whole = loss_by_row(model.run(first).logits, first).mean()
    edits: dict[str, Callable[[int], Any]] = {
        "attn": lambda i: mt.edit.Zero(f"{i}.attn_out"), "mlp": lambda i: mt.edit.Zero(f"{i}.mlp_out"),
        "block": lambda i: mt.edit.Skip(str(i)),
    }  # fmt: skip
    for name, edit in edits.items():
        left = [loss_by_row(model.run(first, edits=[edit(i)]).logits, first).mean() - whole for i in range(3)]
        found[f"loss_skip_{name}"] = torch.stack(left)
    return {name: x.detach().numpy() for name, x in found.items()}


def covariance_roots(post: Tensor) -> Tensor:
    """The eigenvalues of the covariance of all tokens but the first of each row, from singular values."""
    rows = post[:, :16, 1:].flatten(1, 2)
    return torch.linalg.svdvals(rows - rows.mean(1, keepdim=True)) ** 2


def variances(post: Tensor) -> Tensor:
    return post[:, :16, 1:].flatten(1, 2).var(1, correction=0)


def heads(atlas: Atlas) -> Columns:
    model, tokens = atlas.model, atlas.tokens
    run = model.run(tokens, capture=["*.attn.result", "*.attn.pattern"])
    pattern = run["*.attn.pattern"].double().numpy()[:, :16]  # [layer, row, head, q, k]
    some, width = tokens[:16], tokens.shape[1]
    words = [[model.to_words([int(i)])[0] for i in row] for row in some]
    mark = np.array([[bool(w) and not any(c.isalnum() for c in w) for w in row] for row in words])
    even = np.tril(np.ones((width, width))) / np.arange(1, width + 1)[:, None]
    shape = pattern.shape[0], pattern.shape[2]
    norms = run["*.attn.result"].double()[:, :, 1:].norm(dim=-1)
    found = {
        "result_norm": norms.mean((1, 2)).numpy(),
        "result_norm_std": norms.std((1, 2), correction=0).numpy(),
        "delimiter_attention": (pattern * mark[None, :, None, None]).sum(-1)[..., 1:].mean((1, 3)),
        "delimiter_uniform": np.full(shape, (even[None] * mark[:, None]).sum(-1)[:, 1:].mean()),
        "self_attention": np.diagonal(pattern, axis1=3, axis2=4)[..., 1:].mean((1, 3)),
        "self_uniform": np.full(shape, np.diagonal(even)[1:].mean()),
        "kv_head": np.broadcast_to(np.arange(shape[1]) // 2, shape),
    }
    return found | repeated(model, shape)


def repeated(model: mt.Model, shape: tuple[int, int]) -> Columns:
    """Scores on repeated random tokens, as loops over queries."""
    tokens = torch.cat([batch.tokens for batch in RepeatedTokens().fitted(model).batches(model).parts])
    period = tokens.shape[1] // 2
    assert torch.equal(tokens[:, :period], tokens[:, period:]), "no beginning-of-text token stands before them"
    each = model.run(tokens, capture="*.attn.pattern")["*.attn.pattern"].double().numpy()
    a = each.mean(1)  # [layer, head, q, k]
    later = range(period, 2 * period)

    def back(offset: int, queries: range) -> np.ndarray:
        return np.mean([a[:, :, q, q - offset] for q in queries], axis=0)

    wrong = [period - 1 - d for d in range(-8, 9) if abs(d) > 1]
    control = [back(offset, range(max(period, offset), 2 * period)) for offset in wrong]
    entropy = -(each * np.log(np.where(each > 0, each, 1))).sum(-1)
    return {
        "previous_token": back(1, range(1, 2 * period)),
        "duplicate": back(period, later),
        "induction": back(period - 1, later),
        "induction_control": np.mean(control, axis=0),
        "first_token": a[:, :, 2:, 0].mean(-1),
        "uniform_share": np.full(shape, np.mean([1 / (q + 1) for q in range(2, 2 * period)])),
        "entropy": entropy.mean((1, 3)),
        "uniform_entropy": np.full(shape, np.mean([np.log(q + 1) for q in range(2 * period)])),
    }


def neurons(atlas: Atlas) -> Columns:
    model, tokens = atlas.model, atlas.tokens
    run = model.run(tokens, capture=["*.mlp.post", "*.mlp.gate"])
    post, gate = run["*.mlp.post"].double(), run["*.mlp.gate"]  # [layer, row, pos, neuron]
    flat = post.flatten(1, 2).numpy()
    early = post[:, :16].flatten(1, 2).numpy()
    found = {
        "mean": flat.mean(1), "std": flat.std(1), "max": flat.max(1), "min": flat.min(1),
        "firing_rate": (gate > 0).double().mean((1, 2)).numpy(),
        "kurtosis": stats.kurtosis(early, axis=1, fisher=False), "skewness": stats.skew(early, axis=1),
    }  # fmt: skip
    width = tokens.shape[1]
    peak, where = post.max(2)  # [layer, row, neuron]: one peak a row
    value, row = peak.sort(dim=1, descending=True)
    chosen = row[:, :5].transpose(1, 2)
    found["example_value"] = value[:, :5].transpose(1, 2).numpy()
    found["example_index"] = (chosen * width + where.gather(1, row[:, :5]).transpose(1, 2)).numpy()
    found["example_start"] = (chosen * width).numpy()
    return found | weights(model)


def weights(model: mt.Model) -> Columns:
    """Directions from the modules as they lie in the model, by their own names."""
    found: dict[str, list[Tensor]] = {}
    final = model.hf.model.norm.weight.double()
    unembed = model.hf.lm_head.weight.double()
    for block in model.hf.model.layers:
        gain = block.post_attention_layernorm.weight.double()
        read = block.mlp.up_proj.weight.double() * gain
        gate = block.mlp.gate_proj.weight.double() * gain
        write = block.mlp.down_proj.weight.double().T
        logits = (write * final) @ unembed.T
        logits = logits - logits.mean(1, keepdim=True)
        order = logits.sort(dim=1, descending=True)
        each = {
            "out_norm": write.norm(dim=1), "cos_gate_in": cosine_similarity(gate, read),
            "cos_gate_out": cosine_similarity(gate, write), "cos_in_out": cosine_similarity(read, write),
            "promoted": order.indices[:, :5], "promoted_logit": order.values[:, :5],
            "suppressed": order.indices.flip(1)[:, :5], "suppressed_logit": order.values.flip(1)[:, :5],
        }  # fmt: skip
        for name, values in each.items():
            found.setdefault(name, []).append(values.detach())
    return {name: torch.stack(values).numpy() for name, values in found.items()}


# --------------------------------------------------------------------------------------------------------- comparing


def faults(atlas: Atlas, name: str, table: pa.Table) -> set[str]:
    """The columns of a table that hold another value than expected in the row of any unit."""
    expected = {**atlas.ends, **atlas.expected[name]}
    places = tuple(np.array(table.column(axis).to_pylist()) for axis in AXES[name])
    wrong: set[str] = set()
    for column in table.column_names:
        if column in AXES[name]:
            continue
        held = np.array(table.column(column).to_pylist(), dtype=float)
        plain = np.asarray(expected[column], dtype=float)[places]
        if held.shape != plain.shape or not np.allclose(held, plain, rtol=2e-4, atol=2e-5):
            wrong.add(column)
    return wrong


def ordered(columns: list[str]) -> Iterator[tuple[str, str, str]]:
    yield from ((c, f"{c}_lo", f"{c}_hi") for c in columns if f"{c}_lo" in columns)


@pytest.mark.parametrize("name", AXES)
def test_every_column_is_the_plain_number_of_its_unit(atlas: Atlas, name: str) -> None:
    table, expected = atlas.tables[name], atlas.expected[name]
    own = {c for c in table.column_names if c not in AXES[name] and not c.endswith(("_lo", "_hi"))}
    assert own == set(expected), "every column has a plain number here, and every plain number a column"
    sizes = {"layer": 3, "head": 4, "neuron": families.D_MLP}
    keys = zip(*(table.column(axis).to_pylist() for axis in AXES[name]), strict=True)
    assert list(keys) == list(np.ndindex(*(sizes[axis] for axis in AXES[name])))
    assert faults(atlas, name, table) == set()
    for value, low, high in ordered(table.column_names):
        ends = [np.array(table.column(c).to_pylist()) for c in (low, value, high)]
        assert (ends[0] <= ends[1] + 1e-6).all(), value
        assert (ends[1] <= ends[2] + 1e-6).all(), value


def mutations(atlas: Atlas, name: str, table: pa.Table, column: str) -> Iterator[tuple[str, pa.Array]]:
    """A column with its rows in another order: reversed, reversed along each axis, shifted by one along each."""
    sizes = [len(set(table.column(axis).to_pylist())) for axis in AXES[name]]
    order = np.arange(table.num_rows).reshape(sizes)
    yield "reversed", table.column(column).take(pa.array(order.reshape(-1)[::-1]))
    for axis in range(order.ndim):
        yield (
            f"reversed along {AXES[name][axis]}",
            table.column(column).take(pa.array(np.flip(order, axis).reshape(-1))),
        )
        yield (
            f"shifted along {AXES[name][axis]}",
            table.column(column).take(pa.array(np.roll(order, 1, axis).reshape(-1))),
        )


@pytest.mark.parametrize("name", AXES)
def test_every_reordered_column_is_a_fault(atlas: Atlas, name: str) -> None:
    table = atlas.tables[name]
    unseen: set[tuple[str, str]] = set()
    for at, column in enumerate(table.column_names):
        if column in AXES[name]:
            for what, array in mutations(atlas, name, table, column):
                changed = table.set_column(at, column, array)
                if array != table.column(column) and not faults(atlas, name, changed):
                    unseen.add((column, what))
            continue
        for what, array in mutations(atlas, name, table, column):
            if column not in faults(atlas, name, table.set_column(at, column, array)):
                unseen.add((column, what))
    same = {column.removesuffix("_lo").removesuffix("_hi") for column, _ in unseen}
    allowed = SAME_FOR_ALL | {"kv_head"}  # the same in every layer
    assert same <= allowed, unseen
    assert {what for column, what in unseen if column == "kv_head"} <= {"reversed along layer", "shifted along layer"}


@pytest.mark.slow
@pytest.mark.parametrize("name", AXES)
def test_every_pair_of_swapped_columns_is_a_fault(atlas: Atlas, name: str) -> None:
    table = atlas.tables[name]
    named = [c for c in table.column_names if c not in AXES[name]]
    for i, one in enumerate(named):
        for other in named[i + 1 :]:
            a, b = table.column_names.index(one), table.column_names.index(other)
            swapped = table.set_column(a, one, table.column(other)).set_column(b, other, table.column(one))
            same = table.column(one) == table.column(other)
            assert same or faults(atlas, name, swapped), (one, other)


@pytest.mark.parametrize("name", AXES)
def test_every_list_in_the_other_order_is_a_fault(atlas: Atlas, name: str) -> None:
    """Lists by rank: the first is the strongest."""
    table = atlas.tables[name]
    for at, column in enumerate(table.column_names):
        if pa.types.is_list(table.schema.field(column).type):
            turned = pa.array([row[::-1] for row in table.column(column).to_pylist()], table.schema.field(column).type)
            assert column in faults(atlas, name, table.set_column(at, column, turned)), column


def test_a_table_maker_that_reverses_its_columns_is_noticed(atlas: Atlas, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation in the source itself, and in what places the rows."""
    found = [
        (mt.measures()[name], mt.measure(atlas.model, name, text=[TEXT] * 20, **OPTIONS))
        for name in ("stream", "head_norms", "activations")
    ]
    plain = _tables.tables(atlas.model, found)
    assert all(not faults(atlas, name, table) for name, table in plain.items())
    flat, keys = _tables.flat, _tables._keys  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(_tables, "flat", lambda array, dims: flat(array, dims)[::-1])
    for name, table in _tables.tables(atlas.model, found).items():
        assert faults(atlas, name, table) == set(table.column_names) - {*AXES[name], "kv_head"}
    monkeypatch.setattr(_tables, "flat", flat)
    monkeypatch.setattr(_tables, "_keys", lambda model, labels: {k: v[::-1] for k, v in keys(model, labels).items()})
    for name, table in _tables.tables(atlas.model, found).items():
        assert set(table.column_names) - {*AXES[name], "kv_head"} <= faults(atlas, name, table)


def test_the_pages_hold_the_same_numbers_in_the_same_rows(atlas: Atlas) -> None:
    data = atlas.folder / "assets" / "data"

    def read(file: str) -> Any:
        found = re.fullmatch(r'atlas\.receive\("[^"]+", (.*)\);\n', (data / file).read_text(), flags=re.S)
        assert found is not None
        return json.loads(found[1])

    model, vocab = read("model.js"), read("vocab.js")
    words = atlas.model.to_words(list(range(atlas.model.anatomy.d_vocab)))
    shown = {"layers": [model["layers"]["columns"]], "heads": [model["heads"]["columns"]], "neurons": []}
    for layer in range(3):
        shown["neurons"].append(read(f"neurons/{layer}.js")["columns"] | read(f"details/{layer}/0.js")["columns"])
    for name, parts in shown.items():
        table = atlas.tables[name]
        for column in table.column_names:
            held = [value for part in parts for value in part[column]]
            plain = table.column(column).to_pylist()
            if column in ("promoted", "suppressed"):
                held = [[vocab[i] for i in row] for row in held]
                assert held == [[words[i] for i in row] for row in plain], column
            else:
                assert np.allclose(np.array(held, float), np.array(plain, float), rtol=1e-3, atol=1e-9), column
