"""How well a reconstruction shows the truth. Beside the client, the only reader of `Truth`."""

from typing import NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxinv.types import Normalization, Truth

WINDOW = 11  # pixels to a side of what SSIM compares


class Scores(NamedTuple):
    """One trial against the truth, its images matched one to one. Means over the images."""

    psnr: Float[Array, ""]  # dB; inf when exact
    psnr_best: Float[Array, ""]  # the best image's
    psnr_images: Float[Array, " batch"]  # each image's
    ssim: Float[Array, ""]  # NaN of images smaller than its window
    mse: Float[Array, ""]  # pixels in [0, 1]


def mse(
    pixels: Float[Array, "batch height width channel"],
    truth: Float[Array, "batch height width channel"],
) -> Float[Array, " batch"]:
    """Computes the mean squared error of each image, pixels in [0, 1]."""
    return jnp.mean(jnp.square(pixels - truth), axis=(-3, -2, -1))


def psnr(
    pixels: Float[Array, "batch height width channel"],
    truth: Float[Array, "batch height width channel"],
) -> Float[Array, " batch"]:
    """Computes 10 log10(1 / MSE) of each image in dB, data range 1; inf where the two are equal."""
    return -10.0 * jnp.log10(mse(pixels, truth))


def ssim(
    pixels: Float[Array, "batch height width channel"],
    truth: Float[Array, "batch height width channel"],
) -> Float[Array, " batch"]:
    """Computes the structural similarity of each image: 11x11 Gaussian window, sigma 1.5.

    scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1)`; its default 7x7 window is another number. NaN where
    an image is smaller than the window.

    References: Wang et al. 2004.
    """
    if min(truth.shape[1:3]) < WINDOW:
        return jnp.full(len(truth), jnp.nan)
    return dm_pix.ssim(pixels, truth, filter_size=WINDOW)


def match(
    pixels: Float[Array, "found height width channel"],
    truth: Float[Array, "batch height width channel"],
    missing: Float[Array, " channel"] | float = 0.0,
) -> Float[Array, "batch height width channel"]:
    """Reorders the reconstructions so that each stands where the truth it is taken for stands.

    The one-to-one assignment of least total squared error (Hungarian algorithm): an update does
    not say in which order its images came. Reconstructions beyond the truth's number are dropped;
    for images that were not found stands one of the color `missing`.
    """
    if lacking := max(0, len(truth) - len(pixels)):
        blank = jnp.broadcast_to(missing, (lacking, *truth.shape[1:]))
        pixels = jnp.concatenate([pixels, blank.astype(pixels.dtype)])
    if len(pixels) == 1:
        return pixels
    costs = jnp.mean(jnp.square(pixels[:, None] - truth[None]), axis=(-3, -2, -1))
    # A single NaN would make the assignment the identity for every image.
    costs = jnp.where(jnp.isfinite(costs), costs, 1e6)
    rows, columns = optax.assignment.hungarian_algorithm(costs)
    return pixels[rows[jnp.argsort(columns)]]


def trace_psnr(truth: Truth, normalization: Normalization, candidate: Array) -> Float[Array, ""]:
    """Computes the mean PSNR of a candidate (normalized) for the trace."""
    pixels = match(normalization.pixels(candidate), truth.images, normalization.mean)
    return psnr(pixels, truth.images).mean()


def score(truth: Truth, pixels: Float[Array, "batch height width channel"]) -> Scores:
    """Scores one trial's reconstruction, already matched; NaN where it is not finite."""
    errors, decibels = mse(pixels, truth.images), psnr(pixels, truth.images)
    similarity = ssim(pixels, truth.images).mean()
    return Scores(decibels.mean(), decibels.max(), decibels, similarity, errors.mean())


def mean_color(truth: Truth, normalization: Normalization) -> Scores:
    """Scores the trivial guess: every pixel the data set's mean color."""
    return score(truth, jnp.broadcast_to(normalization.mean, truth.images.shape))


def label_accuracy(
    truth: Int[Array, " batch"], found: Int[Array, " found"], classes: int
) -> Float[Array, ""]:
    """Computes the share of labels recovered, as the overlap of the two multisets."""

    def counts(labels):
        return jax.nn.one_hot(labels, classes).sum(axis=0)

    return jnp.minimum(counts(truth), counts(found)).sum() / truth.size
