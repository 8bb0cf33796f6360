"""Prompts with known answers: clean and corrupt pairs, aligned token by token under any tokenizer."""

from microtome.tasks._build import about as about
from microtome.tasks._build import build as build
from microtome.tasks._build import names as names
from microtome.tasks._pair import Pair as Pair
from microtome.tasks._ravel import Asked as Asked
from microtome.tasks._ravel import Ravel as Ravel
from microtome.tasks._ravel import ravel as ravel
from microtome.tasks._ravel import shares as shares
from microtome.tasks._read import read as read
from microtome.tasks._scenarios import Fact as Fact
from microtome.tasks._scenarios import scenarios as scenarios
from microtome.tasks._score import LogOdds as LogOdds
from microtome.tasks._score import require_fit as require_fit
from microtome.tasks._task import Task as Task
from microtome.tasks._words import facts as facts

__all__ = [
    "Asked", "Fact", "LogOdds", "Pair", "Ravel", "Task", "about", "build", "facts", "names", "ravel", "read",
    "require_fit", "scenarios", "shares",
]  # fmt: skip
