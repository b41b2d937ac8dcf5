"""Gradient inversion attacks by the batch: many targets, many seeds, one compiled loop."""

from jaxinv.attacks.gauss_newton import GaussNewton
from jaxinv.attacks.gradient_matching import Method
from jaxinv.inversion import Inversion, invert
from jaxinv.victim.checkpoints import TrainedVictim, load_victim

__all__ = ["GaussNewton", "Inversion", "Method", "TrainedVictim", "invert", "load_victim"]
