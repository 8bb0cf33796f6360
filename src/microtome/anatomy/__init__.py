"""Where everything is in a model: sites, discovery, anatomy, weights. Nothing here runs a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microtome.later import names_of

if TYPE_CHECKING:
    from microtome.anatomy._anatomy import Anatomy as Anatomy
    from microtome.anatomy._anatomy import anatomy_of as anatomy_of
    from microtome.anatomy._discover import Norm as Norm
    from microtome.anatomy._discover import norm_of as norm_of
    from microtome.anatomy._family import LAYOUTS as LAYOUTS
    from microtome.anatomy._flow import Call as Call
    from microtome.anatomy._flow import Flow as Flow
    from microtome.anatomy._flow import Seen as Seen
    from microtome.anatomy._flow import factors_of as factors_of
    from microtome.anatomy._flow import multiples as multiples
    from microtome.anatomy._flow import tensors as tensors
    from microtome.anatomy._hook_points import ROWS as ROWS
    from microtome.anatomy._hook_points import HookPoint as HookPoint
    from microtome.anatomy._hook_points import Split as Split
    from microtome.anatomy._kernels import hiding_kernel as hiding_kernel
    from microtome.anatomy._load import default_folder as default_folder
    from microtome.anatomy._load import load as load
    from microtome.anatomy._load import without_bars as without_bars
    from microtome.anatomy._mixture import Experts as Experts
    from microtome.anatomy._neurons import activation_of as activation_of
    from microtome.anatomy._place import DEFAULT_NAME as DEFAULT_NAME
    from microtome.anatomy._place import MARK as MARK
    from microtome.anatomy._place import PARTS as PARTS
    from microtome.anatomy._place import Place as Place
    from microtome.anatomy._place import cache_dir as cache_dir
    from microtome.anatomy._place import place_of as place_of
    from microtome.anatomy._probe import SHORTEST as SHORTEST
    from microtome.anatomy._probe import probe as probe
    from microtome.anatomy._probe import thresholds as thresholds
    from microtome.anatomy._readable import refuse_unreadable as refuse_unreadable
    from microtome.anatomy._saved import from_plain as from_plain
    from microtome.anatomy._saved import to_plain as to_plain
    from microtome.anatomy._sites import ALL as ALL
    from microtome.anatomy._sites import RULES as RULES
    from microtome.anatomy._sites import SITES as SITES
    from microtome.anatomy._sites import Address as Address
    from microtome.anatomy._sites import Indices as Indices
    from microtome.anatomy._sites import Rule as Rule
    from microtome.anatomy._sites import Site as Site
    from microtome.anatomy._sites import integer as integer
    from microtome.anatomy._sites import parse as parse
    from microtome.anatomy._sites import parse_indices as parse_indices
    from microtome.anatomy._sites import parse_list as parse_list
    from microtome.anatomy._stored import adapters as adapters
    from microtome.anatomy._stored import is_plain as is_plain
    from microtome.anatomy._stored import leaves as leaves
    from microtome.anatomy._stored import packed as packed
    from microtome.anatomy._stored import present as present
    from microtome.anatomy._stored import rounds_together as rounds_together
    from microtome.anatomy._stored import runs_on as runs_on
    from microtome.anatomy._stored import sizes as sizes
    from microtome.anatomy._stored import state as state
    from microtome.anatomy._stored import stored as stored
    from microtome.anatomy._weights import LayerWeights as LayerWeights
    from microtome.anatomy._weights import NormWeights as NormWeights
    from microtome.anatomy._weights import Weights as Weights
    from microtome.anatomy._weights import at_least_float32 as at_least_float32
    from microtome.anatomy._weights import bias_of as bias_of
    from microtome.anatomy._weights import parameter_of as parameter_of
    from microtome.anatomy._weights import rounds_inputs as rounds_inputs
    from microtome.anatomy._weights import weight_of as weight_of
else:
    __getattr__, __dir__ = names_of(__name__)
