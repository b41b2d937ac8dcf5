"""Checkpoints: written and read back; each kind of damage is one clear error."""

import json
import shutil

import jax
import pytest

from jaxinv import data, load_victim
from jaxinv.errors import UserError
from jaxinv.victim import checkpoints
from jaxinv.victim.untrained import digest, untrained

INFO = checkpoints.Info(
    model="resnet20",
    width=4,
    dataset="tiles",
    classes=tuple("abcdefg"),
    image_shape=(8, 8, 3),
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    recipe={"lr": 0.1},
    epochs=1,
    steps=5,
    train_accuracy=0.5,
    test_accuracy=0.4,
    seconds=1.0,
    hardware="1 x cpu",
    versions={},
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "one"
    victim = untrained("resnet20", classes=7, width=4, seed=3, image_shape=(8, 8, 3))
    checkpoints.save(folder, victim.variables, INFO, [{"epoch": 1, "loss": 0.5}])
    return victim, folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[1], tmp_path / "copy")


def largest_file(folder):
    return max(
        (f for f in (folder / "arrays").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size
    )


def test_reads_back_to_the_bit(saved):
    victim, folder = saved
    loaded = load_victim(folder)
    assert loaded.digest == victim.digest == digest(loaded.variables)
    assert loaded.info == INFO.model_copy(update={"digest": victim.digest})
    assert type(loaded.module) is type(victim.module)
    assert (folder / "log.csv").read_text().split() == ["epoch,loss", "1,0.5"]


def test_is_small_on_disk(saved):
    victim, folder = saved
    files = [f for f in folder.rglob("*") if f.is_file()]
    values = sum(leaf.nbytes for leaf in jax.tree.leaves(victim.variables))
    assert sum(f.stat().st_size for f in files) < values + 80_000
    assert len(files) < 20


def test_names_no_folder_of_its_machine(saved):
    files = [f for f in saved[1].rglob("*") if f.is_file()]
    place = str(saved[1].parent).encode()
    assert [f.name for f in files if place in f.read_bytes()] == []


def test_is_found_by_name(saved, monkeypatch):
    monkeypatch.chdir(saved[1].parent.parent)
    saved[1].parent.rename(saved[1].parent.parent / "checkpoints")
    try:
        assert load_victim("one").digest == saved[0].digest
    finally:
        (saved[1].parent.parent / "checkpoints").rename(saved[1].parent)
    with pytest.raises(UserError, match="--victim two: no such checkpoint"):
        load_victim("two")


def test_a_flipped_byte_is_noticed(copy):
    path = largest_file(copy)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_victim(copy)


def test_a_changed_digest_is_noticed(copy):
    info = json.loads((copy / "info.json").read_text())
    (copy / "info.json").write_text(json.dumps(info | {"digest": "0" * 64}))
    with pytest.raises(UserError, match=r"sha256 .* is not the digest"):
        load_victim(copy)


def test_a_truncated_file_is_noticed(copy):
    path = largest_file(copy)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="missing or damaged"):
        load_victim(copy)


@pytest.mark.parametrize("missing", ["arrays", "info.json"])
def test_a_missing_part_is_noticed(copy, missing):
    path = copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load_victim(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 2}, "another network: arrays/ does not hold a resnet20 of width 2"),
        ({"model": "resnet20_gn"}, "does not hold a resnet20_gn"),
        ({"model": "vgg"}, "known networks"),
        ({"epochs": "many"}, "info.json: epochs"),
        ({"image_shape": [10**9, 10**9, 3]}, "info.json: image_shape.0: .*4096"),
        ({"std": [0.0, 1.0, 1.0]}, "info.json: std.0: .* greater than 0"),
        ({"mean": [0.5]}, "as many channels as image_shape"),
        ({"test_accuracy": 7}, "info.json: test_accuracy"),
    ],
)
def test_another_network_is_noticed(copy, changes, message):
    info = json.loads((copy / "info.json").read_text())
    (copy / "info.json").write_text(json.dumps(info | changes))
    with pytest.raises(UserError, match=message):
        load_victim(copy)


def test_fits_the_data_it_was_trained_for(saved):
    loaded = load_victim(saved[1])
    tiles = data.load("tiles", ids=1)
    with pytest.raises(UserError, match="takes 8x8x3 images; those of --dataset tiles: 32x32x3"):
        checkpoints.check_fits(loaded, tiles)
    fitting = loaded._replace(info=loaded.info.model_copy(update={"image_shape": (32, 32, 3)}))
    checkpoints.check_fits(fitting, tiles)
    few = fitting._replace(info=fitting.info.model_copy(update={"classes": ("a", "b")}))
    with pytest.raises(UserError, match="with 2 classes; --dataset tiles has 7"):
        checkpoints.check_fits(few, tiles)
