"""Pruning: only the entries of largest magnitude are sent."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxinv.defenses.base import ANY, Defense
from jaxinv.types import PyTree


def rank(values: Float[Array, " entry"]) -> Array:
    """The position of each entry in ascending order; ties have positions of their own."""
    return jnp.zeros(values.size, jnp.int32).at[jnp.argsort(values)].set(jnp.arange(values.size))


def count(fraction: Array | float, size: int) -> Array:
    """The whole number of entries that a fraction is, rounded: float32 knows no 0.7 of ten."""
    return jnp.round(fraction * size).astype(jnp.int32)


def _keep_largest(values: Array, dropped: Array) -> Array:
    """Sets the `dropped` entries of least magnitude to zero, no more where magnitudes tie."""
    kept = rank(jnp.abs(values).ravel()) >= dropped
    return jnp.where(kept.reshape(values.shape), values, 0)


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
