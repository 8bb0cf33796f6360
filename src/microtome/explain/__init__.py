"""Why a model said what it said: lenses and exact decompositions."""

from microtome.explain._attribution import RELP as RELP
from microtome.explain._attribution import attribute as attribute
from microtome.explain._contributions import contributions as contributions
from microtome.explain._contributions import one_token as one_token
from microtome.explain._graph import Graph as Graph
from microtome.explain._graph import graph as graph
from microtome.explain._lens import logit_lens as logit_lens
from microtome.explain._patching import activation_patching as activation_patching
from microtome.explain._verify import verify as verify
