"""Trained networks on disk, and back as victims.

    checkpoints/NAME/
      info.json   which network, data and recipe; accuracies; sha256 of the variables
      log.csv     one row per epoch of training
      arrays/     the variables, written by Orbax

A folder is written under a temporary name and renamed: it is there whole or not at all. Orbax does
not notice a changed byte, so the digest is checked on every load.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from jaxinv import data, files, networks
from jaxinv.errors import UserError
from jaxinv.types import PyTree
from jaxinv.victim.untrained import Victim, digest

FOLDER = "checkpoints"
SHIPPED = files.shipped(FOLDER)  # all of them in a clone, the smallest in an installed package


class Privacy(BaseModel):
    """What a training with DP-SGD guarantees, and on which assumptions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    noise_multiplier: float
    clip: float  # L2 norm of an example's gradient, at the most
    sampling_rate: float  # probability with which an example is in a batch
    steps: int
    delta: float
    epsilon_pld: float  # inf without noise
    epsilon_rdp: float
    assumptions: str


Size = Annotated[int, Field(ge=1, le=4096)]  # of an image; more is a damaged file


class Info(BaseModel):
    """What info.json says of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    width: int | None = Field(ge=1)  # None where the network has no such setting
    dataset: str
    classes: tuple[str, ...]
    image_shape: tuple[Size, Size, Size]  # height, width, channel
    mean: tuple[FiniteFloat, ...]  # per channel, of pixels in [0, 1]: the network's normalization
    std: tuple[Annotated[FiniteFloat, Field(gt=0)], ...]
    recipe: dict[str, Any]  # every setting of the training
    epochs: int  # finished
    steps: int
    train_accuracy: float | None  # over the last whole epoch, as trained; None before its end
    test_accuracy: Annotated[float, Field(ge=0, le=1)]
    seconds: float  # of training, compilation included
    hardware: str
    versions: dict[str, str]
    privacy: Privacy | None = None  # of a training with DP-SGD
    storage: str = "float32"  # precision of the variables, which every load gives back as float32
    digest: str = ""  # filled in by `save`

    @model_validator(mode="after")
    def _of_channels(self) -> "Info":
        if not len(self.mean) == len(self.std) == self.image_shape[2]:
            raise ValueError("mean and std: must be of as many channels as image_shape")
        return self

    @model_validator(mode="after")
    def _has_its_width(self) -> "Info":
        known = networks.NETWORKS.get(self.model)
        if self.width is not None and known is not None and known.width is None:
            raise ValueError(f"width: {self.model} has one size, not {self.width}")
        return self


class TrainedVictim(NamedTuple):
    """A `Victim` that was loaded, with what is known of its training."""

    module: nn.Module
    variables: PyTree
    digest: str
    info: Info

    def as_victim(self) -> Victim:
        """What an attack wants to know of it."""
        privacy = self.info.privacy
        return Victim(
            self.module,
            self.variables,
            self.digest,
            self.info.test_accuracy,
            *((None, None) if privacy is None else (privacy.epsilon_pld, privacy.delta)),
        )


def save(folder: Path, variables: PyTree, info: Info, log: Sequence[Mapping[str, Any]]) -> None:
    """Writes a checkpoint, in place of one that is there.

    Args:
      folder: of the checkpoint.
      variables: `rounded` to `info.storage`.
      info: without its digest.
      log: a row per epoch.
    """
    write(folder, variables, info.model_dump(exclude={"digest"}), log, info.storage)


def rounded(variables: PyTree, storage: str) -> PyTree:
    """Rounds float32 variables to what a checkpoint of this precision gives back, in float32."""
    return jax.tree.map(lambda x: x.astype(storage).astype(x.dtype), variables)


def load_victim(path_or_name: str | Path, setting: str = "victim") -> TrainedVictim:
    """Loads a trained network.

    Args:
      path_or_name: a checkpoint's folder, or the name of one in `checkpoints/` of the working
        directory or of those that are shipped.
      setting: that names it.

    Raises:
      UserError: there is no such checkpoint, it is incomplete or damaged, or what it holds is not
        the network its info.json names.
    """
    folder = find(path_or_name, setting)
    info = read_info(folder)
    module = networks.build(info.model, classes=len(info.classes), width=info.width)
    template = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *info.image_shape)))
    name = info.model if info.width is None else f"{info.model} of width {info.width}"
    variables = read(folder, template, info.digest, f"a {name}")
    return TrainedVictim(module, variables, info.digest, info)


def read_info(folder: Path) -> Info:
    """Reads what a checkpoint says of itself.

    Raises:
      UserError: info.json is missing, damaged or incomplete.
    """
    try:
        return Info.model_validate(read_fields(folder))
    except ValidationError as error:
        raise UserError(f"--victim {folder}: info.json: {files.first_error(error)}") from None


def check_fits(victim: TrainedVictim, dataset: data.Dataset, setting: str = "victim") -> None:
    """Raises a UserError unless the victim was trained for such classes and images."""
    info = victim.info
    if len(info.classes) != len(dataset.classes):
        raise UserError(
            f"--{setting} was trained on {info.dataset} with {len(info.classes)} classes; "
            f"--dataset {dataset.name} has {len(dataset.classes)}"
        )
    if info.image_shape != dataset.images.shape[1:]:
        wanted, got = ("x".join(map(str, s)) for s in (info.image_shape, dataset.images.shape[1:]))
        raise UserError(
            f"--{setting} takes {wanted} images; those of --dataset {dataset.name}: {got}"
        )


def find(path_or_name: str | Path, setting: str = "victim") -> Path:
    """The folder of a checkpoint, which a setting names.

    Raises:
      UserError: none of the places it may be in exists.
    """
    places = [Path(path_or_name), Path(FOLDER) / path_or_name, SHIPPED / path_or_name]
    for place in places:
        if place.is_dir():
            return place
    raise UserError(
        f"--{setting} {path_or_name}: no such checkpoint; give its folder, or its name in "
        f"{FOLDER}/ (python -m jaxinv.train makes them, a clone of the repository has more)"
    )


def of_name(out: str | Path) -> Path:
    """Where a new checkpoint goes: a name means a folder in `checkpoints/`."""
    out = Path(out)
    return out if len(out.parts) > 1 else Path(FOLDER) / out


def check_recipe(folder: Path, found: Any, asked: Mapping[str, Any]) -> None:
    """Raises a UserError unless a recipe found on disk is that of the training asked for."""
    if not isinstance(found, dict):
        raise UserError(f"--out {folder}: its recipe is damaged; delete the folder")
    for name, value in asked.items():
        if found.get(name) != value:
            raise UserError(
                f"--out {folder}: holds a training with {name} {found.get(name)}, not "
                f"{value}; choose another --out, or repeat its settings"
            )


def write(
    folder: Path,
    tree: PyTree,
    fields: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    storage: str | None = None,
) -> None:
    """Writes a tree of arrays, its digest, `fields` and the log as a folder, whole or not at all.

    Args:
      folder: to write; one that is there is replaced.
      tree: of arrays, which the digest is of.
      fields: the rest of info.json.
      log: a row per epoch.
      storage: dtype of all arrays on disk, which must hold them exactly; their own if not given.

    Raises:
      UserError: the folder cannot be written.
    """
    ocp = _orbax()
    tree = jax.device_get(tree)  # NumPy arrays load on every machine, whatever device wrote them
    temporary = folder.absolute().with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        stored = tree if storage is None else jax.tree.map(lambda x: x.astype(storage), tree)
        ocp.save(temporary / "arrays", stored)
        # Orbax wrote the folder's path on its maker's machine into it; that it is there is enough.
        (temporary / "arrays" / "commit_success.txt").write_text("Checkpoint commit was successful")
        files.write_file(temporary / "log.csv", lambda f: f.write(files.csv_bytes(log)))
        text = json.dumps({**fields, "digest": digest(tree)}, indent=2) + "\n"
        files.write_file(temporary / "info.json", lambda f: f.write(text.encode()))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except OSError as error:
        # Orbax raises a TimeoutError, which says nothing, where a disk stands still.
        reason = error.strerror or type(error).__name__
        raise UserError(f"--out {folder}: cannot be written ({reason})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_fields(folder: Path) -> dict[str, Any]:
    """Reads info.json.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        fields = files.read_json(folder / "info.json")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "damaged"
        raise UserError(f"{folder}/info.json cannot be read ({reason}); {_REPAIR}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{folder}/info.json holds no settings; {_REPAIR}")
    return fields


