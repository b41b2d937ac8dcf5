"""Blocks: the unit of work, one cell on a group of targets, computed and written whole."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from jaxinv import defenses
from jaxinv.engine import planner, trials
from jaxinv.engine.cells import CellInputs, attack_cell
from jaxinv.engine.snapshots import Snapshots
from jaxinv.engine.targets import seed_keys
from jaxinv.runs import results
from jaxinv.runs.rows import trace_rows, trial_rows
from jaxinv.settings import schema
from jaxinv.settings.naming import label_text, naming_settings

TRIALS_PER_BLOCK = 128  # what a kill may cost: about a minute of LeNetZhu per 500 steps
POLISHED_PER_BLOCK = 16  # a polish takes ten times as long as the attack before it
FRAMES = 12  # pictures of the way that are kept of every target's pick
UPDATES_PER_BLOCK = 2**29  # bytes of them, in memory at once: eight of ResNet18 (64)


class Block(NamedTuple):
    """The unit of work: a cell's settings on a group of targets."""

    name: str
    cell_index: int
    cell: schema.Cell
    positions: slice  # of its targets in the study's list


def plan_blocks(study: schema.Study, all_inputs: Mapping[int, CellInputs]) -> Iterator[Block]:
    """Cuts each cell's targets into equal blocks, so that one compilation serves them all."""
    for index, inputs in all_inputs.items():
        cell, targets = study.cells[index], len(inputs.ids)
        draws = draws_of(cell, study.plan)
        update = sum(x.nbytes for x in jax.tree.leaves(inputs.victim.variables["params"]))
        trials = POLISHED_PER_BLOCK if cell.polish else TRIALS_PER_BLOCK
        most = min(trials // study.plan.seeds, UPDATES_PER_BLOCK // update) // draws
        size = max(d for d in range(1, max(1, min(most, targets)) + 1) if targets % d == 0)
        for first in range(0, targets, size):
            name = results.block_name(index, first)
            yield Block(name, index, cell, slice(first, first + size))


def draws_of(cell: schema.Cell, plan: schema.Plan) -> int:
    """How often each target's defense is drawn: once where it draws nothing."""
    return plan.noise_seeds if defenses.is_random(cell.chain()) else 1


def trials_of(block: Block, study: schema.Study) -> int:
    """Number of trials of a block."""
    targets = block.positions.stop - block.positions.start
    return targets * draws_of(block.cell, study.plan) * study.plan.seeds


def work_of(block: Block, study: schema.Study) -> int:
    """Trial-iterations of a block."""
    return block.cell.iterations * trials_of(block, study)


def label(block: Block, study: schema.Study) -> str:
    """Names a block's cell by the settings that vary."""
    cells = [cell.model_dump() for cell in study.cells]
    settings = naming_settings(study.axes, cells, block.cell_index)
    return label_text(settings) or block.cell.model


def run_block(
    study: schema.Study,
    block: Block,
    inputs: CellInputs,
    progress: Callable[[int, float], None],
    announce: Callable[[str], None],
) -> None:
    """Attacks a block's targets from every seed and commits its rows."""
    cell = block.cell
    inputs = inputs.of_targets(block.positions, draws_of(cell, study.plan))
    ids, seeds = inputs.ids, range(study.plan.seeds)
    snapshots = Snapshots(study.folder, block.name, repr(cell))
    found = attack_cell(
        cell,
        inputs,
        seed_keys(ids[:, 0], seeds),
        cell.numbers(),
        trials.Resources(
            memory=planner.memory_limit(study.plan.memory),
            progress=progress,
            announce=announce,
            snapshots=snapshots,
            frames=FRAMES,
        ),
    )
    result = found.result
    quantized = np.round(np.nan_to_num(result.pixels) * 255).astype(np.uint8)
    results.write_block(
        study.folder,
        block.name,
        trial_rows(cell, block.cell_index, inputs, found, seeds),
        trace_rows(block.cell_index, result, inputs, seeds),
        results.BlockImages(ids[:, 0], np.asarray(seeds), quantized, inputs.images),
        {**(found.extras or {}), **way_of_picks(result)},
    )
    snapshots.clear()


def way_of_picks(result: trials.Result) -> dict[str, np.ndarray]:
    """Pictures of each target's pick on its way, [target, frame, ...], and the steps taken."""
    if result.frames is None:
        return {}
    picks = trials.comparable(result).argmin(axis=1)
    pixels = result.frames.pixels[:, np.arange(len(picks)), picks]
    steps = np.tile(result.frames.step, (len(picks), 1))
    return {"frames": np.moveaxis(pixels, 1, 0), "frame_steps": steps}
