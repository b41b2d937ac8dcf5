"""Milliseconds per trial-iteration and memory, beside three references, in one run.

    python -m benchmarks.attack [--networks lenet_zhu ...] [--sizes 1x1 8x32 ...] [--seconds 10]

One trial-iteration is one step of one attack: value and gradient of cosine + TV with respect to
the image, signed Adam, box; a trial per second is 500 of them. References: the same loop on plain
`nn.Conv` under vmap (1x4, for it is very slow), and the same attack in PyTorch (`pip install
torch`), one image at a time and by chunks under `torch.func.vmap`, on one thread and on all, or on
the GPU. "x PyTorch" and "x vmap" are relative to the best of each. The forms of a network are timed
in turn, in many short rounds, and the best round of each is kept: what a busy machine steals is
left out, and it steals from all of them.

FLOP/s are by XLA's count of a step in its plain form, whoever takes it, and the peak is that of
float32 matrix products on all devices together, measured at the start. Temporary memory, by the
compiler's analysis, is that of all devices over all trials of the size: on a CPU, where small
groups of trials follow one another, it falls as the trials grow in number. On accelerators the
precision is full float32 on all sides.
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
from rich.table import Column, Table

from benchmarks.assembly import assemble, cell_of, tiles
from benchmarks.peak import matmul_peak
from benchmarks.race import Form, race
from jaxinv import client
from jaxinv.engine import planner, trials
from jaxinv.engine.cells import attack_of, shapes_of
from jaxinv.machine import runtime
from jaxinv.settings import schema


class Case(NamedTuple):
    """A network and what is measured of it."""

    width: int | None
    sizes: tuple[tuple[int, int], ...] = ((1, 1), (1, 32), (8, 32))  # targets, seeds
    chunks: tuple[int, ...] = (8, 32)  # seeds at once in PyTorch under vmap
    naive: bool = True  # the largest networks would compile for an hour


LARGE = Case(None, ((1, 1), (1, 4), (1, 32)), (4, 16), naive=False)
CASES = {
    "lenet_zhu": Case(None, ((1, 1), (1, 32), (8, 32), (16, 32))),
    "convnet": Case(32),
    "resnet20": Case(16),
    "resnet18": LARGE._replace(width=64),
    "mobilenetv2": LARGE._replace(width=32),
}
NAIVE_SIZE = (1, 4)
STEPS = 500  # of a trial, as `jaxinv.sweep` takes by default
STEPS_IN_ALL = 1_000_000  # of the attack whose first ones are timed: none is its last


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--sizes", nargs="+", type=read_size, help="targets x seeds, such as 8x32")
    parser.add_argument("--seconds", type=float, default=10, help="time per figure, about")
    arguments = parser.parse_args(argv)
    runtime.use_all_cores()
    console = Console(width=155)
    peak = matmul_peak(arguments.seconds)
    console.print(header(peak))
    for name in arguments.networks:
        console.print(table(name, arguments.sizes or CASES[name].sizes, arguments.seconds, peak))


def header(peak: float) -> str:
    """What was measured on, in a line."""
    return (
        f"jax {jax.__version__}, {runtime.hardware()}, float32 matrix product: "
        f"{peak / 1e9:.0f} GFLOP/s"
    )


def read_size(text: str) -> tuple[int, int]:
    """Reads targets x seeds, `8x32`."""
    targets, seeds = map(int, text.split("x"))
    return targets, seeds


def table(name: str, sizes: Sequence[tuple[int, int]], seconds: float, peak: float) -> Table:
    """Times every form of one network."""
    case = CASES[name]
    cell = cell_of("geiping", model=name, width=case.width)
    one_at_a_time, vmapped = pytorch_forms((name, case.width), case.chunks)
    forms = [*one_at_a_time, *vmapped, *(jax_form("jaxinv", cell, size) for size in sizes)]
    if case.naive:
        with naive():
            plain = cell.model_copy(update={"gram": "off"})
            forms.append(jax_form("nn.Conv under vmap", plain, NAIVE_SIZE))
    times = {form: step / form.trials for form, step in zip(forms, race(forms, seconds))}
    best, best_vmapped = (
        min((times[form] for form in some), default=float("nan"))
        for some in (one_at_a_time, vmapped)
    )
    flops = step_flops(cell)
    out = Table(
        Column(name, no_wrap=True),
        "targets x seeds",
        "ms / trial-iteration",
        f"trials of {STEPS} steps / s",
        "x PyTorch",
        "x vmap",
        "GFLOP/s",
        "of peak",
        "temp MiB / trial",
        "compile s",
    )
    for form, once in times.items():
        out.add_row(
            form.name,
            "{} x {}".format(*form.size),
            f"{once * 1e3:.3g}",
            f"{1 / (STEPS * once):.3g}",
            f"{best / once:.2f}",
            f"{best_vmapped / once:.2f}",
            f"{flops / once / 1e9:.3g}",
            f"{flops / once / peak:.1%}",
            f"{form.memory / form.trials:.3g}",
            f"{form.compile_seconds:.1f}",
        )
    return out


@contextlib.contextmanager
def naive():
    """The same loop without the trilinear convolution, all seeds vmapped."""

    def plan(params, targets, seeds, *_):
        return planner.GroupPlan(targets, seeds)

    with (
        mock.patch.object(client, "fast_convolutions", contextlib.nullcontext),
        mock.patch.object(planner, "first_plan", plan),
    ):
        jax.clear_caches()
        yield
    jax.clear_caches()


@functools.cache
def step_flops(cell: schema.Cell) -> float:
    """Floating-point operations of one trial-iteration in its plain form, by XLA's count."""
    inputs = tiles(cell, targets=1)
    attack = attack_of(cell.model_copy(update={"gram": "off"}), inputs)
    return trials.step_flops(shapes_of(inputs, attack, cell.images), attack)


