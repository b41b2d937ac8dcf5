"""Section: networks trained with DP-SGD, their utility, privacy and leakage."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxinv import defenses
from jaxinv.privacy import accounting
from jaxinv.reporting.columns import (
    BASELINE_LABEL,
    Column,
    Definition,
    Row,
    Shown,
    Table,
    baseline_column,
    name_columns,
    percent,
    setting,
    size_columns,
    with_interval,
)
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.section import Section, facts
from jaxinv.reporting.sections.defenses import cosine_column
from jaxinv.reporting.statistics import Interval
from jaxinv.reporting.study import CellSummary, StudySummary
from jaxinv.reporting.wording import count_text, is_undefined, number_text
from jaxinv.settings.naming import spoken

PLAIN = "without DP-SGD"
PRIOR = 1e-4  # the images that could have been the one: CIFAR-10's test split, say
OFFSET = 0.06  # between networks of one epsilon, in powers of ten
TICK_GAP = 0.1  # inches between the epsilons named at the axis


class PrivateCell(NamedTuple):
    """A cell on a network that was trained with DP-SGD, attacked through the same."""

    cell: CellSummary
    epsilon: float  # of the training; inf without noise or without DP-SGD
    accuracy: float  # of the network, on the test split
    multiplier: float | None  # of the noise in the attacked update; None: no DP-SGD
    clip: float | None
    release_bound: float  # on the success of any attack on this update, at the prior `PRIOR`


class Panel(NamedTuple):
    """What is drawn against epsilon."""

    name: str  # of the attack, where there is one: "{attack}"
    value: Callable[[PrivateCell], Interval]
    axis: str = "dB"  # or "share", or "log"


PANELS = (
    Panel("test accuracy", lambda r: Interval(*[r.accuracy] * 3), "share"),
    Panel("PSNR of {attack} (dB)", lambda r: Interval(*r.cell.mean[:3])),
    Panel("success of {attack}", lambda r: Interval(*r.cell.success[:3]), "share"),
    # Another event than the success: on a panel of its own.
    Panel(
        f"bound on any attack: one of {1 / PRIOR:,.0f} named",
        lambda r: Interval(*[r.release_bound] * 3),
        "log",
    ),
)


@lru_cache(maxsize=1)  # a report is of one study
def private_cells(study: StudySummary) -> list[PrivateCell]:
    """Networks trained with DP-SGD, and those without it or any defense beside them; by epsilon."""
    trained = [c for c in study.cells if c.facts["victim"] is not None]
    is_private = [not is_undefined(c.facts["victim_delta"]) for c in trained]
    if not any(is_private):
        return []
    rows = [
        _private(cell)
        for cell, private in zip(trained, is_private)
        if private or cell.facts["defense"] == defenses.NONE
    ]
    return sorted(rows, key=lambda row: row.epsilon)


def _private(cell: CellSummary) -> PrivateCell:
    strengths = dict(defenses.parse(cell.facts["defense"])).get("dpsgd")
    clip, multiplier = (None, None) if strengths is None else strengths
    bound = 1.0
    if multiplier:
        bound = accounting.reconstruction_bound(accounting.Mechanism(multiplier), PRIOR)
    epsilon = cell.facts["victim_epsilon"]
    return PrivateCell(
        cell,
        math.inf if is_undefined(epsilon) else float(epsilon),
        float(cell.facts["victim_accuracy"]),
        multiplier,
        clip,
        bound,
    )


@ps.styled
def dp_sgd(study: StudySummary, width: float = ps.WIDE) -> Figure:
    """Draws utility, leakage and the bound on any attack against epsilon, a point per network."""
    rows = private_cells(study)
    delta = next(r.cell.facts["victim_delta"] for r in rows if math.isfinite(r.epsilon))
    groups = [g for g in dict.fromkeys(map(_group, rows)) if g != PLAIN]
    colors = dict(zip(groups, ps.cell_colors(len(groups)))) | {PLAIN: ps.INK}
    of_epsilon: dict[str, list[str]] = {}
    for row in rows:
        own = of_epsilon.setdefault(_epsilon_text(row.epsilon), [])
        own += [_group(row)] * (_group(row) not in own)
    attacks = {r.cell.asked["attack"] for r in rows}
    attack = spoken("attack", *attacks) if len(attacks) == 1 else "each attack"
    sheet = ps.Sheet(
        width,
        ps.Heading(
            "Utility, leakage and privacy of DP-SGD",
            f"One point per trained network, at its training's epsilon (delta {delta:g}); ∞: "
            f"without DP-SGD or without noise. {_side_by_side(of_epsilon)}Success: a PSNR above "
            f"{facts(study)['threshold']} dB. Bound: the chance that whoever sees the one update "
            f"names its image among {1 / PRIOR:,.0f}, at most.",
            keys=[ps.Key("dot", color, group) for group, color in colors.items()],
        ),
        panels=len(PANELS),
        columns=2 if width > 6 else 1,
        panel_height=1.9,
        margins=ps.Margins(gap=0.62),
    )
    for panel, ax in zip(PANELS, sheet.axes):
        place = _epsilon_axis(ax, rows, sheet.panel_width)
        for row in rows:
            group, beside = _group(row), of_epsilon[_epsilon_text(row.epsilon)]
            aside = OFFSET * (beside.index(group) - (len(beside) - 1) / 2)
            _draw_point(ax, place(row.epsilon) + aside, row, panel, colors[group])
        if panel.axis == "share":
            ps.percent_axis(ax)
        elif panel.axis == "log":
            ax.set_yscale("log")
            ax.set_ylim(PRIOR / 2, 2)
            ps.log_ticks(ax.yaxis)
            ps.draw_baseline(ax, PRIOR, f"a guess: 1 in {1 / PRIOR:,.0f}")
        else:
            ps.draw_baseline(ax, rows[0].cell.baseline("psnr"), BASELINE_LABEL)
        ax.set_title(panel.name.format(attack=attack))
    return sheet.figure


def _draw_point(ax: Axes, x: float, row: PrivateCell, panel: Panel, color: object) -> None:
    """Draws one network's value and its interval."""
    value, below, above = panel.value(row)
    ax.plot([x, x], [below, above], color=color, linewidth=2, alpha=0.45)
    ax.plot(x, value, "o", color=color, markersize=6)


