"""Gradient matching by first-order descent (Geiping et al. 2020, "Inverting Gradients").

Minimises objective(gradient(x), target) + weight * prior(x) over the normalised images x: Adam on
the sign of the gradient, a step schedule, and after every step a projection onto the images whose
pixels lie in [0, 1]. The published recipe is the default of every field below.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxinv import client, gram
from jaxinv.objectives import OBJECTIVES, compare
from jaxinv.priors import PRIORS, statistics_distance
from jaxinv.types import Normalization, PyTree, Target

# Each maps the gradient and the progress in [0, 1) to the direction the optimiser sees. The soft
# sign tanh(s g) / s with s = 1 - progress is breaching's; it hardens into the plain gradient.
SIGNS: dict[str, Callable[[Array, Array], Array]] = {
    "hard": lambda gradient, progress: jnp.sign(gradient),
    "soft": lambda gradient, progress: jnp.tanh(gradient * (1 - progress)) / (1 - progress),
    "none": lambda gradient, progress: gradient,
}
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": lambda: optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
    "sgd": optax.identity,
}
INITS: dict[str, Callable[..., Array]] = {
    "normal": lambda key, shape: jax.random.normal(key, shape, jnp.float32),
    "uniform": lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0),
}


def step_decay(step: Int[Array, ""], iterations: Int[Array, ""]) -> Float[Array, ""]:
    """Factor on the learning rate: x0.1 at floor(T/2.667), floor(T/1.6) and floor(T/1.142).

    References: Geiping et al. 2020, the public code's milestones (about 3/8, 5/8, 7/8 of T).
    """
    milestones = jnp.floor(iterations / jnp.array([2.667, 1.6, 1.142]))
    return 0.1 ** jnp.sum(step >= milestones)


def cosine_decay(step: Int[Array, ""], iterations: Int[Array, ""]) -> Float[Array, ""]:
    """Factor on the learning rate: 50 steps of linear warm-up, then half a cosine down to 0.

    References: the "modern" settings of breaching (Geiping et al. 2022).
    """
    warmup = jnp.minimum(50, iterations // 2)
    rest = jnp.maximum(iterations - warmup, 1)
    decay = 0.5 * (1 + jnp.cos(jnp.pi * (step - warmup) / rest))
    return jnp.where(step < warmup, (step + 1) / jnp.maximum(warmup, 1), decay)


SCHEDULES: dict[str, Callable[..., Array]] = {
    "step": step_decay,
    "cosine": cosine_decay,
    "constant": lambda step, iterations: jnp.ones(()),
}


class Method(NamedTuple):
    """What shapes the compiled program: a change recompiles."""

    objective: str = "cosine"
    prior: str = "tv"
    optimizer: str = "adam"
    sign: str = "hard"
    schedule: str = "step"
    init: str = "normal"
    box: bool = True
    batch_norm: str = "eval"  # what the client does, and the attacker simulates: client.BATCH_NORM
    gram: str | None = None  # the rule (`jaxinv.gram`) by which layers keep no weight gradient


class Numbers(NamedTuple):
    """What is traced: cells that differ in these alone share one compilation.

    The loop takes them with an axis of starts, so that settings can be compared in one batch.
    """

    lr: Float[Array, "*start"]
    prior_weight: Float[Array, "*start"]
    statistics_weight: Float[Array, "*start"]  # of shared BatchNorm statistics
    iterations: Int[Array, ""]

    @classmethod
    def of(cls, starts: int, *, lr, tv, statistics, iterations: int) -> "Numbers":
        """Makes them of settings, each one number for all starts or one for each."""
        spread = lambda x: np.broadcast_to(np.asarray(x, np.float64), (starts,))  # noqa: E731
        return cls(spread(lr), spread(tv), spread(statistics), np.int32(iterations))


class AttackState(NamedTuple):
    """What the next step of one trial needs."""

    candidate: Float[Array, "batch height width channel"]  # normalised
    optimizer: Any


class Losses(NamedTuple):
    """The two parts of the attack's loss at one candidate."""

    objective: Float[Array, ""]
    prior: Float[Array, ""]  # without its weight


def init(
    method: Method, key: jax.Array, shape: tuple[int, ...], normalization: Normalization
) -> AttackState:
    """Draws the random start of one trial.

    The start is not projected: the first projection comes after the first step, as published. In
    float64 it is the same start.
    """
    candidate = INITS[method.init](key, shape).astype(normalization.mean.dtype)
    return AttackState(candidate, OPTIMIZERS[method.optimizer]().init(candidate))


def step(
    method: Method,
    numbers: Numbers,
    apply: client.ApplyFn,
    params: PyTree,
    target: Target,
    normalization: Normalization,
    index: Int[Array, ""],
    state: AttackState,
) -> tuple[AttackState, Losses]:
    """Takes one step of one trial.

    Args:
      method, numbers: the settings.
      apply, params: the network the update was computed on.
      target: the shared update and the labels the attacker uses.
      normalization: between pixels and the network's input.
      index: steps taken so far. From `numbers.iterations` on the state is returned as it came, so
        that the last call only evaluates.
      state: of this trial.

    Returns:
      The next state, and the losses at the candidate the step started from.
    """

    def loss(candidate):
        if method.gram:
            between, statistics = gram.compare_updates(
                apply, params, candidate, target.labels, target.update, method.gram
            )
        else:
            update, statistics = client.gradient(apply, params, candidate, target.labels)
            between = compare(update, target.update)
        losses = Losses(OBJECTIVES[method.objective](between), PRIORS[method.prior](candidate))
        total = losses.objective + numbers.prior_weight * losses.prior
        if method.batch_norm == "train-shared":
            distance = statistics_distance(statistics, target.statistics)
            total += numbers.statistics_weight * distance
        return total, losses

    gradient, losses = jax.grad(loss, has_aux=True)(state.candidate)
    progress = jnp.minimum(index, numbers.iterations - 1) / numbers.iterations
    direction = SIGNS[method.sign](gradient, progress)
    update, optimizer = OPTIMIZERS[method.optimizer]().update(direction, state.optimizer)
    rate = numbers.lr * SCHEDULES[method.schedule](index, numbers.iterations)
    candidate = state.candidate - rate * update
    if method.box:
        candidate = normalization.box(candidate)
    moved = AttackState(candidate, optimizer)
    go = index < numbers.iterations
    return jax.tree.map(lambda new, old: jnp.where(go, new, old), moved, state), losses
