"""Unmixing: whole batches, exactly, from the gradient of a first layer that is dense with a ReLU.

The gradient of the kernel W is D X, with the images X [image, channel] and D = dL/dz
[feature, image], which the ReLU sets to zero wherever it is closed. It has the rank of the batch:
any factors L R of it are L = D Q^-1, R = Q X for some Q, and D alone among all L Q has columns with
zeros in about every second place. Image i is closed where a row of L is orthogonal to column i of
Q: half of all rows lie in one hyperplane, for each image in another. So

  1. whiten the rows of L, in which the columns of Q are about orthogonal to one another;
  2. find them all at once by independent component analysis: few signals are as sparse as they are,
     and the mean of log cosh falls with sparsity;
  3. let each go on alone, to the direction that is orthogonal to as many rows as can be: least
     absolute values, reweighted, until the zeros are zeros to the precision;
  4. of all directions found keep the independent ones with the most zeros;
  5. scale them by the bias gradient, which is the sum of D's columns.

An image is the truth if it opens the ReLU exactly where D is not zero; until all are, steps 2 to 4
start again from another draw.

References: Dimitrov et al. 2024 (SPEAR), arXiv 2403.03945, the problem and the scale; Bakarsky et
al. 2025 (SPEAR++), sparse dictionary learning for it; Hyvarinen 1999 (FastICA); Tsakiris & Vidal
2018 (dual principal component pursuit), hyperplanes by least absolute values.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinv.attacks.closed_form import Given
from jaxinv.attacks.factors import MATCHED, agree, images_of, independent, least_cosine, left_factor
from jaxinv.errors import UserError
from jaxinv.networks.inspect import dense_layers, subtree
from jaxinv.types import PyTree

ROUNDS = 8  # draws after which it gives up
STEPS, STILL = 500, 1e-5  # of the component analysis, at the most; cosine short of 1 that ends it
DAMPING = 0.5  # part of the old components in the new: without it they go round in circles
REWEIGHTINGS, WIDEST = 40, 0.3  # of a direction; |cosine| that counts as zero in the first
MANY, AROUND = 0.5, 0.5  # share of images known beside which others are drawn; of a length of one


class Found(NamedTuple):
    """A batch, and what the attacker can say of it."""

    images: Float[Array, "image height width channel"]  # normalized
    exact: Bool[Array, " image"]
    match: Float[Array, " image"]  # share of the ReLU's signs that agree with the zeros of dL/dz
    rounds: Int[Array, ""]  # draws made


class _Layer(NamedTuple):
    """The first layer and its gradient, factored: L, whose rows are whitened, and R."""

    rows: Float[Array, "feature image"]  # of L, of length one; zero where no image is active
    right: Float[Array, "image channel"]  # R
    logits: Float[Array, "image feature"]  # R W
    bias: Float[Array, " feature"]
    sums: Float[Array, " image"]  # L^-1 times the bias gradient


class _State(NamedTuple):
    """What the next round needs."""

    rounds: Array
    chosen: Float[Array, "image image"]  # columns of Q, of length one, as rows
    match: Float[Array, " image"]


def attack(given: Given) -> Found:
    """Recovers a batch from one gradient.

    Args:
      given: labels are not read.

    Raises:
      UserError: the first layer is not dense, has no bias, or fewer neurons than there are images.
    """
    images = given.images
    check(given.module, given.variables, given.image_shape, images)
    path = dense_layers(given.module, given.variables, given.image_shape)[0]
    own, sent = subtree(given.variables["params"], path), subtree(given.target.update, path)
    of_factors, of_rounds = jax.random.split(given.key)
    layer = _factor(of_factors, own, sent, images)

    def more(state):
        return (state.match < MATCHED).any() & (state.rounds < ROUNDS)

    def draw(state):
        own = jax.random.fold_in(of_rounds, state.rounds)
        known = state.match >= MATCHED
        start = lax.cond(
            known.mean() < MANY,
            lambda: _separate(own, layer.rows),
            lambda: _beside(own, state.chosen * known[:, None]),
        )
        found = lax.map(lambda q: _sharpen(layer.rows, q), start)
        chosen = _sparsest(layer.rows, jnp.concatenate([state.chosen, found]), images)
        return _State(state.rounds + 1, chosen, _match(layer, chosen))

    dtype = layer.rows.dtype
    start = _State(jnp.int32(0), jnp.eye(images, dtype=dtype), jnp.zeros(images, dtype))
    end = lax.while_loop(more, draw, start)
    found = images_of(layer, end.chosen)
    exact = end.match >= MATCHED
    return Found(found.reshape(images, *given.image_shape), exact, end.match, end.rounds)


def check(
    module: nn.Module, variables: PyTree, image_shape: tuple[int, int, int], images: int
) -> None:
    """Raises a UserError unless the network and the batch are as `attack` needs them."""
    first = subtree(variables["params"], dense_layers(module, variables, image_shape)[0])
    if "bias" not in first:
        raise UserError("--attack unmix needs a first layer with a bias")
    if images > len(first["bias"]):
        raise UserError(
            f"--attack unmix: --images {images} are more than the first layer's "
            f"{len(first['bias'])} neurons"
        )


def _factor(key: jax.Array, own: PyTree, sent: PyTree, images: int) -> _Layer:
    """Factors the kernel's gradient."""
    gradient = sent["kernel"].T
    left = left_factor(key, gradient, images)
    units = _units(left)
    powers, axes = jnp.linalg.eigh(units.T @ units)
    whiten = axes / jnp.sqrt(jnp.maximum(powers, least_cosine(left) * powers[-1]))
    # left = (left whiten) whiten^-1, and left is orthonormal.
    back = jnp.linalg.inv(whiten) @ left.T
    right = back @ gradient
    return _Layer(
        _units(left @ whiten), right, right @ own["kernel"], own["bias"], back @ sent["bias"]
    )


