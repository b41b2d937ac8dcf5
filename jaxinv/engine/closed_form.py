"""Attacks in closed form on every target, from every key."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv import client, metrics
from jaxinv.attacks.base import Candidate
from jaxinv.attacks.objectives import OBJECTIVES, compare
from jaxinv.engine.planner import Plan
from jaxinv.engine.trials import Problem, Result, Trace


def recover(problem: Problem, closed_form: Callable, objective: str, keys: jax.Array) -> Result:
    """Runs an attack in closed form on every target, from every key.

    Args:
      problem, keys: as in `run`.
      closed_form: one of `attacks.CLOSED_FORM`.
      objective: by which the update of what was found is compared with the target's.
    """
    images, pixels, scores, distance, finite, exact = _recover(
        closed_form, objective, problem, keys
    )
    given = problem.targets.labels
    labels = jnp.broadcast_to(given[:, None], (*keys.shape, given.shape[1]))
    trace = Trace(np.zeros(1, int), *(np.asarray(x)[None] for x in (scores.psnr, distance)), None)
    status = np.where(np.asarray(exact), "exact", "mixture")
    return Result(
        np.asarray(pixels), labels, scores, distance, jnp.zeros_like(distance), finite, status,
        Candidate(images, None), trace, Plan(1, 1), 0,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1))
def _recover(closed_form, objective, problem, keys):
    module, variables, normalization = problem.module, problem.variables, problem.normalization
    loss = client.loss_fn(module, variables)

    def one(target, truth, key):
        count = len(target.labels)
        found = closed_form(module, variables, target, count, problem.image_shape, key)
        update, _ = client.gradient(loss, variables["params"], found.images, target.labels)
        pixels = normalization.pixels(found.images)
        pixels = metrics.match(pixels, truth.images, normalization.mean)
        distance = OBJECTIVES[objective](compare(update, target.update))
        finite = jnp.isfinite(found.images).all()
        scores = metrics.score(truth, pixels)
        return found.images, pixels, scores, distance, finite, found.exact.all()

    def of_target(arguments):
        target, truth, own = arguments
        return lax.map(functools.partial(one, target, truth), own)

    return lax.map(of_target, (problem.targets, problem.truths, keys))
