"""Files that are there whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def write_file(path: Path, write: Callable) -> None:
    """Writes through a temporary name, `write(file)`: a kill leaves the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
