"""A model as its training began: the same form, with the weights that its family starts from."""

from __future__ import annotations

import copy
from typing import Any

import torch

from microtome.context import current
from microtome.errors import ModelUnsupported, error
from microtome.model._model import Model


def untrained_of(model: Model) -> Model:
    """A model of the same form with the weights that its family begins training with, by the seed of the settings.

    Raises:
        ModelUnsupported: its class cannot be made from its configuration.
    """
    config: Any = copy.deepcopy(model.hf.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(current().seed)
        try:
            hf: Any = type(model.hf)(config)
        except Exception as problem:
            got = f"{type(problem).__name__}: {' '.join(str(problem).split())[:80]}"
            what = f"{model.anatomy.name} cannot be made with untrained weights"
            raise error(ModelUnsupported, what, got=got, do="leave the control out: untrained=False") from problem
    hf = hf.to(device=model.device, dtype=model.dtype).eval().requires_grad_(False)
    return Model(hf, model.tokenizer, model.anatomy)
