"""Identification: which of N candidate images are in an update.

An update of the images S is, up to noise,

    u = weight * sum over j in S of g_j,        g_j = gradient of the loss of candidate j alone,

so that naming S is a linear problem: no image has to be reconstructed, and what stops a
reconstruction (a batch, noise, a network that determines too little) need not stop this. All that
the methods see are the inner products of gradients and update (`measuring.Products`):

* matched: <g_j, u> / |g_j|, each candidate for itself;
* omp: adds the candidate that explains most, again and again, then swaps one for another as long as
  that explains more (orthogonal matching pursuit with weights that are all the same);
* ridge: the best linear estimate over all candidates at once. Without noise it is least squares,
  exact as long as there are fewer candidates than parameters;
* slab: the most probable set (weights 0 or `weight`: spike and slab) near the linear estimate or
  near the greedy choice.

One pass over the candidates gives them (`measuring.measure`). Of more than `MOST` candidates the
methods see a shortlist, the best by what a greedy choice among all leaves of the update, then by
what the images named leave: time and memory grow with N, not with N^2.

References: matched filter: any text on detection; Pati et al. 1993 (OMP); gradients of different
  images are nearly orthogonal: ICLR 2023, "Effective passive membership inference attacks in
  federated learning against overparameterized models"; IIP: Yin et al. 2021, arXiv 2104.07586.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinv.audit.measuring import Candidates, Measured, Products

MOST = 2048  # candidates that a method sees; of more, the best
ROUNDS = 4  # of shortlists, each of what the picks of the last one leave
RIDGE = 1e-6  # of the least squares, relative to a unit diagonal
MOST_SWAPS = 4  # per image of the update
LEAST_VARIANCE = 1e-6  # of the noise, relative to the mean square of the update's entries


class Ranking(NamedTuple):
    """What a method says of one update."""

    scores: Float[Array, "*update candidate"]  # the higher, the surer; comparable between updates
    picks: Int[Array, "*update image"]


def all_labels(candidates: Candidates, classes: int) -> Candidates:
    """Every candidate with every label, for a client whose labels are not known.

    The candidate of position j * classes + c is image j as class c; `best_of_labels` puts the
    scores back together.
    """
    images = np.repeat(candidates.images, classes, axis=0)
    return Candidates(images, np.tile(np.arange(classes, dtype=np.int32), len(candidates.labels)))


def best_of_labels(ranking: Ranking, classes: int) -> Ranking:
    """The images instead: each at its best label, and as many named as before, none twice.

    Args:
      ranking: of `all_labels`.
      classes: as there.
    """
    updates, images = ranking.picks.shape
    scores = np.reshape(ranking.scores, (updates, -1, classes)).max(axis=2)
    named = np.zeros(scores.shape, bool)
    np.put_along_axis(named, np.asarray(ranking.picks) // classes, True, axis=1)
    # Where one was named with two labels, the best of the others stands in for it.
    return Ranking(scores, np.lexsort((-scores, ~named), axis=1)[:, :images])


# --- The methods: (products, images, weight, variance) -> ranking, of all updates at once ---------


def matched(products: Products, images: int, weight: Array | None, variance: Array) -> Ranking:
    """Each candidate's cosine to the update."""
    del weight, variance
    norms = _norms(products.gram) * jnp.sqrt(products.power)[:, None]
    return _ranked(products.cross / jnp.maximum(norms, jnp.finfo(norms.dtype).tiny), images)


def omp(products: Products, images: int, weight: Array | None, variance: Array) -> Ranking:
    """Greedy picks, then swaps; the scores are log-odds given the other picks."""
    return _settle(products, _greedy_of_all(products, images, weight), weight, variance)


def ridge(products: Products, images: int, weight: Array | None, variance: Array) -> Ranking:
    """The linear estimate of least error over all candidates at once, as log-odds.

    Taking the weights for independent, w with probability B / N and else 0, of variance t, the best
    linear estimate is x = (K + v / t)^-1 (c - K m) + m with the mean m = w B / N; without noise it
    is least squares, under much noise the matched filter. The error of x_j has the variance
    t s_j (1 - s_j), s = diag((K + v / t)^-1 K), and candidate j is there rather than not by

        (w / t) (x_j - m - w s_j / 2).
    """
    gram, count = products.gram, products.cross.shape[1]
    weight = _assumed(products, images, weight, variance)
    share = images / count
    spread = weight.mean() ** 2 * share * (1 - share)
    norms = jnp.maximum(_norms(gram), 1e-6 * _norms(gram).max())
    unit = gram / norms[:, None] / norms
    level = jnp.maximum(RIDGE, variance / spread / norms**2)  # of unit gradients
    factor = jax.scipy.linalg.cho_factor(unit + jnp.diag(level))
    left = products.cross - (weight * share)[:, None] * gram.sum(axis=1)
    found = jax.scipy.linalg.cho_solve(factor, (left / norms).T).T / norms
    inverse = jax.scipy.linalg.cho_solve(factor, jnp.eye(count, dtype=gram.dtype))
    seen = 1 - level * jnp.diagonal(inverse)
    odds = weight[:, None] / spread * (found - weight[:, None] * seen / 2)
    return _ranked(odds, images)


