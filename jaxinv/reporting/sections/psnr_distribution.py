"""Section: the final PSNR of every seed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.figures.panels import (
    averages,
    columns_in,
    held_fixed,
    left_out,
    limits_around,
    psnr_panel,
    shown_cells,
)
from jaxinv.reporting.figures.pictures import Album, as_rgb, read_album, tile
from jaxinv.reporting.figures.swarm import swarms
from jaxinv.reporting.section import Section, facts
from jaxinv.reporting.statistics import ranked_quantile
from jaxinv.reporting.study import CellSummary, StudySummary, targets_of
from jaxinv.reporting.wording import number_text
from jaxinv.settings.naming import spoken

THUMBNAIL = 0.46  # inches of a target's truth


class Dots(NamedTuple):
    """Where the seeds of one target in one cell are drawn."""

    x: Float[np.ndarray, " seed"]
    y: Float[np.ndarray, " seed"]
    diameter: float  # inches, one for the whole figure


@ps.styled
def psnr_distribution(study: StudySummary, width: float = ps.WIDE) -> Figure:
    """Draws the final PSNR of every seed, by target and cell, with the picks and the consensus."""
    cells = shown_cells(study)
    targets = targets_of(cells)[: ps.MOST_TARGETS]
    colors = ps.cell_colors(len(cells))
    averaged = averages(cells)
    values = [cell.psnr for cell in cells]
    values += [cell.consensus.first_draw for cell in cells] if averaged else []
    finite = [v[np.isfinite(v)] for v in values]
    limits = limits_around(np.concatenate([*finite, [study.baseline_of(t) for t in targets]]))
    bad = any(cell.failed.any() for cell in cells)
    keys = [
        ps.Key("dot", ps.FAINT, "one seed"),
        ps.Key("bar", ps.INK, "median"),
        ps.Key("diamond", ps.INK, "attacker's pick: lowest objective"),
        ps.Key("ring", ps.INK, "oracle's pick: highest PSNR"),
        *([ps.Key("triangle", ps.INK, "consensus: mean of the best quarter")] if averaged else []),
        ps.Key("dash", ps.BASELINE, "mean color"),
    ] + ([ps.Key("cross", ps.INK, "failed")] if bad else [])
    # One row of names under the axis, unless the cells are not named by the same settings; names
    # that are too long stand in the legend, once for all panels.
    alike = len({tuple(cell.settings) for cell in cells}) == 1 and bool(cells[0].settings)
    ticks = [_tick(cell) if alike else cell.heading for cell in cells]
    columns = columns_in(width, len(targets))
    slot = (width - 0.8) / columns / len(cells)
    upright = max(ps.text_width(tick, 8.4) for tick in ticks) < slot * 0.85
    if not upright:
        keys = [*(ps.Key("dot", c, tick) for c, tick in zip(colors, ticks)), *keys]
    sheet = ps.Sheet(
        width,
        ps.Heading(
            "Final PSNR of every seed",
            held_fixed(study)
            + (
                "Where the diamond sits below the ring, the objective did not find the best seed."
                if max(len(cell.seeds) for cell in cells) > 1
                else "One seed: nothing to choose from."
            )
            + left_out(study, cells, targets),
            keys=keys,
        ),
        panels=len(targets),
        columns=columns,
        panel_height=2.1,
        margins=ps.Margins(bottom=0.48 if upright else 0.16, above=THUMBNAIL + 0.14),
    )
    album = read_album(study)
    for index, (ax, target) in enumerate(zip(sheet.axes, targets)):
        psnr_panel(sheet, index, ax, limits, study.baseline_of(target))
        _head(sheet, ax, target, _truth(cells, album, target))
        ax.set_xlim(-0.5, len(cells) - 0.5)
        ax.grid(axis="x", visible=False)
        ax.set_xticks(range(len(cells)), ticks if upright else [""] * len(cells))
        if alike and upright:
            ax.set_xlabel(", ".join(study.cells[0].settings))
    inch_x, inch_y = sheet.panel_width / len(cells), sheet.panel_height / (limits[1] - limits[0])
    places = [
        (ax, at, cell.target_ids.index(target))
        for ax, target in zip(sheet.axes, targets)
        for at, cell in enumerate(cells)
        if target in cell.target_ids
    ]
    heights = [_heights(cells[at].psnr[target], limits, inch_y) for _, at, target in places]
    diameter, offsets = swarms([own * inch_y for own in heights], room=0.84 * inch_x)
    for (ax, at, target), y, beside in zip(places, heights, offsets):
        dots = Dots(at + beside / inch_x, y, diameter)
        _draw_seeds(ax, at, cells[at], target, colors[at], dots)
    return sheet.figure


def _truth(cells: Sequence[CellSummary], album: Album, target: int) -> np.ndarray | None:
    """A target's images in a square; None where cells attack others under the same number."""
    own = [cell for cell in cells if target in cell.target_ids]
    alike = len({cell.behind(target) for cell in own}) == 1
    return tile(album[own[0].number, target].truth) if alike else None


