"""Annealed Gauss-Newton: the most probable image, given the update and a Gaussian image prior.

Minimizes, over the normalized images x of a client and where asked over the logits of their labels,

    sum over layers of |update(x) - shared|^2 / (2 v)  +  (x - mean)^T S^-1 (x - mean) / 2

with the noise variance v of each layer: what a defense that the attacker knows has added, and an
error of the model that falls geometrically from step to step. While it is large the prior decides,
the problem is nearly linear and has one solution; as it falls, the solution is followed
(graduated optimization). So no random initial image is needed, and the loss of digits in float32 is
all that ends it. An attacker who does not know of noise finds it: no variance is taken below the
mean square of what is left of its layer's residual.

Each step linearizes the update, J = d update / d x, solves

    (J^T J / v + S^-1) d = gradient

by preconditioned conjugate gradients from products with J and its transpose alone, and halves d
until the loss falls. A learning rate or a clip may have scaled the update: the candidate's is taken
at the multiple that is nearest to the shared one, and differentiated so (variable projection; Golub
& Pereyra 1973).

All of it is in the prior's coefficients, where S is diagonal. The
preconditioner is diagonal there too, 1 / (1 / S + m) with m a part of the mean diagonal of
J^T J / v: the prior alone, S, is a bad one as soon as the update says more than it.

References: Nocedal & Wright 2006, chapters 7 and 10; Blake & Zisserman 1987 (graduated
  optimization); Balunović et al. 2022, arXiv 2111.04706 (the Bayes attacker).
"""

import dataclasses
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinv import rng
from jaxinv.attacks.base import (
    Assumed,
    Attack,
    Candidate,
    Family,
    Known,
    Losses,
    Simulation,
    scale_towards,
    simulate_update,
)
from jaxinv.attacks.objectives import OBJECTIVES, compare
from jaxinv.data.image_prior import coefficients, synthesize
from jaxinv.learned import nets, params_of
from jaxinv.types import PyTree, named

SHIFT = 1e-3  # of the preconditioner, in units of the mean diagonal of J^T J / v
LEAST_POWER = 1e-6  # of a layer's mean square, in units of that of all: none is without scale
LOGITS_VARIANCE = 4.0  # of the labels' logits, where they are not known
CG_TOLERANCE = 1e-4  # of the residual, relative to the gradient
HALVINGS = 8
LEVEL = 0.15  # of the noise that a denoiser is told, in units of pixels
PROBE = 7  # names the random direction by which a mean diagonal is estimated
SYMMETRY_BREAKING = 1e-3  # of the prior's standard deviation

add, dot, multiply, size = optax.tree.add, optax.tree.vdot, optax.tree.mul, optax.tree.size

# The first coefficients, in units of the prior's standard deviations. From the mean itself images
# of one label would never part.
PRIOR_INITS: dict[str, float] = {"mean": SYMMETRY_BREAKING, "prior": 1.0}

# Coefficients of the images and, where they are not known, logits of the labels.
Unknowns = tuple[Array, Array | None]


class Numbers(NamedTuple):
    """What is traced. Each may differ from seed to seed."""

    anneal_from: Float[Array, "*seed"]  # model error's variance, in units of a layer's mean square
    anneal_to: Float[Array, "*seed"]
    damping: Float[Array, "*seed"]
    tolerance: Float[Array, "*seed"]
    prior_denoiser: Float[Array, "*seed"]
    client_lr: Float[Array, "*seed"]  # that the attacker simulates
    iterations: Int[Array, ""]


class State(NamedTuple):
    """What the next step of one trial needs."""

    candidate: Candidate
    active: Bool[Array, ""]  # whether the last step was worth another


class Belief(NamedTuple):
    """What is believed of the unknowns at one step, beside what the update says of them."""

    center: Unknowns
    precisions: Unknowns  # diagonal

    def energy(self, unknowns: Unknowns) -> Float[Array, ""]:
        """Half the squared distance to the center, in units of the belief's spread."""
        away = optax.tree.sub(unknowns, self.center)
        return dot(away, multiply(self.precisions, away)) / 2


class Linearized(NamedTuple):
    """The residuals around one candidate, and the products of their derivative."""

    residuals: PyTree
    jvp: Callable[[Unknowns], PyTree]
    vjp: Callable[[PyTree], Unknowns]


