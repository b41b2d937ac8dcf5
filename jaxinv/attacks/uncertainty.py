"""What an update leaves open, around an image that an attack has found.

Two answers, both from the update's Jacobian J at that image and both run as attacks that do not
move: the spectrum of J, which says how well each direction is determined, and draws from the
posterior of `gauss_newton`, which say how far each pixel may be off.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinv import rng
from jaxinv.attacks import gauss_newton as gn
from jaxinv.attacks.base import Attack, Candidate, Known, Losses
from jaxinv.attacks.levenberg_marquardt import COLUMNS, flat, normal_matrix, update_function

LEAST_DETERMINED = 6  # directions of a spectrum that are kept
DRAWS_AT_ONCE = 8
CG_FACTOR = 4  # times the products of a step: nothing else repairs what a draw lacks


class SpectrumState(NamedTuple):
    """What was found of one trial."""

    candidate: Candidate
    values: Float[Array, " pixel"]  # singular values of J, descending
    directions: Float[Array, "least image height width channel"]  # of the last, the last first


class SpectrumNumbers(NamedTuple):
    """What is traced."""

    client_lr: Float[Array, "*seed"]
    iterations: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Spectrum(Attack):
    """The singular values of J in one step, by the eigenvalues of J^T J.

    Values below about 1e-8 of the largest are rounding, in float64.
    """

    columns: int = COLUMNS  # of J^T J that are computed at once

    Numbers = SpectrumNumbers

    def numbers(self, seeds: int, settings: Mapping[str, Any]) -> SpectrumNumbers:
        """Makes the traced part of settings: one step."""
        return super().numbers(seeds, {**settings, "iterations": 1})

    def init(self, numbers, key, shape, known, initial) -> SpectrumState:
        """Room for what will be found, at the image another attack has found."""
        del numbers, key
        dtype = known.normalization.mean.dtype
        initial = jax.tree.map(lambda x: x.astype(dtype), initial)
        pixels = initial.images.size
        least = min(LEAST_DETERMINED, pixels)
        return SpectrumState(initial, jnp.zeros(pixels, dtype), jnp.zeros((least, *shape), dtype))

    def outcome(self, state: SpectrumState) -> dict[str, Array]:
        """The singular values and the least determined directions."""
        return {"values": state.values, "directions": state.directions}

    def step(self, numbers, known: Known, index, state):
        """Finds the spectrum; see `base.Attack`."""

        def find(state):
            images = state.candidate.images
            update = update_function(self.local, numbers.client_lr, known, state.candidate)

            def residuals(x):
                return flat(update(x.reshape(images.shape)))

            normal = normal_matrix(residuals, images.ravel(), self.columns)
            values, vectors = jnp.linalg.eigh(normal)
            least = vectors[:, : len(state.directions)].T.reshape(state.directions.shape)
            return state._replace(values=jnp.sqrt(jnp.maximum(values, 0))[::-1], directions=least)

        zero = jnp.zeros((), state.values.dtype)
        found = lax.cond(index < numbers.iterations, find, lambda state: state, state)
        return found, Losses(zero, zero)


class PosteriorState(NamedTuple):
    """Sums over the draws so far."""

    candidate: Candidate
    key: Array
    squares: Float[Array, "image height width channel"]  # of the draws' distances to the image
    draws: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Posterior(Attack):
    """The standard deviation of each pixel in the Gaussian approximation of the posterior.

    Of draws d that solve the system of a Gauss-Newton step for noise in place of the gradient,

        (J^T J / v + S^-1) d = J^T e / sqrt(v) + S^(-1/2) n,     e, n standard normal,

    whose covariance is that of the posterior around the image (Papandreou & Yuille 2010: perturb
    and solve). v is what it is at the attack's last step: known noise, or the mean square of the
    residual that was left where that is larger.
    """

    attack: gn.GaussNewton = dataclasses.field(default_factory=gn.GaussNewton)

    def numbers(self, seeds: int, settings: Mapping[str, Any]) -> gn.Numbers:
        """Those of the attack, with as many steps as the draws take."""
        steps = -(-int(settings["posterior"]) // DRAWS_AT_ONCE)
        own = self.attack.numbers(seeds, settings)
        return own._replace(iterations=np.int32(steps), anneal_from=own.anneal_to)

    def init(self, numbers, key, shape, known, initial) -> PosteriorState:
        """No draws, at the image that the attack has found."""
        del numbers, shape
        dtype = known.normalization.mean.dtype
        initial = jax.tree.map(lambda x: x.astype(dtype), initial)
        return PosteriorState(initial, key, jnp.zeros_like(initial.images), jnp.int32(0))

    def outcome(self, state: PosteriorState) -> dict[str, Array]:
        """The image, and the standard deviation of each pixel; normalized."""
        count = np.maximum(np.asarray(state.draws), 1)
        squares = np.asarray(state.squares)
        std = np.sqrt(squares / count.reshape(*count.shape, *[1] * 4))
        return {"images": state.candidate.images, "std": std}

    def step(self, numbers, known: Known, index, state):
        """Takes some draws; see `base.Attack`."""

        def draw(state):
            residuals_of = self.attack.residual_function(numbers, known)
            unknowns = gn.to_unknowns(known, state.candidate)
            # What is believed at the attack's last step.
            belief = self.attack.belief(numbers, known, numbers.iterations, unknowns)
            system = self.attack.system(
                numbers._replace(damping=jnp.zeros_like(numbers.damping)),  # no part of the belief
                known,
                lambda u: residuals_of(u)[0],
                unknowns,
                numbers.anneal_to,
                belief.precisions,
            )

            def one(key):
                of_update, of_prior = jax.random.split(key)
                noise = jax.tree.map(
                    lambda w, e: jnp.sqrt(w) * e,
                    system.weights,
                    normal_like(of_update, system.linear.residuals),
                )
                pull = jax.tree.map(
                    lambda r, n: jnp.sqrt(r) * n, system.ridge, normal_like(of_prior, unknowns)
                )
                right = gn.add(system.linear.vjp(noise), pull)
                found = system.solve(right, CG_FACTOR * self.attack.cg_iterations)
                moved = gn.to_candidate(known, gn.add(unknowns, found))
                return jnp.square(moved.images - state.candidate.images)

            key, own = jax.random.split(state.key)
            squares = jax.vmap(one)(jax.random.split(own, DRAWS_AT_ONCE)).sum(axis=0)
            return PosteriorState(
                state.candidate, key, state.squares + squares, state.draws + DRAWS_AT_ONCE
            )

        zero = jnp.zeros((), state.squares.dtype)
        found = lax.cond(index < numbers.iterations, draw, lambda state: state, state)
        return found, Losses(zero, zero)


def normal_like(key: Array, tree: Any) -> Any:
    """Standard normal numbers in a tree's shapes."""
    return rng.over_leaves(key, tree, lambda k, x: jax.random.normal(k, x.shape, x.dtype))
