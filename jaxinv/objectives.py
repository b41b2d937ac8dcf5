"""Objectives: how far the update a candidate would cause is from the one that was shared.

Each maps two updates (PyTrees of one structure) to a scalar, 0 when they agree.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinv.types import PyTree


def _inner(left: PyTree, right: PyTree) -> Float[Array, ""]:
    """Inner product over all leaves."""
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), left, right)))


def cosine(update: PyTree, target: PyTree) -> Float[Array, ""]:
    """Computes 1 - <u, t> / (|u| |t|), one cosine over all parameters together.

    Blind to the scale of either update. An update of norm zero has no direction: the result is
    not finite, and the trial is reported so.

    References: Geiping et al. 2020, arXiv 2003.14053, eq. 4.
    """
    norms = jnp.sqrt(_inner(update, update)) * jnp.sqrt(_inner(target, target))
    return 1.0 - _inner(update, target) / norms


def l2(update: PyTree, target: PyTree) -> Float[Array, ""]:
    """Computes the squared Euclidean distance |u - t|^2 over all parameters.

    References: Zhu et al. 2019 (DLG), arXiv 1906.08935, eq. 3.
    """
    difference = jax.tree.map(jnp.subtract, update, target)
    return _inner(difference, difference)


OBJECTIVES = {"cosine": cosine, "l2": l2}
