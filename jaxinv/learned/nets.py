"""The networks an attacker trains for itself: small, of plain pixels in [0, 1].

References: Zhang et al. 2018 (FFDNet), arXiv 1710.04026 (a denoiser of a noise level that it is
  told, on quarter images); Karras et al. 2022 (EDM), arXiv 2206.00364, table 1 (what a denoiser
  of any noise level is given and asked for); Sun et al. 2024 (GI-PIP), arXiv 2401.11748 (the
  autoencoder, there with transposed convolutions); Wu et al. 2023 (LTI), arXiv 2210.10880 (the
  inverter).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinv.errors import UserError
from jaxinv.networks.convolution import fast_convolutions
from jaxinv.types import PyTree

CENTER, SPREAD = 0.5, 0.25  # of pixels, about: they scale what the denoiser sees
LAYERS = 6  # convolutions of the denoiser
HALVINGS = 3  # of the autoencoder
BINS, WIDTH = 4096, 1024  # that an update is hashed into; units of an inverter
HASHED = BINS + 1  # numbers of a hashed update
LEAST_SIZE = 1e-20  # of a bin: an update may be zero

Pixels = Float[Array, "image height width channel"]


class Denoiser(nn.Module):
    """The least-squares estimate of an image from one with white noise of a given level."""

    width: int = 32

    @nn.compact
    def __call__(self, pixels: Pixels, noise: Float[Array, " image"]) -> Pixels:
        """Of noisy pixels, and the standard deviation of their noise."""
        _, height, width, channels = pixels.shape
        level = noise[:, None, None, None]
        total = jnp.sqrt(jnp.square(level) + SPREAD**2)
        own = jnp.square(SPREAD / total)
        centered = pixels - CENTER
        x = _quarters(_padded(centered / total, 2))
        told = jnp.broadcast_to(jnp.log(level / SPREAD), (*x.shape[:-1], 1))
        x = jnp.concatenate([x, told], axis=-1)
        for _ in range(LAYERS - 1):
            x = nn.relu(nn.Conv(self.width, (3, 3))(x))
        x = nn.Conv(4 * channels, (3, 3))(x)
        x = _whole(x)[:, :height, :width]
        return CENTER + own * centered + (level * SPREAD / total) * x


class Autoencoder(nn.Module):
    """An image through a few numbers and back: what it was not trained on comes back worse."""

    width: int = 12

    @nn.compact
    def __call__(self, pixels: Pixels) -> Pixels:
        """Of pixels in [0, 1]."""
        _, height, width, channels = pixels.shape
        x = _padded(pixels, 2**HALVINGS)
        for level in range(HALVINGS):
            x = nn.relu(nn.Conv(self.width * 2**level, (4, 4), strides=2, padding=1)(x))
        for level in reversed(range(HALVINGS - 1)):
            x = nn.relu(_whole(nn.Conv(4 * self.width * 2**level, (3, 3))(x)))
        x = _whole(nn.Conv(4 * channels, (3, 3))(x))
        return nn.sigmoid(x)[:, :height, :width]


class Inverter(nn.Module):
    """From an update's bins and its images' labels to these images."""

    numbers: int  # of all images of an update
    width: int = WIDTH

    @nn.compact
    def __call__(self, seen: Float[Array, "update feature"]) -> Float[Array, "update number"]:
        """Of hashed updates in units of their standard deviations, with the labels beside them."""
        for _ in range(2):
            seen = nn.relu(nn.Dense(self.width)(seen))
        return nn.sigmoid(nn.Dense(self.numbers)(seen))


def hashed(update: PyTree) -> Float[Array, " number"]:
    """An update in `HASHED` numbers: each entry, with a random sign, is added to one of the bins.

    The bins are in units of their root mean square, whose logarithm is the last number: the
    gradients of some images are a thousand times those of others, and what is far beyond all that
    an inverter has learned from comes out black and white.

    Always the same bins and signs, so that what was learned of them stands.

    References: Weinberger et al. 2009, arXiv 0902.2206.
    """
    flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(update)])
    each = -(-flat.size // BINS)
    flat = jnp.pad(flat, (0, each * BINS - flat.size))
    of_place, of_sign = jax.random.split(jax.random.key(BINS))
    # Drawn in float32, or they would be others in float64.
    up = jax.random.bernoulli(of_sign, jnp.float32(0.5), flat.shape)
    signs = jnp.where(up, 1, -1).astype(flat.dtype)
    places = jax.random.permutation(of_place, flat.size)
    bins = (signs * flat)[places].reshape(BINS, each).sum(axis=1)
    size = jnp.maximum(jnp.sqrt(jnp.square(bins).mean()), LEAST_SIZE)
    return jnp.append(bins / size, jnp.log(size))


def invert(
    variables: PyTree,
    bins: Float[Array, "update number"],
    labels: Int[Array, "update image"],
    shape: tuple[int, int, int],
) -> Float[Array, "update image height width channel"]:
    """The pixels that a trained inverter takes hashed updates for.

    Raises:
      UserError: it has learned from updates of another number of images.
    """
    params, scale = variables["params"], variables["scale"]
    width, numbers = (params[name]["bias"].size for name in ("Dense_0", "Dense_2"))
    images = numbers // math.prod(shape)
    if images != labels.shape[1]:
        raise UserError(
            f"--inverter: has learned from updates of {images} images, not {labels.shape[1]}; "
            "give that, or train another"
        )
    classes = (params["Dense_0"]["kernel"].shape[0] - HASHED) // images
    own = jax.nn.one_hot(labels, classes, dtype=bins.dtype).reshape(len(bins), -1)
    seen = jnp.concatenate([(bins - scale["mean"]) / scale["std"], own], axis=-1)
    found = Inverter(numbers, width).apply({"params": params}, seen)
    return found.reshape(-1, images, *shape)


def denoise(params: PyTree, pixels: Pixels, noise: Array) -> Pixels:
    """What a trained denoiser takes noisy pixels for; one level, or one for each image."""
    noise = jnp.broadcast_to(noise, len(pixels)).astype(pixels.dtype)
    with fast_convolutions():  # on a CPU others are slow inside a loop
        width = params["Conv_0"]["bias"].size
        return Denoiser(width).apply({"params": params}, pixels, noise)


def encode(params: PyTree, pixels: Pixels) -> Pixels:
    """What comes back of pixels through a trained autoencoder."""
    with fast_convolutions():
        return Autoencoder(params["Conv_0"]["bias"].size).apply({"params": params}, pixels)


def _padded(x: Array, multiple: int) -> Array:
    """Repeats the last row and column until the sides are multiples."""
    below, right = (-size % multiple for size in x.shape[1:3])
    return jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0)), mode="edge")


def _quarters(x: Array) -> Array:
    """Each square of 2 x 2 pixels as the channels of one."""
    images, height, width, channels = x.shape
    x = x.reshape(images, height // 2, 2, width // 2, 2, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(images, height // 2, width // 2, 4 * channels)


def _whole(x: Array) -> Array:
    """Undoes `_quarters`."""
    images, height, width, channels = x.shape
    x = x.reshape(images, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(images, 2 * height, 2 * width, channels // 4)
