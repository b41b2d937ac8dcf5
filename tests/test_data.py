"""The shipped tiles, and what `load` says about sets it cannot load."""

import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxinv.data import build_tiles, load
from jaxinv.errors import UserError


@pytest.mark.parametrize("split", ["train", "test"])
def test_tiles_are_whole(split):
    tiles = load("tiles", split=split)
    assert tiles.images.shape[1:] == (32, 32, 3)
    assert tiles.images.dtype == np.uint8
    assert len(tiles.classes) == 7
    assert tiles.labels.dtype == np.int32
    assert set(tiles.labels.tolist()) == set(range(7))
    assert tiles.ids.tolist() == list(range(len(tiles.labels)))
    assert tiles.images.mean(axis=3).std(axis=(1, 2)).min() >= build_tiles.MIN_STD
    assert len({image.tobytes() for image in tiles.images}) == len(tiles.images)


def test_tiles_statistics_are_those_of_the_training_pixels():
    tiles, test = load("tiles", split="train"), load("tiles")
    np.testing.assert_allclose(tiles.mean, (tiles.images / 255).mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(tiles.std, (tiles.images / 255).std((0, 1, 2)), atol=1e-6)
    assert test.mean == tiles.mean


def test_tiles_first_seven_test_images_are_of_distinct_classes():
    tiles = load("tiles", ids=8)
    assert tiles.ids.tolist() == list(range(8))
    assert tiles.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 0]


def test_ids_are_taken_in_the_order_given():
    everything, some = load("tiles"), load("tiles", ids=[5, 0, 40])
    np.testing.assert_array_equal(some.images, everything.images[[5, 0, 40]])
    np.testing.assert_array_equal(some.labels, everything.labels[[5, 0, 40]])
    assert some.ids.tolist() == [5, 0, 40]
    assert len(load("tiles", ids=0).images) == 0


def test_no_pixel_is_in_both_splits():
    # In place of a photograph: a picture of pixel owners, marked by the squares each split cuts.
    for picture in build_tiles.PICTURES:
        height, width = 1500, 1500
        owners = {}
        for split, squares in {
            "test": build_tiles.test_squares(picture),
            "train": build_tiles.train_squares(picture, height, width),
        }.items():
            owners[split] = np.zeros((height, width), bool)
            for top, left, factor in squares:
                side = build_tiles.SIDE * factor
                owners[split][top : top + side, left : left + side] = True
        assert owners["test"].any()
        assert owners["train"].any()
        assert not (owners["test"] & owners["train"]).any()


def test_downscale_averages_boxes():
    square = np.zeros((64, 64, 3), np.uint8)
    square[:2, :2] = [[[10, 0, 255], [11, 0, 255]], [[12, 0, 255], [13, 2, 255]]]
    tile = build_tiles.downscale(square, 2)
    assert tile[0, 0].tolist() == [12, 1, 255]  # 11.5 and 0.5, halves up
    assert not tile[1:].any()


def test_the_shipped_tiles_are_what_the_script_builds():
    pytest.importorskip("skimage")
    arrays = build_tiles.build()
    for split in ("train", "test"):
        tiles = load("tiles", split=split)
        np.testing.assert_array_equal(arrays[f"{split}_images"], tiles.images)
        np.testing.assert_array_equal(arrays[f"{split}_labels"], tiles.labels)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ({"ids": -1}, ["--targets", "-1"]),
        ({"ids": 10_000}, ["--targets", "10000", "holds"]),
        ({"ids": [0, 10_000]}, ["--target-ids", "10000"]),
        ({"ids": [-1]}, ["--target-ids", "0..", "-1"]),
        ({"split": "valid"}, ["valid", "train, test"]),
    ],
)
def test_bad_arguments_are_named(arguments, fragments):
    with pytest.raises(UserError) as error:
        load("tiles", **arguments)
    assert all(fragment in str(error.value) for fragment in fragments)


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("no_such_set", ["no_such_set", "tiles, cifar10, cifar100, mnist"]),
        ("huggingface:mnist", ["unknown", "tiles, cifar10"]),
        ("cifar100", ["not prepared", "python -m jaxinv.prepare cifar100 --data-dir"]),
        ("svhn_cropped", ["not prepared", "download_and_prepare"]),
        ("imagenette", ["vary in shape"]),
        ("ag_news_subset", ["no image classification set"]),
    ],
)
def test_sets_that_cannot_be_loaded(name, fragments, tmp_path, monkeypatch):
    """Nothing is asked of the network, where TFDS would try again for minutes."""
    asked = []

    def no_network(host, *rest, **more):
        asked.append(host)
        raise OSError("no network in a test")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(UserError) as error:
        load(name, data_dir=str(tmp_path))
    assert asked == []
    assert all(fragment in str(error.value) for fragment in fragments)
    assert "\n" not in str(error.value)


def test_tiles_need_no_tensorflow_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # importing it raises
    assert len(load("tiles").images) > 100


def test_a_set_without_ids_is_read_in_stored_order(tmp_path):
    import tensorflow_datasets as tfds
    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (9, 5, 4, 1), np.uint8)

    with tfds.core.registered.skip_registration():

        class GreySet(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            url_infos = None

            def _info(self):
                label = tfds.features.ClassLabel(names=[f"class {i}" for i in range(9)])
                image = tfds.features.Image(shape=(5, 4, 1))
                features = tfds.features.FeaturesDict({"image": image, "label": label})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for i, image in enumerate(images):
                    yield i, {"image": Image.fromarray(image[..., 0]), "label": i}

    GreySet(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    gray = load("grey_set", split="train", data_dir=str(tmp_path))
    assert sorted(gray.labels.tolist()) == list(range(9))
    np.testing.assert_array_equal(gray.images, images[gray.labels])
    np.testing.assert_allclose(gray.mean, [images.mean() / 255])
    np.testing.assert_allclose(gray.std, [images.std() / 255])
    some = load("grey_set", split="train", ids=[4, 1], data_dir=str(tmp_path))
    np.testing.assert_array_equal(some.labels, gray.labels[[4, 1]])


HAS_CIFAR10 = Path(os.environ.get("TFDS_DATA_DIR", "/nowhere"), "cifar10").is_dir()


@pytest.mark.skipif(not HAS_CIFAR10, reason="TFDS_DATA_DIR has no cifar10")
def test_cifar10_is_in_its_original_order():
    # The first labels of test_batch.bin, as printed in countless tutorials.
    cifar10 = load("cifar10", ids=10)
    names = " ".join(cifar10.classes[label] for label in cifar10.labels)
    assert names == "cat ship ship airplane frog frog automobile frog cat automobile"
    assert cifar10.images.shape == (10, 32, 32, 3)
    picked = load("cifar10", ids=[7, 2])
    np.testing.assert_array_equal(picked.images, cifar10.images[[7, 2]])
    assert "tensorflow" not in sys.modules
