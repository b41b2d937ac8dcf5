"""Milliseconds per trial-iteration and memory, beside two references, in one run.

    python -m benchmarks.attack [--networks lenet_zhu ...] [--sizes 1x1 8x32 ...] [--seconds 10]

One trial-iteration is one step of one attack: value and gradient of cosine + TV with respect to
the image, signed Adam, box. References: the same loop on plain `nn.Conv` under vmap (1x4, for it
is very slow), and the same attack in PyTorch one image at a time (`pip install torch`), on one
thread and on all. The forms of a network are timed in turn, in many short rounds, and the best
round of each is kept: what a busy machine steals is left out, and it steals from all of them.
"""

import argparse
import contextlib
import functools
import os
import time
from collections.abc import Sequence
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.race import Form, race
from jaxinv import client, runtime, trials, victims
from jaxinv.attacks import gradient_matching as attack
from jaxinv.types import Normalization, Truth


class Case(NamedTuple):
    """A network and what is measured of it."""

    width: int | None
    sizes: tuple[tuple[int, int], ...] = ((1, 1), (1, 32), (8, 32))  # targets, seeds
    naive: bool = True  # the largest networks would compile for an hour


CASES = {
    "lenet_zhu": Case(None),
    "convnet": Case(32),
    "resnet20": Case(16),
    "resnet18": Case(64, ((1, 1), (1, 4)), naive=False),
    "mobilenetv2": Case(32, ((1, 1), (1, 4)), naive=False),
}
NAIVE_SIZE = (1, 4)
SHAPE = (32, 32, 3)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--sizes", nargs="+", type=read_size, help="targets x seeds, such as 8x32")
    parser.add_argument("--seconds", type=float, default=10, help="time per figure, about")
    arguments = parser.parse_args()
    runtime.use_all_cores()
    console = Console(width=120)
    console.print(f"jax {jax.__version__}, {runtime.hardware()}")
    for name in arguments.networks:
        console.print(table(name, arguments.sizes or CASES[name].sizes, arguments.seconds))


def read_size(text: str) -> tuple[int, int]:
    """Reads targets x seeds, `8x32`."""
    targets, seeds = map(int, text.split("x"))
    return targets, seeds


def table(name: str, sizes: Sequence[tuple[int, int]], seconds: float) -> Table:
    """Times every form of one network."""
    forms = [*pytorch_forms(name), *(jax_form("jaxinv", name, size) for size in sizes)]
    if CASES[name].naive:
        with naive():
            forms.append(jax_form("nn.Conv under vmap", name, NAIVE_SIZE))
    times = [
        step / (form.size[0] * form.size[1]) for form, step in zip(forms, race(forms, seconds))
    ]
    reference = min((t for f, t in zip(forms, times) if "PyTorch" in f.name), default=float("nan"))
    flops = step_flops(name)
    out = Table(
        name, "targets x seeds", "ms / trial-iteration", "x PyTorch", "GFLOP/s", "temp MiB",
        "compile s",
    )  # fmt: skip
    for form, seconds_per_trial in zip(forms, times):
        out.add_row(
            form.name, "{} x {}".format(*form.size), f"{seconds_per_trial * 1e3:.3g}",
            f"{reference / seconds_per_trial:.2f}", f"{flops / seconds_per_trial / 1e9:.3g}",
            f"{form.memory:.1f}", f"{form.compile_seconds:.1f}",
        )  # fmt: skip
    return out


@contextlib.contextmanager
def naive():
    """The same loop without the trilinear convolution, all seeds vmapped."""
    plan = lambda params, targets, seeds: trials.Plan(targets, seeds)  # noqa: E731
    with (
        mock.patch.object(client, "fast_convolutions", contextlib.nullcontext),
        mock.patch.object(trials, "make_plan", plan),
    ):
        jax.clear_caches()
        yield
    jax.clear_caches()


@functools.cache
def victim_of(name: str) -> victims.Victim:
    """The untrained network, at the width of the table."""
    return victims.untrained(name, classes=10, width=CASES[name].width, seed=0, image_shape=SHAPE)


@functools.cache
def normalization() -> Normalization:
    """Of the random images; any would do."""
    return Normalization.of([0.5] * 3, [0.25] * 3)


def step_flops(name: str) -> float:
    """Floating-point operations of one trial-iteration, by XLA's count."""
    victim = victim_of(name)
    return trials.step_flops(
        victim.module, victim.variables, attack.Method(), normalization(), (1, *SHAPE)
    )


def jax_form(label: str, name: str, size: tuple[int, int]) -> Form:
    """Compiles the attack's loop for targets x seeds."""
    targets, seeds = size
    victim = victim_of(name)
    images = jax.random.uniform(jax.random.key(1), (targets, 1, *SHAPE))
    truths = Truth(images, jnp.zeros((targets, 1), jnp.int32))
    module, variables = victim.module, victim.variables
    shared = trials.make_targets(module, variables, truths, normalization(), "known")
    numbers = attack.Numbers(
        jnp.float32(0.1), jnp.float32(0.01), jnp.float32(0), jnp.int32(1_000_000)
    )
    plan = trials.make_plan(variables["params"], targets, seeds)
    grid, method = trials.make_grid(plan, targets, seeds), attack.Method()
    keys = grid.deal(trials.start_keys(range(targets), range(seeds)))
    states = trials.init_states(method, (1, *SHAPE), normalization(), keys)
    constant = (variables, shared, truths, normalization(), numbers)
    started = time.perf_counter()
    program = trials.run_chunk.lower(
        module, method, 1, plan.devices, *constant, jnp.int32(1), jnp.int32(0), grid.target, states
    ).compile()
    compile_seconds = time.perf_counter() - started

    def run(steps):
        nonlocal states
        states, _ = program(*constant, jnp.int32(steps), jnp.int32(0), grid.target, states)
        jax.block_until_ready(states)

    memory = program.memory_analysis().temp_size_in_bytes / 2**20
    return Form(label, size, run, compile_seconds, memory)


def pytorch_forms(name: str) -> list[Form]:
    """The PyTorch reference on one thread and on all; nothing where it is not installed."""
    try:
        from benchmarks.pytorch_reference import make_step
    except ImportError:
        return []
    forms = []
    for threads in sorted({1, os.cpu_count()}):
        run = make_step(name, CASES[name].width, threads)
        forms.append(Form(f"PyTorch, one at a time, {threads} threads", (1, 1), run))
    return forms


if __name__ == "__main__":
    main()
