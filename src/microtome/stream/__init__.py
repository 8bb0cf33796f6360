"""Text in, statistics out: corpora, batches of tokens, and accumulators that merge.

    corpus      `standard_library_text`, `standard_library_code`, `registers`, `read_text`, `read_dataset`,
                `corpus_of`, `joined`, `Corpus.of`, `Corpus.shuffled`
    batches     `TokenBatches` (documents joined) and `DocumentBatches` (documents apart) yield `TokenBatch`
    harvest     `harvest` writes activations to disk, `Harvest` reads them
    statistics  `Moments`, `ExampleMeans`, `Extremes`, `Firing`, `Counter`, `Cooccurrence`, `TopExamples`, `Strongest`,
                `DrawnExamples`, `Covariance`, `CrossCovariance`, `Histogram`, `Quantiles`
    confidence  `mean_interval`, `difference_interval`, `slope_interval`, `share_interval`,
                `share_difference_interval`, `sign_flip`

Every statistic is an `Accumulator`: `update(values, ...)`, `merge(other)`, `result()`, `state()`, `save`, `load`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from microtome.later import names_of
from microtome.stream._accumulator import Accumulator as Accumulator
from microtome.stream._accumulator import merged as merged
from microtome.stream._batches import TokenBatch as TokenBatch
from microtome.stream._batches import TokenBatches as TokenBatches
from microtome.stream._batches import Tokenizer as Tokenizer
from microtome.stream._batches import bos_id as bos_id
from microtome.stream._corpus import Corpus as Corpus
from microtome.stream._corpus import joined as joined
from microtome.stream._corpus import standard_library_code as standard_library_code
from microtome.stream._corpus import standard_library_text as standard_library_text
from microtome.stream._covariance import Covariance as Covariance
from microtome.stream._covariance import CovarianceResult as CovarianceResult
from microtome.stream._cross import CrossCovariance as CrossCovariance
from microtome.stream._cross import CrossCovarianceResult as CrossCovarianceResult
from microtome.stream._documents import DocumentBatches as DocumentBatches
from microtome.stream._documents import Position as Position
from microtome.stream._documents import Row as Row
from microtome.stream._documents import rows_of as rows_of
from microtome.stream._examples import ExampleMeans as ExampleMeans
from microtome.stream._examples import ExampleMeansResult as ExampleMeansResult
from microtome.stream._extremes import Extremes as Extremes
from microtome.stream._extremes import ExtremesResult as ExtremesResult
from microtome.stream._firing import Cooccurrence as Cooccurrence
from microtome.stream._firing import CooccurrenceResult as CooccurrenceResult
from microtome.stream._firing import Counter as Counter
from microtome.stream._firing import CounterResult as CounterResult
from microtome.stream._firing import Firing as Firing
from microtome.stream._firing import FiringResult as FiringResult
from microtome.stream._histogram import Histogram as Histogram
from microtome.stream._histogram import HistogramResult as HistogramResult
from microtome.stream._histogram import Quantiles as Quantiles
from microtome.stream._histogram import QuantilesResult as QuantilesResult
from microtome.stream._interval import LEAST as LEAST
from microtome.stream._interval import OF_MEANS as OF_MEANS
from microtome.stream._interval import OF_SHARES as OF_SHARES
from microtome.stream._interval import OF_SLOPES as OF_SLOPES
from microtome.stream._interval import difference_interval as difference_interval
from microtome.stream._interval import mean_interval as mean_interval
from microtome.stream._interval import share_difference_interval as share_difference_interval
from microtome.stream._interval import share_interval as share_interval
from microtome.stream._interval import sign_flip as sign_flip
from microtome.stream._interval import slope_interval as slope_interval
from microtome.stream._moments import Moments as Moments
from microtome.stream._moments import MomentsResult as MomentsResult
from microtome.stream._read import SUFFIXES as SUFFIXES
from microtome.stream._read import corpus_of as corpus_of
from microtome.stream._read import read_dataset as read_dataset
from microtome.stream._read import read_text as read_text
from microtome.stream._read import table as table
from microtome.stream._read import unreadable as unreadable
from microtome.stream._registers import registers as registers
from microtome.stream._strongest import Strongest as Strongest
from microtome.stream._strongest import StrongestResult as StrongestResult
from microtome.stream._tables import Table as Table
from microtome.stream._together import load_accumulators as load_accumulators
from microtome.stream._together import save_accumulators as save_accumulators
from microtome.stream._topk import DrawnExamples as DrawnExamples
from microtome.stream._topk import TopExamples as TopExamples
from microtome.stream._topk import TopResult as TopResult

if TYPE_CHECKING:
    from microtome.stream._harvest import harvest as harvest
    from microtome.stream._harvested import Harvest as Harvest
else:
    __getattr__, __dir__ = names_of(__name__)  # they run models, and what counts needs none
