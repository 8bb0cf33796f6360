"""What the engine costs on a device beside plain calls of the same model, as ratios measured within one run.

Every figure alternates the plain call and ours, each followed by a synchronisation, and takes the median of the ratios
of neighbours. Models are made on the device with random weights, in the shapes of Llama-3.2-1B and Llama-3.1-8B.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import microtome as mt
from microtome.method import Bound, Measure, Pass, Text, declared, methods, refused
from microtome.stream import TokenBatch

TARGETS = {"capture": 1.05, "sweep": 20.0, "atlas pass": 1.35}
"""Most of the plain forward, least times as fast as plain hooks, most of the plain forwards."""

SAMPLE = 64
"""Cells that are run one by one with plain hooks; the cost of all of them is extrapolated from these."""

Shape = dict[str, Any]
Call = Callable[[], object]


def shapes(small: bool) -> dict[str, Shape]:
    """Configurations by name."""
    one = {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
        "max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }  # fmt: skip
    eight = one | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False,
    }  # fmt: skip
    tiny = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512, "num_attention_heads": 4,
            "num_key_value_heads": 2}  # fmt: skip
    if small:
        return {"1B": one | tiny | {"num_hidden_layers": 2}, "8B": eight | tiny | {"num_hidden_layers": 3}}
    return {"1B": one, "8B": eight}


class Cost:
    """The parts of one shape: its model is opened by the first of them, and let go by the last."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.small = shape["vocab_size"] < 10_000
        self._model: mt.Model | None = None

    @property
    def model(self) -> mt.Model:
        """The open model."""
        if self._model is None:
            raise RuntimeError("the model of this shape could not be opened")
        return self._model

    def synchronise(self) -> None:
        """Wait until the device has done all that it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Call) -> float:
        """Wall time of one call and of all that it asked of the device."""
        self.synchronise()
        started = time.perf_counter()
        call()
        self.synchronise()
        return time.perf_counter() - started

    def peak(self, call: Call) -> float:
        """The most memory of the device in GiB that tensors take during a call, the weights included; 0 on a CPU."""
        if self.device.type != "cuda":
            call()
            return 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronise()
        return round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)

    def paired(self, plain: Call, ours: Call, repeats: int) -> dict[str, Any]:
        """The median ratio of neighbouring calls, with the medians and peaks of both."""
        peaks = {"plain_gib": self.peak(plain), "gib": self.peak(ours)}
        pairs: list[tuple[float, float]] = []
        for i in range(repeats):
            if i % 2:
                b, a = self.seconds(ours), self.seconds(plain)
            else:
                a, b = self.seconds(plain), self.seconds(ours)
            pairs.append((a, b))
        return {
            "ratio": round(statistics.median(b / a for a, b in pairs), 4),
            "plain_ms": round(1e3 * statistics.median(a for a, _ in pairs), 3),
            "ms": round(1e3 * statistics.median(b for _, b in pairs), 3),
            "repeats": repeats, **peaks,
        }  # fmt: skip

    def tokens(self, rows: int, length: int, seed: int = 0) -> Tensor:
        """Random token ids on the CPU."""
        made = torch.Generator().manual_seed(seed)
        return torch.randint(self.shape["vocab_size"], (rows, length), generator=made)

    # ---------------------------------------------------------------------------------------------------- the parts

    def open(self) -> dict[str, Any]:
        """Make the model on the device in bfloat16, prove its map, and read its weights for the fingerprint."""

        def make() -> LlamaForCausalLM:
            torch.manual_seed(0)
            with torch.device(self.device):
                return LlamaForCausalLM._from_config(LlamaConfig(**self.shape), dtype=torch.bfloat16).eval()

        made: list[Any] = []
        found = {"make_s": round(self.seconds(lambda: made.append(make())), 2)}
        found["gib"] = self.peak(lambda: made.append(mt.open(made[0], prove=False)))
        opened = made[1]
        found["prove_s"] = round(self.seconds(opened.prove), 2)
        failed = [check for check in opened.proof if check.status == "fails"]
        found["fingerprint_s"] = round(self.seconds(lambda: opened.provenance), 2)
        self._model = opened
        return found | {
            "parameters": opened.n_parameters, "identities": len(opened.proof), "failed": [str(c) for c in failed][:3],
            "missed": bool(failed),
        }  # fmt: skip

    def capture(self) -> dict[str, Any]:
        """All mlp.post and resid_post beside the plain forward, both with logits, on batches of two sizes."""
        model, found = self.model, dict[str, Any]()
        for rows, length in ((2, 16),) if self.small else ((8, 256), (16, 512)):
            tokens = self.tokens(rows, length).to(self.device)

            def plain(tokens: Tensor = tokens) -> None:
                with torch.no_grad():
                    model.hf(input_ids=tokens)

            def ours(tokens: Tensor = tokens) -> None:
                model.run(tokens, capture=["*.mlp.post", "*.resid_post"])

            def hooked(tokens: Tensor = tokens) -> None:
                _hooked(model, tokens)

            made = self.paired(plain, ours, 15)
            made["plain hooks"] = self.paired(plain, hooked, 5)["ratio"]
            found[f"{rows * length} tokens"] = made
        return _judged(found, TARGETS["capture"])

    def sweep(self) -> dict[str, Any]:
        """Patching resid_pre at every layer and position, beside one forward a cell with plain hooks."""
        model, length = self.model, 8 if self.small else 64
        clean, corrupt = (self.tokens(1, length, seed).to(self.device) for seed in (1, 2))
        source = model.run(corrupt, capture="*.resid_pre", logits=False)
        places = [(layer, pos) for layer in range(model.anatomy.n_layers) for pos in range(length)]
        answer, foil = 5, 7
        metric = mt.metric.LogitDifference(answer, foil=foil)
        chosen = [places[i * len(places) // SAMPLE] for i in range(min(SAMPLE, len(places)))]
        values: list[Tensor] = []
        literal: list[float] = []
        plans: list[str] = []

        def ours() -> None:
            cells = [mt.edit.Patch(f"{layer}.resid_pre@{pos}", source=source) for layer, pos in places]
            swept = model.sweep(clean, cells, metric).run().whole()
            values.append(swept.values)
            plans[:] = [str(swept.plan)]

        def plain() -> None:
            literal[:] = [_patched(model, clean, source, place, answer, foil) for place in chosen]

        pairs = [(self.seconds(plain), self.seconds(ours)) for _ in range(4)][1:]
        ratios = [(a / len(chosen)) / (b / len(places)) for a, b in pairs]
        swept = torch.stack([values[-1][places.index(place)] for place in chosen])
        gap, largest = float((swept - torch.tensor(literal)).abs().max()), float(torch.tensor(literal).abs().max())
        ratio = statistics.median(ratios)
        return {
            "ratio": round(ratio, 2), "target": TARGETS["sweep"], "missed": ratio < TARGETS["sweep"],
            "cells": len(places), "cells one by one": len(chosen), "extrapolated": "cost of a cell, from that sample",
            "plain_ms_a_cell": round(1e3 * statistics.median(a for a, _ in pairs) / len(chosen), 3),
            "ms_a_cell": round(1e3 * statistics.median(b for _, b in pairs) / len(places), 4),
            "gap of a cell": round(gap, 4), "largest value": round(largest, 4), "plan": plans[0],
            "plain_gib": self.peak(plain), "gib": self.peak(ours),
        }  # fmt: skip

    def atlas(self) -> dict[str, Any]:
        """The measures of the default atlas that read the whole text, beside plain forwards of the same batches."""
        found: dict[str, Any] = {}
        for rows, length, batches in ((2, 16, 2),) if self.small else ((4, 256, 6), (32, 256, 2)):
            found[f"{rows} rows of {length}"] = self._atlas(rows, length, batches)
        return _judged(found, TARGETS["atlas pass"])

    def _atlas(self, rows: int, length: int, batches: int) -> dict[str, Any]:
        model, made = self.model, [TokenBatch.of(self.tokens(rows, length, seed)) for seed in range(batches)]

        def plain() -> None:
            with torch.no_grad():
                for batch in made:
                    model.hf(input_ids=batch.tokens.to(self.device))

        def ours() -> None:
            bound = [Bound(one, one.statistic({}), one.layers(model)) for one in of_text(model)]
            passed = Pass(model, bound, Text())
            for batch in made:
                passed.update(batch)

        found = self.paired(plain, ours, 5)
        each = rows * length * batches * 1e3
        return found | {"plain_tokens_s": round(each / found["plain_ms"]), "tokens_s": round(each / found["ms"])}

    def close(self) -> dict[str, Any]:
        """Let the model go."""
        self._model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {}


def _judged(found: dict[str, dict[str, Any]], most: float) -> dict[str, Any]:
    """Figures by size, and whether that of the largest, which is the last, is within its target."""
    ratio = [row["ratio"] for row in found.values()][-1]
    return {"ratio": ratio, "target": most, "missed": ratio > most, **found}


def of_text(model: mt.Model) -> list[Measure]:
    """The measures of the default atlas that read all of a text, those that the model can be asked."""
    lacking = refused(model)
    made = [declared(name) for name, method in methods("measure").items() if method.atlas and lacking[name] is None]
    return [one for one in made if isinstance(one, Measure) and one.on == Text()]


def costs(shape: Shape, device: torch.device) -> Iterator[tuple[str, float, Callable[[], dict[str, Any]]]]:
    """The parts of one shape, with the most seconds that each may take."""
    one = Cost(shape, device)
    yield from (
        ("open", 60.0, one.open), ("capture", 35.0, one.capture), ("sweep", 100.0, one.sweep),
        ("atlas pass", 30.0, one.atlas), ("close", 5.0, one.close),
    )  # fmt: skip


def _hooked(model: mt.Model, tokens: Tensor) -> None:
    """Plain hooks that keep mlp.post and resid_post, as anybody would write them."""
    kept: list[Tensor] = []
    parts = model.anatomy.parts.layers
    handles = [
        model.hf.get_submodule(part.down).register_forward_pre_hook(lambda m, a: kept.append(a[0]))
        for part in parts if part.down
    ]  # fmt: skip
    handles += [model.hf.get_submodule(p.block).register_forward_hook(lambda m, a, o: kept.append(o)) for p in parts]
    with torch.no_grad():
        model.hf(input_ids=tokens)
    for handle in handles:
        handle.remove()


def _patched(model: mt.Model, tokens: Tensor, source: mt.Run, place: tuple[int, int], answer: int, foil: int) -> float:
    """One cell as anybody would write it: a hook, a forward, and the difference of two logits of the last token."""
    layer, pos = place
    value = source[f"{layer}.resid_pre"][0, pos]

    def patch(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0].clone()
        hidden[0, pos] = value
        return (hidden, *args[1:]), kwargs

    block = model.hf.get_submodule(model.anatomy.parts.layers[layer].block)
    handle = block.register_forward_pre_hook(patch, with_kwargs=True)
    with torch.no_grad():
        logits = model.hf(input_ids=tokens, logits_to_keep=1, use_cache=False).logits[0, -1].float()
    handle.remove()
    return float(logits[answer] - logits[foil])
