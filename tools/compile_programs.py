"""Compile the RASP programs of `microtome.planted` to weights, and write them where the package reads them.

    pip install -e '.[compile]'
    python tools/compile_programs.py            all of them, or those that are named

The compiler's arrays are turned into standard names without change of function: the padding token and directions of
the stream that nobody writes are left out, and scores are divided by 1 instead of the root of d_head, which makes the
attention sharper. Arrays that float16 holds without loss are stored in it.

The truth is read off the compiled basis. An edge u -> v is structural if what u writes overlaps with what input of v
reads, and both lie on a path to the output. It is an edge of the circuit if what passes over it differs between inputs
of one length, be it by their tokens or by their positions (of queries and keys only what moves the pattern counts); if
it never does, it is listed under `constant`.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tracr.compiler import (
    basis_inference,
    compiling,
    craft_graph_to_model,
    craft_model_to_transformer,
    expr_to_craft_graph,
    nodes,
    rasp_to_graph,
)
from tracr.craft import bases
from tracr.rasp import rasp

from microtome import Model, Run, planted

HERE = Path(__file__).resolve().parents[1] / "src" / "microtome" / "planted" / "programs"

tokens, indices = rasp.tokens, rasp.indices
EQ, LT, LEQ, TRUE = rasp.Comparison.EQ, rasp.Comparison.LT, rasp.Comparison.LEQ, rasp.Comparison.TRUE


def width(keys: rasp.SOp, queries: rasp.SOp, predicate: Any) -> rasp.SOp:
    return rasp.SelectorWidth(rasp.Select(keys, queries, predicate))


def move(keys: rasp.SOp, queries: rasp.SOp, predicate: Any, values: rasp.SOp) -> rasp.SOp:
    return rasp.Aggregate(rasp.Select(keys, queries, predicate), values)


def length() -> rasp.SOp:
    return width(tokens, tokens, TRUE).named("length")


def previous() -> rasp.SOp:
    return move(indices, indices, lambda k, q: k == q - 1, tokens).named("previous")


def last() -> rasp.SOp:
    return rasp.Map(lambda n: n - 1, length()).named("last")


def backwards() -> rasp.SOp:
    opposite = rasp.SequenceMap(lambda n, i: n - 1 - i, length(), indices).named("opposite")
    return move(indices, opposite, EQ, tokens).named("backwards")


def share(condition: rasp.SOp) -> rasp.SOp:
    before = rasp.Select(indices, indices, LEQ)
    return rasp.numerical(rasp.Aggregate(before, rasp.numerical(condition), default=0))


def balance() -> rasp.SOp:
    opens, closes = share(tokens == "(").named("opens"), share(tokens == ")").named("closes")
    return rasp.numerical(rasp.LinearSequenceMap(opens, closes, 1, -1)).named("balance")


def how_many(flag: rasp.SOp, wanted: Any) -> rasp.SOp:
    """How many positions have a flag; asked from the tokens, which every position has."""
    return width(flag, tokens, lambda k, q: k == wanted)


def balanced() -> rasp.SOp:
    level = balance()
    below = rasp.categorical(rasp.Map(lambda x: x < -1e-3, level)).named("below")
    closed = rasp.categorical(rasp.Map(lambda x: abs(x) < 1e-3, level)).named("closed")
    ends = move(indices, last(), EQ, closed).named("ends")
    return rasp.SequenceMap(lambda n, e: n == 0 and e, how_many(below, True).named("faults"), ends)


def sort_by(key: rasp.SOp) -> rasp.SOp:
    place = width(key, key, LT).named("place")
    return move(place, indices, EQ, tokens)


def rank() -> rasp.SOp:
    key = rasp.SequenceMap(lambda t, i: 10 * int(t) + i, tokens, indices).named("key")
    return width(key, key, LT)


def maximum_so_far() -> rasp.SOp:
    has = {d: rasp.categorical(rasp.Map(lambda x: x > 1e-3, share(tokens == d))).named(f"has_{d}") for d in "123"}
    top = rasp.SequenceMap(lambda a, b: "3" if a else "2" if b else "0", has["3"], has["2"]).named("top")
    return rasp.SequenceMap(lambda t, a: t if t != "0" else "1" if a else "0", top, has["1"])


def histogram() -> rasp.SOp:
    return width(tokens, tokens, EQ).named("histogram")


def double_histogram() -> rasp.SOp:
    counts = histogram()
    return width(counts, counts, EQ)


def sort_by_frequency() -> rasp.SOp:
    return sort_by(rasp.SequenceMap(lambda n, i: 10 * (9 - n) + i, histogram(), indices).named("key"))


def first_occurrence() -> rasp.SOp:
    pair = rasp.SequenceMap(lambda t, i: f"{t}{i}", tokens, indices).named("pair")
    return rasp.Map(lambda n: n == 0, width(pair, pair, lambda k, q: k[0] == q[0] and k[1] < q[1]))


def running_count_a() -> rasp.SOp:
    pair = rasp.SequenceMap(lambda t, i: i if t == "a" else -1, tokens, indices).named("place_of_a")
    return width(pair, indices, lambda k, q: 0 <= k <= q)


PROGRAMS: dict[str, Callable[[], rasp.SOp]] = {
    "alternate": lambda: rasp.SequenceMap(lambda t, i: t.upper() if i % 2 else t, tokens, indices),
    "ascending": lambda: rasp.Map(
        lambda n: n == 0, how_many(rasp.SequenceMap(lambda p, t: p > t, previous(), tokens).named("falls"), True)
    ),
    "balanced": balanced,
    "count_a": lambda: how_many(tokens, "a"),
    "detect_ab": lambda: rasp.SequenceMap(lambda p, t: p == "a" and t == "b", previous(), tokens),
    "double_histogram": double_histogram,
    "first_occurrence": first_occurrence,
    "fraction_of_x": lambda: share(tokens == "x"),
    "histogram": histogram,
    "increment": lambda: rasp.Map(lambda t: str((int(t) + 1) % 4), tokens),
    "last_token": lambda: move(indices, last(), EQ, tokens),
    "maximum_so_far": maximum_so_far,
    "mirrored": lambda: rasp.SequenceMap(lambda a, b: a == b, backwards(), tokens),
    "more_a_than_b": lambda: rasp.SequenceMap(
        lambda a, b: a > b, how_many(tokens, "a").named("as"), how_many(tokens, "b").named("bs")
    ),
    "next_token": lambda: move(indices, indices, lambda k, q: k == q + 1, tokens),
    "pair_balance": balance,
    "palindrome": lambda: rasp.Map(
        lambda n: n == 0, how_many(rasp.SequenceMap(lambda a, b: a == b, backwards(), tokens).named("same"), False)
    ),
    "previous_token": previous,
    "rank": rank,
    "repeats": lambda: rasp.SequenceMap(lambda p, t: p == t, previous(), tokens),
    "reverse": backwards,
    "running_count_a": running_count_a,
    "singletons": lambda: how_many(histogram(), 1),
    "smaller": lambda: width(tokens, tokens, LT),
    "sort": lambda: sort_by(tokens),
    "sort_by_frequency": sort_by_frequency,
    "successors": lambda: how_many(
        rasp.SequenceMap(lambda p, t: int(t) == int(p) + 1, previous(), tokens).named("rises"), True
    ),
    "swap_pairs": lambda: move(indices, indices, lambda k, q: k == q ^ 1, tokens),
    "third_token": lambda: move(indices, indices, lambda k, q: k == 2, tokens),
}


def assembled(program: planted.Program) -> tuple[Any, list[Any]]:
    """The steps of tracr's own compile function, and the directions of the stream that are the output."""
    extracted = rasp_to_graph.extract_rasp_graph(PROGRAMS[program.name]())
    graph, sources, sink = extracted.graph, extracted.sources, extracted.sink
    basis_inference.infer_bases(graph, sink, set(program.vocabulary), program.max_length)
    bos = bases.BasisDirection(rasp.tokens.label, compiling.COMPILER_BOS)
    expr_to_craft_graph.add_craft_components_to_rasp_graph(graph, bos_dir=bos, mlp_exactness=100)
    built = craft_model_to_transformer.craft_model_to_transformer(
        craft_model=craft_graph_to_model.craft_graph_to_model(graph, sources), graph=graph, sink=sink,
        max_seq_len=program.max_length, causal=False, compiler_bos=compiling.COMPILER_BOS,
        compiler_pad=compiling.COMPILER_PAD,
    )  # fmt: skip
    return built, list(bases.VectorSpaceWithBasis(sink[nodes.OUTPUT_BASIS]).basis)


