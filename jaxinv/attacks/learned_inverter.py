"""A learned inverter: a network that was trained to turn such updates into images.

What an attacker can do who has images like the client's: compute the updates that these would
cause, defended as the client's are, and learn the way back. It takes one pass.

References: Wu et al. 2023 (Learning to Invert), arXiv 2210.10880.
"""

import flax.linen as nn
import jax

from jaxinv.attacks.analytic import Recovered
from jaxinv.errors import UserError
from jaxinv.learned import nets
from jaxinv.types import Normalization, PyTree, Target


def attack(
    module: nn.Module,
    variables: PyTree,
    target: Target,
    images: int,
    image_shape: tuple[int, int, int],
    key: jax.Array,
    inverter: PyTree | None = None,
    normalization: Normalization | None = None,
) -> Recovered:
    """Takes an update of one image through the inverter, with its label.

    Args:
      module, variables, images, key: not looked at.
      target: its update and its label.
      image_shape: height, width, channel.
      inverter: its variables.
      normalization: of what is returned.

    Raises:
      UserError: there is no inverter.
    """
    del module, variables, images, key
    if inverter is None or normalization is None:
        raise UserError("--attack learned: give the --inverter (python -m jaxinv.train --inverter)")
    bins = nets.hashed(target.update)[None]
    pixels = nets.invert(inverter, bins, target.labels[:1], image_shape)
    return Recovered(normalization.normalize(pixels), None)


def check(
    module: nn.Module, variables: PyTree, image_shape: tuple[int, int, int], images: int
) -> None:
    """Raises a UserError unless there is one image; the network is in its checkpoint."""
    del module, variables, image_shape
    if images > 1:
        raise UserError("--attack learned: of one image; use --images 1")
