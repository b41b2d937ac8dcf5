"""How much of an image a reconstruction gives away: measures beside PSNR, which smooth patches win.

* Whose it is: among the candidates, is the true image the nearest? By pixels, and by the features
  of a judge, a trained network that had no part in the update (image identification precision).
* What it shows: does the judge see the same class in it?
* Relative data leakage: what SSIM gains over the attacker's guess without an update, relative to
  what the guess has: (S(x, truth) - S(guess, truth)) / S(guess, truth).
* Absolute variation distance: how far the magnitudes of the differences between neighboring pixels
  are from the truth's, and those of second differences; 0 for the image itself.

References: Yin et al. 2021, arXiv 2104.07586 (IIP); Hatamizadeh et al. 2023, arXiv 2202.06924
  (RDLV); Papadopoulos et al. 2024, doi 10.1007/978-3-031-56066-8_20 (AVD; without the rounding to
  8 bits of its published code).
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinv import metrics
from jaxinv.networks.inspect import classifier_input
from jaxinv.types import Normalization, PyTree

AT_ONCE = 256  # images that go through the judge together
SECOND = 0.5  # weight of the second differences

Images = Float[np.ndarray, "image height width channel"]


class Judge(NamedTuple):
    """A trained network that had no part in the update."""

    name: str
    module: nn.Module
    variables: PyTree
    normalization: Normalization

    def look(self, pixels: Images) -> tuple[np.ndarray, np.ndarray]:
        """The features of images, and the classes that it sees."""
        found = []
        for start in range(0, len(pixels), AT_ONCE):
            images = self.normalization.normalize(pixels[start : start + AT_ONCE])
            found.append(_looked(self.module, self.variables, images))
        features, logits = (np.concatenate(x) for x in zip(*found))
        return features, logits.argmax(axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _looked(module, variables, images):
    features = classifier_input(module, variables, images)
    return features.reshape(len(images), -1), module.apply(variables, images)


class Likeness(NamedTuple):
    """Means over the images of one reconstruction."""

    psnr: float  # dB
    by_pixels: float  # share whose nearest candidate is the true image
    by_features: float  # the same, by the judge's features; NaN without a judge
    same_class: float  # share in which the judge sees what it sees in the true image; likewise
    rdlv: float
    avd: float


def likeness(
    pixels: Images, truth: Images, others: Images, guess: Array, judge: Judge | None = None
) -> Likeness:
    """Measures a reconstruction.

    Args:
      pixels: the reconstruction, in [0, 1], each image where the one stands that it is taken for.
      truth: the images.
      others: candidates beside them.
      guess: what the attacker would say without an update, an image or a color.
      judge: a network that had no part in it.
    """
    by_features = same = math.nan
    candidates = np.concatenate([truth, others])
    if judge is not None:
        (seen, classes), (known, expected) = judge.look(pixels), judge.look(candidates)
        by_features = _nearest_is_own(seen, known)
        same = float((classes == expected[: len(truth)]).mean())
    own, images = jnp.asarray(pixels), jnp.asarray(truth)
    before = metrics.ssim(jnp.broadcast_to(guess, truth.shape), images)
    gained = (metrics.ssim(own, images) - before) / before
    return Likeness(
        float(metrics.psnr(own, images).mean()),
        _nearest_is_own(pixels, candidates),
        by_features,
        same,
        float(gained.mean()),
        float(variation_distance(pixels, truth).mean()),
    )


def _nearest_is_own(found: np.ndarray, candidates: np.ndarray) -> float:
    """The share of rows whose nearest candidate stands at the same position."""
    found, candidates = (
        np.reshape(x, (len(x), -1)).astype(np.float64) for x in (found, candidates)
    )
    squares = np.square(candidates).sum(axis=1) - 2 * found @ candidates.T
    return float((squares.argmin(axis=1) == np.arange(len(found))).mean())


def variation_distance(pixels: Images, truth: Images) -> Float[np.ndarray, " image"]:
    """The absolute variation distance of each image."""
    first, second = zip(_variations(pixels), _variations(truth))
    errors = [np.square(a - b).mean(axis=(1, 2, 3)) for a, b in (first, second)]
    return np.sqrt(errors[0] + SECOND * errors[1])


def _variations(images: Images) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes of the sums of vertical and horizontal differences, first and second."""
    images = np.asarray(images, np.float64)
    found = []
    for order in (1, 2):
        across, down = np.diff(images, order, axis=2), np.diff(images, order, axis=1)
        found.append(np.abs(across[:, order:] + down[:, :, order:]))
    return found[0], found[1]
