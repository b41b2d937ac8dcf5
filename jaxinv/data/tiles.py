"""The data set that ships with the package; see build_tiles.py and LICENSES.md."""

from pathlib import Path

import numpy as np

from jaxinv.data import Dataset, Ids, check_split, select_ids

PATH = Path(__file__).with_name("tiles.npz")


def read(name: str, split: str, ids: Ids, data_dir: str | None) -> Dataset:
    """Reads tiles: uint8 [example, 32, 32, 3], seven classes. See `jaxinv.data.load`."""
    del data_dir
    check_split(name, split, ("train", "test"))
    with np.load(PATH) as arrays:
        labels = arrays[f"{split}_labels"]
        chosen = select_ids(ids, len(labels), name, split)
        return Dataset(
            name=name,
            images=arrays[f"{split}_images"][chosen],
            labels=labels[chosen],
            ids=chosen,
            classes=tuple(arrays["classes"].tolist()),
            mean=tuple(arrays["mean"].tolist()),
            std=tuple(arrays["std"].tolist()),
        )
