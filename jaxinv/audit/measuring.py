"""The inner products of candidates' gradients with one another and with updates, in one pass.

All that identification sees. Of each gradient the pass gives its norm, its product with every
update, and the gradient itself or a sketch of it, so that memory grows with N and not with N times
the parameters.

References: Charikar, Chen & Farach-Colton 2002 (count sketch).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinv import client
from jaxinv.attacks.levenberg_marquardt import flat
from jaxinv.privacy.gradient import clip_factor
from jaxinv.types import PyTree

CHUNK = 256  # candidates between two returns to the host
AT_ONCE = 16  # candidates whose gradients are computed together
STORED = 2 * 2**30  # bytes of gradients that are kept; beyond, a sketch of each
SKETCH = 8192  # numbers of a sketch
PROGRAMS = 16  # that are kept


class Candidates(NamedTuple):
    """Who may be in the update."""

    images: Float[Array, "candidate height width channel"]  # normalized
    labels: Int[Array, " candidate"]


class Products(NamedTuple):
    """Inner products of the candidates' gradients with one another and with updates."""

    gram: Float[Array, "candidate candidate"]
    cross: Float[Array, "*update candidate"]
    power: Float[Array, "*update"]  # |u|^2
    entries: int | Array  # of an update


@dataclass(frozen=True)
class Rows:
    """The candidates' gradients, and their products with one another, once they are asked for."""

    rows: Float[np.ndarray, "candidate entry"]
    sizes: tuple[int, ...]  # entries of each leaf

    @functools.cached_property
    def gram(self) -> Float[np.ndarray, "candidate candidate"]:
        """Over all entries."""
        return self.rows @ self.rows.T

    @functools.cached_property
    def of_leaves(self) -> Float[np.ndarray, "leaf candidate candidate"] | None:
        """Over each leaf's entries alone; None: too many to keep."""
        if 4 * len(self.sizes) * len(self.rows) ** 2 > STORED:
            return None
        leaves = np.split(self.rows, np.cumsum(self.sizes)[:-1], axis=1)
        return np.stack([leaf @ leaf.T for leaf in leaves])

    def clipped(self, norm: float) -> "Rows":
        """The gradients as a client with DP-SGD clips them."""
        norms = np.sqrt(np.maximum(np.einsum("ij,ij->i", self.rows, self.rows), 1e-20))
        return Rows(self.rows * np.minimum(1, norm / norms)[:, None], self.sizes)


def scores(
    loss: client.LossFn, params: PyTree, candidates: Candidates, updates: PyTree, chunk: int = CHUNK
) -> Float[np.ndarray, "update candidate"]:
    """Computes <g_j, u> for every candidate and update, without any gradient.

    It is the derivative of candidate j's loss along u: one forward pass of (value, derivative), in
    the memory of a few images, however many parameters there are.

    Args:
      loss, params: of the network.
      candidates: of whom each is scored alone.
      updates: shaped like `params` with a leading axis.
      chunk: candidates at once.
    """
    function, rest = _split(loss)
    of_chunk = _compiled_scores(function)
    parts = [of_chunk(rest, params, part, updates) for part in _chunks(candidates, chunk)]
    return np.concatenate(parts, axis=1)[:, : len(candidates.labels)]


def _split(loss: client.LossFn) -> tuple[Callable, tuple]:
    """A loss as what a program is compiled for, and the arrays that it takes in front of others.

    Of a `functools.partial`, such as `games.Network` has, these are traced: a client who gets other
    running statistics in every round compiles once.
    """
    return (loss.func, loss.args) if isinstance(loss, functools.partial) else (loss, ())


@functools.lru_cache(maxsize=PROGRAMS)
def _compiled_scores(loss):
    @jax.jit
    def of_chunk(rest, params, part, updates):
        def losses(params):
            def one(image, label):
                return loss(*rest, params, image[None], label[None])[0]

            return jax.vmap(one)(*part)

        _, along = jax.linearize(losses, params)
        return jax.vmap(along)(updates)

    return of_chunk


def gradients(
    loss: client.LossFn,
    params: PyTree,
    candidates: Candidates,
    clip: float | None = None,
    part: slice = slice(None),
) -> Float[np.ndarray, "candidate entry"]:
    """Computes the gradient of each candidate alone, a row each.

    Args:
      loss, params: of the network.
      candidates: whose gradients.
      clip: the L2 norm to which a client with DP-SGD clips each image's gradient.
      part: the entries that are kept.
    """
    entries = optax.tree.size(params)
    ones, none = np.ones(entries, np.float32), np.zeros((1, entries), np.float32)
    passes = _passes(loss, params, candidates, none, ones, clip)
    return np.concatenate([np.asarray(rows[:, part]) for rows, *_ in passes])


