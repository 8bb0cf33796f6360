"""Models whose insides are known, to test every method against."""

from microtome.planted._folder import Planted as Planted
from microtome.planted._folder import arrays_of as arrays_of
from microtome.planted._folder import load as load
from microtome.planted._folder import save as save
from microtome.planted._network import PlantedConfig as PlantedConfig
from microtome.planted._network import PlantedForCausalLM as PlantedForCausalLM
from microtome.planted._truth import Edge as Edge
from microtome.planted._truth import edges as edges
from microtome.planted._truth import nodes as nodes
