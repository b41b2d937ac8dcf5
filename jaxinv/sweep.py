"""`python -m jaxinv.sweep`: run a study, block by block, and report it.

A block is one cell on a group of targets. It is computed whole, written whole, and never computed
again: the same command after a kill goes on where the last one stopped.
"""

import contextlib
import datetime
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from jaxinv import files, report
from jaxinv.engine import trials
from jaxinv.engine.cells import (
    Attacked,
    CellInputs,
    Loader,
    attack_of,
    checkpoint_digests,
    shapes_of,
)
from jaxinv.engine.likeness import judge_digest
from jaxinv.errors import UserError, run_command
from jaxinv.machine import executors, runtime
from jaxinv.reporting.wording import count_text
from jaxinv.runs import results
from jaxinv.runs.blocks import Block, draws_of, label, plan_blocks, run_block, trials_of, work_of
from jaxinv.settings import flags, reader, schema
from jaxinv.settings.naming import label_text, naming_settings
from jaxinv.victim.untrained import digest


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""

    def command():
        parser = flags.FlagParser("python -m jaxinv.sweep", __doc__)
        parser.add_argument(
            "study",
            nargs="?",
            type=Path,
            metavar="STUDY",
            help="Sweep file, or the name of one in sweeps/ (default: built in).",
        )
        parser.add_argument(
            "--preset", metavar="NAME", help="Use the sweep file's larger or smaller version."
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="Print the cells and the work; run nothing."
        )
        flags.add_study(parser)
        parser.group("output").add_argument(
            "--profile", metavar="DIR", type=Path, help="Write a profile for TensorBoard there."
        )
        flags.add_workers(parser)
        arguments = parser.parse_args(argv)
        study = reader.load_study(arguments.study, vars(arguments), arguments.preset)
        workers = reader.load_workers(vars(arguments))
        words = shlex.join(sys.argv[1:] if argv is None else argv)
        profiled = contextlib.nullcontext()
        if arguments.profile is not None:
            profiled = jax.profiler.trace(_profile_folder(arguments.profile))
        with profiled:
            run_study(
                study, f"python -m jaxinv.sweep {words}".strip(), workers, dry_run=arguments.dry_run
            )

    return run_command(command)


def _profile_folder(folder: Path) -> Path:
    """Makes the folder of a profile: JAX would find only at the end that it cannot.

    Raises:
      UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--profile: cannot be made there ({error})") from None
    return folder


def run_study(
    study: schema.Study, command: str, workers: schema.Workers, *, dry_run: bool = False
) -> None:
    """Runs what is not done yet of a study, then writes its tables, plots and report.

    Raises:
      UserError: data, shapes or the run folder do not fit, and nothing was written then; or the
        workers do not live.
    """
    console = Console(markup=False)
    if workers.executor != "local":
        jax.config.update("jax_platforms", "cpu")  # this machine's accelerators are the workers'
    runtime.set_up_compiler()
    runtime.use_all_cores()
    load = Loader(study.plan)
    all_inputs = [load.with_lineup(cell, load(cell)) for cell in study.cells]
    blocks = list(plan_blocks(study, dict(enumerate(all_inputs))))
    if dry_run:
        print_plan(console, study, all_inputs, blocks)
        return
    if workers.executor == "local":
        for cell in study.cells:
            runtime.check_precision(cell.precision)
    waiting = [block for block in blocks if not results.is_done(study.folder, block.name)]
    executor = None
    if waiting and workers.executor != "local":
        executor = executors.start(
            workers.executor, "jaxinv.sweep:run_cell", workers.resources, study.folder
        )
    is_new = not study.folder.exists()
    open_run(study, all_inputs, command)
    if len(waiting) < len(blocks):
        console.print(f"{study.folder}: {len(blocks) - len(waiting)} of {len(blocks)} blocks done")
    total, left = (sum(work_of(block, study) for block in some) for some in (blocks, waiting))
    with files.locked(study.folder):  # a folder that another is at work in is not ours to discard
        try:
            with runtime.progress_bar(console) as bar:
                task = bar.add_task("", total=total, completed=total - left)
                if executor is None:
                    run_here(study, waiting, all_inputs, bar, task)
                else:
                    run_elsewhere(study, waiting, executor, bar, task)
        except UserError:
            if is_new:
                results.discard(study.folder)
            raise
    report.build(study.folder, console=console)


def run_here(
    study: schema.Study,
    waiting: Sequence[Block],
    all_inputs: Mapping[int, CellInputs] | Sequence,
    bar: Progress,
    task,
) -> None:
    """Runs these blocks one after the other, in this process; `all_inputs` by the cell's index."""
    plans = set()

    def announce(plan: str) -> None:
        """Prints a plan once, not for every block."""
        if plan not in plans:
            plans.add(plan)
            bar.console.print(f"plan: {plan}", soft_wrap=True)

    for block in waiting:
        after = bar.tasks[task].completed + work_of(block, study)
        progress = watch(bar, task, block, study)
        run_block(study, block, all_inputs[block.cell_index], progress, announce)
        bar.update(task, completed=after)  # a closed form reports no steps
        say_finished(bar, block, study)


