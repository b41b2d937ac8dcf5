"""Section: what reconstructions give away by measures beside PSNR, and how these rank the cells."""

from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from jaxinv.reporting.columns import (
    Column,
    Definition,
    Row,
    Shown,
    Table,
    name_columns,
    size_columns,
)
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.figures.panels import left_out, shown_cells
from jaxinv.reporting.section import Section
from jaxinv.reporting.study import CellSummary, StudySummary
from jaxinv.reporting.wording import number_text, percent_text


class Measure(NamedTuple):
    """A column of the table, an axis of the figure."""

    name: str  # of the metric
    head: str
    digits: int | None  # after the point; None for shares, in percent
    falls: bool = False  # whether less gives more away
    text: str = ""  # what it is

    def show(self, value: float) -> str:
        """Prints a value."""
        return percent_text(value, 0) if self.digits is None else number_text(value, self.digits)

    def ranks(self, cells: list[CellSummary]) -> np.ndarray:
        """Ranks of cells by their means, 1 the one that gives most away; equal ones share one."""
        values = np.array([cell.mean_of(self.name) for cell in cells])
        return stats.rankdata(values if self.falls else -values, nan_policy="omit")


_AMONG = "Among the data set’s first 1,000 images (fewer, where it has fewer) and the target’s own."
MEASURES = (
    Measure("psnr", "PSNR", 2),
    Measure("ssim", "SSIM", 3),
    Measure(
        "named_by_pixels",
        "named by\npixels",
        None,
        text=f"The share of reconstructions whose nearest candidate is their own image. {_AMONG}",
    ),
    Measure(
        "named_by_judge",
        "named by\njudge",
        None,
        text="The same by the features of a judge, a trained network that had no part in the "
        "update, named by --judge (image identification precision).",
    ),
    Measure(
        "same_class",
        "same\nclass",
        None,
        text="The share of reconstructions in which the judge sees the class it sees in the image.",
    ),
    Measure(
        "rdlv",
        "RDLV",
        2,
        text="Relative data leakage value: the SSIM gained over the mean color’s, relative to it.",
    ),
    Measure(
        "avd",
        "AVD",
        3,
        falls=True,
        text="Absolute variation distance: how far the differences between neighboring pixels are "
        "from the truth’s; 0 for the image itself.",
    ),
    Measure(
        "lpips",
        "LPIPS",
        3,
        falls=True,
        text="Distance of a pretrained AlexNet’s features, with --lpips true; 0 for the image.",
    ),
)


class Ranked(NamedTuple):
    """A row of the table."""

    cell: CellSummary
    ranks: dict[str, float]  # by the measure's name


def measured(study: StudySummary) -> list[Measure]:
    """The measures that the study has."""
    return [m for m in MEASURES if any(np.isfinite(c.mean_of(m.name)) for c in study.cells)]


def ranked(study: StudySummary) -> list[Ranked]:
    """The cells, each with its ranks."""
    ranks = {m.name: m.ranks(study.cells) for m in MEASURES}
    return [
        Ranked(c, {n: float(r[i]) for n, r in ranks.items()}) for i, c in enumerate(study.cells)
    ]


@ps.styled
def likeness(study: StudySummary, width: float = ps.WIDE) -> Figure:
    """Draws the rank of every cell by every measure, a line for each cell."""
    cells, measures = shown_cells(study), measured(study)
    colors = ps.cell_colors(len(cells))
    sheet = ps.Sheet(
        width,
        ps.Heading(
            "Do the measures agree on which cell gives most away?",
            "Cells in the order of the mean over their trials; equal ones share a place."
            + left_out(study, cells),
            keys=[ps.Key("line", c, cell.heading) for c, cell in zip(colors, cells)],
        ),
        panel_height=0.5 + 0.3 * len(cells),
        margins=ps.Margins(left=1.3),
    )
    (ax,) = sheet.axes
    at = np.arange(len(measures))
    ranks = np.stack([m.ranks(cells) for m in measures], axis=1)
    shift = np.linspace(-0.07, 0.07, len(cells))  # of equal ranks none hides another
    for color, own, aside in zip(colors, ranks, shift):
        ax.plot(at, own + aside, color=color, linewidth=2, marker="o", markersize=6, clip_on=False)
    ax.set_ylim(len(cells) + 0.4, 0.6)
    ax.set_yticks(
        [1, len(cells)] if len(cells) > 1 else [1],
        ["gives most away", "gives least"][: min(2, len(cells))],
    )
    ax.set_xticks(at, [m.head for m in measures])
    ax.set_xlim(-0.2, len(measures) - 0.8)
    return sheet.figure


def _column(measure: Measure) -> Column:
    """A measure, with the cell's rank by it beside."""
    name, heading = measure.name, measure.head.replace("\n", " ")

    def show(row: Row) -> Shown:
        rank = row[f"{name}_rank"]
        return Shown(measure.show(row[name]), "" if np.isnan(rank) else f"{rank:g}.")

    return Column(
        name,
        lambda item: item.cell.mean_of(name),
        measure.head,
        show,
        when=lambda study: measure in measured(study),
        definition=Definition(heading, measure.text) if measure.text else None,
    )


def _rank_column(measure: Measure) -> Column:
    name = measure.name
    return Column(f"{name}_rank", lambda item: item.ranks[name])


SECTION = Section(
    name="likeness",
    title="Beyond PSNR",
    when=lambda study: len(study.cells) > 1,
    draw=likeness,
    alt="The order of the cells by each measure, a line for each cell.",
    caption="PSNR likes smooth failures: an image that nobody recognizes may have more of it than "
    "one that everybody does. Where lines cross, measures disagree on what leaks more.",
    table=Table(
        ranked,
        (
            *name_columns("mean over trials", lambda item: item.cell),
            *size_columns(lambda item: item.cell),
            *(_column(m) for m in MEASURES),
            *(_rank_column(m) for m in MEASURES),
        ),
    ),
    note="Beside each number the cell’s place among all, 1. giving most away. A judge is named by "
    "--judge NAME.",
)
