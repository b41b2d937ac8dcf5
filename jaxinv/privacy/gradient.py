"""DP-SGD's gradient: each example's clipped, summed, and noise on the sum.

One step (Abadi et al. 2016, arXiv 1607.00133, algorithm 1):

    (sum over the sampled examples of g_i min(1, clip / |g_i|) + N(0, (multiplier clip)^2)) / batch

with |g_i| over all parameters together and `batch` the *expected* number of examples.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxinv import rng
from jaxinv.types import PyTree


def clip_factor(tree: PyTree, norm: Array | float) -> Float[Array, ""]:
    """Computes min(1, norm / |tree|), the norm over all leaves together."""
    square = optax.tree.norm(tree, squared=True)
    # Of a zero gradient the factor is 1, and its derivative is not NaN.
    return jnp.minimum(1.0, norm * lax.rsqrt(jnp.maximum(square, 1e-20)))


def clipped_sum(
    gradient: Callable[[Any], tuple[PyTree, PyTree]],
    examples: PyTree,
    present: Bool[Array, " example"],
    clip: Array | float,
    microbatch: int | None = None,
) -> tuple[PyTree, PyTree]:
    """Sums per-example gradients, each clipped over all parameters.

    Args:
      gradient: of one example, with what else is measured of it.
      examples: leaves [example, ...].
      present: which examples count; the others are computed and left out.
      clip: the L2 norm no example's gradient exceeds.
      microbatch: examples whose gradients are in memory at once; None for all. Divides them.

    Returns:
      The sum, and the sum of what else was measured.
    """

    def one(example, present):
        found, measured = gradient(example)
        factor = clip_factor(found, clip)

        # `where`, for a masked example may hold anything.
        def keep(x):
            return jnp.where(present, x, 0)

        return jax.tree.map(lambda g: keep(g * factor), found), jax.tree.map(keep, measured)

    def some(arguments):
        return jax.tree.map(lambda x: x.sum(axis=0), jax.vmap(one)(*arguments))

    if microbatch is None or microbatch == len(present):
        return some((examples, present))

    def split(x):
        return x.reshape(-1, microbatch, *x.shape[1:])

    parts = jax.tree.map(split, (examples, present))
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(some, jax.tree.map(lambda x: x[0], parts)),
    )

    def add(total, part):
        return (jax.tree.map(jnp.add, total, some(part)), None)

    return lax.scan(add, zero, parts)[0]


def add_noise(tree: PyTree, std: Array | float, key: Array, draw: Callable | None = None) -> PyTree:
    """Adds independent noise of a standard deviation to every entry; each leaf has its own key.

    Args:
      tree: what noise is added to.
      std: of each entry.
      key: of this draw.
      draw: (key, shape, dtype) -> noise of unit variance; normal if not given.
    """
    draw = draw or jax.random.normal

    def noisy(key, leaf):
        # In float64 it is the same noise.
        return leaf + std * draw(key, leaf.shape, jnp.float32).astype(leaf.dtype)

    return rng.over_leaves(key, tree, noisy)
