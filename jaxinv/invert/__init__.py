"""`jaxinv.invert`: attack updates of a network of your own, here or from a shell."""

from jaxinv.invert.attack import Inversion, invert, invert_all
from jaxinv.invert.verdict import Guesses

__all__ = ["Guesses", "Inversion", "invert", "invert_all"]
