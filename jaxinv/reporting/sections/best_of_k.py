"""Section: what more seeds buy, and who chooses among them."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxinv.reporting.columns import (
    Column,
    Table,
    baseline_column,
    name_columns,
    size_columns,
    with_interval,
)
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.figures.panels import (
    averages,
    columns_in,
    finite,
    left_out,
    limits_around,
    psnr_panel,
    shown_cells,
)
from jaxinv.reporting.section import Section, facts
from jaxinv.reporting.statistics import BestOfK, Interval
from jaxinv.reporting.study import CellSummary, StudySummary
from jaxinv.reporting.wording import count_text


@ps.styled
def best_of_k(study: StudySummary, width: float = ps.WIDE) -> Figure:
    """Draws the expected PSNR of what k seeds give: attacker's pick, consensus, oracle's pick."""
    cells = shown_cells(study)
    colors = ps.cell_colors(len(cells))
    averaged = averages(cells)
    finite = [
        curve[np.isfinite(curve)]
        for cell in cells
        for best in (cell.pick, cell.oracle, *([cell.consensus.quarter] if averaged else []))
        for curve in (best.mean, best.low, best.high)
    ]
    limits = limits_around(np.concatenate([*finite, [cell.baseline("psnr") for cell in cells]]))
    several = any(len(cell.target_ids) > 1 for cell in cells)
    sheet = ps.Sheet(
        width,
        ps.Heading(
            "What more seeds buy",
            "Expected PSNR of the best of k seeds, mean over targets. The attacker chooses by "
            "lowest objective, the oracle by the truth."
            + (" Consensus: the mean image of the quarter with the lowest." if averaged else "")
            + (" Shaded: 95% t interval over targets." if several else " One target: no interval.")
            + left_out(study, cells),
            keys=[
                ps.Key("line", colors[0], "attacker"),
                *([ps.Key("marked", colors[0], "consensus")] if averaged else []),
                ps.Key("dash", ps.INK, "oracle"),
                ps.Key("dash", ps.BASELINE, "mean color"),
            ],
        ),
        panels=len(cells),
        columns=columns_in(width, len(cells), wide=3),
        panel_height=1.9,
        margins=ps.Margins(above=0.44),
    )
    for index, (ax, cell, color) in enumerate(zip(sheet.axes, cells, colors)):
        line = {"color": color, "linewidth": 2.2}
        _draw_choice(ax, cell.pick, line, alpha=0.18)
        # Dashed and above, for it may lie on the attacker's.
        _draw_choice(ax, cell.oracle, ps.line_style("dash", ps.INK), alpha=0.08)
        if averages([cell]):
            _draw_consensus(ax, cell.consensus.quarter, color)
        psnr_panel(sheet, index, ax, limits, cell.baseline("psnr"))
        _title_with_gains(ax, cell, color, sheet.panel_width)
        ticks = [2**i for i in range(12) if 2**i <= len(cell.seeds)]
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [str(k) for k in ticks])
        ax.set_xlim(0.9, max(1.12, len(cell.seeds) * 1.12))
        if sheet.is_last_row(index):
            ax.set_xlabel("k, seeds to choose from")
    return sheet.figure


def _draw_choice(ax: Axes, best: BestOfK, line: dict[str, Any], alpha: float) -> None:
    """Draws one way of choosing; its curve starts where k seeds cannot all have failed."""
    k = np.arange(1, best.mean.size + 1)
    band = finite(best.low), finite(best.high)
    ax.fill_between(k, *band, color=line["color"], alpha=alpha, linewidth=0)
    marker = {"marker": "o", "markersize": 4} if k.size == 1 else {}
    ax.plot(k, finite(best.mean), **line, **marker)


def _draw_consensus(ax: Axes, best: BestOfK, color: object) -> None:
    """Draws the consensus from where it parts with the pick, marked at each doubling and the end.

    Without its interval, which would cover the others'; the table has it.
    """
    mean = finite(best.mean)
    k = np.arange(4, mean.size + 1)
    ax.plot(k, mean[3:], color=color, linewidth=1.3, zorder=3)
    at = np.array(sorted({2**i for i in range(3, 12) if 2**i <= mean.size} | {mean.size}))
    ax.plot(at, mean[at - 1], **ps.MARKS["triangle"], color=color, zorder=4, clip_on=False)


def _title_with_gains(ax: Axes, cell: CellSummary, color: object, width: float) -> None:
    """Names a panel, and under its name what choosing among all seeds adds to the mean seed."""
    size = min(9.4, 9.4 * width / ps.text_width(cell.heading, 9.4, "bold"))
    ax.set_title(cell.heading, color=color, weight="bold", pad=18, size=size)
    with np.errstate(invalid="ignore"):
        gains = {"pick": cell.pick.mean[-1] - cell.mean.mean}
        if averages([cell]):
            gains["consensus"] = cell.consensus.quarter.mean[-1] - cell.mean.mean
        gains["oracle"] = cell.oracle.mean[-1] - cell.mean.mean
    if len(cell.seeds) > 1 and np.isfinite(list(gains.values())).all():
        parts = [f"{name} {gain:+.1f}" for name, gain in gains.items()]
        words = ", ".join(parts) + " dB"
        if ps.text_width(words, 7.4) > width:  # the oracle, whom nobody can be, is left to its line
            words = ", ".join(parts[:-1]) + " dB"
    elif cell.failed.any():
        words = f"{cell.failed.sum()} of {cell.failed.size} trials failed"
    else:
        words = (
            f"{count_text(cell.exact.sum(), 'exact trial')}: mean ∞"
            if cell.exact.any()
            else "one seed"
        )
    place = {"xy": (0, 1), "xycoords": "axes fraction", "xytext": (0, 6)}
    size = min(8.0, 8.0 * width / ps.text_width(words, 8.0))
    ax.annotate(
        words.replace("-", "−"), **place, textcoords="offset points", size=size, color=ps.MUTED
    )


def _caption(study: StudySummary) -> str:
    words = (
        f"Exact expectation over all choices of k of the {facts(study)['seeds']}. A curve starts "
        "where k exceeds the number of failed seeds; before that, all k might fail."
    )
    if averages(study.cells):
        words += (
            " The consensus of up to four seeds is the attacker’s pick, and grows by a seed with "
            "every four; where there are many choices of k, a random sample of them stands for all."
        )
    return words


def _columns() -> tuple[Column, ...]:
    """One row per cell and k: choosing and averaging, means over targets."""
    makers = {
        "attacker": lambda cell: cell.pick,
        "consensus_quarter": lambda cell: cell.consensus.quarter,
        "consensus_all": lambda cell: cell.consensus.all,
        "oracle": lambda cell: cell.oracle,
    }

    def interval(of):
        return lambda item: Interval(*(float(curve[item[1] - 1]) for curve in of(item[0])[1:]))

    def cell(item):
        return item[0]

    choices = (
        with_interval(f"{name}_psnr", interval(of), ends=name) for name, of in makers.items()
    )
    return (
        *name_columns("", cell),
        *size_columns(cell),
        Column("k", lambda item: item[1]),
        *(column for columns in choices for column in columns),
        baseline_column(cell),
    )


SECTION = Section(
    name="best_of_k",
    title="More seeds, and who chooses",
    when=lambda study: study.has_spread,
    draw=best_of_k,
    alt="Expected PSNR of the best of k seeds, attacker's and oracle's choice, and of the mean "
    "image of the best quarter.",
    caption=_caption,
    table=Table(
        lambda study: [(cell, k + 1) for cell in study.cells for k in range(len(cell.seeds))],
        _columns(),
        in_files_only=True,
    ),
)
