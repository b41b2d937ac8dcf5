"""Which attack is better, given the time: PSNR against seconds of attack per target.

    python -m benchmarks.time_to_quality --dataset cifar10 [--targets 8] [--seconds 60]
      [--attacks geiping bayes ...] [--victim NAME] [--out docs/time_to_quality.png]

The programs are those of a sweep, all in one process on one network. The time is that of the steps
of all targets together, on all cores, divided by their number: without compilation, for a chunk of
each program is run before. A schedule makes a run of N steps another one than the first N of a
longer run, so each point is the end of a run of its own; but for the polish, whose steps know
nothing of how many there will be. Of several seeds the one with the lowest objective counts.

PyTorch (`pip install torch`) runs the same attack as "geiping", from the same initial image, on
LeNetZhu alone, one target after the other; on one thread or all, whichever is faster.
"""

import argparse
import contextlib
import csv
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.ticker
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.assembly import Assembled, assemble, cell_of
from jaxinv import metrics
from jaxinv.attacks.base import Candidate
from jaxinv.attacks.levenberg_marquardt import LevenbergMarquardt
from jaxinv.engine import cells, planner, trials
from jaxinv.engine.targets import SharedUpdates, seed_keys
from jaxinv.machine import runtime
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.statistics import choose_lowest
from jaxinv.settings import schema
from jaxinv.settings.naming import network_text, victim_text
from jaxinv.victim import checkpoints

HEIGHT, LABEL_GAP = 3.5, 0.18  # inches: of the panel, and between names beside it
TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}  # of data sets, in words
EXACT = 100.0  # dB from which on float32 could not tell; drawn at the head of the figure


class Point(NamedTuple):
    """The end of a run on all targets."""

    steps: int
    seconds: float  # per target
    psnr: Float[np.ndarray, " target"]


class Line(NamedTuple):
    """How one attack gets its points."""

    words: str  # in figure and table
    attack: str = "geiping"
    steps: tuple[int, ...] = (100, 300, 1000, 3000, 10_000)  # of each run
    seeds: int = 1
    polish: int = 0  # steps behind the last run


