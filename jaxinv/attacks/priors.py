"""Priors: penalties beside the distance of the updates, each with a weight of its own.

Each maps what the attacker sees of its candidate (`View`) to a scalar. A prior whose weight is 0 is
not computed.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinv.attacks.analytic import features
from jaxinv.learned import nets, params_of
from jaxinv.types import Normalization, PyTree, Target

USUAL_ERROR = 1e-3  # mean square, of an image that an autoencoder was trained on
FIRST_LEVEL, LAST_LEVEL = 0.3, 0.02  # of the noise that a denoiser is given, in units of pixels
SEEDS = "seeds"  # the axis along which the seeds of one target stand beside one another


class View(NamedTuple):
    """What a prior may look at: the candidate, what it would cause, and the target."""

    images: Float[Array, "*epoch image height width channel"]  # normalized
    update: PyTree  # the candidate's; () where no prior asks for it
    statistics: PyTree  # of the candidate's BatchNorm layers
    target: Target
    params: PyTree  # of the network
    classifier: tuple[str, ...]  # path of the last dense layer's parameters
    normalization: Normalization
    learned: Mapping[str, PyTree]  # what the attacker has trained for itself, by kind
    index: Int[Array, ""]  # of the attack's step
    progress: Float[Array, ""]  # in [0, 1)

    def pixels(self) -> Float[Array, "image height width channel"]:
        """The candidate's, not clamped; those of several epochs in one row."""
        raw = self.images * self.normalization.std + self.normalization.mean
        return raw.reshape(-1, *raw.shape[-3:])


def total_variation(images: Float[Array, "*batch height width channel"]) -> Float[Array, ""]:
    """Computes mean|x[i+1, j] - x[i, j]| + mean|x[i, j+1] - x[i, j]|, without padding.

    Anisotropic, means and not sums, on the normalized images. A weight published with another
    formula does not carry over.

    References: Geiping et al. 2020, arXiv 2003.14053, eq. 4 and its public code.
    """
    down = jnp.abs(images[..., 1:, :, :] - images[..., :-1, :, :]).mean()
    right = jnp.abs(images[..., 1:, :] - images[..., :-1, :]).mean()
    return down + right


def isotropic_variation(images: Float[Array, "*batch height width channel"]) -> Float[Array, ""]:
    """Computes mean sqrt(down^2 + right^2) over all pixels but the last row and column.

    References: Rudin, Osher & Fatemi 1992.
    """
    down = images[..., 1:, :-1, :] - images[..., :-1, :-1, :]
    right = images[..., :-1, 1:, :] - images[..., :-1, :-1, :]
    # A derivative where the image is flat.
    return jnp.sqrt(jnp.square(down) + jnp.square(right) + 1e-12).mean()


def color_variation(images: Float[Array, "*batch height width channel"]) -> Float[Array, ""]:
    """Isotropic variation of the channels and of their pairwise differences ("double opponents").

    References: Aastrom & Schnoerr 2016, arXiv 1602.03013; the public code of breaching.
    """
    one = jnp.split(images, images.shape[-1], axis=-1)
    opponents = [one[i] - one[j] for i in range(len(one)) for j in range(i + 1, len(one))]
    return isotropic_variation(jnp.concatenate([images, *opponents], axis=-1))


def statistics_distance(statistics: PyTree, shared: PyTree) -> Float[Array, ""]:
    """Computes how far a candidate's BatchNorm statistics are from given ones.

    Mean over layers of the mean squared distance of the means plus that of the variances.

    References: Yin et al. 2021 (See through Gradients), arXiv 2104.07586, eq. 10, there as sums of
      norms, whose derivative does not exist at a perfect match.
    """
    distances = jax.tree.map(lambda own, sent: jnp.square(own - sent).mean(), statistics, shared)
    leaves = jax.tree.leaves(distances)
    return 2 * sum(leaves) / len(leaves)


def mean_over_seeds(tree: PyTree, counts: Bool[Array, ""]) -> PyTree:
    """The mean over a target's seeds, of those that count: one that has failed is in no other."""
    count = jnp.maximum(1, lax.psum(counts.astype(jnp.int32), SEEDS))
    return jax.tree.map(lambda x: lax.psum(jnp.where(counts, x, 0), SEEDS) / count, tree)


def group_distance(images: Float[Array, "*batch height width channel"]) -> Float[Array, ""]:
    """Computes the mean squared distance to the mean of the target's other seeds and itself.

    Each seed is drawn to that mean, which stands still meanwhile: the trials of a target are no
    longer independent of one another.

    References: Yin et al. 2021, arXiv 2104.07586, eq. 11, there after registration of the images.
    """
    mean = mean_over_seeds(images, jnp.isfinite(images).all())
    return jnp.square(images - lax.stop_gradient(mean)).mean()


