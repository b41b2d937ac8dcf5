"""`jaxinv.invert`: attack updates of a network of your own, here or from a shell."""

from jaxinv.invert.attack import ANNEALING, Inversion, invert, invert_all
from jaxinv.invert.verdict import Guesses

__all__ = ["ANNEALING", "Guesses", "Inversion", "invert", "invert_all"]
