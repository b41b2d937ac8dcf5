"""Ceiling: the PSNR that no attacker exceeds on average who knows of images what a prior says.

With an update u = f(x) + e, noise e of variance v on its entries and a Gaussian image prior
N(mean, S), the posterior of x is, where f is close to linear, a Gaussian with the covariance

    (J^T J / v + S^-1)^-1,      J = d f / d x at the truth.

Its trace is the least mean squared error of any estimate of x. On a linear f this is exact; on a
network it is local: it holds for an attacker who has found the right image but for the noise, and
says what is left then. An attacker with a better prior than the Gaussian is not bound by it; a
rigorous bound (van Trees) would average J^T J over the prior.

References: Guo et al. 2022, "Bounding training data reconstruction in private (deep) learning",
  arXiv 2201.12383 (Cramer-Rao bounds from the Jacobian); Papandreou & Yuille 2010 (perturb and
  solve); Hutchinson 1989 (traces by probes).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxinv.attacks import gauss_newton as gn
from jaxinv.attacks.levenberg_marquardt import flat, normal_matrix
from jaxinv.audit.measuring import parts
from jaxinv.data.image_prior import ImagePrior, coefficients, synthesize
from jaxinv.types import PyTree

MOST_DENSE = 6144  # unknowns of which the whole matrix is made
COLUMNS = 16  # of it at once
ENTRIES = 2**13  # of an update whose products are summed at once
ROUNDING = 2.0**-24  # of float32: relative, at the most
PROBES = 16
CG_ITERATIONS = 400
SOLVED = 0.05  # relative residual

# Normalized images, and whatever else it depends on -> update.
UpdateFn = Callable[..., PyTree]


class Ceiling(NamedTuple):
    """A bound on the mean squared error in pixels, and the PSNR that it is."""

    mse: Float[np.ndarray, " image"]  # of each image; pixels in [0, 1]
    prior_mse: Float[np.ndarray, " image"]  # without any update
    spread: Float[np.ndarray, "image height width channel"]  # standard deviation of each pixel
    dense: bool  # whether the whole matrix was inverted; else by probes
    probe_error: float  # standard error of the mean of `mse`, relative; 0 where dense
    residual: float  # of the probes' systems, relative; 0 where dense

    @property
    def psnr(self) -> Float[np.ndarray, " image"]:
        """Of each image, in dB."""
        return -10 * np.log10(self.mse)

    @property
    def solved(self) -> bool:
        """Whether it says something: probes that were stopped early lie far above the truth."""
        return self.residual < SOLVED

    @property
    def prior_psnr(self) -> Float[np.ndarray, " image"]:
        """Of the prior's mean, in dB."""
        return -10 * np.log10(self.prior_mse)


def rounding_variances(update: PyTree) -> PyTree:
    """The variance of float32's rounding in each leaf of an update, a scalar a leaf.

    The floor under every noise: no update is sent with more digits. Errors are uniform, up to half
    a unit in the last place, relative to the leaf's root mean square.
    """

    def one(leaf):  # of a leaf of zeros not 0: nothing is known without end
        return jnp.maximum(jnp.mean(jnp.square(leaf)) * ROUNDING**2 / 3, jnp.finfo(leaf.dtype).tiny)

    return jax.tree.map(one, update)


def noise_variances(update: PyTree, known: PyTree | None = None) -> PyTree:
    """Rounding, and a known defense's noise (`DefenseKnowledge.variances`): a scalar a leaf."""
    rounding = rounding_variances(update)
    return rounding if known is None else jax.tree.map(jnp.add, rounding, known)


def ceiling(
    update_of: UpdateFn,
    images: Float[Array, "image height width channel"],
    prior: ImagePrior,
    variances: PyTree,
    std: Float[Array, " channel"],
    context: tuple = (),
    dense: bool | None = None,
) -> Ceiling:
    """Computes the ceiling at some images.

    In float64, under `runtime.arithmetic("float64")`, wherever the noise is small: between the best
    and the least determined directions lie more digits than float32 has.

    Args:
      update_of: the client's update (`client.update`) of normalized images, and of `context`. For
        each function a program is compiled.
      images: the truth.
      prior: of normalized images.
      variances: of the noise, a scalar a leaf of the update; inf: the leaf tells nothing.
      std: per channel, of pixels in [0, 1]: the network's normalization.
      context: further arguments of `update_of`, such as the network's parameters.
      dense: whether the whole matrix is inverted; None: where it has no more than `MOST_DENSE`
        rows. Else the trace is estimated by probes, each solved by conjugate gradients from zero,
        which stop below the truth if they stop early: the ceiling is then too high, never too low.
    """
    size = images.size
    dense = size <= MOST_DENSE if dense is None else dense
    precisions = _precisions(variances)
    find = _dense if dense else _probed
    variance, error, residual = find(update_of, images, prior, precisions, std, context)
    prior_variance = _prior_variance(prior, std)
    axes = (1, 2, 3)
    whole = jnp.broadcast_to(prior_variance, images.shape)
    return Ceiling(
        np.asarray(variance.mean(axis=axes)),
        np.asarray(whole.mean(axis=axes)),
        np.sqrt(np.maximum(np.asarray(variance), 0)),
        dense,
        float(error),
        float(residual),
    )


