"""SPEAR: whole batches, exactly, from the gradient of a first layer that is dense with a ReLU.

The gradient of the kernel W is D X, with the images X [image, channel] and D = dL/dz
[feature, image], which the ReLU sets to zero wherever it is closed. It has the rank of the batch:
any factors L R of it are L = D Q^-1, R = Q X for some Q, and D alone among all L Q has columns with
zeros in about every second place. Any images - 1 rows of L at which image i is closed are
orthogonal to column i of Q, and determine it. So

  1. draw many sets of images - 1 rows and solve each for the direction orthogonal to them;
  2. keep the distinct directions q for which L q has the most zeros;
  3. from these choose the Q whose images open the ReLU exactly where L Q is not zero;
  4. scale its columns by the bias gradient, which is the sum of D's.

Of images that are closed at random at half of the neurons, a set is one image's in 2^(1 - images)
of all draws: the cost doubles with every image, and few neurons are needed.

References: Dimitrov et al. 2024 (SPEAR), arXiv 2403.03945.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinv.attacks.closed_form import Given
from jaxinv.attacks.factors import MATCHED, agree, images_of, independent, least_cosine, left_factor
from jaxinv.errors import UserError
from jaxinv.networks.inspect import dense_layers, subtree
from jaxinv.types import PyTree

SAMPLES = 2**20  # sets of rows, at the most
DISTINCT = 3  # directions kept, times the images
PARALLEL = 1 - 1e-6  # cosine of directions taken for one


class Found(NamedTuple):
    """A batch, and what the attacker can say of it."""

    images: Float[Array, "image height width channel"]  # normalized
    exact: Bool[Array, " image"]  # one for all: a wrong one is in each other
    match: Float[Array, ""]  # share of the ReLU's signs that agree with the zeros of dL/dz
    samples: Int[Array, ""]  # sets of rows drawn


class _Layer(NamedTuple):
    """The first layer and its gradient, factored."""

    rows: Float[Array, "feature image"]  # of L, of length one; zero where no image is active
    left: Float[Array, "feature image"]  # L: orthonormal columns
    right: Float[Array, "image channel"]  # R
    logits: Float[Array, "image feature"]  # R W
    bias: Float[Array, " feature"]
    sums: Float[Array, " image"]  # L^T times the bias gradient
    live: Int[Array, " feature"]  # neurons in order, those with any gradient first
    lives: Int[Array, ""]


class _State(NamedTuple):
    """What the next round needs."""

    samples: Array
    pool: Float[Array, "direction image"]
    chosen: Float[Array, "image image"]  # columns of Q, of length one, as rows
    match: Array


def attack(given: Given, samples: int = SAMPLES) -> Found:
    """Recovers a batch from one gradient. In float64: float32 finds most small batches only.

    Args:
      given: labels are not read.
      samples: sets of rows after which it gives up.

    Raises:
      UserError: the first layer is not dense or has no bias.
    """
    images = given.images
    path = dense_layers(given.module, given.variables, given.image_shape)[0]
    own, sent = subtree(given.variables["params"], path), subtree(given.target.update, path)
    if "bias" not in sent:
        raise UserError("--attack spear needs a first layer with a bias")
    first, rest = jax.random.split(given.key)
    layer = _factor(first, own, sent, images)
    each = min(max(2 ** (images + 3), 256), 8192)

    def more(state):
        return (state.match < MATCHED) & (state.samples < samples)

    def draw(state):
        drawn = _draw(jax.random.fold_in(rest, state.samples), layer, each)
        pool = _distinct(layer, jnp.concatenate([state.pool, drawn]), DISTINCT * images)
        chosen, match = _choose(layer, pool)
        return _State(state.samples + each, pool, chosen, match)

    dtype = layer.left.dtype
    nothing = jnp.zeros((DISTINCT * images, images), dtype)
    start = _State(jnp.int32(0), nothing, jnp.eye(images, dtype=dtype), jnp.zeros((), dtype))
    end = lax.while_loop(more, draw, start)
    found = images_of(layer, end.chosen)
    exact = jnp.broadcast_to(end.match >= MATCHED, (images,))
    return Found(found.reshape(images, *given.image_shape), exact, end.match, end.samples)


def _factor(key: jax.Array, own: PyTree, sent: PyTree, images: int) -> _Layer:
    """Factors the kernel's gradient."""
    gradient = sent["kernel"].T
    left = left_factor(key, gradient, images)
    right = left.T @ gradient
    lengths = jnp.linalg.norm(left, axis=1)
    alive = lengths > least_cosine(left) * lengths.max()
    rows = jnp.where(alive[:, None], left / lengths[:, None], 0)
    return _Layer(
        rows,
        left,
        right,
        right @ own["kernel"],
        own["bias"],
        left.T @ sent["bias"],
        jnp.argsort(~alive),
        alive.sum(),
    )


