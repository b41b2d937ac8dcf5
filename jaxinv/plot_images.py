"""Figures of pictures: truth beside reconstructions, pixelwise mean and spread over seeds."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from jaxinv import plot_style as ps
from jaxinv.plots import left_out, shown_cells
from jaxinv.summary import Cell, Study, choose_evenly, count_text, number_text

MOST_IMAGES = 4  # of one target, in a square


class Pictures(NamedTuple):
    """Pictures of one target in one cell, pixels in [0, 1]; failed seeds as flagged."""

    truth: Float[np.ndarray, "batch height width channel"]
    reconstructions: Float[np.ndarray, "seed batch height width channel"]
    failed: np.ndarray  # [seed]


Album = dict[tuple[int, int], Pictures]  # by cell number and target id


def read_album(study: Study) -> Album:
    """Reads the pictures that the figures show: some cells, the first targets, a few images."""
    album: Album = {}
    wanted = study.target_ids[: ps.MOST_TARGETS]
    for cell in shown_cells(study):
        images = study.images(cell)
        for target in wanted:
            at = np.flatnonzero(images.target_ids == target)
            if at.size and target in cell.target_ids:
                album[cell.number, target] = Pictures(
                    images.truths[at[0], :MOST_IMAGES] / 255,
                    images.reconstructions[at[0], :, :MOST_IMAGES] / 255,  # of the first draw
                    cell.failed[cell.target_ids.index(target), : len(cell.seeds)],
                )
    return album


@ps.styled
def reconstructions(study: Study, album: Album, width: float = ps.WIDE) -> Figure:
    """Draws truth, the attacker's pick, and where there is room the median and the worst seed."""
    cells = shown_cells(study)
    full = len(cells) <= 3 and width > 6 and len(study.cells[0].seeds) > 2
    views = ["pick", "median", "worst"] if full else ["pick"]
    if not full:
        cells = choose_evenly(cells, 6 if width > 6 else 3)
    targets = study.target_ids[: ps.MOST_TARGETS]
    seeds = max(len(c.seeds) for c in cells)
    explain = f"pick: the attacker's choice, the lowest objective of {count_text(seeds, 'seed')}. "
    if full:
        explain += "median, worst: seeds ranked by PSNR, for comparison. "
    grid = _Grid(
        width,
        "Truth beside reconstruction",
        f"{explain}Numbers: PSNR in dB; under the truth, that of an image of the mean colour."
        + _images_note(study)
        + left_out(study, cells, targets),
        targets,
        [(cell.label, views) for cell in cells],
        _tallest(album),
        caption=0.2,
    )
    for row, target in enumerate(targets):
        _draw_truth(grid, row, album, target, number_text(study.baseline_of(target), 1))
        for group, cell in enumerate(cells):
            if (cell.number, target) not in album:
                continue
            pictures, at = album[cell.number, target], cell.target_ids.index(target)
            for view, seed in zip(views, _seeds_of(cell, at, views)):
                if seed < 0 or pictures.failed[seed]:
                    grid.blank(row, group, views.index(view), "failed")
                    continue
                caption = number_text(cell.psnr[at, seed], 1)
                mosaic = tile(pictures.reconstructions[seed])
                grid.image(row, group, views.index(view), mosaic, caption, bold=view == "pick")
    return grid.sheet.figure


