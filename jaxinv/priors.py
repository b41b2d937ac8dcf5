"""Priors: penalties on the candidate alone, multiplied by a weight. Each returns a scalar."""

import jax.numpy as jnp
from jaxtyping import Array, Float


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


PRIORS = {"tv": total_variation, "none": none}
