"""What methods and papers claim, settled: estimates beside exact effects and circuits that are known."""

from microtome.claims._referee import referee as referee
