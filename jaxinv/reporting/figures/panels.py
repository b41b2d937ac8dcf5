"""What figures of PSNR share: which cells they show, of what, their limits, a panel's axes."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from jaxinv import defenses
from jaxinv.attacks import unused_settings
from jaxinv.reporting.consensus import quarter
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.study import CellSummary, StudySummary, choose_evenly
from jaxinv.reporting.wording import count_text, is_undefined, percent_text
from jaxinv.settings.naming import network_text, spoken


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


def held_fixed(study: StudySummary) -> str:
    """Says what does not vary, as no cell's name does: "LeNetZhu, untrained; 1 image in each
    update; cosine + TV, 500 steps, 2 seeds. "
    """
    cells = study.cells
    first, attack = cells[0], cells[0].asked["attack"]

    def is_fixed(*names: str) -> bool:
        return all(cell.asked[name] == first.asked[name] for cell in cells for name in names)

    network, client, attacker = [], [], []
    if is_fixed("model", "width"):
        network.append(network_text(first.asked["model"], first.asked["width"]))
        if is_fixed("victim"):
            network.append(_training(first))
    if is_fixed("images"):
        client.append(f"{count_text(first.asked['images'], 'image')} in each update")
    if is_fixed("defense") and first.asked["defense"] != defenses.NONE:
        client.append(f"defense {first.asked['defense']}")
    if is_fixed("attack"):
        attacker.append(spoken("attack", attack))
        if is_fixed("iterations") and "iterations" not in unused_settings(attack):
            attacker.append(count_text(first.asked["iterations"], "step"))
    if len({len(cell.seeds) for cell in cells}) == 1:
        attacker.append(count_text(len(first.seeds), "seed"))
    parts = [", ".join(words) for words in (network, client, attacker) if words]
    return f"{'; '.join(parts)}. " if parts else ""


def _training(cell: CellSummary) -> str:
    """How far a cell's network is trained: by its accuracy, as a checkpoint may be of the start."""
    if cell.facts["victim"] is None:
        return "untrained"
    accuracy = cell.facts["victim_accuracy"]
    return "trained" if is_undefined(accuracy) else f"test accuracy {percent_text(accuracy)}"


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
