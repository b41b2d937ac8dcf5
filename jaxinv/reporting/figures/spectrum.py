"""Figure of a polish's spectra: how well an update pins each direction of the image down."""

import numpy as np
from matplotlib.figure import Figure

from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.study import Study

MOST_TARGETS = 4  # whose directions are shown
SHOWN = 4  # directions of each


def has_spectra(study: Study) -> bool:
    """Whether any cell was polished."""
    return any("values" in study.run.extras(cell.number) for cell in study.cells)


@ps.styled
def spectrum(study: Study, width: float = ps.WIDE) -> Figure:
    """Draws the singular values of each target, and its least determined directions."""
    found = [(cell, study.run.extras(cell.number)) for cell in study.cells]
    cells = [(cell, extras) for cell, extras in found if "values" in extras][: ps.MOST_CELLS]
    colors = ps.cell_colors(len(cells))
    first = cells[0][1]["directions"][:MOST_TARGETS, :SHOWN]
    rows, columns = len(first), first.shape[1]
    tile = 0.62 if width > 6 else 0.5
    pictures = columns * (tile + 0.06)
    height = max(2.2, rows * (tile + 0.06))
    sheet = ps.Sheet(
        width,
        "What the update pins down",
        "Singular values of the update's derivative with respect to the image at the end of the "
        "polish, relative to the largest, a line per target. At the right the directions of the "
        f"{columns} smallest, a row per target of the first setting: what could be added to the "
        "image with the least change of the update.",
        panel_height=height,
        left=0.72,
        right=0.3 + pictures,
        keys=[ps.Key("line", color, cell.label) for color, (cell, _) in zip(colors, cells)],
    )
    ax = sheet.axes[0]
    for color, (_, spectra) in zip(colors, cells):
        for values in spectra["values"]:
            relative = np.maximum(values / values[0], 1e-9)
            ax.plot(np.arange(1, len(values) + 1), relative, color=color, linewidth=1, alpha=0.7)
    ax.set_yscale("log")
    ax.set_xlabel("direction")
    ax.set_ylabel("singular value / largest")
    for row, directions in enumerate(first):
        for column, direction in enumerate(directions):
            x = width - 0.1 - pictures + column * (tile + 0.06)
            panel = sheet.panel(x, sheet.head + 0.27 + row * (tile + 0.06), tile, tile)
            image = direction[0] / (2 * np.abs(direction[0]).max()) + 0.5
            panel.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray")
            panel.axis("off")
    return sheet.figure