def compiled(program: planted.Program) -> tuple[dict[str, Tensor], dict[str, Any], list[Any] | None]:
    """Arrays and configuration of one program, and its output labels (None where the output is a number)."""
    built, basis = assembled(program)
    p = {name: {k: np.array(v) for k, v in held.items()} for name, held in built.params.items()}
    ids = built.input_encoder.encoding_map
    rows = [ids[t] for t in (*program.vocabulary, compiling.COMPILER_BOS)]
    n, d_head = built.model_config.num_heads, built.model_config.key_size
    arrays: dict[str, np.ndarray] = {
        "embed.W_E": p["token_embed"]["embeddings"][rows],
        "pos_embed.W_pos": p["pos_embed"]["embeddings"],
    }
    labels = built.residual_labels
    for i in range(built.model_config.num_layers):
        at, here = f"blocks.{i}", f"transformer/layer_{i}"
        for letter, name in (("Q", "query"), ("K", "key"), ("V", "value")):
            w, b = p[f"{here}/attn/{name}"]["w"], p[f"{here}/attn/{name}"]["b"]
            arrays[f"{at}.attn.W_{letter}"] = w.reshape(-1, n, d_head).transpose(1, 0, 2)
            arrays[f"{at}.attn.b_{letter}"] = b.reshape(n, d_head)
        arrays[f"{at}.attn.W_O"] = p[f"{here}/attn/linear"]["w"].reshape(n, d_head, -1)
        arrays[f"{at}.attn.b_O"] = p[f"{here}/attn/linear"]["b"]
        for name, part in (("in", "linear_1"), ("out", "linear_2")):
            arrays[f"{at}.mlp.W_{name}"] = p[f"{here}/mlp/{part}"]["w"]
            arrays[f"{at}.mlp.b_{name}"] = p[f"{here}/mlp/{part}"]["b"]
    directions = [labels.index(str(direction)) for direction in basis]
    outputs = None if program.numeric else [direction.value for direction in basis]
    arrays["unembed.W_U"] = np.eye(len(labels))[:, directions]
    arrays["unembed.b_U"] = np.zeros(len(directions))
    pruned(arrays)
    config = {
        "n_layers": built.model_config.num_layers, "n_heads": n, "d_head": d_head,
        "d_model": arrays["embed.W_E"].shape[1], "d_mlp": built.model_config.mlp_hidden_size,
        "d_vocab": len(rows), "d_vocab_out": len(directions), "n_ctx": program.max_length + 1, "act_fn": "relu",
        "normalization": "none", "attention_dir": "bidirectional", "attn_scale": 1.0,
    }  # fmt: skip
    return {k: torch.tensor(np.ascontiguousarray(v), dtype=torch.float32) for k, v in arrays.items()}, config, outputs