_LBFGS, _GAUSS_NEWTON = (10, 30, 100, 300, 1000), (4, 8, 14, 28, 56)
LINES = {
    "geiping": Line("cosine + TV"),
    "geiping-8": Line("cosine + TV, best of 8", seeds=8),
    "dlg": Line("DLG", "dlg", _LBFGS),
    "euclidean": Line("Euclidean, L-BFGS", "euclidean", _LBFGS),
    "bayes": Line("Gauss-Newton + image prior", "bayes", _GAUSS_NEWTON),
    "bayes-polish": Line("Gauss-Newton, polished", "bayes", (28,), polish=2),
    "pytorch": Line("PyTorch, cosine + TV"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, and draws the figure where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="tiles")
    parser.add_argument("--data-dir", help="tensorflow-datasets folder (or TFDS_DATA_DIR)")
    parser.add_argument("--model", default="lenet_zhu")
    parser.add_argument("--width", type=int)
    parser.add_argument("--victim", help="attack this checkpoint instead")
    parser.add_argument("--targets", type=int, default=4)
    parser.add_argument("--attacks", nargs="+", default=list(LINES), choices=LINES)
    parser.add_argument("--seconds", type=float, default=60, help="of a run, at the most")
    parser.add_argument("--out", type=Path, help="a .png; the table is put beside it as .csv")
    arguments = parser.parse_args(argv)
    runtime.use_all_cores()
    console = Console(width=100)
    network = {"model": arguments.model, "width": arguments.width}
    if arguments.victim:
        info = checkpoints.read_info(checkpoints.find(arguments.victim))
        network = {"model": info.model, "width": info.width, "victim": arguments.victim}
    plan = schema.Plan(targets=arguments.targets, data_dir=arguments.data_dir)
    load = cells.Loader(plan)
    console.print(f"jax {jax.__version__}, {runtime.hardware()}")
    found: dict[str, list[Point]] = {}
    for name in arguments.attacks:
        cell = cell_of(
            LINES[name].attack, dataset=arguments.dataset, polish=LINES[name].polish, **network
        )
        inputs = load(cell)
        if name == "pytorch" and not has_reference(network["model"]):
            console.print("PyTorch is not there, or does not have this network")
            continue
        measure = pytorch_points if name == "pytorch" else points
        found[name] = measure(LINES[name], cell, inputs, arguments.seconds)
        console.print(f"{LINES[name].words}: {found[name][-1].psnr.mean():.2f} dB")
    baseline = mean_color(inputs)
    console.print(table(found, baseline))
    if arguments.out is not None:
        drawn = f"{network_text(network['model'], network['width'])}, untrained"
        what = victim_text(arguments.victim) if arguments.victim else drawn
        write_csv(arguments.out.with_suffix(".csv"), found)
        figure = draw(found, baseline, subtitle(what, arguments.dataset, arguments.targets))
        ps.save(figure, arguments.out, ("png",))


def points(line: Line, cell: schema.Cell, inputs: cells.CellInputs, limit: float) -> list[Point]:
    """Runs an attack with each number of steps that the time allows, then polishes the last end."""
    # An update that is polished to its last digit must have that digit: see `cells.attack_cell`.
    with runtime.arithmetic("float64" if cell.polish else cell.precision) as exact:
        shared = cells.share(cell, inputs, exact)
    found: list[Point] = []
    with runtime.arithmetic(cell.precision) as cast:
        made = assemble(cell, inputs, line.seeds, cast, shared)
        run(made, line.steps[0])  # what comes behind the chunks is compiled too
        for steps in line.steps:
            if is_affordable(steps, found, limit):
                result, clock = run(made, steps)
                found.append(Point(steps, clock[-1] / len(inputs.ids), chosen(result)))
    if cell.polish:
        with runtime.arithmetic("float64") as cast:
            found += polished(cell, inputs, shared, result, found[-1], cast)
    return found


def polished(
    cell: schema.Cell,
    inputs: cells.CellInputs,
    shared: SharedUpdates,
    result: trials.Result,
    end: Point,
    cast: Callable,
) -> list[Point]:
    """Polishes what an attack of one seed found: a point behind each step."""
    attack = LevenbergMarquardt(
        objective=cell.objective, batch_norm=cell.batch_norm, local=cell.local()
    )
    problem = cells.problem_of(inputs, shared.targets, cast)
    made = Assembled(
        attack,
        problem,
        cast(attack.numbers(1, cell.numbers())),
        seed_keys(inputs.ids[:, 0], range(1)),
        planner.GroupPlan(1, 1, jax.local_device_count()),
    )
    initial = Candidate(result.candidates.images, None)
    result, clock = run(made, cell.polish, initial)
    psnr = np.asarray(result.trace.psnr)[1:, :, 0]
    return [
        Point(end.steps + step, end.seconds + seconds / len(values), values)
        for step, (seconds, values) in enumerate(zip(clock, psnr), 1)
    ]


class _CompiledError(Exception):
    """Raised to leave a run after its first chunk."""


def run(
    made: Assembled, steps: int, initial: Candidate | None = None
) -> tuple[trials.Result, list[float]]:
    """Runs an attack, its first chunk once before.

    Returns:
      The result, and the seconds since the first step at the end of each chunk.
    """
    numbers = made.numbers._replace(iterations=jnp.int32(steps))
    clock: list[float] = []

    def leave(steps: int, psnr: float) -> None:
        raise _CompiledError

    def run_with(**callbacks: Any) -> trials.Result:
        resources = trials.Resources(made.plan, **callbacks)
        return trials.run(made.problem, made.attack, numbers, made.keys, resources, initial)

    with contextlib.suppress(_CompiledError):
        run_with(progress=leave)

    def now(*_):
        return clock.append(time.perf_counter())

    result = run_with(progress=now, announce=now)  # the plan is announced before the first step
    return result, [moment - clock[0] for moment in clock[1:]]


def chosen(result: trials.Result) -> Float[np.ndarray, " target"]:
    """PSNR of each target's seed with the lowest objective."""
    objective = np.where(result.finite, np.asarray(result.objective), np.nan)
    return np.asarray(result.scores.psnr)[np.arange(len(objective)), choose_lowest(objective)]


def is_affordable(steps: int, before: Sequence[Point], limit: float) -> bool:
    """Whether a run is not expected to exceed the limit, by the one before; the first one is."""
    if not before:
        return True
    last = before[-1]
    return last.seconds * len(last.psnr) * steps / last.steps <= limit


def has_reference(model: str) -> bool:
    """Whether PyTorch is there, and its reference has the network."""
    try:
        import benchmarks.pytorch_reference  # noqa: F401
    except ImportError:
        return False
    return model == "lenet_zhu"


def pytorch_points(
    line: Line, cell: schema.Cell, inputs: cells.CellInputs, limit: float
) -> list[Point]:
    """The same attack in PyTorch, one target after the other."""
    from benchmarks import pytorch_reference as reference

    with runtime.arithmetic(cell.precision) as cast:
        made = assemble(cell, inputs, 1, cast)
        known, truths = made.problem, made.problem.truths
        rows, seed = np.arange(len(truths.labels))[None], np.zeros((1, 1), int)
        state = trials.init_states(
            made.attack, known, made.numbers, rows, seed, made.keys[None], None
        )
    edges = (known.normalization.box(jnp.full(3, sign * jnp.inf)) for sign in (-1, 1))
    params, box = known.variables["params"], tuple(map(np.asarray, edges))
    images = np.asarray(known.normalization.normalize(truths.images))
    attacked = [
        reference.Case(params, images[i, 0], int(truths.labels[i, 0]), initial, box)
        for i, initial in enumerate(np.asarray(state.candidate.images)[0, :, 0, 0])
    ]
    threads = min((1, os.cpu_count()), key=lambda n: reference.attack(attacked[0], 20, n)[1])
    found: list[Point] = []
    for steps in line.steps:
        if is_affordable(steps, found, limit):
            ends, seconds = zip(*(reference.attack(case, steps, threads) for case in attacked))
            pixels = known.normalization.pixels(np.stack(ends)[:, None])
            psnr = jax.vmap(metrics.psnr)(pixels, truths.images)[:, 0]
            found.append(Point(steps, float(np.mean(seconds)), np.asarray(psnr)))
    return found


def mean_color(inputs: cells.CellInputs) -> float:
    """PSNR of the trivial guess, over all targets."""
    score = jax.vmap(lambda truth: metrics.mean_color(truth, inputs.normalization).psnr)
    return float(score(inputs.truths()).mean())


def table(found: dict[str, list[Point]], baseline: float) -> Table:
    """All points in numbers."""
    out = Table("attack", "steps", "s / target", "PSNR, mean", "min", "max")
    for name, line in found.items():
        for point in line:
            shown = (f"{x:.2f}" for x in summary(point))
            out.add_row(
                LINES[name].words,
                str(point.steps),
                f"{point.seconds:.3g}",
                *shown,
                end_section=point is line[-1],
            )
    out.add_row("mean color", "", "", f"{baseline:.2f}", "", "")
    return out


def summary(point: Point) -> tuple[float, float, float]:
    """Mean, least and largest PSNR."""
    return point.psnr.mean(), point.psnr.min(), point.psnr.max()


def write_csv(path: Path, found: dict[str, list[Point]]) -> None:
    """Writes the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("attack", "steps", "seconds_per_target", "psnr", "psnr_min", "psnr_max"))
        for name, line in found.items():
            for point in line:
                numbers = (f"{x:.4g}" for x in (point.seconds, *summary(point)))
                rows.writerow((name, point.steps, *numbers))


def subtitle(network: str, dataset: str, targets: int) -> str:
    """What was measured, on what, and what a point is."""
    return (
        f"Mean PSNR over {targets} targets, one test image of {TITLES.get(dataset, dataset)} each; "
        f"{network}. A point is the end of a run of its own, of the polish a step. Time: of all "
        f"targets together by their number; {os.cpu_count()} CPU cores. Triangles: above "
        f"{EXACT:g} dB."
    )


@ps.styled
def draw(found: dict[str, list[Point]], baseline: float, words: str) -> Figure:
    """Draws mean PSNR against seconds per target, each line named at the right."""
    sheet = ps.Sheet(
        ps.WIDE,
        ps.Heading("What an attack makes of its time", words),
        panel_height=HEIGHT,
        margins=ps.Margins(right=3.05, above=0.2),
    )
    ax = sheet.axes[0]
    means = [point.psnr.mean() for line in found.values() for point in line]
    low = min(*means, baseline) - 2
    head = max([*(y for y in means if y < EXACT), baseline]) + 6
    colors = dict(zip(LINES, ps.cell_colors(len(LINES) - 1))) | {"pytorch": ps.INK}
    ends = {}
    for name, line in found.items():
        at = [point.seconds for point in line]
        psnr = [point.psnr.mean() for point in line]
        above = np.array(psnr) >= EXACT
        shown = np.where(above, head, psnr)
        on_scale = int(np.argmax([*above, True]))  # points before the first that is not
        color = colors[name]
        ax.plot(
            at[:on_scale], shown[:on_scale], color=color, linewidth=1.8, marker="o", markersize=3.5
        )
        leaving = slice(max(0, on_scale - 1), None)
        ax.plot(at[leaving], shown[leaving], color=color, linewidth=1.4, linestyle=(0, (1, 1.6)))
        ax.plot(np.array(at)[above], shown[above], **ps.MARKS["triangle"], color=color)
        if above.any():
            place = {"textcoords": "offset points", "va": "top", "size": 8.2}
            ax.annotate("off the scale", (at[on_scale], head), (-3, -6), color=color, **place)
        ends[name] = at[-1], shown[-1], psnr[-1]
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 3), numticks=20))
    ax.set_ylim(low, head + 2)
    gap = LABEL_GAP / HEIGHT * (head + 2 - low)
    for name, y in zip(ends, spread([end[1] for end in ends.values()], gap)):
        *place, psnr = ends[name]
        ax.annotate(
            f"{LINES[name].words}, {found[name][-1].steps:,} steps: "
            f"{psnr:.{0 if psnr > EXACT else 1}f}",
            place,
            xytext=(1.02, y),
            textcoords=("axes fraction", "data"),
            va="center",
            size=8.6,
            color=colors[name],
            annotation_clip=False,
            # From the label's left edge, that no leader crosses a label.
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),
                "color": colors[name],
                "linewidth": 0.6,
                "alpha": 0.6,
            },
        )
    ps.draw_baseline(ax, baseline)
    ax.annotate(
        "mean color",
        (0, baseline),
        xycoords=("axes fraction", "data"),
        xytext=(3, 3),
        textcoords="offset points",
        size=8.2,
        color=ps.BASELINE,
    )
    ax.set_xlabel("seconds of attack per target, without compilation (log scale)")
    ax.set_ylabel("PSNR (dB)")
    ax.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    return sheet.figure


def spread(values: Sequence[float], gap: float) -> np.ndarray:
    """Moves values up until no two are closer than the gap."""
    places = np.array(values, float)
    order = np.argsort(places, kind="stable")
    for below, above in itertools.pairwise(order):
        places[above] = max(places[above], places[below] + gap)
    return places


if __name__ == "__main__":
    main()
