"""A run in work on disk, so that a kill costs minutes of it and not hours.

    runs/NAME/snapshots/BLOCK-DIGEST.npz   steps taken, traces so far, every trial's state

The digest is of all that the rest of the run depends on: settings, code, versions, machine, plan,
first states and arrays. A snapshot of anything else has another name, and is not looked at. The
folder is gone when the run is done.
"""

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv import files
from jaxinv.machine import runtime
from jaxinv.types import PyTree

FOLDER = "snapshots"  # in the folder of a run
SECONDS = 240.0  # between two of them: with a call of a minute, a kill costs five minutes
SHORT = 30.0  # seconds that are not worth one at the end of a run


class Snapshots:
    """The snapshots of one block of work, which may be several runs after one another."""

    def __init__(self, folder: Path, block: str, settings: str):
        """Sets what the snapshots are named by.

        Args:
          folder: of all the work.
          block: its name, of which a file's begins.
          settings: what was asked for, in words.
        """
        self._folder, self._block, self._settings = folder / FOLDER, block, settings

    def of_run(self, words: Any, arrays: PyTree) -> Path:
        """The file of one of its runs.

        Args:
          words: what is static; its `repr` counts.
          arrays: what the run is of and begins with.
        """
        digest = hashlib.sha256(repr((self._settings, words, _place())).encode())
        for leaf in jax.tree.leaves(arrays):
            values = _plain(leaf)
            digest.update(repr((values.shape, values.dtype.str)).encode())
            digest.update(np.ascontiguousarray(values).data)
        return self._folder / f"{self._block}-{digest.hexdigest()[:24]}.npz"

    def clear(self) -> None:
        """Removes them all: the block is done."""
        for path in self._folder.glob(f"{self._block}-*.npz"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or of other blocks too
            self._folder.rmdir()


class Keeper:
    """Keeps a run's work while it goes on: every `SECONDS`, at an interrupt, and at its end."""

    def __init__(self, path: Path | None):
        """Starts the clock; without a path nothing is kept."""
        self._path, self._written = path, time.monotonic()

    def keep(self, work: PyTree, now: bool, is_end: bool) -> None:
        """Writes the work if it is time.

        Args:
          work: as it stands.
          now: whether it is, whatever the clock says.
          is_end: whether nothing is left to do; what took less than `SHORT` seconds is then not
            worth it.

        Raises:
          UserError: the disk is full, or the folder cannot be written.
        """
        most = min(SHORT, SECONDS) if is_end else SECONDS
        if self._path is not None and (now or time.monotonic() - self._written > most):
            write(self._path, work)
            self._written = time.monotonic()


def write(path: Path, work: PyTree) -> None:
    """Writes a tree of arrays; a kill leaves the one before.

    Raises:
      UserError: the disk is full, or the folder cannot be written.
    """
    leaves = {f"{i:04d}": _plain(leaf) for i, leaf in enumerate(jax.tree.leaves(work))}
    files.write_file(path, lambda file: np.savez(file, **leaves))


def read(path: Path, like: PyTree, announce: Callable[[str], None]) -> PyTree | None:
    """Reads a tree of arrays; None where there is none, or a damaged one.

    Args:
      path: of the file.
      like: a tree of the same structure and types.
      announce: hears a line of a damaged one.
    """
    expected, structure = jax.tree.flatten(like)
    try:
        arrays = files.read_npz(path)
        found = [arrays[f"{i:04d}"] for i in range(len(expected))]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError):
        announce(f"{path} cannot be read; what it kept is computed again")
        return None
    return jax.tree.unflatten(structure, map(_as, found, expected))


def _plain(leaf: Any) -> np.ndarray:
    """An array's numbers; of random keys the numbers they are made of."""
    leaf = jnp.asarray(leaf) if isinstance(leaf, int | float) else leaf
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _as(values: np.ndarray, like: Any) -> Any:
    """Numbers as an array of the kind they were."""
    if isinstance(like, jax.Array) and jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(values, impl=jax.random.key_impl(like))
    return values


@functools.cache
def _place() -> tuple:
    """Code, versions and machine: what decides over the last bit of a result."""
    package = Path(__file__).parents[1]
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(path.read_bytes())
    versions = runtime.versions(("jax", "jaxlib", "flax", "optax", "numpy"))
    return code.hexdigest(), versions, runtime.hardware(), os.environ.get("XLA_FLAGS")
