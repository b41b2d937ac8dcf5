"""What gradient matching moves: the pixels themselves, or something that images come out of.

An optimizer that takes steps of one length in every direction, as Adam and the gradient's sign do,
goes where the coordinates point. In pixels that is as far into noise as into anything that looks
like an image; in coordinates in which images are equally spread in all directions it is not. Low
frequencies alone leave it fewer directions to go; the weights of an untrained generator are more
(some 140,000), along which images change smoothly.

References: Olah et al. 2017, doi 10.23915/distill.00007 (decorrelated coordinates in place of a
  regularizer, for the visualization of features); Yue et al. 2022, arXiv 2206.04055 (ROG: the image
  at a low resolution first); Zhang et al. 2023, "Generative Gradient Inversion via
  Over-Parameterized Networks", ICCV (an untrained generator); Jeon et al. 2021, arXiv 2110.14962
  (a trained one, whose weights are moved too).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxinv.data.image_prior import ImagePrior, cosines, unwhiten, whiten
from jaxinv.networks.convolution import fast_convolutions
from jaxinv.types import Normalization, PyTree

LATENT, WIDTH, SLOPE = 128, 32, 0.1  # of the generator
COARSE = 4  # pixels along the longer side of its first maps


class Canvas(NamedTuple):
    """What the images of one trial are."""

    shape: tuple[int, ...]  # [*epoch, image, height, width, channel]
    normalization: Normalization
    prior: ImagePrior | None


class Representation(NamedTuple):
    """A table entry: pure functions from what is moved to normalized images, and back."""

    to_images: Callable[..., Any]  # (canvas, parameters, progress in [0, 1)) -> images
    # (canvas, images) -> parameters; None where there is no way back: then there is no projection
    # onto the box, whose images these are in any case, and no image to start from.
    to_parameters: Callable[..., Any] | None
    # (canvas, key) -> the first parameters; None: a draw of `gradient_matching.INITS`.
    draw: Callable[..., Any] | None = None
    needs_prior: bool = False
    pace: float = 1.0  # of the learning rate, where none is given


def keep_low(
    canvas: Canvas, pixels: Float[Array, "*batch height width channel"], progress: Array
) -> Float[Array, "*batch height width channel"]:
    """Drops high frequencies: the lowest quarter along each axis, then half of them, then all.

    A sixteenth of the numbers for a quarter of the way, a fourth for another, and in the second
    half all of them. By a cosine transform, whose shapes stay the same.
    """
    share = jnp.where(progress < 0.25, 0.25, 0.5)

    def projector(size):
        waves = cosines(size, pixels.dtype)
        kept = jnp.arange(size) < share * size
        return (waves.T * kept) @ waves

    rows, columns = (projector(size) for size in canvas.shape[-3:-1])
    low = jnp.einsum("ij,...jkc,kl->...ilc", rows, pixels, columns)
    return jnp.where(progress < 0.5, low, pixels)


class Generator(nn.Module):
    """Images in [0, 1] of random numbers: the generator of Zhang et al., without its spectral norm.

    A dense layer to maps of about 4 x 4 and two 3x3 convolutions, then twice the size and two more
    as often as it takes, each with BatchNorm of the batch at hand.
    """

    shape: tuple[int, int, int]  # height, width, channel

    @nn.compact
    def __call__(self, latent: Float[Array, "image latent"]) -> Array:
        """Generates one image of each row."""
        height, width, channels = self.shape

        def active(x):
            return nn.leaky_relu(nn.BatchNorm(use_running_average=False)(x), SLOPE)

        doublings = max(0, math.ceil(math.log2(max(height, width) / COARSE)))
        rows, columns = (math.ceil(size / 2**doublings) for size in (height, width))
        x = nn.Dense(rows * columns * WIDTH)(latent)
        x = active(x.reshape(len(latent), rows, columns, WIDTH))
        for level in range(doublings + 1):
            if level:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
            for _ in range(2):
                x = active(nn.Conv(WIDTH, (3, 3), use_bias=False)(x))
        x = nn.Conv(channels, (1, 1))(x)
        return nn.sigmoid(x[:, :height, :width])


class Generated(NamedTuple):
    """The parameters of a generator's images."""

    weights: PyTree
    latent: Float[Array, "image latent"]  # no step moves it


def draw_generator(canvas: Canvas, key: Array) -> Generated:
    """Draws an untrained generator for all images of a trial, and what it makes them of."""
    of_weights, of_latent = jax.random.split(key)
    latent = jax.random.normal(of_latent, (math.prod(canvas.shape[:-3]), LATENT), jnp.float32)
    weights = Generator(canvas.shape[-3:]).init(of_weights, latent)["params"]
    return Generated(weights, latent)


def generate(
    canvas: Canvas, parameters: Generated, progress: Array
) -> Float[Array, "*batch height width channel"]:
    """Generates the images, normalized."""
    del progress
    with fast_convolutions():
        pixels, _ = Generator(canvas.shape[-3:]).apply(
            {"params": parameters.weights},
            lax.stop_gradient(parameters.latent),
            mutable=["batch_stats"],  # averages that nobody reads
        )
    return canvas.normalization.normalize(pixels.reshape(canvas.shape))


REPRESENTATIONS = {
    "pixels": Representation(
        lambda canvas, pixels, progress: pixels, lambda canvas, images: images
    ),
    # The coefficients of a Gaussian image prior, in units of their standard deviations.
    "whitened": Representation(
        lambda canvas, whitened, progress: unwhiten(canvas.prior, whitened),
        lambda canvas, images: whiten(canvas.prior, images),
        needs_prior=True,
    ),
    # Low frequencies first.
    "coarse_to_fine": Representation(keep_low, lambda canvas, images: images),
    # The weights of an untrained generator.
    "generator": Representation(generate, None, draw_generator, pace=0.03),
}
