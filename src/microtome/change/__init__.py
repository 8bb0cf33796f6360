"""Changes of a model: edits made from text, to run under, to save and to take back."""

from microtome.change._ablation import mean_ablation as mean_ablation
from microtome.change._values import means as means
from microtome.change._values import resampled as resampled
