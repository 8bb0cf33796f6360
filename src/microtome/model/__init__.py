"""Where everything is in a model: sites, discovery, anatomy, weights. Nothing here runs a model."""

from microtome.model._anatomy import Anatomy as Anatomy
from microtome.model._anatomy import Split as Split
from microtome.model._anatomy import Tap as Tap
from microtome.model._anatomy import anatomy_of as anatomy_of
from microtome.model._discover import Norm as Norm
from microtome.model._discover import norm_of as norm_of
from microtome.model._kernels import PREFIX as PREFIX
from microtome.model._kernels import hiding_kernel as hiding_kernel
from microtome.model._load import MARK as MARK
from microtome.model._load import cache_dir as cache_dir
from microtome.model._load import default_folder as default_folder
from microtome.model._load import load as load
from microtome.model._sites import ALL as ALL
from microtome.model._sites import RULES as RULES
from microtome.model._sites import SITES as SITES
from microtome.model._sites import Address as Address
from microtome.model._sites import Rule as Rule
from microtome.model._sites import Selection as Selection
from microtome.model._sites import Site as Site
from microtome.model._sites import integer as integer
from microtome.model._sites import parse as parse
from microtome.model._sites import parse_selection as parse_selection
from microtome.model._weights import LayerWeights as LayerWeights
from microtome.model._weights import NormWeights as NormWeights
from microtome.model._weights import Weights as Weights
from microtome.model._weights import wide as wide
