"""Figures of numbers: one function each, from a `Study` to a matplotlib `Figure`.

`width` is in inches; columns and what is shown adapt to it. Failed trials are drawn as crosses at
the foot of a panel and exact ones (PSNR inf) at its head, never dropped.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxinv.reporting.consensus import quarter
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.statistics import BestOfK, ranked_quantile
from jaxinv.reporting.study import Cell, Study, choose_evenly, count_text, number_text, traces
from jaxinv.settings.naming import setting_text


@ps.styled
def psnr_by_step(study: Study, width: float = ps.WIDE) -> Figure:
    """Draws PSNR over iterations: median, central 50% and 95% of the seeds, a panel per target."""
    cells, targets = shown_cells(study), study.target_ids[: ps.MOST_TARGETS]
    colors = ps.cell_colors(len(cells))
    data = [traces(study, cell, _in_cell(cell, targets)) for cell in cells]
    bands = [{t: _bands(curves) for t, curves in by_target.items()} for _, by_target in data]
    drawn = [band[np.isfinite(band)] for by_target in bands for band in by_target.values()]
    limits = _limits(np.concatenate([*drawn, [study.baseline_of(t) for t in targets]]))
    seeds = max(len(cell.seeds) for cell in cells)
    sheet = ps.Sheet(
        width,
        "PSNR as the attack runs",
        (
            f"Median of {seeds} seeds with the bands that hold 50% and 95% of them."
            if seeds > 1
            else "One seed."
        )
        + left_out(study, cells, targets),
        panels=len(targets),
        columns=_columns(width, len(targets)),
        panel_height=1.75,
        keys=[ps.Key("line", c, cell.label) for c, cell in zip(colors, cells)]
        + [ps.Key("dash", ps.BASELINE, "mean colour")],
    )
    for index, (ax, target) in enumerate(zip(sheet.axes, targets)):
        for color, (steps, _), by_target in zip(colors, data, bands):
            if target in by_target:
                _draw_bands(ax, steps, by_target[target], color)
        _psnr_panel(sheet, index, ax, limits, study.baseline_of(target))
        ax.set_title(f"target {target}")
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
        ax.margins(x=0)
        if sheet.is_last_row(index):
            ax.set_xlabel("iterations")
    return sheet.figure


def _bands(
    curves: Float[np.ndarray, "seed step"],
) -> Float[np.ndarray, "quantile step"]:
    """Edges of the 95% and the 50% band and the median; NaN where they rest on failed or exact."""
    quantiles = (0.025, 0.975, 0.25, 0.75, 0.5)
    return _finite(np.stack([ranked_quantile(curves.T, q) for q in quantiles]))


def _draw_bands(
    ax: Axes, steps: np.ndarray, bands: Float[np.ndarray, "quantile step"], color: object
) -> None:
    """Draws the bands and the median of one target in one cell."""
    *edges, median = bands
    for low, high, alpha in ((*edges[:2], 0.15), (*edges[2:], 0.28)):
        ax.fill_between(steps, low, high, color=color, alpha=alpha, linewidth=0)
    single = {"marker": "o", "markersize": 3} if len(steps) == 1 else {}
    ax.plot(steps, median, color=color, linewidth=1.8, **single)


@ps.styled
def psnr_distribution(study: Study, width: float = ps.WIDE) -> Figure:
    """Draws the final PSNR of every seed, by target and cell, with the picks and the consensus."""
    cells, targets = shown_cells(study), study.target_ids[: ps.MOST_TARGETS]
    colors = ps.cell_colors(len(cells))
    averaged = averages(cells)
    values = [cell.psnr for cell in cells]
    values += [cell.consensus.first_draw for cell in cells] if averaged else []
    finite = [v[np.isfinite(v)] for v in values]
    limits = _limits(np.concatenate([*finite, [study.baseline_of(t) for t in targets]]))
    bad = any(cell.failed.any() for cell in cells)
    keys = [
        ps.Key("dot", ps.FAINT, "one seed"),
        ps.Key("bar", ps.INK, "median"),
        ps.Key("diamond", ps.INK, "attacker's pick: lowest objective"),
        ps.Key("ring", ps.INK, "oracle's pick: highest PSNR"),
        *([ps.Key("triangle", ps.INK, "consensus: mean of the best quarter")] if averaged else []),
        ps.Key("dash", ps.BASELINE, "mean colour"),
    ] + ([ps.Key("cross", ps.INK, "failed")] if bad else [])
    # One row of names under the axis, unless the cells are not named by the same settings.
    alike = len({tuple(cell.settings) for cell in cells}) == 1 and bool(cells[0].settings)
    ticks = [_tick(cell) if alike else cell.label for cell in cells]
    rotated = max(ps.text_width(tick, 8.4) for tick in ticks)
    columns = _columns(width, len(targets))
    slot = (width - 0.8) / columns / len(cells)
    upright = rotated < slot * 0.85
    sheet = ps.Sheet(
        width,
        "Final PSNR of every seed",
        (
            "Where the diamond sits below the ring, the objective did not find the best seed."
            if max(len(cell.seeds) for cell in cells) > 1
            else "One seed: nothing to choose from."
        )
        + left_out(study, cells, targets),
        panels=len(targets),
        columns=columns,
        panel_height=2.1,
        bottom=0.48 if upright else 0.36 + rotated,
        keys=keys,
    )
    for index, (ax, target) in enumerate(zip(sheet.axes, targets)):
        _psnr_panel(sheet, index, ax, limits, study.baseline_of(target))
        ax.set_title(f"target {target}")
        ax.set_xlim(-0.5, len(cells) - 0.5)
        ax.grid(axis="x", visible=False)
        ax.set_xticks(range(len(cells)), ticks, rotation=0 if upright else 90)
        if alike:
            ax.set_xlabel(", ".join(study.cells[0].settings))
        for slot_at, (cell, color) in enumerate(zip(cells, colors)):
            if target in cell.target_ids:
                _draw_seeds(sheet, ax, slot_at, cell, cell.target_ids.index(target), color)
    return sheet.figure


def _draw_seeds(sheet: ps.Sheet, ax: Axes, at: int, cell: Cell, target: int, color: object) -> None:
    """Draws one target's seeds of one cell as a swarm with its marks."""
    low, high = ax.get_ylim()
    span = ax.get_xlim()[1] - ax.get_xlim()[0]
    inch_x, inch_y = sheet.panel_width / span, sheet.panel_height / (high - low)
    values = cell.psnr[target]
    drawn = np.where(np.isposinf(values), high - 0.05 / inch_y, values)
    drawn = np.where(np.isnan(values), low + 0.06 / inch_y, drawn)
    diameter, offsets = swarm(drawn * inch_y, room=0.84 * inch_x)
    x = at + offsets / inch_x
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
    for pick, mark in ((cell.oracle_pick[target], "ring"), (cell.attacker_pick[target], "diamond")):
        if pick >= 0:
            look = {"markeredgecolor": ps.INK} if mark == "ring" else {"color": ps.INK}
            ax.plot(x[pick], drawn[pick], **(ps.MARKS[mark] | look), zorder=4, clip_on=False)
    if averages([cell]) and not np.isnan(mean := cell.consensus.first_draw[target]):
        height = high - 0.05 / inch_y if np.isinf(mean) else mean
        beside = at + 0.4  # the swarm, which has no room for one more mark
        ax.plot(beside, height, **ps.MARKS["triangle"], color=ps.INK, zorder=5, clip_on=False)


