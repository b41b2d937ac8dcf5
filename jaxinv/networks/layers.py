"""Layers with the initialization the published networks have, which is not Flax's own.

The init changes the gradients, so it is part of a network's definition. PyTorch draws the weights
*and the biases* of a layer from U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxinv.networks.kinks import larger

# He et al. 2015: normal, variance 2 / fan_out, the convolution init of the published ResNets.
kaiming_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

BATCH_NORM_MOMENTUM = 0.9  # of the running statistics; PyTorch calls it 0.1
GROUPS = 32  # the most groups of a GroupNorm, as published (Wu & He 2018)


def uniform(bound: float) -> nn.initializers.Initializer:
    """An initializer that draws from U(-bound, bound)."""

    def init(key, shape, dtype=jax.numpy.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def conv(x: Float[Array, "batch height width channel"], features: int, kernel: int) -> Array:
    """A stride-1 convolution that keeps the image's size, with bias and PyTorch's default init."""
    init = uniform(1 / math.sqrt(kernel * kernel * x.shape[-1]))
    pad = (kernel - 1) // 2
    return nn.Conv(
        features,
        (kernel, kernel),
        padding=((pad, pad), (pad, pad)),
        kernel_init=init,
        bias_init=init,
    )(x)


def conv_kaiming(
    x: Float[Array, "batch height width channel"],
    features: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
) -> Array:
    """A convolution without bias, padded to keep the size at stride 1, Kaiming-normal by fan-out.

    `groups` = the number of channels makes it depthwise.
    """
    pad = (kernel - 1) // 2
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=((pad, pad), (pad, pad)),
        feature_group_count=groups,
        use_bias=False,
        kernel_init=kaiming_normal_fan_out,
    )(x)


class GroupNorm(nn.Module):
    """Flax's GroupNorm of images, with its parameters: the moments of channels, then of groups.

    Flax sums over an axis of a group's few channels, which a CPU cannot vectorize: here that axis
    stays whole, and the groups are a product with a small matrix.

    References: Wu & He 2018, arXiv 1803.08494.
    """

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channel"]) -> Array:
        """Normalizes each image's groups of channels."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        size = channels // self.groups
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # moments lose digits in bfloat16
        average = jnp.kron(jnp.eye(self.groups), jnp.full((size, size), 1 / size)).astype(
            wide.dtype
        )
        mean, square = (moment.mean(axis=(1, 2)) @ average for moment in (wide, wide * wide))
        factor = lax.rsqrt(jnp.maximum(square - mean * mean, 0) + 1e-5) * scale
        shifted = wide * factor[:, None, None] + (bias - mean * factor)[:, None, None]
        return shifted.astype(x.dtype)


def normalize(
    x: Float[Array, "batch height width channel"], kind: str, train: bool
) -> Float[Array, "batch height width channel"]:
    """BatchNorm, or the GroupNorm that replaces it where no image may see another (DP-SGD).

    The GroupNorm has the largest number of groups, 32 at the most, that divides the channels and
    leaves at least two of them in each: 8 groups at 16 channels, 32 at 64 and more. Groups of one
    channel would make the output of a 1x1 feature map constant.

    Args:
      x: the layer's input.
      kind: "batch" or "group".
      train: whether BatchNorm uses the batch's own statistics; GroupNorm has no others.
    """
    # Both with PyTorch's eps 1e-5.
    if kind == "batch":
        return nn.BatchNorm(
            use_running_average=not train, momentum=BATCH_NORM_MOMENTUM, epsilon=1e-5
        )(x)
    channels = x.shape[-1]
    most = max(1, min(GROUPS, channels // 2))
    groups = max(g for g in range(1, most + 1) if channels % g == 0)
    return GroupNorm(groups)(x)


def dense(x: Float[Array, "*batch channel"], features: int) -> Float[Array, "*batch feature"]:
    """A dense layer with bias and PyTorch's default init."""
    init = uniform(1 / math.sqrt(x.shape[-1]))
    return nn.Dense(features, kernel_init=init, bias_init=init)(x)


def flatten(x: Float[Array, " batch *rest"]) -> Float[Array, "batch feature"]:
    """Joins all axes but the first."""
    return x.reshape(x.shape[0], -1)


def max_pool(
    x: Float[Array, "batch height width channel"], size: int
) -> Float[Array, "batch out_height out_width channel"]:
    """Maximum over disjoint windows, stride = size, the rest at the border dropped (VALID).

    By comparisons of two slices: the derivatives of `reduce_window` are slow at second order, and
    those of `max` look for the entries *equal* to it, of which a compiler that computes the input
    twice, each time rounded another way, finds none. Of equal entries the first counts.
    """
    batch, height, width, channels = x.shape
    rows, columns = height // size, width // size
    tiles = x[:, : rows * size, : columns * size].reshape(
        batch, rows, size, columns, size, channels
    )
    tall = functools.reduce(larger, (tiles[:, :, i] for i in range(size)))
    return functools.reduce(larger, (tall[:, :, :, i] for i in range(size)))
