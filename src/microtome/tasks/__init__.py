"""Prompts with known answers: clean and corrupt pairs, aligned token by token under any tokenizer."""

from microtome.tasks._build import about as about
from microtome.tasks._build import build as build
from microtome.tasks._build import names as names
from microtome.tasks._pair import Pair as Pair
from microtome.tasks._read import read as read
from microtome.tasks._score import LogOdds as LogOdds
from microtome.tasks._score import require_fit as require_fit
from microtome.tasks._task import Task as Task
from microtome.tasks._words import facts as facts

__all__ = ["LogOdds", "Pair", "Task", "about", "build", "facts", "names", "read", "require_fit"]
