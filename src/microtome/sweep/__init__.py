"""Sweeps: many edited runs in a few passes, exactly."""

from microtome.sweep._circuits import Circuits as Circuits
from microtome.sweep._circuits import written as written
from microtome.sweep._edges import RECEIVERS as RECEIVERS
from microtome.sweep._edges import SENDERS as SENDERS
from microtome.sweep._edges import Edge as Edge
from microtome.sweep._edges import require_edges as require_edges
from microtome.sweep._gated import bytes_of_gated as bytes_of_gated
from microtome.sweep._gated import gated as gated
from microtome.sweep._pass import Cell as Cell
from microtome.sweep._sweep import Sweep as Sweep
from microtome.sweep._sweep import SweepPlan as SweepPlan
from microtome.sweep._sweep import SweepResult as SweepResult
