"""Levenberg-Marquardt on the difference of the updates: from a good image to the exact one.

Minimizes |r(x)|^2, r(x) = update(x) - shared update, over the images x, with the steps

    (J^T J + damping D) s = J^T r,      J the Jacobian of r at x, D the diagonal of J^T J.

Where there are more parameters than pixels and the network is smooth, the residual vanishes at the
true image alone, and near it each step squares the error. Far from it, and across the kinks of a
ReLU, it stalls: this polishes what another attack has found. There is no prior, and the images are
not kept in their box: the solution lies inside it, and the way there may lead along its outside.

The system is solved in float64 by conjugate gradients. Their preconditioner is J^T J itself at the
first of some points, rounded to float32 and factorized there: a matrix that is right to seven
digits leaves of ten or fourteen orders of magnitude between the singular values three at the most.

References: Levenberg 1944; Marquardt 1963; Nocedal & Wright 2006, section 10.3; Carson & Higham
  2018 (factorizations in a lower precision as preconditioners).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinv import client
from jaxinv.attacks.base import (
    Attack,
    Candidate,
    Known,
    Losses,
    Simulation,
    scale_towards,
    simulate_update,
)
from jaxinv.attacks.objectives import OBJECTIVES, compare
from jaxinv.types import PyTree, named

Residuals = Callable[[Array], Float[Array, " residual"]]

STATUS = ("steps", "converged", "stalled")  # how a trial ended: its steps were spent, or by itself
TOLERANCE = 1e-13  # of the residual, relative to the shared update: converged
FIRST_DAMPING, LEAST_DAMPING, MOST_DAMPING = 1e-6, 1e-18, 1e2  # relative to the diagonal
REUSES = 12  # Newton steps under one factorization, at the most
CG_ITERATIONS = 300
CG_TOLERANCE = 1e-10
SHIFT = 1e-4  # of the preconditioner, with a unit diagonal: float32 is not positive definite below
COLUMNS = 16  # of J^T J at once


class Numbers(NamedTuple):
    """What is traced."""

    client_lr: Float[Array, "*seed"]  # that the attacker simulates
    iterations: Int[Array, ""]


class State(NamedTuple):
    """What the next step of one trial needs."""

    candidate: Candidate
    damping: Float[Array, ""]
    status: Int[Array, ""]  # position in `STATUS`


class Point(NamedTuple):
    """An image on the way, and how the last step to it went."""

    x: Float[Array, " pixel"]
    r: Float[Array, " residual"]
    damping: Float[Array, ""]
    taken: Int[Array, ""]
    halved: Array  # whether the residual fell by half


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt(Attack):
    """What shapes the compiled program."""

    columns: int = COLUMNS  # of J^T J that are computed at once; 0: no preconditioner

    Numbers = Numbers

    def init(
        self,
        numbers: Numbers,
        key: Array,
        shape: tuple[int, ...],
        known: Known,
        initial: Candidate | None,
    ) -> State:
        """Starts where another attack ended; labels found beside the images stand."""
        del numbers, key, shape
        if initial is None:
            raise ValueError("Levenberg-Marquardt polishes what another attack has found")
        dtype = known.normalization.mean.dtype
        initial = jax.tree.map(lambda x: x.astype(dtype), initial)
        return State(initial, jnp.asarray(FIRST_DAMPING, dtype), jnp.int32(0))

    def outcome(self, state: State) -> dict[str, Array]:
        """How each trial ended."""
        return {"status": np.array(STATUS)[np.asarray(state.status)]}

    def smaller(self) -> "LevenbergMarquardt | None":
        """Fewer columns at once, at last none."""
        return self.replace(columns=self.columns // 4) if self.columns else None

    def step(
        self, numbers: Numbers, known: Known, index: Int[Array, ""], state: State
    ) -> tuple[State, Losses]:
        """Takes the steps of one factorization; see `base.Attack`."""
        update = update_function(self.local, numbers.client_lr, known, state.candidate)
        shared = known.target.update
        here = scale_towards(update(state.candidate.images), shared)
        objective = named(OBJECTIVES, self.objective)(compare(here, shared))

        def move(state):
            images = state.candidate.images
            flat_shared = flat(shared)

            def residuals(x):
                return flat(scale_towards(update(x.reshape(images.shape)), shared)) - flat_shared

            x, damping, status = descend(
                residuals, jnp.linalg.norm(flat_shared), images.ravel(), state.damping, self.columns
            )
            candidate = state.candidate._replace(images=x.reshape(images.shape))
            moved = State(candidate, damping, status)
            return jax.tree.map(lambda a, b: jnp.where(state.status == 0, a, b), moved, state)

        go = index < numbers.iterations
        losses = Losses(objective, jnp.zeros_like(objective))
        return lax.cond(go, move, lambda state: state, state), losses


def descend(
    residuals: Residuals,
    shared_norm: Array,
    x: Float[Array, " pixel"],
    damping: Array,
    columns: int,
) -> tuple[Float[Array, " pixel"], Array, Int[Array, ""]]:
    """Takes Newton steps under one preconditioner, as long as they halve the residual.

    The damping falls by a hundred with every step that lowers the residual and rises by a hundred
    with one that does not, which is then not taken.

    Args:
      residuals: of the images in a row; once differentiable both ways.
      shared_norm: |shared update|, which residuals are relative to.
      x: the initial image.
      damping: relative to the diagonal of J^T J.
      columns: of J^T J that are computed at once; 0: no preconditioner.

    Returns:
      The end, the damping, and the status, a position in `STATUS`.
    """
    factor, diagonal = preconditioner(residuals, x, columns)

    def precondition(r):
        return r

    if columns:
        root = lax.rsqrt(diagonal)

        # The factor is kept in float32, half the memory; its product with its transpose is positive
        # definite whatever is rounded.
        def low(v):
            return (factor @ v.astype(factor.dtype)).astype(x.dtype)

        def high(v):
            return (v.astype(factor.dtype) @ factor).astype(x.dtype)

        def precondition(r):
            return root * high(low(root * r))

    def step(point):
        _, jvp = jax.linearize(residuals, point.x)
        transpose = jax.linear_transpose(jvp, point.x)
        slope = transpose(point.r)[0]
        ridge = point.damping * diagonal

        def product(s):
            return transpose(jvp(s))[0] + ridge * s

        s, _ = jax.scipy.sparse.linalg.cg(
            product, slope, tol=CG_TOLERANCE, maxiter=CG_ITERATIONS, M=precondition
        )
        there = point.x - s
        r = residuals(there)
        ratio = jnp.vdot(r, r) / jnp.vdot(point.r, point.r)
        better = ratio < 1  # not so where it is NaN
        x, r = (jnp.where(better, a, b) for a, b in ((there, point.x), (r, point.r)))
        damping = jnp.where(
            better, jnp.maximum(point.damping / 100, LEAST_DAMPING), point.damping * 100
        )
        return Point(x, r, damping, point.taken + 1, ~better | (ratio < 0.25))

    def more(point):
        left = jnp.linalg.norm(point.r) >= TOLERANCE * shared_norm
        return left & point.halved & (point.taken < REUSES) & (point.damping <= MOST_DAMPING)

    r = residuals(x)
    end = lax.while_loop(more, step, Point(x, r, damping, jnp.int32(0), jnp.bool_(True)))
    converged = jnp.linalg.norm(end.r) < TOLERANCE * shared_norm
    status = jnp.where(converged, 1, jnp.where(end.damping > MOST_DAMPING, 2, 0))
    return end.x, end.damping, status.astype(jnp.int32)


def preconditioner(
    residuals: Residuals, x: Float[Array, " pixel"], columns: int
) -> tuple[Float[Array, "pixel pixel"] | None, Float[Array, " pixel"]]:
    """L^-1 of the normal matrix L L^T with a unit diagonal, in float32; and that diagonal.

    Without columns the diagonal is the mean one, by one random direction, and there is no factor.
    """
    if not columns:
        signs = jax.random.rademacher(jax.random.key(0), x.shape, jnp.int32).astype(x.dtype)
        seen = jax.jvp(residuals, (x,), (signs,))[1]
        return None, jnp.full_like(x, jnp.vdot(seen, seen) / x.size)
    single = x.astype(jnp.float32)
    normal = normal_matrix(lambda y: residuals(y).astype(jnp.float32), single, columns)
    diagonal = jnp.maximum(normal.diagonal(), 1e-12 * normal.diagonal().max())
    root = lax.rsqrt(diagonal)
    unit = jnp.eye(x.size, dtype=jnp.float32)
    scaled = root[:, None] * normal * root
    factor = jax.scipy.linalg.solve_triangular(
        jnp.linalg.cholesky(scaled + SHIFT * unit), unit, lower=True
    )
    return factor, diagonal.astype(x.dtype)


def normal_matrix(
    residuals: Residuals, x: Float[Array, " pixel"], columns: int
) -> Float[Array, "pixel pixel"]:
    """Computes J^T J, some columns at once: each J^T (J e), a forward and a backward derivative.

    J is not stored: for a network with many parameters it would be all of the memory. For LeNetZhu
    this takes no longer than the product of a stored J with itself, by float64 convolutions.
    """
    _, linear = jax.linearize(residuals, x)
    transpose = jax.linear_transpose(linear, x)

    def unit(i):
        return jax.nn.one_hot(i, len(x), dtype=x.dtype)

    def column(i):
        return transpose(linear(unit(i)))[0]

    return lax.map(column, jnp.arange(len(x)), batch_size=columns)


def update_function(
    local: client.Local, client_lr: Array, known: Known, candidate: Candidate
) -> Callable[[Array], PyTree]:
    """The update that images would cause, a function of them; labels are the candidate's."""
    return lambda images: simulate_update(
        Simulation(local), known, client_lr, candidate._replace(images=images)
    )[0]


def flat(tree: PyTree) -> Float[Array, " entry"]:
    """All leaves in a row."""
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
