"""Builds tiles.npz, the small data set that ships with the package.

    python -m jaxinv.data.build_tiles

needs scikit-image, whose wheel carries the photographs; nothing else in the package does.
The sources and their licences are in LICENSES.md. The same inputs give the same bytes.

A tile is a square of 32 * factor pixels, averaged over factor x factor boxes to 32x32 RGB (the
average is the anti-aliasing, and it never looks outside the square). Each picture is cut at two
scales, a coarse and a fine factor. The test tiles come from the squares listed in `PICTURES`: the
whole square at the coarse factor, and the fine tiles inside it. The training tiles are all
half-overlapping tiles that touch no test square, so no pixel is in both splits, at either scale.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np

SIDE = 32
MAX_TRAIN, MAX_TEST = 96, 24  # tiles per class; keeps the file below 2 MB
MIN_STD = 12.0  # of a tile's gray values in 0..255; flatter tiles show nothing to reconstruct


class Photograph(NamedTuple):
    """One source picture, which is one class.

    `test` lists the (top, left) corners of the coarse test squares, best first. They are chosen
    by hand so that the first tile of each class shows its subject. The test split takes one tile
    of each class in turn, so its first seven tiles are the first squares in the order of
    `PICTURES`, and the eighth is the astronaut's second.
    """

    label: str
    source: str  # name of the function in skimage.data
    coarse: int
    fine: int
    test: tuple[tuple[int, int], ...]


PICTURES = (
    Photograph("astronaut", "astronaut", 6, 2, ((10, 134), (80, 320))),  # face; space shuttle
    Photograph("cat", "chelsea", 7, 1, ((60, 130),)),  # face
    Photograph("coffee", "coffee", 8, 2, ((12, 166),)),  # cup
    Photograph("rocket", "rocket", 9, 1, ((122, 180),)),  # rocket on the pad
    Photograph("retina", "retina", 12, 3, ((480, 60), (900, 700))),  # optic disc; vessels
    Photograph(
        "galaxies", "hubble_deep_field", 4, 2, ((410, 660), (360, 60), (40, 250), (680, 380))
    ),
    Photograph("tissue", "immunohistochemistry", 6, 2, ((300, 210), (60, 100))),  # two glands
)


def downscale(square: np.ndarray, factor: int) -> np.ndarray:
    """Averages uint8 [32 * factor, 32 * factor, 3] over boxes, to uint8 [32, 32, 3]."""
    boxes = square.reshape(SIDE, factor, SIDE, factor, 3)
    # Integers throughout, rounding halves up: the bytes do not depend on the machine.
    total = boxes.sum(axis=(1, 3), dtype=np.int64)
    return ((total + factor**2 // 2) // factor**2).astype(np.uint8)


def corners(height: int, width: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Top left corners of the squares of `size` pixels that fit, row by row."""
    return [
        (top, left)
        for top in range(0, height - size + 1, stride)
        for left in range(0, width - size + 1, stride)
    ]


def test_squares(picture: Photograph) -> list[tuple[int, int, int]]:
    """(top, left, factor) of the test tiles: coarse squares first, then the fine ones inside."""
    size, fine = SIDE * picture.coarse, SIDE * picture.fine
    return [(top, left, picture.coarse) for top, left in picture.test] + [
        (top + dy, left + dx, picture.fine)
        for top, left in picture.test
        for dy, dx in corners(size, size, fine, fine)
    ]


def train_squares(picture: Photograph, height: int, width: int) -> list[tuple[int, int, int]]:
    """(top, left, factor) of the tiles that share no pixel with a test square."""
    reserved = SIDE * picture.coarse

    def is_free(top, left, size):
        return all(
            top + size <= y or y + reserved <= top or left + size <= x or x + reserved <= left
            for y, x in picture.test
        )

    return [
        (top, left, factor)
        for factor in (picture.coarse, picture.fine)
        for top, left in corners(height, width, SIDE * factor, SIDE * factor // 2)
        if is_free(top, left, SIDE * factor)
    ]


def cut(image: np.ndarray, squares: list[tuple[int, int, int]], limit: int) -> np.ndarray:
    """Tiles uint8 [tile, 32, 32, 3] of the squares that are not flat, evenly thinned to `limit`."""
    tiles = [
        downscale(image[top : top + SIDE * factor, left : left + SIDE * factor], factor)
        for top, left, factor in squares
    ]
    tiles = np.stack([tile for tile in tiles if tile.mean(axis=2).std() >= MIN_STD])
    return tiles[np.linspace(0, len(tiles) - 1, min(limit, len(tiles))).astype(int)]


def interleave(classes: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Takes one tile of each class in turn; returns images and int32 labels."""
    labels = np.concatenate([np.full(len(tiles), i) for i, tiles in enumerate(classes)])
    turns = np.concatenate([np.arange(len(tiles)) for tiles in classes])
    order = np.lexsort((labels, turns))
    return np.concatenate(classes)[order], labels[order].astype(np.int32)


def build() -> dict[str, np.ndarray]:
    """The arrays of tiles.npz: images and labels of both splits, classes, channel statistics."""
    import skimage.data

    train, test = [], []
    for picture in PICTURES:
        image = getattr(skimage.data, picture.source)()
        train.append(cut(image, train_squares(picture, *image.shape[:2]), MAX_TRAIN))
        test.append(cut(image, test_squares(picture), MAX_TEST))
    train_images, train_labels = interleave(train)
    test_images, test_labels = interleave(test)
    return {
        "train_images": train_images,
        "train_labels": train_labels,
        "test_images": test_images,
        "test_labels": test_labels,
        "classes": np.array([picture.label for picture in PICTURES]),
        "mean": (train_images / 255).mean(axis=(0, 1, 2)).round(6),
        "std": (train_images / 255).std(axis=(0, 1, 2)).round(6),
    }


def main() -> None:
    """Writes the file and prints what it holds."""
    parser = argparse.ArgumentParser(description="Build the data set that ships with the package.")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("tiles.npz"))
    out = parser.parse_args().out
    arrays = build()
    np.savez_compressed(out, **arrays)
    for split in ("train", "test"):
        counts = np.bincount(arrays[f"{split}_labels"])
        print(split, dict(zip(arrays["classes"].tolist(), counts.tolist())))
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