class System(NamedTuple):
    """The linear system of one step, J^T J / v + S^-1, as products."""

    linear: Linearized
    weights: PyTree  # 1 / v, a scalar a leaf
    ridge: Unknowns  # S^-1, and the damping
    scale: Unknowns  # of the preconditioner

    def product(self, direction: Unknowns) -> Unknowns:
        """The system's matrix times a direction."""
        curved = self.linear.vjp(multiply(self.weights, self.linear.jvp(direction)))
        return add(curved, multiply(self.ridge, direction))

    def solve(self, right: Unknowns, iterations: Array | int) -> Unknowns:
        """Solves for a right-hand side by preconditioned conjugate gradients."""
        return jax.scipy.sparse.linalg.cg(
            self.product,
            right,
            tol=CG_TOLERANCE,
            maxiter=iterations,
            M=lambda r: multiply(self.scale, r),
        )[0]


@dataclasses.dataclass(frozen=True)
class GaussNewton(Attack):
    """What shapes the compiled program: a change recompiles."""

    init_from: str = "mean"  # a name of `PRIOR_INITS`
    cg_iterations: int = 80
    classes: int = 0  # where the labels are optimized beside the images, else 0
    denoiser: bool = False  # whether the attacker's own is asked in place of the prior's mean
    any_scale: bool = True  # whether the update may be a multiple of what it is taken for

    Numbers = Numbers
    steps_per_call = 4

    @property
    def needs_image_prior(self) -> bool:
        """It is what the attack minimizes beside the residual."""
        return True

    @property
    def passes_per_step(self) -> int:
        """Those of conjugate gradients."""
        return self.cg_iterations

    def numbers(self, seeds: int, settings: Mapping[str, Any]) -> Numbers:
        """Makes the traced part of settings; without a word of it a denoiser has no share."""
        return super().numbers(seeds, ChainMap(settings, {"prior_denoiser": 0.0}))

    def init(
        self,
        numbers: Numbers,
        key: Array,
        shape: tuple[int, ...],
        known: Known,
        initial: Candidate | None = None,
    ) -> State:
        """Starts at the prior's mean, or at a draw from the prior."""
        del numbers
        prior = known.image_prior
        dtype = prior.mean.dtype
        if initial is None:
            scale = PRIOR_INITS[self.init_from]
            draw = scale * jax.random.normal(key, shape, jnp.float32).astype(dtype)
            images = prior.mean + synthesize(prior, jnp.sqrt(prior.variances) * draw)
            logits = jnp.zeros((shape[0], self.classes), dtype) if self.classes else None
            initial = Candidate(images, logits)
        return State(initial, jnp.bool_(True))

    def model_error(self, numbers: Numbers, index: Int[Array, ""]) -> Float[Array, ""]:
        """The model error's variance at a step: geometric, from the first number to the last."""
        share = jnp.minimum(index / jnp.maximum(numbers.iterations - 1, 1), 1)
        return numbers.anneal_from ** (1 - share) * numbers.anneal_to**share

    def step(
        self, numbers: Numbers, known: Known, index: Int[Array, ""], state: State
    ) -> tuple[State, Losses]:
        """Takes one step of one trial; see `base.Attack`."""
        residuals_of = self.residual_function(numbers, known)
        unknowns = to_unknowns(known, state.candidate)
        objective = named(OBJECTIVES, self.objective)(compare(*residuals_of(unknowns)[1]))
        belief = self.belief(numbers, known, index, unknowns)
        losses = Losses(objective, belief.energy(unknowns) / size(unknowns))

        def move(state):
            moved, active = self._step(
                numbers, known, index, residuals_of, unknowns, belief, state.active
            )
            active &= state.active
            candidate = to_candidate(known, moved)

            def keep(new, old):
                return jnp.where(state.active, new, old)

            return State(jax.tree.map(keep, candidate, state.candidate), active)

        # A real branch, also under vmap: all trials are at the same step.
        return lax.cond(index < numbers.iterations, move, lambda state: state, state), losses

    def _step(self, numbers, known, index, residuals_of, unknowns, belief, active):
        """Moves to the next solution; says whether anything is left to gain at the last level."""

        def residuals(u):
            return residuals_of(u)[0]

        error = self.model_error(numbers, index)
        system = self.system(numbers, known, residuals, unknowns, error, belief.precisions)
        fit = system.linear.vjp(multiply(system.weights, system.linear.residuals))
        away = optax.tree.sub(unknowns, belief.center)
        slope = add(fit, multiply(belief.precisions, away))
        descent = system.solve(slope, jnp.where(active, self.cg_iterations, 0))

        def loss(u):
            r = residuals(u)
            return dot(r, multiply(system.weights, r)) / 2 + belief.energy(u)

        here = loss(unknowns)

        def there(length):
            return jax.tree.map(lambda u, d: u - length * d, unknowns, descent)

        def halve(carry):
            length, halvings, _ = carry
            return length / 2, halvings + 1, loss(there(length / 2))

        length, _, after = lax.while_loop(
            lambda carry: active & ~(carry[2] < here) & (carry[1] < HALVINGS),
            halve,
            (jnp.ones_like(here), 0, loss(there(1.0))),
        )
        better = after < here
        moved = jax.tree.map(lambda new, old: jnp.where(better, new, old), there(length), unknowns)
        # Where the level stands still, as it does where the noise is, little is left to gain; while
        # it falls there always is.
        next_error = self.model_error(numbers, index + 1)
        later = self.precisions(known, system.linear.residuals, next_error)

        def ratio(new, old):
            return jnp.where(old > 0, new / old, 1)

        ratios = jax.tree.leaves(jax.tree.map(ratio, later, system.weights))
        falls = jnp.stack(ratios).max() > 1 + numbers.tolerance
        gains = better & (here - after > numbers.tolerance * here)
        return moved, falls | gains | self.denoiser

    def system(
        self,
        numbers: Numbers,
        known: Known,
        residuals: Callable[[Unknowns], PyTree],
        unknowns: Unknowns,
        error: Float[Array, ""],
        pull: Unknowns,
    ) -> System:
        """Linearizes the residuals, with the noise of each layer for a model error's variance.

        Args:
          numbers, known: as in `step`.
          residuals: as a function of the unknowns.
          unknowns: around which.
          error: the model error's variance.
          pull: precisions of what is believed of the unknowns.
        """
        linear = linearize(residuals, unknowns)
        weights = self.precisions(known, linear.residuals, error)
        # The mean diagonal of J^T J / v, by one random direction (Hutchinson 1989).
        seen = linear.jvp(random_signs(unknowns))
        level = dot(seen, multiply(weights, seen)) / size(unknowns)
        ridge = jax.tree.map(lambda r: r + numbers.damping * level, pull)
        scale = jax.tree.map(lambda r: 1 / (r + SHIFT * level), ridge)
        return System(linear, weights, ridge, scale)

    def belief(
        self, numbers: Numbers, known: Known, index: Int[Array, ""], unknowns: Unknowns
    ) -> Belief:
        """What the image prior says; in the second half of the steps a denoiser has a share in it.

        By Tweedie's formula (x - D(x)) / level^2 is the slope of -log of the density of images with
        noise of that level (Romano, Elad, Milanfar 2017, arXiv 1611.02862). D(x) stands still for a
        step: half-quadratic splitting (Zhang et al. 2021, arXiv 2008.13751). `prior_denoiser` is
        its share; at 1 nothing is left of the Gaussian.
        """
        plain, logits = prior_precisions(known, unknowns)
        center, of_logits = jax.tree.map(jnp.zeros_like, unknowns)
        if not self.denoiser:
            return Belief((center, of_logits), (plain, logits))
        normalization, prior = known.normalization, known.image_prior
        images = to_candidate(known, unknowns).images
        pixels = images * normalization.std + normalization.mean
        denoised = nets.denoise(params_of(known.learned, "denoiser"), pixels, jnp.asarray(LEVEL))
        share = jnp.where(2 * index >= numbers.iterations, numbers.prior_denoiser, 0)
        own = share * jnp.square(normalization.std.mean() / LEVEL)
        both = own + (1 - share) * plain
        center = own / both * coefficients(prior, normalization.normalize(denoised) - prior.mean)
        return Belief((center, of_logits), (both, logits))

    def precisions(self, known: Known, residuals: PyTree, error: Float[Array, ""]) -> PyTree:
        """1 / v of each layer, a scalar a leaf: of known noise and of the model's error.

        v is at least the mean square of the residual: one that does not fall is noise, or an error
        of the model, whatever is known and the schedule says.
        """
        shared = observed(known)
        powers = jax.tree.map(lambda x: jnp.mean(jnp.square(x)), shared)
        total = mean_square(shared)

        def precision(power, noise, r):
            modeled = noise + error * jnp.maximum(power, LEAST_POWER * total)
            return 1 / jnp.maximum(modeled, jnp.mean(jnp.square(r)))

        return jax.tree.map(precision, powers, known_noise(known, bool(self.defense)), residuals)

    def residual_function(
        self, numbers: Numbers, known: Known
    ) -> Callable[[Unknowns], tuple[PyTree, tuple[PyTree, PyTree]]]:
        """The residuals as a function of the unknowns, and the update with the shared one."""
        simulation = Simulation(self.local, False, self.defense)
        shared = observed(known)

        def residuals(unknowns):
            candidate = to_candidate(known, unknowns)
            update, statistics = simulate_update(simulation, known, numbers.client_lr, candidate)
            if self.any_scale:
                update = scale_towards(update, known.target.update)
            sent = (update, statistics if jax.tree.leaves(known.target.statistics) else ())
            return jax.tree.map(jnp.subtract, sent, shared), (update, known.target.update)

        return residuals


