"""In the words of which group of texts a layer thinks: the logit lens, summed over the tokens of each group.

Formula:  c_g(t) = count of token t in the text of group g;  f_g(t) = c_g(t) / sum_u c_g(u);
          t belongs to group g if f_g(t) / sum_h f_h(t) >= `own` and c_g(t) >= `least`, and to none otherwise;
          M[g, l, r] = mean over the rows of the text of group r of the mean over their tokens of
                       sum over t of g of softmax(unembed(final_norm(resid_post_l)))_t                lens_map
          lens_share[g, l] = M[g, l, g]; its control: the mean of M[g, l, r] over the other groups r;
          text_share[g] = share of the text's own tokens that belong to the group, of its own text, beside the same of
          the other texts: what the share is if every token is told exactly.
          In the last layer it is the model's own output. The lens is read at every `stride`-th place of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.measurements._group_neurons import elsewhere
from microtome.method import Argument, Column, Kept, Seen, Source, Statistic, measure
from microtome.model import Model
from microtome.stream import Histogram, Moments

OWN = 0.8
LEAST = 3
STRIDE = 8
AXES = ("group", "layer")
KARGARAN = Source(
    "Kargaran et al.", "How Programming Concepts and Neurons Are Shared in Code Language Models", 2025, "2506.01074",
    "logit lens by language", departs="mass of all tokens of a group, which are told from the text by their frequency, "
    "in place of keywords and dictionaries",
)  # fmt: skip


def group_tokens(counts: Float[Tensor, "group vocab"], own: float = OWN, least: int = LEAST) -> Int[Tensor, " vocab"]:
    """[vocab] The group that each token belongs to by its counts in the text of each [group, vocab], -1 for none."""
    rate = counts.double() / counts.double().sum(1, keepdim=True).clamp(min=1)
    share = rate / rate.sum(0).clamp(min=1e-300)
    best, group = share.max(0)
    seen = counts.gather(0, group.unsqueeze(0)).squeeze(0)
    return torch.where((best >= own) & (seen >= least), group, -1)


def members(group: Int[Tensor, " vocab"], groups: int) -> Float[Tensor, "vocab group"]:
    """[vocab, group] 1 where a token belongs to a group."""
    return (group.unsqueeze(1) == torch.arange(groups, device=group.device)).float()


@measure(
    "lens_groups",
    of="layer",
    atlas=False,
    title="groups in the logit lens",
    question="To the tokens of which group of texts does each layer give its probability?",
    columns=(
        Column("lens_share", "share", "probability that the logit lens gives to tokens of the group, in its own text",
               "lens_share_elsewhere", (0, 1), dims=AXES, interval=False),
        Column("lens_share_elsewhere", "share", "the same in the texts of the other groups, each counting once",
               range=(0, 1), dims=AXES, interval=False),
        Column("lens_map", "share", "probability that the logit lens gives to tokens of the group, in the text of each "
               "group in turn", "none: lens_share beside its control is made of it", (0, 1), dims=AXES,
               extra=("read",), interval=False),
        Column("text_share", "share", "share of the tokens of the group's text that belong to it",
               "text_share_elsewhere", (0, 1), dims=("group",), interval=False),
        Column("text_share_elsewhere", "share", "the same in the texts of the other groups", range=(0, 1),
               dims=("group",), interval=False),
        Column("group_vocabulary", "tokens", "how many tokens belong to the group", "none: a number of tokens",
               (0, None), dims=("group",), interval=False),
    ),
    source=KARGARAN,
    cost="L unembeddings of every eighth token: about 0.8 forwards; 48 L vocab bytes a group",
    check="tests/laws/test_lens_groups.py, tests/planted/test_neurons.py",
)  # fmt: skip
class LensGroups(Statistic):
    """The share of the logit lens on tokens of each group, by layer and by the group that is read.

    Raises:
        SiteError: the model's residual stream cannot be read as logits.
    """

    def __init__(
        self,
        own: Annotated[float, Argument("share of a token's frequency that makes it a group's", "share", 0.5, 1)] = OWN,
        least: Annotated[int, Argument("times that a group must hold its tokens", "times", least=1)] = LEAST,
        stride: Annotated[int, Argument("the lens is read at every so-many-th place of a row", "tokens", 1)] = STRIDE,
    ) -> None:
        """Give tokens to groups by these bounds, and read so often."""
        self.own, self.least, self.stride = own, least, stride

    def prepare(self, model: Model, layers: Sequence[int | None]) -> None:
        """Refuse a stream that cannot be read as logits, before anything runs."""
        model.require_readable()

    def start(self, model: Model, layer: int | None) -> Kept:
        """Counts of tokens, and for each layer the mean over rows of what the lens gives each token."""
        vocab = model.anatomy.d_vocab
        edges = torch.arange(vocab + 1, dtype=torch.float64) - 0.5
        kept: Kept = {f"lens.{i}": Moments(vocab) for i in range(model.anatomy.n_layers)}
        return kept | {"tokens": Histogram(1, edges)}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in the rows of one group."""
        mask = torch.ones(seen.tokens.shape, dtype=torch.bool) if seen.mask is None else seen.mask.clone()
        kept["tokens"].update(seen.tokens.unsqueeze(-1).double(), mask)
        width = mask.shape[1]
        places = torch.tensor([*range(self.stride - 1, width, self.stride)] or [width - 1])  # of a short row its last
        mask = mask[:, places]
        rows = mask.any(1)
        if not bool(rows.any()):
            return
        model, tokens = seen.model, seen.tokens[rows.to(seen.tokens.device)]
        run = model.run(tokens, capture="*.resid_post", logits=False)
        weight = (mask[rows].double() / mask[rows].sum(1, keepdim=True)).to(tokens.device)
        for i in range(model.anatomy.n_layers):
            stream = run[f"{i}.resid_post"][:, places.to(tokens.device)]
            means = [w @ model.unembed(x).float().softmax(-1).double() for x, w in zip(stream, weight, strict=True)]
            kept[f"lens.{i}"].update(torch.stack(means))

    def across(self, kept: Mapping[str, Sequence[Kept]]) -> Mapping[str, Tensor]:
        """The shares of all groups in all texts."""
        every = [only for (only,) in kept.values()]
        counts = torch.cat([held["tokens"].result().count for held in every]).double()
        belongs = members(group_tokens(counts, self.own, self.least), len(every)).double()
        layers = sum(name.startswith("lens.") for name in every[0])
        nothing = torch.full((len(belongs),), torch.nan, dtype=torch.float64)
        lens = torch.stack(
            [
                torch.stack([own.result().mean if (own := held[f"lens.{i}"]).count else nothing for i in range(layers)])
                for held in every
            ]
        )  # [read, layer, vocab]
        whole = (lens @ belongs).permute(2, 1, 0).clamp(0, 1)  # [group, layer, read]
        text = (counts / counts.sum(1, keepdim=True)) @ belongs  # [read, group], NaN of a group without text
        numbers = range(len(every))
        return {
            "lens_share": torch.stack([whole[g, :, g] for g in numbers]),
            "lens_share_elsewhere": torch.stack([elsewhere(whole[g].T)[g] for g in numbers]),
            "lens_map": whole, "text_share": text.diagonal().clone(),
            "text_share_elsewhere": torch.stack([elsewhere(text[:, g])[g] for g in numbers]),
            "group_vocabulary": belongs.sum(0),
        }  # fmt: skip
