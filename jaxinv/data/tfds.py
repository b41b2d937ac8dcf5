"""Sets of tensorflow-datasets (TFDS), read without TensorFlow.

TFDS stores records in a hashed order. Where the records carry an `id` ("test_00017"), as those of
CIFAR-10 and CIFAR-100 do, sorting by it gives the original order, which "the first 100 test
images" of a paper means. Without it the stored order stands in: fixed, but not the original.
"""

import contextlib
import logging
import os
import re
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np

from jaxinv.data import KNOWN, Dataset, Ids, check_split, select_ids
from jaxinv.errors import UserError

# Per channel, of the training pixels in [0, 1].
STATISTICS = {
    "cifar10": ((0.49146724, 0.48226172, 0.44677013), (0.24703224, 0.24348514, 0.26158786)),
    "cifar100": ((0.50715983, 0.48669362, 0.44120193), (0.26733428, 0.25643846, 0.27615047)),
    "mnist": ((0.1306605,), (0.3081078,)),
}
STATISTICS_EXAMPLES = 5_000  # training images that give the statistics of any other set


def read(name: str, split: str, ids: Ids, data_dir: str | None) -> Dataset:
    """Reads examples of a prepared set. See `jaxinv.data.load`.

    Only the chosen images are decoded. Where records carry an id, all ids of the split are read.
    """
    with _quiet():
        builder = _open(name, data_dir)
        check_split(name, split, list(builder.info.splits))
        records, order = _records(builder, split)
        chosen = select_ids(ids, len(records), name, split)
        images, labels = _decode(builder, records, order[chosen])
        mean, std = STATISTICS.get(name) or _statistics(builder)
        return Dataset(
            name=name,
            images=images,
            labels=labels,
            ids=chosen,
            classes=tuple(builder.info.features["label"].names),
            mean=mean,
            std=std,
        )


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Silences the warnings of TFDS, such as its advice to install OpenCV."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _open(name: str, data_dir: str | None):
    """The set's builder, checked: prepared, random access, fixed-size uint8 images, labels."""
    # A colon would name a remote collection, which TFDS looks up over the network.
    if not re.fullmatch(r"\w+(/[\w.-]+)*", name):
        raise UserError(f"unknown data set {name!r}: use {KNOWN}")
    import tensorflow_datasets as tfds

    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")
    data_dir = os.path.expanduser(data_dir) if data_dir else None
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError:
        raise UserError(f"unknown data set {name!r}: use {KNOWN}") from None
    except Exception as error:  # whatever the code of one of TFDS's 1,000 sets raises
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"tensorflow-datasets cannot open {name!r}: {reason}") from error
    features = builder.info.features
    _check_features(name, features, tfds.features)
    # Checked before anything else is asked of TFDS: offline it would retry for minutes.
    if not builder.is_prepared():
        root = builder.data_dir_root
        if name in ("cifar10", "cifar100"):
            fix = f"run: python -m jaxinv.prepare {name} --data-dir {root}"
        else:
            fix = (
                "prepare it with tensorflow-datasets first, which needs TensorFlow: "
                f"tfds.builder({name!r}, data_dir={str(root)!r}, "
                "file_format='array_record').download_and_prepare()"
            )
        raise UserError(f"{name} is not prepared in {root}; {fix}")
    if "array_record" not in {str(f.value) for f in builder.info.available_file_formats()}:
        raise UserError(
            f"{name} is prepared in {builder.data_dir} as {builder.info.file_format.value}, which "
            "only TensorFlow reads; prepare it again with file_format='array_record'"
        )
    return builder


def _check_features(name: str, features, kinds) -> None:
    """Raises a UserError unless there are a fixed-size uint8 `image` and a class `label`."""
    # Some sets have a single tensor or a sequence in place of named features.
    image, label = (
        features[key] if isinstance(features, kinds.FeaturesDict) and key in features else None
        for key in ("image", "label")
    )
    if not isinstance(image, kinds.Image) or not isinstance(label, kinds.ClassLabel):
        raise UserError(f"{name} is no image classification set: it needs an image and a label")
    if None in image.shape:
        raise UserError(f"the images of {name} vary in shape; only sets of one size can be used")
    if image.np_dtype != np.uint8:
        raise UserError(f"the images of {name} are not 8 bit; only such sets can be used")


def _records(builder, split: str) -> tuple[Sequence[bytes], np.ndarray]:
    """The split's serialized records, and the order int64 [example] in which to take them."""
    import tensorflow_datasets as tfds

    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    records = builder.as_data_source(split=split, deserialize_method=raw)
    stored = np.arange(len(records))
    if "id" not in builder.info.features:
        return records, stored
    ids = [fields["id"] for fields in _fields(records, stored)]
    # A text or a number.
    keys = [(field.bytes_list.value or field.int64_list.value)[0] for field in ids]
    return records, np.array(sorted(stored, key=keys.__getitem__), dtype=np.int64)


def _fields(records: Any, positions: Sequence[int]) -> Iterator:
    """The features of examples, undecoded: three times as fast as TFDS's own way to parse them."""
    from tensorflow_datasets.proto import tf_example_pb2

    # Records read by the thousand cost a tenth of records read one by one.
    for start in range(0, len(positions), 1000):
        batch = [int(position) for position in positions[start : start + 1000]]
        for record in records.__getitems__(batch):
            yield tf_example_pb2.Example.FromString(record).features.feature


def _decode(builder, records: Sequence[bytes], positions: Sequence[int]):
    """Images uint8 [example, height, width, channel] and labels int32 [example]."""
    image_feature = builder.info.features["image"]
    images = np.empty((len(positions), *image_feature.shape), np.uint8)
    labels = np.empty(len(positions), np.int32)
    for row, fields in enumerate(_fields(records, positions)):
        images[row] = image_feature.decode_example_np(fields["image"].bytes_list.value[0])
        labels[row] = fields["label"].int64_list.value[0]
    return images, labels


def _statistics(builder) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel of the first training images, or of a split if none is `train`."""
    splits = builder.info.splits
    records, order = _records(builder, "train" if "train" in splits else next(iter(splits)))
    pixels = _decode(builder, records, order[:STATISTICS_EXAMPLES])[0] / 255
    axes = (0, 1, 2)
    return tuple(pixels.mean(axis=axes).tolist()), tuple(pixels.std(axis=axes).tolist())
