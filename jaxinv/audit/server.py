"""A malicious server: parameters made so that updates give images away, and how a client sees it.

An honest server sends the network as it was trained. One that sends other parameters can have each
image in numbers of its own (`imprint`), or have one image's gradient alone (`fish_class`), whatever
the size of the batch. Both are closed forms: what they recover is exact. The client's side are the
detectors: one image that dominates a layer's gradient, and units that measure the same thing.

References: Fowl et al. 2022 (Robbing the Fed), arXiv 2110.13057 (imprint); Wen et al. 2022 (Fishing
  for user data), arXiv 2202.00580; Garov et al. 2024 (SEER; the D-SNR), arXiv 2306.03013.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy import special

from jaxinv import client, defenses
from jaxinv.audit import identification as ident
from jaxinv.audit.intervals import Share, mean_share
from jaxinv.engine.targets import noise_keys
from jaxinv.types import PyTree

EXACT = 40.0  # dB
GAIN = 1e-3  # of what the imprint adds to the images that go on to the network
OTHERS_BIAS = 1000.0  # of the classes that are not fished for: their softmax is 1 together
TARGET_WEIGHT = 0.5
DOMINANT = 1.0  # D-SNR from which on one image outweighs all others together
PARALLEL = 0.999  # cosine from which on two units measure the same


class Imprint(NamedTuple):
    """The layer that a malicious server puts in front of a network: relu(x W + b)."""

    kernel: Float[Array, "pixel bin"]  # each column the mean over the pixels
    bias: Float[Array, " bin"]  # minus the lower edge of each bin


class Read(NamedTuple):
    """What is read off an imprinted layer's gradient."""

    images: Float[np.ndarray, "bin pixel"]  # the mean image of the bin, weighted; exact if alone
    weights: Float[np.ndarray, " bin"]  # 0 where the bin is empty


def imprint(pixels: int, bins: int, mean: float, std: float) -> Imprint:
    """Makes an imprint whose bins each hold the same share of images, on average.

    Args:
      pixels: numbers of an image.
      bins: k.
      mean, std: of the mean normalized pixel over images, taken for normal.
    """
    edges = mean + std * special.ndtri(np.arange(bins) / bins)
    edges[0] = mean - 10 * std  # whatever lies below
    kernel = np.full((pixels, bins), 1 / pixels, np.float32)
    return Imprint(jnp.asarray(kernel), jnp.asarray(-edges, jnp.float32))


def imprinted(loss: client.LossFn) -> client.LossFn:
    """The loss of a network behind an imprint: parameters (`Imprint`, the network's own).

    The sum over the units goes to every pixel, times `GAIN`: then the derivative is the same for
    all units that an image activates.
    """

    def of_both(params, images, labels):
        layer, own = params
        active = jax.nn.relu(images.reshape(len(images), -1) @ layer.kernel + layer.bias)
        added = GAIN * active.sum(axis=1)
        return loss(own, images + added[:, None, None, None], labels)

    return of_both


def read(update: Imprint) -> Read:
    """Reads the images off an imprinted layer's gradient.

    Unit i is active for all images above its edge; the difference to the next unit is of the images
    between the two edges, sum of d_j x_j and sum of d_j, whose ratio is the image if there is one.
    """
    kernel, bias = (np.asarray(x, np.float64) for x in update)
    own = kernel - np.pad(kernel[:, 1:], ((0, 0), (0, 1)))
    weights = bias - np.pad(bias[1:], (0, 1))
    # What two sums of the same images leave of one another is rounding.
    there = np.abs(weights) > 1e-5 * np.abs(bias).max()
    ratio = own / np.where(there, weights, 1)
    return Read(np.where(there, ratio, 0).T, np.where(there, weights, 0))


def expected_alone(images: int, bins: int) -> float:
    """How many of the images are alone in their bin, on average: B (1 - 1/k)^(B - 1)."""
    return images * (1 - 1 / bins) ** (images - 1)


class Imprinted(NamedTuple):
    """What came of games against a server that imprints."""

    exact: Share  # of an update's images that are read off it, above `EXACT` dB
    expected: float  # of them, where bins hold the same share of images and no defense is there
    bins: int
    own: int  # of the first game's images


