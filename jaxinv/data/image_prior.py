"""Gaussian image priors: what an attacker believes of an image before it sees an update.

A prior is a mean image and a covariance S = B diag(v) B^T with an orthonormal basis B, so that an
image and its *coefficients* B^T (x - mean) are one another's transform and the coefficients are
independent. Two bases:

* the two-dimensional discrete cosine transform, with a rotation of the colors of its own at each
  frequency. Its variances are a power spectrum: it is diagonal for any stationary process with
  reflecting borders, costs two small matrix products an image, and fits images of any size;
* the eigenvectors of a full covariance, d x d numbers for images of d: a hundred times the cost.

References: Field 1987 (natural images have a power spectrum of about 1 / frequency^2); Ahmed,
  Natarajan, Rao 1974 (the DCT nearly diagonalizes their covariance).
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxinv import data
from jaxinv.errors import UserError
from jaxinv.files import read_npz, write_file

Arrays = Array | np.ndarray  # made by NumPy, used by JAX
RIDGE = 1e-4  # added to every variance, in squared units of a pixel's standard deviation
MOST_IMAGES = 50_000  # of a training split that are looked at
MOST_NUMBERS = 4096  # of an image whose full covariance is taken
SHRINKAGE = 100.0  # images that the spectrum counts for, beside those that a covariance is made of


class ImagePrior(NamedTuple):
    """A Gaussian over normalized images of one size."""

    mean: Float[Arrays, "height width channel"]
    variances: Float[Arrays, "height width channel"]  # of the coefficients
    colors: Float[Arrays, "height width channel channel"] | None  # rotation at each frequency
    basis: Float[Arrays, "pixel pixel"] | None  # columns; in place of DCT and rotation


class Source(NamedTuple):
    """Where a prior's numbers come from; kept in the rows."""

    name: str  # "cifar10/train"
    images: int


def coefficients(
    prior: ImagePrior, images: Float[Arrays, "*batch height width channel"]
) -> Float[Arrays, "*batch height width channel"]:
    """Transforms images, from which the mean was taken, to coefficients: B^T x."""
    if prior.basis is not None:
        flat = images.reshape(*images.shape[:-3], -1)
        return (flat @ prior.basis).reshape(images.shape)
    rows, columns = (cosines(n, prior.mean.dtype) for n in prior.mean.shape[:2])
    waves = jnp.einsum("ui,...ijc,vj->...uvc", rows, images, columns)
    return jnp.einsum("uvcd,...uvc->...uvd", prior.colors, waves)


def synthesize(
    prior: ImagePrior, coefficients: Float[Arrays, "*batch height width channel"]
) -> Float[Arrays, "*batch height width channel"]:
    """Transforms coefficients back, without the mean: B c, the transpose of `coefficients`."""
    if prior.basis is not None:
        flat = coefficients.reshape(*coefficients.shape[:-3], -1)
        return (flat @ prior.basis.T).reshape(coefficients.shape)
    rows, columns = (cosines(n, prior.mean.dtype) for n in prior.mean.shape[:2])
    waves = jnp.einsum("uvcd,...uvd->...uvc", prior.colors, coefficients)
    return jnp.einsum("ui,...uvc,vj->...ijc", rows, waves, columns)


def whiten(
    prior: ImagePrior, images: Float[Arrays, "*batch height width channel"]
) -> Float[Arrays, "*batch height width channel"]:
    """Coefficients of images in units of their standard deviations."""
    return coefficients(prior, images - prior.mean) / jnp.sqrt(prior.variances)


def unwhiten(
    prior: ImagePrior, whitened: Float[Arrays, "*batch height width channel"]
) -> Float[Arrays, "*batch height width channel"]:
    """Images of whitened coefficients: standard normal ones give a draw from the prior."""
    return prior.mean + synthesize(prior, jnp.sqrt(prior.variances) * whitened)


