"""Targets x seeds in one compiled loop: the only file that knows the whole chain.

A program runs a *chunk* of the attack for every trial: `points` times, measure the candidate, then
take `every` steps. The host calls it until the last step is done. Compiled once per shape; the
network's parameters, the targets and all numbers are arguments.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinv import client, metrics, rng
from jaxinv.attacks import gradient_matching as attack
from jaxinv.labels import classifier_path, idlg
from jaxinv.types import Normalization, PyTree, Target, Truth

TRACE_POINTS = 100  # per trial, at the most, beside the end
CHUNK_STEPS = 50  # between two looks of the progress bar


class Plan(NamedTuple):
    """How many seeds of a target go through the network at once; the groups follow one another."""

    seeds_at_once: int


class Trace(NamedTuple):
    """What was seen on the way. Axes: point, target, seed."""

    step: Int[Array, " point"]  # steps taken when measured
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


def make_plan(params: PyTree, seeds: int) -> Plan:
    """Chooses the group size: all seeds on an accelerator, what stays in the cache on a CPU.

    On a CPU a batch that leaves the cache costs more than it saves, so that networks beyond
    LeNet's size take one seed after the other. The size divides the number of seeds: no group is
    compiled twice.
    """
    if jax.default_backend() != "cpu":
        return Plan(seeds)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    most = 8 if size < 100_000 else 1
    return Plan(max(d for d in range(1, min(most, seeds) + 1) if seeds % d == 0))


def make_targets(
    module: nn.Module,
    variables: PyTree,
    truths: Truth,
    normalization: Normalization,
    labels: str,
) -> Target:
    """Computes what the attacker gets for each private batch.

    Args:
      truths: with a leading target axis.
      labels: "known" (the client's labels come with the update) or "idlg" (read off the update).
    """
    return _make_targets(module, labels, variables, truths, normalization)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _make_targets(module, labels, variables, truths, normalization):
    apply = client.apply_fn(module, variables)

    def one(truth):
        update = client.share_gradient(apply, variables["params"], truth, normalization)
        if labels == "known":
            return Target(update, truth.labels)
        classifier = classifier_path(module, variables, truth.images)
        return Target(update, idlg(update, classifier))

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
    plan: Plan,
    progress: Callable[[int, float], None] = lambda steps, psnr: None,
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
      method, numbers: the attack's settings.
      image_shape: height, width, channel.
      keys: [target, seed], one start each.
      plan: how the trials are grouped.
      progress: called after each chunk with the steps done and the current mean PSNR.
    """
    total = int(numbers.iterations)
    every = max(1, -(-total // TRACE_POINTS))
    points = max(1, CHUNK_STEPS // every)
    batch_shape = (targets.labels.shape[1], *image_shape)
    states = _init(method, batch_shape, normalization, keys)
    traces, step = [], 0
    while step <= total:
        states, trace = _chunk(
            module, method, points, plan, variables, targets, truths, normalization,
            numbers, jnp.int32(every), jnp.int32(step), states,
        )  # fmt: skip
        traces.append(jax.tree.map(np.asarray, trace))
        step += points * every
        progress(min(step, total), float(np.mean(traces[-1].psnr[-1])))
    trace = jax.tree.map(lambda *parts: np.concatenate(parts), *traces)
    # Points beyond the end repeat it: keep the first that has taken every step.
    last = int(np.argmax(trace.step >= total))
    trace = jax.tree.map(lambda leaf: leaf[: last + 1], trace)
    pixels, scores, finite = _finish(truths, normalization, states.candidate)
    objective, prior = trace.objective[last], trace.prior[last]
    finite = np.asarray(finite) & np.isfinite(objective)
    return Result(np.asarray(pixels), scores, objective, prior, finite, trace)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(method, shape, normalization, keys):
    one = lambda key: attack.init(method, key, shape, normalization)  # noqa: E731
    return jax.vmap(jax.vmap(one))(keys)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(11,))
def _chunk(
    module, method, points, plan, variables, targets, truths, normalization,
    numbers, every, start, states,
):  # fmt: skip
    """`points` times: measure, then take `every` steps. States keep [target, seed] in front."""
    apply, params = client.apply_fn(module, variables), variables["params"]

    def trial(target, truth, state):
        def point(carry, _):
            state, index = carry
            psnr = jnp.full((), jnp.nan)
            if truth is not None:
                psnr = metrics.trace_psnr(truth, normalization, state.candidate)

            def take(i, inner):
                state, losses = inner
                state, now = attack.step(
                    method, numbers, apply, params, target, normalization, index + i, state
                )
                # The losses of the first step belong to the candidate just measured.
                return state, jax.tree.map(lambda a, b: jnp.where(i == 0, a, b), now, losses)

            none = attack.Losses(jnp.zeros(()), jnp.zeros(()))
            steps = jnp.clip(numbers.iterations - index, 1, every)
            state, losses = lax.fori_loop(0, steps, take, (state, none))
            seen = Trace(index, psnr, losses.objective, losses.prior)
            return (state, jnp.minimum(index + steps, numbers.iterations)), seen

        (state, _), trace = lax.scan(point, (state, start), length=points)
        return state, trace

    return _grouped(trial, plan, targets, truths, states)


def _grouped(trial, plan, targets, truths, states):
    """Maps a trial over targets, then groups of seeds; within a group it is vmapped."""
    seeds = jax.tree.leaves(states)[0].shape[1]
    group = plan.seeds_at_once
    split = lambda x: x.reshape(seeds // group, group, *x.shape[1:])  # noqa: E731
    join = lambda x: x.reshape(seeds, *x.shape[2:])  # noqa: E731
    axes = Trace(step=None, psnr=1, objective=1, prior=1)

    def of_target(arguments):
        target, truth, states = arguments
        run_group = jax.vmap(functools.partial(trial, target, truth), out_axes=(0, axes))
        states, trace = lax.map(run_group, jax.tree.map(split, states))
        # [group, point, seed] -> [point, seed]
        merge = lambda x: jnp.moveaxis(x, 1, 0).reshape(x.shape[1], seeds)  # noqa: E731
        rest = {name: merge(getattr(trace, name)) for name in ("psnr", "objective", "prior")}
        return jax.tree.map(join, states), Trace(trace.step[0], **rest)

    states, trace = lax.map(of_target, (targets, truths, states))
    rest = {name: getattr(trace, name).swapaxes(0, 1) for name in ("psnr", "objective", "prior")}
    return states, Trace(trace.step[0], **rest)


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
    target = Target(variables["params"], jnp.zeros(batch_shape[0], jnp.int32))
    numbers = attack.Numbers(jnp.float32(1), jnp.float32(1), jnp.int32(1))
    start = functools.partial(attack.init, method, shape=batch_shape, normalization=normalization)
    state = jax.eval_shape(start, jax.random.key(0))

    def one(variables, target, state):
        apply, params = client.apply_fn(module, variables), variables["params"]
        return attack.step(
            method, numbers, apply, params, target, normalization, jnp.int32(0), state
        )

    return float(jax.jit(one).lower(variables, target, state).cost_analysis()["flops"])


@jax.jit
def _start_keys(target_ids, seeds):
    one = lambda target, seed: rng.stream_key(rng.Stream.START, seed, target)  # noqa: E731
    return jax.vmap(lambda t: jax.vmap(lambda s: one(t, s))(seeds))(target_ids)


def start_keys(target_ids: Sequence[int], seeds: Sequence[int]) -> jax.Array:
    """Derives the start of each trial from its target and seed: keys [target, seed]."""
    return _start_keys(jnp.asarray(target_ids, jnp.uint32), jnp.asarray(seeds, jnp.uint32))
