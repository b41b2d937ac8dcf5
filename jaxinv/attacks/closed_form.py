"""What a closed form is: a function of one update, and the networks and batches that it is for."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, Bool, Float

from jaxinv.types import Normalization, PyTree, Target


class Given(NamedTuple):
    """All that a closed form may look at."""

    module: nn.Module
    variables: PyTree
    target: Target  # its update is one gradient
    images: int  # how many are behind it
    image_shape: tuple[int, int, int]  # height, width, channel
    key: jax.Array  # of what it draws
    normalization: Normalization | None = None
    inverter: PyTree | None = None  # variables of what the attacker has trained


class Recovered(NamedTuple):
    """What an attack found, and what of it is the truth by the update's own evidence."""

    images: Float[Array, "image height width channel"]  # normalized; mixtures where not exact
    exact: Bool[Array, " image"] | None  # None where the update gives no evidence


class ClosedForm(NamedTuple):
    """A table entry: an attack without iterations."""

    find: Callable[[Given], Recovered]
    check: Callable  # (module, variables, image_shape, images); raises a UserError for others
