"""Claims of methods and papers, tested: estimates beside exact effects and circuits that are known."""

from microtome.claims._referee import referee as referee
