"""A malicious server: parameters made so that updates give images away, and how a client sees it.

An honest server sends the network as it was trained. One that sends other parameters can have each
image in numbers of its own (`imprint`), or have one image's gradient alone, whatever the size of
the batch (`fish_class`; `fish_feature` where all images are of one class). All are closed forms:
what they recover is exact. The client's side are the detectors: one image that dominates a layer's
gradient, and units that measure the same thing.

References: Fowl et al. 2022 (Robbing the Fed), arXiv 2110.13057 (imprint); Wen et al. 2022 (Fishing
  for user data), arXiv 2202.00580; Garov et al. 2024 (SEER; the D-SNR), arXiv 2306.03013.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int
from scipy import stats

from jaxinv import client, defenses
from jaxinv.attacks.imprint import read
from jaxinv.audit import measuring
from jaxinv.audit.games import Network
from jaxinv.audit.intervals import Share, mean_share
from jaxinv.engine.targets import noise_keys
from jaxinv.networks.imprint import LAYER, expected_alone, imprinted
from jaxinv.networks.inspect import Classifier, find_classifier
from jaxinv.types import PyTree, path_name

EXACT = 40.0  # dB
OTHERS_BIAS = 1000.0  # of the classes that are not fished for: their softmax is 1 together
TARGET_WEIGHT = 0.5
FEATURE_WEIGHT = 1e5  # so much that next to no image lies on the edge (300 in the paper)
DOMINANT = 1.0  # D-SNR from which on one image outweighs all others together
PARALLEL = 0.999  # cosine from which on two units measure the same


class Imprinted(NamedTuple):
    """What came of games against a server that imprints."""

    exact: Share  # of an update's images that are read off it, above `EXACT` dB
    expected: float  # of them, where bins hold the same share of images and no defense is there
    bins: int
    amplify: float  # of the last layer
    own: int  # of the first game's images


def play(
    network: Network,
    candidates: measuring.Candidates,
    members: Int[np.ndarray, "game image"],
    defense: str,
    bins: int,
    amplify: float = 1.0,
) -> Imprinted:
    """Lets clients share updates of a network behind an imprint, and reads them.

    Args:
      network: of the honest server.
      candidates: normalized; the server knows how bright they are.
      members: of each game.
      defense: the client's.
      bins: of the imprint.
      amplify: factor on the network's last layer.
    """
    images, labels = np.asarray(candidates.images), np.asarray(candidates.labels)
    known = images.reshape(len(images), -1).mean(axis=1)
    module, variables = imprinted(
        network.module, network.variables, images.shape[1:], bins, known, amplify
    )
    params, loss = variables["params"], client.loss_fn(module, variables)
    chain = defenses.parse(defense)
    keys = noise_keys(range(len(members)), [0] * len(members))

    @jax.jit
    def read_off(own, classes, key):
        update, _ = client.gradient(loss, params, own, classes)
        strengths = defenses.strengths(chain)
        return read(defenses.defend(defenses.names(chain), update, strengths, key, None)[LAYER])

    std = np.asarray(network.normalization.std)
    shares = []
    for own, key in zip(members, keys):
        found = np.asarray(read_off(images[own], labels[own], key).images)
        found = found.reshape(-1, *images.shape[1:])
        gaps = np.square(std * (found[:, None] - images[own])).mean(axis=(2, 3, 4)).min(axis=0)
        shares.append((gaps < 10 ** (-EXACT / 10)).mean())
    count = members.shape[1]
    expected = expected_alone(count, bins) / count
    exact, own = mean_share(np.array(shares[1:])), round(shares[0] * count)
    return Imprinted(exact, expected, bins, amplify, own)


class Fished(NamedTuple):
    """What comes of fishing for one class after another."""

    alone: Share  # of an update's images, those whose class no other image of it has
    cosine: float  # least, of what is fetched for one game's images with their own gradients


def fish(
    network: Network, candidates: measuring.Candidates, members: Int[np.ndarray, "game image"]
) -> Fished | None:
    """Fishes for every class of which an update holds one image, without a defense.

    Args:
      network: as it was trained.
      candidates: normalized.
      members: of each game.

    Returns:
      What comes of it; None where the network has no `fished_layer`.
    """
    images, labels = np.asarray(candidates.images), np.asarray(candidates.labels)
    place = fished_layer(network, images.shape[1:])
    if place is None:
        return None
    flat = flax.traverse_util.flatten_dict(network.params)

    @jax.jit
    def in_front(own, classes, target):
        """The gradient of all layers in front of the classifier, which fishes for a class."""
        own_layer = place.kernel, place.bias
        fished = fish_class(*(flat[path] for path in own_layer), target)
        layers = flat | dict(zip(own_layer, fished))
        update, _ = client.gradient(
            network.loss, flax.traverse_util.unflatten_dict(layers), own, classes
        )
        rest = flax.traverse_util.flatten_dict(update)
        return jnp.concatenate([x.ravel() for k, x in rest.items() if k not in own_layer])

    counts = (labels[members][:, :, None] == labels[members][:, None]).sum(axis=2)
    first, cosines = int((counts == 1).any(axis=1).argmax()), []
    for image in members[first][counts[first] == 1]:
        fetched = in_front(images[members[first]], labels[members[first]], labels[image])
        own = in_front(images[[image]], labels[[image]], labels[image])
        product = jnp.vdot(fetched, own) / jnp.linalg.norm(fetched) / jnp.linalg.norm(own)
        cosines.append(float(product))
    # The first game is the client's own batch, which nobody drew.
    return Fished(mean_share((counts[1:] == 1).mean(axis=1)), min(cosines, default=math.nan))


def fished_layer(network: Network, image_shape: Sequence[int]) -> Classifier | None:
    """The layer that a server changes to fish: a dense one with a bias that makes the logits.

    Args:
      network: as it was trained.
      image_shape: height, width, channel.

    Returns:
      Where it is; None where nothing of the kind makes them.
    """
    place = find_classifier(network.module, network.variables, image_shape)
    dense = place is not None and place.bias is not None and not place.by_row
    return place if dense else None


def fish_class(kernel: Array, bias: Array, target: int | Array) -> tuple[Array, Array]:
    """The last layer under which images of one class alone have a gradient in front of it.

    All others' softmax is that of classes with weight zero: no derivative goes through them.

    Args:
      kernel: of the last dense layer, [feature, class].
      bias: likewise, [class].
      target: the class fished for.
    """
    fished = jnp.zeros_like(kernel).at[:, target].set(TARGET_WEIGHT)
    return fished, jnp.full_like(bias, OTHERS_BIAS).at[target].set(0.0)


def fish_feature(
    kernel: Array, bias: Array, target: int | Array, feature: int, threshold: ArrayLike
) -> tuple[Array, Array]:
    """The last layer under which a class's images have a gradient where a feature is high.

    Below the threshold they are classified for sure, and no derivative comes back. For a batch of
    one class: an image of another has it the other way round. Of B images one is alone above the
    feature's 1 - 1/B quantile with a chance of (1 - 1/B)^(B - 1). (The paper has it below; behind a
    ReLU many images share the lowest value.)

    Args:
      kernel: of the last dense layer, [feature, class].
      bias: likewise, [class].
      target: the class of the batch.
      feature: by which its images are told apart.
      threshold: of that.
    """
    fished = jnp.zeros_like(kernel).at[feature, target].set(-FEATURE_WEIGHT)
    return fished, jnp.zeros_like(bias).at[target].set(FEATURE_WEIGHT * threshold)


def most_normal(features: Float[np.ndarray, "image feature"]) -> int:
    """The feature whose distribution is nearest to a normal one: few images share its values.

    By the statistic of Kolmogorov and Smirnov; a feature that is constant does not count.
    """
    spread = features.std(axis=0)
    unit = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1)
    distances = [stats.kstest(column, "norm").statistic for column in unit.T]
    return int(np.where(spread > 0, distances, np.inf).argmin())


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
    rows, parts = _by_leaf(loss, params, images, labels)
    return Inspection(
        _d_snrs(parts),
        uniqueness(rows.astype(np.float64) @ rows.T.astype(np.float64)),
        max(
            (parallel_units(np.asarray(x)) for x in jax.tree.leaves(params) if x.ndim == 2),
            default=0.0,
        ),
    )


def d_snrs(
    loss: client.LossFn,
    params: PyTree,
    images: Float[Array, "image height width channel"],
    labels: Int[Array, " image"],
) -> dict[str, float]:
    """The D-SNR of each leaf's gradient, as `inspect` has it."""
    return _d_snrs(_by_leaf(loss, params, images, labels)[1])


def _by_leaf(loss, params, images, labels):
    """The images' gradients, a row each, and the same for each leaf."""
    own = measuring.Candidates(np.asarray(images), np.asarray(labels))
    rows = measuring.gradients(loss, params, own)
    ends = np.cumsum([math.prod(x.shape) for x in jax.tree.leaves(params)])
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return rows, dict(zip(names, np.split(rows, ends[:-1], axis=1)))


def _d_snrs(parts: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: d_snr(np.linalg.norm(part, axis=1)) for name, part in parts.items()}


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
