"""A training in work on disk: each state under a name of its steps, whole before the last one goes.

A kill leaves the newest whole state, whenever it comes.
"""

import abc
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import BaseModel, ValidationError, field_validator

from jaxinv import files
from jaxinv.errors import UserError
from jaxinv.types import PyTree
from jaxinv.victim import checkpoints


class WrittenState(BaseModel):
    """What a state on disk says beside its arrays."""

    COLUMNS: ClassVar[frozenset[str]]  # that every row of the log has

    log: list[dict[str, int | float]]
    within: Any  # of the epoch in work, what its row will be made of
    seconds: float
    digest: str

    @field_validator("log")
    @classmethod
    def _has_columns(cls, log: list) -> list:
        if any(not row.keys() >= cls.COLUMNS for row in log):
            raise ValueError("a row lacks a column")
        return log


class Resumable(abc.ABC):
    """A training that goes on where it was stopped.

    Whoever is one sets the fields below, and says what has a say in its parameters: `_recipe`.
    """

    STATE: ClassVar[type[WrittenState]]  # what a state of it says beside its arrays

    folder: Path  # of what comes of it
    state_folder: Path
    state: Any  # with the `step` that it has come to
    steps_per_epoch: int
    log: list[dict[str, Any]]  # a row for each epoch
    within: Any  # of the epoch in work, what its row will be made of
    seconds: float

    @abc.abstractmethod
    def _recipe(self) -> dict[str, Any]:
        """Every setting that has a say in the parameters, as JSON knows it."""

    def _check_same(self, recipe: Any) -> None:
        """Raises a UserError unless a recipe found on disk is this training's."""
        checkpoints.check_recipe(self.folder, recipe, self._recipe())

    def _check_kept(self, folder: Path, storage: str) -> dict[str, Any]:
        """What a checkpoint says of itself, which is to be one that this training writes.

        Args:
          folder: of the checkpoint.
          storage: the precision that is asked for.

        Raises:
          UserError: it is damaged, of another recipe, or kept in another precision.
        """
        fields = checkpoints.read_fields(folder)
        checkpoints.check_recipe(folder, fields.get("recipe"), self._recipe())
        if (kept := fields.get("storage", "float32")) != storage:
            raise UserError(
                f"--storage {storage}: {folder} is kept in {kept}; choose another "
                "--out, or repeat its setting"
            )
        return fields

    def _write_state(self) -> None:
        """Writes what a resumed training needs."""
        told = {"log": self.log, "within": self.within, "seconds": self.seconds}
        write(self.state_folder, self.state, told | {"recipe": self._recipe()})

    def _resume(self) -> bool:
        """Takes up the last state written; tells whether there is one.

        Raises:
          UserError: it is damaged, or of another training.
        """
        found = read(
            self.state_folder, self.state, self.STATE, self.steps_per_epoch, self._check_same
        )
        if found is not None:
            self.state, told = found
            self.log, self.within, self.seconds = told.log, told.within, told.seconds
        return found is not None


Told = TypeVar("Told", bound=WrittenState)


def write(folder: Path, state: PyTree, told: Mapping[str, Any]) -> None:
    """Writes what a resumed training needs, then removes the state before.

    Args:
      folder: of the states.
      state: with the `step` it has come to.
      told: its recipe, and what its `WrittenState` says but for the digest.

    Raises:
      UserError: the folder cannot be written.
    """
    name = f"step{int(state.step):08d}"
    checkpoints.write(folder / name, _as_tree(state), told, told["log"])
    for old in folder.iterdir():
        if old.name != name:
            shutil.rmtree(old, ignore_errors=True)


def read(
    folder: Path,
    state: PyTree,
    kind: type[Told],
    steps_per_epoch: int,
    check_recipe: Callable[[Any], None],
) -> tuple[PyTree, Told] | None:
    """Reads the last state written.

    Args:
      folder: of the states.
      state: one of the same structure and shapes.
      kind: what it says beside its arrays, with a digest.
      steps_per_epoch: of which the log has a row each.
      check_recipe: raises a UserError where a recipe is of another training.

    Returns:
      The state, and what it says; None where there is none.

    Raises:
      UserError: it is damaged, or of another training.
    """
    kept = sorted(folder.glob("step*"))
    if not kept:
        return None
    fields = checkpoints.read_fields(kept[-1])
    check_recipe(fields.get("recipe"))
    try:
        told = kind.model_validate(fields)
    except ValidationError as error:
        raise UserError(
            f"{kept[-1]}/info.json: is not what a training writes ({files.first_error(error)}); "
            "delete that folder"
        ) from None
    tree = checkpoints.read(kept[-1], _as_tree(state), told.digest, "this training's state")
    leaves = [jnp.asarray(tree[name]) for name in sorted(tree)]
    found = jax.tree.unflatten(jax.tree.structure(state), leaves)
    if not 0 <= int(found.step) - len(told.log) * steps_per_epoch <= steps_per_epoch:
        raise UserError(
            f"{kept[-1]}/info.json: logs {len(told.log)} epochs, its state has taken "
            f"{int(found.step)} steps; delete that folder"
        )
    return found, told


def _as_tree(state: PyTree) -> PyTree:
    """The state's leaves by number: Orbax gives back no named tuples."""
    return {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
