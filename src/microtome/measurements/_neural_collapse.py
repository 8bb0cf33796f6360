"""How far the states of classes have collapsed to their means: for states with labels, at any site."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.errors import DataError, error
from microtome.shown import shown


@shown
@dataclass(frozen=True)
class Collapse:
    """How far classes have collapsed.

    Attributes:
        variability: tr(Sigma_W pinv(Sigma_B)) / C; 0 where every state is the mean of its class.
        variability_shuffled: the same with shuffled labels, the control.
        cosine: mean cosine between the means of two classes, the mean of all left out; -1 / (C - 1) at full collapse.
        spread: standard deviation of that cosine over pairs; 0 where all are equally far apart.
        norms: standard deviation of the lengths of these means, over their mean; 0 where all are equally long.
    """

    variability: float
    variability_shuffled: float
    cosine: float
    spread: float
    norms: float


def neural_collapse(states: Tensor, labels: Tensor, *, seed: int = 0) -> Collapse:
    """How far states have collapsed to the means of their classes, and how far these means form a simplex.

    Formula:  mu_c the mean of class c of C, mu the mean of these;  Sigma_B = 1 / C sum_c (mu_c - mu)(mu_c - mu)^T;
              Sigma_W = 1 / C sum_c mean over its states of (x - mu_c)(x - mu_c)^T;
              variability = tr(Sigma_W pinv(Sigma_B)) / C;  cosine = mean over c != d of cos(mu_c - mu, mu_d - mu).
    Source:   Papyan, Han and Donoho, "Prevalence of Neural Collapse during the Terminal Phase of Deep Learning
              Training", 2020 (arXiv 2008.08186), NC1 and NC2; Tirer, Huang and Niles-Weed, "Perturbation Analysis of
              Neural Collapse", 2022 (arXiv 2210.16658). Departs: classes weigh the same however many states they have;
              a control with shuffled labels.
    Cost:     a decomposition of [C, d] and one product with the states, in float64; the states are all kept.
    Check:    0 at means; sigma^2 (d' / C) in closed form for Gaussian clusters at the corners of a simplex;
              tests/laws/test_geometry.py.

    Args:
        states: [state, d], such as a captured site at some positions.
        labels: [state] the class of each, any integers.
        seed: of the shuffle.

    Raises:
        DataError: the shapes do not fit, a state is not finite, there are fewer than 2 classes, or their means are one.
    """
    if states.dim() != 2 or labels.shape != states.shape[:1]:
        got = f"states {list(states.shape)}, labels {list(labels.shape)}"
        raise error(DataError, "states and labels do not fit", got=got, allowed="[state, d] and [state]")
    x = states.detach().double().cpu()
    if not bool(x.isfinite().all()):
        raise error(DataError, "states hold numbers that are not finite", do="leave those rows out")
    classes, place = labels.cpu().unique(return_inverse=True)
    if len(classes) < 2:
        raise error(DataError, "collapse needs two classes or more", got=f"{len(classes)}", do="give other labels")
    order = torch.randperm(len(place), generator=torch.Generator().manual_seed(seed))
    variability, means = _variability(x, place, len(classes))
    shuffled, _ = _variability(x, place[order], len(classes))
    size = means.norm(dim=1)
    if not bool((size > 0).all()):
        raise error(DataError, "the means of some classes are the mean of all", do="give classes that differ")
    cosines = (means @ means.T) / torch.outer(size, size)
    pairs = cosines[~torch.eye(len(classes), dtype=torch.bool)]
    return Collapse(
        variability, shuffled, float(pairs.mean()), float(pairs.std(correction=0)),
        float(size.std(correction=0) / size.mean()),
    )  # fmt: skip


def _variability(
    x: Float[Tensor, "state d"], place: Int[Tensor, " state"], classes: int
) -> tuple[float, Float[Tensor, "label d"]]:
    """tr(Sigma_W pinv(Sigma_B)) / C, and the means of the classes less that of all."""
    count = torch.bincount(place, minlength=classes).double()
    means = torch.zeros(classes, x.shape[1], dtype=x.dtype).index_add_(0, place, x) / count.unsqueeze(1)
    centred = means - means.mean(0)
    _, size, directions = torch.linalg.svd(centred, full_matrices=False)  # of Sigma_B: size^2 / C
    kept = size > size.max() * 1e-10
    along = (x - means[place]) @ directions[kept].T  # only where Sigma_B is not 0
    spread = torch.zeros(classes, int(kept.sum()), dtype=x.dtype).index_add_(0, place, along.square())
    within = (spread / count.unsqueeze(1)).mean(0)
    return float((within / (size[kept].square() / classes)).sum() / classes), centred
