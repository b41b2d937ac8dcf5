"""What an attacker who does not know the client takes for true: labels, and what fits best.

Labels are read off each update by a rule, or found beside the images. A number of images, a size of
mini-batch or a rate that is not the client's cannot explain its update as well, and the attacker
sees how well: the objective. So an unknown number is swept like any other, as an axis of
`--assumed-images`, `--assumed-batch` or `--assumed-lr`, and read off afterwards.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxinv.reporting.statistics import mean_interval
from jaxinv.reporting.study import Cell, Study
from jaxinv.settings.naming import label_text

UNKNOWNS = {"assumed_images": "images", "assumed_batch": "client_batch", "assumed_lr": "client_lr"}
# Too few images cannot explain an update, too many can: the objective stops falling at the number.
SUFFICIENT = 2.0  # times the least objective


def assumptions(study: Study) -> list[dict[str, Any]]:
    """One row per assumed value: how well it explains the updates, and for how many it is taken."""
    asked, rows = study.run.config["cells"], []
    by_number = {cell.number: cell for cell in study.cells}
    for unknown, true in UNKNOWNS.items():
        if unknown not in study.run.config["axes"]:
            continue
        groups: dict[str, list[int]] = {}
        for number, cell in enumerate(asked):
            if number in by_number:
                others = {name: value for name, value in cell.items() if name != unknown}
                groups.setdefault(repr(others), []).append(number)
        for numbers in groups.values():
            values = [
                asked[n][true] if asked[n][unknown] is None else asked[n][unknown] for n in numbers
            ]
            tried = sorted((value, n) for value, n in zip(values, numbers) if value is not None)
            if len({value for value, _ in tried}) > 1:
                cells = [by_number[n] for _, n in tried]
                rows += _group(unknown, asked[numbers[0]][true], [v for v, _ in tried], cells)
    return rows


def labels_found(study: Study) -> list[dict[str, Any]]:
    """One row per cell whose labels the attacker was not told: how many of them it has right."""
    rows = []
    for cell in study.cells:
        settings = study.run.config["cells"][cell.number]
        if settings["labels"] == "known":
            continue
        accuracy = cell.metrics["label_accuracy"]
        mean = mean_interval(accuracy)
        rows.append(
            {
                "cell": cell.number,
                "setting": cell.label,
                "rule": settings["labels"],
                "images": settings["images"],
                "targets": len(cell.target_ids),
                "seeds": len(cell.seeds),
                "failed": int(cell.failed.sum()),
                "accuracy": mean.mean,
                "accuracy_low": mean.low,
                "accuracy_high": mean.high,
                "all_right": float((accuracy == 1).mean()),
                "psnr_mean": cell.mean.mean,
                "baseline_psnr": cell.baseline("psnr"),
            }
        )
    return rows


def choose(
    objective: Float[np.ndarray, "value target"], fewest: bool
) -> Int[np.ndarray, " target"]:
    """Chooses a value for each target by the objective alone; -1 where all trials failed.

    Args:
      objective: of the best start with each value, ascending; NaN where all starts failed.
      fewest: takes the least value that explains the update well enough, not the best.
    """
    known = np.where(np.isnan(objective), np.inf, objective)
    least = known.min(axis=0)
    chosen = (known <= SUFFICIENT * least).argmax(axis=0) if fewest else known.argmin(axis=0)
    return np.where(np.isfinite(least), chosen, -1)


def _group(unknown: str, true: Any, values: list, cells: list[Cell]) -> list[dict[str, Any]]:
    """The rows of cells that differ in one assumption alone, on the targets that all have."""
    shared = [t for t in cells[0].target_ids if all(t in cell.target_ids for cell in cells)]
    objective = np.stack([_least_objective(cell, shared) for cell in cells])
    chosen = choose(objective, fewest=unknown == "assumed_images")
    rest = {k: v for k, v in cells[-1].settings.items() if k != unknown}
    return [
        {
            "unknown": unknown.removeprefix("assumed_"),
            "setting": label_text(rest),
            "assumed": value,
            "true": true,
            "targets": len(shared),
            "seeds": len(cell.seeds),
            "failed": int(cell.failed.sum()),
            "objective": float(objective[index].mean()),
            "chosen": int((chosen == index).sum()),
            "psnr_mean": mean_interval(cell.psnr).mean,
            "baseline_psnr": cell.baseline("psnr"),
        }
        for index, (value, cell) in enumerate(zip(values, cells))
    ]


def _least_objective(cell: Cell, targets: list[int]) -> Float[np.ndarray, " target"]:
    rows = cell.metrics["objective"][[cell.target_ids.index(t) for t in targets]]
    return np.where(np.isnan(rows), np.inf, rows).min(axis=1)
