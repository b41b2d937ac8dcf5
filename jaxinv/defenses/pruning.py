"""Pruning: only the entries of largest magnitude are sent."""

from collections.abc import Callable

import jax
import jax.flatten_util
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxinv.defenses.base import ANY, Defense
from jaxinv.types import PyTree


def count(fraction: Array | float, size: int) -> Array:
    """The whole number of entries that a fraction is, rounded: float32 knows no 0.7 of ten."""
    return jnp.round(fraction * size).astype(jnp.int32)


def smallest(magnitudes: Float[Array, " entry"], wanted: Array) -> Bool[Array, " entry"]:
    """Marks the `wanted` smallest entries, of equal ones the first.

    Those that a stable sort has first, without a sort, which takes a CPU more than ten times as
    long: floats that are not negative are in the order of their bits, so that the last one to be
    marked is found bit by bit, from the top, each by a count.

    Args:
      magnitudes: not negative, no NaN.
      wanted: a whole number, 0 to the number of entries; traced.
    """
    size = jnp.finfo(magnitudes.dtype).bits
    bits = lax.bitcast_convert_type(magnitudes, jnp.dtype(f"uint{size}"))

    def next_bit(i, last):
        higher = last | jnp.ones_like(last) << (size - 1 - i).astype(last.dtype)
        return jnp.where((bits < higher).sum() <= wanted, higher, last)

    last = lax.fori_loop(0, size, next_bit, jnp.zeros((), bits.dtype))
    below, equal = bits < last, bits == last
    return below | (equal & (jnp.cumsum(equal) <= wanted - below.sum()))


def _whole(dropped: Callable[[tuple, int], Array]) -> Callable[[PyTree, tuple], PyTree]:
    """Which entries are kept, 1 or 0, where all leaves are one; `dropped` says how many are not."""

    def kept(update, strengths):
        flat, restore = jax.flatten_util.ravel_pytree(update)
        small = smallest(jnp.abs(flat), dropped(strengths, flat.size))
        return restore(1 - small.astype(flat.dtype))

    return kept


def _by_leaf(update: PyTree, strengths: tuple) -> PyTree:
    """Which entries are kept, 1 or 0, of each leaf the same share."""

    def kept(x):
        small = smallest(jnp.abs(x).ravel(), count(strengths[0], x.size))
        return 1 - small.astype(x.dtype).reshape(x.shape)

    return jax.tree.map(kept, update)


def _pruning(
    kept: Callable[[PyTree, tuple], PyTree], parameter: tuple, *, inverse: bool = False
) -> Defense:
    """Sends what is kept, and zeros.

    An adaptive attacker leaves out of its candidate's update what was not sent (masked cosine): the
    smallest entries of the shared update, which are no zeros any more where noise was added.
    """

    def masked(update, kept):
        return jax.tree.map(lambda x, k: jnp.where(k > 0, x, 0), update, kept)

    return Defense(
        lambda update, strengths, key, context: masked(update, kept(update, strengths)),
        (parameter,),
        learn=kept,
        expect=lambda update, strengths, learned: masked(update, learned),
        rescales=True,
        inverse=inverse,
    )


def _all_but(strengths: tuple, size: int) -> Array:
    return size - jnp.round(strengths[0]).astype(jnp.int32)


PRUNE = _pruning(_whole(lambda strengths, size: count(strengths[0], size)), ("fraction", 0, 1))
PRUNE_LAYER = _pruning(_by_leaf, ("fraction", 0, 1))
TOP_K = _pruning(_whole(_all_but), ("count", 1, ANY), inverse=True)
