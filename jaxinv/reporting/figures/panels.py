"""What figures of PSNR share: which cells they show, their limits, a panel's axes."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from jaxinv.reporting.consensus import quarter
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.study import CellSummary, StudySummary, choose_evenly


def shown_cells(study: StudySummary, most: int = ps.MOST_CELLS) -> list[CellSummary]:
    """Cells that a figure has room for, spread evenly over the sweep."""
    return choose_evenly(study.cells, most)


def left_out(
    study: StudySummary, cells: Sequence[CellSummary], targets: Sequence[int] | None = None
) -> str:
    """Says what a figure does not show; nothing where it shows all."""
    parts = []
    if targets is not None and len(targets) < len(study.target_ids):
        parts.append(f"the first {len(targets)} of {len(study.target_ids)} targets")
    if len(cells) < len(study.cells):
        parts.append(f"{len(cells)} of {len(study.cells)} cells")
    return f" Shown: {' and '.join(parts)}." if parts else ""


def averages(cells: Sequence[CellSummary]) -> bool:
    """Whether some cell's best quarter is more than one seed, and so other than the pick."""
    return any(quarter(len(cell.seeds)) > 1 for cell in cells)


def columns_in(width: float, panels: int, wide: int = 4) -> int:
    """How many panels stand beside each other: as many as stay readable, the last row not bare."""
    most = wide if width > 6 else 2
    rows = -(-panels // most)
    return -(-panels // rows)


def finite(values: np.ndarray) -> np.ndarray:
    """Leaves out what is failed or exact: NaN there."""
    return np.where(np.isfinite(values), values, np.nan)


def limits_around(values: np.ndarray) -> tuple[float, float]:
    """Limits around finite values, NaN for none, with room at both ends for exact and failed."""
    known = values[~np.isnan(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    room = 0.09 * max(high - low, 1.0)
    return low - room, high + room


def psnr_panel(
    sheet: ps.Sheet, index: int, ax: Axes, limits: tuple[float, float], baseline: float
) -> None:
    """Sets a panel's PSNR axis, named once per row, and draws the baseline."""
    ax.set_ylim(*limits)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ps.draw_baseline(ax, baseline)
    if sheet.is_first(index):
        ax.set_ylabel("PSNR (dB)")
    else:
        ax.tick_params(labelleft=False)
