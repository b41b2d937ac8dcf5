"""Which dense layers a network has, and what goes into them, seen while it is called."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinv.errors import UserError
from jaxinv.types import PyTree


def classifier_path(module: nn.Module, variables: PyTree, images: jax.Array) -> tuple[str, ...]:
    """Finds the last dense layer a network calls: the path of its parameters.

    Raises:
      UserError: the network calls no `flax.linen.Dense`.
    """
    paths: list[tuple[str, ...]] = []

    def look(images):
        with nn.intercept_methods(_on_dense(lambda module, inputs: paths.append(module.path))):
            return module.apply(variables, images)

    jax.eval_shape(look, images)
    if not paths:
        raise UserError("labels=idlg: the network has no dense layer to read a label from; give it")
    return paths[-1]


def classifier_input(
    module: nn.Module, variables: PyTree, images: Float[Array, "batch height width channel"]
) -> Float[Array, "batch feature"]:
    """Computes what goes into the last dense layer a network calls."""
    inputs: list[Array] = []
    with nn.intercept_methods(_on_dense(lambda module, seen: inputs.append(seen))):
        module.apply(variables, images)
    return inputs[-1]


def dense_layers(
    module: nn.Module, variables: PyTree, image_shape: tuple[int, int, int]
) -> list[tuple[str, ...]]:
    """Finds the dense layers of a network, in the order of their calls: their parameters' paths.

    Raises:
      UserError: the first layer is not a dense one on all of the image.
    """
    seen: list[tuple[nn.Module, int]] = []

    def look(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Dense | nn.Conv) and context.method_name == "__call__":
            seen.append((context.module, args[0].size))
        return next_fun(*args, **kwargs)

    image = jnp.zeros((1, *image_shape))
    with nn.intercept_methods(look):
        jax.eval_shape(module.apply, variables, image)
    if not seen or not isinstance(seen[0][0], nn.Dense) or seen[0][1] != image.size:
        raise UserError(
            "--attack analytic and spear need a network whose first layer is dense: --model mlp"
        )
    return [layer.path for layer, _ in seen if isinstance(layer, nn.Dense)]


def subtree(tree: PyTree, path: tuple[str, ...]) -> PyTree:
    """The part of a tree of parameters that belongs to one layer."""
    for name in path:
        tree = tree[name]
    return tree


def _on_dense(see: Callable[[nn.Module, Array], None]) -> Callable:
    """A Flax interceptor that shows every dense layer and its inputs."""

    def interceptor(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            see(context.module, args[0])
        return next_fun(*args, **kwargs)

    return interceptor