class Curve(NamedTuple):
    """The ceiling of one image against the variance of the noise, the same on all entries.

    In directions along which the update tells of one number each: a priori N(0, 1), of which the
    update says `seen` / variance times as much as the prior.
    """

    seen: Float[np.ndarray, " direction"]
    pixels: Float[np.ndarray, "direction pixel"]  # what one number of each direction is, in pixels
    own: Float[np.ndarray, " direction"]  # the truth's numbers

    def psnr(self, variance: float) -> float:
        """The ceiling in dB: the mean over images of the prior. Of infinite variance: its mean."""
        power = np.square(self.pixels).mean(axis=1)
        return -10 * math.log10((power * self._left(variance)).sum())

    def psnr_here(self, variance: float) -> float:
        """What the posterior's mean attains on average over the noise at this very image, in dB.

        Its bias is the image's own: an image that is smoother than the prior's are on average is
        reconstructed better than the ceiling says, one with more detail worse.
        """
        left = self._left(variance)
        bias = (left * self.own) @ self.pixels
        scatter = np.square(self.pixels).mean(axis=1) * left * (1 - left)
        return -10 * math.log10(np.square(bias).mean() + scatter.sum())

    @property
    def itself(self) -> float:
        """How much the update says along the truth (less the prior's mean), where the mean is 1.

        Next to nothing where a network divides each image's contrast away. The ceiling, a mean over
        images that have nothing to do with the directions, does not see that; `psnr_here` does.
        """
        return float(np.average(self.seen, weights=np.square(self.own)) / self.seen.mean())

    def _left(self, variance: float) -> Float[np.ndarray, " direction"]:
        return 1 / (np.maximum(self.seen, 0) / variance + 1)


def curve(
    update_of: UpdateFn,
    images: Float[Array, "1 height width channel"],
    prior: ImagePrior,
    std: Float[Array, " channel"],
    context: tuple = (),
    most: int | None = None,
) -> Curve:
    """Computes `ceiling` of one image for every variance at once, for one matrix of eigenvectors.

    The derivatives may be of float32, which err by 1e-6 of the largest; their products are float64.

    Args:
      update_of, images, prior, std, context: as in `ceiling`.
      most: coefficients of the prior, those of most variance, that are to be found; the attacker
        knows all others, which makes the ceiling higher and never lower. None: all.
    """
    variances = np.broadcast_to(prior.variances, images.shape).ravel()
    found = np.argsort(-variances, kind="stable")[:most]
    roots = np.sqrt(variances[found])
    directions = [
        np.asarray(_directions(prior, found[at], roots[at])) for at in parts(len(found), COLUMNS)
    ]
    rows = [np.asarray(_derivatives(update_of, images, some, context)) for some in directions]
    directions, rows = (np.concatenate(x)[: len(found)] for x in (directions, rows))
    total = np.zeros((len(found), len(found)))
    for start in range(0, rows.shape[1], ENTRIES):
        part = rows[:, start : start + ENTRIES].astype(np.float64)
        total += part @ part.T
    seen, vectors = np.linalg.eigh(total)
    own = np.asarray(coefficients(prior, images - prior.mean)).ravel()[found] / roots
    pixels = (np.asarray(std) * directions).reshape(len(found), -1)
    return Curve(seen, vectors.T @ pixels, vectors.T @ own)


@jax.jit
def _directions(prior, places, scales):
    """Images of single coefficients of a prior, each of a scale."""
    unit = jax.nn.one_hot(places, prior.mean.size, dtype=prior.mean.dtype) * scales[:, None]
    return synthesize(prior, unit.reshape(-1, *prior.mean.shape))


@functools.partial(jax.jit, static_argnums=0)
def _derivatives(update_of, images, directions, context):
    """The derivative of the update along each direction, [direction, entry]."""
    _, along = jax.linearize(lambda x: flat(update_of(x, *context)), images)
    return jax.vmap(along)(directions[:, None])


