"""Why a model gives its answer: lenses, decompositions, patching and attribution."""

from microtome.explain._attribution import RELP as RELP
from microtome.explain._attribution import attribute as attribute
from microtome.explain._compare_neurons import compare_neurons as compare_neurons
from microtome.explain._context import context as context
from microtome.explain._contributions import contributions as contributions
from microtome.explain._edges import edge_effects as edge_effects
from microtome.explain._edges import node_effects as node_effects
from microtome.explain._effects import component_effects as component_effects
from microtome.explain._examples import over_prompts as over_prompts
from microtome.explain._flow import flow as flow
from microtome.explain._graph import Graph as Graph
from microtome.explain._graph import graph as graph
from microtome.explain._head_rank import head_rank as head_rank
from microtome.explain._head_sources import head_sources as head_sources
from microtome.explain._knockout import attention_knockout as attention_knockout
from microtome.explain._lens import logit_lens as logit_lens
from microtome.explain._memorised import memorised as memorised
from microtome.explain._mlp_roles import mlp_roles as mlp_roles
from microtome.explain._patching import patch as patch
from microtome.explain._prior import prior_and_context as prior_and_context
from microtome.explain._recovery import auc as auc
from microtome.explain._recovery import circuit_recovery as circuit_recovery
from microtome.explain._spans import span_of as span_of
from microtome.explain._token_lens import token_lens as token_lens
from microtome.explain._tracing import causal_trace as causal_trace
from microtome.explain._verify import verify as verify
