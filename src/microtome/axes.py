"""The axis vocabulary, and the array type of tokens.

One name an axis, everywhere: in datasets, tables, docstrings and error messages.

    batch     rows of a run                     neuron    hidden units of an MLP
    pos       token positions                   vocab     tokens of the vocabulary
    q_pos     positions that attend             feature   entries of a dictionary
    k_pos     positions attended to             group     groups of examples or texts
    layer     blocks, from 0                    example   items of a data set
    head      query heads                       rank      ordered components (experts by slot, singular vectors)
    kv_head   key/value heads                   expert    experts of a mixture
    d_model   the residual stream               d_head    one head
    component heads and branches that act       receiver  what reads the stream: heads' inputs, MLPs
    sender    what writes to the stream         site      names of places
    span      named ranges of positions         round     readings of a context, from 1
    recipe    ways to do one thing              attribute what entities have a value of
    found_by  ways to find a subspace, and the  variable  named values of a program
              controls beside them              part      of a direction: read or not, and controls
"""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Int
from torch import Tensor

Tokens: TypeAlias = Int[Tensor, "batch pos"]
