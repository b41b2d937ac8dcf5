"""Gradient inversion attacks by the batch: many targets, many seeds, one compiled loop."""

from jaxinv.attacks.gauss_newton import GaussNewton
from jaxinv.attacks.gradient_matching import Method
from jaxinv.client.pytorch import from_torch
from jaxinv.invert import Inversion, invert, invert_all
from jaxinv.runs.results import read_run
from jaxinv.victim.checkpoints import TrainedVictim, load_victim

__version__ = "0.2.0"

# The name of the function and of the package that it is in: importing `jaxinv.invert` here, first,
# leaves it the function's for good.
__all__ = [
    "GaussNewton",
    "Inversion",
    "Method",
    "TrainedVictim",
    "from_torch",
    "invert",
    "invert_all",
    "load_victim",
    "read_run",
]
