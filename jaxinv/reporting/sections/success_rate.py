"""Section: how many trials exceed the threshold of a success."""

from matplotlib.figure import Figure

from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.figures.interval_rows import BLUE, IntervalRow, interval_rows
from jaxinv.reporting.figures.panels import left_out, shown_cells
from jaxinv.reporting.section import MOST_ROWS, Section, facts
from jaxinv.reporting.statistics import Interval
from jaxinv.reporting.study import StudySummary


@ps.styled
def success_rate(study: StudySummary, width: float = ps.WIDE) -> Figure:
    """Draws the share of trials above the threshold, with Wilson intervals."""
    threshold = facts(study)["threshold"]
    rows, cells = [], shown_cells(study, MOST_ROWS)
    for cell in cells:
        s = cell.success
        share = Interval(100 * s.rate, 100 * s.low, 100 * s.high)
        words = f"{s.successes} of {s.trials}"
        rows.append(IntervalRow(cell.heading, [(share, "o", BLUE)], words))
    return interval_rows(
        width,
        f"How many trials exceed {threshold} dB?",
        "Failed trials count as misses. 95% Wilson intervals at the effective number of trials: "
        "seeds of one target are not independent." + left_out(study, cells),
        rows,
        xlabel=f"trials with PSNR above {threshold} dB (%)",
        words_name="trials",
        limits=(0, 100),
    )


SECTION = Section(
    name="success_rate",
    title="Success",
    draw=success_rate,
    alt="Share of trials above the threshold per cell, with intervals.",
    caption="The threshold of {threshold} dB is a convention: Dimitrov et al. 2022 call a "
    "CIFAR-100 image recovered above 19 dB.",
)
