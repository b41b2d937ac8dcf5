"""Targets x seeds in one compiled loop: the only file that knows the whole chain.

A program runs a *chunk* of the attack for every trial: `points` times, measure the candidate, then
take `every` steps. The host calls it until the last step is done. Compiled once per shape; the
network's parameters, the targets and all numbers are arguments.
"""

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxinv import client, defenses, labels, metrics, planner, rng
from jaxinv.attacks.base import Attack, Candidate, Known, Losses
from jaxinv.image_prior import ImagePrior
from jaxinv.objectives import OBJECTIVES, compare
from jaxinv.priors import SEEDS
from jaxinv.types import Normalization, PyTree, Target, Truth

TRACE_POINTS = 100  # per trial, at the most, beside the end
SHARED, DEALT = PartitionSpec(), PartitionSpec("trial")  # to every device; groups among them


class Trace(NamedTuple):
    """What was seen on the way. Axes: point, target, seed."""

    step: Int[np.ndarray, " point"]  # steps taken when measured
    psnr: Float[Array, "point target seed"]
    objective: Float[Array, "point target seed"]
    prior: Float[Array, "point target seed"]


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
    plan: planner.Plan  # by which they were computed
    bytes: int  # that its program takes of each device
    outcome: dict[str, np.ndarray] | None = None  # what else the attack found: `Attack.outcome`


class Clients(NamedTuple):
    """What the clients do, and what of it the attacker gets: static."""

    labels: str = "known"  # how the attacker comes by them: a name of `labels.LABELS`
    batch_norm: str = "eval"
    local: client.Local = client.Local()
    shuffled: bool = False  # each epoch in an order of its own, which the attacker does not know
    assumed_images: int | None = None  # images the attacker takes the update to be of; None: all
    assumed: client.Local = client.Local()  # what the attacker takes for `local`
    observe: bool = False  # whether the attacker compares statistics with the running ones
    defense: tuple[str, ...] = ()  # what they do to their updates: names of `defenses.DEFENSES`
    told: tuple[str, ...] = ()  # of these, what the attacker knows
    classifier: tuple[str, ...] = ()  # path of the last dense layer, where an attacker is told


class Shared(NamedTuple):
    """What came of the clients' work. Axis: target."""

    targets: Target
    cosine: Float[Array, " target"]  # of what was shared with the update before the defense
    error: Float[Array, " target"]  # |shared - update| / |update|


def make_targets(
    module: nn.Module,
    variables: PyTree,
    truths: Truth,
    normalization: Normalization,
    clients: Clients = Clients(),  # noqa: B008
    client_lr: float = 1.0,
    order_keys: jax.Array | None = None,
    strengths: tuple = (),
    draw_keys: jax.Array | None = None,
) -> Shared:
    """Computes what the attacker gets for each private batch.

    Args:
      truths: with a leading target axis.
      clients: what they do.
      client_lr: the learning rate of their local steps.
      order_keys: [target], of the orders in which they take their images; None where not shuffled.
      strengths: of the defenses.
      draw_keys: [target], of the defenses' draws; by the target's position where not given.
    """
    count = len(truths.labels)
    if order_keys is None:
        order_keys = jnp.zeros(count)
    if draw_keys is None:
        draw_keys = noise_keys(range(count), [0] * count)
    strengths = jax.tree.map(lambda x: jnp.asarray(x, truths.images.dtype), strengths)
    return _make_targets(
        module, clients, variables, truths, normalization, jnp.float32(client_lr), strengths,
        order_keys, draw_keys,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1))
def _make_targets(
    module, clients, variables, truths, normalization, client_lr, strengths, order_keys, draw_keys
):
    loss = client.loss_fn(module, variables, clients.batch_norm)
    params = variables["params"]

    def one(arguments):
        truth, key, draw_key = arguments
        images, classes = normalization.normalize(truth.images), truth.labels
        if clients.shuffled:
            epochs = jax.random.split(key, clients.local.epochs)
            orders = jax.vmap(lambda k: jax.random.permutation(k, len(classes)))(epochs)
            images, classes = images[orders], classes[orders]
        update, statistics = client.update(
            loss, params, images, classes, clients.local, client_lr.astype(images.dtype)
        )
        bare = update
        if clients.defense:
            scene = defenses.Scene(module, variables, images, classes)
            update = defenses.defend(clients.defense, update, strengths, draw_key, scene)
        between = compare(update, bare)
        kept = between.cross / jnp.sqrt(between.own * between.shared)
        error = jnp.sqrt(between.distance / between.shared)
        count = clients.assumed_images or len(truth.labels)
        told = ()
        if clients.told:
            facts = defenses.Facts(clients.classifier, count)
            told = defenses.tell(clients.told, strengths, update, facts)
        sent = statistics if clients.batch_norm == "train-shared" else ()
        if clients.observe:
            sent = {"batch_stats": variables["batch_stats"]}
        if clients.labels in ("known", "joint"):
            return Shared(Target(update, truth.labels, sent, told), kept, error)
        found = labels.infer(
            clients.labels, module, variables, update, truth.images.shape[1:], count,
            clients.assumed.steps(count),
        )  # fmt: skip
        return Shared(Target(update, found, sent, told), kept, error)

    return lax.map(one, (truths, order_keys, draw_keys))