def cosines(size: int, dtype=np.float64) -> Float[np.ndarray, "frequency position"]:
    """The orthonormal DCT-II: row u is cos(pi u (2 i + 1) / (2 size)), scaled to length 1."""
    u, i = np.arange(size)[:, None], np.arange(size)
    matrix = np.cos(np.pi * u * (2 * i + 1) / (2 * size)) * np.sqrt(2 / size)
    matrix[0] /= np.sqrt(2)
    return matrix.astype(dtype)


def estimate_spectrum(
    pixels: Float[np.ndarray, "image height width channel"],
) -> Float[np.ndarray, "height width channel channel"]:
    """Estimates the covariance of the colors at every frequency of the DCT, around the mean."""
    rows, columns = (cosines(n, pixels.dtype) for n in pixels.shape[1:3])
    centered = pixels - pixels.mean(axis=0)
    waves = np.einsum("ui,bijc,vj->buvc", rows, centered, columns, optimize=True)
    return np.einsum("buvc,buvd->uvcd", waves, waves, optimize=True) / len(pixels)


def resample_spectrum(
    covariance: Float[np.ndarray, "u v channel channel"], height: int, width: int
) -> Float[np.ndarray, "height width channel channel"]:
    """Carries a power spectrum over to another size, by frequency in cycles a pixel.

    With an orthonormal transform the spectrum of a stationary process does not depend on the size
    of the window. Interpolated linearly in the frequency along each axis; above the highest
    frequency there is, its value.
    """
    for axis, size in ((0, height), (1, width)):
        old = covariance.shape[axis]
        at = np.minimum(np.arange(size) * old / size, old - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, old - 1)
        share = (at - low).reshape(-1, *[1] * (3 - axis))
        below, above = (np.take(covariance, i, axis=axis) for i in (low, high))
        covariance = (1 - share) * below + share * above
    return covariance


def of_spectrum(
    mean: Float[np.ndarray, "height width channel"],
    covariance: Float[np.ndarray, "height width channel channel"],
) -> ImagePrior:
    """Makes a prior of a mean and the colors' covariance at every frequency."""
    variances, colors = np.linalg.eigh(covariance)
    return _checked(ImagePrior(mean, np.maximum(variances, 0) + RIDGE, colors, None))


def of_covariance(pixels: Float[np.ndarray, "image height width channel"]) -> ImagePrior:
    """Makes a prior of the mean and the full covariance of images.

    Of few images the covariance says nothing in most directions: it is mixed with the spectrum's,
    which counts for `SHRINKAGE` images (an empirical-Bayes estimate; Ledoit & Wolf 2004).
    """
    shape = pixels.shape[1:]
    flat = pixels.reshape(len(pixels), -1)
    spectrum = of_spectrum(np.zeros(shape), estimate_spectrum(pixels))
    unit = np.eye(flat.shape[1]).reshape(-1, *shape)
    waves = np.asarray(coefficients(spectrum, unit)).reshape(len(unit), -1)
    stationary = (waves * spectrum.variances.ravel()) @ waves.T
    share = SHRINKAGE / (SHRINKAGE + len(flat))
    variances, basis = np.linalg.eigh((1 - share) * np.cov(flat.T) + share * stationary)
    mean = flat.mean(axis=0).reshape(shape)
    return _checked(ImagePrior(mean, variances.reshape(shape) + RIDGE, None, basis))


def _checked(prior: ImagePrior) -> ImagePrior:
    """Refuses what would divide by nothing."""
    if not (np.isfinite(prior.variances).all() and (prior.variances > 0).all()):
        raise UserError("--image-prior: the images have no finite positive variances")
    return prior


class ImageFacts(NamedTuple):
    """What a prior is asked for: the images that are attacked, and how they are normalized."""

    dataset: str
    data_dir: str | None
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _training_images(facts: ImageFacts) -> tuple[np.ndarray, Source]:
    """The training split, normalized."""
    split = data.load(facts.dataset, split="train", data_dir=facts.data_dir)
    images = split.images[:MOST_IMAGES]
    if images.shape[1:] != facts.shape:
        raise UserError(
            f"--image-prior: the training images of {facts.dataset} are {images.shape[1:]}, "
            f"the targets {facts.shape}; use photographs"
        )
    return _normalized(images, facts), Source(f"{facts.dataset}/train", len(images))