def observed(known: Known) -> tuple[PyTree, PyTree]:
    """All that the client sent: its update, and the statistics of its batch where they are."""
    return known.target.update, known.target.statistics


def mean_square(tree: PyTree) -> Float[Array, ""]:
    """The mean square of a tree's numbers, over all leaves together."""
    return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)) / size(tree)


def known_noise(known: Known, defended: bool) -> tuple[PyTree, PyTree]:
    """Variances of the noise in what was observed, a scalar a leaf; 0 where none is known.

    Args:
      known: all that the attacker has.
      defended: whether it knows of a defense.
    """
    nothing = jax.tree.map(lambda x: jnp.zeros((), x.dtype), observed(known))
    return (known.target.defense_knowledge.variances, nothing[1]) if defended else nothing


def to_unknowns(known: Known, candidate: Candidate) -> Unknowns:
    """A candidate in the prior's coefficients."""
    prior = known.image_prior
    return coefficients(prior, candidate.images - prior.mean), candidate.logits


def to_candidate(known: Known, unknowns: Unknowns) -> Candidate:
    """The candidate of coefficients."""
    prior = known.image_prior
    return Candidate(prior.mean + synthesize(prior, unknowns[0]), unknowns[1])


def prior_precisions(known: Known, unknowns: Unknowns) -> Unknowns:
    """S^-1, which is diagonal, for each of the unknowns."""
    of_images = jnp.broadcast_to(1 / known.image_prior.variances, unknowns[0].shape)
    logits = unknowns[1]
    return of_images, None if logits is None else jnp.full_like(logits, 1 / LOGITS_VARIANCE)


