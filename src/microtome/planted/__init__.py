"""Models whose insides are known, to test every method against."""

from microtome.planted._corruptions import Corruptions as Corruptions
from microtome.planted._corruptions import corruptions as corruptions
from microtome.planted._corruptions import run_at as run_at
from microtome.planted._corruptions import writes as writes
from microtome.planted._folder import Planted as Planted
from microtome.planted._folder import arrays_of as arrays_of
from microtome.planted._folder import load as load
from microtome.planted._folder import save as save
from microtome.planted._network import PlantedConfig as PlantedConfig
from microtome.planted._network import PlantedForCausalLM as PlantedForCausalLM
from microtome.planted._programs import PROGRAMS as PROGRAMS
from microtome.planted._programs import Program as Program
from microtome.planted._programs import decode as decode
from microtome.planted._programs import program as program
from microtome.planted._truth import Edge as Edge
from microtome.planted._truth import edges as edges
from microtome.planted._truth import head_of as head_of
from microtome.planted._truth import mlp_of as mlp_of
from microtome.planted._truth import nodes as nodes
