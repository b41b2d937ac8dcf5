"""A tiny archive of CIFAR's layout, prepared and read back through the stock builder."""

import dataclasses
import functools
import hashlib
import http.server
import io
import sys
import tarfile
import threading

import numpy as np
import pytest

from jaxinv import prepare
from jaxinv.data import load
from jaxinv.errors import UserError


def synthetic_archive(name, path, rng):
    """Writes a small archive to `path`; returns its description and the splits' contents."""
    real = prepare.ARCHIVES[name]
    fine = 10 if name == "cifar10" else 100
    contents = {}
    with tarfile.open(path, "w:gz") as tar:

        def add(file, content):
            info = tarfile.TarInfo(f"{real.folder}/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        for key, file in real.labels.items():
            count = fine if key == "label" else 20
            add(file, "".join(f"{key}-{i}\n" for i in range(count)).encode() + b"\n")
        for split, files in real.splits.items():
            images, labels = [], []
            for file in files:
                pixels = rng.integers(0, 256, (12, 3, 32, 32), np.uint8)
                label = rng.integers(0, fine, 12).astype(np.uint8)
                columns = [label] if len(real.labels) == 1 else [label % 20, label]
                rows = np.concatenate([np.stack(columns, 1), pixels.reshape(12, -1)], axis=1)
                add(file, rows.tobytes())
                images.append(pixels.transpose(0, 2, 3, 1))
                labels.append(label)
            contents[split] = np.concatenate(images), np.concatenate(labels)
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    # Nothing is downloaded in tests: this port answers nobody.
    url = "http://127.0.0.1:9/archive.tar.gz"
    return dataclasses.replace(real, sha256=digest, url=url), contents


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_prepared_archive_is_read_back_bit_for_bit(name, tmp_path):
    archive, contents = synthetic_archive(name, tmp_path / "a.tar.gz", rng=np.random.default_rng(0))
    root = tmp_path / "sets"
    assert prepare.prepare(archive, str(root), str(tmp_path / "a.tar.gz"))
    for split, (images, labels) in contents.items():
        read = load(name, split=split, data_dir=str(root))
        np.testing.assert_array_equal(read.images, images)
        np.testing.assert_array_equal(read.labels, labels)
        assert read.ids.tolist() == list(range(len(images)))
        assert read.classes[:2] == ("label-0", "label-1")
    some = load(name, ids=[9, 3], data_dir=str(root))
    np.testing.assert_array_equal(some.images, contents["test"][0][[9, 3]])
    assert len(load(name, ids=4, data_dir=str(root)).images) == 4

    # The test above has teeth: TFDS does not store the records in the original order.
    import tensorflow_datasets as tfds

    stored = tfds.builder(name, data_dir=root).as_data_source(split="test")
    stored_ids = [example["id"].decode() for example in stored]
    assert stored_ids != sorted(stored_ids)
    assert sorted(stored_ids) == [f"test_{i:05d}" for i in range(12)]

    # A second run has nothing to do, and needs neither archive nor network.
    assert not prepare.prepare(archive, str(root))
    assert "tensorflow" not in sys.modules


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tiny archive at a.tar.gz, in the place of CIFAR-10."""
    archive, _ = synthetic_archive("cifar10", tmp_path / "a.tar.gz", np.random.default_rng(0))
    monkeypatch.setitem(prepare.ARCHIVES, "cifar10", archive)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["cifar10", "--archive", "damaged.tar.gz"], ["sha256", "expected"]),
        (["cifar10", "--archive", "missing.tar.gz"], ["--archive", "missing.tar.gz"]),
        (["cifar10"], ["cannot download", "--archive PATH", "refused"]),
        (["imagenet"], ["imagenet", "cifar10"]),
        (["cifar10", "--archiv"], ["--archiv"]),
    ],
)
def test_failures_are_one_line_and_leave_nothing(tiny, monkeypatch, capsys, arguments, fragments):
    monkeypatch.chdir(tiny)
    (tiny / "damaged.tar.gz").write_bytes((tiny / "a.tar.gz").read_bytes()[:-1] + b"x")
    before = sorted(tiny.iterdir())
    assert prepare.main([*arguments, "--data-dir", str(tiny / "sets")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(fragment in error for fragment in fragments)
    assert sorted(tiny.iterdir()) == before


def test_an_interrupted_preparation_is_not_taken_as_prepared(tiny, monkeypatch, capsys):
    def interrupt(archive, content):
        raise KeyboardInterrupt

    root, path = str(tiny / "sets"), str(tiny / "a.tar.gz")
    arguments = ["cifar10", "--data-dir", root, "--archive", path]
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_examples", interrupt)
        assert prepare.main(arguments) == 130
    with pytest.raises(UserError, match="not prepared"):
        load("cifar10", data_dir=root)
    assert prepare.main(arguments) == 0
    assert prepare.main(arguments) == 0
    assert "prepared already" in capsys.readouterr().out


@pytest.fixture
def server(tiny):
    """The address of a server of the folder with the tiny archive."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tiny))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_download_is_checked_and_prepared(tiny, server):
    archive = dataclasses.replace(prepare.ARCHIVES["cifar10"], url=f"{server}/a.tar.gz")
    (tiny / "other.tar.gz").write_bytes(b"no archive")
    other = dataclasses.replace(archive, url=f"{server}/other.tar.gz")
    with pytest.raises(UserError, match="hash"):
        prepare.prepare(other, str(tiny / "sets"))
    assert not (tiny / "sets").exists()
    assert prepare.prepare(archive, str(tiny / "sets"))
    assert len(load("cifar10", data_dir=str(tiny / "sets")).images) == 12
