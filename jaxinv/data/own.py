"""Images of one's own: a folder of pictures by class, or an .npz of arrays.

    photos/train/cat/1.png   photos/test/cat/9.png      splits, where there are any
    photos/cat/1.png                                    without splits: all are `test`
    photos.npz               images uint8 [example, height, width(, channel)], labels [example],
                             and where given classes [class]; or train_images, train_labels, ...

Classes are in alphabetical order, and the pictures of a class too. All have one size, and one
channel or three. What begins with a dot is no class and no picture.
"""

from pathlib import Path
from typing import Any

import numpy as np

from jaxinv.data import PICTURES, Dataset, Ids, check_split, select_ids
from jaxinv.errors import UserError
from jaxinv.files import read_npz

SPLITS = ("train", "test")
STATISTICS_EXAMPLES = 5_000  # that give mean and std


def read(name: str, split: str, ids: Ids, data_dir: str | None) -> Dataset:
    """Reads pictures of a folder or arrays of an .npz. See `jaxinv.data.load`.

    Raises:
      UserError: there are none, they cannot be read, or differ in size.
    """
    del data_dir
    path = Path(name).expanduser()
    source = _Arrays(path) if path.is_file() else _Folder(path)
    check_split(name, split, source.splits)
    labels = source.labels(split)
    chosen = select_ids(ids, len(labels), name, split)
    of_statistics = "train" if "train" in source.splits else "test"
    some = np.arange(len(source.labels(of_statistics)))[:: _stride(source, of_statistics)]
    pixels = source.images(of_statistics, some) / 255
    images = source.images(split, chosen)
    if images.shape[1:] != pixels.shape[1:]:
        raise UserError(f"--dataset {name}: images of its splits differ in size")
    axes = (0, 1, 2)
    std = np.maximum(pixels.std(axis=axes), 1 / 255)  # of a set of one color
    return Dataset(
        name,
        images,
        labels[chosen].astype(np.int32),
        chosen,
        source.classes,
        tuple(pixels.mean(axis=axes).tolist()),
        tuple(std.tolist()),
    )


def _stride(source, split: str) -> int:
    """Takes every so manieth example, from all classes, for the statistics."""
    return max(1, -(-len(source.labels(split)) // STATISTICS_EXAMPLES))


def _folders(path: Path) -> list[Path]:
    """The folders in one, but for those that other programs hide there."""
    return [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]


class _Folder:
    """Pictures in folders named by their class."""

    def __init__(self, path: Path):
        self._path = path
        below = {p.name for p in _folders(path)}
        self.splits = tuple(s for s in SPLITS if s in below) if below <= set(SPLITS) else ("test",)
        self._roots = {s: path / s if below <= set(SPLITS) else path for s in self.splits}
        folders = [p for root in self._roots.values() for p in _folders(root)]
        self.classes = tuple(sorted({p.name for p in folders}))
        self._files = {s: self._of_split(root) for s, root in self._roots.items()}
        for split, files in self._files.items():
            if not files:
                raise UserError(
                    f"--dataset {path}: no pictures for {split}; put them into folders named by "
                    "their class"
                )

    def _of_split(self, root: Path) -> list[tuple[Path, int]]:
        found = []
        for label, name in enumerate(self.classes):
            own = sorted((root / name).glob("*")) if (root / name).is_dir() else []
            seen = [p for p in own if not p.name.startswith(".")]
            found += [(p, label) for p in seen if p.suffix.lower() in PICTURES]
        return found

    def labels(self, split: str) -> np.ndarray:
        """Labels int [example]."""
        return np.array([label for _, label in self._files[split]], np.int32)

    def images(self, split: str, chosen: np.ndarray) -> np.ndarray:
        """Images uint8 [example, height, width, channel]; gray ones have one channel."""
        from PIL import Image

        images: list[np.ndarray] = []
        for position in chosen:
            file = self._files[split][position][0]
            try:
                with Image.open(file) as picture:
                    pixels = _eight_bits(picture)
            except Exception as error:  # damaged pictures raise all sorts of errors
                raise UserError(f"--dataset {file}: cannot be read ({error})") from None
            images.append(pixels[..., None] if pixels.ndim == 2 else pixels)
            if images[-1].shape != images[0].shape:
                raise UserError(
                    f"--dataset {file}: is {images[-1].shape}, others {images[0].shape}; give all "
                    "pictures one size and kind"
                )
        return np.stack(images) if images else np.zeros((0, 1, 1, 1), np.uint8)


def _eight_bits(picture: Any) -> np.ndarray:
    """A picture's pixels, uint8, of one channel where it is gray."""
    if picture.mode in ("I", "I;16"):  # of 16 bits, which Pillow would cut off at 255
        return np.round(np.clip(np.asarray(picture) / 257, 0, 255)).astype(np.uint8)
    if picture.mode == "F":
        raise ValueError("numbers without a white; give 8 or 16 bits a channel")
    mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
    return np.asarray(picture.convert(mode), np.uint8)


class _Arrays:
    """Arrays of an .npz."""

    def __init__(self, path: Path):
        try:
            arrays = read_npz(path)
        except (OSError, ValueError) as error:
            raise UserError(f"--dataset {path}: cannot be read as .npz ({error})") from None
        prefixes = {s: f"{s}_" for s in SPLITS if f"{s}_images" in arrays} or {"test": ""}
        self.splits, self._sets = tuple(prefixes), {}
        for split, prefix in prefixes.items():
            names = f"{prefix}images", f"{prefix}labels"
            if not all(name in arrays for name in names):
                raise UserError(f"--dataset {path}: needs the arrays {names[0]} and {names[1]}")
            images, labels = (arrays[name] for name in names)
            images = images[..., None] if images.ndim == 3 else images
            if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
                raise UserError(
                    f"--dataset {path}: {names[0]} must be uint8 [example, height, width, channel],"
                    f" not {images.dtype} {images.shape}"
                )
            if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
                raise UserError(
                    f"--dataset {path}: {names[1]} must be one whole number for each image"
                )
            self._sets[split] = images, labels
        last = max(int(labels.max()) for _, labels in self._sets.values())
        names = arrays.get("classes", np.arange(last + 1))
        self.classes = tuple(str(name) for name in names)
        if min(int(x.min()) for _, x in self._sets.values()) < 0 or last >= len(self.classes):
            raise UserError(f"--dataset {path}: labels must be from 0 to {len(self.classes) - 1}")

    def labels(self, split: str) -> np.ndarray:
        """Labels int [example]."""
        return self._sets[split][1]

    def images(self, split: str, chosen: np.ndarray) -> np.ndarray:
        """Images uint8 [example, height, width, channel]."""
        return self._sets[split][0][chosen]
