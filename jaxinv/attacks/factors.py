"""What SPEAR and unmixing share: a dense layer's gradient in factors, and directions among them.

The gradient of the kernel, D X, is factored as L R with L = D Q^-1 and R = Q X for some Q. Columns
of Q are directions, orthogonal to the rows of L at which their image is closed.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

OVERSAMPLING = 8  # of the random projection that finds the gradient's range
INDEPENDENT = 1e-3  # part of a unit direction that is not in the span of others
MATCHED = 0.999  # share of the ReLU's signs by which a batch is taken for found


class Layer(Protocol):
    """The first layer and its gradient, factored."""

    rows: Float[Array, "feature image"]  # of L, of length one; zero where no image is active
    right: Float[Array, "image channel"]  # R
    logits: Float[Array, "image feature"]  # R W
    bias: Float[Array, " feature"]
    sums: Float[Array, " image"]  # L^-1 times the bias gradient


def least_cosine(array: Array) -> float:
    """Below it a cosine is zero but for rounding: between the precision and its square root."""
    return float(jnp.finfo(array.dtype).eps) ** (2 / 3)


def left_factor(
    key: jax.Array, gradient: Float[Array, "feature channel"], images: int
) -> Float[Array, "feature image"]:
    """An orthonormal L by a random projection, exact for the gradient's rank is the batch's."""
    probes = jax.random.normal(key, (gradient.shape[1], images + OVERSAMPLING), gradient.dtype)
    basis, _ = jnp.linalg.qr(gradient @ probes)
    turn, _, _ = jnp.linalg.svd(basis.T @ gradient, full_matrices=False)
    return basis @ turn[:, :images]


def independent(pool: Float[Array, "direction image"], count: int) -> Float[Array, "image image"]:
    """Takes the first directions of a pool, each independent of those taken before it."""

    def take(state, direction):
        basis, chosen, taken = state
        rest = direction - basis.T @ (basis @ direction)
        length = jnp.linalg.norm(rest)
        new = (length > INDEPENDENT) & (taken < count)

        def put(rows, row):
            return jnp.where(new, rows.at[taken].set(row), rows)

        return (put(basis, rest / length), put(chosen, direction), taken + new), None

    none = jnp.zeros((count, count), pool.dtype)
    (_, chosen, _), _ = lax.scan(take, (none, none, 0), pool)
    return chosen


def agree(layer: Layer, chosen: Float[Array, "image image"]) -> Bool[Array, "image feature"]:
    """Where an image opens the ReLU as D says, of columns of Q as rows."""
    solved = jnp.linalg.solve(
        chosen.T, jnp.concatenate([layer.logits, layer.sums[:, None]], axis=1)
    )
    logits = solved[:, :-1] / solved[:, -1:] + layer.bias
    same = (logits > 0) == (jnp.abs(chosen @ layer.rows.T) >= least_cosine(layer.rows))
    return jnp.where(jnp.isfinite(logits), same, False)


def images_of(layer: Layer, chosen: Float[Array, "image image"]) -> Float[Array, "image channel"]:
    """The images of a whole Q, scaled by the bias gradient, which is the sum of D's columns."""
    inverse = jnp.linalg.inv(chosen.T)
    return inverse @ layer.right / (inverse @ layer.sums)[:, None]
