"""One assembly: an attack on every target, and what follows on it, whoever made the targets.

A sweep's cell, a search and `jaxinv.invert` come here, with a problem and the work to be done.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinv.attacks.base import Attack, Candidate
from jaxinv.attacks.levenberg_marquardt import LevenbergMarquardt
from jaxinv.attacks.uncertainty import Posterior, Spectrum
from jaxinv.engine import planner, trials
from jaxinv.engine.closed_form import Recovery, recover
from jaxinv.machine import runtime
from jaxinv.types import Normalization, PyTree

Cast = Callable[[PyTree], PyTree]  # a tree's floats to the precision of the arithmetic
MakeProblem = Callable[[Cast], trials.Problem]


class Work(NamedTuple):
    """What is done to every target."""

    attack: Attack | Recovery
    settings: Mapping[str, Any]  # of the traced part: each one for all seeds, or [seed]
    precision: str = "float32"
    polish: int = 0  # steps of Levenberg-Marquardt in float64 that follow
    posterior: int = 0  # draws that give each pixel of the best images a standard deviation
    spectra: int = 0  # first targets whose Jacobian's spectrum is found where a polish ended


def attack_targets(
    make_problem: MakeProblem, work: Work, keys: jax.Array, resources: trials.Resources
) -> tuple[trials.Result, dict[str, np.ndarray] | None]:
    """Attacks every target from every seed; then polishes, or asks what is left open.

    Args:
      make_problem: all targets, in one precision.
      work: what is done.
      keys: [target, seed].
      resources: by which a program runs, but for the plan, which is found here.

    Returns:
      The result, and what else was found: arrays [target, ...].

    Raises:
      UserError: not even one trial at once fits the memory.
    """
    attack, extras = work.attack, None
    with runtime.arithmetic(work.precision) as cast:
        problem = make_problem(cast)
        if isinstance(attack, Recovery):
            return recover(problem, attack, keys), None
        plan = planner.first_plan(
            problem.variables["params"],
            *keys.shape,
            problem.targets.labels.shape[1],
            attack.couples_seeds,
        )
        numbers = cast(attack.numbers(keys.shape[1], work.settings))
        result = trials.run(problem, attack, numbers, keys, resources._replace(plan=plan))
        # What follows is one trial at once, moves no bar and is in no picture.
        alone = planner.GroupPlan(1, 1, jax.local_device_count())
        silent = trials.Resources(alone, resources.memory, snapshots=resources.snapshots)
        if work.posterior:
            spread = Posterior(batch_norm=attack.batch_norm, attack=attack)
            settings = {**work.settings, "posterior": work.posterior}
            found = around_best(result, problem, spread, settings, keys, silent, cast)
            extras = found and in_pixels(found, problem.normalization)
    if work.polish:
        with runtime.arithmetic("float64") as cast:
            problem = make_problem(cast)
            result = polish(result, problem, work, keys, silent, cast)
            if work.spectra:
                spectrum = Spectrum(batch_norm=attack.batch_norm, local=attack.local)
                extras = around_best(
                    result, problem, spectrum, work.settings, keys, silent, cast, work.spectra
                )
    return result, extras


def polish(
    result: trials.Result,
    problem: trials.Problem,
    work: Work,
    keys: jax.Array,
    resources: trials.Resources,
    cast: Cast,
) -> trials.Result:
    """Takes what an attack found towards the exact images; labels found beside them stand.

    Returns:
      The result, its trace the attack's with the polish's behind it.
    """
    attack = work.attack
    finishing = LevenbergMarquardt(
        objective=attack.objective, batch_norm=attack.batch_norm, local=attack.local
    )
    numbers = finishing.numbers(keys.shape[1], {**work.settings, "iterations": work.polish})
    initial = Candidate(result.candidates.images, _one_hot_logits(result))
    polished = trials.run(problem, finishing, cast(numbers), keys, resources, initial)
    before, after = result.trace, polished.trace
    steps = np.append(before.step, before.step[-1] + after.step[1:])
    columns = (
        np.concatenate([old, np.asarray(new)[1:]]) for old, new in zip(before[1:], after[1:])
    )
    return polished._replace(
        trace=trials.Trace(steps, *columns), labels=result.labels, frames=result.frames
    )


def _one_hot_logits(result: trials.Result) -> np.ndarray | None:
    """Labels that were found beside the images, as logits so sure that they stand."""
    logits = result.candidates.logits
    if logits is None:
        return None
    return np.asarray(100.0 * jax.nn.one_hot(result.labels, logits.shape[-1]))


def around_best(
    result: trials.Result,
    problem: trials.Problem,
    attack: Attack,
    settings: Mapping[str, Any],
    keys: jax.Array,
    resources: trials.Resources,
    cast: Cast,
    few: int | None = None,
) -> dict[str, np.ndarray] | None:
    """Finds what the update leaves open at the end of each target's best seed.

    Returns:
      Arrays [target, ...] of the first `few` targets; nothing where one trial does not fit the
      memory.
    """

    def first(tree):
        return jax.tree.map(lambda x: x[:few], tree)

    problem = problem.replace(targets=first(problem.targets), truths=first(problem.truths))
    best = trials.comparable(result)[:few].argmin(axis=1)
    rows = np.arange(len(best))

    def pick(x):
        return np.asarray(x)[rows, best][:, None]

    initial = jax.tree.map(pick, result.candidates)
    own = {k: np.mean(v) if np.ndim(v) else v for k, v in settings.items()}
    numbers = cast(attack.numbers(1, own))
    try:
        found = trials.run(problem, attack, numbers, keys[rows, best][:, None], resources, initial)
    except planner.DoesNotFit:
        return None
    return {name: x[:, 0] for name, x in found.outcome.items()}


def in_pixels(found: dict[str, np.ndarray], normalization: Normalization) -> dict[str, np.ndarray]:
    """The image around which a posterior was found and its standard deviation, not clipped."""
    mean, std = np.asarray(normalization.mean), np.asarray(normalization.std)
    return {"best": found["images"] * std + mean, "std": found["std"] * std}
