"""The one trainer: everything in this package that is ever trained goes through `fit`."""

from microtome.training._fit import fit as fit
from microtome.training._fitted import Fitted as Fitted
from microtome.training._parts import frozen_weights as frozen_weights
from microtome.training._parts import in_parts as in_parts
from microtome.training._tune import tune as tune
