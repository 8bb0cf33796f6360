"""Metrics: what is read off the logits of a run, one number per prompt; and the loss of each token."""

from microtome.metric._metrics import Divergence as Divergence
from microtome.metric._metrics import FunctionMetric as FunctionMetric
from microtome.metric._metrics import LogitDifference as LogitDifference
from microtome.metric._metrics import LogProbability as LogProbability
from microtome.metric._metrics import Metric as Metric
from microtome.metric._metrics import Probability as Probability
from microtome.metric._metrics import Rank as Rank
from microtome.metric._metrics import SpanLoss as SpanLoss
from microtome.metric._metrics import TextMetric as TextMetric
from microtome.metric._metrics import TokenSubsetMetric as TokenSubsetMetric
from microtome.metric._metrics import Vocabulary as Vocabulary
from microtome.metric._metrics import in_ids as in_ids
from microtome.metric._token_loss import token_loss as token_loss
