"""Smoothed Gauss-Newton: towards the most probable image of a network with kinks.

The update of a ReLU network is a step function of the image: between two kinks it is nearly linear,
and its derivative there says nothing of what lies behind them. So the attack keeps a belief, a
Gaussian around the current image, and linearizes the update over the belief in place of at a point
(iterated statistical linearization). All is in the whitened coefficients z of the image prior,
x = mean + B sqrt(S) z, which a priori are N(0, 1); the belief's spread is one number for each. From
z = 0 and the prior's own spread, each step

1. draws images from the belief, in pairs on either side of its center, and computes their updates:
   their mean g, and at every kink of the network (`networks.kinks`) the spread of its input;
2. rounds each kink off by its spread: J, the Jacobian of the smoothed network at the center;
3. measures for every entry of the update the variance v over the draws that J does not explain;
   with the noise it makes the entry's own weight, w = 1 / (inflation v + noise). The noise is
   known, or what of a layer's residual is far above the scatter of the draws;
4. solves (J^T w J + 1) d = J^T w (g - shared) + z by conjugate gradients, preconditioned by the
   spread, and moves z by the one of d, d / 2 and d / 4 that leaves the least loss over some draws;
5. takes the spread that J leaves, 1 / sqrt(1 + diag J^T w J), but narrows it by no more than a
   factor a step: what it believes too early it cannot take back.

The entries' errors are far from independent, as they come of the same kinks: `inflation` stands for
how many of them count as one. It does not apply to noise, which is independent.

References: García-Fernández, Svensson, Morelande, Särkkä 2015 (posterior linearization filter):
  step 1 and the mean of v, with a Jacobian by regression on the draws, which for thousands of
  unknowns would take as many draws. The smoothed network's in its place, the weight of each entry,
  the inflation and the slow narrowing are this package's own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinv import client, rng
from jaxinv.attacks.base import (
    Assumed,
    Attack,
    Candidate,
    Family,
    Known,
    Losses,
    Simulation,
    simulate_update,
)
from jaxinv.attacks.gauss_newton import (
    LEAST_POWER,
    PRIOR_INITS,
    known_noise,
    linearize,
    mean_square,
    observed,
)
from jaxinv.attacks.objectives import OBJECTIVES, compare
from jaxinv.data.image_prior import ImagePrior, unwhiten, whiten
from jaxinv.errors import UserError
from jaxinv.networks import kinks
from jaxinv.types import PyTree, named

NARROWEST = 0.005  # spread that the belief can have at the end, in units of the prior's
STEP_LENGTHS = (1.0, 0.5, 0.25)
PROBES = 4  # random directions that estimate a diagonal
NEIGHBORS = 41  # coefficients of like prior variance over which it is averaged
CG_TOLERANCE = 1e-3  # of the residual, relative to the right-hand side
LEAST_VARIANCE = 1e-10  # of an entry, in units of its layer's mean square
SURPRISE = 4.0  # mean square of a layer's residual, over that of its scatter, that noise explains
LEAST_KINK = 1e-6  # spread of a kink's input

dot, multiply, subtract = optax.tree.vdot, optax.tree.mul, optax.tree.sub

Whitened = Float[Array, "image height width channel"]  # coefficients in units of the prior's spread


class Numbers(NamedTuple):
    """What is traced. Each may differ from seed to seed."""

    inflation: Float[Array, "*seed"]
    client_lr: Float[Array, "*seed"]  # that the attacker simulates
    iterations: Int[Array, ""]


class State(NamedTuple):
    """What the next step of one trial needs."""

    candidate: Candidate
    spread: Whitened  # of the belief
    key: Array  # of the draws


@dataclasses.dataclass(frozen=True)
class SmoothedGaussNewton(Attack):
    """What shapes the compiled program: a change recompiles."""

    init_from: str = "mean"  # a name of `gauss_newton.PRIOR_INITS`
    cg_iterations: int = 30
    draws: int = 16  # of the belief at each step, an even number

    Numbers = Numbers

    @property
    def needs_image_prior(self) -> bool:
        """It is what the attack minimizes beside the residual."""
        return True

    @property
    def passes_per_step(self) -> int:
        """Those of conjugate gradients."""
        return self.cg_iterations

    def init(
        self,
        numbers: Numbers,
        key: Array,
        shape: tuple[int, ...],
        known: Known,
        initial: Candidate | None = None,
    ) -> State:
        """Starts at the prior's mean, or at a draw from the prior, and believes the prior."""
        del numbers
        dtype = known.image_prior.mean.dtype
        of_start, of_draws = jax.random.split(key)
        if initial is None:
            draw = jax.random.normal(of_start, shape, jnp.float32).astype(dtype)
            images = unwhiten(known.image_prior, PRIOR_INITS[self.init_from] * draw)
            initial = Candidate(images, None)
        return State(initial, jnp.ones(shape, dtype), of_draws)

    def step(
        self, numbers: Numbers, known: Known, index: Int[Array, ""], state: State
    ) -> tuple[State, Losses]:
        """Takes one step of one trial; see `base.Attack`."""
        z = whiten(known.image_prior, state.candidate.images)
        update, _ = self.observe(numbers, known, known.loss, z)[0]
        objective = named(OBJECTIVES, self.objective)(compare(update, known.target.update))
        losses = Losses(objective, jnp.vdot(z, z) / 2 / z.size)

        def move(state):
            moved, left = self._step(
                numbers, known, z, state.spread, jax.random.fold_in(state.key, index)
            )
            narrowed = state.spread * narrowing(numbers.iterations).astype(left.dtype)
            candidate = Candidate(unwhiten(known.image_prior, moved), None)
            return State(candidate, jnp.maximum(left, narrowed), state.key)

        # A real branch, also under vmap: all trials are at the same step.
        return lax.cond(index < numbers.iterations, move, lambda state: state, state), losses

    def _step(
        self, numbers: Numbers, known: Known, z: Whitened, spread: Whitened, key: Array
    ) -> tuple[Whitened, Whitened]:
        """Moves the center of the belief; says what spread the update leaves."""
        shared = observed(known)
        of_draws, of_probes = jax.random.split(key)
        offsets = spread * pairs(of_draws, self.draws, z.shape).astype(z.dtype)
        looked_at = recorded(known.loss)

        def look(offset):
            return self.observe(numbers, known, looked_at, z + offset)

        seen, inputs = lax.map(look, offsets)
        if not inputs:
            raise UserError(
                "--attack smoothed_bayes: of networks of jaxinv.networks with ReLUs; use --attack "
                "bayes"
            )
        mean = jax.tree.map(lambda x: x.mean(axis=0), seen)
        smooth = smoothed(known.loss, [kink_spread(x) for x in inputs])
        linear = linearize(lambda z: self.observe(numbers, known, smooth, z)[0], z)
        predicted = lax.map(linear.jvp, offsets)
        weights = self.weights(numbers, known, seen, mean, predicted)

        def product(q):
            return spread * (linear.vjp(multiply(weights, linear.jvp(spread * q))) + spread * q)

        def pulled_back(errors):
            return linear.vjp(jax.tree.map(lambda w, e: jnp.sqrt(w) * e, weights, errors))

        # diag J^T w J: the variance of J^T sqrt(w) s over signs s (Hutchinson 1989). The residual
        # goes the same way, in one loop.
        residual = jax.tree.map(lambda w, r: jnp.sqrt(w) * r, weights, subtract(mean, shared))
        errors = jax.tree.map(
            lambda r, s: jnp.concatenate([r[None], s]),
            residual,
            signs_like(of_probes, residual, PROBES),
        )
        slope, *probes = lax.map(pulled_back, errors)
        diagonal = over_neighbors(known.image_prior, jnp.square(jnp.stack(probes)).mean(axis=0))
        solved = solve(product, spread * (slope + z), self.cg_iterations)
        descent = spread * solved
        # Some of the draws, both of a pair: their mean is the center.
        half, quarter = self.draws // 2, max(1, self.draws // 4)
        some = jnp.concatenate([offsets[:quarter], offsets[half : half + quarter]])

        def loss(length):
            there = z - length * descent

            def plain(offset):
                return self.observe(numbers, known, known.loss, there + offset)[0]

            found = lax.map(plain, some)
            r = jax.tree.map(lambda x, sent: x.mean(axis=0) - sent, found, shared)
            return dot(r, multiply(weights, r)) + jnp.vdot(there, there)

        lengths = jnp.asarray(STEP_LENGTHS, z.dtype)
        length = lengths[lax.map(loss, lengths).argmin()]
        return z - length * descent, 1 / jnp.sqrt(1 + diagonal)

    def observe(
        self, numbers: Numbers, known: Known, loss: client.LossFn, z: Whitened
    ) -> tuple[tuple[PyTree, PyTree], PyTree]:
        """What the client of an image would send by a loss, and what else the loss returns."""
        simulation = Simulation(self.local, False, self.defense)
        candidate = Candidate(unwhiten(known.image_prior, z), None)
        update, rest = simulate_update(
            simulation, known._replace(loss=loss), numbers.client_lr, candidate
        )
        statistics, inputs = rest if isinstance(rest, Recorded) else (rest, ())
        sent = statistics if jax.tree.leaves(known.target.statistics) else ()
        return (update, sent), inputs

    def weights(
        self, numbers: Numbers, known: Known, seen: PyTree, mean: PyTree, predicted: PyTree
    ) -> PyTree:
        """The weight of each entry: the inverse of its error's variance.

        Args:
          numbers, known: as in `step`.
          seen: what was observed of the draws, [draw, ...].
          mean: of it.
          predicted: by the Jacobian, of the draws' offsets.
        """
        shared = observed(known)
        total, noise = mean_square(shared), known_noise(known, bool(self.defense))

        def weight(x, center, line, sent, noise):
            own = jnp.square(x - center - line).mean(axis=0)
            # Of so few draws a variance is uncertain: the layer's mean counts as one draw more.
            own = (self.draws * own + own.mean()) / (self.draws + 1)
            floor = LEAST_VARIANCE * jnp.maximum(jnp.mean(jnp.square(sent)), LEAST_POWER * total)
            if not self.defense:
                # A residual far above the scatter of the draws is not the belief's: it is noise.
                scatter = jnp.square(x - center).mean()
                noise = jnp.maximum(jnp.square(center - sent).mean() - SURPRISE * scatter, 0)
            return 1 / (numbers.inflation * own + noise + floor)

        return jax.tree.map(weight, seen, mean, predicted, shared, noise)


