"""A network behind an imprint: the layer that a malicious server puts in front of it.

Its units all measure the same, the mean pixel, and each is active above a threshold of its own: two
neighbors differ by the images between their thresholds, so that one alone between two is in the
update in numbers of its own, whatever the size of the batch (`jaxinv.attacks.imprint`). The server
may multiply the last layer too: all gradients in front of it grow with that, and noise of a fixed
variance does not.

References: Fowl et al. 2022 (Robbing the Fed), arXiv 2110.13057.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinv.errors import UserError
from jaxinv.networks import kinks
from jaxinv.networks.inspect import find_classifier, replace, subtree
from jaxinv.networks.layers import flatten
from jaxinv.types import PyTree

GAIN = 1e-3  # of what the imprint adds to the images that go on to the network
LAYER = "imprint"  # its name among the parameters


class Imprinted(nn.Module):
    """A network and the layer in front of it, relu(x W + b).

    The sum over the units goes to every pixel, times `GAIN`: then the derivative is the same for
    all units that an image activates.
    """

    network: nn.Module
    bins: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"], train: bool = False
    ) -> Float[Array, "batch class"]:
        """Computes the network's logits of the images and what the imprint adds to them."""
        active = kinks.relu(nn.Dense(self.bins, name=LAYER)(flatten(x)))
        added = GAIN * active.sum(axis=1)
        return self.network(x + added[:, None, None, None], train)


def imprinted(
    module: nn.Module,
    variables: PyTree,
    shape: tuple[int, ...],
    bins: int,
    known: Float[np.ndarray, " image"],
    amplify: float = 1.0,
) -> tuple[Imprinted, PyTree]:
    """Puts an imprint in front of a network: its bins each hold the same share of images.

    Args:
      module, variables: the network.
      shape: of an image.
      bins: k.
      known: mean normalized pixels of images like those of the clients.
      amplify: factor on the layer that makes the network's logits.

    Raises:
      UserError: no one layer makes the logits that are to be amplified.
    """
    if amplify != 1:
        variables = amplified(module, variables, shape, amplify)
    pixels = math.prod(shape)
    edges = np.quantile(known, np.arange(bins) / bins)
    edges[0] = np.mean(known) - 10 * np.std(known)  # whatever lies below
    kernel = jnp.full((pixels, bins), 1 / pixels, jnp.float32)
    within = {kind: {"network": tree} for kind, tree in variables.items()}
    within["params"][LAYER] = {"kernel": kernel, "bias": jnp.asarray(-edges, jnp.float32)}
    return Imprinted(module, bins), within


def amplified(network: nn.Module, variables: PyTree, shape: tuple[int, ...], by: float) -> PyTree:
    """The variables with the layer that makes the logits multiplied.

    An image that is then classified rightly, and surely, has no gradient any more.

    Args:
      network, variables: of the network.
      shape: of an image.
      by: the factor.

    Raises:
      UserError: no one layer makes the logits.
    """
    place = find_classifier(network, variables, shape)
    if place is None:
        raise UserError("--amplify: no one layer makes this network's logits; leave it out")
    params = variables["params"]
    for path in filter(None, (place.kernel, place.bias)):
        params = replace(params, path, by * subtree(params, path))
    return {**variables, "params": params}


def expected_alone(images: int, bins: int) -> float:
    """How many of the images are alone in their bin, on average: B (1 - 1/k)^(B - 1)."""
    return images * (1 - 1 / bins) ** (images - 1)