def slab(products: Products, images: int, weight: Array | None, variance: Array) -> Ranking:
    """The most probable set (weights 0 or w: spike and slab), by swaps from two starts.

    From where `ridge` ends, and from the greedy choice: of gradients that depend on one another, as
    those of one image with all its labels do, least squares has no one solution.
    """

    def settled(picks):
        found = _settle(products, picks, weight, variance)
        return found, _each(_explained, products, found.picks, weight)

    linear = ridge(products, images, weight, variance).picks
    starts = jnp.stack([linear, _greedy_of_all(products, images, weight)])
    found, explained = lax.map(settled, starts)  # one after the other, by one program
    better = (explained[1] > explained[0])[:, None]
    return jax.tree.map(lambda both: jnp.where(better, both[1], both[0]), found)


METHODS: dict[str, Callable[[Products, int, Array | None, Array], Ranking]] = {
    "matched": matched,
    "omp": omp,
    "ridge": ridge,
    "slab": slab,
}


def identify(
    products: Products,
    images: int,
    method: str = "slab",
    weight: float | None = None,
    variance: float = 0.0,
) -> Ranking:
    """Ranks the candidates of every update.

    Args:
      products: `measure`'s; gram [N, N], cross [update, N].
      images: how many candidates are named, of N.
      method: one of `METHODS`.
      weight: of each image's gradient in the update: 1 / images of one gradient, `epochs / batch`
        of local steps. None where it is not known (a clipped or rescaled update): then it is the
        one that fits best.
      variance: of the noise on each entry; 1 for products in units of it.
    """
    cross = products.cross
    weights = None if weight is None else np.full(len(cross), weight, cross.dtype)
    return _identify(method, images, products, weights, variance)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _identify(method, images, products, weights, variance):
    return METHODS[method](products, images, weights, variance)


def identify_among(
    measured: Measured,
    images: int,
    method: str = "slab",
    weight: float | None = None,
    variance: float = 0.0,
    most: int = MOST,
) -> Ranking:
    """Ranks any number of candidates: beyond `most`, all but a shortlist stand behind it.

    Args:
      measured: `measure`'s.
      images, method, weight, variance: as in `identify`.
      most: candidates of the shortlist, of each update its own.
    """
    count = len(measured.squares)
    if count <= most:
        return identify(measured.products(), images, method, weight, variance)
    norms = np.sqrt(np.maximum(measured.squares, 1e-12 * measured.squares.max()))
    scores, named = [], []
    for i, cross in enumerate(measured.cross):
        picks = _greedy_of_many(measured, cross, images, weight)
        left = _left(measured, cross, picks, weight)
        for _ in range(ROUNDS):
            first = left / norms
            first[picks] = np.inf
            order = np.argsort(-first, kind="stable")
            kept, rest = np.sort(order[:most]), order[most:]
            own = measured.products(kept, slice(i, i + 1))
            found = identify(own, images, method, weight, variance)
            before, picks = picks, np.sort(kept[np.asarray(found.picks[0])])
            if np.array_equal(before, picks):
                break
            # One that was left out stands out of what the picks leave.
            left = _left(measured, cross, picks, weight)
        whole = np.empty(count, np.float32)
        whole[kept] = found.scores[0]
        whole[rest] = whole[kept].min() - (first[rest[0]] - first[rest])
        scores.append(whole)
        named.append(picks)
    return Ranking(np.stack(scores), np.stack(named))


def _greedy_of_many(
    measured: Measured, cross: np.ndarray, images: int, weight: float | None
) -> Int[np.ndarray, " image"]:
    """`_greedy` without the products of the candidates with one another."""
    along, with_update, square = np.zeros_like(cross), np.float32(0), np.float32(0)
    picks: list[int] = []
    for _ in range(images):
        squares = square + 2 * along + measured.squares
        merit = np.array(_merit(weight, with_update + cross, squares))
        merit[picks] = -np.inf
        j = int(merit.argmax())
        picks.append(j)
        square, with_update = squares[j], with_update + cross[j]
        along = along + _with_all(measured, measured.rows[j])
    return np.sort(picks)


def _left(
    measured: Measured, cross: np.ndarray, picks: np.ndarray, weight: float | None
) -> Float[np.ndarray, " candidate"]:
    """The products of the candidates with what the picks leave of an update."""
    along = _with_all(measured, measured.rows[picks].sum(axis=0))
    if weight is None:
        weight = max(cross[picks].sum(), 0) / max(along[picks].sum(), 1e-30)
    return cross - weight * along


def _with_all(measured: Measured, row: np.ndarray) -> Float[np.ndarray, " candidate"]:
    """The products of a sum of gradients with every candidate's."""
    return measured.rows @ (row if measured.along is None else row * np.square(measured.along))


def _each(function: Callable, products: Products, *more: Any) -> Any:
    """A function of one update's products, for each update in turn."""

    def one(own):
        cross, power, *rest = own
        return function(Products(products.gram, cross, power, products.entries), *rest)

    return lax.map(one, (products.cross, products.power, *more))


