"""A figure of a row per cell: its label, points with intervals, and words at the right."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.figures.swarm import swarms
from jaxinv.reporting.statistics import Interval

BLUE = "#0072b2"  # of the points, where there is one a row
SWARM = 0.62  # inches of a row with dots


class IntervalRow(NamedTuple):
    """One row: its label, its points and what is written beside them."""

    label: str
    points: Sequence[tuple[Interval, str, str]]  # with marker and color
    words: str
    dots: Sequence[float] = ()  # finite values behind the points, beside each other

    @property
    def is_unknown(self) -> bool:
        """Whether none of its points is determined."""
        return all(np.isnan(interval.value) for interval, *_ in self.points)


def interval_rows(
    width: float,
    title: str,
    subtitle: str,
    rows: Sequence[IntervalRow],
    *,
    xlabel: str,
    words_name: str,
    unknown: str = "",
    keys: Sequence[ps.Key] = (),
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draws the rows on one axis.

    Args:
      width: inches.
      title: heading of the figure.
      subtitle: below the heading.
      rows: from top to bottom.
      xlabel: of the axis.
      words_name: heading of the words at the right.
      unknown: stands in a row of which no point is determined.
      keys: legend entries.
      limits: of the axis; by default from 0 to what is largest.
    """
    names = ["\n".join(ps.wrap(row.label, 0.42 * width, 8.8)) for row in rows]
    lines = max(name.count("\n") + 1 for name in names)
    pitch = max(0.34 if len(rows) <= 12 and lines == 1 else 0.26, 0.1 + 0.15 * lines)
    if any(len(row.dots) for row in rows):
        pitch = max(pitch, SWARM)
    words = [words_name, *(row.words for row in rows)]
    right = 0.3 + max(ps.text_width(text, 8.6) for text in words)
    label_width = max(ps.text_width(line, 8.8) for name in names for line in name.split("\n"))
    sheet = ps.Sheet(
        width,
        ps.Heading(title, subtitle, keys=keys),
        panel_height=pitch * (len(rows) + 0.2),
        margins=ps.Margins(left=0.3 + label_width, right=right, above=0.27),
    )
    ax = sheet.axes[0]
    sheet.text(width - right + 0.14, sheet.head + 0.18, words_name, size=8.2, color=ps.MUTED)
    _set_axis(ax, rows, limits, xlabel)
    _draw_dots(ax, sheet.panel_width, pitch, rows)
    for y, (name, row) in enumerate(zip(names, rows)):
        _draw_row(ax, sheet.panel_width, y, name, row, unknown)
    return sheet.figure


def _draw_dots(ax: Axes, width: float, pitch: float, rows: Sequence[IntervalRow]) -> None:
    """Draws each row's dots as a swarm around its middle; `width` and `pitch` are in inches."""
    low, high = ax.get_xlim()
    places = [np.asarray(row.dots) * width / (high - low) for row in rows]
    diameter, offsets = swarms(places, room=0.86 * pitch)
    look = {"s": (diameter * 72 * 0.92) ** 2, "color": BLUE, "alpha": 0.4, "linewidths": 0}
    for y, (row, aside) in enumerate(zip(rows, offsets)):
        ax.scatter(row.dots, y + aside / pitch, **look, clip_on=False)


def _draw_row(ax: Axes, width: float, y: int, name: str, row: IntervalRow, unknown: str) -> None:
    """Draws one row's points, its label, and its words; `width` is the panel's in inches."""
    for index, (interval, marker, color) in enumerate(row.points):
        height = y + (index - (len(row.points) - 1) / 2) * 0.6 / max(2, len(row.points))
        ax.plot(interval[1:], [height] * 2, color=color, linewidth=2, alpha=0.45)
        ax.plot(interval.value, height, marker, color=color, markersize=6, clip_on=False)
    beside: dict[str, Any] = {"transform": ax.get_yaxis_transform()}
    if row.is_unknown:
        ax.text(0.01, y, unknown, size=8, color=ps.MUTED, va="center_baseline", **beside)
    beside |= {"va": "center"}
    ax.text(-0.1 / width, y, name, size=8.8, ha="right", color=ps.INK, **beside)
    ax.text(1 + 0.14 / width, y, row.words, size=8.6, ha="left", color=ps.MUTED, **beside)


def _set_axis(
    ax: Axes, rows: Sequence[IntervalRow], limits: tuple[float, float] | None, xlabel: str
) -> None:
    """Sets the axis up; without numbers where nothing is known."""
    ends = [end for row in rows for i, *_ in row.points for end in (i.high, i.value)]
    known = np.isfinite(ends).any()
    top = np.nanmax(ends) if known else 1.0
    ax.set_xlim(*(limits or (0, 1.06 * max(top, 1e-3))))
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_yticks([])
    if not known:
        ax.set_xticks([])
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(xlabel)