def linearize(residuals: Callable[[Unknowns], PyTree], unknowns: Unknowns) -> Linearized:
    """Residuals, and J and its transpose as functions: J is not stored."""
    value, jvp = jax.linearize(residuals, unknowns)
    transpose = jax.linear_transpose(jvp, unknowns)
    return Linearized(value, jvp, lambda r: transpose(r)[0])


def random_signs(like: PyTree) -> PyTree:
    """A direction of signs, always the same."""

    def draw(key, x):
        return jax.random.rademacher(key, x.shape, jnp.int32).astype(x.dtype)

    return rng.over_leaves(jax.random.key(PROBE), like, draw)


def make(settings: Any, assumed: Assumed) -> GaussNewton:
    """The attack of a cell's settings."""
    return GaussNewton.of_settings(
        settings,
        assumed,
        init_from=settings.init,
        cg_iterations=settings.cg_iterations,
        classes=assumed.classes,
        denoiser=settings.prior_denoiser > 0,
    )


FAMILY = Family(
    make,
    frozenset(
        {
            "init",
            "iterations",
            "polish",
            "adaptive",
            "image_prior",
            "cg_iterations",
            "anneal_from",
            "anneal_to",
            "damping",
            "tolerance",
            "posterior",
            "prior_denoiser",
            "denoiser",
        }
    ),
    inits=tuple(PRIOR_INITS),
    only_smooth=True,
)