def run_elsewhere(
    study: schema.Study, waiting: Sequence[Block], executor: executors.Executor, bar: Progress, task
) -> None:
    """Runs these blocks, a cell to a worker."""
    left = list(waiting)
    cells = sorted({block.cell_index for block in waiting})
    bar.update(task, description=f"{len(cells)} cells by {executor.kind}")

    def look() -> None:
        """Moves the bar by what workers have committed."""
        for block in [b for b in left if results.is_done(study.folder, b.name)]:
            left.remove(block)
            bar.advance(task, work_of(block, study))
            say_finished(bar, block, study)

    devices = executors.run(
        executor,
        [(study, index) for index in cells],
        look,
        lambda line: bar.console.print(line, soft_wrap=True),
    )
    look()
    there = results.read_config(study.folder)
    there["sessions"][-1]["device"] = "; ".join(sorted(set(devices)))  # ty: ignore[not-subscriptable]
    results.write_config(study.folder, there)


def say_finished(bar: Progress, block: Block, study: schema.Study) -> None:
    """Prints a line where there is no bar to see."""
    if not bar.console.is_terminal:
        bar.console.print(f"finished {block.name} ({label(block, study)})")


def run_cell(study: schema.Study, index: int) -> str:
    """Runs what is not done of a cell: a worker's whole task.

    Returns:
      The worker's devices in words.

    Raises:
      UserError: the worker does not have the cell's precision.
    """
    runtime.set_up_compiler()
    runtime.use_all_cores()
    cell, load = study.cells[index], Loader(study.plan)
    runtime.check_precision(cell.precision)
    inputs = load.with_lineup(cell, load(cell))
    own = plan_blocks(study, {index: inputs})
    waiting = [block for block in own if not results.is_done(study.folder, block.name)]
    with runtime.progress_bar(Console(markup=False)) as bar:
        task = bar.add_task("", total=sum(work_of(block, study) for block in waiting))
        run_here(study, waiting, {index: inputs}, bar, task)
    return runtime.hardware()


SPEED = 5e10  # operations a second: about what two cores have of an attack on a small network
# What a run that goes on has in common with what is there.
COMPARED = {
    "cells": "other cells",
    "target_ids": "other target-ids",
    "targets": "other images behind its targets (--target-ids, or what --data-dir holds)",
    "seeds": "other seeds",
    "noise_seeds": "other noise-seeds",
    "checkpoints": "another network behind the name of a checkpoint",
    "judge": "another --judge",
    "lpips": "another --lpips",
}


def open_run(study: schema.Study, all_inputs: Sequence[CellInputs], command: str) -> None:
    """Makes the run folder, or joins the one there if it asks for the same.

    Raises:
      UserError: the folder cannot be written, or holds a run with other settings.
    """
    asked = {
        "name": study.name,
        "study": study.text.model_dump(),
        "axes": study.axes,
        "cells": [cell.model_dump() for cell in study.cells],
        "target_ids": all_inputs[0].ids[:, 0].tolist(),
        "targets": targets_of(study.cells, all_inputs),
        "checkpoints": checkpoint_digests(study.cells),
        "judge": judge_digest(study.plan.judge),
        "lpips": study.plan.lpips,
        "seeds": list(range(study.plan.seeds)),
        "noise_seeds": list(range(study.plan.noise_seeds)),
    }
    folder = study.folder
    there = results.read_config(folder)
    if there is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--out {folder}: exists and is no run folder; choose another")
        there = asked | {"command": command, "sessions": []}
    for name, words in COMPARED.items():
        if name in there and there[name] != asked[name]:  # an older run.json says less
            raise UserError(
                f"--out {folder}: holds a run with {words}; "
                "choose another --out, or repeat that run's settings to resume it"
            )
    there["sessions"].append(session(command))
    results.write_config(folder, there)


