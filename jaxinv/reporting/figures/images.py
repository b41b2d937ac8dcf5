"""Figures of pictures: truth beside reconstructions, pixelwise mean and spread over seeds."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from jaxinv.reporting import consensus
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.figures.seeds import left_out, shown_cells
from jaxinv.reporting.study import Cell, Study, choose_evenly, count_text, number_text

MOST_IMAGES = 4  # of one target, in a square


class Pictures(NamedTuple):
    """Pictures of one target in one cell, pixels in [0, 1]; failed seeds as flagged."""

    truth: Float[np.ndarray, "batch height width channel"]
    reconstructions: Float[np.ndarray, "seed batch height width channel"]
    failed: np.ndarray  # [seed]
    consensus: Float[np.ndarray, "batch height width channel"]  # NaN where all failed


Album = dict[tuple[int, int], Pictures]  # by cell number and target id


class _Band(NamedTuple):
    """Cells that attack the same images, and which of those are shown."""

    cells: list[Cell]
    targets: list[int]

    def first_with(self, target: int) -> Cell:
        """The first of the cells that has finished a target."""
        return next(cell for cell in self.cells if target in cell.target_ids)


def read_album(study: Study) -> Album:
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


def _bands(cells: list[Cell], most: int) -> list[_Band]:
    """Sets cells on the same images beside one another, at most so many, those on others below."""
    groups: dict[tuple[int, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell.image_ids[0]), []).append(cell)
    rows = max(1, ps.MOST_TARGETS // len(groups))
    targets = lambda own: list(dict.fromkeys(t for c in own for t in c.target_ids))[:rows]  # noqa: E731
    shown = [choose_evenly(own, most) for own in groups.values()]
    return [_Band(own, targets(own)) for own in shown]


@ps.styled
def reconstructions(study: Study, album: Album, width: float = ps.WIDE) -> Figure:
    """Draws truth and the attacker's pick; where there is room the consensus and the worst seed."""
    cells = shown_cells(study)
    full = len(cells) <= 3 and width > 6 and len(study.cells[0].seeds) > 2
    seeds = max(len(c.seeds) for c in cells)
    averaged = consensus.quarter(seeds)
    # The best quarter of up to four seeds is the pick, which is there already.
    views = ["pick", "consensus" if averaged > 1 else "median", "worst"] if full else ["pick"]
    bands = _bands(cells, 6 if width > 6 else 3)
    explain = f"pick: the attacker's choice, the lowest objective of {count_text(seeds, 'seed')}. "
    if "consensus" in views:
        explain += f"consensus: the mean image of the {averaged} with the lowest objectives. "
        explain += "worst: the seed of lowest PSNR, for comparison. "
    elif full:
        explain += "median, worst: seeds ranked by PSNR, for comparison. "
    grid = _Grid(
        width,
        "Truth beside reconstruction",
        f"{explain}Numbers: PSNR in dB; under the truth, that of an image of the mean colour."
        + _images_note(study)
        + _left_out(study, bands),
        bands,
        views,
        _tallest(album),
        caption=0.2,
    )
    for place, group, cell, target, pictures in _places(grid, bands, album, baselines=True):
        at = cell.target_ids.index(target)
        for column, view in enumerate(views):
            pixels, psnr = _shown(cell, at, pictures, view)
            if pixels is None:
                grid.blank(place, group, column, "failed")
                continue
            bold = view in ("pick", "consensus")
            grid.image(place, group, column, tile(pixels), number_text(psnr, 1), bold)
    return grid.sheet.figure


