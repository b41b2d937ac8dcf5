"""What the attacker takes for the labels: told, or read off the update."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxinv.errors import UserError
from jaxinv.types import PyTree

LABELS = ("known", "idlg")


def classifier_path(module: nn.Module, variables: PyTree, images: jax.Array) -> tuple[str, ...]:
    """Finds the last dense layer a network calls: the path of its parameters.

    Raises:
      UserError: the network calls no `flax.linen.Dense`.
    """
    paths: list[tuple[str, ...]] = []

    def interceptor(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            paths.append(context.module.path)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        jax.eval_shape(module.apply, variables, images)
    if not paths:
        raise UserError("labels=idlg: the network has no dense layer to read a label from; give it")
    return paths[-1]


def idlg(update: PyTree, classifier: tuple[str, ...]) -> Int[Array, " 1"]:
    """Reads the label of a single image off the gradient of the last dense layer.

    The gradient of the logits is softmax - onehot: negative for the true class alone. The bias
    gradient is that vector. Without a bias, the sum of a class's weight gradients has its sign
    wherever the features before the layer have a positive sum, as after a ReLU or sigmoid.

    References: Zhao et al. 2020 (iDLG), arXiv 2001.02610.
    """
    for name in classifier:
        update = update[name]
    logits_gradient = update["bias"] if "bias" in update else update["kernel"].sum(axis=0)
    return jnp.argmin(logits_gradient)[None]
