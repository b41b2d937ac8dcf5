"""`python -m jaxinv.sweep`: run a study, block by block, and report it.

A block is one cell on a group of targets. It is computed whole, written whole, and never computed
again: the same command after a kill goes on where the last one stopped.
"""

import contextlib
import datetime
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from jaxinv import config, defenses, executors, options, report, results, runtime, summary, trials
from jaxinv.cells import NUMBERS, Attacked, Loader, Material, attack_cell, attack_of, shapes_of
from jaxinv.errors import OneLineParser, UserError, run_command

PLAN = ("targets_at_once", "seeds_at_once", "devices")  # what of a plan the rows keep
COLUMNS = {"objective": "objective_type"}  # settings whose name a measured value holds
TRIALS_PER_BLOCK = 128  # what a kill may cost: about a minute of LeNetZhu per 500 steps
POLISHED_PER_BLOCK = 16  # a polish takes ten times as long as the attack before it
UPDATES_PER_BLOCK = 2**27  # bytes of them, in memory at once


class Block(NamedTuple):
    """The unit of work: a cell's settings on a group of targets."""

    name: str
    cell_index: int
    cell: config.Cell
    positions: slice  # of its targets in the study's list


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""

    def command():
        parser = OneLineParser(prog="python -m jaxinv.sweep", description=__doc__)
        parser.add_argument("study", nargs="?", type=Path, help="sweep file (default: built in)")
        parser.add_argument("--dry-run", action="store_true", help="print the cells and the work")
        parser.add_argument(
            "--profile", metavar="DIR", help="write a profile for TensorBoard there"
        )
        parser.add_argument("--preset", help="the sweep file's larger or smaller version, by name")
        options.add_workers_flags(parser)
        options.add_flags(parser)
        arguments = parser.parse_args(argv)
        study = options.load_study(arguments.study, vars(arguments), arguments.preset)
        workers = options.load_workers(vars(arguments))
        words = shlex.join(sys.argv[1:] if argv is None else argv)
        profiled = contextlib.nullcontext()
        if arguments.profile is not None:
            profiled = jax.profiler.trace(arguments.profile)
        with profiled:
            run_study(
                study, f"python -m jaxinv.sweep {words}".strip(), workers,
                dry_run=arguments.dry_run,
            )  # fmt: skip

    return run_command(command)


def run_study(
    study: config.Study, command: str, workers: config.Workers, *, dry_run: bool = False
) -> None:
    """Runs what is not done yet of a study, then writes its tables, plots and report.

    Raises:
      UserError: data, shapes or the run folder do not fit, and nothing was written then; or the
        workers do not live.
    """
    console = Console()
    if workers.executor != "local":
        jax.config.update("jax_platforms", "cpu")  # this machine's accelerators are the workers'
    runtime.use_compilation_cache()
    runtime.use_all_cores()
    load = Loader(study.plan)
    materials = [load(cell) for cell in study.cells]
    blocks = list(plan_blocks(study, dict(enumerate(materials))))
    if dry_run:
        print_plan(console, study, materials, blocks)
        return
    waiting = [block for block in blocks if not results.is_done(study.folder, block.name)]
    executor = None
    if waiting and workers.executor != "local":
        executor = executors.start(
            workers.executor, "jaxinv.sweep:run_cell", workers.resources, study.folder
        )
    open_run(study, materials[0], command)
    if len(waiting) < len(blocks):
        console.print(f"{study.folder}: {len(blocks) - len(waiting)} of {len(blocks)} blocks done")
    total, left = (sum(_work(block, study) for block in some) for some in (blocks, waiting))
    with runtime.progress_bar(console) as bar:
        task = bar.add_task("", total=total, completed=total - left)
        if executor is None:
            run_here(study, waiting, materials, bar, task)
        else:
            run_elsewhere(study, waiting, executor, bar, task)
    report.build(study.folder, console=console)