def _norms(gram: Array) -> Float[Array, " candidate"]:
    return jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))


def _ranked(scores: Array, images: int) -> Ranking:
    return Ranking(scores, lax.top_k(scores, images)[1])


def _assumed(products: Products, images: int, weight: Array | None, variance: Array) -> Array:
    """The weight, or where it is not known the one at which B random candidates have that power."""
    if weight is not None:
        return weight
    count, diagonal = products.cross.shape[1], jnp.diagonal(products.gram)
    between = (products.gram.sum() - diagonal.sum()) / (count * (count - 1))
    expected = images * diagonal.mean() + images * (images - 1) * jnp.maximum(between, 0)
    power = products.power - products.entries * variance
    return jnp.sqrt(jnp.maximum(power, 1e-3 * products.power) / expected)


def _merit(weight: Array | None, with_update: Array, square: Array) -> Array:
    """How much of |u|^2 a sum of gradients explains, s, of which <s, u> and |s|^2 are given.

    With the weight known |u|^2 - |u - w s|^2, else at the best weight, that is not negative.
    """
    if weight is None:
        tiny = jnp.finfo(square.dtype).tiny
        return with_update * jnp.maximum(with_update, 0) / jnp.maximum(square, tiny)
    return 2 * weight * with_update - weight**2 * square


def _greedy(products: Products, images: int, weight: Array | None) -> Int[Array, " image"]:
    """Picks the candidate that adds most to what is explained, again and again."""
    gram, cross = products.gram, products.cross
    diagonal = jnp.diagonal(gram)

    def pick(carry, _):
        chosen, along, with_update, square = carry
        merit = _merit(weight, with_update + cross, square + 2 * along + diagonal)
        j = jnp.argmax(jnp.where(chosen, -jnp.inf, merit))
        square = square + 2 * along[j] + diagonal[j]
        return (chosen.at[j].set(True), along + gram[j], with_update + cross[j], square), j

    zero = jnp.zeros((), cross.dtype)
    start = (jnp.zeros(len(cross), bool), jnp.zeros_like(cross), zero, zero)
    return lax.scan(pick, start, None, length=images)[1]


def _greedy_of_all(products: Products, images: int, weight: Array | None) -> Array:
    """The greedy picks of every update."""
    return _each(lambda own, w: _greedy(own, images, w), products, weight)


def _explained(products: Products, picks: Array, weight: Array | None) -> Array:
    """How much of |u|^2 the picks explain."""
    return _merit(weight, products.cross[picks].sum(), products.gram[picks][:, picks].sum())


def _settle(products: Products, picks: Array, weight: Array | None, variance: Array) -> Ranking:
    """Swaps the picks of every update as long as that explains more; log-odds given the others."""
    return _each(lambda own, picks, w: _swapped(own, picks, w, variance), products, picks, weight)


def _swapped(products: Products, picks: Array, weight: Array | None, variance: Array) -> Ranking:
    """Replaces one pick by another candidate, the best such swap, while that explains more."""
    gram, cross = products.gram, products.cross
    diagonal = jnp.diagonal(gram)
    images = len(picks)

    def sums(picks, rows):
        along = rows.sum(axis=0)
        return along, cross[picks].sum(), along[picks].sum()

    def merits(picks, rows):
        """Of every swap: [pick, candidate]."""
        along, with_update, square = sums(picks, rows)
        out = picks[:, None]
        changed = square + diagonal[out] + diagonal - 2 * along[out] + 2 * along - 2 * rows
        merit = _merit(weight, with_update - cross[out] + cross, changed)
        chosen = jnp.zeros(len(cross), bool).at[picks].set(True)
        return jnp.where(chosen, -jnp.inf, merit)

    def swap(carry):
        picks, rows, left, _ = carry
        found = merits(picks, rows)
        out, into = jnp.unravel_index(jnp.argmax(found), found.shape)
        _, with_update, square = sums(picks, rows)
        here = _merit(weight, with_update, square)
        better = found[out, into] > here + 1e-6 * products.power  # what float32 can tell
        picks = jnp.where(better, picks.at[out].set(into), picks)
        rows = jnp.where(better, rows.at[out].set(gram[into]), rows)
        return picks, rows, left - 1, better

    picks, rows, *_ = lax.while_loop(
        lambda carry: (carry[2] > 0) & carry[3],
        swap,
        (picks, gram[picks], jnp.int32(MOST_SWAPS * images), jnp.bool_(images < len(cross))),
    )
    along, with_update, square = sums(picks, rows)
    scale = with_update / jnp.maximum(square, jnp.finfo(square.dtype).tiny)
    weight = scale if weight is None else weight
    chosen = jnp.zeros(len(cross), cross.dtype).at[picks].set(1)
    left = cross - weight * (along - chosen * diagonal)
    # What the picks leave is noise too: of an update that holds no candidate, nearly all of it.
    rest = products.power - _merit(weight, with_update, square)
    least = jnp.maximum(LEAST_VARIANCE * products.power, rest) / products.entries
    noise = jnp.maximum(variance, least)
    return Ranking((weight * left - weight**2 * diagonal / 2) / noise, picks)
