"""Measures of what is inside a model, found by their declarations; `mt.methods("measure")` lists them."""

from microtome.measurements._commit import Commitment as Commitment
from microtome.measurements._commit import Verdict as Verdict
from microtome.measurements._commit import commit as commit
from microtome.measurements._commit import massive_dimensions as massive_dimensions
from microtome.measurements._commit import verify_commit as verify_commit
from microtome.measurements._commit_table import commit_separation as commit_separation
from microtome.measurements._head_functions import relation_scores as relation_scores
from microtome.measurements._head_importance import head_inequality as head_inequality
from microtome.measurements._head_importance import leave_one_out as leave_one_out
from microtome.measurements._head_importance import pruning_curve as pruning_curve
from microtome.measurements._head_types import head_types as head_types
from microtome.measurements._induction import pattern_scores as pattern_scores
from microtome.measurements._loss import token_loss as token_loss
from microtome.measurements._neuron_weights import neuron_directions as neuron_directions
from microtome.measurements._repeat_lags import cmr_curve as cmr_curve
from microtome.measurements._repeat_lags import fit_cmr as fit_cmr
from microtome.measurements._unselectable import selectable as selectable
