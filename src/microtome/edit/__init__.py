"""Edits: what is done to a run, as values that compose, print, hash and are saved."""

from microtome.edit._blocks import Repeat as Repeat
from microtome.edit._blocks import ScaleBlock as ScaleBlock
from microtome.edit._blocks import Skip as Skip
from microtome.edit._edits import Add as Add
from microtome.edit._edits import Apply as Apply
from microtome.edit._edits import Clamp as Clamp
from microtome.edit._edits import Edit as Edit
from microtome.edit._edits import Mean as Mean
from microtome.edit._edits import Project as Project
from microtome.edit._edits import Rotate as Rotate
from microtome.edit._edits import Scale as Scale
from microtome.edit._edits import Selection as Selection
from microtome.edit._edits import Set as Set
from microtome.edit._edits import SiteEdit as SiteEdit
from microtome.edit._edits import Zero as Zero
from microtome.edit._edits import apply as apply
from microtome.edit._edits import canonical as canonical
from microtome.edit._freeze import Freeze as Freeze
from microtome.edit._knockout import KnockOut as KnockOut
from microtome.edit._noise import Noise as Noise
from microtome.edit._patch import Patch as Patch
from microtome.edit._patch import Source as Source
from microtome.edit._saved import load_edits as load_edits
from microtome.edit._saved import save_edits as save_edits
from microtome.edit._saved import unshared as unshared