def read(folder: Path, template: PyTree, expected_digest: str, name: str) -> PyTree:
    """Reads a tree of arrays and checks it.

    Args:
      folder: the checkpoint.
      template: a tree of the same structure, of anything with shape and dtype.
      expected_digest: of the tree.
      name: what the tree should be, for the message.

    Raises:
      UserError: missing, damaged, of another structure, or with another digest.
    """
    try:
        tree = _orbax().load((folder / "arrays").absolute())
    except Exception:  # Orbax raises a bare Exception, with pages of log, for a truncated file
        message = f"{folder}: arrays/ cannot be read (missing or damaged); {_REPAIR}"
        raise UserError(message) from None
    leaves = jax.tree.leaves(template)
    tree = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x, tree)
    same = jax.tree.structure(tree) == jax.tree.structure(template) and all(
        x.shape == y.shape and x.dtype == y.dtype for x, y in zip(jax.tree.leaves(tree), leaves)
    )
    if not same:
        raise UserError(f"{folder}: made for another network: arrays/ does not hold {name}")
    if digest(tree) != expected_digest:
        raise UserError(
            f"{folder}: the sha256 of arrays/ is not the digest in info.json: damaged; {_REPAIR}"
        )
    return tree


_REPAIR = "copy the checkpoint again, or train it again"


def _orbax():
    """Orbax, imported when needed (it takes seconds) and without its log."""
    from orbax.checkpoint import v1

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    return v1
