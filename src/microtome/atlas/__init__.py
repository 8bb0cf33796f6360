"""The atlas of a model: every layer, head and neuron measured, as tables and as pages."""

from typing import TYPE_CHECKING

from microtome.later import names_of

if TYPE_CHECKING:
    from microtome.atlas._compare import compare as compare
    from microtome.atlas._labels import Labels as Labels
    from microtome.atlas._place import check_out as check_out
    from microtome.atlas._read import Atlas as Atlas
    from microtome.atlas._read import Example as Example
    from microtome.atlas._read import Unit as Unit
    from microtome.atlas._read import open as open
    from microtome.atlas._write import PROFILES as PROFILES
    from microtome.atlas._write import add_to_atlas as add_to_atlas
    from microtome.atlas._write import measures_of as measures_of
    from microtome.atlas._write import write_atlas as write_atlas
else:
    __getattr__, __dir__ = names_of(__name__)
