"""Section: PSNR as the attack runs."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.figures.panels import (
    columns_in,
    finite,
    left_out,
    limits_around,
    psnr_panel,
    shown_cells,
)
from jaxinv.reporting.section import Section, facts
from jaxinv.reporting.statistics import ranked_quantile
from jaxinv.reporting.study import CellSummary, StudySummary, traces


@ps.styled
def psnr_by_step(study: StudySummary, width: float = ps.WIDE) -> Figure:
    """Draws PSNR over iterations: median, central 50% and 95% of the seeds, a panel per target."""
    cells, targets = shown_cells(study), study.target_ids[: ps.MOST_TARGETS]
    colors = ps.cell_colors(len(cells))
    data = [traces(study, cell, _in_cell(cell, targets)) for cell in cells]
    bands = [{t: _bands(curves) for t, curves in by_target.items()} for _, by_target in data]
    drawn = [band[np.isfinite(band)] for by_target in bands for band in by_target.values()]
    limits = limits_around(np.concatenate([*drawn, [study.baseline_of(t) for t in targets]]))
    seeds = max(len(cell.seeds) for cell in cells)
    sheet = ps.Sheet(
        width,
        ps.Heading(
            "PSNR as the attack runs",
            (
                f"Median of {seeds} seeds with the bands that hold 50% and 95% of them."
                if seeds > 1
                else "One seed."
            )
            + left_out(study, cells, targets),
            keys=[ps.Key("line", c, cell.heading) for c, cell in zip(colors, cells)]
            + [ps.Key("dash", ps.BASELINE, "mean color")],
        ),
        panels=len(targets),
        columns=columns_in(width, len(targets)),
        panel_height=1.75,
    )
    for index, (ax, target) in enumerate(zip(sheet.axes, targets)):
        for color, (steps, _), by_target in zip(colors, data, bands):
            if target in by_target:
                _draw_bands(ax, steps, by_target[target], color)
        psnr_panel(sheet, index, ax, limits, study.baseline_of(target))
        ax.set_title(f"target {target}")
        # A label at the right edge would run into the next panel's 0.
        ticks = MaxNLocator(4, steps=[1, 2, 5, 10], integer=True, prune="upper")
        ax.xaxis.set_major_locator(ticks)
        ax.margins(x=0)
        if sheet.is_last_row(index):
            ax.set_xlabel("iterations")
    return sheet.figure


def _bands(curves: Float[np.ndarray, "seed step"]) -> Float[np.ndarray, "quantile step"]:
    """Edges of the 95% and the 50% band and the median; NaN where they rest on failed or exact."""
    quantiles = (0.025, 0.975, 0.25, 0.75, 0.5)
    return finite(np.stack([ranked_quantile(curves.T, q) for q in quantiles]))


def _draw_bands(
    ax: Axes, steps: np.ndarray, bands: Float[np.ndarray, "quantile step"], color: object
) -> None:
    """Draws the bands and the median of one target in one cell."""
    *edges, median = bands
    for low, high, alpha in ((*edges[:2], 0.15), (*edges[2:], 0.28)):
        ax.fill_between(steps, low, high, color=color, alpha=alpha, linewidth=0)
    single = {"marker": "o", "markersize": 3} if len(steps) == 1 else {}
    ax.plot(steps, median, color=color, linewidth=1.8, **single)


def _in_cell(cell: CellSummary, targets: Sequence[int]) -> list[int]:
    return [t for t in targets if t in cell.target_ids]


def _caption(study: StudySummary) -> str:
    if not study.has_spread:
        return "Of one seed a target."
    return (
        f"Quantiles are over the {facts(study)['seeds']} of one target at each step, failed seeds "
        "ranked worst. A band shows how much depends on the seed alone."
    )


SECTION = Section(
    name="psnr_by_step",
    title="Every seed",
    when=lambda study: bool((study.run.traces["step"] > 0).any()),  # a closed form has none
    draw=psnr_by_step,
    alt="PSNR by iteration for each target.",
    caption=_caption,
)
