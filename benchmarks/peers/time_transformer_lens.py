"""Time TransformerLens beside plain Hugging Face, in its own environment; prints JSON.

TransformerLens switches the model that it wraps to eager attention, so plain eager Hugging Face is timed too.
"""

from __future__ import annotations

import contextlib
import json
import sys

import torch
from timing import LAYER, arguments, build, measure, plain_cases, report, tokenizer, tokens

args = arguments(__doc__ or "")
with contextlib.redirect_stdout(sys.stderr):
    from transformer_lens.model_bridge import TransformerBridge

    plain = build(args.model, args.vocab)
    eager = build(args.model, args.vocab, attention="eager")
    words = None if args.model else tokenizer()
    wrapped = build(args.model, args.vocab, attention="eager")
    bridge = TransformerBridge.boot_transformers(
        args.model or "random", hf_model=wrapped, tokenizer=words, device="cpu", dtype=torch.float32
    )
    ids = tokens(plain, args.tokens)
    site = f"blocks.{LAYER}.mlp.hook_post"
    cases = plain_cases(plain, ids) | {
        "hf_eager_forward": plain_cases(eager, ids)["hf_forward"],
        "tl_forward": lambda: bridge(ids, return_type="logits"),
        "tl_cache_one_mlp_post": lambda: bridge.run_with_cache(ids, names_filter=site),
        "tl_cache_all": lambda: bridge.run_with_cache(ids),
    }
    with torch.no_grad():
        logits = bridge(ids, return_type="logits")
        expected = plain(ids).logits
        one = bridge.run_with_cache(ids, names_filter=site)[1]
        every = bridge.run_with_cache(ids)[1]
        truth = cases["hf_hook_one_mlp_post"]()["post"]
    # keys may be aliases of one storage: count each storage once
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in every.values()}
    checks = {
        "logits_max_abs_difference": float((logits - expected).abs().max()),
        "one_site_max_abs_difference": float((one[site] - truth).abs().max()),
        "cache_one_keys": len(one),
        "cache_all_keys": len(every),
        "cache_all_mib": round(sum(storages.values()) / 2**20, 1),
    }
    result = report("transformer-lens", args, measure(cases, args.rounds), checks)
print(json.dumps(result, indent=2))