def _shown(
    cell: Cell, target: int, pictures: Pictures, view: str
) -> tuple[np.ndarray | None, float]:
    """Images and PSNR of a view; none where all, or the seed to be shown, failed.

    Failed seeds rank worst, the median is the lower one.
    """
    if view == "consensus" and not pictures.failed.all():
        return pictures.consensus, cell.consensus.first_draw[target]
    of_draw = cell.psnr[target, : len(cell.seeds)]
    ranked = np.argsort(np.nan_to_num(of_draw, nan=-np.inf), kind="stable")
    found = {
        "pick": int(cell.attacker_pick[target]),
        "consensus": -1,
        "median": int(ranked[(len(ranked) - 1) // 2]),
        "worst": int(ranked[0]),
    }
    seed = found[view]
    if seed < 0 or pictures.failed[seed]:
        return None, np.nan
    return pictures.reconstructions[seed], cell.psnr[target, seed]


@ps.styled
def pixel_statistics(study: Study, album: Album, width: float = ps.WIDE) -> Figure:
    """Draws each pixel's mean and standard deviation over the seeds, one scale for all."""
    bands = _bands(shown_cells(study), 4 if width > 6 else 2)
    maps = {
        key: pixel_std(p.reconstructions)
        for key, p in album.items()
        if len(p.failed) > 1
        and not p.failed.any()
        and key[0] in {c.number for band in bands for c in band.cells}
    }
    top = max((float(m.max()) for m in maps.values()), default=0.0) or 1.0
    grid = _Grid(
        width,
        "Where the seeds agree",
        "Each pixel's mean over seeds, and its standard deviation in units of the pixel range "
        "[0, 1] (root mean square over colours)." + _images_note(study)
        + _left_out(study, bands),
        bands,
        ["mean", "std"],
        _tallest(album),
        caption=0.06,
        foot=0.62,
    )  # fmt: skip
    for place, group, cell, target, pictures in _places(grid, bands, album, baselines=False):
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


class _Grid:
    """A sheet of pictures: bands of rows, the truth at the left, a group of columns per cell.

    A place is the number of a band and of a row in it.
    """

    def __init__(
        self,
        width: float,
        title: str,
        subtitle: str,
        bands: list[_Band],
        views: list[str],
        tallest: float,
        caption: float,
        foot: float = 0.0,
    ):
        left, gap, group_gap = 0.16, 0.05, 0.16
        most = max(len(band.cells) for band in bands)
        used = left + 0.16 + most * (group_gap + gap * (len(views) - 1))
        size = min((width - used) / (1 + len(views) * most), 1.25)
        pitch = tallest * size + caption + 0.06
        of_cell = len(views) * (size + gap)
        labels = [[ps.wrap(c.label, of_cell, 8.8, "bold") for c in band.cells] for band in bands]
        names = 0.17 * (len(views) > 1)
        heads = [0.15 * max(map(len, own)) + 0.06 + names for own in labels]
        heights = [head + len(b.targets) * pitch for head, b in zip(heads, bands)]
        apart = 0.14  # of a band from the next
        # The sheet's one panel reserves the room; all pictures share one canvas in inches, as axes
        # for each would cost most of the drawing time.
        self.sheet = ps.Sheet(
            width,
            title,
            subtitle,
            panel_height=sum(heights) + apart * (len(bands) - 1) + foot,
            bottom=0.02,
            above=0.02,
        )
        self.sheet.axes[0].remove()
        self.canvas = self.sheet.panel(0, 0, self.sheet.width, self.sheet.height)
        self.canvas.set_axis_off()
        self.canvas.set(xlim=(0, self.sheet.width), ylim=(self.sheet.height, 0), autoscale_on=False)
        self.size, self.height = size, tallest * size  # of the room of a picture
        self.caption, self.foot = caption, foot
        self.truth_left = left
        self.tops: list[list[float]] = []
        self.lefts = [
            [
                left + size + group_gap + cell * (of_cell - gap + group_gap) + view * (size + gap)
                for view in range(len(views))
            ]
            for cell in range(most)
        ]
        top = self.sheet.head + 0.06
        for own, head, height, band in zip(labels, heads, heights, bands):
            self.sheet.text(left, top, "truth", size=8.8, weight="bold", va="top")
            for lines, columns in zip(own, self.lefts):
                for index, line in enumerate(lines):
                    y = top + 0.15 * index
                    self.sheet.text(columns[0], y, line, size=8.8, weight="bold", va="top")
                for name, x in zip(views, columns if names else ()):
                    y = top + head - names + 0.02
                    self.sheet.text(x, y, name, size=8.2, va="top", color=ps.MUTED)
            self.tops.append([top + head + row * pitch for row in range(len(band.targets))])
            top += height + apart

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
        x = self.truth_left if group is None else self.lefts[group][view]
        y = self.tops[place[0]][place[1]]
        if limits is None and pixels.shape[-1] == 1:
            pixels = pixels.repeat(3, axis=-1)
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
        x, y = self.lefts[group][view], self.tops[place[0]][place[1]]
        frame = {"facecolor": "#f1f3f5", "edgecolor": ps.FAINT, "linewidth": 0.8}
        self.canvas.add_patch(Rectangle((x, y), self.size, self.height, **frame))
        middle = x + self.size / 2, y + self.height / 2
        self.sheet.text(*middle, words, ha="center", va="center", size=7.5, color=ps.MUTED)

    def color_bar(self, top: float, label: str) -> None:
        """Draws the heat maps' one scale in the foot."""
        width = min(2.6, self.sheet.width * 0.5)
        y = self.tops[-1][-1] + self.height + self.caption + 0.12
        ax = self.sheet.panel(self.truth_left + 0.1, y, width, 0.1)
        mappable = ScalarMappable(Normalize(0, top), "magma")
        bar = self.sheet.figure.colorbar(mappable, cax=ax, orientation="horizontal")
        bar.outline.set_visible(False)
        bar.ax.xaxis.set_major_locator(MaxNLocator(4))
        bar.set_label(label, size=8.2, loc="left")


def _tallest(album: Album) -> float:
    """The greatest height of a picture over its width."""
    shapes = (tile(pictures.truth).shape for pictures in album.values())
    return max(tall / wide for tall, wide, _ in shapes)


def _places(
    grid: _Grid, bands: list[_Band], album: Album, baselines: bool
) -> Iterator[tuple[tuple[int, int], int, Cell, int, Pictures]]:
    """Draws the truths, if asked with the mean colour's PSNR, and walks over what is to be drawn.

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


def _left_out(study: Study, bands: list[_Band]) -> str:
    """Says what a figure does not show."""
    cells = [cell for band in bands for cell in band.cells]
    if len(bands) == 1:
        return left_out(study, cells, bands[0].targets)
    return " Settings on the same images stand side by side." + left_out(study, cells)


def _images_note(study: Study) -> str:
    """Says where only some images of a target are shown."""
    images = max(len(ids) for cell in study.cells for ids in cell.image_ids)
    return f" {MOST_IMAGES} of each target's {images} images." if images > MOST_IMAGES else ""
