"""Section: which attacker gets most out of which task."""

import math
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from jaxinv.attacks import unused_settings
from jaxinv.reporting.columns import (
    Column,
    Definition,
    Row,
    Shown,
    Table,
    baseline_column,
    capacity_column,
    decimals,
    percent,
    setting,
    size_columns,
    with_interval,
)
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.leaderboard import Entry, board
from jaxinv.reporting.published import PUBLISHED, published
from jaxinv.reporting.section import Section
from jaxinv.reporting.statistics import Interval, paired_difference
from jaxinv.reporting.study import CellSummary, StudySummary
from jaxinv.reporting.wording import number_text

PAPER, FULL = "#ffffff", "#5aa7d6"  # from the mean color to `FULL_GAIN`
FULL_GAIN = 40.0  # dB; the shade goes with the root of the gain, as most gains are of a few dB
HEAD, LINE = 8.6, 0.17  # of tasks' and attackers' names: points, and inches of a line
MOST_WIDTH = 3.0  # inches of the tasks' names
GAP = 0.06  # inches between the heads of two columns


class Place(NamedTuple):
    """A row of the table."""

    task: str
    rank: int
    attacker: str
    cell: CellSummary
    behind: Interval  # PSNR minus that of the task's best, paired over targets


def places(study: StudySummary) -> list[Place]:
    """Every task's attackers, the best first."""
    found = board(study)
    rows = []
    for task in found.tasks if found else []:
        order = found.at(task)
        best = order[0].cell
        for rank, entry in enumerate(order, 1):
            cell, words = entry.cell, ", ".join(filter(None, (entry.attacker, entry.fitted)))
            same = cell.attacked == best.attacked and cell is not best
            behind = paired_difference(cell.psnr, best.psnr) if same else Interval(*[np.nan] * 3)
            rows.append(Place(", ".join(task), rank, words, cell, behind))
    return rows


def _published_psnr(cell: CellSummary) -> float:
    """What was published of a cell's task, in dB; NaN where nothing was."""
    reported = published(cell)
    return math.nan if reported is None else reported.psnr


def _published_std(cell: CellSummary) -> float:
    """How far its images differ, in dB."""
    reported = published(cell)
    return math.nan if reported is None else reported.std


def _published_by(cell: CellSummary) -> str:
    """By which attack, and by whom."""
    reported = published(cell)
    return "" if reported is None else reported.words


def _as_published(row: Row) -> Shown:
    """The published mean and spread; whose they are would cut the table's last columns off."""
    std = row["published_std"]
    beside = "" if math.isnan(std) else f"± {number_text(std)}"
    return Shown(number_text(row["published_psnr"]), beside)


@ps.styled
def leaderboard(study: StudySummary, width: float = ps.WIDE) -> Figure:
    """Draws tasks against attackers: PSNR over the mean color, the best of each task in bold."""
    found = board(study)
    attackers, tasks = found.attackers, found.tasks
    best = [found.at(task)[0].cell for task in tasks]
    beside = {"mean color": [cell.baseline("psnr") for cell in best]}
    if not np.isnan(papers := [_published_psnr(cell) for cell in best]).all():
        beside["published, other images"] = papers
    left = min(MOST_WIDTH, width / 2.6)
    names = [ps.wrap_list(", ".join(task), left - 0.3, HEAD) for task in tasks]
    heights = np.array([0.12 + LINE * max(2, len(lines)) for lines in names])
    step = (width - left - 0.16) / (len(attackers) + len(beside))
    heads = [ps.wrap_list(name, step - GAP, HEAD) for name in (*attackers, *beside)]
    widest = max(ps.text_width(line, HEAD) for lines in heads for line in lines)
    size = HEAD * min(1, (step - GAP) / widest)  # a word is not broken
    tall = float(heights.sum())
    fitted = any(len(found.at(task, attacker)) > 1 for task in tasks for attacker in attackers)
    chosen = "; of several rates or weights the best, which takes the truth to know" * fitted
    sheet = ps.Sheet(
        width,
        ps.Heading(
            "Which attacker gets most out of what?",
            "Mean PSNR in dB, below it the share of reconstructions whose nearest of 1,000 images "
            f"is their own{chosen}. Shade: dB over the mean color. Bold: the most of a row, above "
            "the mean color. Empty: not run.",
        ),
        panel_height=tall,
        margins=ps.Margins(left=left, above=0.12 + LINE * max(map(len, heads)), bottom=0.1),
    )
    (ax,) = sheet.axes
    shade = LinearSegmentedColormap.from_list("gain", [PAPER, FULL])
    ends = np.concatenate([[0], heights.cumsum()])
    for row, task in enumerate(tasks):
        middle = ends[row : row + 2].mean()
        ax.text(-0.1 / step, middle, "\n".join(names[row]), ha="right", va="center", size=HEAD)
        for column, attacker in enumerate(attackers):
            own = found.at(task, attacker)
            if not own:
                continue
            gain = own[0].cell.mean.mean - own[0].cell.baseline("psnr")
            color = shade(math.sqrt(np.clip(np.nan_to_num(gain) / FULL_GAIN, 0, 1)))
            ax.add_patch(
                ps.Rectangle((column, ends[row]), 1, heights[row], color=color, linewidth=0)
            )
            wins = own[0].cell is best[row] and gain > 0
            _draw_numbers(ax, (column + 0.5, middle), own[0], wins)
        for column, figures in enumerate(beside.values(), len(attackers)):
            if not np.isnan(psnr := figures[row]):
                words = number_text(psnr, 1)
                ax.text(column + 0.5, middle, words, ha="center", va="center", color=ps.MUTED)
    for column, lines in enumerate(heads):
        color = ps.INK if column < len(attackers) else ps.MUTED
        words = "\n".join(lines)
        ax.text(column + 0.5, -0.06, words, ha="center", va="bottom", size=size, color=color)
    ax.set_xlim(0, len(heads))
    ax.set_ylim(tall, 0)
    ax.set_axis_off()
    return sheet.figure


