"""Figure of an attack's own error bars: each pixel's standard deviation, and whether it holds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from scipy.special import ndtri

from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.figures.images import tile
from jaxinv.reporting.study import Cell, Study, choose_evenly

MOST_TARGETS = 4  # whose pictures are shown
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


def read_posteriors(study: Study) -> list[tuple[Cell, Posterior]]:
    """The cells whose attack gave standard deviations, with them."""
    found = []
    for cell in study.cells:
        extras = study.run.extras(cell.number)
        if "std" in extras:
            truths = cell.pictures().truths / 255
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
def posterior(posteriors: Sequence[tuple[Cell, Posterior]], width: float = ps.WIDE) -> Figure:
    """Draws truth, image, standard deviation and error, and the observed coverage of intervals."""
    shown = choose_evenly(list(posteriors), ps.MOST_CELLS)
    colors = ps.cell_colors(len(shown))
    first = shown[len(shown) // 2][1]
    rows, wide = min(MOST_TARGETS, len(first.truth)), width > 6
    step = max(1, len(first.truth) // rows)  # of several draws of noise not all of one target
    size = 0.78 if wide else 0.66
    pictures = 4 * (size + 0.06)
    beside = width - 0.62 - 0.34 - pictures if wide else width - 0.8
    height = max(rows * (size + 0.06) + 0.2, 2.6) if wide else 2.2
    below = 0.0 if wide else rows * (size + 0.06) + 0.5
    label = shown[len(shown) // 2][0].label
    sheet = ps.Sheet(
        width,
        "How sure the attack is, and whether it is right",
        "The attack's own standard deviation of each pixel (root mean square over colours) beside "
        f"what it is off by, one scale a row, at {label}. The curves: how many pixels lie within "
        "the interval that should hold so many; below the diagonal the attack is too sure.",
        panel_height=height,
        bottom=0.48 + below,
        right=width - 0.62 - beside,
        keys=[ps.Key("line", color, cell.label) for color, (cell, _) in zip(colors, shown)]
        + [ps.Key("dash", ps.BASELINE, "calibrated")],
    )
    ax = sheet.axes[0]
    for color, (_, own) in zip(colors, shown):
        ax.plot(NOMINAL, coverage(own), color=color, linewidth=2)
    ax.plot([0, 1], [0, 1], color=ps.BASELINE, linewidth=1.2, linestyle=(0, (4, 2.5)))
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal coverage", ylabel="pixels inside")
    left = 0.62 + beside + 0.24 if wide else 0.3
    top = sheet.head + 0.27 if wide else sheet.head + 0.27 + height + 0.62
    for column, name in enumerate(("truth", "attack", "std", "error")):
        x = left + column * (size + 0.06) + size / 2
        sheet.text(x, top - 0.05, name, size=8.2, ha="center", va="bottom", color=ps.MUTED)
    for row in range(rows):
        at = row * step
        spread = lambda x, at=at: np.sqrt(np.square(tile(x[at], gap=0.0)).mean(axis=-1))  # noqa: E731
        maps = [spread(first.std), spread(first.error)]
        most = max(float(m.max()) for m in maps) or 1.0
        images = [tile(np.clip(x[at], 0, 1)) for x in (first.truth, first.best)]
        for column, image in enumerate(images + maps):
            panel = sheet.panel(
                left + column * (size + 0.06), top + row * (size + 0.06), size, size
            )
            heat = {"cmap": "magma", "vmin": 0, "vmax": most} if column > 1 else {"cmap": "gray"}
            panel.imshow(image.squeeze(), interpolation="none", **heat)
            panel.axis("off")
    return sheet.figure
