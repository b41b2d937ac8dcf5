"""Section: an attack's own error bars, each pixel's standard deviation, and whether it holds."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from scipy.special import ndtri

from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.figures.pictures import color_bar, tile
from jaxinv.reporting.section import Section
from jaxinv.reporting.study import CellSummary, StudySummary, choose_evenly

MOST_TARGETS = 4  # whose pictures are shown
GAP = 0.06  # inches between pictures
NOMINAL = np.linspace(0.02, 0.98, 49)  # coverages of which the observed ones are drawn


class Posterior(NamedTuple):
    """What one cell's attack says of its best seed on every update; pixels, not clipped."""

    truth: Float[np.ndarray, "update image height width channel"]
    best: Float[np.ndarray, "update image height width channel"]
    std: Float[np.ndarray, "update image height width channel"]

    @property
    def error(self) -> Float[np.ndarray, "update image height width channel"]:
        """What the pixels are off by."""
        return np.abs(self.best - self.truth)


@lru_cache(maxsize=1)  # a report is of one study
def read_posteriors(study: StudySummary) -> list[tuple[CellSummary, Posterior]]:
    """The cells whose attack gave standard deviations, with them."""
    found = []
    for cell in study.cells:
        extras = cell.extras()
        if "std" in extras:
            truths = cell.pictures().truths[: len(extras["std"])] / 255
            orders = [_order(*pair) for pair in zip(truths, extras["best"])]
            own = (
                np.stack([x[o] for x, o in zip(extras[name], orders)]) for name in ("best", "std")
            )
            found.append((cell, Posterior(truths, *own)))
    return found


def _order(truths: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Where in a batch the image stands that is taken for each truth."""
    distances = np.square(truths[:, None] - images).mean(axis=(2, 3, 4))
    return linear_sum_assignment(distances)[1]


def coverage(posterior: Posterior) -> Float[np.ndarray, " nominal"]:
    """The share of pixels within the central interval of each nominal coverage."""
    widths = ndtri((1 + NOMINAL) / 2)
    return np.array([np.mean(posterior.error <= w * posterior.std) for w in widths])


@ps.styled
def posterior(study: StudySummary, width: float = ps.WIDE) -> Figure:
    """Draws truth, image, standard deviation and error, and the observed coverage of intervals."""
    return draw_posteriors(read_posteriors(study), width)


@ps.styled
def draw_posteriors(posteriors: Sequence[tuple[CellSummary, Posterior]], width: float) -> Figure:
    """Draws the coverage of every cell's intervals, and the pictures of one cell."""
    shown = choose_evenly(list(posteriors), ps.MOST_CELLS)
    colors = ps.cell_colors(len(shown))
    cell, own = shown[len(shown) // 2]
    rows, wide = min(MOST_TARGETS, len(own.truth)), width > 6
    pitch = (0.78 if wide else 0.66) + GAP
    # The pictures stand beside the curves, on a phone below them.
    beside = width - 0.62 - 0.34 - 4 * pitch if wide else width - 0.8
    height = max(rows * pitch + 0.2, 2.6) if wide else 2.2
    sheet = ps.Sheet(
        width,
        ps.Heading(
            "How sure the attack is, and whether it is right",
            "The attack's own standard deviation of each pixel (root mean square over colors) "
            f"beside what it is off by, for {cell.heading}. The curves: how many "
            "pixels lie within the interval that should hold so many; below the diagonal the "
            "attack is too sure.",
            keys=[ps.Key("line", color, cell.heading) for color, (cell, _) in zip(colors, shown)]
            + [ps.Key("dash", ps.BASELINE, "calibrated")],
        ),
        panel_height=height,
        margins=ps.Margins(
            right=width - 0.62 - beside, bottom=0.56 if wide else 1.48 + rows * pitch
        ),
    )
    _draw_coverage(sheet.axes[0], colors, [each for _, each in shown])
    left = 0.62 + beside + 0.24 if wide else 0.3
    top = sheet.head + 0.27 + (0 if wide else height + 0.62)
    _draw_pictures(sheet, own, rows, left, top, pitch)
    return sheet.figure


def _draw_coverage(ax: Axes, colors: Sequence[object], posteriors: Sequence[Posterior]) -> None:
    """Draws how many pixels lie within the intervals of each nominal coverage."""
    for color, own in zip(colors, posteriors):
        ax.plot(NOMINAL, coverage(own), color=color, linewidth=2)
    ax.plot([0, 1], [0, 1], color=ps.BASELINE, linewidth=1.2, linestyle=(0, (4, 2.5)))
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal coverage", ylabel="pixels inside")


def _draw_pictures(
    sheet: ps.Sheet, own: Posterior, rows: int, left: float, top: float, pitch: float
) -> None:
    """Draws four pictures of each of some updates, deviations and errors on one scale."""
    size = pitch - GAP
    for column, name in enumerate(("truth", "attack", "std", "error")):
        x = left + column * pitch + size / 2
        sheet.text(x, top - 0.05, name, size=8.2, ha="center", va="bottom", color=ps.MUTED)
    step = max(1, len(own.truth) // rows)  # of several draws of noise not all of one target
    shown = range(0, rows * step, step)
    heat = [[_over_colors(values[at]) for values in (own.std, own.error)] for at in shown]
    most = max(float(values.max()) for maps in heat for values in maps) or 1.0
    for row, (at, maps) in enumerate(zip(shown, heat)):
        images = [tile(np.clip(x[at], 0, 1)) for x in (own.truth, own.best)]
        for column, image in enumerate(images + maps):
            panel = sheet.panel(left + column * pitch, top + row * pitch, size, size)
            scale = {"cmap": "magma", "vmin": 0, "vmax": most} if column > 1 else {"cmap": "gray"}
            panel.imshow(image.squeeze(), interpolation="none", **scale)
            panel.axis("off")
    below = top + rows * pitch + 0.04
    color_bar(sheet, left + 2 * pitch, below, 2 * pitch - GAP, most, "in units of the pixel range")


def _over_colors(
    values: Float[np.ndarray, "image height width channel"],
) -> Float[np.ndarray, "height width"]:
    """A target's images in a square, the root mean square over colors."""
    return np.sqrt(np.square(tile(values, gap=0.0)).mean(axis=-1))


SECTION = Section(
    name="posterior",
    title="How sure the attack is",
    when=lambda study: bool(read_posteriors(study)),
    draw=posterior,
    alt="The attack's own standard deviation of each pixel beside its error, and how many pixels "
    "lie within intervals of a nominal coverage.",
    caption="From draws of the Gaussian approximation of the posterior at the attack’s last step. "
    "It knows nothing of an image that the attack took for another one.",
)
