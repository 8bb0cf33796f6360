"""What the peer scripts share: one model, plain Hugging Face beside the peer, and times that can be compared.

The cases of a script take turns, round after round, in one process; a ratio is the median over rounds of a case's time
divided by plain Hugging Face's time in the same round. `quiet` says whether the machine was idle enough to quote them.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LAYER = 15


def arguments(doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("model", nargs="?", help="local folder of safetensors; without it, random weights")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=49152, help="vocabulary of the random model")
    return parser.parse_args()


def build(folder: str | None, vocab: int, attention: str = "sdpa") -> LlamaForCausalLM:
    """The model in fp32: that of the folder, or the same random weights in the shape of SmolLM2-135M each time."""
    if folder is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
        return model.eval()
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        attn_implementation=attention,
    )
    config.architectures = ["LlamaForCausalLM"]
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of a few words, for peers that insist on one; the runs are fed token numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


def tokens(model: LlamaForCausalLM, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (1, count), generator=generator)


def plain_cases(model: LlamaForCausalLM, ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Plain Hugging Face: forward; one site kept by a hook; the output of every module kept by hooks."""

    def forward() -> torch.Tensor:
        return model(ids, use_cache=False).logits

    def one() -> dict[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = {}
        down = model.model.layers[LAYER].mlp.down_proj
        handle = down.register_forward_pre_hook(lambda _, args: kept.update(post=args[0]))
        try:
            forward()
        finally:
            handle.remove()
        return kept

    def everything() -> dict[str, Any]:
        kept: dict[str, Any] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: object, _args: object, out: object) -> None:
                kept[name] = out

            return hook

        handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
        try:
            forward()
        finally:
            for handle in handles:
                handle.remove()
        return kept

    return {"hf_forward": forward, "hf_hook_one_mlp_post": one, "hf_hooks_all_modules": everything}


def measure(cases: dict[str, Callable[[], Any]], rounds: int, base: str = "hf_forward") -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in cases}
    with torch.no_grad():
        for run in cases.values():
            run()
            run()
        for _ in range(rounds):
            for name, run in cases.items():
                start = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {
            "median_ms": round(statistics.median(spent), 2),
            "min_ms": round(min(spent), 2),
            "ratio": round(statistics.median([a / b for a, b in zip(spent, times[base], strict=True)]), 3),
            "ratio_of_minima": round(min(spent) / min(times[base]), 3),
        }
        for name, spent in times.items()
    }


def report(peer: str, args: argparse.Namespace, cases: dict[str, Any], checks: dict[str, float]) -> dict[str, Any]:
    packages = (peer, "torch", "transformers")
    plain = cases["hf_forward"]
    quiet = plain["median_ms"] < 1.25 * plain["min_ms"]
    if not quiet:
        print("the machine was busy: do not quote these times", file=sys.stderr)
    return {
        "peer": peer,
        "model": "local folder" if args.model else f"random Llama, SmolLM2-135M shape, vocabulary {args.vocab}",
        "tokens": [1, args.tokens],
        "dtype": "float32",
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "quiet": quiet,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "cases": cases,
        "checks": checks,
    }