class Recorded(NamedTuple):
    """What a recorded loss returns beside its value."""

    statistics: PyTree
    inputs: tuple[Array, ...]  # of the kinks


def recorded(loss: client.LossFn) -> client.LossFn:
    """The same loss, with the inputs of the kinks beside the statistics of the batch."""

    def looked_at(params, images, labels):
        with kinks.recording() as inputs:
            value, statistics = loss(params, images, labels)
        return value, Recorded(statistics, tuple(inputs))

    return looked_at


def smoothed(loss: client.LossFn, spreads: list[Array]) -> client.LossFn:
    """The loss of the smoothed network."""

    def rounded_off(params, images, labels):
        with kinks.smoothing(spreads):
            return loss(params, images, labels)

    return rounded_off


def solve(product: Callable[[Whitened], Whitened], right: Whitened, iterations: int) -> Whitened:
    """Conjugate gradients from zero.

    JAX's own multiply that zero too: one more product to compute, and to compile.
    """
    least = CG_TOLERANCE**2 * jnp.vdot(right, right)

    def running(carry):
        return (carry[3] > least) & (carry[4] < iterations)

    def iterate(carry):
        solution, residual, direction, square, count = carry
        image = product(direction)
        length = square / jnp.vdot(direction, image)
        solution, residual = solution + length * direction, residual - length * image
        after = jnp.vdot(residual, residual)
        return solution, residual, residual + after / square * direction, after, count + 1

    initial = (jnp.zeros_like(right), right, right, jnp.vdot(right, right), 0)
    return lax.while_loop(running, iterate, initial)[0]


