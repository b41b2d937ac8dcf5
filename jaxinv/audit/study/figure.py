"""Figure: what noise leaves of an update, by names and by pixels."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxinv.audit.study.scene import NOISES, Options, Row, Table
from jaxinv.reporting.figures import style as ps

NONE = 1e-4  # where on the axis no noise stands


def figure(asked: Options) -> None:
    """Leakage by identification, by PSNR and its ceiling, against the noise."""
    named, bounded = Table(asked, "noise").rows, Table(asked, "ceiling").rows
    ps.save(draw(named, bounded, asked.victims, asked.batches), asked.out / "leakage", ("png",))


@ps.styled
def draw(
    named: list[Row],
    bounded: list[Row],
    victims: list[str],
    batches: list[int],
    width: float = ps.WIDE,
) -> Figure:
    """Draws a row of panels for each victim over the variance of the noise: names, and decibels."""
    colors = dict(zip(batches, ps.cell_colors(len(batches))))
    keys = [ps.Key("line", c, "1 image" if b == 1 else f"{b} images") for b, c in colors.items()]
    heading = ps.Heading(
        "Noise takes the pixels long before it takes the names",
        "Left: images of an update named among 2,000 candidates, 95% intervals. Right: PSNR of one "
        "image, attained by the second-order attack, and the local ceiling of an attacker with a "
        "Gaussian image prior; bars: standard deviation over images.",
        keys=[*keys, ps.Key("dash", ps.BASELINE, "ceiling")],
    )
    margins = ps.Margins(gap=0.7, above=0.3)
    sheet = ps.Sheet(
        width, heading, panels=2 * len(victims), columns=2, panel_height=1.9, margins=margins
    )
    for victim, left, right in zip(victims, sheet.axes[::2], sheet.axes[1::2]):
        for images, color in colors.items():
            rows = [r for r in named if r["victim"] == victim and r["images"] == images]
            _named(left, rows, color)
        _decibels(right, [r for r in bounded if r["victim"] == victim], colors[batches[0]])
        left.set_title(f"{victim}: named", weight="bold")
        right.set_title(f"{victim}: PSNR (dB)", weight="bold")
        for ax in (left, right):
            ax.set_xlabel("variance of the noise")
            ax.set_xticks(_place([NONE, *NOISES]), ["none", *(f"{v:g}" for v in NOISES)])
            ax.set_xlim(-4.3, 1.3)
        ps.percent_axis(left)
    return sheet.figure


def _place(variances) -> np.ndarray:
    return np.log10(np.maximum(np.asarray(variances, float), NONE))


def _named(ax: Axes, rows: list[Row], color) -> None:
    noise = [0 if r["defense"] == "none" else float(r["defense"].split(":")[1]) for r in rows]
    order = np.argsort(noise)
    value, low, high = (
        np.array([r[n] for r in rows])[order] for n in ("recall", "recall_low", "recall_high")
    )
    at = _place(noise)[order]
    ax.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
    ax.plot(at, value, color=color, linewidth=1.8, marker="o", markersize=3)


def _decibels(ax: Axes, rows: list[Row], color) -> None:
    variances = sorted({r["variance"] for r in rows})
    for name, style in (
        ("attained", {"color": color, "marker": "o", "markersize": 3}),
        ("ceiling", {"color": ps.BASELINE, "linestyle": (0, (4, 2.5))}),
    ):
        values = [np.array([r[name] for r in rows if r["variance"] == v]) for v in variances]
        mean, spread = ([f(x) for x in values] for f in (np.mean, np.std))
        ax.errorbar(_place(variances), mean, spread, linewidth=1.8, elinewidth=0.8, **style)
    if rows:
        ax.set_ylim(0, None)
