"""What a neuron does to what it reads, from its weights: strengthen it, weaken it, or write something else.

Formula:  c1 = cos(w_in, w_out), c2 = cos(w_gate, w_out), c3 = cos(w_gate, w_in), each made -1, 0 or 1 at +-threshold;
          c1 = 1:   |c2| = 1 strengthening, 0 conditional strengthening;
          c1 = -1:  |c2| = 1 weakening, 0 conditional weakening;
          c1 = 0:   |c2| = 1 proportional change, 0 orthogonal output;
          typical where c3 = c1 c2, atypical elsewhere. A plain MLP has one reading direction, so that c2 = c1, c3 = 1,
          and its neurons are strengthening, weakening or orthogonal, all typical.
          Null: the cosine of a direction with an unrelated one in d dimensions is 2 b - 1, b ~ Beta((d - 1)/2,
          (d - 1)/2); null_of_c = its two-sided p-value, and a cosine is beyond the band where that is below 0.05.
          The null of Beta takes all directions to be alike; the control takes them as they are: the same of mismatched
          vectors, neuron n's w_in with the w_out, and the w_gate, of neurons 1 and 2 further on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import cosine_similarity

from microtome.measurements._neuron_weights import neuron_directions
from microtome.method import Argument, Column, Seen, Source, Weights, measure

CLASSES = (
    "strengthening", "conditional strengthening", "proportional change", "orthogonal output", "conditional weakening",
    "weakening",
)  # fmt: skip
"""The classes, by number; the atypical neurons of each have that number plus 6."""
THRESHOLD = 0.5
PAIRS = {"in_out": ("w_in", "w_out"), "gate_out": ("w_gate", "w_out"), "gate_in": ("w_gate", "w_in")}
BAND = 0.05
OTHERS = "the same of vectors of several neurons"
CONTROL = "none: it is the control"
SOURCE = Source(
    "Gerstner and Schütze", "Understanding Gated Neurons in Transformers from Their Input-Output Functionality", 2025,
    "2505.17936", departs="norm gains are folded in; mismatched neurons are the control; plain MLPs have classes too",
)  # fmt: skip
BY_CHANCE = "none: 0.05 is the share of unrelated directions below 0.05"
NEEDS = ("mlp_out", "W_in", "W_out", "mlp_norm")
Threshold = Annotated[float, Argument("cosine from which on two directions count as one", "cosine", 0, 1)]


@measure(
    "neuron_classes",
    of="neuron",
    on=Weights(),
    sites="mlp.post",
    title="classes of neurons",
    question="Does each neuron strengthen what it reads, weaken it, or write something else?",
    columns=(
        Column(
            "io_class", "index",
            f"class by what the neuron reads and writes: {', '.join(CLASSES)}; 6 more where it is atypical",
            "none: an index; the measure io_classes compares shares", (0, 11), interval=False,
        ),
        *(
            Column(f"null_{pair}", "probability", f"that {' and '.join(of)} of unrelated directions are as close to a "
                   "line", BY_CHANCE, (0, 1), interval=False)
            for pair, of in PAIRS.items()
        ),
    ),
    source=SOURCE,
    cost="3 d_model operations per neuron",
    check="tests/laws/test_neuron_classes.py",
    needs=NEEDS,
)  # fmt: skip
def neuron_classes(seen: Seen, aligned: Threshold = THRESHOLD) -> dict[str, Shaped[Tensor, " neuron"]]:
    """The class of every neuron by what it reads and writes, and how unusual each of its angles is."""
    w = neuron_directions(seen.model, seen.layer or 0)
    cosines = pair_cosines(w)
    d = w["w_out"].shape[-1]
    nulls = {f"null_{pair}": null_probability(c, d) for pair, c in cosines.items()}
    return {"io_class": classes_of(cosines, aligned), **nulls}


def _beyond(pair: str, of: tuple[str, str]) -> tuple[Column, Column]:
    """The share of neurons with an unusual angle, and its control."""
    meaning = f"share of neurons whose {' and '.join(of)} are closer to a line than 95 % of unrelated directions"
    other = Column(f"beyond_{pair}_mismatched", "share", OTHERS, CONTROL, (0, 1), interval=False, drawn=False)
    column = Column(
        f"beyond_{pair}", "share", meaning, f"none: compare {other.name}", (0, 1), interval=False,
        title=pair.replace("_", " and "), chart="Aligned neurons",
    )  # fmt: skip
    return column, other


@measure(
    "io_classes",
    of="layer",
    on=Weights(),
    sites="mlp.post",
    atlas="full",
    title="classes of neurons by layer",
    question="How many neurons of each layer strengthen, weaken or replace what they read?",
    columns=(
        Column(
            "class_share", "share", f"share of neurons of each class: {', '.join(CLASSES)}, then the atypical of each",
            "none: compare class_share_mismatched", (0, 1), extra=("class",), interval=False,
        ),
        Column(
            "class_share_mismatched", "share", OTHERS, CONTROL, (0, 1), extra=("class",), interval=False,
            drawn=False,
        ),
        *(column for pair, of in PAIRS.items() for column in _beyond(pair, of)),
    ),
    source=SOURCE,
    cost="6 d_model operations per neuron",
    check="tests/laws/test_neuron_classes.py",
    needs=NEEDS,
)  # fmt: skip
def io_classes(seen: Seen, aligned: Threshold = THRESHOLD) -> dict[str, Float[Tensor, " ..."]]:
    """The share of every class in a layer, and of neurons with unusual angles, beside those of mismatched vectors."""
    w = neuron_directions(seen.model, seen.layer or 0)
    shift = {"w_in": 0, "w_out": 1, "w_gate": 2}
    d, found = w["w_out"].shape[-1], dict[str, Tensor]()
    for end, vectors in (("", w), ("_mismatched", {name: x.roll(-shift[name], 0) for name, x in w.items()})):
        cosines = pair_cosines(vectors)
        kind = classes_of(cosines, aligned)
        found[f"class_share{end}"] = torch.bincount(kind, minlength=2 * len(CLASSES)) / len(kind)
        for pair, c in cosines.items():
            found[f"beyond_{pair}{end}"] = (null_probability(c, d) < BAND).double().mean()
    return found


def pair_cosines(w: Mapping[str, Float[Tensor, "neuron d_model"]]) -> dict[str, Float[Tensor, " neuron"]]:
    """[neuron] c1, c2 and c3 of `neuron_directions`, in float64; c1 alone where there is no gate."""
    pairs = {pair: of for pair, of in PAIRS.items() if set(of) <= w.keys()}
    return {pair: cosine_similarity(w[a].double(), w[b].double(), dim=-1) for pair, (a, b) in pairs.items()}


def classes_of(cosines: Mapping[str, Float[Tensor, " neuron"]], threshold: float = THRESHOLD) -> Int[Tensor, " neuron"]:
    """[neuron] The number of each neuron's class in `CLASSES`, plus 6 where it is atypical; see this file's head."""
    c1 = _sign(cosines["in_out"], threshold)
    c2, c3 = (_sign(cosines[pair], threshold) if pair in cosines else None for pair in ("gate_out", "gate_in"))
    one = c1.abs() if c2 is None else c2.abs()
    table = torch.tensor([[4, 5], [3, 2], [1, 0]], device=c1.device)  # by c1 + 1, then |c2|
    typical = torch.ones_like(c1, dtype=torch.bool) if c2 is None or c3 is None else c3 == c1 * c2
    return table[c1 + 1, one] + len(CLASSES) * (~typical).long()


def _sign(x: Float[Tensor, " n"], threshold: float) -> Int[Tensor, " n"]:
    return (x > threshold).long() - (x < -threshold).long()


def null_probability(cosine: Float[Tensor, " n"], d: int) -> Float[Tensor, " n"]:
    """[n] The probability that unrelated directions in d dimensions have a cosine at least as far from 0.

    Formula:  P(|c| >= |x|) = 1 - I(x^2; 1/2, (d - 1)/2), I the regularised incomplete beta function: c^2 of a fixed and
              a uniformly drawn direction is Beta(1/2, (d - 1)/2), and c itself is 2 b - 1, b ~ Beta((d - 1)/2,
              (d - 1)/2).
    """
    from scipy.special import betaincc

    square = cosine.double().square().clamp(max=1).cpu().numpy()
    return torch.as_tensor(betaincc(0.5, (d - 1) / 2, square)).to(cosine.device)


def null_band(d: int, level: float = 1 - BAND) -> float:
    """The cosine within +- of which a share `level` of unrelated directions in d dimensions lie."""
    from scipy.special import betaincinv

    return float(betaincinv(0.5, (d - 1) / 2, level)) ** 0.5
