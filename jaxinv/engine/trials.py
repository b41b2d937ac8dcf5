"""Targets x seeds of any iterative attack in one compiled loop.

A program runs a *chunk* of the attack for every trial: `points` times, measure the candidate, then
take `every` steps. The host calls it until the last step is done. Compiled once per shape; the
network's parameters, the targets and all numbers are arguments.
"""

import collections
import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxinv import client, metrics
from jaxinv.attacks.base import Attack, Candidate, Known, Losses
from jaxinv.attacks.priors import SEEDS, needing
from jaxinv.data.image_prior import ImagePrior
from jaxinv.engine import planner, snapshots
from jaxinv.engine.snapshots import Snapshots
from jaxinv.machine import runtime
from jaxinv.types import Normalization, PyTree, Target, Truth

FIRST_FRAME = 60  # one over the share of the steps after which the first image has changed
TRACE_POINTS = 100  # per trial, at the most, beside the end
CALL_SECONDS = 60.0  # what a call of the program should take at the most
SHARED, DEALT = PartitionSpec(), PartitionSpec("trial")  # to every device; groups among them


class Trace(NamedTuple):
    """What was seen on the way. Axes: point, target, seed."""

    step: Int[np.ndarray, " point"]  # steps taken when measured
    psnr: Float[Array, "point target seed"]
    objective: Float[Array, "point target seed"]
    prior: Float[Array, "point target seed"]


class Frames(NamedTuple):
    """Pictures of the way, matched to the truth's order, in 8 bits. Axes: frame, target, seed."""

    step: Int[np.ndarray, " frame"]  # steps taken
    pixels: UInt8[np.ndarray, "frame target seed image height width channel"]


class Result(NamedTuple):
    """The end of every trial. Axes: target, seed."""

    pixels: Float[Array, "target seed image height width channel"]  # matched to the truth's order
    labels: Int[Array, "target seed image"]  # given, or as found beside the images
    scores: metrics.Scores | None  # None without truths
    objective: Float[Array, "target seed"]
    prior: Float[Array, "target seed"]  # all priors, each times its weight
    finite: Bool[Array, "target seed"]
    status: np.ndarray  # [target, seed], of the trials that are finite: `results.TRIALS`
    candidates: Candidate  # as the attack left them: not matched, not clipped
    trace: Trace
    plan: planner.GroupPlan  # by which they were computed
    bytes: int  # that its program takes of each device
    outcome: dict[str, np.ndarray] | None = None  # what else the attack found: `Attack.outcome`
    frames: Frames | None = None  # of an attack with steps


def comparable(result: Result) -> Float[np.ndarray, "target seed"]:
    """The objectives, inf where a trial is not finite: their argmin is the attacker's pick."""
    return np.where(result.finite, np.asarray(result.objective), np.inf)


class Problem(flax.struct.PyTreeNode):
    """What all trials of a cell share: the network, the updates, and what is known of images."""

    module: nn.Module = flax.struct.field(pytree_node=False)
    image_shape: tuple[int, int, int] = flax.struct.field(pytree_node=False)
    variables: PyTree
    targets: Target  # with a leading target axis
    truths: Truth | None  # likewise; read by the measurements alone, which are NaN without
    normalization: Normalization
    image_prior: ImagePrior | None = None
    learned: Mapping[str, PyTree] = flax.struct.field(default_factory=dict)  # trained, by kind


class Resources(NamedTuple):
    """What a run may take, how its trials are grouped, who hears of it and where it is kept."""

    plan: planner.GroupPlan = planner.GroupPlan(1, 1)  # of the trials; `attack_targets` finds it
    memory: float = math.inf  # bytes that may be taken on each device
    progress: Callable[[int, float], None] = lambda steps, psnr: None  # steps, mean PSNR
    announce: Callable[[str], None] = lambda line: None  # the plan in a line, found or changed
    snapshots: Snapshots | None = None  # of a run in work; None: a kill costs all of it
    frames: int = 0  # pictures of every trial that are kept of its way