def swarm(
    heights: Float[np.ndarray, " point"], room: float, diameter: float = 0.075
) -> tuple[float, Float[np.ndarray, " point"]]:
    """Sets dots beside each other so that none overlap, nearest the middle first.

    Heights, `room` and `diameter` are in one unit. Dots shrink until the swarm fits the room, down
    to a quarter; beyond that the outermost are set back to the edge and may overlap.

    Returns: the diameter used, and each dot's offset from the middle. Deterministic.
    """
    smallest = diameter / 4
    while True:
        offsets = _pack(np.asarray(heights, float), diameter)
        if np.abs(offsets).max(initial=0) + diameter / 2 <= room / 2:
            return diameter, offsets
        if diameter <= smallest:
            edge = max(0.0, (room - diameter) / 2)
            return diameter, np.clip(offsets, -edge, edge)
        diameter *= 0.85


def _pack(heights: np.ndarray, diameter: float) -> np.ndarray:
    """Places dots by rising height, each at the free offset nearest the middle."""
    offsets = np.zeros(len(heights))
    placed: list[int] = []
    for point in np.argsort(heights, kind="stable"):
        near = [p for p in placed if heights[point] - heights[p] < diameter]
        reach = np.sqrt(
            np.maximum(0, diameter**2 - np.array([heights[point] - heights[p] for p in near]) ** 2)
        )
        centres = offsets[near]
        options = np.concatenate([[0.0], centres + reach, centres - reach])
        gaps = np.abs(options[:, None] - centres[None, :]) - reach[None, :]
        free = options[(gaps > -1e-9).all(axis=1)]
        offsets[point] = free[np.lexsort((free, np.abs(free).round(9)))[0]]
        placed.append(point)
    return offsets


