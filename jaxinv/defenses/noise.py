"""Noise on every entry of an update."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxinv.defenses.base import ANY, Defense, alike
from jaxinv.privacy.gradient import add_noise


def _noise(draw: Callable | None = None) -> Defense:
    """Noise of a given variance on every entry."""

    def apply(update, strengths, key, context):
        del context
        return add_noise(update, jnp.sqrt(strengths[0]), key, draw)

    def variance(shared, strengths, facts):
        return alike(shared, strengths[0])

    return Defense(apply, (("variance", 0, ANY),), variance=variance, random=True)


def _relative_noise(update, strengths, key, context):
    """Gaussian noise whose expected norm is the strength times the update's."""
    del context
    return add_noise(
        update, strengths[0] * optax.tree.norm(update) / math.sqrt(optax.tree.size(update)), key
    )


def _relative_variance(shared, strengths, facts):
    """The noise has the share s^2 / (1 + s^2) of the power that was shared."""
    del facts
    share = jnp.square(strengths[0]) / (1 + jnp.square(strengths[0]))
    return alike(shared, share * jnp.square(optax.tree.norm(shared)) / optax.tree.size(shared))


GAUSSIAN = _noise()
LAPLACE = _noise(lambda key, shape, dtype: jax.random.laplace(key, shape, dtype) / 2**0.5)
RELATIVE = Defense(_relative_noise, (("ratio", 0, ANY),), variance=_relative_variance, random=True)
