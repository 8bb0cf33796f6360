"""Measures of what is inside a model, found by their declarations; `mt.methods("measure")` lists them."""

from microtome.measurements._activations import CONTEXT as CONTEXT
from microtome.measurements._bilinear import Bilinear as Bilinear
from microtome.measurements._bilinear import bilinear as bilinear
from microtome.measurements._cka import depth_stages as depth_stages
from microtome.measurements._confidence import confidence_effects as confidence_effects
from microtome.measurements._damage import damage as damage
from microtome.measurements._deltas import loss_at_deltas as loss_at_deltas
from microtome.measurements._facets import neuron_facets as neuron_facets
from microtome.measurements._geometry import entropy as entropy
from microtome.measurements._induction import pattern_scores as pattern_scores
from microtome.measurements._loss import token_loss as token_loss
from microtome.measurements._neural_collapse import Collapse as Collapse
from microtome.measurements._neural_collapse import neural_collapse as neural_collapse
from microtome.measurements._neuron_weights import neuron_directions as neuron_directions
from microtome.measurements._outside import out_of_distribution as out_of_distribution
from microtome.measurements._registers import register as register
from microtome.measurements._secondary_sinks import secondary_sinks as secondary_sinks
from microtome.measurements._similarity import similarity as similarity
from microtome.measurements._sinks import sink_scores as sink_scores
from microtome.measurements._sparse_loss import loss_at_topk as loss_at_topk
from microtome.measurements._sparse_loss import sparsity_at_loss as sparsity_at_loss