def run_here(
    study: config.Study, waiting: Sequence[Block], materials: Mapping[int, Material] | Sequence,
    bar: Progress, task,
) -> None:  # fmt: skip
    """Runs these blocks one after the other, in this process; `materials` by the cell's index."""
    plans = set()

    def announce(plan: str) -> None:
        """Prints a plan once, not for every block."""
        if plan not in plans:
            plans.add(plan)
            bar.console.print(f"plan: {plan}", soft_wrap=True)

    for block in waiting:
        progress = watch(bar, task, block, study)
        run_block(study, block, materials[block.cell_index], progress, announce)
        say_finished(bar, block, study)


def run_elsewhere(
    study: config.Study, waiting: Sequence[Block], executor: executors.Executor, bar: Progress, task
) -> None:
    """Runs these blocks, a cell to a worker."""
    left = list(waiting)
    cells = sorted({block.cell_index for block in waiting})
    bar.update(task, description=f"{len(cells)} cells by {executor.kind}")

    def look() -> None:
        """Moves the bar by what workers have committed."""
        for block in [b for b in left if results.is_done(study.folder, b.name)]:
            left.remove(block)
            bar.advance(task, _work(block, study))
            say_finished(bar, block, study)

    devices = executors.run(
        executor, [(study, index) for index in cells], look,
        lambda line: bar.console.print(line, soft_wrap=True),
    )  # fmt: skip
    look()
    there = results.read_config(study.folder)
    there["sessions"][-1]["device"] = "; ".join(sorted(set(devices)))
    results.write_config(study.folder, there)


def say_finished(bar: Progress, block: Block, study: config.Study) -> None:
    """Prints a line where there is no bar to see."""
    if not bar.console.is_terminal:
        bar.console.print(f"finished {block.name} ({label(block, study)})")


def run_cell(study: config.Study, index: int) -> str:
    """Runs what is not done of a cell: a worker's whole task.

    Returns:
      The worker's devices in words.
    """
    runtime.use_compilation_cache()
    runtime.use_all_cores()
    material = Loader(study.plan)(study.cells[index])
    own = plan_blocks(study, {index: material})
    waiting = [block for block in own if not results.is_done(study.folder, block.name)]
    with runtime.progress_bar(Console()) as bar:
        task = bar.add_task("", total=sum(_work(block, study) for block in waiting))
        run_here(study, waiting, {index: material}, bar, task)
    return runtime.hardware()


def _work(block: Block, study: config.Study) -> int:
    """Trial-iterations of a block."""
    return block.cell.iterations * _trials(block, study)


def _trials(block: Block, study: config.Study) -> int:
    """Number of trials of a block."""
    targets = block.positions.stop - block.positions.start
    return targets * draws_of(block.cell, study.plan) * study.plan.seeds


def draws_of(cell: config.Cell, plan: config.Plan) -> int:
    """How often each target's defense is drawn: once where it draws nothing."""
    return plan.noise_seeds if defenses.is_random(cell.chain()) else 1


