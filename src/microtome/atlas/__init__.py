"""The atlas of a model: every layer, head and neuron measured, as tables and as pages."""

from microtome.atlas._write import check_out as check_out
from microtome.atlas._write import write_atlas as write_atlas
