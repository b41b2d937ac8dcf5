"""Is it right? What an objective means, beside that of images which anyone could guess.

An objective is small or large only in comparison. Beside it stand those of a gray image and of the
mean image, which say nothing of the private ones; that of an update of zeros, which a squared
distance may prefer to both, as that of every image whose loss is 0; and the one to be expected at
the truth: what the rounding of the numbers that were sent leaves. A low objective says that the
update is explained; what it leaves open (several images, pruned entries) it does not show.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv.attacks.base import Attack, Candidate, Known, Simulation, scale_towards, simulate_update
from jaxinv.attacks.gradient_matching import Method
from jaxinv.attacks.objectives import OBJECTIVES, Comparison, compare
from jaxinv.engine import trials
from jaxinv.types import named

# Of the objective of the better guess. On untrained LeNetZhu (16 images of CIFAR-10, cosine + TV)
# noise comes to a tenth of it and less; what came to a hundredth was a picture of the truth.
MATCHED, PARTLY = 1 / 100, 1 / 5
COMPUTING = 1e-6  # relative error of a gradient that is computed again in float32


class Guesses(NamedTuple):
    """Objectives of images that say nothing, and the one to be expected at the truth."""

    gray: float  # of pixels 1/2
    mean: float  # of the mean image: that of the image prior, or pixels at `mean`
    zero: float  # of an update of zeros; inf where the objective has none for it
    truth: float  # by the rounding of the update's numbers


def verdict(objective: float, guesses: Guesses) -> str:
    """Says in a word how well a reconstruction explains the update: matched, partly, or not."""
    guess = min(guesses.gray, guesses.mean, guesses.zero)
    if objective <= max(MATCHED * guess, 3 * guesses.truth):
        return "matched"
    return "partly" if objective <= PARTLY * guess else "not"


SENTENCES = {
    "matched": "matched: the update is explained",
    "partly": "partly: explained in part, which noise does too; trust what seeds agree on (more "
    "steps or seeds, another prior?)",
    "not": "not: no better than a guess; what is shown is no result (labels, update_kind, "
    "batch_norm?)",
}


def guesses(
    problem: trials.Problem,
    attack: Attack,
    client_lr: float,
    labels: np.ndarray,
    rounding: float,
    any_scale: bool = False,
) -> list[Guesses]:
    """Measures the guesses for each target.

    Args:
      problem: all targets.
      attack: whose objective it is.
      client_lr: the client's rate.
      labels: [target, image, ...], as they are taken to be.
      rounding: relative error of the updates' numbers.
      any_scale: whether the attack compares multiples of an image's update.
    """
    shape = (labels.shape[1], *problem.image_shape)
    targets = problem.targets._replace(labels=jnp.asarray(labels))
    problem = problem.replace(targets=targets)
    dtype = problem.normalization.mean.dtype
    gray = jnp.broadcast_to(problem.normalization.normalize(jnp.asarray(0.5, dtype)), shape)
    mean = jnp.zeros(shape, dtype)
    if problem.image_prior is not None:
        mean = jnp.broadcast_to(problem.image_prior.mean, shape).astype(dtype)
    rate = jnp.asarray(client_lr, dtype)
    found = np.asarray(_objectives(attack, any_scale, problem, rate, gray, mean))
    updates = jax.tree.leaves(problem.targets.update)
    expected = []
    for target in range(len(found)):
        power = sum(float(jnp.sum(jnp.square(x[target]))) for x in updates)
        expected.append(_at_truth(attack.objective, power, rounding))
    return [Guesses(*map(float, row), truth) for row, truth in zip(found, expected)]


def _at_truth(objective: str | Callable, power: float, rounding: float) -> float:
    """The objective that rounding leaves at the truth: an error across the update's direction."""
    error = rounding**2 + COMPUTING**2
    between = Comparison(*(np.float64(power * x) for x in (1 + error, 1, 1, error)))
    least = float(np.finfo(np.float32).eps) / 2 if objective == "cosine" else 0.0
    return max(float(named(OBJECTIVES, objective)(between)), least)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _objectives(attack, any_scale, problem, client_lr, gray, mean):
    """Objectives [target, guess] of gray, the mean image, and an update of zeros."""
    simulation = Simulation(attack.local, False, attack.defense)
    loss = trials.simulate(problem.module, problem.variables, attack)
    objective = named(OBJECTIVES, attack.objective)

    def of_target(target):
        known = Known(
            loss, problem.variables["params"], target, problem.normalization, problem.image_prior
        )
        weights = None  # as the attack weighs the layers
        if attack.defense and isinstance(attack, Method):
            weights = target.defense_knowledge.weights

        def of_images(images):
            update, _ = simulate_update(simulation, known, client_lr, Candidate(images, None))
            if any_scale:
                update = scale_towards(update, target.update)
            return objective(compare(update, target.update, weights))

        nothing = jax.tree.map(jnp.zeros_like, target.update)
        zero = objective(compare(nothing, target.update, weights))
        zero = jnp.where(jnp.isfinite(zero), zero, jnp.inf)
        return jnp.append(lax.map(of_images, jnp.stack([gray, mean])), zero)

    return lax.map(of_target, problem.targets)