def feature_distance(view: View) -> Float[Array, ""]:
    """Computes 1 - cosine between the inputs of the last dense layer: candidate's and target's.

    Both are read off the weight and bias gradient of that layer; exact for one image.
    """
    trees = view.update, view.target.update
    label = view.target.labels[0]
    own, sent = (features(view.params, tree, view.classifier, label) for tree in trees)
    return 1.0 - jnp.vdot(own, sent) / (jnp.linalg.norm(own) * jnp.linalg.norm(sent))


def order_distance(images: Float[Array, "epoch image height width channel"]) -> Float[Array, ""]:
    """Computes how far the epochs' images are from one another as sets, whatever their order.

    The mean squared distance of each epoch's mean image to that of all epochs.

    References: Dimitrov et al. 2022, arXiv 2206.12395, section 5.2 (there with several functions
      that do not see the order; this one is the mean).
    """
    means = images.mean(axis=1)
    return jnp.square(means - means.mean(axis=0)).mean()


def anomaly(view: View) -> Float[Array, ""]:
    """Computes how far from usual the error is that an autoencoder makes of each image.

    References: Sun et al. 2024 (GI-PIP), arXiv 2401.11748, and its public code.
    """
    pixels = view.pixels()
    back = nets.encode(params_of(view.learned, "autoencoder"), pixels)
    return jnp.abs(jnp.square(pixels - back).mean(axis=(1, 2, 3)) - USUAL_ERROR).mean()


def noise_level(progress: Float[Array, ""]) -> Float[Array, ""]:
    """The level of noise that is added before the denoiser, in units of pixels."""
    return FIRST_LEVEL * (LAST_LEVEL / FIRST_LEVEL) ** progress


def denoising_distance(view: View) -> Float[Array, ""]:
    """Computes the mean square of what a denoiser takes off the pixels, with noise added.

    The noise is of a level that falls geometrically; it is drawn at each step anew, the same in all
    trials. The denoised image stands still meanwhile: the gradient is along what was taken off.

    References: Romano, Elad, Milanfar 2017 (RED), arXiv 1611.02862.
    """
    pixels, level = view.pixels(), noise_level(view.progress)
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), view.index), pixels.shape)
    noisy = pixels + level * noise.astype(pixels.dtype)
    denoised = nets.denoise(params_of(view.learned, "denoiser"), noisy, level)
    return jnp.square(pixels - lax.stop_gradient(denoised)).mean()


class Prior(NamedTuple):
    """An entry of `PRIORS`: the penalty, and what it needs beside the candidate's images."""

    penalty: Callable[[View], Float[Array, ""]]
    update: bool = False  # the candidate's update, so that every weight gradient is kept
    statistics: bool = False  # those of BatchNorm, of the candidate and of the target
    seeds: bool = False  # the target's other seeds, so that they are computed together
    epochs: bool = False  # images of their own for each of the client's epochs
    learned: str | None = None  # a trained network: of `learned.KINDS`


PRIORS: dict[str, Prior] = {
    "tv": Prior(lambda view: total_variation(view.images)),
    "tv_isotropic": Prior(lambda view: isotropic_variation(view.images)),
    "tv_color": Prior(lambda view: color_variation(view.images)),
    "prior_l2": Prior(lambda view: jnp.square(view.images).mean()),
    "prior_batch_norm": Prior(
        lambda view: statistics_distance(view.statistics, view.target.statistics), statistics=True
    ),
    "prior_group": Prior(lambda view: group_distance(view.images), seeds=True),
    "prior_features": Prior(feature_distance, update=True),
    "prior_epoch_order": Prior(lambda view: order_distance(view.images), epochs=True),
    "prior_autoencoder": Prior(anomaly, learned="autoencoder"),
    "prior_denoiser": Prior(denoising_distance, learned="denoiser"),
}


def entry_of(prior: str | Prior | Callable) -> Prior:
    """The prior of a name; a function of a `View` is one that may look at everything in it."""
    if isinstance(prior, str):
        return PRIORS[prior]
    return prior if isinstance(prior, Prior) else Prior(prior, update=True)


def needing(need: str, priors: Iterable[str | Prior | Callable] = PRIORS) -> tuple:
    """The priors, of those given, that need something: the name of a field of `Prior`."""
    return tuple(prior for prior in priors if getattr(entry_of(prior), need))


def weighted_sum(weights: dict[str | Prior | Callable, Any], view: View) -> Float[Array, ""]:
    """Adds the priors up, each times its weight."""
    parts = (w * entry_of(prior).penalty(view) for prior, w in weights.items())
    return sum(parts, jnp.zeros(()))


def key_of(prior: str | Prior | Callable) -> str:
    """A name for a prior that has none in the table, by which weights can be sorted."""
    return prior if isinstance(prior, str) else f"own:{id(entry_of(prior).penalty)}"