def pruned(arrays: dict[str, np.ndarray]) -> None:
    """Leave out directions of the stream that nobody writes."""
    written = np.abs(arrays["embed.W_E"]).sum(0) + np.abs(arrays["pos_embed.W_pos"]).sum(0)
    for name, x in arrays.items():
        if name.endswith(("W_O", "W_out")):
            written = written + np.abs(x).sum(tuple(range(x.ndim - 1)))
    keep = written > 0
    keep |= np.abs(arrays["unembed.W_U"]).sum(1) > 0
    for name, x in arrays.items():
        if name.endswith(("W_E", "W_pos", "W_O", "W_out", "b_O", "b_out")):
            arrays[name] = x[..., keep]
        elif name.endswith(("W_Q", "W_K", "W_V", "W_in")):
            arrays[name] = x[..., keep, :]
        elif name.endswith("W_U"):
            arrays[name] = x[keep]


def read_weights(model: Model, node: str, slot: str) -> Tensor:
    """[d_model, ...] what one input of a node reads with, without what is dead behind it."""
    head, layer = planted.head_of(node), planted.mlp_of(node)
    if head is not None:
        w, h = model.layers[head[0]], head[1]
        if slot == "v":
            return w.W_V[h][:, w.W_O[h].abs().sum(1) > 0]
        own, other = (w.W_Q[h], w.W_K[h]) if slot == "q" else (w.W_K[h], w.W_Q[h])
        return own[:, other.abs().sum(0) > 0] if bool(read_weights(model, node, "v").any()) else own[:, :0]
    if layer is not None:
        w = model.layers[layer]
        return w.W_in[:, w.W_out.abs().sum(1) > 0]
    return model.W_U


