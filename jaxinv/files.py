"""Files that are there whole or not at all, and the folders that come with the package."""

import contextlib
import csv
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from jaxinv.errors import UserError

LOCK = ".lock"  # in a folder where a process works
MOST_RATIO = 100  # of an archive's content to its bytes, ...
MOST_UNPACKED = 2**28  # ... where it is more than this: others are made to fill the memory


def shipped(folder: str) -> Path:
    """A folder that comes along: inside an installed package, beside the package in a clone."""
    package = Path(__file__).parent
    return package / folder if (package / folder).is_dir() else package.parent / folder


def write_file(path: Path, write: Callable) -> None:
    """Writes through a temporary name, `write(file)`: a kill leaves the old file or the new.

    Raises:
      UserError: the disk is full, the folder cannot be written or something is in its way; what was
        there before still is.
    """
    content = io.BytesIO()  # all of it first: writers of formats do not stop well halfway
    write(content)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:  # left over where it could not take the path's place
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); make room there, or choose another "
            "folder; the same command goes on from what is finished"
        ) from None


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no JSON, or nests too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("its values nest too deeply") from None


def first_error(error: ValidationError) -> str:
    """The first of a file's fields that are not as they should be, and what is wrong with it."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Keeps other processes out of a folder's work; the lock of one that died is free.

    Where the file system knows no locks, nobody is kept out.

    Raises:
      UserError: another process is at work there, or it cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_CREAT | os.O_WRONLY)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {folder}: another process is at work there; wait for it, or choose another"
            ) from None
        except OSError:
            pass
        yield


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of an .npz.

    Raises:
      OSError: it cannot be read.
      ValueError: it is damaged, holds pickles, or would be a hundred times as large in memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > max(MOST_UNPACKED, MOST_RATIO * path.stat().st_size):
            raise ValueError(f"would take {size / 2**30:.3g} GiB, which is far more than it is")
        with np.load(path) as arrays:
            return dict(arrays)
    except (KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def csv_bytes(rows: Sequence[Mapping[str, Any]], digits: int | None = None) -> bytes:
    """Lays rows of the same columns out as CSV.

    Args:
      rows: values by column.
      digits: significant digits of floats; None: all that tell them from others.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        if digits is not None:
            row = {k: f"{v:.{digits}g}" if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow(row)
    return text.getvalue().encode()