def jax_form(label: str, cell: schema.Cell, size: tuple[int, int]) -> Form:
    """Compiles the attack's loop.

    Args:
      label: what the form is called.
      cell: the settings.
      size: targets, seeds.
    """
    targets, seeds = size
    with runtime.arithmetic(cell.precision) as cast:
        made = assemble(cell, tiles(cell, targets), seeds, cast)
        grid = planner.make_grid(made.plan, targets, seeds)
        numbers = made.numbers._replace(iterations=jnp.int32(STEPS_IN_ALL))
        states = trials.init_states(
            made.attack, made.problem, numbers, grid.target, grid.seed, grid.deal(made.keys), None
        )
        one, none = jnp.int32(1), jnp.int32(0)
        started = time.perf_counter()
        program = trials.run_chunk.lower(
            made.attack,
            1,
            made.plan.devices,
            made.problem,
            numbers,
            one,
            none,
            one,
            grid.target,
            grid.seed,
            states,
        ).compile()
        compile_seconds = time.perf_counter() - started

    def run(steps):
        nonlocal states
        states, _ = program(
            made.problem, numbers, jnp.int32(steps), none, one, grid.target, grid.seed, states
        )
        jax.block_until_ready(states)

    memory = program.memory_analysis().temp_size_in_bytes * made.plan.devices / 2**20
    return Form(label, size, run, compile_seconds, memory)


def pytorch_forms(
    network: tuple[str, int | None], chunks: Sequence[int]
) -> tuple[list[Form], list[Form]]:
    """The PyTorch references, one at a time and under vmap; none where it is not installed."""
    try:
        from benchmarks.pytorch_reference import DEVICE, make_step
    except ImportError:
        return [], []
    one_at_a_time, vmapped = [], []
    for threads in sorted({1, os.cpu_count()}) if DEVICE == "cpu" else [1]:
        where = f"{threads} threads" if DEVICE == "cpu" else "GPU"
        run = make_step(*network, threads)
        one_at_a_time.append(Form(f"PyTorch, one at a time, {where}", (1, 1), run))
        for chunk in chunks:
            run = make_step(*network, threads, chunk)
            vmapped.append(Form(f"PyTorch, torch.func.vmap, {where}", (1, chunk), run))
    return one_at_a_time, vmapped


if __name__ == "__main__":
    main()
