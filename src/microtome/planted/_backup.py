"""A Llama that repairs itself: a head that does its work only where the main head has not done it."""

from __future__ import annotations

import torch

from microtome.planted._folder import Planted
from microtome.planted._llama import Layout, bench, codes

CODE = 12


def backup_head(seed: int = 0, *, names: int = 32, fillers: int = 16) -> Planted:
    """A two-layer Llama that answers with the name in the prompt, by a main head or, without it, by its backup.

    Formula:  where it is asked, the main head (layer 0) looks at the name, moves its code to the output and says so in
              `done`; the backup (layer 1) would do the same, but `done` turns its query away, to BOS. The codes of
              names differ in length, from 0.5 to 1.5, and with them the direct effects of both heads.
    Source:   backup name movers: Wang et al., "Interpretability in the Wild", 2022 (arXiv 2211.00593); self-repair:
              McGrath et al., "The Hydra Effect", 2023 (arXiv 2307.15771). Departs: built by hand.
    Check:    over names, with the final norm held, the change of the backup's direct effect when the main head is
              zeroed against the change of the main head's own has slope -1; tests/planted/test_handmade.py.

    Args:
        seed: of codes, heads and the weights that do nothing.
        names: how many names there are, a token each.
        fillers: how many tokens mean nothing.

    Returns:
        A `Planted`. A prompt is BOS, fillers, one name, fillers, `ask`; the next token is the name. Its truth: `bos`,
        `ask`, `names` and `fillers`, tokens; `main` and `backup`, each (layer, head); `slope`, -1.
    """
    layout = Layout(code=CODE, is_name=1, is_ask=1, is_bos=1, done=1, out=CODE)
    vocab = 2 + names + fillers
    it = bench(layout, vocab=vocab, layers=2, heads=4, d_head=32, d_mlp=16, seed=seed)
    n = torch.arange(2, 2 + names)
    words = codes(names, CODE, it.rng)
    lengths = torch.linspace(0.5, 1.5, names)[torch.randperm(names, generator=it.rng)]
    it.model.W_E[n, layout["code"]] = words * lengths.unsqueeze(1)
    for token, flag in ((n, "is_name"), (0, "is_bos"), (1, "is_ask")):
        it.model.W_E[token, layout[flag]] = 1.0
    it.model.W_U[layout["out"], n] = 20.0 * words.T
    keys = torch.cat([it.part("is_name"), it.part("is_bos")], dim=1)
    ask, one, done = it.part("is_ask")[:, 0], it.part("one")[:, 0] / it.one, it.part("done")[:, 0]
    main, backup = it.free_head(0), it.free_head(1)
    it.match(0, main, torch.stack([2 * ask, one], dim=1), keys)
    it.match(1, backup, torch.stack([2 * ask - 4 * done, one], dim=1), keys)
    reads = torch.cat([it.part("code"), it.part("is_name")], dim=1)
    it.move(0, main, reads, torch.cat([it.part("out").T, it.part("done").T]))
    it.move(1, backup, it.part("code"), it.part("out").T)
    return it.finish({
        "bos": 0, "ask": 1, "names": n.tolist(), "fillers": list(range(2 + names, vocab)),
        "main": (0, main), "backup": (1, backup), "slope": -1.0,
    })  # fmt: skip
