"""Measurements of activations, weights, attention and layers, each with its interval or its control."""

from microtome.measure._heads import head_scores as head_scores
from microtome.measure._heads import pattern_scores as pattern_scores
from microtome.measure._heads import repeated_tokens as repeated_tokens
from microtome.measure._means import means as means
from microtome.measure._means import resampled as resampled
from microtome.measure._neurons import neuron_directions as neuron_directions
from microtome.measure._neurons import neuron_weights as neuron_weights
from microtome.measure._skip import loss_without as loss_without
from microtome.measure._skip import token_loss as token_loss
from microtome.measure._text import TextStatistics as TextStatistics