@ps.styled
def best_of_k(study: Study, width: float = ps.WIDE) -> Figure:
    """Draws the expected PSNR of what k seeds give: attacker's pick, consensus, oracle's pick."""
    cells = shown_cells(study)
    colors = ps.cell_colors(len(cells))
    averaged = averages(cells)
    finite = [
        curve[np.isfinite(curve)]
        for cell in cells
        for best in (cell.attacker, cell.oracle, *([cell.consensus.quarter] if averaged else []))
        for curve in (best.mean, best.low, best.high)
    ]
    limits = _limits(np.concatenate([*finite, [cell.baseline("psnr") for cell in cells]]))
    several = any(len(cell.target_ids) > 1 for cell in cells)
    sheet = ps.Sheet(
        width,
        "What more seeds buy",
        "Expected PSNR of the best of k seeds, mean over targets. The attacker chooses by lowest "
        "objective, the oracle by the truth."
        + (" Consensus: the mean image of the quarter with the lowest." if averaged else "")
        + (" Shaded: 95% t interval over targets." if several else " One target: no interval.")
        + left_out(study, cells),
        panels=len(cells),
        columns=_columns(width, len(cells), wide=3),
        panel_height=1.9,
        above=0.44,
        keys=[
            ps.Key("line", colors[0], "attacker"),
            *([ps.Key("marked", colors[0], "consensus")] if averaged else []),
            ps.Key("thin", ps.INK, "oracle"),
            ps.Key("dash", ps.BASELINE, "mean colour"),
        ],
    )
    for index, (ax, cell, color) in enumerate(zip(sheet.axes, cells, colors)):
        _draw_choice(ax, cell.oracle, ps.INK, thin=True)
        _draw_choice(ax, cell.attacker, color, thin=False)
        if averages([cell]):
            _draw_consensus(ax, cell.consensus.quarter, color)
        _psnr_panel(sheet, index, ax, limits, cell.baseline("psnr"))
        _title_with_gains(ax, cell, color, sheet.panel_width)
        ticks = [2**i for i in range(12) if 2**i <= len(cell.seeds)]
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [str(k) for k in ticks])
        ax.set_xlim(0.9, max(1.12, len(cell.seeds) * 1.12))
        if sheet.is_last_row(index):
            ax.set_xlabel("k, seeds to choose from")
    return sheet.figure


def _draw_choice(ax: Axes, best: BestOfK, color: object, thin: bool) -> None:
    """Draws one way of choosing; its curve starts where k seeds cannot all have failed."""
    k = np.arange(1, best.mean.size + 1)
    alpha = 0.08 if thin else 0.18
    band = _finite(best.low), _finite(best.high)
    ax.fill_between(k, *band, color=color, alpha=alpha, linewidth=0)
    marker = {"marker": "o", "markersize": 4} if k.size == 1 else {}
    ax.plot(k, _finite(best.mean), color=color, linewidth=1.1 if thin else 2.2, **marker)


def _draw_consensus(ax: Axes, best: BestOfK, color: object) -> None:
    """Draws the consensus from where it parts with the pick, marked at each doubling and the end.

    Without its interval, which would cover the others'; the table has it.
    """
    mean = _finite(best.mean)
    k = np.arange(4, mean.size + 1)
    ax.plot(k, mean[3:], color=color, linewidth=1.3, zorder=3)
    at = np.array(sorted({2**i for i in range(3, 12) if 2**i <= mean.size} | {mean.size}))
    ax.plot(at, mean[at - 1], **ps.MARKS["triangle"], color=color, zorder=4, clip_on=False)


