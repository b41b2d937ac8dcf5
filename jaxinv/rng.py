"""Named streams of randomness, so that comparisons can share one and vary another.

A key is a pure function of a stream, its seed and the indices below it: attack seed 3 on image 17
draws the same in every cell, on every device, in every session.
"""

import enum
import zlib
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array


class Stream(enum.IntEnum):
    """What a key is for. The numbers are part of every published result: never renumber."""

    DATA = 0
    NETWORK = 1
    DEFENSE = 2
    ATTACK = 3
    TRAINING = 4


def stream_key(stream: Stream, seed: int, *indices: int) -> jax.Array:
    """Derives the key of a stream's seed, folded with each index in turn."""
    key = jax.random.fold_in(jax.random.key(seed), int(stream))
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key


def name_key(key: jax.Array, name: str) -> jax.Array:
    """Derives the key of a named part: it does not depend on the part's place among others."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def over_leaves(key: jax.Array, tree: Any, draw: Callable[[jax.Array, Array], Array]) -> Any:
    """Calls `draw(key, leaf)` for every leaf of a tree, each with a key of its own."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(1, len(leaves)))
    return structure.unflatten([draw(k, leaf) for k, leaf in zip(keys, leaves)])