def gram(
    loss: client.LossFn, params: PyTree, candidates: Candidates, stored: float = STORED
) -> Float[np.ndarray, "candidate candidate"]:
    """Computes the products of the gradients with one another, a slice of the entries at a time.

    Exact where the gradients do not fit in `stored` bytes, at the price of one pass a slice.
    """
    count, entries = len(candidates.labels), optax.tree.size(params)
    width = max(1, int(stored / (4 * count)))
    total = np.zeros((count, count), np.float32)
    for start in range(0, entries, width):
        rows = gradients(loss, params, candidates, part=slice(start, start + width))
        total += rows @ rows.T
    return total


def _passes(loss, params, candidates, updates, along, clip, size=None):
    """Of each chunk of candidates: gradients times `along` or their sketches, squares, products."""
    function, rest = _split(loss)
    of_chunk = _compiled_pass(function, size)
    signs = _signs(len(along))
    limit = jnp.float32(jnp.inf if clip is None else clip)
    chunk = min(CHUNK, -(-len(candidates.labels) // AT_ONCE) * AT_ONCE)
    left = len(candidates.labels)
    for part in _chunks(candidates, chunk):
        yield tuple(x[:left] for x in of_chunk(rest, params, part, updates, along, limit, signs))
        left -= chunk


@functools.lru_cache(maxsize=PROGRAMS)
def _compiled_pass(loss, size):
    @jax.jit
    def of_chunk(rest, params, part, updates, along, clip, signs):
        def one(example):
            image, label = example
            own = functools.partial(loss, *rest)
            found, _ = client.gradient(own, params, image[None], label[None])
            row = clip_factor(found, clip) * along * flat(found)
            kept = row if size is None else _added(row, signs, size)
            return kept, jnp.vdot(row, row), updates @ row

        return lax.map(one, tuple(part), batch_size=AT_ONCE)

    return of_chunk


def _chunks(candidates: Candidates, size: int) -> list[Candidates]:
    """Cuts candidates into chunks of one size, the last filled up with the last candidate."""
    count = len(candidates.labels)
    images, labels = map(np.asarray, candidates)
    return [Candidates(images[at], labels[at]) for at in parts(count, min(size, count))]


def parts(count: int, size: int) -> Int[np.ndarray, "part size"]:
    """Cuts positions into parts of one size, the last filled up with the last: one program."""
    return np.minimum(np.arange(-(-count // size) * size), count - 1).reshape(-1, size)


def sketch(rows: Float[np.ndarray, "row entry"], size: int) -> Float[np.ndarray, "row size"]:
    """Adds the entries up, with random signs, in `size` sums: inner products stay as they are.

    On average; <a, b> is off by about |a| |b| / sqrt(size). The sketch of a sum is the sum of the
    sketches, so that a linear problem stays the same linear problem.

    References: Charikar, Chen & Farach-Colton 2002 (count sketch).
    """
    signs = _signs(rows.shape[1])
    return np.stack([np.asarray(_added(row, signs, size)) for row in rows])


def _signs(entries: int) -> Float[np.ndarray, " entry"]:
    return np.random.default_rng(entries).choice(np.float32([-1, 1]), entries)


def _added(row, signs, size):
    return jnp.pad(row * signs, (0, -len(signs) % size)).reshape(-1, size).sum(axis=0)


class Measured(NamedTuple):
    """What one pass over the candidates gives: `products` has the rest."""

    rows: Float[np.ndarray, "candidate entry"]  # gradients or sketches
    along: Float[np.ndarray, " entry"] | None  # by which the rows are still to be multiplied
    gram: Float[np.ndarray, "candidate candidate"] | None  # where it was there before
    squares: Float[np.ndarray, " candidate"]
    cross: Float[np.ndarray, "update candidate"]
    power: Float[np.ndarray, " update"]
    entries: int

    def products(self, some: np.ndarray | slice = slice(None), of: slice = slice(None)) -> Products:
        """All inner products of some candidates and of some updates."""
        cross, power = self.cross[of][:, some], self.power[of]
        if self.gram is not None:
            return Products(self.gram[some][:, some], cross, power, self.entries)
        rows = self.rows[some]
        if self.along is not None:
            rows = rows * self.along
        return Products(rows @ rows.T, cross, power, self.entries)


def measure(
    loss: client.LossFn,
    params: PyTree,
    candidates: Candidates,
    updates: PyTree,
    *,
    clip: float | None = None,
    variances: PyTree | None = None,
    sent_only: bool = False,
    noisy: bool = False,
    known: Rows | None = None,
    stored: float = STORED,
) -> Measured:
    """Looks at every candidate's gradient once.

    Where the candidates' gradients do not fit in `stored` bytes, their products with one another
    are those of sketches. So are those with the update where there is no noise, for then the
    problem is solved exactly; under noise they are exact, for a sketch would add it up.

    Args:
      loss, params: of the network, at the parameters where the gradients are taken: those that the
        client received, or for local steps the `midpoint`.
      candidates: N of them.
      updates: shaped like `params` with a leading axis.
      clip: the L2 norm to which a client with DP-SGD clips each image's gradient.
      variances: of a known defense's noise, a scalar a leaf (`DefenseKnowledge.variances`).
      sent_only: whether entries that are 0 in the update were not sent: of a pruned update, one
        update at a time.
      noisy: whether there is noise, of `variances` or the same on every entry.
      known: the candidates' gradients as they are undefended, where they were computed before.
      stored: bytes.

    Returns:
      What the products are made of, in units of the noise's standard deviation where `variances`
      are given.
    """
    entries = optax.tree.size(params)
    shared = np.asarray(jax.vmap(flat)(updates))
    along = precisions = None
    if variances is not None:
        precisions = np.array([1 / v for v in jax.tree.leaves(variances)], np.float32)
        sizes = [x.size for x in jax.tree.leaves(params)]
        along = np.repeat(np.sqrt(precisions), sizes)
        shared = shared * along
    if sent_only:
        if len(shared) > 1:
            raise ValueError("each pruned update leaves other entries: measure one at a time")
        sent = (shared[0] != 0).astype(np.float32)
        along = sent if along is None else sent * along
    power = np.einsum("ij,ij->i", shared, shared)
    if known is not None:
        known = known if clip is None else known.clipped(clip)
        return _of_known(known, shared, power, along, precisions, sent_only)
    size = SKETCH if len(candidates.labels) * entries * 4 > stored else None
    along = np.ones(entries, np.float32) if along is None else along
    rows = np.empty((len(candidates.labels), size or entries), np.float32)
    products, done = [], 0
    for part, *more in _passes(loss, params, candidates, shared, along, clip, size):
        rows[done : done + len(part)] = part
        products.append([np.asarray(x) for x in more])
        done += len(part)
    squares, cross = (np.concatenate(x) for x in zip(*products))
    cross = cross.T
    if size is not None and not noisy:
        # All of it sketched is the same linear problem, exact products among sketched ones are not.
        cross, squares = sketch(shared, size) @ rows.T, np.einsum("ij,ij->i", rows, rows)
    return Measured(rows, None, None, squares, cross, power, entries)


def _of_known(known, shared, power, along, precisions, sent_only):
    """What the candidates' kept gradients give, each entry of them times `along`."""
    rows, entries, gram = known.rows, known.rows.shape[1], None
    if sent_only:  # few entries are left, of which a copy is small
        used = np.flatnonzero(along)
        rows, along, shared = rows[:, used] * along[used], None, shared[:, used]
    elif along is None:
        gram = known.gram
    elif known.of_leaves is not None:  # leaves of one variance each: no entry is looked at again
        gram = np.tensordot(precisions, known.of_leaves, axes=1)
    cross = (shared if along is None else shared * along) @ rows.T
    if gram is not None:
        squares = np.diagonal(gram)
    elif along is None:
        squares = np.einsum("ij,ij->i", rows, rows)
    else:
        squares = np.square(rows) @ np.square(along)
    return Measured(rows, along, gram, squares, cross, power, entries)


def midpoint(params: PyTree, update: PyTree, rate: float | Array, steps: int) -> PyTree:
    """The mean of the parameters at which a client took the gradients of its local steps.

    On a straight way: of T steps the mean lies (T - 1) / 2T of the way from the first to the last.

    Args:
      params: that the client received.
      update: the sum of the gradients of its steps (`client.update`).
      rate: the client's; 1 where the update is the parameters' difference itself.
      steps: T.

    References: Zhu et al. 2023 (SME), whose surrogate lies on that line.
    """
    share = (steps - 1) / (2 * steps)
    return jax.tree.map(lambda p, u: p - share * rate * u, params, update)
