"""What a reader sees: pages that open from disk without a network, figures in a notebook, and tables in a terminal.

A result is drawn by the axes of its variables: see `forms`. The room itself can be called: `mt.view(result)` is
`mt.view.View(result)`, which shows itself in a terminal and in a notebook.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from microtome.view._dataset import tokens_of as tokens_of
from microtome.view._forms import Form as Form
from microtome.view._forms import Forms as Forms
from microtome.view._forms import forms as forms
from microtome.view._frame import frame_table as frame_table
from microtome.view._graph import EdgeGraph as EdgeGraph
from microtome.view._group_pages import write_labels as write_labels
from microtome.view._heat_map import HeatMap as HeatMap
from microtome.view._neurons import NeuronMap as NeuronMap
from microtome.view._page import write_page as write_page
from microtome.view._pages import PAGES as PAGES
from microtome.view._pages import write_pages as write_pages
from microtome.view._parts import Part as Part
from microtome.view._parts import PartsList as PartsList
from microtome.view._patterns import Passage as Passage
from microtome.view._patterns import Patterns as Patterns
from microtome.view._proof import failed_lines as failed_lines
from microtome.view._proof import methods_line as methods_line
from microtome.view._proof import proof_table as proof_table
from microtome.view._proof import proof_verdict as proof_verdict
from microtome.view._proof import sites_table as sites_table
from microtome.view._render import html as html
from microtome.view._render import terminal as terminal
from microtome.view._series import Series as Series
from microtome.view._tables import FactList as FactList
from microtome.view._tables import LabelTable as LabelTable
from microtome.view._token_map import TokenMap as TokenMap
from microtome.view._view import View as View


class _Room(ModuleType):
    """This module, which draws what it is called with."""

    def __call__(self, data: Any, *, top: int = 5) -> View:
        return View(data, top=top)


sys.modules[__name__].__class__ = _Room
