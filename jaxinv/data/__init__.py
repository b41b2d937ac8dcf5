"""Image classification sets as plain arrays, in their original order."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxinv.errors import UserError

# Name of a data set -> module with `read(name, split, ids, data_dir) -> Dataset`. A name that is
# not listed is one of tensorflow-datasets. The modules are imported when asked for.
SOURCES = {"tiles": "jaxinv.data.tiles"}
DEFAULT_SOURCE = "jaxinv.data.tfds"
KNOWN = "tiles, cifar10, cifar100, mnist, or any other image classification set of " + (
    "tensorflow-datasets"
)

Ids = Sequence[int] | int | None


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
        this machine: `cifar10`, `mnist`, `name/config`, ...
      split: `train`, `test`, or another split the set has.
      ids: a count n for the first n examples in original order; a sequence for exactly these
        examples, in this order; None for all.
      data_dir: folder of the prepared sets; by default the environment variable TFDS_DATA_DIR,
        and without it tensorflow-datasets' own default. `tiles` ignores it.

    Returns:
      The examples, bit for bit as stored.

    Raises:
      UserError: if the set is unknown, not prepared or no set of equally sized uint8 images with
        one label each, if it has no such split, or if an id is out of range.
    """
    module = importlib.import_module(SOURCES.get(name, DEFAULT_SOURCE))
    return module.read(name, split, ids, data_dir)


def check_split(name: str, split: str, known: Sequence[str]) -> None:
    """Raises a UserError that lists the splits if `split` is not one of them."""
    if split not in known:
        raise UserError(f"{name} has no split {split!r}: it has {', '.join(known)}")


def select_ids(ids: Ids, total: int, name: str, split: str) -> np.ndarray:
    """Positions int64 [example] that `ids` (as in `load`) names among `total` examples."""
    holds = f"the {split} split of {name} holds {total} images"
    if ids is None:
        return np.arange(total)
    if isinstance(ids, int | np.integer):
        if not 0 <= ids <= total:
            raise UserError(f"--targets must be between 0 and {total}, not {ids}: {holds}")
        return np.arange(ids)
    wrong = [i for i in ids if not (isinstance(i, int | np.integer) and 0 <= i < total)]
    if wrong:
        raise UserError(f"--target-ids must be in 0..{total - 1}, not {wrong[0]}: {holds}")
    return np.array(ids, dtype=np.int64)
