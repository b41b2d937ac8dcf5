"""Section: the PSNR of every target, where each was attacked once."""

import numpy as np
from matplotlib.figure import Figure

from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.figures.interval_rows import IntervalRow, interval_rows
from jaxinv.reporting.figures.panels import left_out, limits_around, shown_cells
from jaxinv.reporting.section import MOST_ROWS, Section
from jaxinv.reporting.statistics import Interval
from jaxinv.reporting.study import CellSummary, StudySummary
from jaxinv.reporting.wording import count_text, interval_text, number_text


@ps.styled
def psnr_by_target(study: StudySummary, width: float = ps.WIDE) -> Figure:
    """Draws a row per cell: every target's PSNR, their mean and its interval over targets."""
    cells = shown_cells(study, MOST_ROWS)
    values = np.concatenate([cell.psnr[:, 0] for cell in cells])
    baseline = study.cells[0].baseline("psnr")
    figure = interval_rows(
        width,
        "PSNR of every target",
        "One dot a target, each attacked from one seed; the diamond is their mean, with its 95% "
        "interval over targets." + left_out(study, cells),
        [_row(cell) for cell in cells],
        xlabel="PSNR (dB)",
        words_name="mean [95%]",
        keys=[ps.Key("dash", ps.BASELINE, "mean color, on average")],
        limits=limits_around(np.append(values[np.isfinite(values)], baseline)),
    )
    figure.axes[0].axvline(baseline, **ps.line_style("dash", ps.BASELINE), zorder=0.5)
    return figure


def _row(cell: CellSummary) -> IntervalRow:
    """A cell's row; what is exact or failed has no place on the axis and stands in the words."""
    mean, values = Interval(*cell.mean[:3]), cell.psnr[:, 0]
    words = [_mean_text(cell)]
    for count, what in ((cell.exact.sum(), "exact"), (cell.failed.sum(), "failed")):
        words += [f"{count} {what}"] if count else []
    return IntervalRow(
        cell.heading, [(mean, "D", ps.INK)], ", ".join(words), values[np.isfinite(values)]
    )


def _mean_text(cell: CellSummary) -> str:
    mean, low, high = cell.mean[:3]
    return f"{number_text(mean, 1)} {interval_text(low, high, 1)}".strip()


def _alt(study: StudySummary) -> str:
    means = "; ".join(
        f"{cell.heading}: {_mean_text(cell)} dB of {count_text(len(cell.target_ids), 'target')}"
        for cell in shown_cells(study, MOST_ROWS)
    )
    return f"PSNR of every target by cell. {means}."


SECTION = Section(
    name="psnr_by_target",
    title="Every target",
    when=lambda study: not study.has_spread,
    draw=psnr_by_target,
    alt=_alt,
    caption="Each dot is one trial of one target. How far the dots of a row lie apart is what the "
    "image decides; with one seed it cannot be told from what the start does.",
)
