"""Milliseconds per trial-iteration and memory, beside two references, in one run.

    python -m benchmarks.attack [--networks lenet_zhu convnet resnet20] [--seconds 5]

One trial-iteration is one step of one attack: value and gradient of cosine + TV with respect to
the image, signed Adam, box. References: the same loop on plain `nn.Conv` under vmap (1x8, for it is
slow), and the same attack in PyTorch one image at a time (`pip install torch`), at the number of
threads that serves it best. Every figure is the best of five repetitions.
"""

import argparse
import contextlib
import os
import time
from unittest import mock

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxinv import client, trials, victims
from jaxinv.attacks import gradient_matching as attack
from jaxinv.types import Normalization, Truth

WIDTHS = {"lenet_zhu": None, "convnet": 32, "resnet20": 16}
SIZES = ((1, 1), (1, 32), (8, 32))
NAIVE_SIZE = (1, 8)
SHAPE = (32, 32, 3)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--seconds", type=float, default=5, help="time per figure")
    arguments = parser.parse_args()
    console = Console()
    device = jax.devices()[0]
    console.print(f"jax {jax.__version__}, {device.device_kind}, {os.cpu_count()} CPU cores")
    table = Table(
        "network", "form", "targets x seeds", "ms / trial-iteration", "temp MiB", "x PyTorch"
    )
    for name in arguments.networks:
        reference = pytorch(name, arguments.seconds)
        add(table, name, "PyTorch, one at a time", (1, 1), reference, float("nan"), reference)
        for size in SIZES:
            add(table, name, "jaxinv", size, *measure(name, size, arguments.seconds), reference)
        with naive():
            figures = measure(name, NAIVE_SIZE, arguments.seconds)
        add(table, name, "nn.Conv under vmap", NAIVE_SIZE, *figures, reference)
        console.print(table)


def add(table: Table, name: str, form: str, size, ms: float, memory: float, reference: float):
    """Adds a row."""
    table.add_row(
        name, form, "{} x {}".format(*size), f"{ms:.3f}", f"{memory:.1f}", f"{reference / ms:.2f}"
    )


@contextlib.contextmanager
def naive():
    """The same loop without the trilinear convolution, all seeds vmapped."""
    plan = lambda params, seeds: trials.Plan(seeds)  # noqa: E731
    with (
        mock.patch.object(client, "fast_convolutions", contextlib.nullcontext),
        mock.patch.object(trials, "make_plan", plan),
    ):
        jax.clear_caches()
        yield
    jax.clear_caches()


def measure(name: str, size: tuple[int, int], seconds: float) -> tuple[float, float]:
    """Times the compiled chunk: milliseconds per trial-iteration, temporary memory in MiB."""
    targets, seeds = size
    victim = victims.untrained(name, classes=10, width=WIDTHS[name], seed=0, image_shape=SHAPE)
    normalization = Normalization(jnp.full(3, 0.5), jnp.full(3, 0.25))
    images = jax.random.uniform(jax.random.key(1), (targets, 1, *SHAPE))
    truths = Truth(images, jnp.zeros((targets, 1), jnp.int32))
    module, variables = victim.module, victim.variables
    shared = trials.make_targets(module, variables, truths, normalization, "known")
    method = attack.Method()
    plan = trials.make_plan(variables["params"], seeds)
    keys = trials.start_keys(range(targets), range(seeds))
    states = trials._init(method, (1, *SHAPE), normalization, keys)
    numbers = attack.Numbers(jnp.float32(0.1), jnp.float32(0.01), jnp.int32(1_000_000))
    program = trials._chunk.lower(
        module, method, 1, plan, variables, shared, truths, normalization,
        numbers, jnp.int32(1), jnp.int32(0), states,
    ).compile()  # fmt: skip
    memory = program.memory_analysis().temp_size_in_bytes / 2**20

    def run(steps):
        nonlocal states
        started = time.perf_counter()
        states, _ = program(
            variables,
            shared,
            truths,
            normalization,
            numbers,
            jnp.int32(steps),
            jnp.int32(0),
            states,
        )
        jax.block_until_ready(states)
        return time.perf_counter() - started

    run(1)
    steps = max(1, int(seconds / 5 / run(1)))
    return min(run(steps) for _ in range(5)) / steps / (targets * seeds) * 1e3, memory


def pytorch(name: str, seconds: float) -> float:
    """The PyTorch reference at the better of one thread and all; NaN where it is not installed."""
    try:
        from benchmarks.pytorch_reference import milliseconds_per_step
    except ImportError:
        return float("nan")
    threads = {1, os.cpu_count()}
    return min(
        milliseconds_per_step(name, WIDTHS[name], threads=t, seconds=seconds / 2) for t in threads
    )


if __name__ == "__main__":
    main()
