"""What a reader sees: pages that open from disk without a network, and tables and maps in a terminal."""

from __future__ import annotations

from microtome.view._heat import heat_maps as heat_maps
from microtome.view._maps import HeatMap as HeatMap
from microtome.view._maps import checks_of as checks_of
from microtome.view._maps import maps_of as maps_of
from microtome.view._maps import tokens_of as tokens_of
from microtome.view._pages import write_pages as write_pages
from microtome.view._patch_page import write_patch_page as write_patch_page
from microtome.view._terminal import Part as Part
from microtome.view._terminal import contributions_table as contributions_table
from microtome.view._terminal import failed_lines as failed_lines
from microtome.view._terminal import lens_table as lens_table
from microtome.view._terminal import parts_of as parts_of
from microtome.view._terminal import proof_table as proof_table
from microtome.view._terminal import sites_table as sites_table
from microtome.view._terminal import visible as visible
