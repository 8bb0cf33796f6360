"""Time TransformerLens' own activation patching of resid_pre, in its own environment; prints JSON.

    .venv-peers/bin/python benchmarks/peers/time_patching.py [MODEL] --tokens 11

The cells are every layer by every position; the prompts are random tokens, since the work does not depend on them.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time

import torch
from timing import arguments, build, tokenizer, tokens

args = arguments(__doc__ or "")
with contextlib.redirect_stdout(sys.stderr):
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    wrapped = build(args.model, args.vocab, attention="eager")
    words = None if args.model else tokenizer()
    bridge = TransformerBridge.boot_transformers(
        args.model or "random", hf_model=wrapped, tokenizer=words, device="cpu", dtype=torch.float32
    )
    clean = tokens(wrapped, args.tokens)
    corrupt = clean.flip(1)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
        started = time.perf_counter()
        table = patching.get_act_patch_resid_pre(
            bridge, corrupt, cache, lambda logits: logits[0, -1, 11] - logits[0, -1, 13]
        )
        seconds = time.perf_counter() - started
cells = table.numel()
print(json.dumps({"cells": cells, "ms_a_cell": 1e3 * seconds / cells, "tokens": args.tokens}))