def _units(rows: Float[Array, "row column"]) -> Float[Array, "row column"]:
    """The rows with length one; those that are zero but for rounding with length zero."""
    lengths = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return jnp.where(lengths > least_cosine(rows) * lengths.max(), rows / lengths, 0)


def _polar(matrix: Float[Array, "image image"]) -> Float[Array, "image image"]:
    """The orthogonal matrix that is nearest."""
    left, _, right = jnp.linalg.svd(matrix)
    return left @ right


def _separate(
    key: jax.Array, rows: Float[Array, "feature image"]
) -> Float[Array, "component image"]:
    """Finds orthogonal directions along which the rows are sparsest, all at once."""
    images = rows.shape[1]
    signals = rows * jnp.sqrt(images)  # of variance one along every direction

    def more(state):
        step, _, moved = state
        return (step < STEPS) & (moved > STILL)

    def turn(state):
        step, now, _ = state
        along = jnp.tanh(signals @ now.T)
        slope = (1 - along**2).mean(axis=0)
        newton = slope[:, None] * now - along.T @ signals / len(rows)
        size = jnp.linalg.norm(newton, axis=1).mean()
        after = _polar(newton + DAMPING * size * now)
        return step + 1, after, 1 - jnp.abs((after * now).sum(axis=1)).min()

    drawn = _polar(jax.random.normal(key, (images, images), rows.dtype))
    return lax.while_loop(more, turn, (0, drawn, jnp.ones((), rows.dtype)))[1]


def _beside(
    key: jax.Array, known: Float[Array, "direction image"]
) -> Float[Array, "direction image"]:
    """Draws directions around those that are orthogonal to the known ones (others are zero)."""
    images = known.shape[1]
    drawn, noise = jax.random.normal(key, (2, images, images), known.dtype)
    rest = drawn - drawn @ jnp.linalg.pinv(known) @ known
    return _units(rest) + AROUND * _units(noise)


def _sharpen(
    rows: Float[Array, "feature image"], direction: Float[Array, " image"]
) -> Float[Array, " image"]:
    """Turns a direction until it is orthogonal to as many rows as can be, and to these exactly."""
    zero = least_cosine(rows)
    ridge = jnp.finfo(rows.dtype).eps * jnp.eye(rows.shape[1], dtype=rows.dtype)

    def reweight(q, width):
        weights = 1 / jnp.sqrt((rows @ q) ** 2 + width**2)
        system = (rows * (weights / weights.sum())[:, None]).T @ rows
        turned = jnp.linalg.solve(system + ridge, q)
        return turned / jnp.linalg.norm(turned), None

    widths = WIDEST * (zero / WIDEST) ** jnp.linspace(0, 1, REWEIGHTINGS, dtype=rows.dtype)
    q, _ = lax.scan(reweight, direction, widths)
    closed = rows * (jnp.abs(rows @ q) < zero)[:, None]
    return jnp.linalg.eigh(closed.T @ closed)[1][:, 0]


def _sparsest(
    rows: Float[Array, "feature image"], pool: Float[Array, "direction image"], count: int
) -> Float[Array, "image image"]:
    """Takes the directions with the most zeros, each independent of those taken before it.

    A mixture of images is zero where all of them are, so that each of them comes before it.
    """
    zeros = (jnp.abs(rows @ pool.T) < least_cosine(rows)).sum(axis=0)

    return independent(pool[jnp.argsort(-zeros)], count)


def _match(layer: _Layer, chosen: Float[Array, "image image"]) -> Float[Array, " image"]:
    """Computes the share of all features at which each image opens the ReLU as D says."""
    return agree(layer, chosen).mean(axis=1, dtype=chosen.dtype)
