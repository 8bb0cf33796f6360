"""Measures of what is inside a model, found by their declarations; `mt.methods("measure")` lists them."""

from microtome.measurements._activations import CONTEXT as CONTEXT
from microtome.measurements._induction import pattern_scores as pattern_scores
from microtome.measurements._loss import token_loss as token_loss
from microtome.measurements._neuron_weights import neuron_directions as neuron_directions
