"""A block's results as columns: one row per trial, and one per trial and point of its trace."""

from collections.abc import Sequence

import numpy as np

from jaxinv.engine import trials
from jaxinv.engine.cells import CellInputs, CellResult, measure_likeness
from jaxinv.runs import results
from jaxinv.settings import schema

PLAN = ("targets_at_once", "seeds_at_once", "devices")  # what of a plan the rows keep


def trial_rows(
    cell: schema.Cell, number: int, inputs: CellInputs, found: CellResult, seeds: Sequence[int]
) -> dict[str, Sequence | np.ndarray]:
    """Lays the results of cell `number` out as columns, one row per target and seed."""
    result, baseline, accuracy, shared, _ = found
    victim, shape, ids = inputs.victim, result.objective.shape, inputs.ids
    rows, lineup = shape[0] * shape[1], inputs.lineup
    learned, seen = [own.info.source for own in inputs.learned.values()], inputs.classes_seen

    def spread(per_target):
        return np.repeat(np.asarray(per_target), shape[1])

    failed = ~result.finite
    measured = result.scores._asdict() | measure_likeness(inputs, result)._asdict()
    measured |= {"objective": result.objective, "prior": result.prior}
    of_images = measured.pop("psnr_images")
    measured = {
        name: np.where(failed, np.nan, np.asarray(values, np.float64)).ravel()
        for name, values in measured.items()
    }
    of_images = np.where(failed[..., None], np.nan, np.asarray(of_images, np.float64))
    asked = cell.model_dump()
    settings = {results.COLUMNS.get(name, name): [value] * rows for name, value in asked.items()}
    plan = {name: getattr(result.plan, name) for name in PLAN}
    return (
        settings
        | measured
        | {
            "schema_version": [results.SCHEMA_VERSION] * rows,
            "cell": [number] * rows,
            "target_id": spread(ids[:, 0]),
            "image_ids": [list(map(int, batch)) for batch in ids for _ in seeds],
            "noise_seed": spread(inputs.draws),
            "seed": list(seeds) * shape[0],
            "status": np.where(failed, "nonfinite", result.status).ravel(),
            "psnr_images": of_images.reshape(rows, -1).tolist(),
            "label_accuracy": np.asarray(accuracy, np.float64).ravel(),
            **{
                f"baseline_{name}": spread(getattr(baseline, name)).astype(np.float64)
                for name in results.SCORES
            },
            "update_cosine": spread(shared.cosine).astype(np.float64),
            "update_error": spread(shared.error).astype(np.float64),
            "victim_digest": [victim.digest] * rows,
            "victim_accuracy": [victim.accuracy] * rows,
            "victim_epsilon": [victim.epsilon] * rows,
            "victim_delta": [victim.delta] * rows,
            "capacity": [inputs.capacity] * rows,
            "judge_digest": [lineup.judge and lineup.judge.digest] * rows,
            "candidates": [len(lineup.pixels)] * rows,
            "prior_source": [inputs.prior_source and inputs.prior_source.name] * rows,
            "prior_images": [inputs.prior_source and inputs.prior_source.images] * rows,
            "learned_source": ["; ".join(learned) or None] * rows,
            "learned_saw_class": [None] * rows if seen is None else spread(seen),
            **{name: [value] * rows for name, value in plan.items()},
            "program_bytes": [result.bytes] * rows,
        }
    )


def trace_rows(
    number: int, result: trials.Result, inputs: CellInputs, seeds: Sequence[int]
) -> dict[str, np.ndarray]:
    """Lays the traces of cell `number` out as columns, one row per target, seed and point."""
    trace = result.trace
    points, targets, _ = trace.psnr.shape
    rows = trace.psnr.size

    def flat(x):
        return np.moveaxis(x, 0, -1).ravel().astype(np.float32)

    return {
        "schema_version": np.full(rows, results.SCHEMA_VERSION, np.int32),
        "cell": np.full(rows, number, np.int32),
        "target_id": np.repeat(inputs.ids[:, 0].astype(np.int64), len(seeds) * points),
        "noise_seed": np.repeat(inputs.draws.astype(np.int64), len(seeds) * points),
        "seed": np.tile(np.repeat(np.asarray(seeds, np.int64), points), targets),
        "step": np.tile(trace.step.astype(np.int32), targets * len(seeds)),
        "psnr": flat(trace.psnr),
        "objective": flat(trace.objective),
    }
