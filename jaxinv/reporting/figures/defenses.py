"""Figures of defenses: what is recovered against a strength; utility, privacy and leakage."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxinv.reporting.defense_curves import PRIOR, Curve, Private, curves, private_cells
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.statistics import Interval, mean_interval
from jaxinv.reporting.study import Cell, Study
from jaxinv.settings.naming import setting_text

MOST_DEFENSES = 4  # in one figure
LOGARITHMIC = 30  # ratio of the strengths from which on they are drawn so
# What the study that this project starts from tried, marked in the figures.
STUDIED = {"noise": (1e-2, 1e-1, 1.0, 10.0), "prune": (0.25, 0.5, 0.75)}


def _psnr(cell: Cell) -> Interval:
    return Interval(*cell.mean[:3])


def _ssim(cell: Cell) -> Interval:
    return Interval(*mean_interval(cell.metrics["ssim"])[:3])


def _success(cell: Cell) -> Interval:
    return Interval(*cell.success[:3])


@ps.styled
def defense_curves(study: Study, width: float = ps.WIDE) -> Figure:
    """Draws PSNR, SSIM and success rate against each defense's strength, a row per defense."""
    found = [curve for curve in curves(study) if len(curve.points) > 1]
    titles = list(dict.fromkeys(c.title for c in found))
    shown = titles[:MOST_DEFENSES]
    labels = list(dict.fromkeys(c.label for c in found if c.title in shown))
    colors = dict(zip(labels, ps.cell_colors(len(labels))))
    threshold = setting_text(float(study.cells[0].success_psnr))
    measures: list[tuple[str, Callable[[Cell], Interval]]] = [
        ("PSNR (dB)", _psnr), ("SSIM", _ssim), (f"above {threshold} dB", _success),
    ]  # fmt: skip
    columns = 3 if width > 6 else 1
    measures = measures if columns == 3 else measures[:1]
    more = f" Shown: {len(shown)} of {len(titles)} defenses." if len(shown) < len(titles) else ""
    marked = any(c.names[-1] in STUDIED for c in found if c.title in shown)
    keys = [ps.Key("line", colors[label], _words(label)) for label in labels]
    sheet = ps.Sheet(
        width,
        "What the defense leaves to the attack",
        "Means over targets, starts and draws of noise; shaded: 95% intervals over targets. At 0 "
        f"or “off”, no defense.{more}",
        panels=len(shown) * len(measures),
        columns=columns,
        panel_height=1.55,
        gap=0.64,
        above=0.3,
        keys=[
            *keys,
            *([ps.Key("ring", ps.INK, "strengths of the original study")] if marked else []),
            ps.Key("dash", ps.BASELINE, "mean colour"),
        ],
    )
    for row, title in enumerate(shown):
        own = [c for c in found if c.title == title]
        for column, (name, measure) in enumerate(measures):
            ax = sheet.axes[row * len(measures) + column]
            _draw_curves(ax, own, measure, colors, name)
            ax.set_title(title if column == 0 else "", weight="bold")
            ax.set_ylabel(name)
            ax.set_xlabel(own[0].parameter)
    return sheet.figure


def _words(label: str) -> str:
    """A curve's label in the legend."""
    words = {"told = True": "attacker told", "told = False": "attacker not told"}
    for setting, said in words.items():
        label = label.replace(setting, said)
    return label or "mean, 95% interval"


def _draw_curves(
    ax: Axes, found: Sequence[Curve], measure: Callable[[Cell], Interval], colors: dict, name: str
) -> None:
    """Draws one defense's curves of one measure."""
    strengths = sorted({s for c in found for s, _ in c.points if s > 0})
    place = _axis(ax, strengths, found[0].inverse)
    studied = STUDIED.get(found[0].names[-1], ())
    for curve in found:
        points = [*curve.points]
        if curve.reference is not None:
            points = [(math.inf if curve.inverse else 0.0, curve.reference), *points]
        at = np.array([place(s) for s, _ in points])
        values = np.array([measure(cell) for _, cell in points])
        values = np.where(np.isfinite(values), values, np.nan)
        color = colors[curve.label]
        ax.fill_between(at, values[:, 1], values[:, 2], color=color, alpha=0.18, linewidth=0)
        ax.plot(at, values[:, 0], color=color, linewidth=1.8, marker="o", markersize=3)
        for (strength, cell), x, (value, *_) in zip(points, at, values):
            if any(math.isclose(strength, s) for s in studied) and np.isfinite(value):
                ax.plot(x, value, **ps.MARKS["ring"] | {"markeredgecolor": ps.INK})
            if cell.failed.all():
                ax.plot(x, 0.04, **ps.MARKS["cross"], markeredgecolor=color,
                        transform=ax.get_xaxis_transform())  # fmt: skip
    baselines = {"PSNR (dB)": "psnr", "SSIM": "ssim"}
    if name in baselines:
        level = found[0].points[0][1].baseline(baselines[name])
        ax.axhline(level, color=ps.BASELINE, linewidth=1.2, linestyle=(0, (4, 2.5)), zorder=1.5)
    else:
        ax.set_ylim(-0.04, 1.04)
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


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
        ax.set_xticks([zero, *ticks], ["0", *(f"$10^{{{t}}}$" for t in ticks)])
        return lambda s: zero if s == 0 else math.log10(s)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    return lambda s: s