@functools.partial(jax.jit, static_argnums=0)
def _dense(update_of, images, prior, precisions, std, context):
    """The variance of every pixel, by the Cholesky factor of the whole matrix."""
    residuals, start = _weighted(update_of, images, prior, precisions, context)
    normal = normal_matrix(residuals, start, COLUMNS)
    ridge = jnp.broadcast_to(1 / prior.variances, images.shape).ravel()
    # With a unit diagonal: the scales of the coefficients differ by orders of magnitude.
    root = lax.rsqrt(normal.diagonal() + ridge)
    factor = jnp.linalg.cholesky(root[:, None] * normal * root + jnp.diag(ridge * root**2))
    unit = jnp.eye(len(ridge), dtype=ridge.dtype)
    inverse = jax.scipy.linalg.solve_triangular(factor, unit, lower=True) * root

    def squares(row):
        return jnp.square(std * synthesize(prior, row.reshape(images.shape)))

    def one(total, row):
        return (total + squares(row), None)

    return lax.scan(one, jnp.zeros_like(images), inverse)[0], 0.0, 0.0


@functools.partial(jax.jit, static_argnums=0)
def _probed(update_of, images, prior, precisions, std, context):
    """The same, a noisy estimate of each pixel whose mean over an image is what counts."""
    residuals, start = _weighted(update_of, images, prior, precisions, context)
    product, precondition = _system(residuals, start, images, prior)

    def probe(key):
        signs = jax.random.rademacher(key, images.shape, jnp.int32).astype(images.dtype)
        right = coefficients(prior, std * signs).ravel()
        found = jax.scipy.sparse.linalg.cg(
            product, right, tol=0.0, maxiter=CG_ITERATIONS, M=precondition
        )[0]
        left = jnp.linalg.norm(product(found) - right) / jnp.linalg.norm(right)
        return signs * std * synthesize(prior, found.reshape(images.shape)), left

    found, left = lax.map(probe, jax.random.split(jax.random.key(gn.PROBE), PROBES))
    means = found.mean(axis=(1, 2, 3, 4))
    return found.mean(axis=0), means.std(ddof=1) / PROBES**0.5 / means.mean(), left.max()


def _precisions(variances: PyTree) -> PyTree:
    """One over the variances; 0 where they are infinite."""
    return jax.tree.map(lambda v: jnp.where(jnp.isinf(v), 0, 1 / v), variances)


def _weighted(update_of, images, prior, precisions, context):
    """The update in units of its noise as a function of the prior's coefficients, and the truth."""
    start = coefficients(prior, images - prior.mean).ravel()
    roots = jax.tree.map(jnp.sqrt, precisions)

    def residuals(row):
        own = prior.mean + synthesize(prior, row.reshape(images.shape))
        scaled = jax.tree.map(jnp.multiply, roots, update_of(own, *context))
        return flat(scaled)

    return residuals, start


def _system(residuals, start, images, prior):
    """J^T J / v + S^-1 as a product, and its diagonal preconditioner (`gauss_newton`)."""
    linear = gn.linearize(residuals, start)
    ridge = jnp.broadcast_to(1 / prior.variances, images.shape).ravel()
    seen = linear.jvp(gn.random_signs(start))
    scale = 1 / (ridge + gn.SHIFT * jnp.vdot(seen, seen) / start.size)
    return lambda d: linear.vjp(linear.jvp(d)) + ridge * d, lambda r: scale * r


def _prior_variance(prior: ImagePrior, std: Array) -> Float[Array, "height width channel"]:
    """The variance of each pixel under the prior."""
    roots = jnp.sqrt(prior.variances).ravel()

    def one(total, place):
        row = jnp.zeros_like(roots).at[place].set(roots[place]).reshape(prior.variances.shape)
        return (total + jnp.square(std * synthesize(prior, row)), None)

    return lax.scan(one, jnp.zeros_like(prior.variances), jnp.arange(roots.size))[0]


def rank_bound(prior: ImagePrior, std: Array, images: int, determined: int) -> float:
    """Bounds the mean squared error in pixels by the rank of J alone, whatever the noise.

    J^T J + S^-1 differs from S^-1 by a matrix of that rank, so that by interlacing the posterior's
    variances are at least the smallest of S that are left when the largest `determined` are gone.

    Args:
      prior: of normalized images.
      std: of the network's normalization; its smallest stands for all.
      images: of the update.
      determined: at most the rank of J (`capacity`).
    """
    variances = np.broadcast_to(np.asarray(prior.variances, np.float64), prior.mean.shape)
    left = np.sort(np.tile(variances.ravel(), images))[: images * variances.size - determined]
    return float(np.square(np.min(std)) * left.sum() / (images * variances.size))
