"""Pruning: only the entries of largest magnitude are sent."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
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


def _keep_largest(values: Array, dropped: Array) -> Array:
    """Sets the `dropped` entries of least magnitude to zero, no more where magnitudes tie."""
    small = smallest(jnp.abs(values).ravel(), dropped)
    return jnp.where(small.reshape(values.shape), 0, values)


def _globally(update: PyTree, dropped: Array) -> PyTree:
    """Drops the entries of least magnitude among all leaves."""
    flat, restore = jax.flatten_util.ravel_pytree(update)
    return restore(_keep_largest(flat, dropped))


def _prune(update, strengths, key, context):
    """Magnitude pruning over all parameters."""
    return _globally(update, count(strengths[0], optax.tree.size(update)))


def _prune_layer(update, strengths, key, context):
    """Magnitude pruning of each leaf."""
    return jax.tree.map(lambda x: _keep_largest(x, count(strengths[0], x.size)), update)


def _top_k(update, strengths, key, context):
    """Keeps the k entries of largest magnitude."""
    kept = jnp.round(strengths[0]).astype(jnp.int32)
    return _globally(update, optax.tree.size(update) - kept)


def _only_sent(update, strengths, shared):
    """What was pruned of the shared update is left out of the candidate's (masked cosine)."""
    return jax.tree.map(lambda u, s: jnp.where(s != 0, u, 0), update, shared)


PRUNE = Defense(_prune, (("fraction", 0, 1),), _only_sent)
PRUNE_LAYER = Defense(_prune_layer, (("fraction", 0, 1),), _only_sent)
TOP_K = Defense(_top_k, (("count", 1, ANY),), _only_sent, inverse=True)
