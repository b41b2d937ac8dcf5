"""Section: how well an update pins each direction of the image down, after a polish."""

from functools import lru_cache

import numpy as np
from matplotlib.figure import Figure

from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.section import Section
from jaxinv.reporting.study import CellSummary, StudySummary

MOST_TARGETS = 4  # whose directions are shown
RANKS = ("smallest", "2nd", "3rd", "4th")  # singular values whose directions are shown


@lru_cache(maxsize=1)  # a report is of one study
def read_spectra(study: StudySummary) -> list[tuple[CellSummary, dict[str, np.ndarray]]]:
    """The cells that were polished, with their spectra."""
    found = [(cell, cell.extras()) for cell in study.cells]
    return [(cell, extras) for cell, extras in found if "values" in extras]


@ps.styled
def spectrum(study: StudySummary, width: float = ps.WIDE) -> Figure:
    """Draws the singular values of each target, and its least determined directions."""
    cells = read_spectra(study)[: ps.MOST_CELLS]
    colors = ps.cell_colors(len(cells))
    first = cells[0][1]["directions"][:MOST_TARGETS, : len(RANKS)]
    rows, columns = len(first), first.shape[1]
    size = 0.62 if width > 6 else 0.5
    pitch = size + 0.06
    sheet = ps.Sheet(
        width,
        ps.Heading(
            "What the update pins down",
            "Singular values of the update's derivative with respect to the image at the end of "
            "the polish, relative to the largest, a line per target. At the right the directions "
            f"of the {columns} smallest, a row per target of the first setting: what could be "
            "added to the image with the least change of the update.",
            keys=[ps.Key("line", color, cell.heading) for color, (cell, _) in zip(colors, cells)],
        ),
        panel_height=max(2.2, rows * pitch),
        margins=ps.Margins(left=0.72, right=0.3 + columns * pitch),
    )
    ax = sheet.axes[0]
    for color, (_, spectra) in zip(colors, cells):
        for values in spectra["values"]:
            relative = np.maximum(values / values[0], 1e-9)
            ax.plot(np.arange(1, len(values) + 1), relative, color=color, linewidth=1, alpha=0.7)
    ax.set_yscale("log")
    ps.log_ticks(ax.yaxis)
    ax.set_xlabel("direction")
    ax.set_ylabel("singular value / largest")
    left, top = width - 0.1 - columns * pitch, sheet.head + 0.27
    for column, name in enumerate(RANKS[:columns]):
        x = left + column * pitch + size / 2
        sheet.text(x, top - 0.05, name, size=7.4, ha="center", va="bottom", color=ps.MUTED)
    for row, directions in enumerate(first):
        for column, direction in enumerate(directions):
            panel = sheet.panel(left + column * pitch, top + row * pitch, size, size)
            image = direction[0] / (2 * np.abs(direction[0]).max()) + 0.5
            panel.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray")
            panel.axis("off")
    return sheet.figure


SECTION = Section(
    name="spectrum",
    title="What the update pins down",
    when=lambda study: bool(read_spectra(study)),
    draw=spectrum,
    alt="Singular values of the update's derivative by the image, and pictures of the directions "
    "it pins down least.",
    caption="Singular values below about 10⁻⁸ of the largest are rounding: they are square roots "
    "of the eigenvalues of JᵀJ. Pictures: gray is no change.",
)