def _normalized(images: UInt8[np.ndarray, "..."], facts: ImageFacts) -> np.ndarray:
    """Pixels as the network sees them, float32: float64 would be over a GiB."""
    mean, std = (np.asarray(x, np.float32) for x in (facts.mean, facts.std))
    return (images / np.float32(255) - mean) / std


def _spectrum(facts: ImageFacts) -> tuple[ImagePrior, Source]:
    pixels, source = _training_images(facts)
    mean = pixels.mean(axis=0, dtype=np.float64)
    return of_spectrum(mean, estimate_spectrum(pixels).astype(np.float64)), source


def _covariance(facts: ImageFacts) -> tuple[ImagePrior, Source]:
    if (numbers := int(np.prod(facts.shape))) > MOST_NUMBERS:
        raise UserError(
            f"--image-prior covariance: {numbers} numbers an image make a matrix of their square; "
            "use spectrum"
        )
    pixels, source = _training_images(facts)
    return of_covariance(pixels), source


def _photographs(facts: ImageFacts) -> tuple[ImagePrior, Source]:
    """The spectrum of the shipped photographs; their mean color is no other set's, theirs is."""
    tiles = data.load("tiles", split="train")
    pixels = tiles.images / np.float32(255)
    channels = facts.shape[-1]
    if channels == 1:
        pixels = pixels.mean(axis=-1, keepdims=True)
    elif channels != 3:
        raise UserError(f"--image-prior photographs: of 1 or 3 channels, not {channels}")
    std = np.asarray(facts.std, np.float64)
    spectrum = estimate_spectrum(pixels).astype(np.float64) / np.outer(std, std)
    mean = (pixels.mean(axis=(0, 1, 2), dtype=np.float64) - facts.mean) / std
    spectrum = resample_spectrum(spectrum, *facts.shape[:2])
    return of_spectrum(np.broadcast_to(mean, facts.shape), spectrum), Source(
        "shipped photographs", len(pixels)
    )


# What an attacker may know of images. Each makes a prior, in float64, of `ImageFacts`.
IMAGE_PRIORS: dict[str, Callable[[ImageFacts], tuple[ImagePrior, Source]]] = {
    "spectrum": _spectrum,  # mean image and power spectrum of the data set's training split
    "covariance": _covariance,  # its full covariance
    "photographs": _photographs,  # the spectrum of the shipped photographs, for images of any kind
}


def load_prior(name: str, facts: ImageFacts) -> tuple[ImagePrior, Source]:
    """Makes a prior, or reads it where it was made before.

    It is kept in the user's cache folder, under a name of all that it depends on.

    Args:
      name: of `IMAGE_PRIORS`.
      facts: on the images that are attacked.

    Raises:
      UserError: the data are not there, or the prior cannot be made of them.
    """
    words = repr((name, facts._replace(data_dir=None), MOST_IMAGES, RIDGE, SHRINKAGE))
    digest = hashlib.sha256(words.encode()).hexdigest()[:16]
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "jaxinv" / "priors" / f"{name}-{digest}.npz"
    try:
        arrays = read_npz(path)
        fields = {name: arrays.get(name) for name in ImagePrior._fields}
        source = Source(str(arrays["source"]), int(arrays["images"]))
        return _checked(ImagePrior(**fields)), source
    except (OSError, ValueError, KeyError):
        pass  # not there, or torn
    prior, source = IMAGE_PRIORS[name](facts)
    arrays = {k: v for k, v in prior._asdict().items() if v is not None}
    arrays |= {"source": source.name, "images": source.images}
    with contextlib.suppress(UserError):  # a cache that cannot be written is made anew next time
        write_file(path, lambda file: np.savez(file, **arrays))
    return prior, source