def written(model: Model, node: str) -> Tensor:
    """[..., d_model] vectors that span what a node writes."""
    head, layer = planted.head_of(node), planted.mlp_of(node)
    if head is not None:
        w, h = model.layers[head[0]], head[1]
        return w.W_O[h][w.W_V[h].abs().sum(0) > 0]
    if layer is not None:
        w = model.layers[layer]
        return w.W_out[w.W_in.abs().sum(0) > 0]
    return model.W_E if node == "embed" else model.hf.model.embed_positions.weight


def structure(model: Model) -> list[planted.EdgeName]:
    """Edges over which something is written and read, on a path to the output."""
    found = [
        (u, v, x) for u, v, x in planted.edges(model) if bool((written(model, u) @ read_weights(model, v, x)).any())
    ]
    live = {"output"}
    for node in reversed(planted.nodes(model)):
        if any(u == node and v in live for u, v, _ in found):
            live.add(node)
    return [edge for edge in found if edge[1] in live]


def varying(it: planted.Planted, edges: list[planted.EdgeName], pairs: int = 400) -> set[planted.EdgeName]:
    """Edges over which what passes differs between inputs of one length, by their tokens or by their positions."""
    found: set[planted.EdgeName] = set()
    for length in range(4, it.model.anatomy.n_ctx + 1):
        c = planted.corruptions(it, pairs, seed=length, length=length)
        clean = planted.writes(it.model, c.clean)
        run = it.model.run(c.clean, capture=["*.attn.q", "*.attn.k"])
        for other in (planted.writes(it.model, c.corrupt), planted.writes(it.model, c.clean, c.positions)):
            for sender, receiver, slot in edges:
                change = other[sender] - clean[sender]
                if float(passed(it.model, run, change, receiver, slot).abs().max()) > 1e-2:
                    found.add((sender, receiver, slot))
    return found


def passed(model: Model, run: Run, change: Tensor, receiver: str, slot: str) -> Tensor:
    """What a change of the stream changes in a receiver: its pattern by q and k, what it reads by any other input."""
    head = planted.head_of(receiver)
    if head is None or slot == "v":
        return change @ read_weights(model, receiver, slot)
    w = model.layers[head[0]]
    q, k = (run[f"{head[0]}.attn.{x}"][:, :, head[1]] for x in "qk")
    new_q = q + change @ w.W_Q[head[1]] if slot == "q" else q
    new_k = k + change @ w.W_K[head[1]] if slot == "k" else k
    return (new_q @ new_k.transpose(1, 2)).softmax(-1) - (q @ k.transpose(1, 2)).softmax(-1)


def truth_of(it: planted.Planted) -> dict[str, list[Any]]:
    edges = structure(it.model)
    live = varying(it, edges)
    inside = {node for edge in edges for node in edge[:2]}
    return {
        "nodes": [node for node in planted.nodes(it.model) if node in inside],
        "edges": [list(edge) for edge in edges if edge in live],
        "constant": [list(edge) for edge in edges if edge not in live],
    }


def narrow(path: Path) -> None:
    """Store in float16 the arrays that it holds without loss."""
    arrays = load_file(path)
    halves = {name: x.half() for name, x in arrays.items()}
    save_file({n: halves[n] if torch.equal(halves[n].float(), x) else x for n, x in arrays.items()}, path)


def write(program: planted.Program) -> None:
    arrays, config, outputs = compiled(program)
    said: dict[str, Any] = {
        "program": program.name, "vocabulary": list(program.vocabulary), "bos": program.bos, "outputs": outputs,
        "source": "compiled with tracr-pypi 1.0.0 from tools/compile_programs.py",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "config.json").write_text(json.dumps(config))
        save_file(arrays, here / "model.safetensors")
        (here / "truth.json").write_text(json.dumps({"program": program.name, "bos": program.bos}))
        it = planted.load(here)
        truth = said | truth_of(it)
        shutil.rmtree(HERE / program.name, ignore_errors=True)
        planted.save(it.model, HERE / program.name, truth=truth)
    narrow(HERE / program.name / "model.safetensors")
    size = sum(file.stat().st_size for file in (HERE / program.name).iterdir())
    print(
        f"{program.name:20} {config} {size / 1024:.0f} KiB, {len(truth['edges'])} edges, {truth['constant']} constant"
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or PROGRAMS:
        write(planted.PROGRAMS[name])