def targets_of(
    cells: Sequence[schema.Cell], all_inputs: Sequence[CellInputs | Attacked]
) -> list[dict[str, Any]]:
    """What each cell attacks, as run.json keeps it (`results.CellTargets`)."""
    keys = [tuple(getattr(cell, n) for n in results.CHOOSE_TARGETS) for cell in cells]
    found = {}
    for key, inputs in dict(zip(keys, all_inputs)).items():  # most cells attack the same
        whole = {"images": inputs.images, "labels": inputs.labels, "ids": inputs.ids}
        found[key] = {"ids": inputs.ids[:, 0].tolist(), "digest": digest(whole)}
    return [found[key] for key in keys]


def session(command: str) -> dict:
    """Describes this process: when, what, with which versions, on which device."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "versions": runtime.versions(("jaxinv", "jax", "jaxlib", "flax", "optax", "numpy")),
        "device": runtime.hardware(),
    }


def watch(bar: Progress, task, block: Block, study: schema.Study) -> Callable[[int, float], None]:
    """A callback that moves the bar by a block's steps and shows its current PSNR."""
    base, trials_here = bar.tasks[task].completed, trials_of(block, study)
    name = label(block, study)

    def update(steps: int, psnr: float) -> None:
        bar.update(task, completed=base + steps * trials_here, description=f"{name}: {psnr:.2f} dB")

    bar.update(task, description=f"{name}: compiling")
    return update


def print_plan(
    console: Console, study: schema.Study, all_inputs: Sequence[CellInputs], blocks: Sequence[Block]
) -> None:
    """Prints the cells and an estimate of the work, for --dry-run."""
    console.print(f"{study.name}: {study.text.question}")
    if study.text.cost:
        console.print(f"cost: {study.text.cost}")
    table = Table("cell", "settings", "trials", "steps", "GFLOP per step", "PFLOP")
    table.columns[1].overflow = "fold"  # a value cut short says nothing
    cells = [cell.model_dump() for cell in study.cells]
    total = 0.0
    counted: dict[tuple, float] = {}  # tracing a network twice takes long
    for index, (cell, inputs) in enumerate(zip(study.cells, all_inputs)):
        count = len(inputs.ids) * draws_of(cell, study.plan) * study.plan.seeds
        flops = 0.0  # of a closed form: next to nothing
        if cell.family().make is not None:
            attack, images = attack_of(cell, inputs), cell.assumed().images
            program = (inputs.victim.module, attack, images, inputs.images.shape[2:])
            if program not in counted:
                counted[program] = trials.step_flops(shapes_of(inputs, attack, images), attack)
            flops = counted[program]
        work = flops * count * cell.iterations
        total += work
        settings = naming_settings(study.axes, cells, index) or _what_is_attacked(cell)
        table.add_row(
            str(index),
            label_text(settings),
            str(count),
            str(cell.iterations),
            f"{flops / 1e9:.4g}",
            f"{work / 1e15:.3g}",
        )
    console.print(table)
    duration = datetime.timedelta(seconds=math.ceil(total / SPEED))
    console.print(
        f"{count_text(len(study.cells), 'cell')}, {count_text(len(blocks), 'block')}, "
        f"{total / 1e15:.3g} PFLOP in all (about {duration} at {SPEED / 1e9:g} GFLOP/s, and the "
        "compilation); nothing was run"
    )


def _what_is_attacked(cell: schema.Cell) -> dict[str, Any]:
    """What to call a cell that stands alone."""
    names = ("model" if cell.victim is None else "victim", "attack", "representation")
    return {name: getattr(cell, name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
