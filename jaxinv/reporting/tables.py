"""Tables of a report: one function per table, each a list of rows, and how they reach a CSV file.

Undefined numbers are `nan`, exact reconstructions `inf`: both read back with `float`.
"""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxinv.files import write_file
from jaxinv.reporting import defense_curves, unknowns
from jaxinv.reporting.statistics import mean_interval, ranked_quantile, target_interval
from jaxinv.reporting.study import Cell, Study

Row = dict[str, Any]
BASELINE_LABEL = "mean colour"


def summary(study: Study) -> list[Row]:
    """One row per cell, then the mean-colour baseline once per distinct set of targets."""
    rows = [_summary_row(cell) for cell in study.cells]
    return rows + [_baseline_row(cell, rows[0]) for cell in _distinct_baselines(study)]


def _summary_row(cell: Cell) -> Row:
    ssim, mse = (mean_interval(cell.metrics[name]).mean for name in ("ssim", "mse"))
    mean, success = cell.mean, cell.success
    return {
        "cell": cell.number,
        "setting": cell.label,
        "targets": len(cell.target_ids),
        "seeds": len(cell.seeds),
        "draws": len(cell.draws),
        "failed": int(cell.failed.sum()),
        "exact": int(cell.exact.sum()),
        "psnr_mean": mean.mean,
        "psnr_low": mean.low,
        "psnr_high": mean.high,
        "psnr_seed_std": mean.seed_std,
        "psnr_median": float(ranked_quantile(cell.psnr.ravel(), 0.5)),
        "psnr_attacker_best": float(cell.attacker.mean[-1]),
        "psnr_consensus_quarter": float(cell.consensus.quarter.mean[-1]),
        "psnr_consensus_all": float(cell.consensus.all.mean[-1]),
        "psnr_oracle_best": float(cell.oracle.mean[-1]),
        "baseline_psnr": cell.baseline("psnr"),
        "ssim_mean": ssim,
        "mse_mean": mse,
        "label_accuracy": mean_interval(cell.metrics["label_accuracy"]).mean,
        "success_psnr": cell.success_psnr,
        "success_rate": success.rate,
        "success_low": success.low,
        "success_high": success.high,
        "update_cosine": float(cell.metrics["update_cosine"].mean()),
        "effective_trials": success.effective_trials,
    }


def _baseline_row(cell: Cell, like: Row) -> Row:
    """The baseline in the columns it has: the same image for every seed, so no spread of seeds."""
    psnr = cell.baselines["baseline_psnr"]
    mean, low, high = (float(v) for v in target_interval(psnr))
    return {name: np.nan for name in like} | {
        "cell": "",
        "setting": BASELINE_LABEL,
        "targets": len(cell.target_ids),
        "seeds": "",
        "draws": "",
        "failed": 0,
        "exact": 0,
        "psnr_mean": mean,
        "psnr_low": low,
        "psnr_high": high,
        "psnr_median": float(np.median(psnr)),
        "baseline_psnr": mean,
        "ssim_mean": cell.baseline("ssim"),
        "mse_mean": cell.baseline("mse"),
        "success_psnr": cell.success_psnr,
        "success_rate": float((psnr > cell.success_psnr).mean()),
    }


def _distinct_baselines(study: Study) -> list[Cell]:
    """First cell of each distinct set of baseline values."""
    seen: dict[tuple, Cell] = {}
    for cell in study.cells:
        seen.setdefault(tuple(cell.baselines["baseline_psnr"]), cell)
    return list(seen.values())


def per_target(study: Study) -> list[Row]:
    """One row per cell and target, the target's baseline beside it."""
    rows = []
    for cell in study.cells:
        for at, target in enumerate(cell.target_ids):
            psnr = cell.psnr[at : at + 1]
            rows.append(
                {
                    "cell": cell.number,
                    "setting": cell.label,
                    "target": target,
                    "images": " ".join(map(str, cell.image_ids[at])),
                    "seeds": len(cell.seeds),
                    "failed": int(cell.failed[at].sum()),
                    "exact": int(cell.exact[at].sum()),
                    "psnr_mean": mean_interval(psnr).mean,
                    "psnr_seed_std": mean_interval(psnr).seed_std,
                    "psnr_median": float(ranked_quantile(psnr[0], 0.5)),
                    "psnr_worst": float(ranked_quantile(psnr[0], 0.0)),
                    "psnr_attacker_best": float(cell.attacker.per_target[at, -1]),
                    "psnr_consensus_quarter": float(cell.consensus.quarter.per_target[at, -1]),
                    "psnr_consensus_all": float(cell.consensus.all.per_target[at, -1]),
                    "psnr_oracle_best": float(cell.oracle.per_target[at, -1]),
                    "baseline_psnr": float(cell.baselines["baseline_psnr"][at]),
                }
            )
    return rows


