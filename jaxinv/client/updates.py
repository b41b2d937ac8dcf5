"""Updates on disk: what a client sent, as a file or folder that other tools write.

| from | file | read |
|---|---|---|
| jaxinv, Flax | .npz, .safetensors | by names: `Conv_0/kernel`, also with `.` or below `params` |
| Flower | .npz of `arr_0`, `arr_1`, ... | in the order of the parameters, by shapes |
| PyTorch | .npz, .safetensors | a state dict or gradients by its names, layer by layer |
| Orbax | a folder, a checkpoint of `jaxinv.train` | by names |

Some of the layers will do. Sizes are read first: an array that the network has no place for is not
read, and pickle is never opened.
"""

import json
import math
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv import files
from jaxinv.client import pytorch
from jaxinv.errors import UserError
from jaxinv.networks.inspect import Use
from jaxinv.types import PyTree, path_name

FORMATS = ".npz, .safetensors, or a folder of Orbax"
ROOM = 2**20  # bytes that a file may hold beside the parameters
MOST_LISTED = 12  # names in a message
MOST_HEADER = 10**8  # bytes of the header of a safetensors file: the format's own limit
# Of safetensors, https://github.com/huggingface/safetensors; the rest are no parameters.
_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
}


class Entry(NamedTuple):
    """An array that was not read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def load(
    path: str | Path, params: PyTree, uses: Callable[[], Sequence[Use]] | None = None
) -> PyTree:
    """Reads an update.

    Args:
      path: the file or folder.
      params: of the network, a tree of dicts.
      uses: gives the parameters in the order in which the network reads them
        (`networks.inspect.parameters_in_order`); asked for where names are PyTorch's or missing.

    Returns:
      A tree of dicts like `params`, of the leaves that were sent.

    Raises:
      UserError: it cannot be read, or is of another network.
    """
    return _read(path, lambda entries, name: assign(entries, params, uses, name))


def load_statistics(path: str | Path, like: PyTree) -> PyTree:
    """Reads what a client's BatchNorm measured of its batch, which it sent along with its update.

    Args:
      path: the update's file or folder, which holds them below `batch_stats`.
      like: the network's running statistics, a tree of dicts.

    Raises:
      UserError: it cannot be read, or holds no such statistics.
    """
    expected = {key: leaf.shape for key, leaf in names_of(like).items()}

    def place(entries, name):
        front = "batch_stats/"
        flat = {key.replace(".", "/"): entry for key, entry in entries.items()}
        own = {k.removeprefix(front): entry for k, entry in flat.items() if k.startswith(front)}
        for key, shape in expected.items():
            if key not in own or own[key].shape != shape:
                found = f"is {own[key].shape}" if key in own else "is not there"
                raise UserError(
                    f"{name}: --batch-norm train-shared: {front}{key} {shape} {found}; of "
                    "statistics that the client kept private use train"
                )
        return _tree({key: own[key].read() for key in expected}, like)

    return _read(path, place)


def _read(path: str | Path, use: Callable[[dict[str, "Entry"], str], PyTree]) -> PyTree:
    """Opens a file or folder and makes something of its arrays.

    Args:
      path: what is opened.
      use: (arrays by name, the file in words) -> what is wanted of them.

    Raises:
      UserError: it cannot be read, or `use` refuses it.
    """
    path, name = Path(path), f"--update {path}"
    try:
        if path.is_dir():
            entries = _orbax(path)
        elif path.suffix == ".safetensors":
            entries = _safetensors(path)
        else:
            entries = _npz(path)
        return use(entries, name)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(name) else f"{name}: {text}") from None
    except Exception as error:  # a damaged file fails in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: cannot be read as {FORMATS} ({reason})") from None


def save(path: str | Path, update: PyTree, statistics: PyTree = None) -> None:
    """Writes an update, and the statistics that are sent along, as the .npz that `load` reads."""
    along = {f"batch_stats/{name}": x for name, x in names_of(statistics).items()}
    files.write_file(Path(path), lambda f: np.savez(f, **names_of(update), **along))


def names_of(tree: PyTree) -> dict[str, np.ndarray]:
    """The arrays of a tree by their path, `Conv_0/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): np.asarray(leaf) for path, leaf in leaves}


def assign(
    entries: dict[str, Entry], params: PyTree, uses: Callable[[], Sequence[Use]] | None, name: str
) -> PyTree:
    """Gives every array its place among the parameters.

    Raises:
      UserError: it has none, or another shape.
    """
    expected = {key: leaf.shape for key, leaf in names_of(params).items()}
    total = sum(math.prod(e.shape) * e.dtype.itemsize for e in entries.values())
    most = 8 * 3 * sum(map(math.prod, expected.values())) + ROOM
    if total > most:
        raise UserError(
            f"{name}: holds {total / 2**20:.3g} MiB, far more than the network's "
            f"{len(expected)} parameters"
        )
    entries = {_flat_name(key): entry for key, entry in entries.items()}
    entries = {key: entry for key, entry in entries.items() if not key.startswith("batch_stats/")}
    if not entries:
        raise UserError(f"{name}: holds no arrays")
    if all(re.fullmatch(r"arr_\d+", key) for key in entries):
        order = sorted(entries, key=lambda key: int(key[4:]))
        placed = _by_order([entries[key] for key in order], expected, uses, name)
    elif not entries.keys() & expected.keys() and pytorch.named_like_it(entries):
        if uses is None:
            raise UserError(f"{name}: has PyTorch's names, and the network's order is not known")
        arrays = {key: entry.shape for key, entry in entries.items()}
        places = pytorch.match(arrays, uses(), name)
        placed = {"/".join(p.path): p.convert(entries[key].read()) for key, p in places.items()}
    else:
        placed = _by_name(entries, expected, name)
    return _tree(placed, params)


def _by_name(entries, expected, name):
    """Arrays of the network's own names."""
    for key in sorted(entries.keys() - expected.keys()):
        raise UserError(
            f"{name}: the network has no {key}; its arrays are {_listed(sorted(expected))}"
        )
    for key, entry in entries.items():
        if entry.shape != expected[key]:
            hint = ""
            if len(entry.shape) == 4 and pytorch.transposed(entry.shape) == expected[key]:
                hint = "; that is PyTorch's layout: keep its names, weight and bias, or transpose"
            raise UserError(
                f"{name}: {key} is {entry.shape}, the network's is {expected[key]}{hint}"
            )
    return {key: entry.read() for key, entry in entries.items()}


def _by_order(entries, expected, uses, name):
    """Arrays without names: in the order of Flax's tree, of its calls, or of a state dict."""
    shapes = [entry.shape for entry in entries]
    if shapes == list(expected.values()):
        return {key: entry.read() for key, entry in zip(expected, entries)}
    if uses is not None:
        used = uses()
        if shapes == [use.shape for use in used]:
            return {"/".join(use.path): entry.read() for use, entry in zip(used, entries)}
        own = pytorch.without_statistics(entries)
        if [entry.shape for entry in own] == [pytorch.shape_of(use) for use in used]:
            pairs = zip(used, own)
            return {"/".join(u.path): pytorch.converter(u)(e.read()) for u, e in pairs}
    wanted = _listed([f"{key} {shape}" for key, shape in expected.items()])
    raise UserError(
        f"{name}: its {len(shapes)} arrays have no names, and their shapes are not, in order, those"
        f" of the network; wanted are {wanted}; or give them these names"
    )


def _listed(names: Sequence[str]) -> str:
    """Names in one line, not all of a large network's."""
    more = f", and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + more


def _flat_name(name: str) -> str:
    """A name with slashes, below the parameters."""
    return re.sub(r"^params/", "", name.replace(".", "/"))


def _tree(placed: dict[str, np.ndarray], like: PyTree, front: str = "") -> PyTree:
    """Arrays by name as a tree of dicts, of the leaves that are there."""
    if not isinstance(like, dict):
        return placed[front]
    parts = {}
    for key, below in like.items():
        path = f"{front}/{key}" if front else str(key)
        if any(name == path or name.startswith(f"{path}/") for name in placed):
            parts[key] = _tree(placed, below, path)
    return parts


def _npz(path: Path) -> dict[str, Entry]:
    """The arrays of an .npz, of which the headers are read."""
    with open(path, "rb") as file:
        start = file.read(8)
    if start[:1] == b"\x80" or path.suffix in (".pt", ".pth", ".pkl", ".pickle"):
        raise UserError(
            "is a pickle, which can run code and is never opened; save the arrays: np.savez(path, "
            "**{name: x.numpy() for name, x in state.items()}), or safetensors"
        )
    entries = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.filename.endswith(".pkl"):
                raise UserError("holds a pickle, which can run code and is never opened")
            with archive.open(info) as file:
                shape, dtype = _npy_header(file)
            if dtype.hasobject:
                raise UserError(f"{info.filename} is a pickled array, which is never opened")
            key = info.filename.removesuffix(".npy")
            entries[key] = Entry(shape, dtype, lambda of=info.filename: _read_npy(path, of))
    return entries


def _npy_header(file) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise UserError("holds arrays of named fields; an update is of real numbers")
    read = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
    shape, _, dtype = read(file)
    return shape, dtype


def _read_npy(path: Path, name: str) -> np.ndarray:
    with zipfile.ZipFile(path) as archive, archive.open(name) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    # NumPy writes bfloat16, which it does not know, as two bytes of anything.
    return array.view(jnp.bfloat16) if array.dtype == np.dtype("V2") else array


def _safetensors(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file: a header of JSON, and their bytes."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MOST_HEADER, path.stat().st_size):
            raise UserError("its header is longer than the file: damaged, or no safetensors")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    entries = {}
    # The format does not keep an order.
    for key in pytorch.usual_order({key: fields["shape"] for key, fields in header.items()}):
        fields = header[key]
        if fields["dtype"] not in _TYPES:
            raise UserError(f"{key} holds {fields['dtype']}; an update is of real numbers")
        dtype, shape = np.dtype(_TYPES[fields["dtype"]]), tuple(fields["shape"])
        first, last = fields["data_offsets"]
        if last - first != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{key}: its bytes are not those of {shape}: damaged")

        def read(dtype=dtype, shape=shape, at=8 + length + first):
            return np.fromfile(path, dtype, math.prod(shape), offset=at).reshape(shape)

        entries[key] = Entry(shape, dtype, read)
    return entries


def _orbax(path: Path) -> dict[str, Entry]:
    """The arrays of a folder of Orbax, or of a checkpoint that this package wrote."""
    import logging

    from orbax.checkpoint import v1

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    path = path / "arrays" if (path / "arrays").is_dir() else path
    arrays = names_of(v1.load(path.absolute()))

    def as_entry(x):
        return Entry(x.shape, x.dtype, lambda: x)

    return {key: as_entry(x) for key, x in arrays.items()}