def _seeds_of(cell: Cell, target: int, views: list[str]) -> list[int]:
    """Seed positions of the views; failed seeds rank worst, the median is the lower one."""
    of_draw = cell.psnr[target, : len(cell.seeds)]
    ranked = np.argsort(np.nan_to_num(of_draw, nan=-np.inf), kind="stable")
    found = {
        "pick": int(cell.attacker_pick[target]),
        "median": int(ranked[(len(ranked) - 1) // 2]),
        "worst": int(ranked[0]),
    }
    return [found[view] for view in views]


@ps.styled
def pixel_statistics(study: Study, album: Album, width: float = ps.WIDE) -> Figure:
    """Draws each pixel's mean and standard deviation over the seeds, one scale for all."""
    cells = choose_evenly(shown_cells(study), 4 if width > 6 else 2)
    targets = study.target_ids[: ps.MOST_TARGETS]
    maps = {
        key: pixel_std(p.reconstructions)
        for key, p in album.items()
        if len(p.failed) > 1 and not p.failed.any() and key[0] in {c.number for c in cells}
    }
    top = max((float(m.max()) for m in maps.values()), default=0.0) or 1.0
    grid = _Grid(
        width,
        "Where the seeds agree",
        "Each pixel's mean over seeds, and its standard deviation in units of the pixel range "
        "[0, 1] (root mean square over colours)." + _images_note(study)
        + left_out(study, cells, targets),
        targets,
        [(cell.label, ["mean", "std"]) for cell in cells],
        _tallest(album),
        caption=0.06,
        foot=0.62,
    )  # fmt: skip
    for row, target in enumerate(targets):
        _draw_truth(grid, row, album, target, "")
        for group, cell in enumerate(cells):
            if (cell.number, target) not in album:
                continue
            pictures = album[cell.number, target]
            if pictures.failed.any():
                words = f"{pictures.failed.sum()} of {len(pictures.failed)}\nfailed"
                grid.blank(row, group, 0, words)
                grid.blank(row, group, 1, words)
                continue
            grid.image(row, group, 0, tile(pictures.reconstructions.mean(axis=0)))
            if (cell.number, target) in maps:
                heat = tile(maps[cell.number, target][..., None], gap=top)[..., 0]
                grid.image(row, group, 1, heat, limits=(0, top))
            else:
                grid.blank(row, group, 1, "one seed")
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
    """A sheet of pictures: the truth at the left, then a group of columns per cell."""

    def __init__(
        self,
        width: float,
        title: str,
        subtitle: str,
        targets: list[int],
        groups: list[tuple[str, list[str]]],
        tallest: float,
        caption: float,
        foot: float = 0.0,
    ):
        views = len(groups[0][1])
        left, gap, group_gap = 0.16, 0.05, 0.16
        used = left + 0.16 + len(groups) * (group_gap + gap * (views - 1))
        size = min((width - used) / (1 + views * len(groups)), 1.25)
        pitch = tallest * size + caption + 0.06
        labels = [ps.wrap(label, views * (size + gap), 8.8, "bold") for label, _ in groups]
        heads = 0.15 * max(map(len, labels)) + 0.06
        shows_views = views > 1
        # The sheet's one panel reserves the room; all pictures share one canvas in inches, as axes
        # for each would cost most of the drawing time.
        self.sheet = ps.Sheet(
            width,
            title,
            subtitle,
            panel_height=heads + 0.17 * shows_views + len(targets) * pitch + foot,
            bottom=0.02,
            above=0.02,
        )
        self.sheet.axes[0].remove()
        self.canvas = self.sheet.panel(0, 0, self.sheet.width, self.sheet.height)
        self.canvas.set_axis_off()
        self.canvas.set(xlim=(0, self.sheet.width), ylim=(self.sheet.height, 0), autoscale_on=False)
        self.size, self.height = size, tallest * size  # of the room of a picture
        self.caption, self.foot = caption, foot
        top = self.sheet.head + 0.06
        self.tops = [top + heads + 0.17 * shows_views + row * pitch for row in range(len(targets))]
        self.lefts = []
        x = left + size + group_gap
        for (_, names), lines in zip(groups, labels):
            for index, line in enumerate(lines):
                self.sheet.text(x, top + 0.15 * index, line, size=8.8, weight="bold", va="top")
            self.lefts.append([x + view * (size + gap) for view in range(views)])
            if shows_views:
                for name, at in zip(names, self.lefts[-1]):
                    y = top + heads + 0.02
                    self.sheet.text(at, y, name, size=8.2, va="top", color=ps.MUTED)
            x = self.lefts[-1][-1] + size + group_gap
        self.truth_left = left

    def image(
        self,
        row: int,
        group: int | None,
        view: int,
        pixels: UInt8[np.ndarray, "height width channel"] | np.ndarray,
        caption: str = "",
        bold: bool = False,
        limits: tuple[float, float] | None = None,
    ) -> None:
        """Places a picture, enlarged without smoothing or distortion; `limits`: as a heat map."""
        x = self.truth_left if group is None else self.lefts[group][view]
        y = self.tops[row]
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

    def blank(self, row: int, group: int, view: int, words: str) -> None:
        """Marks a place that has no picture, with the reason."""
        x, y = self.lefts[group][view], self.tops[row]
        frame = {"facecolor": "#f1f3f5", "edgecolor": ps.FAINT, "linewidth": 0.8}
        self.canvas.add_patch(Rectangle((x, y), self.size, self.height, **frame))
        middle = x + self.size / 2, y + self.height / 2
        self.sheet.text(*middle, words, ha="center", va="center", size=7.5, color=ps.MUTED)

    def truth_heading(self, words: str) -> None:
        """Names the column of truths, in line with the cells' labels."""
        y = self.sheet.head + 0.06
        self.sheet.text(self.truth_left, y, words, size=8.8, weight="bold", va="top")

    def color_bar(self, top: float, label: str) -> None:
        """Draws the heat maps' one scale in the foot."""
        width = min(2.6, self.sheet.width * 0.5)
        y = self.tops[-1] + self.height + self.caption + 0.12
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


def _draw_truth(grid: _Grid, row: int, album: Album, target: int, caption: str) -> None:
    """Draws a target's truth from the first cell that has it."""
    truth = next(p.truth for (_, t), p in album.items() if t == target)
    if row == 0:
        grid.truth_heading("truth")
    grid.image(row, None, 0, tile(truth), caption)


def _images_note(study: Study) -> str:
    """Says where only some images of a target are shown."""
    images = max(len(ids) for cell in study.cells for ids in cell.image_ids)
    return f" {MOST_IMAGES} of each target's {images} images." if images > MOST_IMAGES else ""