def best_of_k(study: Study) -> list[Row]:
    """One row per cell and k: choosing and averaging, mean over targets with its interval."""
    rows = []
    for cell in study.cells:
        for index in range(len(cell.seeds)):
            row = {"cell": cell.number, "setting": cell.label, "targets": len(cell.target_ids)}
            row |= {"failed": int(cell.failed.sum()), "k": index + 1}
            makers = {
                "attacker": cell.attacker,
                "consensus_quarter": cell.consensus.quarter,
                "consensus_all": cell.consensus.all,
                "oracle": cell.oracle,
            }
            for name, best in makers.items():
                row[f"{name}_psnr"] = float(best.mean[index])
                row[f"{name}_low"] = float(best.low[index])
                row[f"{name}_high"] = float(best.high[index])
            rows.append(row | {"baseline_psnr": cell.baseline("psnr")})
    return rows


def variance_components(study: Study) -> list[Row]:
    """One row per cell, in dB; then the baseline, which varies between targets only."""
    rows = []
    for cell in study.cells:
        row = {
            "cell": cell.number,
            "setting": cell.label,
            "targets": len(cell.target_ids),
            "seeds": len(cell.seeds),
            "draws": len(cell.draws),
            "failed": int(cell.failed.sum()),
            "exact": int(cell.exact.sum()),
        }
        for name, interval in cell.components._asdict().items():
            unit = "icc" if name == "icc" else f"{name}_std"
            row |= {unit: interval.value, f"{unit}_low": interval.low}
            row[f"{unit}_high"] = interval.high
        rows.append(row)
    for cell in _distinct_baselines(study):
        psnr = cell.baselines["baseline_psnr"]
        known = {"cell": "", "setting": BASELINE_LABEL, "targets": psnr.size, "seeds": ""}
        known |= {"draws": ""}
        spread = float(psnr.std(ddof=1)) if psnr.size > 1 else np.nan
        known |= {"failed": 0, "exact": 0, "between_std": spread, "within_std": 0.0}
        rows.append({name: np.nan for name in rows[0]} | known)
    return rows


def paired_differences(study: Study) -> list[Row]:
    """One row per later cell: its PSNR minus the first cell's, on the same targets and seeds."""
    return [
        {
            "cell": pair.cell.number,
            "setting": pair.cell.label,
            "reference_cell": pair.reference.number,
            "reference": pair.reference.label,
            "targets": len(pair.cell.target_ids),
            "seeds": len(pair.cell.seeds),
            "draws": len(pair.cell.draws),
            "failed": int(pair.cell.failed.sum() + pair.reference.failed.sum()),
            "psnr_difference": pair.difference.value,
            "difference_low": pair.difference.low,
            "difference_high": pair.difference.high,
        }
        for pair in study.pairs
    ]


def size_text(row: Row) -> str:
    """How many trials a row is of: targets x draws of noise, where there are several, x seeds."""
    counts = [row["targets"], row.get("draws"), row["seeds"]]
    if counts[1] in (None, 1):
        counts.pop(1)
    return " × ".join(str(count) for count in counts if count != "")


TABLES: dict[str, Callable[[Study], list[Row]]] = {
    "summary": summary,
    "per_target": per_target,
    "best_of_k": best_of_k,
    "variance_components": variance_components,
    "paired_differences": paired_differences,
    "defenses": defense_curves.verdicts,
    "dp_sgd": defense_curves.private_rows,
    "assumptions": unknowns.assumptions,
    "labels": unknowns.labels_found,
}


def write(path: Path, rows: list[Row]) -> None:
    """Writes rows as CSV, floats with eight significant digits; a table without rows is none."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()})
    write_file(path, lambda file: file.write(text.getvalue().encode()))
