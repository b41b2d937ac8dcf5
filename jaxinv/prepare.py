"""Downloads CIFAR-10 or CIFAR-100 and prepares it for tensorflow-datasets, without TensorFlow.

    python -m jaxinv.prepare cifar10 --data-dir ~/tensorflow_datasets

TFDS's own preparation of these sets needs TensorFlow. This one writes the same records (features,
ids, order, version), and the stock `tfds.builder("cifar10")` reads them.
"""

import contextlib
import io
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxinv.errors import OneLineParser, UserError, run_command

TIMEOUT = 20  # seconds without a byte from the server
SHAPE = (3, 32, 32)  # of an image in the archive: channel, height, width


@dataclass(frozen=True)
class Archive:
    """A binary CIFAR archive.

    Attributes:
      name: the set's name in TFDS.
      url: where it comes from.
      sha256: of the whole archive, in hex.
      folder: folder of all files inside the archive.
      splits: files of each split, in original order.
      labels: the label bytes before each image, in order: feature name, and the file that lists
        the class names.
      version: of the TFDS set that this data is.
    """

    name: str
    url: str
    sha256: str
    folder: str
    splits: dict[str, tuple[str, ...]]
    labels: dict[str, str]
    version: str = "3.0.2"


ARCHIVES = {
    archive.name: archive
    for archive in (
        Archive(
            name="cifar10",
            url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            folder="cifar-10-batches-bin",
            splits={
                "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
                "test": ("test_batch.bin",),
            },
            labels={"label": "batches.meta.txt"},
        ),
        Archive(
            name="cifar100",
            url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            folder="cifar-100-binary",
            splits={"train": ("train.bin",), "test": ("test.bin",)},
            labels={"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
        ),
    )
}


def prepare(archive: Archive, data_dir: str | None = None, path: str | None = None) -> bool:
    """Prepares a set in `data_dir`, unless it is prepared there already.

    Guarantees: the archive's sha256 is checked before anything is written to `data_dir`, and the
    set appears there under its name only when it is complete.

    Args:
      archive: which set.
      data_dir: folder of TFDS sets; by default as in `jaxinv.data.load`.
      path: the archive, if it is on disk already; by default it is downloaded.

    Returns:
      False if there was nothing to do.

    Raises:
      UserError: if the archive cannot be had or read, is not the expected one, or the folder
        cannot be written.
    """
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    target = root / archive.name / archive.version
    if (target / "dataset_info.json").is_file():  # written last, before TFDS renames the folder
        return False
    if target.exists():
        raise UserError(f"{target} is in the way: it holds no complete {archive.name}; remove it")
    with tempfile.TemporaryDirectory() as scratch:
        file = _download(archive, Path(scratch)) if path is None else _checked(archive, Path(path))
        try:
            _write_records(archive, file, root)
        except OSError as error:
            raise UserError(f"cannot prepare {archive.name} in {root}: {error}") from error
    return True


def _download(archive: Archive, folder: Path) -> Path:
    """Downloads the archive into a folder, with a progress bar, and checks it."""
    import pooch

    pooch.get_logger().setLevel("WARNING")
    fetch = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT)
    known = f"sha256:{archive.sha256}"
    try:
        return Path(pooch.retrieve(archive.url, known, "archive.tar.gz", folder, downloader=fetch))
    except (OSError, ValueError) as error:  # of the network, of the folder; of the digest
        raise UserError(
            f"cannot download {archive.url} ({' '.join(str(error).split())}); "
            "get the file by other means and pass it with --archive PATH"
        ) from error


def _checked(archive: Archive, path: Path) -> Path:
    """Returns the path of an archive; raises a UserError unless it is the expected one."""
    import pooch

    if path.exists() and not path.is_file():  # a device may have no end
        raise UserError(f"--archive {path}: is no file")
    try:
        digest = pooch.file_hash(path)
    except OSError as error:
        raise UserError(f"--archive: cannot read {path} ({error.strerror})") from error
    if digest != archive.sha256:
        raise UserError(
            f"{path.name} is not the {archive.name} archive or is damaged: "
            f"sha256 is {digest}, expected {archive.sha256} ({archive.url})"
        )
    return path


def _examples(archive: Archive, content: bytes) -> Iterator[tuple[list[int], np.ndarray]]:
    """Labels, and the image as uint8 [32, 32, 3], of each record of a file in the archive."""
    record = len(archive.labels) + int(np.prod(SHAPE))
    for row in np.frombuffer(content, np.uint8).reshape(-1, record):
        labels, pixels = np.split(row, [len(archive.labels)])
        yield labels.tolist(), pixels.reshape(SHAPE).transpose(1, 2, 0)


def _write_records(archive: Archive, path: Path, root: Path) -> None:
    """Writes the set below `root` in array_record format, as TFDS's own builder would."""
    import tensorflow_datasets as tfds
    from PIL import Image

    with tarfile.open(path) as tar:

        def read(file):
            return tar.extractfile(f"{archive.folder}/{file}").read()

        names = {key: read(file).decode().split() for key, file in archive.labels.items()}

        # Registering it would clash with the stock builder of the same name.
        with tfds.core.registered.skip_registration():

            class Builder(tfds.core.GeneratorBasedBuilder):
                """Stands in for the stock builder, which reads and writes through TensorFlow."""

                name = archive.name
                VERSION = tfds.core.Version(archive.version)
                url_infos = None  # TFDS's checksums are not needed: ours is checked by now

                def _info(self):
                    features = {
                        "id": tfds.features.Text(),
                        "image": tfds.features.Image(shape=(*SHAPE[1:], SHAPE[0])),
                    } | {key: tfds.features.ClassLabel(names=names[key]) for key in names}
                    return tfds.core.DatasetInfo(
                        builder=self,
                        description=f"{archive.name}, from {archive.url}",
                        features=tfds.features.FeaturesDict(features),
                        supervised_keys=("image", "label"),
                    )

                def _split_generators(self, dl_manager):
                    del dl_manager
                    return {split: self._generate_examples(split) for split in archive.splits}

                def _generate_examples(self, split):
                    contents = (read(file) for file in archive.splits[split])
                    examples = (e for content in contents for e in _examples(archive, content))
                    # The key is an integer as in the stock builder: it decides the stored order.
                    for index, (labels, image) in enumerate(examples):
                        example = {"id": f"{split}_{index:05d}", "image": Image.fromarray(image)}
                        yield index, example | dict(zip(archive.labels, labels))

        builder = Builder(data_dir=root, file_format="array_record")
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        # What TFDS prints speaks of a download of unknown size; its progress bars are on stderr.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=config)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""

    def command():
        parser = OneLineParser(prog="python -m jaxinv.prepare", description=__doc__.split("\n")[0])
        parser.add_argument("dataset", choices=ARCHIVES, help="Set to prepare.")
        parser.add_argument(
            "--data-dir", metavar="DIR", help="Folder of the sets (default: $TFDS_DATA_DIR)."
        )
        parser.add_argument(
            "--archive", metavar="FILE", help="Take the archive from this file; download nothing."
        )
        args = parser.parse_args(argv)
        is_new = prepare(ARCHIVES[args.dataset], args.data_dir, args.archive)
        print(f"{args.dataset} {'is prepared' if is_new else 'was prepared already'}")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
