"""Sheets of pictures: a row per target, the truth at the left, a group of columns per cell."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from jaxinv.reporting import consensus
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.figures.panels import left_out, shown_cells
from jaxinv.reporting.study import CellSummary, StudySummary, choose_evenly, targets_of
from jaxinv.reporting.wording import number_text

MOST_IMAGES = 4  # of one target, in a square
# Inches: the margins, between the views of a cell, between cells, strands and bands.
LEFT, GAP, GROUP_GAP, STRAND_GAP, BAND_GAP = 0.16, 0.05, 0.16, 0.36, 0.14
LARGEST = 1.25  # inches of a picture of one image
SMALLEST = {True: 0.64, False: 0.8}  # where strands stand side by side, on wide and narrow sheets


class Pictures(NamedTuple):
    """Pictures of one target in one cell, pixels in [0, 1]; failed seeds as flagged."""

    truth: Float[np.ndarray, "batch height width channel"]
    reconstructions: Float[np.ndarray, "seed batch height width channel"]
    failed: np.ndarray  # [seed]
    consensus: Float[np.ndarray, "batch height width channel"]  # NaN where all failed


Album = dict[tuple[int, int], Pictures]  # by cell number and target id


class Band(NamedTuple):
    """Cells that attack the same images, and which of those are shown."""

    cells: list[CellSummary]
    targets: list[int]

    def first_with(self, target: int) -> CellSummary:
        """The first of the cells that has finished a target."""
        return next(cell for cell in self.cells if target in cell.target_ids)


@lru_cache(maxsize=1)  # a report is of one study
def read_album(study: StudySummary) -> Album:
    """Reads the pictures that the figures show: some cells, the first targets, a few images."""
    album: Album = {}
    for cell in shown_cells(study):
        images = cell.pictures()
        for target in cell.target_ids[: ps.MOST_TARGETS]:
            for first in cell.trials(images, target)[:1]:  # draw of noise
                album[cell.number, target] = Pictures(
                    first.truth[:MOST_IMAGES] / 255,
                    first.pictures[:, :MOST_IMAGES] / 255,
                    cell.failed[cell.target_ids.index(target), : len(cell.seeds)],
                    consensus.mean_image(first)[:MOST_IMAGES],
                )
    return album


def bands_of(cells: list[CellSummary], most: int) -> list[Band]:
    """Sets cells on the same images beside one another, at most so many, those on others below."""
    groups: dict[tuple, list[CellSummary]] = {}
    for cell in cells:
        groups.setdefault(cell.attacked[0], []).append(cell)
    rows = max(1, ps.MOST_TARGETS // len(groups))
    shown = [choose_evenly(own, most) for own in groups.values()]
    return [Band(own, targets_of(own)[:rows]) for own in shown]


def tile(
    images: Float[np.ndarray, "batch height width channel"], gap: float = 1.0
) -> Float[np.ndarray, "height width channel"]:
    """Sets a target's images in a square with one pixel of `gap` between them."""
    batch, height, width, channels = images.shape
    columns = int(np.ceil(np.sqrt(batch)))
    rows = -(-batch // columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), gap)
    for index, image in enumerate(images):
        y, x = (index // columns) * (height + 1), (index % columns) * (width + 1)
        sheet[y : y + height, x : x + width] = image
    return sheet


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Pixels [height, width, channel] in three channels, gray ones in three equal ones."""
    return pixels.repeat(3, axis=-1) if pixels.shape[-1] == 1 else pixels


class Shape(NamedTuple):
    """How the targets of a band are set: in strands beside each other, of so many rows."""

    across: int
    rows: int
    size: float  # inches of a picture's room


def shape_of(targets: int, cells: int, views: int, width: float, largest: float = LARGEST) -> Shape:
    """Chooses the number of strands that uses most of the width, pictures kept readable.

    Args:
      targets: rows to be set.
      cells: groups of columns of each strand, beside the truth.
      views: columns of each group.
      width: inches of the sheet.
      largest: inches that a picture may have.
    """
    shapes = []
    for across in range(1, targets + 1):
        rows = -(-targets // across)
        gaps = across * cells * (GROUP_GAP + GAP * (views - 1)) + (across - 1) * STRAND_GAP
        size = min(largest, (width - 2 * LEFT - gaps) / (across * (1 + views * cells)))
        is_full = (across - 1) * rows < targets  # no strand is empty
        if across == 1 or (is_full and size >= SMALLEST[width > 6]):
            shapes.append(Shape(across, rows, size))
    return max(shapes, key=lambda shape: shape.across * shape.size)


class Grid:
    """A sheet of pictures: bands of rows, the truth at the left, a group of columns per cell.

    A place is the number of a band and of a target in it. Where a band has few columns, its rows
    are set in strands side by side.

    Args:
      study: whose targets these are.
      width: inches.
      title: heading of the figure.
      subtitle: below the heading, before what the sheet leaves out.
      bands: what is shown.
      views: names of each cell's columns.
      album: the pictures.
      caption: inches below a picture.
      foot: inches below all of them.
    """

    def __init__(
        self,
        study: StudySummary,
        width: float,
        title: str,
        subtitle: str,
        bands: list[Band],
        views: list[str],
        album: Album,
        caption: float,
        foot: float = 0.0,
    ):
        tallest, largest = _tallest(album), LARGEST * (1.5 if _is_tiled(album) else 1)
        self.shapes = [
            shape_of(len(b.targets), len(b.cells), len(views), width, largest) for b in bands
        ]
        self.size = min(shape.size for shape in self.shapes)
        self.height, self.caption, self.views = tallest * self.size, caption, len(views)
        self.pitch = self.height + caption + 0.06
        self.of_cell = len(views) * (self.size + GAP)  # inches of a cell's columns
        labels = [
            [ps.wrap_list(_heading(study, cell), self.of_cell, 8.8, "bold") for cell in band.cells]
            for band in bands
        ]
        names = 0.17 * (len(views) > 1)
        heads = [0.15 * max(map(len, own)) + 0.06 + names for own in labels]
        heights = [head + s.rows * self.pitch for head, s in zip(heads, self.shapes)]
        # The sheet's one panel reserves the room; all pictures share one canvas in inches, as axes
        # for each would cost most of the drawing time.
        self.sheet = ps.Sheet(
            width,
            ps.Heading(title, subtitle + _images_note(study) + _left_out(study, bands)),
            panel_height=sum(heights) + BAND_GAP * (len(bands) - 1) + foot,
            margins=ps.Margins(bottom=0.02, above=0.02),
        )
        self.sheet.axes[0].remove()
        self.canvas = self.sheet.panel(0, 0, self.sheet.width, self.sheet.height)
        self.canvas.set_axis_off()
        self.canvas.set(xlim=(0, self.sheet.width), ylim=(self.sheet.height, 0), autoscale_on=False)
        self.tops: list[float] = []  # of each band's first row
        self.strands = [
            self.size + len(band.cells) * (self.of_cell - GAP + GROUP_GAP) + STRAND_GAP
            for band in bands
        ]  # inches from one strand to the next
        top = self.sheet.head + 0.06
        for number, (own, head, height) in enumerate(zip(labels, heads, heights)):
            self.tops.append(top + head)
            for strand in range(self.shapes[number].across):
                self._name_columns(number, strand, own, top, views if names else ())
            top += height + BAND_GAP
        self.bottom = top - BAND_GAP

    def _name_columns(
        self, band: int, strand: int, labels: list[list[str]], top: float, views: Sequence[str]
    ) -> None:
        """Writes what stands over a strand's columns."""
        first = (band, strand * self.shapes[band].rows)
        at, row = self.position(first, None, 0)
        self.sheet.text(at, top, "truth", size=8.8, weight="bold", va="top")
        for group, lines in enumerate(labels):
            for index, line in enumerate(lines):
                x, y = self.position(first, group, 0)[0], top + 0.15 * index
                self.sheet.text(x, y, line, size=8.8, weight="bold", va="top")
            for view, name in enumerate(views):
                x, _ = self.position(first, group, view)
                self.sheet.text(x, row - 0.15, name, size=8.2, va="top", color=ps.MUTED)

    def position(self, place: tuple[int, int], group: int | None, view: int) -> tuple[float, float]:
        """Inches of a picture's upper left corner; the truth's without a group."""
        band, target = place
        strand, row = divmod(target, self.shapes[band].rows)
        x, y = LEFT + strand * self.strands[band], self.tops[band] + row * self.pitch
        if group is not None:
            x += self.size + GROUP_GAP + group * (self.of_cell - GAP + GROUP_GAP)
            x += view * (self.size + GAP)
        return x, y

    def image(
        self,
        place: tuple[int, int],
        group: int | None,
        view: int,
        pixels: UInt8[np.ndarray, "height width channel"] | np.ndarray,
        caption: str = "",
        bold: bool = False,
        limits: tuple[float, float] | None = None,
    ) -> None:
        """Places a picture, enlarged without smoothing or distortion; `limits`: as a heat map."""
        x, y = self.position(place, group, view)
        if limits is None:
            pixels = as_rgb(pixels)
        scale = {} if limits is None else {"vmin": limits[0], "vmax": limits[1], "cmap": "magma"}
        tall, wide = pixels.shape[:2]
        unit = min(self.size / wide, self.height / tall)
        extent = (x, x + unit * wide, y + unit * tall, y)
        self.canvas.imshow(pixels, interpolation="none", extent=extent, aspect="auto", **scale)
        if caption:
            self.sheet.text(
                x + unit * wide / 2,
                y + unit * tall + 0.04,
                caption,
                size=8.2,
                ha="center",
                va="top",
                weight="bold" if bold else "normal",
                color=ps.INK if bold else ps.MUTED,
            )

    def blank(self, place: tuple[int, int], group: int, view: int, words: str) -> None:
        """Marks a place that has no picture, with the reason."""
        x, y = self.position(place, group, view)
        frame = {"facecolor": "#f1f3f5", "edgecolor": ps.FAINT, "linewidth": 0.8}
        self.canvas.add_patch(Rectangle((x, y), self.size, self.height, **frame))
        middle = x + self.size / 2, y + self.height / 2
        self.sheet.text(*middle, words, ha="center", va="center", size=7.5, color=ps.MUTED)

    def color_bar(self, top: float, label: str) -> None:
        """Draws the heat maps' one scale in the foot."""
        width = min(2.6, self.sheet.width * 0.5)
        color_bar(self.sheet, LEFT + 0.1, self.bottom + 0.06, width, top, label)


def color_bar(sheet: ps.Sheet, x: float, y: float, width: float, most: float, label: str) -> None:
    """Draws the scale of heat maps from 0 to `most`, at inches from the upper left corner."""
    ax = sheet.panel(x, y, width, 0.1)
    mappable = ScalarMappable(Normalize(0, most), "magma")
    bar = sheet.figure.colorbar(mappable, cax=ax, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.xaxis.set_major_locator(MaxNLocator(4))
    bar.set_label(label, size=8.2, loc="left")


def _heading(study: StudySummary, cell: CellSummary) -> str:
    """What stands over a cell's pictures: of a single cell there is nothing to tell it from."""
    return cell.heading if len(study.cells) > 1 else "reconstruction"


def _tallest(album: Album) -> float:
    """The greatest height of a picture over its width."""
    shapes = (tile(pictures.truth).shape for pictures in album.values())
    return max(tall / wide for tall, wide, _ in shapes)


def _is_tiled(album: Album) -> bool:
    """Whether some picture is of several images."""
    return any(len(pictures.truth) > 1 for pictures in album.values())


def places(
    grid: Grid, bands: list[Band], album: Album, baselines: bool
) -> Iterator[tuple[tuple[int, int], int, CellSummary, int, Pictures]]:
    """Draws the truths, if asked with the mean color's PSNR, and walks over what is to be drawn.

    Yields place, group of columns, cell, target and its pictures.
    """
    for number, band in enumerate(bands):
        for row, target in enumerate(band.targets):
            first = band.first_with(target)
            baseline = first.baselines["baseline_psnr"][first.target_ids.index(target)]
            caption = number_text(float(baseline), 1) if baselines else ""
            grid.image((number, row), None, 0, tile(album[first.number, target].truth), caption)
            for group, cell in enumerate(band.cells):
                if (cell.number, target) in album:
                    yield (number, row), group, cell, target, album[cell.number, target]


def _left_out(study: StudySummary, bands: list[Band]) -> str:
    """Says what a figure does not show."""
    cells = [cell for band in bands for cell in band.cells]
    if len(bands) == 1:
        return left_out(study, cells, bands[0].targets)
    return " Settings on the same images stand side by side." + left_out(study, cells)


def _images_note(study: StudySummary) -> str:
    """Says where only some images of a target are shown."""
    images = max(len(ids) for cell in study.cells for ids in cell.image_ids)
    return (
        f" Shown: {MOST_IMAGES} of each target's {images} images." if images > MOST_IMAGES else ""
    )
