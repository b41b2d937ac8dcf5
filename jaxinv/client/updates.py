"""Updates on disk: what a client sent, as a file or folder that other tools write."""

from pathlib import Path

import jax
import numpy as np

from jaxinv.errors import UserError
from jaxinv.types import PyTree


def load(path: str | Path, params: PyTree) -> PyTree:
    """Reads an update: an .npz of arrays named like `Conv_0/kernel`, or a folder of Orbax.

    Args:
      path: the file or folder.
      params: what the update must be shaped like.

    Raises:
      UserError: it cannot be read, or is of another network.
    """
    path = Path(path)
    try:
        if path.is_dir():
            import orbax.checkpoint as ocp

            with ocp.StandardCheckpointer() as checkpointer:
                found = checkpointer.restore(path.absolute(), params)
            arrays = names_of(found)
        else:
            with np.load(path) as file:
                arrays = dict(file)
    except Exception as error:  # a damaged file fails in many ways
        reason = str(error).splitlines()[0]
        raise UserError(f"--update {path}: cannot be read as .npz or Orbax ({reason})") from None
    return _shaped(arrays, params, f"--update {path}")


def save(path: str | Path, update: PyTree) -> None:
    """Writes an update as the .npz that `load` reads."""
    np.savez(path, **names_of(update))


def names_of(tree: PyTree) -> dict[str, np.ndarray]:
    """The arrays of a tree by their path, `Conv_0/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    return {name(path): np.asarray(leaf) for path, leaf in leaves}


def _shaped(arrays: dict[str, np.ndarray], params: PyTree, setting: str) -> PyTree:
    """Arrays by name as a tree like `params`."""
    expected = {name: leaf.shape for name, leaf in names_of(params).items()}
    for name in expected.keys() ^ arrays.keys():
        where = "the network has no" if name in arrays else "it lacks"
        raise UserError(f"{setting}: {where} {name}; give the update of this network")
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise UserError(f"{setting}: {name} is {arrays[name].shape}, the network's is {shape}")
    _, structure = jax.tree_util.tree_flatten(params)
    return structure.unflatten([arrays[name] for name in expected])
