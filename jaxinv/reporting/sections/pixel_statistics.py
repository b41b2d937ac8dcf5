"""Section: where the seeds agree, pixel by pixel."""

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.figures.panels import shown_cells
from jaxinv.reporting.figures.pictures import Grid, bands_of, places, read_album, tile
from jaxinv.reporting.section import Section
from jaxinv.reporting.study import StudySummary


@ps.styled
def pixel_statistics(study: StudySummary, width: float = ps.WIDE) -> Figure:
    """Draws each pixel's mean and standard deviation over the seeds, one scale for all."""
    bands, album = bands_of(shown_cells(study), 4 if width > 6 else 2), read_album(study)
    drawn = {cell.number for band in bands for cell in band.cells}
    maps = {
        key: pixel_std(pictures.reconstructions)
        for key, pictures in album.items()
        if key[0] in drawn and len(pictures.failed) > 1 and not pictures.failed.any()
    }
    top = max((float(m.max()) for m in maps.values()), default=0.0) or 1.0
    grid = Grid(
        study,
        width,
        "Where the seeds agree",
        "Each pixel's mean over seeds, and its standard deviation in units of the pixel range "
        "[0, 1] (root mean square over colors).",
        bands,
        ["mean", "std"],
        album,
        caption=0.06,
        foot=0.62,
    )
    for place, group, cell, target, pictures in places(grid, bands, album, baselines=False):
        if pictures.failed.any():
            words = f"{pictures.failed.sum()} of {len(pictures.failed)}\nfailed"
            grid.blank(place, group, 0, words)
            grid.blank(place, group, 1, words)
            continue
        grid.image(place, group, 0, tile(pictures.reconstructions.mean(axis=0)))
        if (cell.number, target) in maps:
            heat = tile(maps[cell.number, target][..., None], gap=top)[..., 0]
            grid.image(place, group, 1, heat, limits=(0, top))
        else:
            grid.blank(place, group, 1, "one seed")
    if maps:
        grid.color_bar(top, "standard deviation over seeds (pixel range = 1)")
    return grid.sheet.figure


def pixel_std(
    reconstructions: Float[np.ndarray, "seed batch height width channel"],
) -> Float[np.ndarray, "batch height width"]:
    """Computes each pixel's standard deviation over seeds, root mean square over channels."""
    return np.sqrt(reconstructions.var(axis=0, ddof=1).mean(axis=-1))


SECTION = Section(
    name="pixel_statistics",
    title="What was recovered",
    when=lambda study: study.has_spread,
    draw=pixel_statistics,
    alt="Pixelwise mean and standard deviation over seeds, a row per target.",
    caption="A place with a failed seed is left empty rather than averaged over the others. One "
    "color scale for all.",
)
