"""What a reader sees: the pages of an atlas, which open from disk without a network."""

from __future__ import annotations

from microtome.view._pages import write_pages as write_pages
