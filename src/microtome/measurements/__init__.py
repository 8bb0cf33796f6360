"""Measurements of activations, weights, attention and layers, each with its interval or its control."""

from microtome.measurements._heads import head_scores as head_scores
from microtome.measurements._heads import pattern_scores as pattern_scores
from microtome.measurements._heads import repeated_tokens as repeated_tokens
from microtome.measurements._means import means as means
from microtome.measurements._means import resampled as resampled
from microtome.measurements._neurons import neuron_directions as neuron_directions
from microtome.measurements._neurons import neuron_weights as neuron_weights
from microtome.measurements._skip import ablation_loss as ablation_loss
from microtome.measurements._skip import token_loss as token_loss
from microtome.measurements._text import TextStatistics as TextStatistics
