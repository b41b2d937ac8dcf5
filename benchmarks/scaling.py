"""Cost per trial as targets, seeds, images per target and width grow.

    python -m benchmarks.scaling [--networks lenet_zhu convnet:8 ...] [--seconds 10]

One of them grows at a time, the others keep their first values: one target, four seeds, one image,
the width that was named. The step and the columns are those of `benchmarks.attack`; all programs of
a network are timed in turn.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.assembly import cell_of
from benchmarks.attack import header, jax_form, step_flops
from benchmarks.peak import matmul_peak
from benchmarks.race import race, read_network
from jaxinv.machine import runtime
from jaxinv.settings import schema

FACTORS = (1, 2, 4, 8)  # on targets, batch and width
SEEDS = (1, 4, 16, 64)


class Point(NamedTuple):
    """What is varied."""

    targets: int
    seeds: int
    batch: int  # images behind each target's update
    width: int | None  # None where the network has no such setting


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table for each network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--networks",
        nargs="+",
        default=["lenet_zhu", "convnet:8"],
        metavar="NAME:WIDTH",
        help="where the width starts; without one it stays as published",
    )
    parser.add_argument("--seconds", type=float, default=10, help="time per figure, about")
    arguments = parser.parse_args(argv)
    runtime.use_all_cores()
    console = Console(width=120)
    peak = matmul_peak(arguments.seconds)
    console.print(header(peak))
    for network in arguments.networks:
        console.print(table(*read_network(network), arguments.seconds, peak))


def table(name: str, width: int | None, seconds: float, peak: float) -> Table:
    """Times one network at every point."""
    lines = list(grow(Point(1, 4, 1, width)))
    forms = {
        point: jax_form("jaxinv", cell_at(name, point), (point.targets, point.seeds))
        for point in dict.fromkeys(point for _, point in lines)  # the first is in every series
    }
    times = dict(zip(forms, race(list(forms.values()), seconds)))
    out = Table(
        f"{name}, growing",
        *Point._fields,
        "ms / trial-iteration",
        "GFLOP/s",
        "of peak",
        "temp MiB / trial",
        "compile s",
    )
    for index, (grown, point) in enumerate(lines):
        form = forms[point]
        once = times[point] / form.trials
        rate = step_flops(cell_at(name, point)) / once
        out.add_row(
            grown,
            *("-" if value is None else str(value) for value in point),
            f"{once * 1e3:.3g}",
            f"{rate / 1e9:.3g}",
            f"{rate / peak:.1%}",
            f"{form.memory / form.trials:.3g}",
            f"{form.compile_seconds:.1f}",
            end_section=index + 1 < len(lines) and lines[index + 1][0] != grown,
        )
    return out


def cell_at(name: str, point: Point) -> schema.Cell:
    """The settings at a point."""
    return cell_of("geiping", model=name, width=point.width, images=point.batch)


def grow(first: Point) -> Iterator[tuple[str, Point]]:
    """Each series of points, with what grows in it."""
    for field in Point._fields:
        start = getattr(first, field)
        if start is not None:
            values = SEEDS if field == "seeds" else [factor * start for factor in FACTORS]
            yield from ((field, first._replace(**{field: value})) for value in values)


if __name__ == "__main__":
    main()
