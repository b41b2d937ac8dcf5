"""Is it right? What an objective means, beside that of images which anyone could guess.

An objective is small or large only in comparison. Beside it stand those of a gray image and of the
mean image, which say nothing of the private ones, and the one to be expected at the truth: what the
rounding of the numbers that were sent leaves. A low objective says that the update is explained;
what it leaves open (several images, pruned entries) it does not show.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv.attacks.base import Candidate, Known, Simulation, scale_towards, simulate_update
from jaxinv.attacks.objectives import OBJECTIVES, Comparison, compare
from jaxinv.engine import trials
from jaxinv.types import named

MATCHED, PARTLY = 1 / 30, 1 / 5  # of the objective of the better guess
COMPUTING = 1e-6  # relative error of a gradient that is computed again in float32


class Guesses(NamedTuple):
    """Objectives of images that say nothing, and the one to be expected at the truth."""

    gray: float  # of pixels 1/2
    mean: float  # of the mean image: that of the image prior, or pixels at `mean`
    truth: float  # by the rounding of the update's numbers


def verdict(objective: float, guesses: Guesses) -> str:
    """Says in a word how well a reconstruction explains the update: matched, partly, or not."""
    guess = min(guesses.gray, guesses.mean)
    if objective <= max(MATCHED * guess, 3 * guesses.truth):
        return "matched"
    return "partly" if objective <= PARTLY * guess else "not"


SENTENCES = {
    "matched": "matched: the update is explained",
    "partly": "partly: the update is explained in part; more steps or seeds, another prior?",
    "not": "not: no better than a guess; what is shown is no result (labels, update_kind, "
    "batch_norm?)",
}


def guesses(
    problem: trials.Problem,
    attack: Any,
    settings: Mapping[str, Any],
    labels: np.ndarray,
    rounding: float,
) -> list[Guesses]:
    """Measures the guesses for each target.

    Args:
      problem: all targets.
      attack: whose objective it is.
      settings: with the client's rate.
      labels: [target, image, ...], as they are taken to be.
      rounding: relative error of the updates' numbers.
    """
    shape = (labels.shape[1], *problem.image_shape)
    targets = problem.targets._replace(labels=jnp.asarray(labels))
    problem = problem.replace(targets=targets)
    kind = problem.normalization.mean.dtype
    gray = jnp.broadcast_to(problem.normalization.normalize(jnp.asarray(0.5, kind)), shape)
    mean = jnp.zeros(shape, kind)
    if problem.image_prior is not None:
        mean = jnp.broadcast_to(problem.image_prior.mean, shape).astype(kind)
    found = np.asarray(
        _objectives(attack, problem, jnp.asarray(settings["client_lr"], kind), gray, mean)
    )
    of_truth = named(OBJECTIVES, attack.objective)
    expected = []
    for target in range(len(found)):
        power = sum(
            float(jnp.sum(jnp.square(x[target]))) for x in jax.tree.leaves(problem.targets.update)
        )
        error = rounding**2 + COMPUTING**2
        # Of an error across the update's direction.
        between = Comparison(*(np.float64(power * x) for x in (1 + error, 1, 1, error)))
        least = float(np.finfo(np.float32).eps) / 2 if attack.objective == "cosine" else 0.0
        expected.append(max(float(of_truth(between)), least))
    return [Guesses(*map(float, row), truth) for row, truth in zip(found, expected)]


@functools.partial(jax.jit, static_argnums=0)
def _objectives(attack, problem, client_lr, gray, mean):
    """Objectives [target, guess]."""
    simulation = Simulation(attack.local, False, attack.defense)
    loss = trials.simulate(problem.module, problem.variables, attack)

    def of_target(target):
        known = Known(
            loss, problem.variables["params"], target, problem.normalization, problem.image_prior
        )

        def of_images(images):
            update, _ = simulate_update(simulation, known, client_lr, Candidate(images, None))
            if getattr(attack, "any_scale", False):
                update = scale_towards(update, target.update)
            return named(OBJECTIVES, attack.objective)(compare(update, target.update))

        return lax.map(of_images, jnp.stack([gray, mean]))

    return lax.map(of_target, problem.targets)
