"""Images read off the layer that a malicious server put in front of the network.

Unit i of an imprint (`jaxinv.networks.imprint`) is active for all images above its threshold. The
difference of its gradient to the next unit's is of the images between the two thresholds, sum of
d_j x_j in the kernel and sum of d_j in the bias, whose ratio is the image if there is one.

References: Fowl et al. 2022 (Robbing the Fed), arXiv 2110.13057.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxinv.attacks.closed_form import Given, Recovered
from jaxinv.errors import UserError
from jaxinv.networks.imprint import LAYER
from jaxinv.types import PyTree

EMPTY = 1e-5  # of the largest bias gradient: what two sums of the same images leave is rounding


class Read(NamedTuple):
    """What is read off an imprinted layer's gradient."""

    images: Float[Array, "bin pixel"]  # the mean image of the bin, weighted; exact if alone
    weights: Float[Array, " bin"]  # 0 where the bin is empty


def read(update: PyTree) -> Read:
    """Reads the bins off the gradient of an imprinted layer, {"kernel": ..., "bias": ...}."""
    kernel, bias = update["kernel"], update["bias"]
    own = kernel - jnp.pad(kernel[:, 1:], ((0, 0), (0, 1)))
    weights = bias - jnp.pad(bias[1:], (0, 1))
    there = jnp.abs(weights) > EMPTY * jnp.abs(bias).max()
    ratio = own / jnp.where(there, weights, 1)
    return Read(jnp.where(there, ratio, 0).T, jnp.where(there, weights, 0))


def attack(given: Given) -> Recovered:
    """Reads the images of a batch, each exactly that is alone in its bin.

    Args:
      given: the network behind its imprint; labels are not read, and there is nothing to draw. Its
        images are exact by the update's own evidence where as many bins hold something and the
        others nothing: noise would be in all of them. Of a noisy update the bins of the largest
        weights are taken.
    """
    images = given.images
    found, weights = read(given.target.update[LAYER])
    full = (weights != 0).sum()
    exact = (full == images) & (full < len(weights))
    if len(weights) < images:  # of fewer bins the rest is the mean color
        more = images - len(weights)
        found, weights = jnp.pad(found, ((0, more), (0, 0))), jnp.pad(weights, (0, more))
    _, largest = lax.top_k(jnp.abs(weights), images)
    return Recovered(found[largest].reshape(images, *given.image_shape), jnp.full(images, exact))


def check(
    module: nn.Module, variables: PyTree, image_shape: tuple[int, int, int], images: int
) -> None:
    """Raises a UserError unless the network stands behind an imprint."""
    del module, image_shape, images
    if LAYER not in variables["params"]:
        raise UserError(
            "--attack imprint: reads what a server imprinted, and this network has no imprint in "
            "front; sweeps put one there with --server malicious"
        )