def _side_by_side(of_epsilon: Mapping[str, Sequence[str]]) -> str:
    """Says which points stand beside their epsilon, as several share it."""
    shared = [
        f"{count_text(len(groups), 'network')} at epsilon {text}"
        for text, groups in of_epsilon.items()
        if len(groups) > 1
    ]
    return f"Drawn side by side: {', '.join(shared)}. " if shared else ""


def _epsilon_axis(ax: Axes, rows: Sequence[PrivateCell], inches: float) -> Callable[[float], float]:
    """Sets up a logarithmic axis with a place for infinity; returns where each epsilon stands.

    Names the networks' own epsilons, from the largest on those that have room in so many inches.
    """
    known = [r.epsilon for r in rows if math.isfinite(r.epsilon) and r.epsilon > 0]
    low, high = (math.log10(end(known or [1.0])) for end in (min, max))
    end = high + max(0.35, 0.2 * (high - low))

    def place(epsilon: float) -> float:
        if math.isinf(epsilon):
            return end
        # An untrained network has promised nothing yet, 0: it stands at the left end.
        return math.log10(epsilon) if epsilon > 0 else low - 0.1 * (end - low)

    ax.set_xlim(low - 0.12 * (end - low), end + 0.12 * (end - low))
    ax.set_xlabel("epsilon")
    ticks: dict[float, str] = {}
    left_end = math.inf  # inches, of the last name
    for epsilon in sorted({math.inf, *(r.epsilon for r in rows)}, reverse=True):
        at, text = place(epsilon), _epsilon_text(epsilon)
        middle, half = at * inches / (1.24 * (end - low)), ps.text_width(text, 8.4) / 2
        if middle + half + TICK_GAP < left_end:
            ticks[at], left_end = text, middle - half
    ax.set_xticks(list(ticks), list(ticks.values()))
    return place


def _group(row: PrivateCell) -> str:
    """What tells the networks' colors apart."""
    return PLAIN if row.multiplier is None else f"clip {row.clip:g}"


def _epsilon_text(epsilon: float) -> str:
    return f"{epsilon:.3g}" if math.isfinite(epsilon) else number_text(epsilon)


def _bound(row: Row) -> Shown:
    percent = 100 * row["release_bound"]
    if percent == 100:
        return Shown("100%")
    if percent > 99.9:  # and no certainty
        return Shown("> 99.9%")
    return Shown(f"{percent:.1f}%" if percent >= 10 else f"{percent:.2g}%")


def _columns() -> tuple[Column, ...]:
    def cell(private):
        return private.cell

    number, label = name_columns("", cell)

    def number_or_nan(value):
        return math.nan if value is None else value

    return (
        number,
        Column("victim", lambda p: p.cell.facts["victim"], "network"),
        label,
        *size_columns(cell),
        Column(
            "noise_multiplier",
            lambda p: number_or_nan(p.multiplier),
            "noise\nmultiplier",
            setting("noise_multiplier"),
        ),
        Column("clip", lambda p: number_or_nan(p.clip), "clip", setting("clip")),
        Column(
            "epsilon",
            lambda p: p.epsilon,
            "epsilon",
            lambda row: Shown(_epsilon_text(row["epsilon"])),
        ),
        Column("delta", lambda p: p.cell.facts["victim_delta"], "delta", setting("delta")),
        Column("test_accuracy", lambda p: p.accuracy, "test\naccuracy", percent("test_accuracy")),
        *with_interval(
            "psnr_mean", lambda p: Interval(*p.cell.mean[:3]), "PSNR in dB\n[95%]", ends="psnr"
        ),
        baseline_column(cell),
        Column(
            "success_rate",
            lambda p: p.cell.success.rate,
            "above\n{threshold} dB",
            percent("success_rate", 0),
        ),
        cosine_column(cell),
        Column("prior", lambda p: PRIOR),
        Column(
            "release_bound",
            lambda p: p.release_bound,
            "bound on\nany attack",
            _bound,
            definition=Definition(
                "Bound on any attack",
                "The largest probability with which any attacker who sees the one noisy update, "
                "and knows the network and every other image of the batch, names the image right, "
                "if without the update it would be right once in 10,000 (Hayes et al. 2023, arXiv "
                "2302.07225, theorem 2, for one Gaussian release: Φ(Φ⁻¹(1/10,000) + 1/noise "
                "multiplier)). The attack’s success rate measures a different event (PSNR above "
                "the threshold). The bound applies to it only if guessing without the update would "
                "succeed at most once in 10,000 times.",
            ),
        ),
    )


SECTION = Section(
    name="dp_sgd",
    title="DP-SGD: utility, leakage, privacy",
    when=lambda study: any(math.isfinite(row.epsilon) for row in private_cells(study)),
    draw=dp_sgd,
    alt="Test accuracy, PSNR and success of the attack, and the bound on any, against epsilon.",
    caption="The bound counts what any attack could do with the one update, whatever it calls "
    "success. Epsilon is that of the whole training.",
    table=Table(private_cells, _columns()),
)
