"""Images of one's own as a data set: folders of pictures by class, and .npz."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

from jaxinv import data
from jaxinv.errors import UserError
from jaxinv.runs import results


@pytest.fixture
def pictures(tmp_path, rng_numpy):
    """Gray pictures, 6 x 10, of two classes; a function that writes them and returns them."""

    def write(root, count, size=(6, 10)):
        written = {}
        for name in ("ill", "healthy"):
            (tmp_path / root / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = rng_numpy.integers(0, 256, size, np.uint8)
                Image.fromarray(pixels).save(tmp_path / root / name / f"{number}.png")
                written[name, number] = pixels
        return written

    return write


def test_a_folder_by_classes_is_read_as_it_is(tmp_path, pictures):
    written = pictures("xray", 3)
    found = data.load(str(tmp_path / "xray"))
    assert found.classes == ("healthy", "ill")
    assert found.images.shape == (6, 6, 10, 1)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(found.images[4, ..., 0], written["ill", 1])
    pixels = np.stack(list(written.values())) / 255
    np.testing.assert_allclose((found.mean, found.std), ([pixels.mean()], [pixels.std()]))
    some = data.load(str(tmp_path / "xray"), ids=[5, 0])
    assert (some.ids.tolist(), some.labels.tolist()) == ([5, 0], [1, 0])
    with pytest.raises(UserError, match="has no split 'train': it has test"):
        data.load(str(tmp_path / "xray"), split="train")


@pytest.mark.parametrize("root", ["xray", "xray/train"])
def test_what_is_hidden_is_no_class_and_no_picture(tmp_path, pictures, root):
    """Jupyter's copies, beside splits and classes, and macOS' notes on files."""
    pictures(root, 2)
    if root != "xray":
        pictures("xray/test", 2)
    expected = data.load(str(tmp_path / "xray"))
    for folder in {"xray", root}:
        (tmp_path / folder / ".ipynb_checkpoints").mkdir()
        pixels = np.zeros((6, 10), np.uint8)
        Image.fromarray(pixels).save(tmp_path / folder / ".ipynb_checkpoints" / "1.png")
    (tmp_path / root / "ill" / "._1.png").write_bytes(b"Mac OS X")
    found = data.load(str(tmp_path / "xray"))
    assert found.classes == ("healthy", "ill")
    np.testing.assert_array_equal(found.images, expected.images)


def test_statistics_are_those_of_the_training_split(tmp_path, pictures):
    train = pictures("xray/train", 2)
    pictures("xray/test", 1)
    found = data.load(str(tmp_path / "xray"))
    assert len(found.images) == 2
    assert found.mean == pytest.approx([np.mean(list(train.values())) / 255])
    assert len(data.load(str(tmp_path / "xray"), split="train").images) == 4


def test_arrays_are_read_with_their_classes(tmp_path, rng_numpy):
    images = rng_numpy.integers(0, 256, (4, 5, 5, 3), np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=[1, 0, 1, 1], classes=["cat", "dog"])
    found = data.load(str(tmp_path / "own.npz"), ids=2)
    np.testing.assert_array_equal(found.images, images[:2])
    assert (found.classes, found.labels.tolist()) == (("cat", "dog"), [1, 0])


def test_a_prepared_set_of_that_name_is_no_folder_of_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    with pytest.raises(UserError, match="is not prepared"):
        data.load("cifar10", data_dir=str(tmp_path))


def broken(path, kind, rng):
    images = rng.integers(0, 256, (2, 5, 5), np.uint8)
    if kind == "pickled":
        np.savez(path, images=np.array([{}], object), labels=[0])
    elif kind == "floats":
        np.savez(path, images=images / 255, labels=[0, 1])
    elif kind == "few labels":
        np.savez(path, images=images, labels=[0])
    elif kind == "no labels":
        np.savez(path, images=images)
    elif kind == "channels first":
        np.savez(path, images=np.zeros((2, 3, 32, 32), np.uint8), labels=[0, 1])
    elif kind == "two channels":
        np.savez(path, images=np.stack([images, images], axis=-1), labels=[0, 1])
    elif kind == "below 0":
        np.savez(path, images=images, labels=[0, -1])
    else:
        path.write_bytes(b"no zip")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickled", "cannot be read as .npz"),
        ("floats", "must be uint8"),
        ("few labels", "one whole number for each image"),
        ("no labels", "needs the arrays"),
        ("below 0", "labels must be from 0 to 0"),
        ("channels first", "images of 3x32x32; give height x width x channel, 1 or 3 channels"),
        ("two channels", "images of 5x5x2; give height x width x channel"),
        ("torn", "cannot be read as .npz"),
    ],
)
def test_arrays_that_are_no_images_are_one_line(tmp_path, rng_numpy, kind, message):
    path = tmp_path / "own.npz"
    broken(path, kind, rng_numpy)
    with pytest.raises(UserError, match=message) as raised:
        data.load(str(path))
    assert "\n" not in str(raised.value)


def test_pictures_of_16_bits_keep_their_grays(tmp_path):
    (tmp_path / "scans" / "one").mkdir(parents=True)
    ramp = np.linspace(0, 65535, 60).astype(np.uint16).reshape(6, 10)
    Image.fromarray(ramp).save(tmp_path / "scans" / "one" / "a.png")
    found = data.load(str(tmp_path / "scans")).images[0, ..., 0]
    np.testing.assert_array_equal(found, np.round(ramp / 257))


def test_pictures_that_differ_or_are_torn_are_named(tmp_path, pictures):
    pictures("xray", 1)
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(tmp_path / "xray" / "ill" / "z.png")
    with pytest.raises(UserError, match=r"z\.png: is \(3, 3, 1\), others \(6, 10, 1\)"):
        data.load(str(tmp_path / "xray"))
    (tmp_path / "xray" / "ill" / "z.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"z\.png: cannot be read"):
        data.load(str(tmp_path / "xray"))


def test_a_run_becomes_a_table_of_pandas_where_that_is_installed(tmp_path):
    trials = {"psnr": np.array([20.0, 30.0]), "defense": np.array(["none", "sign"], object)}
    run = results.Run(tmp_path, {}, trials, {})
    if importlib.util.find_spec("pandas") is None:
        with pytest.raises(UserError, match=r"pip install jaxinv\[pandas\]"):
            run.to_pandas()
    else:
        assert run.to_pandas().groupby("defense").psnr.mean().to_dict() == {"none": 20, "sign": 30}