def kink_spread(inputs: Float[Array, "draw image *rest"]) -> Float[Array, " image *rest"]:
    """The standard deviation of a kink's input over draws, the channel's mean one draw more."""
    draws = len(inputs)
    own = inputs.var(axis=0, ddof=1)
    of_channel = own.mean(axis=tuple(range(1, own.ndim - 1)), keepdims=True)
    return jnp.sqrt((draws * own + of_channel) / (draws + 1)) + LEAST_KINK


def narrowing(iterations: Int[Array, ""]) -> Float[Array, ""]:
    """The factor by which a step may narrow the belief: to `NARROWEST` in all of them."""
    return NARROWEST ** (1 / iterations)


def pairs(key: Array, draws: int, shape: tuple[int, ...]) -> Float[Array, " draw *shape"]:
    """Standard normal draws, the second half the first's negative."""
    half = jax.random.normal(key, (draws // 2, *shape), jnp.float32)
    return jnp.concatenate([half, -half])


def signs_like(key: Array, tree: PyTree, count: int) -> PyTree:
    """Random signs in a tree's shapes, each [count, ...]."""

    def draw(key, x):
        return jax.random.rademacher(key, (count, *x.shape), jnp.int32).astype(x.dtype)

    return rng.over_leaves(key, tree, draw)


def over_neighbors(prior: ImagePrior, diagonal: Whitened) -> Whitened:
    """Geometric mean over coefficients of like prior variance: of few probes each is uncertain."""
    order = jnp.argsort(prior.variances.ravel())

    def one(values):
        edge = NEIGHBORS // 2
        tiny = jnp.finfo(values.dtype).tiny
        wide = jnp.pad(jnp.log(values.ravel()[order] + tiny), edge, mode="edge")
        mean = jnp.convolve(wide, jnp.full(NEIGHBORS, 1 / NEIGHBORS), mode="valid")
        return jnp.zeros_like(mean).at[order].set(jnp.exp(mean)).reshape(values.shape)

    return jax.vmap(one)(diagonal)


def make(settings: Any, assumed: Assumed) -> SmoothedGaussNewton:
    """The attack of a cell's settings."""
    return SmoothedGaussNewton.of_settings(
        settings,
        assumed,
        init_from=settings.init,
        cg_iterations=settings.cg_iterations,
        draws=settings.draws,
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
            "draws",
            "inflation",
        }
    ),
    inits=tuple(PRIOR_INITS),
    local_steps=False,
    joint_labels=False,
    each_image=False,
    only_kinked=True,
)
