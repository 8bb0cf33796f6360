"""The open model: `open`, `Model`, and the proof of its map."""

from microtome.model._model import Model as Model
from microtome.model._open import open as open
from microtome.model._proof import IdentityCheck as IdentityCheck
from microtome.model._proof import prove as prove
from microtome.model._proof import unproven_stream as unproven_stream
from microtome.model._recipe import Recipe as Recipe
from microtome.model._untrained import untrained_of as untrained_of
