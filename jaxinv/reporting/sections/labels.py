"""Section: which labels an attacker who does not know them reads off the updates."""

from matplotlib.figure import Figure

from jaxinv.reporting.columns import (
    Column,
    Table,
    baseline_column,
    decimals_or_failed,
    name_columns,
    percent,
    size_columns,
    with_interval,
)
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.figures.interval_rows import BLUE, IntervalRow, interval_rows
from jaxinv.reporting.section import MOST_ROWS, Section
from jaxinv.reporting.statistics import Interval
from jaxinv.reporting.study import StudySummary, choose_evenly
from jaxinv.reporting.wording import percent_text


@ps.styled
def labels(study: StudySummary, width: float = ps.WIDE) -> Figure:
    """Draws the share of labels that an attacker who does not know them has right."""
    rows, cells = [], choose_evenly(study.without_labels, MOST_ROWS)
    all_of_them = len(study.without_labels)
    for cell in cells:
        share = Interval(*(100 * end for end in cell.labels_right))
        words = percent_text(cell.labels_right.value)
        rows.append(IntervalRow(cell.heading, [(share, "o", BLUE)], words))
    return interval_rows(
        width,
        "Which labels does the update give away?",
        "Share of labels found, repeats counted, with t intervals over targets."
        + (f" Shown: {len(cells)} of {all_of_them} cells." if len(cells) < all_of_them else ""),
        rows,
        xlabel="labels that are right (%)",
        unknown="not determined: a trial failed",
        words_name="mean",
        limits=(0, 102),
    )


SECTION = Section(
    name="labels",
    title="Which labels the update gives away",
    when=lambda study: bool(study.without_labels),
    draw=labels,
    alt="Share of labels that the attacker has right per cell, with intervals.",
    caption="Labels read off an update are the same for all of its seeds; those found beside the "
    "images are each seed’s own. Guessing blindly counts about as many right as two random batches "
    "have in common.",
    table=Table(
        lambda study: study.without_labels,
        (
            *name_columns("labels by"),
            Column("rule", lambda cell: cell.asked["labels"], "rule"),
            Column("images", lambda cell: cell.asked["images"], "images"),
            *size_columns(),
            *with_interval(
                "accuracy", lambda cell: cell.labels_right, "right\n[95%]", shares=True, digits=1
            ),
            Column(
                "all_right",
                lambda cell: float((cell.metrics["label_accuracy"] == 1).mean()),
                "updates with\nall right",
                percent("all_right"),
            ),
            Column(
                "psnr_mean",
                lambda cell: cell.mean.mean,
                "PSNR in dB",
                decimals_or_failed("psnr_mean"),
            ),
            baseline_column(),
        ),
    ),
)
