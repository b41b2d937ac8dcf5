"""Where a step of training spends its time, by kind of layer, from XLA's own trace.

    python -m benchmarks.training_profile [--networks mobilenetv2:32 ...] [--steps 2]

The seconds of every fused loop and library call of the compiled step, by what the network's code
calls the operation that it ends in: what is fused into it is counted there. Loops are counted on
each core; of library calls the trace has the core alone that called.
"""

import argparse
import collections
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.race import read_network
from benchmarks.training import BATCH, SHAPE, jax_form
from jaxinv.machine import runtime
from jaxinv.victim.untrained import untrained

# The first that is found in an operation's name; ReLU's derivative is a `select_n`.
KINDS = {
    "convolution, kernel gradient": r"/closed_call/|/while$|dynamic_slice",
    "ReLU's derivative, and what is fused into it": r"transpose.*select_n$",
    "convolution, data gradient, and products of 1x1": r"transpose.*(Conv|Dense)",
    "convolution, forward": r"Conv|Dense",
    "normalization, backward": r"transpose.*Norm",
    "normalization, forward": r"Norm",
    "ReLU, forward": r"relu|/max$|/min$",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table for each network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=("mobilenetv2:32",), metavar="NAME:WIDTH")
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args(argv)
    console = Console(width=100)
    with tempfile.TemporaryDirectory() as folder:
        # Read when JAX starts: the compiled program says which operation each of its loops is of.
        dump = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump}"
        print_profiles(console, arguments.networks, arguments.steps, Path(folder))


def print_profiles(console: Console, networks: Sequence[str], steps: int, programs: Path) -> None:
    """A table for each network, whose programs XLA writes into a folder."""
    console.print(f"jax {jax.__version__}, {runtime.hardware()}")
    for network in networks:
        seconds, of_kind = profile(network, steps, programs)
        total = sum(of_kind.values())
        title = f"{network}: {BATCH / seconds:.0f} images / s, {total:.2f} core-seconds a step"
        table = Table("kind", "core-seconds", "share", title=title)
        for kind, spent in of_kind.most_common():
            table.add_row(kind, f"{spent:.2f}", f"{spent / total:.0%}")
        console.print(table)


def profile(network: str, steps: int, programs: Path) -> tuple[float, collections.Counter[str]]:
    """Seconds of a step, and its core-seconds by kind."""
    name, width = read_network(network)
    victim = untrained(name, classes=10, width=width, seed=0, image_shape=SHAPE)
    form = jax_form(victim, "float32")
    form.run(1)
    written = programs.glob("*run_steps*after_optimizations.txt")
    operations = read_operations(max(written, key=lambda path: path.stat().st_mtime).read_text())
    start = time.perf_counter()
    form.run(steps)
    seconds = (time.perf_counter() - start) / steps
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            form.run(steps)
        (trace,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    of_kind: collections.Counter[str] = collections.Counter()
    for event in (e for p in planes for line in p.lines for e in line.events):
        if event.name in operations:
            of_kind[kind_of(operations[event.name])] += event.duration_ns / 1e9 / steps
    return seconds, of_kind


def read_operations(program: str) -> dict[str, str]:
    """The operation that each instruction of a compiled program is of, as the code calls it."""
    found = re.finditer(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', program, re.MULTILINE)
    return {match[1]: match[2] for match in found}


def kind_of(operation: str) -> str:
    """The kind of an operation."""
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, operation))
    return next(found, "the rest")


if __name__ == "__main__":
    main()
