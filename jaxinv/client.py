"""The victim's side: the update a federated client shares for its private batch."""

from collections.abc import Callable

import flax.linen as nn
import jax
import optax
from jaxtyping import Array, Float, Int

from jaxinv.convolution import fast_convolutions
from jaxinv.types import Normalization, PyTree, Truth

ApplyFn = Callable[[PyTree, Array], Array]  # parameters, normalised images -> logits


def apply_fn(module: nn.Module, variables: PyTree) -> ApplyFn:
    """Makes a pure `(params, images) -> logits` of a Linen module, on the trilinear convolution.

    What `variables` holds beside "params" (running statistics) is a constant, as in a client that
    computes its gradient in evaluation mode.
    """

    def apply(params, images):
        with fast_convolutions():
            return module.apply({**variables, "params": params}, images)

    return apply


def gradient(
    apply: ApplyFn,
    params: PyTree,
    images: Float[Array, "batch height width channel"],
    labels: Int[Array, " batch"],
) -> PyTree:
    """Computes the gradient of the mean cross-entropy with respect to the parameters.

    The victim and the attacker's simulation of the victim both call this one function, so sign,
    scale and reduction agree by construction.

    Args:
      apply: the network.
      params: where the gradient is taken.
      images: normalised.
      labels: class of each image.
    """

    def loss(params):
        logits = apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.grad(loss)(params)


def share_gradient(
    apply: ApplyFn, params: PyTree, truth: Truth, normalization: Normalization
) -> PyTree:
    """Computes the update an honest client sends for its private batch."""
    return gradient(apply, params, normalization.normalize(truth.images), truth.labels)
