"""Compression: fewer bits for every entry."""

import math

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxinv import rng
from jaxinv.defenses.base import Defense


def _mean_magnitude(update, strengths):
    """Of all entries: the size in which signs are sent."""
    del strengths
    return optax.tree.norm(update, ord=1) / optax.tree.size(update)


def _sign(update, strengths, key, context):
    """Sends signs, times the mean magnitude over all parameters.

    References: Bernstein et al. 2018 (signSGD); the scale: Karimireddy et al. 2019, 1901.09847.
    """
    size = _mean_magnitude(update, strengths)
    return jax.tree.map(lambda x: size * jnp.sign(x), update)


def _soft_sign(update, strengths, size):
    """What a sign is on average where an entry is uncertain by its leaf's mean magnitude.

    In the size that was sent, which a squared distance compares too.
    """

    def soft(x):
        scale = lax.stop_gradient(jnp.abs(x).mean()) + 1e-30
        return size * jax.scipy.special.erf(x / (math.sqrt(2) * scale))

    return jax.tree.map(soft, update)


def _quantize(update, strengths, key, context):
    """Rounds each leaf at random to 2^bits levels from -max to max, unbiased.

    References: Alistarh et al. 2017 (QSGD), arXiv 1610.02132, with the maximum for the norm.
    """
    steps = jnp.exp2(jnp.round(strengths[0])) - 1

    def quantized(key, x):
        top = jnp.maximum(jnp.abs(x).max(), 1e-30)
        level = (x / top + 1) / 2 * steps
        level = jnp.floor(level + jax.random.uniform(key, x.shape, x.dtype))
        return (jnp.minimum(level, steps) / steps * 2 - 1) * top

    return rng.over_leaves(key, update, quantized)


def _quantization_variance(shared, strengths, facts):
    """Rounding at random to levels a step apart: step^2 / 6, on average over a cell.

    With one or two bits nearly all entries lie in the middle of the same cell, where it is up to
    step^2 / 4.
    """
    del facts
    steps = jnp.exp2(jnp.round(strengths[0])) - 1
    return jax.tree.map(lambda x: jnp.square(2 * jnp.abs(x).max() / steps) / 6, shared)


SIGN = Defense(_sign, (), expect=_soft_sign, learn=_mean_magnitude, rescales=True)
QUANTIZE = Defense(
    _quantize, (("bits", 1, 24),), variance=_quantization_variance, random=True, inverse=True
)
