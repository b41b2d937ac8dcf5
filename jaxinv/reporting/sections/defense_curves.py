"""Section: what a defense leaves to the attack, against its strength."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxinv.reporting.defense_curves import Curve, curves
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.section import Section, facts
from jaxinv.reporting.sections.defenses import TITLE
from jaxinv.reporting.statistics import Interval, mean_interval
from jaxinv.reporting.study import CellSummary, StudySummary

MOST_DEFENSES = 4  # in one figure
LOGARITHMIC = 30  # ratio of the strengths from which on they are drawn so
# What the study that this project starts from tried, marked in the figures.
STUDIED = {"noise": (1e-2, 1e-1, 1.0, 10.0), "prune": (0.25, 0.5, 0.75)}


class Measure(NamedTuple):
    """What is drawn against the strength."""

    name: str
    value: Callable[[CellSummary], Interval]
    baseline: str = ""  # the metric of the mean-color image; "": a share


MEASURES = (
    Measure("PSNR (dB)", lambda cell: Interval(*cell.mean[:3]), "psnr"),
    Measure("SSIM", lambda cell: Interval(*mean_interval(cell.metrics["ssim"])[:3]), "ssim"),
    Measure("above {threshold} dB", lambda cell: Interval(*cell.success[:3])),
)


def _drawn(study: StudySummary) -> list[Curve]:
    """The defenses that were tried at several strengths."""
    return [curve for curve in curves(study) if len(curve.points) > 1]


@ps.styled
def defense_curves(study: StudySummary, width: float = ps.WIDE) -> Figure:
    """Draws PSNR, SSIM and success rate against each defense's strength, a row per defense."""
    found = _drawn(study)
    titles = list(dict.fromkeys(c.title for c in found))
    shown = titles[:MOST_DEFENSES]
    found = [curve for curve in found if curve.title in shown]
    attackers = list(dict.fromkeys((c.label, c.is_blind) for c in found))
    labels = list(dict.fromkeys(label for label, _ in attackers))
    differ = len({is_blind for _, is_blind in attackers}) > 1
    lines = {
        (label, is_blind): ("dash" if is_blind and differ else "line", color)
        for label, color in zip(labels, ps.cell_colors(len(labels)))
        for is_blind in (False, True)
    }
    columns = 3 if width > 6 else 1
    measures = MEASURES[:columns]
    more = f" Shown: {len(shown)} of {len(titles)} defenses." if len(shown) < len(titles) else ""
    marked = any(c.names[-1] in STUDIED for c in found)
    sheet = ps.Sheet(
        width,
        ps.Heading(
            "What the defense leaves to the attack",
            "Means over targets, seeds and draws of noise; shaded: 95% intervals over targets. "
            f"At 0 or “off”, no defense.{more}",
            keys=[
                *(
                    ps.Key(*lines[label, blind], _words(label, blind, differ))
                    for label, blind in attackers
                ),
                *(
                    [ps.Key("ring", ps.INK, "on the axis: strengths of the original study")]
                    if marked
                    else []
                ),
                ps.Key("dash", ps.BASELINE, "mean color"),
            ],
        ),
        panels=len(shown) * len(measures),
        columns=columns,
        panel_height=1.55,
        margins=ps.Margins(gap=0.64, above=0.3),
    )
    for index, ax in enumerate(sheet.axes):
        row, column = divmod(index, len(measures))
        own, measure = [c for c in found if c.title == shown[row]], measures[column]
        _draw_curves(ax, own, measure, lines)
        ax.set_title(shown[row] if column == 0 else "", weight="bold")
        ax.set_ylabel(measure.name.format(**facts(study)))
        ax.set_xlabel(own[0].parameter)
    return sheet.figure


def _words(label: str, is_blind: bool, differ: bool) -> str:
    """A curve's label in the legend."""
    known = ("blind" if is_blind else "adaptive") if differ else ""
    return ", ".join(filter(None, (label, known))) or "mean, 95% interval"


def _draw_curves(ax: Axes, found: Sequence[Curve], measure: Measure, lines: dict) -> None:
    """Draws one defense's curves of one measure; `lines`: the kind and color of each attacker's."""
    strengths = sorted({s for c in found for s, _ in c.points if s > 0})
    place = _axis(ax, strengths, found[0].inverse)
    for curve in found:
        points = [*curve.points]
        if curve.reference is not None:
            points = [(math.inf if curve.inverse else 0.0, curve.reference), *points]
        line = lines[curve.label, curve.is_blind]
        _draw_curve(ax, curve, points, [place(s) for s, _ in points], measure, line)
    studied = STUDIED.get(found[0].names[-1], ())
    for strength in strengths:
        if any(math.isclose(strength, s) for s in studied):  # on the axis: curves lie on each other
            ring = ps.MARKS["ring"] | {"markeredgecolor": ps.INK, "markersize": 5, "clip_on": False}
            ax.plot(place(strength), 0, **ring, transform=ax.get_xaxis_transform())
    if measure.baseline:
        ps.draw_baseline(ax, found[0].points[0][1].baseline(measure.baseline))
    else:
        ps.percent_axis(ax)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _draw_curve(
    ax: Axes,
    curve: Curve,
    points: Sequence[tuple[float, CellSummary]],
    at: Sequence[float],
    measure: Measure,
    line: tuple[str, object],
) -> None:
    """Draws one curve with its interval, its marks, and crosses where every trial failed."""
    kind, color = line
    values = np.array([measure.value(cell) for _, cell in points])
    values = np.where(np.isfinite(values), values, np.nan)
    ax.fill_between(at, values[:, 1], values[:, 2], color=color, alpha=0.18, linewidth=0)
    look = ps.line_style(kind, color) | {"marker": "o", "markersize": 3}
    # Where a blind attacker does as well, its dashes are seen over the line.
    ax.plot(at, values[:, 0], **look, zorder=3 if kind == "dash" else 2)
    for (_, cell), x in zip(points, at):
        if cell.failed.all():
            foot = {"transform": ax.get_xaxis_transform(), "markeredgecolor": color}
            ax.plot(x, 0.04, **ps.MARKS["cross"] | foot)


def _axis(ax: Axes, strengths: Sequence[float], inverse: bool) -> Callable[[float], float]:
    """Sets up the axis of strengths; returns where each stands.

    No defense is 0, left of the others; or inf, right of them, where less protects more.
    """
    if inverse:
        end = math.log2(strengths[-1]) + max(1.0, 0.2 * math.log2(strengths[-1] / strengths[0]))
        ax.set_xticks([*map(math.log2, strengths), end], [*(f"{s:g}" for s in strengths), "off"])
        return lambda s: end if math.isinf(s) else math.log2(s)
    if strengths and strengths[-1] / strengths[0] > LOGARITHMIC:
        decades = [round(math.log10(s)) for s in (strengths[0], strengths[-1])]
        zero = decades[0] - 1
        ticks = range(decades[0], decades[1] + 1, max(1, (decades[1] - decades[0]) // 3))
        ax.set_xticks([zero, *ticks], ["0", *map(ps.power_of_ten, ticks)])
        return lambda s: zero if s == 0 else math.log10(s)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    return lambda s: s


SECTION = Section(
    name="defense_curves",
    title=TITLE,
    when=lambda study: bool(_drawn(study)),
    draw=defense_curves,
    alt="PSNR, SSIM and success rate against the strength of each defense.",
    caption="A strength at which an attack scores what the mean color does says something of this "
    "attack, and nothing of a better one. A cross: every trial failed, as no update was left.",
)
