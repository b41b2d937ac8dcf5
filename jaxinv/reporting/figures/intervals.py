"""Figures of one row per cell, points with intervals: variances, success, labels, differences."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.statistics import Interval
from jaxinv.reporting.study import Cell, Study, number_text
from jaxinv.reporting.unknowns import labels_found
from jaxinv.settings.naming import setting_text


@ps.styled
def variance_components(study: Study, width: float = ps.WIDE) -> Figure:
    """Draws the standard deviations between targets and between seeds, with intervals."""
    drawn = any(len(cell.draws) > 1 for cell in study.cells)
    parts = [("between", "between targets", "o"), ("within", "between seeds", "s")]
    if drawn:
        parts.insert(1, ("noise", "between draws of noise", "D"))
    rows = [
        (cell.label, [(getattr(cell.components, p), mark) for p, _, mark in parts], _share(cell))
        for cell in study.cells
    ]
    colors = ("#0072b2", "#009e73", "#d55e00") if drawn else ("#0072b2", "#d55e00")
    return _interval_rows(
        width,
        "Do images or seeds decide the result?",
        "Standard deviation of PSNR with bootstrap 95% intervals, which are too short "
        "with few targets. At the right: the targets' share of the variance (ICC).",
        rows,
        colors,
        [ps.Key("dot", color, name) for color, (_, name, _) in zip(colors, parts)],
        xlabel="standard deviation of PSNR (dB)",
        unknown="not determined: needs 2 seeds, no failed or exact trial",
        words_name="ICC",
    )


def _share(cell: Cell) -> str:
    icc = cell.components.icc.value
    return "—" if np.isnan(icc) else f"{100 * icc:.0f}%"


@ps.styled
def success_rate(study: Study, width: float = ps.WIDE) -> Figure:
    """Draws the share of trials above the threshold, with Wilson intervals."""
    threshold = setting_text(float(study.cells[0].success_psnr))
    rows = []
    for cell in study.cells:
        s = cell.success
        share = Interval(100 * s.rate, 100 * s.low, 100 * s.high)
        rows.append((cell.label, [(share, "o")], f"{s.successes} of {s.trials}"))
    return _interval_rows(
        width,
        f"How many trials exceed {threshold} dB?",
        "Failed trials count as misses. 95% Wilson intervals at the effective number of trials: "
        "seeds of one target are not independent.",
        rows,
        ("#0072b2",),
        [],
        xlabel=f"trials with PSNR above {threshold} dB (%)",
        unknown="",
        words_name="trials",
        limits=(0, 100),
    )


@ps.styled
def label_accuracy(study: Study, width: float = ps.WIDE) -> Figure:
    """Draws the share of labels that an attacker who was not told them has right."""
    found = labels_found(study)
    rows = []
    for row in found:
        share = Interval(*(100 * row[f"accuracy{end}"] for end in ("", "_low", "_high")))
        rows.append((row["setting"], [(share, "o")], f"{number_text(share.value, 1)}%"))
    return _interval_rows(
        width,
        "Which labels does the update give away?",
        "Share of labels found, repeats counted, with t intervals over targets.",
        rows,
        ("#0072b2",),
        [],
        xlabel="labels that are right (%)",
        unknown="not determined: a trial failed",
        words_name="mean",
        limits=(0, 102),
    )


@ps.styled
def paired_differences(study: Study, width: float = ps.WIDE) -> Figure:
    """Draws each cell's PSNR minus the first cell's, with t intervals over targets."""
    pairs = study.pairs
    rows = [(p.cell.label, [(p.difference, "o")], number_text(p.difference.value)) for p in pairs]
    ends = [v for p in pairs for v in p.difference if np.isfinite(v)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    room = 0.06 * max(high - low, 1e-3)
    figure = _interval_rows(
        width,
        f"Against {pairs[0].reference.label}",
        "Difference of PSNR on the same targets from the same seeds, 95% t intervals over targets. "
        "An interval that excludes 0 tells the two settings apart.",
        rows,
        ("#0072b2",),
        [],
        xlabel="difference of PSNR (dB)",
        unknown="not determined: needs 2 targets, no failed or exact trial",
        words_name="dB",
        limits=(low - room, high + room),
    )
    figure.axes[0].axvline(0, color=ps.INK, linewidth=1, zorder=0.5)
    return figure


def _interval_rows(
    width: float,
    title: str,
    subtitle: str,
    rows: Sequence[tuple[str, list[tuple[Interval, str]], str]],
    colors: Sequence[object],
    keys: Sequence[ps.Key],
    *,
    xlabel: str,
    unknown: str,
    words_name: str,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draws points with intervals, a row per cell, its label at the left, words at the right."""
    names = ["\n".join(ps.wrap(label, 0.42 * width, 8.8)) for label, *_ in rows]
    pitch = 0.34 if len(rows) <= 12 and max(n.count("\n") for n in names) == 0 else 0.26
    pitch = max(pitch, 0.1 + 0.15 * max(n.count("\n") + 1 for n in names))
    right = 0.3 + max(ps.text_width(words, 8.6) for words in [words_name, *(r[2] for r in rows)])
    label_width = max(ps.text_width(line, 8.8) for name in names for line in name.split("\n"))
    sheet = ps.Sheet(
        width,
        title,
        subtitle,
        panel_height=pitch * (len(rows) + 0.2),
        left=0.3 + label_width,
        right=right,
        above=0.27,
        keys=keys,
    )
    ax = sheet.axes[0]
    sheet.text(width - right + 0.14, sheet.head + 0.18, words_name, size=8.2, color=ps.MUTED)
    for y, (name, (_, points, words)) in enumerate(zip(names, rows)):
        for index, (interval, marker) in enumerate(points):
            height = y + (index - (len(points) - 1) / 2) * 0.6 / max(2, len(points))
            ax.plot(interval[1:], [height] * 2, color=colors[index], linewidth=2, alpha=0.45)
            ax.plot(
                interval.value, height, marker, color=colors[index], markersize=6, clip_on=False
            )
        if all(np.isnan(interval.value) for interval, _ in points):
            ax.text(0.01, y, unknown, size=8, color=ps.MUTED, va="center_baseline",
                    transform=ax.get_yaxis_transform())  # fmt: skip
        for x, text, ha in ((-0.1, name, "right"), (sheet.panel_width + 0.14, words, "left")):
            ax.text(x / sheet.panel_width, y, text, size=8.8 if ha == "right" else 8.6, ha=ha,
                    va="center", transform=ax.get_yaxis_transform(),
                    color=ps.INK if ha == "right" else ps.MUTED)  # fmt: skip
    highs = [i.high for _, points, _ in rows for i, _ in points] + [
        i.value for _, points, _ in rows for i, _ in points
    ]
    known = np.isfinite(highs).any()
    top = np.nanmax(highs) if known else 1.0
    ax.set_xlim(*(limits or (0, 1.06 * max(top, 1e-3))))
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_yticks([])
    if not known:
        ax.set_xticks([])
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(xlabel)
    return sheet.figure
