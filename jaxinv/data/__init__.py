"""Image classification sets as plain arrays, in their original order."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxinv.errors import UserError

# Name of a data set -> module with `read(name, split, ids, data_dir) -> Dataset`. A folder or an
# .npz is one's own; any other name is one of tensorflow-datasets. Modules are imported if needed.
SOURCES = {"tiles": "jaxinv.data.tiles"}
OWN_SOURCE = "jaxinv.data.own"
DEFAULT_SOURCE = "jaxinv.data.tfds"
KNOWN = "tiles, cifar10, cifar100, mnist, any other image classification set of " + (
    "tensorflow-datasets, or the path of a folder of pictures or an .npz"
)

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}  # that a folder of one's own holds

CHANNELS = (1, 3)  # of an image

Ids = Sequence[int] | int | None

# Which images make a batch, by their labels.
GROUPINGS = {
    "stored": "in stored order",
    "distinct": "no label twice, or each as seldom as can be",
    "repeated": "all of one label",
}


@dataclass(frozen=True)
class Dataset:
    """Examples of one split, with what a network needs to know about their set.

    Attributes:
      name: the set's name, as given to `load`.
      images: uint8 [example, height, width, channel], 0..255.
      labels: int32 [example], indices into `classes`.
      ids: int64 [example], position of each example in the split's original order.
      classes: class names.
      mean: per channel, of training pixels in [0, 1].
      std: likewise.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(
    name: str, *, split: str = "test", ids: Ids = None, data_dir: str | None = None
) -> Dataset:
    """Loads examples of an image classification set.

    Args:
      name: `tiles` (ships with the package), or a set of tensorflow-datasets that is prepared on
        this machine: `cifar10`, `mnist`, `name/config`, ...; or the path of a folder or .npz of
        your own (`jaxinv.data.own`).
      split: `train`, `test`, or another split the set has.
      ids: a count n for the first n examples in original order; a sequence for exactly these
        examples, in this order; None for all.
      data_dir: folder of the prepared sets; by default the environment variable TFDS_DATA_DIR,
        and without it tensorflow-datasets' own default. `tiles` ignores it.

    Returns:
      The examples, bit for bit as stored.

    Raises:
      UserError: if the set is unknown, not prepared or no set of equally sized uint8 images, gray
        or RGB, with one label each, if it has no such split, or if an id is out of range.
    """
    module = importlib.import_module(_source_of(name))
    found = module.read(name, split, ids, data_dir)
    if found.images.shape[-1] not in CHANNELS:
        shape = "x".join(map(str, found.images.shape[1:]))
        raise UserError(
            f"--dataset {name}: images of {shape}; give height x width x channel, 1 or 3 channels"
        )
    return found


def is_own(name: str) -> bool:
    """Whether a set is a folder or .npz of one's own, in which there may be others by now."""
    return _source_of(name) == OWN_SOURCE


def _source_of(name: str) -> str:
    """Who reads a set."""
    if name in SOURCES:
        return SOURCES[name]
    if "\0" in name:
        return DEFAULT_SOURCE
    path = Path(name).expanduser()
    # A folder of tensorflow-datasets may have the name of its set, and holds no pictures.
    suffixes = {p.suffix.lower() for depth in ("*/*", "*/*/*") for p in path.glob(depth)}
    own = suffixes & PICTURES if path.is_dir() else path.suffix == ".npz" and path.is_file()
    return OWN_SOURCE if own else DEFAULT_SOURCE


def group(labels: np.ndarray, targets: int, images: int, classes: int, grouping: str) -> np.ndarray:
    """Chooses the images of each target: positions int64 [target, image], none twice.

    Each target takes, in stored order, the first images left that its grouping lets in; "repeated"
    those of the first class that has enough of them.

    Args:
      labels: int [example], of all there are.
      targets, images: how many targets, of how many images each.
      classes: of the set.
      grouping: one of `GROUPINGS`.

    Raises:
      UserError: there are too few images.
    """
    left, chosen = list(range(len(labels))), []
    for _ in range(targets):
        own: list[int] = []
        candidates = left
        counts = np.zeros(classes, int)
        most = {"stored": images, "distinct": -(-images // classes), "repeated": images}[grouping]
        if grouping == "repeated":
            count = np.bincount(labels[left], minlength=classes)
            candidates = [position for position in left if count[labels[position]] >= images]
        for position in candidates:
            only = labels[own[0]] if own and grouping == "repeated" else labels[position]
            if labels[position] == only and counts[only] < most:
                own.append(position)
                counts[only] += 1
            if len(own) == images:
                break
        if len(own) < images:
            raise UserError(f"--targets {targets}: too few images for --grouping {grouping}")
        taken = set(own)
        left = [position for position in left if position not in taken]
        chosen.append(own)
    return np.array(chosen, np.int64)


def check_split(name: str, split: str, known: Sequence[str]) -> None:
    """Raises a UserError that lists the splits if `split` is not one of them."""
    if split not in known:
        raise UserError(f"{name} has no split {split!r}: it has {', '.join(known)}")


def select_ids(
    ids: Ids, total: int, name: str, split: str, flag: str = "--target-ids"
) -> np.ndarray:
    """Positions int64 [example] that `ids` (as in `load`) names among `total` examples.

    Raises:
      UserError: one is out of range, by the flag that a sequence was given by.
    """
    holds = f"the {split} split of {name} holds {total} images"
    if ids is None:
        return np.arange(total)
    if isinstance(ids, int | np.integer):
        if not 0 <= ids <= total:
            raise UserError(f"--targets: takes {ids} images, with --images of each; {holds}")
        return np.arange(ids)
    wrong = [i for i in ids if not (isinstance(i, int | np.integer) and 0 <= i < total)]
    if wrong:
        raise UserError(f"{flag} must be in 0..{total - 1}, not {wrong[0]}: {holds}")
    return np.array(ids, dtype=np.int64)
