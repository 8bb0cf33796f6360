"""Probes: properties decoded from a model's states, layer by layer, beside controls; whether the model uses them."""

from microtome.probes._fit import fit as fit
from microtome.probes._fit import probe as probe
from microtome.probes._parts import parts as parts
from microtome.probes._probe import Probe as Probe
from microtome.probes._weak import weak_to_strong as weak_to_strong
