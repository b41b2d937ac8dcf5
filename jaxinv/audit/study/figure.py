"""Figure: what noise leaves of an update, by names and by pixels."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxinv.audit.study.scene import NOISES, Options, Row, Table
from jaxinv.networks import NETWORKS
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.statistics import target_interval
from jaxinv.settings.naming import network_text, victim_text

NONE = 1e-4  # where on the axis no noise stands
LABELS = {0: "0", 1e-3: ps.power_of_ten(-3), 1e-1: ps.power_of_ten(-1), 10: "10"}  # have room
COLUMNS = 4


def figure(asked: Options) -> None:
    """Leakage by identification, by PSNR and its ceiling, against the noise."""
    named, bounded = Table(asked, "noise").rows, Table(asked, "ceiling").rows
    ps.save(draw(named, bounded, asked.victims, asked.batches), asked.out / "leakage", ("png",))


@ps.styled
def draw(
    named: list[Row],
    bounded: list[Row],
    victims: Sequence[str],
    batches: Sequence[int],
    width: float = ps.WIDE,
) -> Figure:
    """Draws names and decibels over the variance of the noise: a panel for each victim's rows."""
    colors = dict(zip(batches, ps.cell_colors(len(batches))))
    of_names = [v for v in victims if any(r["victim"] == v for r in named)]
    noises = {v: {r["variance"] for r in bounded if r["victim"] == v} for v in victims}
    of_pixels = [v for v in victims if len(noises[v]) > 1]  # a curve, not a point
    keys = [ps.Key("line", c, "1 image" if b == 1 else f"{b} images") for b, c in colors.items()]
    heading = ps.Heading(
        "On trained networks names outlast pixels under noise",
        "Named: images of an update that are named among 2,000 candidates. PSNR: mean over images "
        "of what the strongest attack on such a network attains, and of the local ceiling of an "
        "attacker with a Gaussian image prior. Bands and bars: 95% intervals.",
        keys=[
            *keys,
            ps.Key("dash", ps.BASELINE, "ceiling"),
            ps.Key("thin", ps.FAINT, "the prior's mean image"),
        ],
    )
    sheet = ps.Sheet(
        width,
        heading,
        panels=len(of_names) + len(of_pixels),
        columns=COLUMNS,
        panel_height=1.75,
        margins=ps.Margins(left=0.62, gap=0.36, above=0.42),
    )
    axes = list(sheet.axes)
    for ax, victim in zip(axes, of_names):
        for images, color in colors.items():
            rows = [r for r in named if r["victim"] == victim and r["images"] == images]
            _named(ax, rows, color)
        _name(ax, victim, "images named")
        ps.percent_axis(ax)
        ax.tick_params(labelleft=sheet.is_first(axes.index(ax)))
    for ax, victim in zip(axes[len(of_names) :], of_pixels):
        _decibels(ax, [r for r in bounded if r["victim"] == victim], colors[batches[0]])
        _name(ax, victim, "PSNR of one image (dB)")
    for ax in axes:
        ax.set_xlabel("variance of the noise")
        ax.set_xticks(_place([0, *NOISES]), [LABELS.get(noise, "") for noise in (0, *NOISES)])
        ax.set_xlim(-4.3, 1.3)
    return sheet.figure


def _name(ax: Axes, victim: str, what: str) -> None:
    """Sets over a panel what it is of: `convnet-w16-cifar10` is trained, `convnet:16` is not."""
    model, _, width = victim.partition(":")
    is_drawn = model in NETWORKS
    name = f"{network_text(model, width or None)} untrained" if is_drawn else victim_text(victim)
    ax.set_title(f"{name}\n{what}", size=8.2)


def _place(variances) -> np.ndarray:
    return np.log10(np.maximum(np.asarray(variances, float), NONE))


def _named(ax: Axes, rows: list[Row], color) -> None:
    noise = [0 if r["defense"] == "none" else float(r["defense"].split(":")[1]) for r in rows]
    order = np.argsort(noise)
    value, low, high = (
        np.array([r[n] for r in rows])[order] for n in ("recall", "recall_low", "recall_high")
    )
    at, noisy = _place(noise)[order], np.sort(noise) > 0
    look = {"color": color, "marker": "o", "markersize": 3}
    ax.fill_between(at[noisy], low[noisy], high[noisy], color=color, alpha=0.15, linewidth=0)
    ax.plot(at[noisy], value[noisy], linewidth=1.8, **look)
    # No noise is no decade below the least: its point stands apart.
    below = np.stack([value - low, high - value])[:, ~noisy]
    ax.errorbar(at[~noisy], value[~noisy], below, linewidth=0, elinewidth=1.2, **look)


def _decibels(ax: Axes, rows: list[Row], color) -> None:
    variances = sorted({r["variance"] for r in rows})
    for name, style in (
        ("attained", {"color": color, "marker": "o", "markersize": 3}),
        ("ceiling", {"color": ps.BASELINE, "linestyle": (0, (4, 2.5))}),
    ):
        values = [np.array([r[name] for r in rows if r["variance"] == v]) for v in variances]
        mean, low, high = np.array([target_interval(x) for x in values]).T
        bars = [mean - low, high - mean]
        ax.errorbar(_place(variances), mean, bars, linewidth=1.8, elinewidth=1.2, **style)
    ax.axhline(np.mean([r["prior"] for r in rows]), color=ps.FAINT, linewidth=0.9)
    ax.set_ylim(10, None)
