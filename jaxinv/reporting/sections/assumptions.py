"""Section: what an attacker who does not know the client would take for true.

A number of images, a size of mini-batch or a learning rate that is not the client's cannot explain
its update as well, and the attacker sees how well: the objective. So an unknown number is swept
like any other, as an axis of `--assumed-images`, `--assumed-batch` or `--assumed-lr`, and read off
afterwards.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxinv.reporting.columns import (
    Column,
    Row,
    Shown,
    Table,
    baseline_column,
    decimals_or_failed,
    name_columns,
    setting,
    size_columns,
)
from jaxinv.reporting.section import Section
from jaxinv.reporting.statistics import mean_interval
from jaxinv.reporting.study import CellSummary, StudySummary
from jaxinv.settings.naming import label_text

UNKNOWNS = {"assumed_images": "images", "assumed_batch": "client_batch", "assumed_lr": "client_lr"}
# Too few images cannot explain an update, too many can: the objective stops falling at the number.
SUFFICIENT = 2.0  # times the least objective


class Assumption(NamedTuple):
    """One assumed value, among others for the same unknown, on the targets that all have."""

    cell: CellSummary
    unknown: str  # what is assumed: "images"
    setting: str  # what else varies
    assumed: Any
    true: Any
    targets: int
    objective: float  # of the best seed, mean over targets
    chosen: int  # for so many targets the attacker takes this value


@lru_cache(maxsize=1)  # a report is of one study
def assumptions(study: StudySummary) -> list[Assumption]:
    """Says of every assumed value how well it explains the updates, and how often it is taken."""
    return [row for name in UNKNOWNS for group in _groups(study, name) for row in group]


def _groups(study: StudySummary, unknown: str) -> Iterator[list[Assumption]]:
    """The cells that differ in one assumption alone, where at least two values were tried."""
    if unknown not in study.run.config["axes"]:
        return
    groups: dict[frozenset, list[tuple[Any, int, CellSummary]]] = {}
    for cell in study.cells:
        others = frozenset((k, str(v)) for k, v in cell.asked.items() if k != unknown)
        value = cell.asked[unknown]
        value = cell.asked[UNKNOWNS[unknown]] if value is None else value
        if value is not None:
            groups.setdefault(others, []).append((value, cell.number, cell))
    for tried in groups.values():
        if len({value for value, *_ in tried}) > 1:
            in_order = sorted(tried, key=lambda t: t[:2])
            yield _compare(unknown, [value for value, *_ in in_order], [c for *_, c in in_order])


def choose(
    objective: Float[np.ndarray, "value target"], fewest: bool
) -> Int[np.ndarray, " target"]:
    """Chooses a value for each target by the objective alone; -1 where all trials failed.

    Args:
      objective: of the best seed with each value, ascending; NaN where all seeds failed.
      fewest: takes the least value that explains the update well enough, not the best.
    """
    known = np.where(np.isnan(objective), np.inf, objective)
    least = known.min(axis=0)
    chosen = (known <= SUFFICIENT * least).argmax(axis=0) if fewest else known.argmin(axis=0)
    return np.where(np.isfinite(least), chosen, -1)


def _compare(unknown: str, values: list, cells: list[CellSummary]) -> list[Assumption]:
    """Compares the values by the objective, on the targets that all cells have."""
    shared = [t for t in cells[0].target_ids if all(t in cell.target_ids for cell in cells)]
    objective = np.stack([_least_objective(cell, shared) for cell in cells])
    chosen = choose(objective, fewest=unknown == "assumed_images")
    rest = {k: v for k, v in cells[-1].settings.items() if k != unknown}
    return [
        Assumption(
            cell,
            unknown.removeprefix("assumed_"),
            label_text(rest),
            value,
            cell.asked[UNKNOWNS[unknown]],
            len(shared),
            float(objective[index].mean()),
            int((chosen == index).sum()),
        )
        for index, (value, cell) in enumerate(zip(values, cells))
    ]


def _least_objective(cell: CellSummary, targets: list[int]) -> Float[np.ndarray, " target"]:
    rows = cell.metrics["objective"][[cell.target_ids.index(t) for t in targets]]
    return np.where(np.isnan(rows), np.inf, rows).min(axis=1)


def _unknown(row: Row) -> Shown:
    return Shown(row["unknown"], below=row["setting"])


def _objective(row: Row) -> Shown:
    return Shown(f"{row['objective']:.2g}")


def _chosen(row: Row) -> Shown:
    return Shown(f"{row['chosen']} of {row['targets']}")


def _columns() -> tuple[Column, ...]:
    def cell(item):
        return item.cell

    number, _ = name_columns("", cell)
    return (
        number,
        Column("unknown", lambda item: item.unknown, "unknown", _unknown),
        Column("setting", lambda item: item.setting),
        Column("assumed", lambda item: item.assumed, "assumed", setting("assumed")),
        Column("true", lambda item: item.true, "true", setting("true")),
        *size_columns(cell, targets=lambda item: item.targets),
        Column("objective", lambda item: item.objective, "objective of\nthe best seed", _objective),
        Column("chosen", lambda item: item.chosen, "chosen for", _chosen),
        Column(
            "psnr_mean",
            lambda item: mean_interval(item.cell.psnr).mean,
            "PSNR in dB",
            decimals_or_failed("psnr_mean"),
        ),
        baseline_column(cell),
    )


SECTION = Section(
    name="assumptions",
    title="What the attacker does not know, and would assume",
    when=lambda study: bool(assumptions(study)),
    table=Table(assumptions, _columns()),
    note=f"Chosen without the truth: the fewest images whose objective is at most {SUFFICIENT:g} "
    "times the least one, for more images than there are explain an update as well; of any other "
    "unknown the value with the least objective.",
)
