"""Attacks in closed form on every target, from every key."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv import client, metrics
from jaxinv.attacks.base import Candidate
from jaxinv.attacks.closed_form import Given
from jaxinv.attacks.objectives import OBJECTIVES, compare
from jaxinv.engine.planner import GroupPlan
from jaxinv.engine.trials import Problem, Result, Trace
from jaxinv.types import named


class Recovery(NamedTuple):
    """A closed form, and by what its find is compared."""

    find: Callable  # of an entry of `attacks.CLOSED_FORM`
    objective: str | Callable  # by which the update of what was found is compared
    batch_norm: str  # of the client, by which that update is computed: as in `client.loss_fn`


def recover(problem: Problem, recovery: Recovery, keys: jax.Array) -> Result:
    """Runs an attack in closed form on every target, from every key.

    Args:
      problem, keys: as in `trials.run`.
      recovery: the attack.
    """
    images, pixels, scores, distance, finite, exact = _recover(recovery, problem, keys)
    given = problem.targets.labels
    labels = jnp.broadcast_to(given[:, None], (*keys.shape, given.shape[1]))
    psnr = np.full(keys.shape, np.nan) if scores is None else np.asarray(scores.psnr)
    trace = Trace(np.zeros(1, int), psnr[None], np.asarray(distance)[None], None)
    status = np.where(np.asarray(exact), "exact", "mixture")
    if exact is None:
        status = np.full(keys.shape, "ok")
    return Result(
        np.asarray(pixels),
        labels,
        scores,
        distance,
        jnp.zeros_like(distance),
        finite,
        status,
        Candidate(images, None),
        trace,
        GroupPlan(1, 1),
        0,
    )


@functools.partial(jax.jit, static_argnums=0)
def _recover(recovery, problem, keys):
    module, variables, normalization = problem.module, problem.variables, problem.normalization
    loss = client.loss_fn(module, variables, recovery.batch_norm)

    def one(target, truth, key):
        count = len(target.labels)
        network = module, variables, target, count, problem.image_shape
        found = recovery.find(Given(*network, key, normalization, problem.learned.get("inverter")))
        update, _ = client.gradient(loss, variables["params"], found.images, target.labels)
        pixels, scores = normalization.pixels(found.images), None
        if truth is not None:
            pixels = metrics.match(pixels, truth.images, normalization.mean)
            scores = metrics.score(truth, pixels)
        distance = named(OBJECTIVES, recovery.objective)(compare(update, target.update))
        finite = jnp.isfinite(found.images).all()
        exact = None if found.exact is None else found.exact.all()
        return found.images, pixels, scores, distance, finite, exact

    def of_target(arguments):
        target, truth, own = arguments
        return lax.map(functools.partial(one, target, truth), own)

    return lax.map(of_target, (problem.targets, problem.truths, keys))
