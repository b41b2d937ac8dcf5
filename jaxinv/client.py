"""The victim's side: the update a federated client shares for its private batch."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxinv.convolution import fast_convolutions
from jaxinv.models.layers import BATCH_NORM_MOMENTUM
from jaxinv.types import Normalization, PyTree, Truth

# Parameters, normalised images -> logits, and the batch's own statistics (() where not computed).
ApplyFn = Callable[[PyTree, Array], tuple[Array, PyTree]]

# What BatchNorm does on the client, and what of it the server sees: part of the threat model.
BATCH_NORM = {
    "eval": "running statistics, constants of the network",
    "train": "the batch's own statistics, kept private",
    "train-shared": "the batch's own statistics, sent along with the update",
}


def apply_fn(module: nn.Module, variables: PyTree, batch_norm: str = "eval") -> ApplyFn:
    """Makes a pure function of a Linen module, on the trilinear convolution.

    Running statistics are an input that nothing changes. In evaluation mode they are constants of
    the network; in training mode the images' own statistics take their place, and are returned as
    `{"batch_stats": {layer: {"mean", "var"}}}`.

    Args:
      module: called as `module.apply(variables, images)`, with `train=True` in training mode.
      variables: "params" and what else the module holds.
      batch_norm: one of `BATCH_NORM`.
    """

    def evaluating(params, images):
        with fast_convolutions():
            return module.apply({**variables, "params": params}, images), ()

    def training(params, images):
        # From zero, Flax's moving average is (1 - momentum) times the batch's statistics.
        zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
        with fast_convolutions():
            logits, moved = module.apply(
                {**variables, "params": params, "batch_stats": zeros}, images, train=True,
                mutable=["batch_stats"],
            )  # fmt: skip
        return logits, jax.tree.map(lambda x: x / (1 - BATCH_NORM_MOMENTUM), moved)

    return evaluating if batch_norm == "eval" else training


def cross_entropy(
    logits: Float[Array, "batch class"], labels: Int[Array, " batch"]
) -> Float[Array, ""]:
    """Computes the loss whose gradient a client shares: the mean over its images."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def gradient(
    apply: ApplyFn,
    params: PyTree,
    images: Float[Array, "batch height width channel"],
    labels: Int[Array, " batch"],
) -> tuple[PyTree, PyTree]:
    """Computes the gradient of the mean cross-entropy with respect to the parameters.

    The victim and the attacker's simulation of the victim both call this one function, so sign,
    scale and reduction agree by construction.

    Args:
      apply: the network.
      params: where the gradient is taken.
      images: normalised.
      labels: class of each image.

    Returns:
      The gradient, and the statistics of the batch as `apply` returns them.
    """

    def loss(params):
        logits, statistics = apply(params, images)
        return cross_entropy(logits, labels), statistics

    return jax.grad(loss, has_aux=True)(params)


def share_gradient(
    apply: ApplyFn, params: PyTree, truth: Truth, normalization: Normalization
) -> tuple[PyTree, PyTree]:
    """Computes an honest client's update for its private batch, and the batch's statistics."""
    return gradient(apply, params, normalization.normalize(truth.images), truth.labels)
