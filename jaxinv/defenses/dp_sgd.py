"""DP-SGD's gradient as an update, and its clipping alone."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinv import client
from jaxinv.defenses.base import ANY, Defense, alike
from jaxinv.privacy.gradient import add_noise, clip_factor, clipped_sum
from jaxinv.types import PyTree


def _clip(update, strengths, key, context):
    """Scales the update down to an L2 norm, over all parameters."""
    factor = clip_factor(update, strengths[0])
    return jax.tree.map(lambda x: factor * x, update)


def _dp_sgd(update, strengths, key, context):
    """DP-SGD's gradient in place of the mean: each image's clipped, noise on the sum.

    The batch is the client's images; what `jaxinv.train --dp` takes steps with.
    """
    del update
    clip, multiplier = strengths
    loss = client.loss_fn(context.module, context.variables)
    mean = clipped_mean(
        loss, context.variables["params"], context.images, context.labels, strengths
    )
    return add_noise(mean, multiplier * clip / len(context.images), key)


def clipped_mean(
    loss: client.LossFn,
    params: PyTree,
    images: Float[Array, "batch height width channel"],
    labels: Array,
    strengths: tuple,
) -> PyTree:
    """Computes the mean of the images' gradients, each clipped to the first strength, a norm."""

    def gradient(example):
        image, label = example
        return client.gradient(loss, params, image[None], label[None])

    total, _ = clipped_sum(gradient, (images, labels), jnp.ones(len(images), bool), strengths[0])
    return jax.tree.map(lambda x: x / len(images), total)


def _dp_sgd_variance(shared, strengths, facts):
    """The noise of the sum, divided as the sum is."""
    return alike(shared, jnp.square(strengths[0] * strengths[1] / facts.images))


CLIP = Defense(
    _clip,
    (("norm", 1e-30, ANY),),
    expect=lambda update, own, learned: _clip(update, own, None, None),
    rescales=True,
)
DP_SGD = Defense(
    _dp_sgd,
    (("clipping norm", 1e-30, ANY), ("noise multiplier", 0, ANY)),
    variance=_dp_sgd_variance,
    of_each_image=clipped_mean,
    random=True,
)
