"""Targets x seeds in one compiled loop: the only file that knows the whole chain.

A program runs a *chunk* of the attack for every trial: `points` times, measure the candidate, then
take `every` steps. The host calls it until the last step is done. Compiled once per shape; the
network's parameters, the targets and all numbers are arguments.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxinv import client, metrics, planner, rng
from jaxinv.attacks import gradient_matching as attack
from jaxinv.labels import classifier_path, idlg
from jaxinv.types import Normalization, PyTree, Target, Truth

TRACE_POINTS = 100  # per trial, at the most, beside the end
CHUNK_STEPS = 50  # between two looks of the progress bar
SHARED, DEALT = PartitionSpec(), PartitionSpec("trial")  # to every device; groups among them


class Trace(NamedTuple):
    """What was seen on the way. Axes: point, target, seed."""

    step: Int[np.ndarray, " point"]  # steps taken when measured
    psnr: Float[Array, "point target seed"]
    objective: Float[Array, "point target seed"]
    prior: Float[Array, "point target seed"]


class Result(NamedTuple):
    """The end of every trial. Axes: target, seed."""

    pixels: Float[Array, "target seed batch height width channel"]  # matched to the truth's order
    scores: metrics.Scores | None  # None without truths
    objective: Float[Array, "target seed"]
    prior: Float[Array, "target seed"]
    finite: Bool[Array, "target seed"]
    trace: Trace
    plan: planner.Plan  # by which they were computed
    bytes: int  # that its program takes of each device


def make_targets(
    module: nn.Module,
    variables: PyTree,
    truths: Truth,
    normalization: Normalization,
    labels: str,
    batch_norm: str = "eval",
) -> Target:
    """Computes what the attacker gets for each private batch.

    Args:
      truths: with a leading target axis.
      labels: "known" (the client's labels come with the update) or "idlg" (read off the update).
      batch_norm: the client's BatchNorm protocol, one of `client.BATCH_NORM`.
    """
    return _make_targets(module, labels, batch_norm, variables, truths, normalization)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _make_targets(module, labels, batch_norm, variables, truths, normalization):
    apply = client.apply_fn(module, variables, batch_norm)

    def one(truth):
        update, statistics = client.share_gradient(apply, variables["params"], truth, normalization)
        sent = statistics if batch_norm == "train-shared" else ()
        if labels == "known":
            return Target(update, truth.labels, sent)
        classifier = classifier_path(module, variables, truth.images)
        return Target(update, idlg(update, classifier), sent)

    return lax.map(one, truths)


def run(
    module: nn.Module,
    variables: PyTree,
    targets: Target,
    truths: Truth | None,
    normalization: Normalization,
    method: attack.Method,
    numbers: attack.Numbers,
    image_shape: tuple[int, int, int],
    keys: jax.Array,
    plan: planner.Plan,
    memory: float = math.inf,
    progress: Callable[[int, float], None] = lambda steps, psnr: None,
    report: Callable[[str], None] = lambda line: None,
) -> Result:
    """Attacks every target from every start and measures every trial.

    Guarantees:
      * trials are independent: what one does changes no other, and the truth changes no trial;
      * `numbers` and `variables` do not recompile.

    Args:
      module, variables: the victim's network.
      targets: with a leading target axis.
      truths: likewise; read by the measurements alone, which are NaN without (None).
      normalization: between pixels and the network's input.
      method, numbers: the attack's settings; numbers have the axis of starts.
      image_shape: height, width, channel.
      keys: [target, seed], one start each.
      plan: how the trials are grouped. Groups that do not fit the memory are halved: before the
        start by the program's own analysis, and where a device runs out nevertheless, from the
        start.
      memory: bytes that may be taken on each device.
      progress: called after each chunk with the steps done and the current mean PSNR.
      report: called with the plan in a line, once it is found or changed.

    Raises:
      UserError: not even one trial at once fits the memory.
    """
    total = int(numbers.iterations)
    every = max(1, -(-total // TRACE_POINTS))
    points = max(1, CHUNK_STEPS // every)
    batch_shape = (targets.labels.shape[1], *image_shape)
    shared = (variables, targets, truths, normalization, numbers, jnp.int32(every))
    while True:
        grid = planner.make_grid(plan, *keys.shape)
        states = init_states(method, batch_shape, normalization, grid.deal(keys))
        states = jax.device_put(states, NamedSharding(_mesh(plan.devices), DEALT))
        chunk = (module, method, points, plan.devices, *shared)
        # Compiled for good: the calls below find this program.
        program = run_chunk.lower(*chunk, jnp.int32(0), grid.target, grid.seed, states).compile()
        needed = planner.program_bytes(program)
        if needed > memory:
            plan = planner.smaller(plan, needed, memory)
            continue
        report(planner.describe(plan, needed))
        traces, step = [], 0
        try:
            while step <= total:
                states, trace = run_chunk(*chunk, jnp.int32(step), grid.target, grid.seed, states)
                taken = np.minimum(step + every * np.arange(points), total)
                seen = (np.moveaxis(grid.gather(leaf), 2, 0) for leaf in trace)
                traces.append(Trace(taken, *seen))
                step += points * every
                progress(min(step, total), float(np.mean(traces[-1].psnr[-1])))
            break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            plan = planner.smaller(plan, needed, 0.99 * needed)  # there was less than needed
    trace = jax.tree.map(lambda *parts: np.concatenate(parts), *traces)
    # Points beyond the end repeat it: keep the first that has taken every step.
    last = int(np.argmax(trace.step >= total))
    trace = jax.tree.map(lambda leaf: leaf[: last + 1], trace)
    pixels, scores, finite = _finish(truths, normalization, grid.gather(states.candidate))
    objective, prior = trace.objective[last], trace.prior[last]
    finite = np.asarray(finite) & np.isfinite(objective)
    return Result(np.asarray(pixels), scores, objective, prior, finite, trace, plan, needed)


@functools.partial(jax.jit, static_argnums=(0, 1))
def init_states(method, shape, normalization, keys):
    """Draws every start: keys [group, target, seed] to states with those axes in front."""
    one = lambda key: attack.init(method, key, shape, normalization)  # noqa: E731
    return jax.vmap(jax.vmap(jax.vmap(one)))(keys)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(13,))
def run_chunk(
    module, method, points, devices, variables, targets, truths, normalization,
    numbers, every, start, group_targets, group_starts, states,
):  # fmt: skip
    """`points` times: measure, then take `every` steps. States are [group, target, seed, ...].

    Returns the states and (psnr, objective, prior), each [group, target, seed, point].
    """

    def of_device(variables, targets, truths, normalization, numbers, every, start, groups):
        def of_group(arguments):
            rows, columns, states = arguments
            here = jax.tree.map(lambda leaf: leaf[rows], (targets, truths))
            own = attack.Numbers(*(leaf[columns] for leaf in numbers[:-1]), None)
            of_target = jax.vmap(trial, in_axes=(None, None, 0, 0))
            return jax.vmap(of_target, in_axes=(0, 0, None, 0))(*here, own, states)

        def trial(target, truth, own, state):
            numbers_here = own._replace(iterations=numbers.iterations)
            apply = client.apply_fn(module, variables, method.batch_norm)
            params = variables["params"]

            def point(carry, _):
                state, index = carry
                psnr = jnp.full((), jnp.nan)
                if truth is not None:
                    psnr = metrics.trace_psnr(truth, normalization, state.candidate)

                def take(i, inner):
                    state, losses = inner
                    state, now = attack.step(
                        method, numbers_here, apply, params, target, normalization, index + i,
                        state,
                    )  # fmt: skip
                    # The losses of the first step belong to the candidate just measured.
                    return state, jax.tree.map(lambda a, b: jnp.where(i == 0, a, b), now, losses)

                none = attack.Losses(jnp.zeros(()), jnp.zeros(()))
                steps = jnp.clip(numbers.iterations - index, 1, every)
                state, losses = lax.fori_loop(0, steps, take, (state, none))
                index = jnp.minimum(index + steps, numbers.iterations)
                return (state, index), (psnr, losses.objective, losses.prior)

            (state, _), trace = lax.scan(point, (state, start), length=points)
            return state, trace

        return lax.map(of_group, groups)

    # Each device loops over its own groups and talks to no other. Without vma tracking, a gradient
    # with respect to the replicated parameters stays this device's own (no implicit psum).
    on_devices = jax.shard_map(
        of_device, mesh=_mesh(devices), in_specs=(*[SHARED] * 7, DEALT), out_specs=DEALT,
        check_vma=False,
    )  # fmt: skip
    return on_devices(
        variables, targets, truths, normalization, numbers, every, start,
        (group_targets, group_starts, states),
    )  # fmt: skip


def _mesh(devices: int) -> jax.sharding.Mesh:
    """The first local devices in a row; groups of trials are dealt out along it."""
    local = np.array(jax.local_devices()[:devices])
    return jax.sharding.Mesh(local, ("trial",), axis_types=(jax.sharding.AxisType.Auto,))


@jax.jit
def _finish(truths, normalization, candidates):
    """Matches, scores and checks the final candidates [target, seed, ...]."""

    def one(truth, candidate):
        pixels, scores = normalization.pixels(candidate), None
        if truth is not None:
            pixels = metrics.match(pixels, truth.images)
            scores = metrics.score(truth, pixels)
        return pixels, scores, jnp.isfinite(candidate).all()

    return lax.map(lambda a: lax.map(functools.partial(one, a[0]), a[1]), (truths, candidates))


def step_flops(
    module: nn.Module,
    variables: PyTree,
    method: attack.Method,
    normalization: Normalization,
    batch_shape: tuple[int, ...],
) -> float:
    """Counts the floating-point operations of one step of one trial, by XLA's own analysis."""
    sent = {"batch_stats": variables["batch_stats"]} if method.batch_norm == "train-shared" else ()
    target = Target(variables["params"], jnp.zeros(batch_shape[0], jnp.int32), sent)
    numbers = attack.Numbers(*[jnp.float32(1)] * 3, jnp.int32(1))
    start = functools.partial(attack.init, method, shape=batch_shape, normalization=normalization)
    state = jax.eval_shape(start, jax.random.key(0))

    def one(variables, target, state):
        apply = client.apply_fn(module, variables, method.batch_norm)
        return attack.step(
            method, numbers, apply, variables["params"], target, normalization, jnp.int32(0), state
        )

    return float(jax.jit(one).lower(variables, target, state).cost_analysis()["flops"])


@jax.jit
def _start_keys(target_ids, seeds):
    one = lambda target, seed: rng.stream_key(rng.Stream.START, seed, target)  # noqa: E731
    return jax.vmap(lambda t: jax.vmap(lambda s: one(t, s))(seeds))(target_ids)


def start_keys(target_ids: Sequence[int], seeds: Sequence[int]) -> jax.Array:
    """Derives the start of each trial from its target and seed: keys [target, seed]."""
    return _start_keys(jnp.asarray(target_ids, jnp.uint32), jnp.asarray(seeds, jnp.uint32))
