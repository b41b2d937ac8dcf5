"""Memory of a group of trials, with weight gradients and with Gram statistics; nothing is run.

    python -m benchmarks.memory [--networks resnet18:64 ...] [--trials 4]

All trials go through the network in one batch, as on an accelerator. MiB of temporary memory per
trial, by the compiler's analysis for this machine's device: what lies between the inputs (the
parameters, the updates, the candidates) and the results.
"""

import argparse
import time

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.race import read_network
from jaxinv import planner, runtime, trials, victims
from jaxinv.attacks import gradient_matching as attack
from jaxinv.types import Normalization, Target

SHAPE = (1, 32, 32, 3)
# Memory is assigned before code is generated: no reason to wait for good code.
UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet18:64"], help="NAME:WIDTH")
    parser.add_argument("--trials", type=int, default=4, help="seeds of one target, at once")
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(f"jax {jax.__version__}, {runtime.hardware()}, {arguments.trials} trials at once")
    table = Table("network", "Gram statistics", "temporary MiB / trial", "compile s")
    for text in arguments.networks:
        network = read_network(text)
        for gram in (False, True):
            started = time.perf_counter()
            size = temporary_bytes(*network, arguments.trials, gram)
            table.add_row(
                text, "on" if gram else "off", f"{size / arguments.trials / 2**20:.1f}",
                f"{time.perf_counter() - started:.0f}",
            )  # fmt: skip
    console.print(table)


def temporary_bytes(name: str, width: int | None, seeds: int, gram: bool) -> int:
    """Compiles one attack's chunk for the seeds of a target and asks what it takes."""
    victim = victims.untrained(name, classes=10, width=width, seed=0, image_shape=SHAPE[1:])
    normalization = Normalization.of([0.5] * 3, [0.25] * 3)
    method = attack.Method(gram=gram)
    numbers = attack.Numbers.of(seeds, lr=0.1, tv=0.01, statistics=0.0, iterations=1_000_000)
    params = victim.variables["params"]
    target = jax.tree.map(lambda x: x[None], Target(params, jnp.zeros(1, jnp.int32)))
    grid = planner.make_grid(planner.Plan(1, seeds), 1, seeds)
    keys = grid.deal(trials.start_keys([0], range(seeds)))
    states = trials.init_states(method, SHAPE, normalization, keys)
    program = trials.run_chunk.lower(
        victim.module, method, 1, 1, victim.variables, target, None, normalization, numbers,
        jnp.int32(50), jnp.int32(0), grid.target, grid.seed, states,
    ).compile(UNOPTIMISED if jax.default_backend() == "cpu" else None)  # fmt: skip
    return program.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main()