def _head(sheet: ps.Sheet, ax: Axes, target: int, pixels: np.ndarray | None) -> None:
    """Sets a target's number and its truth, where there is one, over a panel."""
    box = ax.get_position()
    x, top = box.x0 * sheet.width, (1 - box.y1) * sheet.height - THUMBNAIL - 0.06
    if pixels is not None:
        picture = sheet.panel(x, top, THUMBNAIL, THUMBNAIL)
        picture.imshow(as_rgb(pixels), interpolation="none")
        picture.set_axis_off()
        x += THUMBNAIL + 0.08
    sheet.text(x, top + THUMBNAIL / 2, f"target {target}", va="center")


def _heights(
    values: Float[np.ndarray, " seed"], limits: tuple[float, float], inch_y: float
) -> Float[np.ndarray, " seed"]:
    """Where the seeds' PSNR is drawn: exact ones at the head, failed ones at the foot."""
    low, high = limits
    drawn = np.where(np.isposinf(values), high - 0.05 / inch_y, values)
    return np.where(np.isnan(values), low + 0.06 / inch_y, drawn)


def _draw_seeds(
    ax: Axes, at: int, cell: CellSummary, target: int, color: object, dots: Dots
) -> None:
    """Draws one target's seeds of one cell as a swarm with its marks."""
    values, high = cell.psnr[target], ax.get_ylim()[1]
    x, drawn, diameter = dots
    ok = ~np.isnan(values)
    ax.scatter(
        x[ok], drawn[ok], s=(diameter * 72 * 0.92) ** 2, color=color, alpha=0.55, linewidths=0
    )
    if (~ok).any():
        ax.plot(x[~ok], drawn[~ok], color=color, **ps.MARKS["cross"], markeredgecolor=color)
    if np.isposinf(values).any():
        ax.annotate("exact, ∞", (at, high), (0, 3), textcoords="offset points", ha="center", size=7)
    median = ranked_quantile(values, 0.5)
    if np.isfinite(median):
        ax.hlines(median, at - 0.32, at + 0.32, color=ps.INK, linewidth=1.6, zorder=3)
    for pick, mark in ((cell.oracle_seed[target], "ring"), (cell.pick_seed[target], "diamond")):
        if pick >= 0:
            ax.plot(x[pick], drawn[pick], **ps.line_style(mark, ps.INK), zorder=4, clip_on=False)
    if averages([cell]) and not np.isnan(mean := cell.consensus.first_draw[target]):
        height = high if np.isinf(mean) else mean
        beside = at + 0.4  # the swarm, which has no room for one more mark
        ax.plot(beside, height, **ps.MARKS["triangle"], color=ps.INK, zorder=5, clip_on=False)


def _tick(cell: CellSummary) -> str:
    return ", ".join(spoken(name, value) for name, value in cell.settings.items())


def _alt(study: StudySummary) -> str:
    spread = "; ".join(
        f"{cell.heading}: mean {number_text(cell.mean.mean)} dB, standard deviation over seeds "
        f"{number_text(cell.mean.seed_std)} dB"
        for cell in shown_cells(study)
    )
    return f"Final PSNR of every seed by target and cell. {spread}."


def _caption(study: StudySummary) -> str:
    words = (
        "Each dot is one trial. The diamond is what an attacker would hand in; the ring is known "
        "only to somebody who has the truth."
    )
    if averages(study.cells):
        words += (
            " A triangle, which an attacker can have too, is the mean image of the "
            f"{facts(study)['quarter']} seeds with the lowest objectives."
        )
    return words


SECTION = Section(
    name="psnr_distribution",
    title="Every seed",
    when=lambda study: study.has_spread,
    draw=psnr_distribution,
    alt=_alt,
    caption=_caption,
)
