"""Hooks: the one place where a model is touched."""

from microtome.run.hook._hooks import HookSet as HookSet
from microtome.run.hook._lock import lock_of as lock_of
from microtome.run.hook._points import install as install
from microtome.run.hook._tensors import input_of as input_of
from microtome.run.hook._tensors import output_of as output_of
from microtome.run.hook._tensors import with_input as with_input
from microtome.run.hook._tensors import with_output as with_output
from microtome.run.hook._trace import trace as trace