class Problem(flax.struct.PyTreeNode):
    """What all trials of a cell share: the network, the updates, and what is known of images."""

    module: nn.Module = flax.struct.field(pytree_node=False)
    image_shape: tuple[int, int, int] = flax.struct.field(pytree_node=False)
    variables: PyTree
    targets: Target  # with a leading target axis
    truths: Truth | None  # likewise; read by the measurements alone, which are NaN without
    normalization: Normalization
    image_prior: ImagePrior | None = None


class Resources(NamedTuple):
    """By what a program runs, and who is told of it."""

    plan: planner.Plan  # how the trials are grouped
    memory: float = math.inf  # bytes that may be taken on each device
    progress: Callable[[int, float], None] = lambda steps, psnr: None  # steps, mean PSNR
    announce: Callable[[str], None] = lambda line: None  # the plan in a line, found or changed


def run(
    problem: Problem, attack: Attack, numbers: Any, keys: jax.Array, resources: Resources,
    start: Candidate | None = None,
) -> Result:  # fmt: skip
    """Attacks every target from every seed and measures every trial.

    Groups of trials that do not fit the memory are halved: before the start by the program's own
    analysis, and where a device runs out nevertheless, from the start. Where one trial alone does
    not fit, the attack is asked for a smaller form of itself.

    Guarantees:
      * no trial changes another, but where a prior couples the seeds; the truth changes none;
      * numbers and arrays do not recompile.

    Args:
      problem: what all trials share.
      attack: static.
      numbers: its own, with an axis of seeds.
      keys: [target, seed].
      resources: devices, memory, and who is told.
      start: what another attack found, [target, seed, ...]; None to start from the keys.

    Raises:
      UserError: not even one trial at once fits the memory.
    """
    total = int(numbers.iterations)
    every = max(1, -(-total // TRACE_POINTS))
    points = max(1, attack.steps_per_call // every)
    plan, memory = resources.plan, resources.memory
    while True:
        grid = planner.make_grid(plan, *keys.shape)
        dealt = jax.tree.map(grid.deal, (keys, start))
        states = init_states(attack, problem, numbers, grid.seed, *dealt)
        states = jax.device_put(states, NamedSharding(_mesh(plan.devices), DEALT))
        chunk = (attack, points, plan.devices, problem, numbers, jnp.int32(every))
        # Compiled ahead, to ask for its memory; the calls below find this very program.
        program = run_chunk.lower(
            *chunk, jnp.int32(0), jnp.int32(1), grid.target, grid.seed, states
        ).compile()
        needed = planner.program_bytes(program)
        if needed > memory:
            if plan.halved() is None and (smaller := attack.smaller()) is not None:
                attack = smaller
            else:
                plan = planner.smaller(plan, needed, memory)
            continue
        resources.announce(planner.describe(plan, needed))
        traces, step = [], 0
        try:
            while step <= total:
                # The last point takes no step: it measures the end.
                count = min(points, -(-(total - step) // every) + 1)
                states, trace = run_chunk(
                    *chunk, jnp.int32(step), jnp.int32(count), grid.target, grid.seed, states
                )
                taken = np.minimum(step + every * np.arange(count), total)
                seen = (np.moveaxis(grid.gather(leaf), 2, 0)[:count] for leaf in trace)
                traces.append(Trace(taken, *seen))
                step += points * every
                resources.progress(min(step, total), float(np.mean(traces[-1].psnr[-1])))
            break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            plan = planner.smaller(plan, needed, 0.99 * needed)  # there was less than needed
    trace = jax.tree.map(lambda *parts: np.concatenate(parts), *traces)
    candidates, outcome = jax.tree.map(grid.gather, (states.candidate, attack.outcome(states)))
    return collect(problem, attack, candidates, outcome, trace, plan, needed)


def collect(
    problem: Problem, attack: Attack, candidates: Candidate, outcome: dict[str, np.ndarray],
    trace: Trace, plan: planner.Plan, needed: int,
) -> Result:  # fmt: skip
    """Matches, scores and checks the end of all trials."""
    pixels, found, scores, finite = finish(attack, problem, candidates)
    objective, prior = trace.objective[-1], trace.prior[-1]
    finite = np.asarray(finite) & np.isfinite(objective)
    status = outcome.pop("status", np.full(objective.shape, "ok"))
    return Result(
        np.asarray(pixels), found, scores, objective, prior, finite, status, candidates, trace,
        plan, needed, outcome,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def init_states(attack, problem, numbers, group_seeds, keys, start):
    """Makes every first state: keys [group, target, seed] to states with those axes in front."""
    known = Known(None, None, None, problem.normalization, problem.image_prior)
    shape = (problem.targets.labels.shape[1], *problem.image_shape)

    def of_group(seeds, keys, start):
        own = _of_seeds(numbers, seeds)
        one = lambda own, key, start: attack.init(own, key, shape, known, start)  # noqa: E731
        return jax.vmap(jax.vmap(one), in_axes=(None, 0, 0))(own, keys, start)

    return jax.vmap(of_group)(group_seeds, keys, start)


def _of_seeds(numbers, seeds):
    """The numbers of some seeds; the iterations are one number for all."""
    own = jax.tree.map(lambda leaf: leaf[seeds], numbers._replace(iterations=None))
    return own._replace(iterations=jnp.broadcast_to(numbers.iterations, seeds.shape))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(10,))
def run_chunk(
    attack, points, devices, problem, numbers, every, start, count, group_targets, group_seeds,
    states,
):  # fmt: skip
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
                simulate(problem.module, problem.variables, attack), problem.variables["params"],
                target, problem.normalization, problem.image_prior,
            )  # fmt: skip
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

            kind = state.candidate.images.dtype
            room = tuple(jnp.full(points, jnp.nan, kind) for _ in range(3))
            state, _, trace = lax.fori_loop(0, count, point, (state, start, room))
            return state, trace

        return lax.map(of_group, groups)

    # Each device loops over its own groups and talks to no other. Without vma tracking, a gradient
    # with respect to the replicated parameters stays this device's own (no implicit psum).
    on_devices = jax.shard_map(
        of_device, mesh=_mesh(devices), in_specs=(*[SHARED] * 5, DEALT), out_specs=DEALT,
        check_vma=False,
    )  # fmt: skip
    return on_devices(problem, numbers, every, start, count, (group_targets, group_seeds, states))


def _mesh(devices: int) -> jax.sharding.Mesh:
    """The first local devices in a row; groups of trials are dealt out along it."""
    local = np.array(jax.local_devices()[:devices])
    return jax.sharding.Mesh(local, ("trial",), axis_types=(jax.sharding.AxisType.Auto,))


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
        Candidate(images, None), trace, planner.Plan(1, 1), 0,
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


def simulate(module: nn.Module, variables: PyTree, attack: Attack) -> client.LossFn:
    """The client's loss as the attacker simulates it."""
    return client.loss_fn(module, variables, attack.batch_norm, "statistics" in attack.priors)


@functools.partial(jax.jit, static_argnums=0)
def finish(attack, problem, candidates):
    """Matches, scores and checks the final candidates [target, seed, ...]."""
    normalization = problem.normalization

    def one(truth, given, candidate):
        pixels, scores = normalization.pixels(attack.reconstruct(candidate)), None
        if truth is not None:
            pixels = metrics.match(pixels, truth.images, normalization.mean)
            scores = metrics.score(truth, pixels)
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
    attack = attack._replace(defense=())
    batch = problem.targets.labels.shape[1]
    steps = attack.local.steps(batch)
    if steps > 1:
        once = attack._replace(local=client.Local())
        if "order" in once.priors:
            rest = tuple(name for name in once.priors if name != "order")
            once = once._replace(priors=rest, by_epoch=False)
        labels = jax.ShapeDtypeStruct((1, attack.local.batch or batch), jnp.int32)
        targets = problem.targets._replace(labels=labels)
        return steps * step_flops(problem.replace(targets=targets), once)
    numbers = attack.numbers(1, collections.defaultdict(lambda: 1.0, iterations=1))
    key = jax.random.key(0)[None, None]
    states = jax.eval_shape(
        functools.partial(init_states, attack), problem, numbers, np.zeros((1, 1), int),
        jax.eval_shape(lambda: key[None]), None,
    )  # fmt: skip
    lowered = run_chunk.lower(
        attack, 1, 1, problem, numbers, jnp.int32(1), jnp.int32(0), jnp.int32(1),
        np.zeros((1, 1), int), np.zeros((1, 1), int), states,
    )  # fmt: skip
    return float(lowered.cost_analysis()["flops"]) * attack.products


@jax.jit
def _start_keys(target_ids, seeds):
    one = lambda target, seed: rng.stream_key(rng.Stream.START, seed, target)  # noqa: E731
    return jax.vmap(lambda t: jax.vmap(lambda s: one(t, s))(seeds))(target_ids)


def start_keys(target_ids: Sequence[int], seeds: Sequence[int]) -> jax.Array:
    """Derives the start of each trial from its target and seed: keys [target, seed]."""
    return _start_keys(jnp.asarray(target_ids, jnp.uint32), jnp.asarray(seeds, jnp.uint32))


def noise_keys(target_ids: Sequence[int], draws: Sequence[int]) -> jax.Array:
    """Derives the defense's draw for each target from its id and its noise seed: keys [target]."""
    one = lambda target, draw: rng.stream_key(rng.Stream.DEFENSE, draw, target)  # noqa: E731
    return jax.vmap(one)(*(jnp.asarray(x, jnp.uint32) for x in (target_ids, draws)))


def order_keys(target_ids: Sequence[int]) -> jax.Array:
    """Derives the order in which each target's client takes its images: keys [target]."""
    one = lambda target: rng.stream_key(rng.Stream.DATA, 0, target)  # noqa: E731
    return jax.vmap(one)(jnp.asarray(target_ids, jnp.uint32))
