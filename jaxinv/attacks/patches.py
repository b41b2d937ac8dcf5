"""The image of one gradient of a vision transformer, by its position embedding: a linear solve.

Token t is z_t = x_t W + b + p_t, with x_t the pixels of patch t and p_t a parameter of its own. Of
one image dL/dp_t is therefore dL/dz_t, whatever follows, and

    dL/dW = sum over t of x_t^T dL/dz_t

is linear in the patches with known coefficients. Where the embedding has at least as many channels
as there are patches, it determines them; it has more equations than unknowns, so that the solution
says itself whether it is one.

References: Lu et al. 2022, arXiv 2112.14087 (APRIL), who read dL/dz off the position embedding and
  solve at the first attention; the embedding's own gradient asks for nothing of what follows.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinv.attacks.analytic import close
from jaxinv.attacks.closed_form import Given, Recovered
from jaxinv.errors import UserError
from jaxinv.networks.inspect import subtree
from jaxinv.types import PyTree


class Embedding(NamedTuple):
    """Where a network embeds patches, and where it adds their positions."""

    kernel: tuple[str, ...]
    positions: tuple[str, ...]
    extra: int  # tokens before those of the patches, such as a class token


def attack(given: Given) -> Recovered:
    """Solves for the patches of one image.

    Args:
      given: of one image; its label is not read, and there is nothing to draw.

    Raises:
      UserError: the network has no such embedding, or there are several images.
    """
    check(given.module, given.variables, given.image_shape, given.images)
    place = find_embedding(given.variables["params"], given.image_shape)
    kernel = subtree(given.target.update, place.kernel)  # [row, column, channel, feature]
    deltas = subtree(given.target.update, place.positions)
    deltas = deltas.reshape(-1, kernel.shape[-1])[place.extra :]
    flat = kernel.reshape(-1, kernel.shape[-1])
    found = jnp.linalg.lstsq(deltas.T, flat.T)[0]  # [patch, pixel]
    exact = close(found.T @ deltas, flat) & (deltas.shape[0] <= deltas.shape[1])
    return Recovered(_assemble(found, kernel.shape, given.image_shape)[None], exact[None])


def _assemble(
    patches: Float[Array, "patch pixel"], kernel: tuple[int, ...], image_shape: tuple[int, int, int]
) -> Float[Array, "height width channel"]:
    """Lays patches out as an image, row by row."""
    (height, width, channels), (rows, columns) = image_shape, kernel[:2]
    grid = patches.reshape(height // rows, width // columns, rows, columns, channels)
    return grid.transpose(0, 2, 1, 3, 4).reshape(image_shape)


def find_embedding(params: PyTree, image_shape: tuple[int, int, int]) -> Embedding:
    """Finds a convolution on patches that do not overlap, and the positions added to them.

    By shapes alone: a kernel [p, p, channels of the image, features], and a parameter
    [1, patches, features] or with one token more.

    Raises:
      UserError: there is no such pair, or there are several.
    """
    height, width, channels = image_shape
    leaves = [
        (tuple(getattr(k, "key", str(k)) for k in path), leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    found = []
    for kernel, shape in leaves:
        if len(shape) != 4 or shape[2] != channels or height % shape[0] or width % shape[1]:
            continue
        patches = (height // shape[0]) * (width // shape[1])
        for positions, own in leaves:
            tokens = own[-2] if len(own) in (2, 3) else -1
            if len(own) == 3 and own[0] != 1:
                continue
            if tokens in (patches, patches + 1) and own[-1] == shape[3]:
                found.append(Embedding(kernel, positions, tokens - patches))
    if len(found) != 1:
        raise UserError(
            "--attack patches: needs a network that embeds patches and adds learned positions: "
            "--model vit"
        )
    return found[0]


def check(
    module: nn.Module, variables: PyTree, image_shape: tuple[int, int, int], images: int
) -> None:
    """Raises a UserError unless there is one image, and the network has such an embedding."""
    del module
    if images > 1:
        raise UserError("--attack patches: is for one image behind an update; give --images 1")
    find_embedding(variables["params"], image_shape)
