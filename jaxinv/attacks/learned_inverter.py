"""A learned inverter: a network that was trained to turn such updates into images.

What an attacker can do who has images like the client's: compute the updates that these would
cause, defended as the client's are, and learn the way back. It takes one pass, and what it finds
may be where another attack begins (`gradient_matching.LEARNED`).

References: Wu et al. 2023 (Learning to Invert), arXiv 2210.10880.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxinv.attacks.closed_form import Given, Recovered
from jaxinv.errors import UserError
from jaxinv.learned import nets
from jaxinv.types import Normalization, PyTree, Target

MISSING = "no trained inverter: give the --inverter (python -m jaxinv.train --inverter)"


def attack(given: Given) -> Recovered:
    """Takes an update through the inverter, with its labels.

    Raises:
      UserError: there is no inverter, or it is of updates of another number of images.
    """
    found = find(given.target, given.image_shape, given.inverter, given.normalization)
    return Recovered(found, None)


def find(
    target: Target,
    image_shape: tuple[int, int, int],
    inverter: PyTree | None,
    normalization: Normalization,
) -> Float[Array, "image height width channel"]:
    """The normalized images that an inverter finds.

    Raises:
      UserError: there is no inverter, or it is of updates of another number of images.
    """
    if inverter is None:
        raise UserError(MISSING)
    bins = nets.hashed(target.update)[None]
    pixels = nets.invert(inverter, bins, target.labels[None], image_shape)[0]
    return normalization.normalize(pixels)


def check(
    module: nn.Module, variables: PyTree, image_shape: tuple[int, int, int], images: int
) -> None:
    """Nothing to check here: what an inverter is for is in its checkpoint."""
    del module, variables, image_shape, images