def plan_blocks(study: config.Study, materials: Mapping[int, Material]) -> Iterator[Block]:
    """Cuts each cell's targets into equal blocks, so that one compilation serves them all."""
    for index, material in materials.items():
        cell, targets = study.cells[index], len(material.ids)
        draws = draws_of(cell, study.plan)
        update = sum(x.nbytes for x in jax.tree.leaves(material.victim.variables["params"]))
        trials = POLISHED_PER_BLOCK if cell.polish else TRIALS_PER_BLOCK
        most = min(trials // study.plan.seeds, UPDATES_PER_BLOCK // update) // draws
        size = max(d for d in range(1, max(1, min(most, targets)) + 1) if targets % d == 0)
        for first in range(0, targets, size):
            name = results.block_name(index, first)
            yield Block(name, index, cell, slice(first, first + size))


def open_run(study: config.Study, material: Material, command: str) -> None:
    """Makes the run folder, or joins the one there if it asks for the same.

    Raises:
      UserError: the folder cannot be written, or holds a run with other settings.
    """
    asked = {
        "name": study.name,
        "study": study.text.model_dump(),
        "axes": study.axes,
        "cells": [cell.model_dump() for cell in study.cells],
        "target_ids": material.ids[:, 0].tolist(),
        "seeds": list(range(study.plan.seeds)),
        "noise_seeds": list(range(study.plan.noise_seeds)),
    }
    folder = study.folder
    there = results.read_config(folder)
    if there is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--out {folder}: exists and is no run folder; choose another")
        there = asked | {"command": command, "sessions": []}
    for name in ("cells", "target_ids", "seeds", "noise_seeds"):
        if there[name] != asked[name]:
            raise UserError(
                f"--out {folder}: holds a run with other {name.replace('_', '-')}; "
                "choose another --out, or repeat that run's settings to resume it"
            )
    there["sessions"].append(session(command))
    try:
        results.write_config(folder, there)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None


def session(command: str) -> dict:
    """Describes this process: when, what, with which versions, on which device."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "versions": runtime.versions(("jaxinv", "jax", "jaxlib", "flax", "optax", "numpy")),
        "device": runtime.hardware(),
    }


def run_block(
    study: config.Study, block: Block, material: Material, progress: Callable[[int, float], None],
    announce: Callable[[str], None],
) -> None:  # fmt: skip
    """Attacks a block's targets from every seed and commits its rows."""
    cell = block.cell
    material = material.of_targets(block.positions, draws_of(cell, study.plan))
    ids, seeds = material.ids, range(study.plan.seeds)
    attacked = attack_cell(
        cell, material, trials.start_keys(ids[:, 0], seeds),
        {name: getattr(cell, name) for name in NUMBERS}, study.plan.memory, progress, announce,
    )  # fmt: skip
    result = attacked.result
    quantised = np.round(np.nan_to_num(result.pixels) * 255).astype(np.uint8)
    results.write_block(
        study.folder,
        block.name,
        trial_rows(block, material, attacked, ids, seeds),
        trace_rows(block, result, material, seeds),
        results.BlockImages(ids[:, 0], np.asarray(seeds), quantised, material.images),
        attacked.extras,
    )


def trial_rows(
    block: Block, material: Material, attacked: Attacked, ids: np.ndarray, seeds: Sequence[int]
) -> dict[str, Sequence]:
    """Lays a block's results out as columns, one row per target and seed."""
    result, baseline, accuracy, shared, _ = attacked
    victim, shape = material.victim, result.objective.shape
    rows = shape[0] * shape[1]
    spread = lambda per_target: np.repeat(np.asarray(per_target), shape[1])  # noqa: E731
    failed = ~result.finite
    measured = result.scores._asdict() | {"objective": result.objective, "prior": result.prior}
    of_images = measured.pop("psnr_images")
    measured = {
        name: np.where(failed, np.nan, np.asarray(values, np.float64)).ravel()
        for name, values in measured.items()
    }
    of_images = np.where(failed[..., None], np.nan, np.asarray(of_images, np.float64))
    cell = block.cell.model_dump()
    settings = {COLUMNS.get(name, name): [value] * rows for name, value in cell.items()}
    plan = {name: getattr(result.plan, name) for name in PLAN}
    return settings | measured | {
        "schema_version": [results.SCHEMA_VERSION] * rows,
        "cell": [block.cell_index] * rows,
        "target_id": spread(ids[:, 0]),
        "image_ids": [list(map(int, batch)) for batch in ids for _ in seeds],
        "noise_seed": spread(material.draws),
        "seed": list(seeds) * shape[0],
        "status": np.where(failed, "nonfinite", result.status).ravel(),
        "psnr_images": of_images.reshape(rows, -1).tolist(),
        "label_accuracy": np.asarray(accuracy, np.float64).ravel(),
        "baseline_psnr": spread(baseline.psnr).astype(np.float64),
        "baseline_ssim": spread(baseline.ssim).astype(np.float64),
        "baseline_mse": spread(baseline.mse).astype(np.float64),
        "update_cosine": spread(shared.cosine).astype(np.float64),
        "update_error": spread(shared.error).astype(np.float64),
        "victim_digest": [victim.digest] * rows,
        "victim_accuracy": [victim.accuracy] * rows,
        "victim_epsilon": [victim.epsilon] * rows,
        "victim_delta": [victim.delta] * rows,
        "prior_source": [material.prior_source and material.prior_source.name] * rows,
        "prior_images": [material.prior_source and material.prior_source.images] * rows,
        **{name: [value] * rows for name, value in plan.items()},
        "program_bytes": [result.bytes] * rows,
    }  # fmt: skip


def trace_rows(
    block: Block, result: trials.Result, material: Material, seeds: Sequence[int]
) -> dict[str, np.ndarray]:
    """Lays the traces out as columns, one row per target, seed and point."""
    trace = result.trace
    points, targets, _ = trace.psnr.shape
    rows = trace.psnr.size
    flat = lambda x: np.moveaxis(x, 0, -1).ravel().astype(np.float32)  # noqa: E731
    return {
        "schema_version": np.full(rows, results.SCHEMA_VERSION, np.int32),
        "cell": np.full(rows, block.cell_index, np.int32),
        "target_id": np.repeat(material.ids[:, 0].astype(np.int64), len(seeds) * points),
        "noise_seed": np.repeat(material.draws.astype(np.int64), len(seeds) * points),
        "seed": np.tile(np.repeat(np.asarray(seeds, np.int64), points), targets),
        "step": np.tile(trace.step.astype(np.int32), targets * len(seeds)),
        "psnr": flat(trace.psnr),
        "objective": flat(trace.objective),
    }


def label(block: Block, study: config.Study) -> str:
    """Names a block's cell by the settings that vary."""
    cells = [cell.model_dump() for cell in study.cells]
    settings = summary.naming_settings(study.axes, cells, block.cell_index)
    return summary.label_text(settings) or block.cell.model


def watch(bar: Progress, task, block: Block, study: config.Study) -> Callable[[int, float], None]:
    """A callback that moves the bar by a block's steps and shows its current PSNR."""
    base, trials_here = bar.tasks[task].completed, _trials(block, study)
    name = label(block, study)

    def update(steps: int, psnr: float) -> None:
        bar.update(
            task, completed=base + steps * trials_here,
            description=f"{name}: {psnr:.2f} dB",
        )  # fmt: skip

    bar.update(task, description=f"{name}: compiling")
    return update


def print_plan(
    console: Console, study: config.Study, materials: Sequence[Material], blocks: Sequence[Block]
) -> None:
    """Prints the cells and an estimate of the work, for --dry-run."""
    console.print(f"[bold]{study.name}[/bold]: {study.text.question}")
    if study.text.cost:
        console.print(f"cost: {study.text.cost}")
    table = Table("cell", "settings", "trials", "steps", "GFLOP per step", "PFLOP")
    table.columns[1].overflow = "fold"  # a value cut short says nothing
    cells = [cell.model_dump() for cell in study.cells]
    total = 0.0
    counted: dict[tuple, float] = {}  # tracing a network twice takes long
    for index, (cell, material) in enumerate(zip(study.cells, materials)):
        count = len(material.ids) * draws_of(cell, study.plan) * study.plan.seeds
        images = cell.assumed_images or cell.images
        attack = attack_of(cell, material)
        program = (material.victim.module, attack, images, material.images.shape[2:])
        if program not in counted:
            counted[program] = trials.step_flops(shapes_of(material, attack, images), attack)
        flops = counted[program]
        work = flops * count * cell.iterations
        total += work
        settings = summary.naming_settings(study.axes, cells, index) or {"model": cell.model}
        table.add_row(
            str(index), summary.label_text(settings), str(count), str(cell.iterations),
            f"{flops / 1e9:.4g}", f"{work / 1e15:.3g}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"{len(study.cells)} cells, {len(blocks)} blocks, {total / 1e15:.3g} PFLOP in all "
        f"(about {total / 2e10 / 60:.3g} minutes at 20 GFLOP/s); nothing was run"
    )


if __name__ == "__main__":
    sys.exit(main())
