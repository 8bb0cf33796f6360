"""Changes of a model: edits made from text, to run under, to save and to take back."""

from microtome.change._ablation import mean_ablation as mean_ablation
from microtome.change._assess import assess as assess
from microtome.change._bake import bake as bake
from microtome.change._change import Change as Change
from microtome.change._change import Step as Step
from microtome.change._change import applied_to as applied_to
from microtome.change._change import load as load
from microtome.change._change import of as of
from microtome.change._change import read as read
from microtome.change._delta import LowRank as LowRank
from microtome.change._delta import Values as Values
from microtome.change._export import export as export
from microtome.change._export import with_biases as with_biases
from microtome.change._values import means as means
from microtome.change._values import resampled as resampled
from microtome.change._weight import weight_at as weight_at
