"""Why a model gives its answer: lenses, decompositions, patching and attribution."""

from microtome.explain._attribution import RELP as RELP
from microtome.explain._attribution import attribute as attribute
from microtome.explain._contributions import contributions as contributions
from microtome.explain._edges import edge_effects as edge_effects
from microtome.explain._edges import node_effects as node_effects
from microtome.explain._effects import component_effects as component_effects
from microtome.explain._examples import over_prompts as over_prompts
from microtome.explain._graph import Graph as Graph
from microtome.explain._graph import graph as graph
from microtome.explain._knockout import attention_knockout as attention_knockout
from microtome.explain._lens import logit_lens as logit_lens
from microtome.explain._patching import patch as patch
from microtome.explain._recovery import auc as auc
from microtome.explain._recovery import circuit_recovery as circuit_recovery
from microtome.explain._spans import span_of as span_of
from microtome.explain._tracing import causal_trace as causal_trace
from microtome.explain._verify import verify as verify