def _draw_numbers(ax: Axes, at: tuple[float, float], entry: Entry, is_best: bool) -> None:
    """Writes a cell's mean PSNR, and the share of its reconstructions that name their image."""
    middle = {"textcoords": "offset points", "ha": "center", "va": "center"}
    weight = "bold" if is_best else "normal"
    ax.annotate(number_text(entry.cell.mean.mean, 1), at, (0, 5), weight=weight, **middle)
    share = f"{entry.cell.mean_of('named_by_pixels'):.0%}".replace("nan%", "–")
    below = ", ".join(filter(None, (share, entry.fitted)))
    ax.annotate(below, at, (0, -7), size=7.6, color=ps.MUTED, **middle)


def _fitted(name: str, head: str) -> Column:
    """A number that may be another one for each task; NaN of an attack that has none."""

    def value(place):
        asked = place.cell.asked
        return math.nan if name in unused_settings(asked["attack"]) else asked[name]

    def varies(study):
        return len({cell.asked[name] for cell in study.cells}) > 1

    return Column(name, value, head, setting(name), when=varies)


SECTION = Section(
    name="leaderboard",
    title="Leaderboard",
    when=lambda study: board(study) is not None,
    draw=leaderboard,
    alt="A table of tasks against attackers, shaded by the PSNR over the mean color.",
    caption="Of attacks that were tried, on these targets. How many steps each took is in the "
    "table: it is fair where the seconds are the same.",
    table=Table(
        places,
        (
            Column("task", lambda place: place.task, "task"),
            Column("rank", lambda place: place.rank, "place"),
            Column("attacker", lambda place: place.attacker, "attacker"),
            Column("iterations", lambda place: place.cell.asked["iterations"], "steps"),
            _fitted("lr", "rate"),
            _fitted("tv", "TV"),
            *size_columns(lambda place: place.cell),
            *with_interval(
                "psnr_mean",
                lambda place: Interval(*place.cell.mean[:3]),
                "PSNR in dB\n[95%]",
                ends="psnr",
                of_limits=1,
            ),
            *with_interval(
                "behind",
                lambda place: place.behind,
                "behind\nthe best",
                definition=Definition(
                    "Behind the best",
                    "Mean difference to the attacker of the highest mean at the same task, paired "
                    "over targets, with its t interval.",
                ),
            ),
            capacity_column(lambda place: place.cell),
            baseline_column(lambda place: place.cell),
            Column(
                "published_psnr",
                lambda place: _published_psnr(place.cell),
                "published",
                _as_published,
                when=lambda study: any(map(published, study.cells)),
                definition=Definition(
                    "Published",
                    "The highest mean PSNR in dB that a paper known to us reports of such a "
                    "network and as many images, ± its standard deviation over images. They are "
                    "other images than these, and one start each. From: "
                    f"{', '.join(dict.fromkeys(p.words for p in PUBLISHED.values()))}; which is of "
                    "which row is said in tables/leaderboard.csv.",
                ),
            ),
            Column("published_std", lambda place: _published_std(place.cell)),
            Column("published_by", lambda place: _published_by(place.cell)),
            Column("ssim", lambda place: place.cell.mean_of("ssim"), "SSIM", decimals("ssim", 3)),
            Column(
                "named_by_pixels",
                lambda place: place.cell.mean_of("named_by_pixels"),
                "named by\npixels",
                percent("named_by_pixels", 0),
            ),
        ),
    ),
)
