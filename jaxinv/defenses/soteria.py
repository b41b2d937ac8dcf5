"""Soteria: the representation before the last dense layer, perturbed where it tells most."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxinv.defenses.base import Defense, alike
from jaxinv.defenses.pruning import count, smallest
from jaxinv.networks.convolution import fast_convolutions
from jaxinv.networks.inspect import classifier_input, classifier_path
from jaxinv.types import PyTree


def _soteria(update, strengths, key, context):
    """Perturbs the representation that the last dense layer's gradient gives away.

    Of the features r before that layer, the given share with the largest |r_i| / |d r_i / d image|
    is left out of the layer's weight gradient: those that cost the reconstruction most per change.

    References: Sun et al. 2021 (Soteria), arXiv 2012.06043, eq. 7 and its public code.
    """
    module, variables, images, _ = context
    path = classifier_path(module, variables, images.shape[1:])

    def features(image):
        with fast_convolutions():
            return classifier_input(module, variables, image[None])[0]

    def of_image(image):
        values, pull = jax.vjp(features, image)

        def unit(i):
            return jax.nn.one_hot(i, values.size, dtype=values.dtype)

        slope = lax.map(lambda i: jnp.linalg.norm(pull(unit(i))[0]), jnp.arange(values.size))
        return jnp.abs(values) / jnp.maximum(slope, 1e-12)

    score = lax.map(of_image, images).mean(axis=0)
    kept = smallest(score, score.size - count(strengths[0], score.size))
    return _on_kernel(path, lambda leaf: jnp.where(kept[:, None], leaf, 0), update)


def _on_kernel(path: tuple[str, ...], change: Callable, tree: PyTree) -> PyTree:
    """Changes the kernel of one layer."""

    def visit(at, leaf):
        return change(leaf) if tuple(k.key for k in at) == (*path, "kernel") else leaf

    return jax.tree_util.tree_map_with_path(visit, tree)


def _all_of_classifier(shared, strengths, facts):
    """An attacker who knows of it leaves the defended layer out.

    References: Balunović et al. 2022, arXiv 2111.04706, section 5.
    """
    del strengths
    zero = alike(shared, 0.0)
    return _on_kernel(facts.classifier, lambda x: jnp.full_like(x, jnp.inf), zero)


SOTERIA = Defense(
    _soteria, (("fraction", 0, 1),), variance=_all_of_classifier, tells_classifier=True
)
