"""The vocabulary every room shares: who knows what, and in which units."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

PyTree = Any


def named(table: Mapping[str, Any], entry: Any) -> Any:
    """An entry of a table by its name; what is no name is itself such an entry."""
    return table[entry] if isinstance(entry, str) else entry


def path_name(path: tuple) -> str:
    """The name of a leaf of a tree by its path, `Conv_0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


class Truth(NamedTuple):
    """The victim's private batch. The client computes its update from it, metrics score with it.

    Nothing on the attacker's side takes a `Truth`: an attack is a function of a `Target`, and the
    loop hands the truth to a measuring function whose result the attack never sees.
    """

    images: Float[Array, "batch height width channel"]  # pixels in [0, 1]
    labels: Int[Array, " batch"]


class Target(NamedTuple):
    """What the attacker has: the shared update, and the labels it knows or inferred."""

    update: PyTree  # shaped like the network's parameters
    labels: Int[Array, " batch"]
    statistics: PyTree = ()  # of the client's batch, per BatchNorm layer, where they are sent along
    defense_knowledge: Any = ()  # `defenses.base.DefenseKnowledge`, of an adaptive attacker


class Normalization(NamedTuple):
    """Per-channel mean and std of the pixels; networks see `(pixels - mean) / std`."""

    mean: Float[Array, " channel"]
    std: Float[Array, " channel"]

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float]) -> "Normalization":
        """Makes one of numbers per channel."""
        return cls(jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32))

    def normalize(self, pixels: Array) -> Array:
        """Maps pixels in [0, 1] to the network's input."""
        return (pixels - self.mean) / self.std

    def pixels(self, normalized: Array) -> Array:
        """Maps the network's input back to pixels, clamped to [0, 1]."""
        return jnp.clip(normalized * self.std + self.mean, 0.0, 1.0)

    def box(self, normalized: Array) -> Array:
        """Projects onto the normalized images whose pixels lie in [0, 1]."""
        return jnp.clip(normalized, -self.mean / self.std, (1.0 - self.mean) / self.std)