def run(
    problem: Problem,
    attack: Attack,
    numbers: Any,
    keys: jax.Array,
    resources: Resources,
    initial: Candidate | None = None,
) -> Result:
    """Attacks every target from every seed and measures every trial.

    Groups of trials that do not fit the memory are halved: before the start by the program's own
    analysis, and where a device runs out nevertheless, from the start. Where one trial alone does
    not fit, the attack is asked for a smaller form of itself.

    Guarantees:
      * no trial changes another, but where a target's seeds are coupled; the truth changes none;
      * numbers and arrays do not recompile;
      * a run that was interrupted and goes on from its snapshot ends in the same bits.

    Args:
      problem: what all trials share.
      attack: static.
      numbers: its own, with an axis of seeds.
      keys: [target, seed].
      resources: devices, memory, who hears of it, where it is kept.
      initial: what another attack found, [target, seed, ...]; None to start from the keys.

    Raises:
      UserError: not even one trial at once fits the memory.
    """
    total = int(numbers.iterations)
    points = max(1, attack.steps_per_call // _points_every(total))
    plan, memory = resources.plan, resources.memory
    while True:
        grid = planner.make_grid(plan, *keys.shape)
        dealt = jax.tree.map(grid.deal, (keys, initial))
        states = init_states(attack, problem, numbers, grid.target, grid.seed, *dealt)
        states = jax.device_put(states, NamedSharding(_mesh(plan.devices), DEALT))
        chunk = Chunk(attack, points, plan.devices, problem, numbers)
        # Compiled ahead, to ask for its memory; the calls below find this very program.
        one = jnp.int32(1)
        program = run_chunk.lower(*chunk, one, one, one, grid.target, grid.seed, states).compile()
        needed = planner.program_bytes(program)
        if needed > memory:
            attack, plan = _reduced(attack, plan, needed, memory)
            continue
        resources.announce(planner.describe(plan, needed))
        try:
            work = Unfinished(np.int64(0), _no_trace(keys.shape), _no_frames(problem, keys), states)
            work = _run_to_end(chunk, grid, work, resources)
            break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            attack, plan = _reduced(attack, plan, needed, 0.99 * needed)  # there was less
    ends = work.states.candidate, attack.outcome(work.states)
    candidates, outcome = jax.tree.map(grid.gather, ends)
    found = collect(problem, attack, candidates, outcome, work.trace, plan, needed)
    return found._replace(frames=work.frames)


def _reduced(
    attack: Attack, plan: planner.GroupPlan, needed: float, limit: float
) -> tuple[Attack, planner.GroupPlan]:
    """Fewer trials at once, or where it is one already a smaller form of the attack."""
    if plan.halved() is None and (form := attack.smaller()) is not None:
        return form, plan
    return attack, planner.smaller(plan, needed, limit)


class Chunk(NamedTuple):
    """What all calls of a program have in common: the first arguments of `run_chunk`."""

    attack: Attack
    points: int
    devices: int
    problem: Problem
    numbers: Any


class Unfinished(NamedTuple):
    """How far a run has come."""

    step: np.int64  # steps taken; one more than there are when the end is measured too
    trace: Trace  # so far
    frames: Frames  # so far
    states: PyTree  # [group, target, seed, ...]


def _no_trace(trials: tuple[int, int]) -> Trace:
    """The trace of a run that has not begun."""
    return Trace(np.zeros(0, np.int64), *[np.zeros((0, *trials), np.float32)] * 3)


def _no_frames(problem: Problem, keys: jax.Array) -> Frames:
    """The pictures of a run that has not begun."""
    # Matched pictures are as many as the truth's, whatever number the attacker takes them for.
    of = problem.targets if problem.truths is None else problem.truths
    shape = (0, *keys.shape, of.labels.shape[1], *problem.image_shape)
    return Frames(np.zeros(0, np.int64), np.zeros(shape, np.uint8))


def frame_steps(total: int, count: int) -> list[int]:
    """The steps at which pictures are kept: the start, then ever further apart, before the end."""
    if not count:
        return []
    steps = np.geomspace(max(1, total / FIRST_FRAME), total, count).round().astype(int)
    return [step for step in np.unique([0, *steps]).tolist() if step < total]


def _run_to_end(
    chunk: Chunk, grid: planner.Grid, work: Unfinished, resources: Resources
) -> Unfinished:
    """Calls the program until the end is measured, and keeps the work meanwhile.

    A call of many large trials could take hours. So the first one takes a step, and the others as
    many as fit `CALL_SECONDS`. They are calls of one program, and no result depends on it.
    """
    total = int(chunk.numbers.iterations)
    shown_at = frame_steps(total, resources.frames)
    path, pace = None, math.inf  # seconds that a step takes
    if resources.snapshots is not None:
        static = (chunk.attack, chunk.points, chunk.devices)
        arrays = (chunk.problem, chunk.numbers, grid.target, grid.seed, work.states)
        path = resources.snapshots.of_run(static, arrays)
        work = _resume(path, work, resources)
    keeper = snapshots.Keeper(path)
    with runtime.held_interrupts(path is not None) as interrupts:
        while work.step <= total:
            step, frames = int(work.step), len(work.frames.step)
            stop = shown_at[frames] if frames < len(shown_at) else total + 1
            if step == stop:
                work = _with_frame(chunk, grid, work)
                continue
            began = time.monotonic()
            most = min(stop - step, max(1, int(CALL_SECONDS / pace)))
            stride, count = _next_call(step, total, chunk.points, most)
            work = _call(chunk, grid, work, stride, count, resources.progress)
            pace = max(time.monotonic() - began, 1e-6) / (stride * count)
            keeper.keep(work, now=bool(interrupts), is_end=work.step > total)
            if interrupts:
                raise KeyboardInterrupt
    return work


def _resume(path: Path, work: Unfinished, resources: Resources) -> Unfinished:
    """The work as it was kept, or as it is where nothing was."""
    found = snapshots.read(path, work, resources.announce)
    if found is None:
        return work
    sharding = jax.tree.leaves(work.states)[0].sharding
    return found._replace(states=jax.device_put(found.states, sharding))


def _points_every(total: int) -> int:
    """Steps from one point of the trace to the next."""
    return max(1, -(-total // TRACE_POINTS))


def _next_call(step: int, total: int, points: int, most: int) -> tuple[int, int]:
    """Chooses the steps between two points of the next call, and the number of points.

    Args:
      step: steps taken.
      total: steps in all.
      points: room for them in a call.
      most: steps that it should take.
    """
    every = _points_every(total)
    if step < total and (most < every or step % every):  # a part of the way to the next point
        return min(max(1, most), every - step % every, total - step), 1
    # The last point takes no step: it measures the end.
    return every, min(points, max(1, most // every), -(-(total - step) // every) + 1)


def _call(
    chunk: Chunk,
    grid: planner.Grid,
    work: Unfinished,
    stride: int,
    count: int,
    progress: Callable[[int, float], None],
) -> Unfinished:
    """Calls the program once."""
    total, step = int(chunk.numbers.iterations), int(work.step)
    numbers = map(jnp.int32, (stride, step, count))
    states, trace = run_chunk(*chunk, *numbers, grid.target, grid.seed, work.states)
    taken = np.minimum(step + stride * np.arange(count), total)
    seen = [np.moveaxis(grid.gather(leaf), 2, 0)[:count] for leaf in trace]
    at = (taken % _points_every(total) == 0) | (taken == total)  # others were on the way
    new = Trace(taken[at], *(column[at] for column in seen))
    trace = jax.tree.map(lambda old, new: np.concatenate([old, new]), work.trace, new)
    progress(min(step + stride * count, total), float(np.mean(seen[0][-1])))
    is_end = taken[-1] == total
    ahead = np.int64(total + 1 if is_end else min(step + stride * count, total))
    return work._replace(step=ahead, trace=trace, states=states)


def _with_frame(chunk: Chunk, grid: planner.Grid, work: Unfinished) -> Unfinished:
    """Keeps a picture of every trial where it stands."""
    candidates = jax.tree.map(grid.gather, work.states.candidate)
    pixels = np.asarray(_pictures(chunk.attack, chunk.problem, candidates))
    seen = Frames(np.array([work.step]), pixels[None])
    return work._replace(frames=jax.tree.map(lambda *x: np.concatenate(x), work.frames, seen))


def _matched(attack, normalization, truth, candidate):
    """A candidate's pixels, in the truth's order where there is one."""
    pixels = normalization.pixels(attack.reconstruct(candidate))
    return pixels if truth is None else metrics.match(pixels, truth.images, normalization.mean)


@functools.partial(jax.jit, static_argnums=0)
def _pictures(attack, problem, candidates):
    """The images of candidates [target, seed], matched, in 8 bits."""
    normalization = problem.normalization

    def one(truth, candidate):
        pixels = _matched(attack, normalization, truth, candidate)
        return jnp.round(jnp.nan_to_num(pixels) * 255).astype(jnp.uint8)

    def of_target(arguments):
        truth, own = arguments
        return lax.map(functools.partial(one, truth), own)

    return lax.map(of_target, (problem.truths, candidates))


def collect(
    problem: Problem,
    attack: Attack,
    candidates: Candidate,
    outcome: dict[str, np.ndarray],
    trace: Trace,
    plan: planner.GroupPlan,
    needed: int,
) -> Result:
    """Matches, scores and checks the end of all trials."""
    pixels, found, scores, finite = finish(attack, problem, candidates)
    objective, prior = trace.objective[-1], trace.prior[-1]
    finite = np.asarray(finite) & np.isfinite(objective)
    status = outcome.pop("status", np.full(objective.shape, "ok"))
    return Result(
        np.asarray(pixels),
        found,
        scores,
        objective,
        prior,
        finite,
        status,
        candidates,
        trace,
        plan,
        needed,
        outcome,
    )


@functools.partial(jax.jit, static_argnums=0)
def init_states(attack, problem, numbers, group_targets, group_seeds, keys, initial):
    """Makes every first state: keys [group, target, seed] to states with those axes in front."""
    shape = (problem.targets.labels.shape[1], *problem.image_shape)

    def of_group(rows, seeds, keys, initial):
        targets = jax.tree.map(lambda leaf: leaf[rows], problem.targets)
        own = _of_seeds(numbers, seeds)

        def one(target, own, key, initial):
            # Without loss and parameters: no start asks what update it would cause.
            facts = problem.normalization, problem.image_prior, problem.learned
            return attack.init(own, key, shape, Known(None, None, target, *facts), initial)

        of_target = jax.vmap(one, in_axes=(None, 0, 0, 0))
        return jax.vmap(of_target, in_axes=(0, None, 0, 0))(targets, own, keys, initial)

    return jax.vmap(of_group)(group_targets, group_seeds, keys, initial)


def _of_seeds(numbers, seeds):
    """The numbers of some seeds; the iterations are one number for all."""
    own = jax.tree.map(lambda leaf: leaf[seeds], numbers._replace(iterations=None))
    return own._replace(iterations=jnp.broadcast_to(numbers.iterations, seeds.shape))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(10,))
def run_chunk(
    attack,
    points,
    devices,
    problem,
    numbers,
    every,
    start,
    count,
    group_targets,
    group_seeds,
    states,
):
    """`count` times: measure, then take `every` steps. States are [group, target, seed, ...].

    Returns the states and (psnr, objective, prior), each [group, target, seed, point] with room for
    `points`.
    """

    def of_device(problem, numbers, every, start, count, groups):
        iterations = numbers.iterations  # one number for all trials: it is not batched

        def of_group(arguments):
            rows, columns, states = arguments
            here = jax.tree.map(lambda leaf: leaf[rows], (problem.targets, problem.truths))
            own = jax.tree.map(lambda leaf: leaf[columns], numbers._replace(iterations=None))
            of_target = jax.vmap(trial, in_axes=(None, None, 0, 0), axis_name=SEEDS)
            return jax.vmap(of_target, in_axes=(0, 0, None, 0))(*here, own, states)

        def trial(target, truth, own, state):
            known = Known(
                simulate(problem.module, problem.variables, attack),
                problem.variables["params"],
                target,
                problem.normalization,
                problem.image_prior,
                problem.learned,
            )
            own = own._replace(iterations=iterations)

            def point(number, carry):
                state, index, trace = carry
                psnr = jnp.full((), jnp.nan)
                if truth is not None:
                    found = attack.reconstruct(state.candidate)
                    psnr = metrics.trace_psnr(truth, problem.normalization, found)

                def take(i, inner):
                    state, losses = inner
                    state, now = attack.step(own, known, index + i, state)
                    # The losses of the first step belong to the candidate just measured.
                    return state, jax.tree.map(lambda a, b: jnp.where(i == 0, a, b), now, losses)

                none = Losses(jnp.zeros(()), jnp.zeros(()))
                steps = jnp.clip(iterations - index, 1, every)
                state, losses = lax.fori_loop(0, steps, take, (state, none))
                index = jnp.minimum(index + steps, iterations)
                measured = (psnr, losses.objective, losses.prior)
                trace = tuple(column.at[number].set(x) for column, x in zip(trace, measured))
                return state, index, trace

            dtype = state.candidate.images.dtype
            room = tuple(jnp.full(points, jnp.nan, dtype) for _ in range(3))
            state, _, trace = lax.fori_loop(0, count, point, (state, start, room))
            return state, trace

        return lax.map(of_group, groups)

    # Each device loops over its own groups and talks to no other. Without vma tracking, a gradient
    # with respect to the replicated parameters stays this device's own (no implicit psum).
    on_devices = jax.shard_map(
        of_device,
        mesh=_mesh(devices),
        in_specs=(*[SHARED] * 5, DEALT),
        out_specs=DEALT,
        check_vma=False,
    )
    return on_devices(problem, numbers, every, start, count, (group_targets, group_seeds, states))


def _mesh(devices: int) -> jax.sharding.Mesh:
    """The first local devices in a row; groups of trials are dealt out along it."""
    local = np.array(jax.local_devices()[:devices])
    return jax.sharding.Mesh(local, ("trial",), axis_types=(jax.sharding.AxisType.Auto,))


def simulate(module: nn.Module, variables: PyTree, attack: Attack) -> client.LossFn:
    """The client's loss as the attacker simulates it."""
    observed = bool(needing("statistics", attack.priors))
    return client.loss_fn(module, variables, attack.batch_norm, observed)


@functools.partial(jax.jit, static_argnums=0)
def finish(attack, problem, candidates):
    """Matches, scores and checks the final candidates [target, seed, ...]."""
    normalization = problem.normalization

    def one(truth, given, candidate):
        pixels = _matched(attack, normalization, truth, candidate)
        scores = None if truth is None else metrics.score(truth, pixels)
        found = given if candidate.logits is None else candidate.logits.argmax(axis=-1)
        finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(candidate)]
        return pixels, found, scores, jnp.stack(finite).all()

    def of_target(arguments):
        truth, given, own = arguments
        return lax.map(functools.partial(one, truth, given), own)

    return lax.map(of_target, (problem.truths, problem.targets.labels, candidates))


def step_flops(problem: Problem, attack: Attack) -> float:
    """Counts the floating-point operations of one step of one trial, by XLA's own analysis.

    Without those of a defense that the attacker simulates, and of what is computed twice to save
    memory. XLA counts a loop's body once: local steps are counted as their number times one, the
    conjugate gradients of a second-order step as all of its products.

    Args:
      problem: of one target, whose arrays may be shapes.
      attack: of which a step is counted.
    """
    attack = attack.replace(defense=())
    batch = problem.targets.labels.shape[1]
    steps = attack.local.steps(batch)
    if steps > 1:
        once = attack.replace(local=client.Local())
        if of_epochs := needing("epochs", once.priors):
            rest = tuple(name for name in once.priors if name not in of_epochs)
            once = once.replace(priors=rest, by_epoch=False)
        labels = jax.ShapeDtypeStruct((1, attack.local.batch or batch), jnp.int32)
        targets = problem.targets._replace(labels=labels)
        return steps * step_flops(problem.replace(targets=targets), once)
    numbers = attack.numbers(1, collections.defaultdict(lambda: 1.0, iterations=1))
    key = jax.random.key(0)[None, None]
    states = jax.eval_shape(
        functools.partial(init_states, attack),
        problem,
        numbers,
        np.zeros((1, 1), int),
        np.zeros((1, 1), int),
        jax.eval_shape(lambda: key[None]),
        None,
    )
    lowered = run_chunk.lower(
        attack,
        1,
        1,
        problem,
        numbers,
        jnp.int32(1),
        jnp.int32(0),
        jnp.int32(1),
        np.zeros((1, 1), int),
        np.zeros((1, 1), int),
        states,
    )
    # Of a program for a GPU only the compiled one can be analyzed; a backend need not say.
    analysis = lowered.cost_analysis() or lowered.compile().cost_analysis() or {"flops": math.nan}
    return float(analysis["flops"]) * attack.passes_per_step
