"""Section: whether the images or the seeds decide the result."""

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
from jaxinv.reporting.figures.interval_rows import IntervalRow, interval_rows
from jaxinv.reporting.figures.panels import left_out, shown_cells
from jaxinv.reporting.section import MOST_ROWS, Section
from jaxinv.reporting.statistics import Interval
from jaxinv.reporting.study import CellSummary, StudySummary
from jaxinv.reporting.wording import percent_text


@ps.styled
def variance_components(study: StudySummary, width: float = ps.WIDE) -> Figure:
    """Draws the standard deviations between targets and between seeds, with intervals."""
    parts = [
        ("between", "between targets", "o", "#0072b2"),
        ("noise", "between draws of noise", "D", "#009e73"),
        ("within", "between seeds", "s", "#d55e00"),
    ]
    if not study.has_draws:
        del parts[1]
    cells = shown_cells(study, MOST_ROWS)
    rows = [
        IntervalRow(
            cell.heading,
            [(getattr(cell.components, part), mark, color) for part, _, mark, color in parts],
            percent_text(cell.components.icc.value, 0),
        )
        for cell in cells
    ]
    return interval_rows(
        width,
        "Do images or seeds decide the result?",
        "Standard deviation of PSNR with bootstrap 95% intervals, which are too short "
        "with few targets. At the right: the targets' share of the variance (ICC)."
        + left_out(study, cells),
        rows,
        keys=[ps.Key("dot", color, name) for _, name, _, color in parts],
        xlabel="standard deviation of PSNR (dB)",
        unknown="not determined: needs 2 seeds, no failed or exact trial",
        words_name="ICC",
    )


def _between_baselines(cell: CellSummary) -> Interval:
    """The mean-color image differs between targets alone."""
    psnr = cell.baselines["baseline_psnr"]
    return Interval(float(psnr.std(ddof=1)) if psnr.size > 1 else np.nan, np.nan, np.nan)


def _columns() -> tuple[Column, ...]:
    return (
        *name_columns("standard deviation in dB"),
        *size_columns(),
        *with_interval(
            "between_std",
            lambda cell: cell.components.between,
            "between\ntargets",
            baseline=_between_baselines,
            definition=Definition(
                "Between targets, draws and seeds",
                "Balanced nested random effects; a negative estimate is set to 0. Intervals: "
                "percentiles of a bootstrap in stages (targets, then draws, then seeds within "
                "each), 2000 resamples. With few targets those between targets are too short: in "
                "simulation the nominal 95% cover about 67% with 4 targets, 81% with 10, 91% with "
                "30.",
            ),
        ),
        *with_interval(
            "noise_std",
            lambda cell: cell.components.noise,
            "between draws\nof noise",
            when=lambda study: study.has_draws,
        ),
        *with_interval(
            "within_std",
            lambda cell: cell.components.within,
            "between\nseeds",
            baseline=lambda cell: Interval(0.0, np.nan, np.nan),
        ),
        *with_interval("icc", lambda cell: cell.components.icc, "targets’ share\n(ICC)"),
    )


SECTION = Section(
    name="variance_components",
    title="Where the variance comes from",
    when=lambda study: study.has_spread,
    draw=variance_components,
    alt="Standard deviations between targets and between seeds per cell.",
    caption="Balanced one-way random effects on PSNR in dB. Intervals that reach 0 cannot exclude "
    "that all targets are equally hard.",
    table=Table(
        lambda study: study.cells, _columns(), baselines=lambda study: study.distinct_baselines
    ),
)