def play(
    network: Any,
    candidates: ident.Candidates,
    members: Int[np.ndarray, "game image"],
    defense: str,
    bins: int,
) -> Imprinted:
    """Lets clients share updates of a network behind an imprint, and reads them.

    Args:
      network: `games.Network`, of the honest server.
      candidates: normalized; the server knows the mean pixels of those that are in no game.
      members: of each game.
      defense: the client's.
      bins: of the imprint.
    """
    images, labels = np.asarray(candidates.images), np.asarray(candidates.labels)
    known = images.reshape(len(images), -1).mean(axis=1)
    layer = imprint(images[0].size, bins, float(known.mean()), float(known.std()))
    params, loss = (layer, network.params), imprinted(network.loss)
    chain = defenses.parse(defense)
    keys = noise_keys(range(len(members)), [0] * len(members))

    @jax.jit
    def sent(own, classes, key):
        update, _ = client.gradient(loss, params, own, classes)
        strengths = defenses.strengths(chain)
        return defenses.defend(defenses.names(chain), update, strengths, key, None)[0]

    std = np.asarray(network.normalization.std)
    shares = []
    for own, key in zip(members, keys):
        found = read(sent(images[own], labels[own], key)).images.reshape(-1, *images.shape[1:])
        gaps = np.square(std * (found[:, None] - images[own])).mean(axis=(2, 3, 4)).min(axis=0)
        shares.append((gaps < 10 ** (-EXACT / 10)).mean())
    count = members.shape[1]
    expected = expected_alone(count, bins) / count
    return Imprinted(mean_share(np.array(shares[1:])), expected, bins, round(shares[0] * count))


def fish_class(kernel: Array, bias: Array, target: int) -> tuple[Array, Array]:
    """The last layer under which images of one class alone have a gradient in front of it.

    All others' softmax is that of classes with weight zero: no derivative goes through them.

    Args:
      kernel: of the last dense layer, [feature, class].
      bias: likewise, [class].
      target: the class fished for.
    """
    fished = jnp.zeros_like(kernel).at[:, target].set(TARGET_WEIGHT)
    return fished, jnp.full_like(bias, OTHERS_BIAS).at[target].set(0.0)


class Inspection(NamedTuple):
    """What a client sees in its own gradients, before it sends their mean."""

    d_snr: dict[str, float]  # of each leaf: the largest image's share against all others'
    uniqueness: Float[np.ndarray, " image"]  # of each image's gradient, in [0, 1]
    parallel: float  # the largest share of a dense layer's units that measure what another does

    @property
    def dominated(self) -> list[str]:
        """Leaves in which one image outweighs all others together."""
        return [name for name, ratio in self.d_snr.items() if ratio > DOMINANT]


def inspect(
    loss: client.LossFn,
    params: PyTree,
    images: Float[Array, "image height width channel"],
    labels: Int[Array, " image"],
) -> Inspection:
    """Looks at the gradients of a client's images one by one.

    Args:
      loss, params: as the server sent them.
      images: normalized.
      labels: theirs.
    """
    rows = ident.gradients(loss, params, ident.Candidates(np.asarray(images), np.asarray(labels)))
    ends = np.cumsum([math.prod(x.shape) for x in jax.tree.leaves(params)])
    paths = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    parts = np.split(rows, ends[:-1], axis=1)
    return Inspection(
        {name: d_snr(np.linalg.norm(part, axis=1)) for name, part in zip(names, parts)},
        uniqueness(rows.astype(np.float64) @ rows.T.astype(np.float64)),
        max(
            (parallel_units(np.asarray(x)) for x in jax.tree.leaves(params) if x.ndim == 2),
            default=0.0,
        ),
    )


def d_snr(norms: Float[np.ndarray, " image"]) -> float:
    """The largest norm over the sum of the others; inf of one image alone, NaN of none."""
    largest, total = float(norms.max()), float(norms.sum())
    if largest == 0:
        return math.nan
    rest = total - largest
    return largest / rest if rest > 1e-12 * largest else math.inf


def uniqueness(gram: Float[np.ndarray, "image image"]) -> Float[np.ndarray, " image"]:
    """The share of each image's gradient that no combination of the others' makes.

    The distance to their span over the norm, 1 / sqrt((K^-1)_ii K_ii): 1 for orthogonal gradients,
    0 for one that the others hide. 0 for an image without a gradient.
    """
    diagonal = np.diagonal(gram)
    norms = np.sqrt(np.maximum(diagonal, 1e-30 * max(diagonal.max(), 1e-300)))
    unit = gram / norms[:, None] / norms
    inverse = np.linalg.pinv(unit, rcond=1e-10, hermitian=True)
    hidden = np.clip(1 / np.maximum(np.diagonal(inverse), 1), 0, 1)
    # In the null space of K a gradient is a combination of others.
    inside = np.clip(np.diagonal(inverse @ unit), 0, 1) > 1 - 1e-6
    return np.where(inside & (diagonal > 0), np.sqrt(hidden), 0)


def parallel_units(kernel: Float[np.ndarray, "input unit"]) -> float:
    """The share of a dense layer's units whose weights are parallel to another unit's."""
    norms = np.linalg.norm(kernel, axis=0)
    if kernel.shape[1] < 2 or not (norms > 0).any():
        return 0.0
    unit = kernel / np.where(norms > 0, norms, 1)
    cosines = np.abs(unit.T @ unit)
    np.fill_diagonal(cosines, 0)
    return float((cosines.max(axis=0) > PARALLEL).mean())
