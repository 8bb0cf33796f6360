"""Time nnsight beside plain Hugging Face, in its own environment; prints JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch
from timing import LAYER, arguments, build, measure, plain_cases, report, tokens

args = arguments(__doc__ or "")
with contextlib.redirect_stdout(sys.stderr):
    from nnsight import NNsight

    plain = build(args.model, args.vocab)
    sight = NNsight(build(args.model, args.vocab))
    ids = tokens(plain, args.tokens)

    def forward() -> Any:
        with sight.trace(ids, use_cache=False):
            logits = sight.output.logits.save()
        return logits

    def one() -> Any:
        with sight.trace(ids, use_cache=False):
            post = sight.model.layers[LAYER].mlp.down_proj.input.save()
        return post

    def every() -> Any:
        with sight.trace(ids, use_cache=False) as tracer:
            cache = tracer.cache()
        return cache

    cases = plain_cases(plain, ids) | {
        "nnsight_forward_save_logits": forward,
        "nnsight_save_one_mlp_post": one,
        "nnsight_cache_all": every,
    }
    with torch.no_grad():
        checks = {
            "logits_max_abs_difference": float((forward() - plain(ids).logits).abs().max()),
            "one_site_max_abs_difference": float((one() - cases["hf_hook_one_mlp_post"]()["post"]).abs().max()),
            "cache_all_keys": len(every().keys()),
        }
    result = report("nnsight", args, measure(cases, args.rounds), checks)
print(json.dumps(result, indent=2))