@ps.styled
def trade_off(study: Study, width: float = ps.WIDE) -> Figure:
    """Draws utility, leakage and the bound on any attack against epsilon, a point per network."""
    rows = private_cells(study)
    delta = next(r.cell.facts["victim_delta"] for r in rows if math.isfinite(r.epsilon))
    threshold = setting_text(float(study.cells[0].success_psnr))
    panels: list[tuple[str, Callable[[Private], Interval]]] = [
        ("test accuracy", lambda r: Interval(r.accuracy, r.accuracy, r.accuracy)),
        ("PSNR of the attack (dB)", lambda r: _psnr(r.cell)),
        ("probability of success", lambda r: _success(r.cell)),
    ]
    groups = list(dict.fromkeys(_group(r) for r in rows if r.multiplier is not None))
    colors = dict(zip(groups, ps.cell_colors(len(groups))))
    columns = 3 if width > 6 else 1
    sheet = ps.Sheet(
        width,
        "Utility, leakage and privacy of DP-SGD",
        f"One point per trained network, at its training's epsilon (delta {delta:g}); ∞: without "
        f"DP-SGD or without noise. Success: a PSNR above {threshold} dB. The bound holds for any "
        f"attack on the one update whose best guess without it is right once in {1 / PRIOR:,.0f}.",
        panels=3,
        columns=columns,
        panel_height=1.9,
        gap=0.62,
        keys=[
            *(ps.Key("dot", colors[g], g) for g in groups),
            ps.Key("dot", ps.INK, "without DP-SGD"),
            ps.Key("dash", ps.BASELINE, "mean colour"),
            ps.Key("bar", ps.INK, "bound on any attack"),
        ],
    )
    known = [r.epsilon for r in rows if math.isfinite(r.epsilon) and r.epsilon > 0]
    low, high = math.log10(min(known)), math.log10(max(known))
    end = high + max(0.35, 0.2 * (high - low))
    place = lambda e: end if math.isinf(e) else math.log10(e)  # noqa: E731
    ticks = [t for t in _nice(10**low, 10**high)]
    for (name, measure), ax in zip(panels, sheet.axes):
        for row in rows:
            value, below, above = measure(row)
            color = ps.INK if row.multiplier is None else colors[_group(row)]
            x = place(row.epsilon)
            ax.plot([x, x], [below, above], color=color, linewidth=2, alpha=0.45)
            ax.plot(x, value, "o", color=color, markersize=6)
            if name == "probability of success" and row.multiplier is not None:
                ax.plot(x, row.release_bound, "_", color=ps.INK, markersize=13, markeredgewidth=1.6)
        if name.startswith("PSNR"):
            level = rows[0].cell.baseline("psnr")
            ax.axhline(level, color=ps.BASELINE, linewidth=1.2, linestyle=(0, (4, 2.5)))
        else:
            ax.set_ylim(-0.04, 1.04)
            ax.yaxis.set_major_formatter(PercentFormatter(1))
        ax.set_xticks([*map(math.log10, ticks), end], [*(f"{t:g}" for t in ticks), "∞"])
        ax.set_xlim(low - 0.12 * (end - low), end + 0.12 * (end - low))
        ax.set_xlabel("epsilon")
        ax.set_title(name)
    return sheet.figure


def _group(row: Private) -> str:
    """What tells the networks' colours apart."""
    return f"clip {row.clip:g}"


def _nice(low: float, high: float) -> list[float]:
    """Numbers 1, 2, 5 times a power of ten in a range; four at the most."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = [m * 10.0**p for p in powers for m in (1, 2, 5) if low * 0.99 <= m * 10.0**p <= high]
    while len(steps) > 4:
        steps = steps[::2]
    return steps or [float(f"{low:.2g}")]
