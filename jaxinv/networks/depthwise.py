"""Depthwise convolution, one kernel per channel, as shifted multiply-adds.

Every tap (i, j) of the kernels multiplies the image shifted by (i, j), channel by channel. Slices,
products and sums are all there is, so derivatives of any order and `vmap`, also over kernels of
their own per trial, are again slices, products and sums; XLA's grouped convolutions are slow at
the first order and hopeless at the second.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def depthwise_conv(
    images: Float[Array, "batch height width channel"],
    kernels: Float[Array, "kernel_height kernel_width 1 channel"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Float[Array, "batch out_height out_width channel"]:
    """Convolves (correlates, as in all of deep learning) each channel with its own kernel.

    Args:
      images: the input.
      kernels: one per channel.
      strides: of height and width.
      padding: zeros (before, after) of height and width.
    """
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    batch, height, width, channels = images.shape
    taps_h, taps_w = kernels.shape[:2]
    # The last row and column that the first tap meets.
    last_h = (height - taps_h) // strides[0] * strides[0]
    last_w = (width - taps_w) // strides[1] * strides[1]
    rows = (batch, last_h // strides[0] + 1, 1, channels)
    total = 0.0
    for i in range(taps_h):
        for j in range(taps_w):
            shifted = lax.slice(
                images,
                (0, i, j, 0),
                (batch, i + last_h + 1, j + last_w + 1, channels),
                (1, *strides, 1),
            )
            # Repeating the tap for every row makes its gradient a sum over each row and then one
            # over the rows: on a CPU 7 times faster than XLA's sum over everything at once, which
            # the barrier keeps it from going back to.
            total += shifted * lax.optimization_barrier(jnp.broadcast_to(kernels[i, j], rows))
    return total
