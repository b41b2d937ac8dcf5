"""Memory of a group of trials, with weight gradients and with Gram statistics; nothing is run.

    python -m benchmarks.memory [--networks resnet18:64 ...] [--trials 4] [--topology v5e:2x2]

All trials go through the network in one batch, as on an accelerator. MiB of temporary memory per
trial, by the compiler's analysis: what lies between the inputs (the parameters, the updates, the
candidates) and the results. Compiled for this machine's device, or for a TPU that need not be there
(`--topology`, as JAX names them; `pip install "jax[tpu]"`).
"""

import argparse
import contextlib
import functools
import time
from collections.abc import Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from rich.console import Console
from rich.table import Table

from benchmarks.assembly import cell_of, tiles
from benchmarks.race import read_network
from jaxinv.attacks.gram import RULES
from jaxinv.engine import planner, trials
from jaxinv.engine.cells import attack_of, shapes_of
from jaxinv.engine.targets import seed_keys

# Memory is assigned before code is generated: no reason to wait for good code.
UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet18:64"], help="NAME:WIDTH")
    parser.add_argument("--trials", type=int, default=4, help="seeds of one target, at once")
    parser.add_argument("--topology", help="of a TPU to compile for, such as v5e:2x2")
    arguments = parser.parse_args(argv)
    console = Console(width=120)
    device = jax.local_devices()[0]
    if arguments.topology:
        device = topologies.get_topology_desc(arguments.topology, "tpu").devices[0]
    console.print(f"jax {jax.__version__}, {device.device_kind}, {arguments.trials} trials at once")
    table = Table("network", "without weight gradients by", "temporary MiB / trial", "compile s")
    for text in arguments.networks:
        network = read_network(text)
        for gram in (None, *RULES):
            started = time.perf_counter()
            size = temporary_bytes(device, *network, arguments.trials, gram)
            table.add_row(
                text,
                gram or "none",
                f"{size / arguments.trials / 2**20:.1f}",
                f"{time.perf_counter() - started:.0f}",
            )
    console.print(table)


def temporary_bytes(
    device: jax.Device, name: str, width: int | None, seeds: int, gram: str | None
) -> int:
    """Compiles one attack's chunk for the seeds of a target and asks what it takes of a device."""
    cell = cell_of("geiping", model=name, width=width)
    inputs = tiles(cell, targets=1)
    attack = attack_of(cell, inputs).replace(gram=gram)
    problem = shapes_of(inputs, attack, cell.images)
    numbers = attack.numbers(seeds, cell.numbers())
    grid = planner.make_grid(planner.GroupPlan(1, seeds), 1, seeds)
    keys = grid.deal(seed_keys([0], range(seeds)))
    init = functools.partial(trials.init_states, attack)
    states = jax.eval_shape(init, problem, numbers, grid.target, grid.seed, keys, None)
    mesh = Mesh(np.array([device]), ("trial",), axis_types=(AxisType.Auto,))

    def there(tree, spec):
        """The shapes of arrays on the device."""

        def shape(x):
            return jax.ShapeDtypeStruct(
                jnp.shape(x), jnp.result_type(x), sharding=NamedSharding(mesh, spec)
            )

        return jax.tree.map(shape, tree)

    counts = (np.int32(50), np.int32(0), np.int32(1))
    shared, dealt = (problem, numbers, *counts), (grid.target, grid.seed, states)
    on_cpu = device.platform == "cpu"
    with (
        mock.patch.object(trials, "_mesh", return_value=mesh),
        contextlib.nullcontext() if on_cpu else jax.default_matmul_precision("highest"),
    ):
        program = trials.run_chunk.lower(
            attack, 1, 1, *there(shared, trials.SHARED), *there(dealt, trials.DEALT)
        ).compile(UNOPTIMISED if on_cpu else None)
    return program.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main()
