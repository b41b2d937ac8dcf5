"""Levenberg-Marquardt on the difference of the updates: from a good image to the exact one.

Minimises |r(x)|^2, r(x) = update(x) - shared update, over the images x, with the steps

    (J^T J + damping) s = -J^T r,      J the Jacobian of r at x.

Where there are more parameters than pixels and the network is smooth, the residual vanishes at the
true image alone, and near it each step squares the error. Far from it, and across the kinks of a
ReLU, it stalls: this polishes what another attack has found. The images are not kept in their box:
the solution lies inside it, and the way there may lead along its outside.

References: Levenberg 1944; Marquardt 1963; Nocedal & Wright 2006, section 10.3.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Float, Int

Residuals = Callable[[Array], Float[Array, " residual"]]

STATUS = ("steps", "converged", "stalled")  # how a trial ended: its steps were spent, or by itself
TOLERANCE = 1e-13  # of the residual, relative to the shared update: converged
FIRST_DAMPING, LEAST_DAMPING, MOST_DAMPING = 1e-4, 1e-18, 1e4  # relative to the largest diagonal
CG_ITERATIONS = 300
CHORDS = 12  # further steps with one factorisation, at the most


class Polished(NamedTuple):
    """The end of one trial."""

    x: Float[Array, "..."]
    residual: Float[Array, ""]  # |r| / |shared update|
    status: Int[Array, ""]  # position in `STATUS`
    trace: Float[Array, " step"]  # the residual after each step; NaN after the last


class _State(NamedTuple):
    """What the next step needs."""

    x: Array
    r: Array
    damping: Array  # relative
    system: "System"
    step: Array
    status: Array
    trace: Array


class System(NamedTuple):
    """The linear system at one image."""

    normal: Float[Array, "pixel pixel"] | None  # J^T J; None where it is not stored
    slope: Float[Array, " pixel"]  # J^T r
    scale: Float[Array, ""]  # the largest diagonal element of J^T J


def polish(
    residuals: Residuals, shared_norm: Array, x: Float[Array, "..."], steps: int, columns: int
) -> Polished:
    """Takes an image to where its residual vanishes, as far as steps and network allow.

    The damping falls by ten with every step that lowers the residual and rises by ten with one that
    does not, which is then not taken. The normal matrix is nearly all the work: where it is stored,
    its factorisation is used again as long as that halves the residual (the chord method; Kelley
    1995, Iterative Methods for Linear and Nonlinear Equations, section 5.4).

    Args:
      residuals: of the images, in any shape, to [residual]; once differentiable both ways.
      shared_norm: |shared update|, which residuals are relative to.
      x: the start, in float64.
      steps: at the most.
      columns: of J^T J that are computed at once; 0: it is not stored, conjugate gradients do.
    """
    shape = x.shape
    of = lambda flat: residuals(flat.reshape(shape))  # noqa: E731
    build = functools.partial(_dense_system, columns) if columns else _free_system

    def more(state):
        return (state.step < steps) & (state.status == 0)

    def step(state):
        damping = state.damping * state.system.scale
        if columns:
            size = len(state.x)
            factor = cho_factor(state.system.normal + damping * jnp.eye(size, dtype=x.dtype))
            there = state.x - cho_solve(factor, state.system.slope)
            there, r = _chords(of, factor, there)
        else:
            there = state.x - _conjugate_gradient(of, state.x, state.system.slope, damping)
            r = of(there)
        # A system that is no longer positive definite gives NaN, which is no success either.
        better = jnp.vdot(r, r) < jnp.vdot(state.r, state.r)
        x_next, r_next = (jnp.where(better, a, b) for a, b in ((there, state.x), (r, state.r)))
        residual = jnp.linalg.norm(r_next) / shared_norm
        converged = residual < TOLERANCE
        # Of a point that is the last no system is needed: it is nearly all the work.
        again = better & ~converged & (state.step + 1 < steps)
        system = lax.cond(again, lambda: build(of, there, r), lambda: state.system)
        damping = jnp.where(better, state.damping / 10, state.damping * 10)
        ends = jnp.array([converged, damping > MOST_DAMPING])
        status = jnp.where(ends.any(), 1 + ends.argmax(), 0).astype(jnp.int32)
        trace = state.trace.at[state.step].set(residual)
        damping = jnp.maximum(damping, LEAST_DAMPING)
        return _State(x_next, r_next, damping, system, state.step + 1, status, trace)

    flat = x.ravel()
    r = of(flat)
    start = _State(
        flat, r, jnp.asarray(FIRST_DAMPING, x.dtype), build(of, flat, r), jnp.int32(0),
        jnp.int32(0), jnp.full(steps, jnp.nan, x.dtype),
    )  # fmt: skip
    end = lax.while_loop(more, step, start)
    residual = jnp.linalg.norm(end.r) / shared_norm
    return Polished(end.x.reshape(shape), residual, end.status, end.trace)


def normal_matrix(
    of: Residuals, x: Float[Array, " pixel"], columns: int
) -> Float[Array, "pixel pixel"]:
    """Computes J^T J, some columns at once: each J^T (J e), a forward and a backward derivative.

    J is not stored: for a network with many parameters it would be all of the memory. For LeNetZhu
    this takes no longer than the product of a stored J with itself, by float64 convolutions.
    """
    _, linear = jax.linearize(of, x)
    transpose = jax.linear_transpose(linear, x)
    unit = lambda i: jax.nn.one_hot(i, len(x), dtype=x.dtype)  # noqa: E731
    column = lambda i: transpose(linear(unit(i)))[0]  # noqa: E731
    return lax.map(column, jnp.arange(len(x)), batch_size=columns)


def spectrum(
    residuals: Residuals, x: Float[Array, "..."], least: int, columns: int
) -> tuple[Float[Array, " pixel"], Float[Array, "least ..."]]:
    """How well each direction of the image is determined by the update.

    By the eigenvalues of J^T J: singular values below about 1e-8 of the largest are rounding.

    Args:
      residuals, x: as in `polish`; x at a solution.
      least: how many directions to return.
      columns: as in `polish`.

    Returns:
      The singular values of J, descending, and the unit images of the smallest, those first.
    """
    of = lambda flat: residuals(flat.reshape(x.shape))  # noqa: E731
    values, vectors = jnp.linalg.eigh(normal_matrix(of, x.ravel(), columns))
    singular = jnp.sqrt(jnp.maximum(values, 0))[::-1]
    return singular, vectors[:, :least].T.reshape(least, *x.shape)


def _chords(of: Residuals, factor: tuple, x: Array) -> tuple[Array, Array]:
    """Steps on with the normal matrix of a point nearby, while that halves the residual."""

    def more(carry):
        _, _, taken, halved = carry
        return halved & (taken < CHORDS)

    def chord(carry):
        x, r, taken, _ = carry
        there = x - cho_solve(factor, jax.vjp(of, x)[1](r)[0])
        r_there = of(there)
        halved = 4 * jnp.vdot(r_there, r_there) < jnp.vdot(r, r)
        x, r = (jnp.where(halved, a, b) for a, b in ((there, x), (r_there, r)))
        return x, r, taken + 1, halved

    return lax.while_loop(more, chord, (x, of(x), 0, jnp.bool_(True)))[:2]


def _dense_system(columns: int, of: Residuals, x: Array, r: Array) -> System:
    normal = normal_matrix(of, x, columns)
    return System(normal, jax.vjp(of, x)[1](r)[0], normal.diagonal().max())


def _free_system(of: Residuals, x: Array, r: Array) -> System:
    slope = jax.vjp(of, x)[1](r)[0]
    # Without the diagonal: the largest eigenvalue, by a few power iterations from the slope.
    _, linear = jax.linearize(of, x)
    transpose = jax.linear_transpose(linear, x)

    def power(_, direction):
        return transpose(linear(direction / jnp.linalg.norm(direction)))[0]

    return System(None, slope, jnp.linalg.norm(lax.fori_loop(0, 5, power, slope)))


def _conjugate_gradient(of: Residuals, x: Array, slope: Array, damping: Array) -> Array:
    """Solves (J^T J + damping) s = slope from products with J alone."""
    _, linear = jax.linearize(of, x)
    transpose = jax.linear_transpose(linear, x)
    product = lambda s: transpose(linear(s))[0] + damping * s  # noqa: E731
    return jax.scipy.sparse.linalg.cg(product, slope, tol=1e-12, maxiter=CG_ITERATIONS)[0]
