"""From what an attack found to the exact images, and to what the update says of each direction.

Levenberg-Marquardt (`attacks.levenberg_marquardt`) on trials that have ended: each alone, for one
fills a device, and one on each device at a time.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinv import client, planner, trials
from jaxinv.attacks import gradient_matching as attack
from jaxinv.attacks import levenberg_marquardt
from jaxinv.objectives import OBJECTIVES, compare
from jaxinv.types import Normalization, PyTree, Target, Truth

LEAST_DETERMINED = 6  # directions of a spectrum that are kept


class Spectra(NamedTuple):
    """The update's Jacobian with respect to the images, at the end of each target's best start.

    Directions of small singular values change the image and hardly the update.
    """

    values: np.ndarray  # [target, pixel], singular, descending
    directions: np.ndarray  # [target, LEAST_DETERMINED, image, height, width, channel], the last


def polish(
    result: trials.Result, module: nn.Module, variables: PyTree, targets: Target, truths: Truth,
    normalization: Normalization, method: attack.Method, client_lr: float, steps: int,
    memory: float,
) -> trials.Result:  # fmt: skip
    """Takes what an attack found towards the exact images, by Levenberg-Marquardt in float64.

    Each trial alone, one on each device at a time. Labels found beside the images stand.

    Args:
      result: of `trials.run`.
      module, variables, targets, truths, normalization, method: as there, in float64.
      client_lr: the rate that the attacker simulates.
      steps: at the most.
      memory: bytes of each device; where the normal matrix does not fit, conjugate gradients.
    """
    shape = result.objective.shape
    each = [_trial(result, targets, client_lr, *index) for index in np.ndindex(*shape)]
    ends = _each_alone(_polish, (module, method, steps), (*_columns(), 0), variables, each, memory)
    ends = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), ends)
    candidates = attack.Candidate(ends[0].x, None)
    pixels, _, scores, finite = trials.finish(truths, normalization, targets.labels, candidates)
    status = np.array(levenberg_marquardt.STATUS)[ends[0].status]
    before = result.trace
    trace = trials.Trace(
        np.append(before.step, before.step[-1] + steps),
        *(np.concatenate([old, np.asarray(new)[None]]) for old, new in (
            (before.psnr, scores.psnr), (before.objective, ends[1]),
        )), None,
    )  # fmt: skip
    return result._replace(
        pixels=np.asarray(pixels), scores=scores, objective=ends[1], finite=np.asarray(finite),
        status=status, candidates=candidates, trace=trace,
    )  # fmt: skip


def spectra(
    result: trials.Result, module: nn.Module, variables: PyTree, targets: Target,
    method: attack.Method, client_lr: float, memory: float,
) -> Spectra | None:  # fmt: skip
    """Finds what of each target's images the update does not pin down, at the best start's end.

    Args:
      result: of `polish`; the rest as there.

    Returns:
      Nothing where a normal matrix does not fit the memory.
    """
    best = np.nanargmin(np.asarray(result.objective), axis=1)
    each = [_trial(result, targets, client_lr, *index) for index in enumerate(best)]
    found = _each_alone(_spectrum, (module, method), _columns(), variables, each, memory)
    return Spectra(*found) if found else None


def _trial(result, targets, client_lr, target, seed):
    """What a polish and a spectrum need of one trial: target, rate and images."""
    own = jax.tree.map(lambda x: x[target], targets)
    own = own._replace(labels=np.asarray(result.labels)[target, seed])
    images = np.asarray(result.candidates.images[target, seed], np.float64)
    return own, np.float64(client_lr), images


def _columns() -> tuple[int, ...]:
    """Columns of a normal matrix at once, to be tried in this order until they fit the memory."""
    return (16, 4, 1) if jax.default_backend() == "cpu" else (256, 64, 16, 4, 1)


def _each_alone(program, static, columns, variables, trials, memory):
    """Runs a program on each trial by itself, one on each device at a time.

    Args:
      program: jitted, of `static` and one of `columns`, then of the variables and a trial.
      columns: the first with which the compiled program fits the memory is taken; 0 always does.
      trials: its further arguments, for each.

    Returns:
      What the program does, stacked; nothing where it does not fit.
    """
    devices, compiled, ends = jax.local_devices(), {}, []
    for index, trial in enumerate(trials):
        device = devices[index % len(devices)]
        own = jax.device_put((variables, *trial), device)
        while device not in compiled:
            if not columns:
                return None
            there = program.lower(*static, columns[0], *own).compile()
            if columns[0] == 0 or planner.program_bytes(there) < memory:
                compiled[device] = there
            else:
                columns = columns[1:]
        ends.append(compiled[device](*own))
        if index >= len(devices):  # no more of them in the queue than the devices have memory for
            jax.block_until_ready(ends[-len(devices)])
    return jax.tree.map(lambda *x: np.stack(x), *ends)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _polish(module, method, steps, columns, variables, target, client_lr, start):
    update = _update_of(module, method, client_lr, variables, target)
    shared = flat(target.update)
    end = levenberg_marquardt.polish(
        lambda images: flat(update(images)) - shared, jnp.linalg.norm(shared), start, steps, columns
    )
    return end, OBJECTIVES[method.objective](compare(update(end.x), target.update))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _spectrum(module, method, columns, variables, target, client_lr, images):
    update = _update_of(module, method, client_lr, variables, target)
    return levenberg_marquardt.spectrum(
        lambda x: flat(update(x)), images, LEAST_DETERMINED, columns
    )


def flat(tree: PyTree) -> Float[Array, " entry"]:
    """All leaves in a row."""
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def _update_of(module, method, client_lr, variables, target):
    """The update that the attacker's images would cause, a function of them."""
    loss, params = trials.simulate(module, variables, method), variables["params"]
    return lambda images: client.update(
        loss, params, images, target.labels, method.local, client_lr
    )[0]
