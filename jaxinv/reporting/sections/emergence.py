"""Section: how the attacker's picks come out of their first images, as a film strip and moving."""

import io
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from matplotlib.figure import Figure
from PIL import Image

from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.figures.pictures import tile
from jaxinv.reporting.section import Section
from jaxinv.reporting.study import CellSummary, StudySummary
from jaxinv.reporting.wording import number_text

MOST_TARGETS = 4
COLUMNS = {True: 8, False: 4}  # pictures of the way on a wide sheet, on a phone
GAP = 0.06  # inches between pictures
SIDE = 96  # pixels of a picture in the animation, at least
MILLISECONDS, LAST = 350, 2500  # that a picture of the animation stands; the last one


class Way(NamedTuple):
    """The picks of one cell on their way, the end included."""

    cell: CellSummary
    steps: Int[np.ndarray, " frame"]
    frames: UInt8[np.ndarray, "target frame image height width channel"]
    truths: UInt8[np.ndarray, "target image height width channel"]


@lru_cache(maxsize=1)  # a report is of one study
def read_way(study: StudySummary) -> Way | None:
    """The way of the cell with the highest mean PSNR, of one draw a target; None without any."""
    ranked = sorted(
        study.cells, key=lambda c: np.nan_to_num(c.mean.mean, nan=-np.inf), reverse=True
    )
    for cell in ranked:
        extras = cell.extras()
        if "frames" not in extras or not extras["frames"].shape[1]:
            continue
        pictures = cell.pictures()
        first = [list(pictures.target_ids).index(target) for target in cell.target_ids]
        kept = [
            (at, int(pick)) for at, pick in zip(first[:MOST_TARGETS], cell.pick_seed) if pick >= 0
        ]
        if kept:
            rows, picks = map(list, zip(*kept))
            ends = pictures.reconstructions[rows, picks][:, None]
            frames = np.concatenate([extras["frames"][rows], ends], axis=1)
            steps = np.append(extras["frame_steps"][0], cell.asked["iterations"])
            return Way(cell, steps.astype(int), frames, pictures.truths[rows])
    return None


@ps.styled
def emergence(study: StudySummary, width: float = ps.WIDE) -> Figure:
    """Draws a row of pictures per target, from the first image to the end, and the truth."""
    way = read_way(study)
    most = COLUMNS[width > 6]
    chosen = np.unique(np.linspace(0, len(way.steps) - 1, most).round().astype(int))
    columns = len(chosen) + 1
    size = min(1.1, (width - 0.4 - GAP * (columns - 1) - 0.08) / columns)
    tall = size * tile(way.truths[0]).shape[0] / tile(way.truths[0]).shape[1]
    sheet = ps.Sheet(
        width,
        ps.Heading(
            "How the image emerges",
            f"The attacker's pick at {way.cell.heading}, by steps taken; at the right the truth.",
        ),
        panel_height=len(way.truths) * (tall + GAP),
        margins=ps.Margins(bottom=0.02),
    )
    sheet.axes[0].remove()
    top = sheet.head + 0.27
    for column, frame in enumerate([*chosen, None]):
        x = 0.2 + column * (size + GAP) + (0.08 if frame is None else 0)
        name = "truth" if frame is None else number_text(float(way.steps[frame]), 0)
        sheet.text(
            x + size / 2, top - 0.05, name, size=8.2, ha="center", va="bottom", color=ps.MUTED
        )
        for row in range(len(way.truths)):
            images = way.truths[row] if frame is None else way.frames[row, frame]
            panel = sheet.panel(x, top + row * (tall + GAP), size, tall)
            panel.imshow(_rgb(images), interpolation="none")
            panel.axis("off")
    return sheet.figure


def _rgb(
    images: UInt8[np.ndarray, "image height width channel"],
) -> UInt8[np.ndarray, "height width 3"]:
    """A target's images in a square, in three colors."""
    tiled = np.round(255 * tile(images / 255)).astype(np.uint8)
    return tiled.repeat(3, axis=-1) if tiled.shape[-1] == 1 else tiled


def animation(study: StudySummary) -> bytes:
    """The targets' pictures beside one another, truths below, frame by frame: a GIF."""
    way = read_way(study)
    truths = np.concatenate([_rgb(images) for images in way.truths], axis=1)
    scale = max(1, -(-SIDE // (truths.shape[1] // len(way.truths))))
    shown = []
    for frame in range(len(way.steps)):
        row = np.concatenate([_rgb(images) for images in way.frames[:, frame]], axis=1)
        pixels = np.concatenate([row, truths]).repeat(scale, axis=0).repeat(scale, axis=1)
        shown.append(Image.fromarray(pixels))
    stand = [MILLISECONDS] * (len(shown) - 1) + [LAST]
    file = io.BytesIO()
    shown[0].save(file, "GIF", save_all=True, append_images=shown[1:], duration=stand, loop=0)
    return file.getvalue()


SECTION = Section(
    name="emergence",
    title="What was recovered",
    when=lambda study: read_way(study) is not None,
    draw=emergence,
    animate=animation,
    alt="The attacker's picks after ever more steps, and the truth, a row per target.",
    caption="Pictures of the cell with the highest mean PSNR, kept on the way.",
)
