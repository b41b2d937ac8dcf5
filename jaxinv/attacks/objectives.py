"""Objectives: how far the update a candidate would cause is from the one that was shared.

Each maps what two updates have to do with one another to a scalar, 0 when they agree. That this is
four numbers, sums over all layers, is what lets a layer give its part without the update itself
(`jaxinv.attacks.gram`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinv.types import PyTree


class Comparison(NamedTuple):
    """Of a candidate's update u and the shared one t, over all parameters together."""

    own: Float[Array, ""]  # <u, u>
    cross: Float[Array, ""]  # <u, t>
    shared: Float[Array, ""]  # <t, t>
    distance: Float[Array, ""]  # |u - t|^2


def compare(update: PyTree, shared: PyTree, weights: PyTree | None = None) -> Comparison:
    """Compares two updates, PyTrees of one structure.

    Args:
      update, shared: the two.
      weights: of the entries, in every one of the inner products; None for 1.
    """
    if weights is not None:
        update, shared = (
            jax.tree.map(lambda w, x: jnp.sqrt(w) * x, weights, tree) for tree in (update, shared)
        )
    difference = jax.tree.map(jnp.subtract, update, shared)
    pairs = ((update, update), (update, shared), (shared, shared), (difference, difference))
    return Comparison(*(_inner(left, right) for left, right in pairs))


def _inner(left: PyTree, right: PyTree) -> Float[Array, ""]:
    """Inner product over all leaves."""
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), left, right)))


def cosine(between: Comparison) -> Float[Array, ""]:
    """Computes 1 - <u, t> / (|u| |t|), one cosine over all parameters together.

    Blind to the scale of either update. An update of norm zero has no direction: the result is
    not finite, and the trial is reported so.

    References: Geiping et al. 2020, arXiv 2003.14053, eq. 4.
    """
    return 1.0 - between.cross / (jnp.sqrt(between.own) * jnp.sqrt(between.shared))


def l2(between: Comparison) -> Float[Array, ""]:
    """Computes the squared Euclidean distance |u - t|^2 over all parameters.

    References: Zhu et al. 2019 (DLG), arXiv 1906.08935, eq. 3.
    """
    return between.distance


OBJECTIVES = {"cosine": cosine, "l2": l2}
