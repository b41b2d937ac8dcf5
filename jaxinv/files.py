"""Files that are there whole or not at all, and the folders that come with the package."""

import contextlib
import csv
import io
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxinv.errors import UserError

LOCK = ".lock"  # in a folder where a process works


def shipped(folder: str) -> Path:
    """A folder that comes along: inside an installed package, beside the package in a clone."""
    package = Path(__file__).parent
    return package / folder if (package / folder).is_dir() else package.parent / folder


def write_file(path: Path, write: Callable) -> None:
    """Writes through a temporary name, `write(file)`: a kill leaves the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # left over where it could not take the path's place


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Keeps other processes out of a folder's work; the lock of one that died is free.

    Where the file system knows no locks, nobody is kept out.

    Raises:
      UserError: another process is at work there.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {folder}: another process is at work there; wait for it, or choose another"
            ) from None
        except OSError:
            pass
        yield


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
