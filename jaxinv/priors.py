"""Priors: penalties beside the distance of the updates, multiplied by a weight; scalars."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinv.types import PyTree


def total_variation(images: Float[Array, "batch height width channel"]) -> Float[Array, ""]:
    """Computes mean|x[i+1, j] - x[i, j]| + mean|x[i, j+1] - x[i, j]|, without padding.

    Anisotropic, means and not sums, on the normalised images. A weight published with another
    formula does not carry over.

    References: Geiping et al. 2020, arXiv 2003.14053, eq. 4 and its public code.
    """
    down = jnp.abs(images[:, 1:] - images[:, :-1]).mean()
    right = jnp.abs(images[:, :, 1:] - images[:, :, :-1]).mean()
    return down + right


def none(images: Float[Array, "batch height width channel"]) -> Float[Array, ""]:
    """No penalty."""
    return jnp.zeros((), images.dtype)


def statistics_distance(statistics: PyTree, shared: PyTree) -> Float[Array, ""]:
    """Computes how far a candidate's BatchNorm statistics are from those the client sent along.

    Mean over layers of the mean squared distance of the means plus that of the variances.

    References: Yin et al. 2021 (See through Gradients), arXiv 2104.07586, eq. 10, there as sums of
      norms, whose derivative does not exist at a perfect match.
    """
    distances = jax.tree.map(lambda own, sent: jnp.square(own - sent).mean(), statistics, shared)
    leaves = jax.tree.leaves(distances)
    return 2 * sum(leaves) / len(leaves)


PRIORS = {"tv": total_variation, "none": none}