def averages(cells: Sequence[Cell]) -> bool:
    """Whether some cell's best quarter is more than one seed, and so other than the pick."""
    return any(quarter(len(cell.seeds)) > 1 for cell in cells)


def _title_with_gains(ax: Axes, cell: Cell, color: object, width: float) -> None:
    """Names a panel, and under its name what choosing among all seeds adds to the mean seed."""
    size = min(9.4, 9.4 * width / ps.text_width(cell.label, 9.4, "bold"))
    ax.set_title(cell.label, color=color, weight="bold", pad=18, size=size)
    with np.errstate(invalid="ignore"):
        gains = {"pick": cell.attacker.mean[-1] - cell.mean.mean}
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


def shown_cells(study: Study, most: int = ps.MOST_CELLS) -> list[Cell]:
    """Cells that a figure has room for, spread evenly over the sweep."""
    return choose_evenly(study.cells, most)


def left_out(study: Study, cells: Sequence[Cell], targets: Sequence[int] | None = None) -> str:
    """Says what a figure does not show; nothing where it shows all."""
    parts = []
    if targets is not None and len(targets) < len(study.target_ids):
        parts.append(f"the first {len(targets)} of {len(study.target_ids)} targets")
    if len(cells) < len(study.cells):
        parts.append(f"{len(cells)} of {len(study.cells)} cells")
    return f" Shown: {' and '.join(parts)}." if parts else ""


def _in_cell(cell: Cell, targets: Sequence[int]) -> list[int]:
    return [t for t in targets if t in cell.target_ids]


def _columns(width: float, panels: int, wide: int = 4) -> int:
    """Panels beside each other: as many as stay readable, without a nearly empty last row."""
    most = wide if width > 6 else 2
    rows = -(-panels // most)
    return -(-panels // rows)


def _tick(cell: Cell) -> str:
    return ", ".join(setting_text(v) for v in cell.settings.values())


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Limits around finite values with room at head and foot for exact and failed trials."""
    low, high = float(np.min(values)), float(np.max(values))
    room = 0.09 * max(high - low, 1.0)
    return low - room, high + room


def _psnr_panel(
    sheet: ps.Sheet, index: int, ax: Axes, limits: tuple[float, float], baseline: float
) -> None:
    """Sets a panel's PSNR axis, named once per row, and draws the baseline."""
    ax.set_ylim(*limits)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.axhline(baseline, color=ps.BASELINE, linewidth=1.2, linestyle=(0, (4, 2.5)), zorder=1.5)
    if sheet.is_first(index):
        ax.set_ylabel("PSNR (dB)")
    else:
        ax.tick_params(labelleft=False)


def alt_text(study: Study) -> dict[str, str]:
    """Describes each figure in words, for those who do not see it."""
    spread = "; ".join(
        f"{cell.label}: mean {number_text(cell.mean.mean)} dB, seeds' standard deviation "
        f"{number_text(cell.mean.seed_std)} dB"
        for cell in shown_cells(study)
    )
    return {
        "psnr_by_step": "PSNR by iteration for each target, bands over seeds.",
        "psnr_distribution": f"Final PSNR of every seed by target and cell. {spread}.",
        "best_of_k": "Expected PSNR of the best of k seeds, attacker's and oracle's choice, and of "
        "the mean image of the best quarter.",
        "variance_components": "Standard deviations between targets and between seeds per cell.",
        "paired_differences": "Each setting's PSNR minus the first one's, with intervals.",
        "success_rate": "Share of trials above the threshold per cell, with intervals.",
        "label_accuracy": "Share of labels that the attacker has right per cell, with intervals.",
        "reconstructions": "Truth beside reconstructions, a row per target.",
        "defense_curves": "PSNR, SSIM and success rate against the strength of each defense.",
        "posterior": "The attack's own standard deviation of each pixel beside its error, and how "
        "many pixels lie within intervals of a nominal coverage.",
        "spectrum": "Singular values of the update's derivative by the image, and pictures of the "
        "directions it pins down least.",
        "trade_off": "Test accuracy, PSNR of the attack and its success against epsilon.",
        "pixel_statistics": "Pixelwise mean and standard deviation over seeds, a row per target.",
    }
