"""Subspaces by interchange: what part of a site holds a variable, and whether a program's variables are there."""

from microtome.subspaces._das import das as das
from microtome.subspaces._dictionary import Dictionary as Dictionary
from microtome.subspaces._find import find as find
from microtome.subspaces._program import interchange as interchange
from microtome.subspaces._program import token_interchange as token_interchange
from microtome.subspaces._split import split_direction as split_direction
from microtome.subspaces._subspace import Subspace as Subspace
from microtome.subspaces._swaps import Swap as Swap
from microtome.subspaces._swaps import Swaps as Swaps
from microtome.subspaces._swaps import of_asked as of_asked
from microtome.subspaces._ways import METHODS as METHODS
