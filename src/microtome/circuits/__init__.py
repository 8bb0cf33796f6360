"""Circuits: which edges of a model carry an answer, how they are found, and how well they carry it alone."""

from microtome.circuits._acdc import acdc as acdc
from microtome.circuits._circuit import Circuit as Circuit
from microtome.circuits._circuit import compare as compare
from microtome.circuits._circuit import load as load
from microtome.circuits._circuit import node_of as node_of
from microtome.circuits._circuit import of_mask as of_mask
from microtome.circuits._codes import code_scores as code_scores
from microtome.circuits._conditions import condition_heads as condition_heads
from microtome.circuits._find import find as find
from microtome.circuits._find import mean_scores as mean_scores
from microtome.circuits._judge import completeness as completeness
from microtome.circuits._judge import faithfulness as faithfulness
from microtome.circuits._planted import acdc_recovery as acdc_recovery
from microtome.circuits._question import circuit as circuit
from microtome.circuits._repair import repair as repair
from microtome.circuits._roles import roles as roles
from microtome.circuits._scores import from_scores as from_scores
from microtome.circuits._signals import signals as signals
from microtome.circuits._sparsify import Sparsification as Sparsification
from microtome.circuits._weight_mask import weight_mask as weight_mask
