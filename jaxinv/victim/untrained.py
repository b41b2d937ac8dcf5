"""The network under attack: its parameters, and the digest every row names."""

import hashlib
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxinv import networks, rng
from jaxinv.types import PyTree


class Victim(NamedTuple):
    """A network with parameters, ready to be attacked."""

    module: nn.Module
    variables: PyTree  # {"params": ..., and running statistics where the network has them}
    digest: str
    accuracy: float | None = None  # on the test split; None where it was not trained
    epsilon: float | None = None  # of a training with DP-SGD
    delta: float | None = None


def untrained(
    name: str, *, classes: int, width: int | None, seed: int, image_shape: tuple[int, int, int]
) -> Victim:
    """Initializes a network from a seed of the NETWORK stream.

    Args:
      image_shape: height, width, channel.
    """
    module = networks.build(name, classes=classes, width=width)
    key = rng.stream_key(rng.Stream.NETWORK, seed)
    # It runs once, and optimizing it for that takes a CPU longer than all else at a start.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    init = jax.jit(module.init, compiler_options=options)
    variables = init(key, jnp.zeros((1, *image_shape)))
    return Victim(module, variables, digest(variables))


def digest(variables: PyTree) -> str:
    """Computes the sha256 of all variables: names, shapes, types and bytes, in sorted order."""
    sha = hashlib.sha256()
    leaves, _ = jax.tree_util.tree_flatten_with_path(variables)
    for path, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0])):
        array = np.asarray(leaf)
        header = f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}"
        sha.update(header.encode() + array.tobytes())
    return sha.hexdigest()
