"""Section: truth beside reconstructions."""

import numpy as np
from matplotlib.figure import Figure

from jaxinv.reporting.consensus import quarter
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.figures.panels import averages, held_fixed, shown_cells
from jaxinv.reporting.figures.pictures import Grid, Pictures, bands_of, places, read_album, tile
from jaxinv.reporting.section import Section
from jaxinv.reporting.study import CellSummary, StudySummary
from jaxinv.reporting.wording import number_text


@ps.styled
def reconstructions(study: StudySummary, width: float = ps.WIDE) -> Figure:
    """Draws truth and the attacker's pick; where there is room the consensus and the worst seed."""
    cells, album = shown_cells(study), read_album(study)
    full = len(cells) <= 3 and width > 6 and len(study.cells[0].seeds) > 2
    seeds = max(len(c.seeds) for c in cells)
    averaged = quarter(seeds)
    # The best quarter of up to four seeds is the pick, which is there already.
    views = ["pick", "consensus" if averaged > 1 else "median", "worst"] if full else ["pick"]
    explain = ""
    if full:
        explain = "pick: the attacker's choice, the seed with the lowest objective. "
    elif seeds > 1:
        explain = "The attacker's choice, the seed with the lowest objective. "
    if "consensus" in views:
        explain += f"consensus: the mean image of the {averaged} with the lowest objectives. "
        explain += "worst: the seed of lowest PSNR, for comparison. "
    elif full:
        explain += "median, worst: seeds ranked by PSNR, for comparison. "
    several = any(len(pictures.truth) > 1 for pictures in album.values())
    of_images = ", the mean over all images of a target" if several else ""
    bands = bands_of(cells, 6 if width > 6 else 3)
    grid = Grid(
        study,
        width,
        "Truth beside reconstruction",
        f"{held_fixed(study)}{explain}Numbers: PSNR in dB{of_images}; under the truth, that of an "
        "image of the mean color.",
        bands,
        views,
        album,
        caption=0.2,
    )
    for place, group, cell, target, pictures in places(grid, bands, album, baselines=True):
        at = cell.target_ids.index(target)
        for column, view in enumerate(views):
            pixels, psnr = _shown(cell, at, pictures, view)
            if pixels is None:
                grid.blank(place, group, column, "failed")
                continue
            bold = full and view in ("pick", "consensus")
            grid.image(place, group, column, tile(pixels), number_text(psnr, 1), bold)
    return grid.sheet.figure


def _shown(
    cell: CellSummary, target: int, pictures: Pictures, view: str
) -> tuple[np.ndarray | None, float]:
    """Images and PSNR of a view; none where all, or the seed to be shown, failed.

    Failed seeds rank worst, the median is the lower one.
    """
    if view == "consensus" and not pictures.failed.all():
        return pictures.consensus, cell.consensus.first_draw[target]
    of_draw = cell.psnr[target, : len(cell.seeds)]
    ranked = np.argsort(np.nan_to_num(of_draw, nan=-np.inf), kind="stable")
    found = {
        "pick": int(cell.pick_seed[target]),
        "consensus": -1,
        "median": int(ranked[(len(ranked) - 1) // 2]),
        "worst": int(ranked[0]),
    }
    seed = found[view]
    if seed < 0 or pictures.failed[seed]:
        return None, np.nan
    return pictures.reconstructions[seed], cell.psnr[target, seed]


def _caption(study: StudySummary) -> str:
    words = "Pictures are enlarged without smoothing, from 8-bit pixels."
    if averages(study.cells):
        words += (
            " A mean image is blurred where its seeds disagree, which squared error, and so PSNR, "
            "favors."
        )
    return words


SECTION = Section(
    name="reconstructions",
    title="What was recovered",
    draw=reconstructions,
    alt="Truth beside reconstructions, a row per target.",
    caption=_caption,
)
