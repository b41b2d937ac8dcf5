"""Section: every setting against the first one, on the same targets from the same seeds."""

import numpy as np
from matplotlib.figure import Figure

from jaxinv.reporting.columns import (
    Column,
    Definition,
    Table,
    name_columns,
    size_columns,
    with_interval,
)
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.figures.interval_rows import BLUE, IntervalRow, interval_rows
from jaxinv.reporting.figures.panels import left_out
from jaxinv.reporting.section import MOST_ROWS, Section
from jaxinv.reporting.study import StudySummary, choose_evenly
from jaxinv.reporting.wording import number_text


@ps.styled
def paired_differences(study: StudySummary, width: float = ps.WIDE) -> Figure:
    """Draws each cell's PSNR minus the first cell's, with t intervals over targets."""
    pairs = choose_evenly(study.pairs, MOST_ROWS)
    rows = [
        IntervalRow(p.cell.heading, [(p.difference, "o", BLUE)], number_text(p.difference.value))
        for p in pairs
    ]
    ends = [v for p in pairs for v in p.difference if np.isfinite(v)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    room = 0.06 * max(high - low, 1e-3)
    figure = interval_rows(
        width,
        f"Against {pairs[0].reference.heading}",
        "Difference of PSNR on the same targets from the same seeds, 95% t intervals over targets. "
        "An interval that excludes 0 tells the two settings apart."
        + left_out(study, [pairs[0].reference, *(pair.cell for pair in pairs)]),
        rows,
        xlabel="difference of PSNR (dB)",
        unknown="not determined: needs 2 targets, no failed or exact trial",
        words_name="dB",
        limits=(low - room, high + room),
    )
    figure.axes[0].axvline(0, color=ps.INK, linewidth=1, zorder=0.5)
    return figure


def _columns() -> tuple[Column, ...]:
    def cell(pair):
        return pair.cell

    return (
        *name_columns("difference of PSNR in dB", cell),
        Column("reference_cell", lambda pair: pair.reference.number),
        Column("reference", lambda pair: pair.reference.label, "against"),
        *size_columns(
            cell, failed=lambda pair: int(pair.cell.failed.sum() + pair.reference.failed.sum())
        ),
        *with_interval(
            "psnr_difference",
            lambda pair: pair.difference,
            "mean\n[95%]",
            ends="difference",
            definition=Definition(
                "Paired difference",
                "A cell’s PSNR minus the first cell’s on the same targets and seeds; mean over "
                "targets with a 95% Student t interval. Intervals are not corrected for the "
                "number of comparisons.",
            ),
        ),
    )


SECTION = Section(
    name="paired_differences",
    title="Setting against setting",
    when=lambda study: bool(study.pairs),
    draw=paired_differences,
    alt="Each setting's PSNR minus the first one's, with intervals.",
    caption="Each setting minus the first one. What makes a target hard in both cancels, so that "
    "these intervals are narrower than those of the means.",
    table=Table(lambda study: study.pairs, _columns()),
)