def _draw(key: jax.Array, layer: _Layer, samples: int) -> Float[Array, "sample image"]:
    """Draws sets of images - 1 rows; the direction orthogonal to each, of length one.

    Rows are drawn with replacement: a set with one row twice has no such direction, and gives one
    of few zeros.
    """
    images = layer.rows.shape[1]
    of_rows, of_probe = jax.random.split(key)
    places = jax.random.randint(of_rows, (samples, images - 1), 0, layer.lives)
    # One more row, which the direction is not orthogonal to, makes the system square.
    probe = jax.random.normal(of_probe, (samples, 1, images), layer.rows.dtype)
    systems = jnp.concatenate([layer.rows[layer.live[places]], probe], axis=1)
    last = jnp.zeros((images, 1), layer.rows.dtype).at[-1].set(1)
    solved = jax.vmap(lambda system: jnp.linalg.solve(system, last)[:, 0])(systems)
    units = solved / jnp.linalg.norm(solved, axis=1, keepdims=True)
    return jnp.where(jnp.isfinite(units), units, 0)


def _distinct(
    layer: _Layer, directions: Float[Array, "sample image"], count: int
) -> Float[Array, "direction image"]:
    """Takes the directions with the most zeros, one of each that are parallel; the sparsest first.

    Each is made orthogonal to all the rows that are zero for it, in least squares.
    """
    closed = jnp.abs(layer.rows @ directions.T) < least_cosine(layer.rows)
    zeros = jnp.where((directions != 0).any(axis=1), closed.sum(axis=0), 0)

    def take(zeros, _):
        best = jnp.argmax(zeros)
        parallel = jnp.abs(directions @ directions[best]) > PARALLEL
        return jnp.where(parallel, 0, zeros), best

    _, places = lax.scan(take, zeros, length=count)

    def orthogonal(place):
        rows = layer.rows * closed[:, place, None]
        return jnp.linalg.eigh(rows.T @ rows)[1][:, 0]

    return jax.vmap(orthogonal)(places)


def _match(layer: _Layer, chosen: Float[Array, "image image"]) -> Float[Array, ""]:
    """Computes the share of all features and images where the ReLU is open as D says."""
    return agree(layer, chosen).mean(dtype=chosen.dtype)


def _choose(
    layer: _Layer, pool: Float[Array, "direction image"]
) -> tuple[Float[Array, "image image"], Float[Array, ""]]:
    """Starts from the sparsest independent directions; swaps one while that betters the match."""
    images = pool.shape[1]

    start = independent(pool, images)

    def swap(state):
        chosen, match, _ = state
        swaps = jax.vmap(lambda q: jax.vmap(lambda i: chosen.at[i].set(q))(jnp.arange(images)))
        others = swaps(pool).reshape(-1, images, images)
        matches = jax.vmap(lambda other: _match(layer, other))(others)
        best = jnp.argmax(matches)
        better = matches[best] > match
        return jnp.where(better, others[best], chosen), jnp.maximum(match, matches[best]), better

    found = (start, _match(layer, start), jnp.bool_(True))
    chosen, match, _ = lax.while_loop(lambda s: s[2] & (s[1] < MATCHED), swap, found)
    return chosen, match
