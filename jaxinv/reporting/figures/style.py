"""How every figure looks: palette, type, panels laid out in inches, legend, saving.

Panels are placed by hand rather than by a layout engine: figures of one study then share their
margins, no label is cut off, and nothing has to be drawn twice.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, wraps
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.ticker import NullFormatter, PercentFormatter

from jaxinv import files

WIDE, NARROW = 8.4, 4.3  # inches: a page's column, and a phone
INK, MUTED, FAINT, GRID = "#1c2128", "#5b6470", "#9aa3ad", "#e6e9ed"
BASELINE = "#7a828c"
# Okabe and Ito 2008 without their yellow, too pale for lines: apart for every color vision.
_PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
MOST_CELLS = len(_PALETTE)
MOST_TARGETS = 8
_TITLE, _SUBTITLE, _SMALL = 12.0, 9.2, 8.2  # points


@cache
def _families() -> list[str]:
    """Installed faces, the preferred ones first; DejaVu Sans comes with matplotlib."""
    installed = set(fontManager.get_font_names())
    return [name for name in ("Inter", "Helvetica Neue", "DejaVu Sans") if name in installed]


def _style() -> dict:
    return {
        "font.family": _families(),
        "font.size": 9.2,
        "text.color": INK,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": MUTED,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 9.4,
        "axes.titlelocation": "left",
        "axes.titlepad": 5,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelsize": 8.4,
        "ytick.labelsize": 8.4,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "lines.solid_capstyle": "round",
        "text.parse_math": False,  # a name with dollar signs in it is a name
        "svg.fonttype": "path",
        "svg.hashsalt": "jaxinv",
        "savefig.facecolor": "white",
    }


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Makes a figure function draw in this style without touching matplotlib's global state."""

    @wraps(draw)
    def draw_styled(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(_style()):
            return draw(*args, **kwargs)

    return draw_styled


def save(figure: Figure, path: Path, formats: Sequence[str] = ("png", "svg")) -> None:
    """Writes `path` with each format's suffix; the same figure gives the same bytes."""
    for suffix in formats:
        content = to_bytes(figure, suffix)
        files.write_file(path.with_suffix(f".{suffix}"), lambda f, own=content: f.write(own))


def to_bytes(figure: Figure, suffix: str) -> bytes:
    """Draws a figure as "png" or "svg", without dates or versions in it."""
    metadata = {"Date": None, "Creator": None} if suffix == "svg" else {"Software": None}
    content = io.BytesIO()
    with matplotlib.rc_context(_style()):
        figure.savefig(content, format=suffix, dpi=160, metadata=metadata)
    return content.getvalue()


def cell_colors(count: int) -> list:
    """Colors for cells in order: the palette, or viridis where it is too short."""
    if count <= len(_PALETTE):
        return _PALETTE[:count]
    ramp = matplotlib.colormaps["viridis"]
    return [ramp(0.9 * i / (count - 1)) for i in range(count)]


def draw_baseline(ax: Axes, level: float, name: str = "") -> None:
    """Draws what the mean-color image scores as a dashed line across a panel, named at its end
    where the legend does not.
    """
    ax.axhline(level, **line_style("dash", BASELINE), zorder=1.5)
    if name:
        end = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
        ax.annotate(name, (1, level), (-3, 3), size=_SMALL, color=BASELINE, **end)


def percent_axis(ax: Axes) -> None:
    """Sets a panel's upright axis up for shares, 0% to 100%."""
    ax.set_ylim(-0.04, 1.04)
    ax.yaxis.set_major_formatter(PercentFormatter(1))


def power_of_ten(exponent: int) -> str:
    """Prints a power of ten: "10⁻³"."""
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def log_ticks(axis: Axis) -> None:
    """Names the decades of a logarithmic axis."""
    axis.set_major_formatter(lambda value, _: power_of_ten(round(math.log10(value))))
    axis.set_minor_formatter(NullFormatter())


class Key(NamedTuple):
    """An entry of the legend: a drawing of one kind beside its words."""

    kind: str  # "line" | "thin" | "dash" | "dot" | "bar" | "diamond" | "ring" | "cross" | "band" |
    # "triangle" | "marked"
    color: object
    text: str


class Heading(NamedTuple):
    """What stands over the panels, wrapped to the figure's width."""

    title: str
    subtitle: str
    keys: Sequence[Key] = ()  # the legend


class Margins(NamedTuple):
    """Inches around the panels."""

    left: float = 0.62
    right: float = 0.16
    bottom: float = 0.48  # below each row, for its axis labels
    gap: float = 0.16  # between panels beside each other
    above: float = 0.27  # over each panel, for its title


class Sheet:
    """A figure with its heading, legend and a grid of panels.

    Args:
      width: inches.
      heading: title, subtitle, legend.
      panels: number of panels. columns: at most so many beside each other.
      panel_height: inches of the axes box.
      margins: around the panels.
    """

    def __init__(
        self,
        width: float,
        heading: Heading,
        *,
        panels: int = 1,
        columns: int = 1,
        panel_height: float = 1.6,
        margins: Margins = Margins(),
    ):
        title, subtitle, keys = heading
        left, right, bottom, gap, above = margins
        columns = max(1, min(columns, panels))
        rows = -(-panels // columns)
        title_lines = wrap(title, width - 0.32, _TITLE, "bold")
        subtitle_lines = wrap(subtitle, width - 0.32, _SUBTITLE)
        key_rows = _flow(keys, width - 0.32)
        head = 0.16 + 0.21 * len(title_lines) + 0.17 * len(subtitle_lines) + 0.06
        head += 0.22 * len(key_rows) + (0.06 if key_rows else 0)
        self.width, self.height = width, head + rows * (above + panel_height + bottom) + 0.06
        self.figure = Figure(figsize=(self.width, self.height))
        y = 0.15
        for line in title_lines:
            self.text(0.16, y, line, size=_TITLE, weight="bold", va="top")
            y += 0.21
        y += 0.03
        for line in subtitle_lines:
            self.text(0.16, y, line, size=_SUBTITLE, color=MUTED, va="top")
            y += 0.17
        y += 0.08
        for row in key_rows:
            self._draw_keys(row, y + 0.1)
            y += 0.22
        self.head = head
        panel_width = (width - left - right - gap * (columns - 1)) / columns
        self.axes: list[Axes] = []
        for index in range(panels):
            row, column = divmod(index, columns)
            top = head + row * (above + panel_height + bottom) + above
            x = left + column * (panel_width + gap)
            self.axes.append(self.panel(x, top, panel_width, panel_height))
        self.columns, self.panel_width, self.panel_height = columns, panel_width, panel_height

    def panel(self, x: float, top: float, width: float, height: float) -> Axes:
        """Adds axes at inches from the upper left corner."""
        box = x / self.width, 1 - (top + height) / self.height
        return self.figure.add_axes((*box, width / self.width, height / self.height))

    def text(self, x: float, y: float, text: str, **kwargs) -> None:
        """Writes text at inches from the upper left corner."""
        self.figure.text(x / self.width, 1 - y / self.height, text, **kwargs)

    def is_first(self, index: int) -> bool:
        """Whether a panel is the first of its row."""
        return index % self.columns == 0

    def is_last_row(self, index: int) -> bool:
        """Whether no panel is below this one."""
        return index + self.columns >= len(self.axes)

    def _draw_keys(self, row: list[tuple[float, Key]], y: float) -> None:
        for x, key in row:
            mark = 0.16 + x
            height = 1 - y / self.height
            if key.kind == "band":
                self.figure.add_artist(
                    Rectangle(
                        (mark / self.width, height - 0.045 / self.height),
                        0.24 / self.width,
                        0.09 / self.height,
                        facecolor=key.color,
                        alpha=0.25,
                        linewidth=0,
                    )
                )
            else:
                ends = [mark / self.width, (mark + 0.24) / self.width]
                xs = ends if key.kind in ("line", "thin", "dash") else [sum(ends) / 2]
                xs = [ends[0], *xs, ends[1]] if key.kind == "marked" else xs
                self.figure.add_artist(
                    Line2D(xs, [height] * len(xs), **line_style(key.kind, key.color))
                )
            self.text(mark + 0.31, y, key.text, size=8.8, va="center_baseline", color=INK)


def line_style(kind: str, color: object) -> dict:
    """Line2D settings of a legend's mark, as the figures draw it."""
    return {
        "line": {"color": color, "linewidth": 2},
        "thin": {"color": color, "linewidth": 1.1},
        "dash": {"color": color, "linewidth": 1.2, "linestyle": (0, (4, 2.5))},
        "dot": {"color": color, "marker": "o", "markersize": 5, "linestyle": ""},
        "bar": {"color": color, "marker": "_", "markersize": 13, "markeredgewidth": 1.6},
        "diamond": MARKS["diamond"] | {"markeredgecolor": color},
        "ring": MARKS["ring"] | {"markeredgecolor": color},
        "cross": MARKS["cross"] | {"markeredgecolor": color},
        "triangle": MARKS["triangle"] | {"color": color},
        "marked": MARKS["triangle"]
        | {"color": color, "linewidth": 1.3, "linestyle": "-", "markevery": [1]},
    }[kind]


MARKS = {  # those that mark a dot are hollow, and do not hide it
    "diamond": {
        "marker": "D",
        "markersize": 6.4,
        "markerfacecolor": "none",
        "markeredgewidth": 1.2,
        "linestyle": "",
    },
    "ring": {
        "marker": "o",
        "markersize": 9.5,
        "markerfacecolor": "none",
        "markeredgewidth": 1.3,
        "linestyle": "",
    },
    "cross": {"marker": "x", "markersize": 4.5, "markeredgewidth": 1.2, "linestyle": ""},
    "triangle": {
        "marker": "^",
        "markersize": 6.4,
        "markeredgecolor": "white",
        "markeredgewidth": 0.9,
        "linestyle": "",
    },
}


@lru_cache(maxsize=4096)
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width of a line of text in inches."""
    face = FontProperties(family=_families(), weight=weight, size=size)
    return text_to_path.get_text_width_height_descent(text, face, False)[0] / 72 if text else 0.0


def wrap(text: str, width: float, size: float, weight: str = "normal") -> list[str]:
    """Breaks text into lines no wider than `width` inches, where its words allow it.

    A word too wide for a line, such as a victim's name, breaks behind its hyphens and
    underscores.
    """

    def fits(line):
        return text_width(line, size, weight) <= width

    lines: list[str] = []
    for word in text.split():
        for index, piece in enumerate([word] if fits(word) else re.split(r"(?<=[-_])(?=.)", word)):
            longer = f"{lines[-1]}{' ' if index == 0 else ''}{piece}" if lines else piece
            if lines and fits(longer):
                lines[-1] = longer
            else:
                lines.append(piece)
    return lines


def wrap_list(text: str, width: float, size: float, weight: str = "normal") -> list[str]:
    """The same for a list with commas: an entry stays on one line where it fits there."""
    *entries, last = text.split(", ")
    lines: list[str] = []
    for entry in (*(f"{entry}," for entry in entries), last):
        longer = f"{lines[-1]} {entry}" if lines else entry
        if lines and text_width(longer, size, weight) <= width:
            lines[-1] = longer
        else:
            lines += wrap(entry, width, size, weight)
    return lines


def _flow(keys: Sequence[Key], width: float) -> list[list[tuple[float, Key]]]:
    """Sets legend entries in rows, each with its inches from the left."""
    rows: list[list[tuple[float, Key]]] = []
    x = width
    for key in keys:
        need = 0.31 + text_width(key.text, 8.8)
        if not rows or x + need > width:
            rows.append([])
            x = 0.0
        rows[-1].append((x, key))
        x += need + 0.2
    return rows
