"""Anyone's network, called as the package calls its own.

Linen modules differ in how they are called (`train`, `deterministic`), in what they do at random
(dropout) and in whether Python can hash them (lists and arrays among their fields); a module of
flax.nnx holds its own parameters. `UserNetwork` has the one `apply` that the rest of the package
knows.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict, unfreeze
from jaxtyping import Array, Float

from jaxinv.errors import UserError
from jaxinv.types import PyTree

# Arguments by which a call is told of training, and what they are then. Not so in evaluation.
MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


class UserNetwork:
    """A module of Linen or nnx, and the loss of its outputs where it is not the cross-entropy.

    Two are equal where their modules are; one that cannot be hashed equals itself alone.

    Attributes:
      module: of `flax.linen` or `flax.nnx`.
      loss: of its outputs and the labels, the mean over the images; None for the cross-entropy.
    """

    def __init__(self, module: Any, loss: Callable[[Array, Array], Array] | None = None):
        self.module, self.loss = module, loss
        self._nnx = isinstance(module, nnx.Module)
        if self._nnx:
            self._graph, self._params, self._rest = nnx.split(module, nnx.Param, ...)
        try:
            self._key = hash((module, loss)), module
        except TypeError:
            self._key = id(module), None

    def __hash__(self) -> int:
        return self._key[0]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, UserNetwork) or self.loss is not other.loss:
            return False
        if self._key[1] is None or other._key[1] is None:
            return self.module is other.module
        return self.module == other.module

    @property
    def holds_parameters(self) -> bool:
        """Whether the module is of nnx, and has parameters of its own."""
        return self._nnx

    def variables(self) -> dict:
        """What an nnx module holds, as a tree of dicts."""
        return {"params": nnx.to_pure_dict(self._params)}

    def apply(
        self,
        variables: PyTree,
        images: Float[Array, "batch height width channel"],
        train: bool = False,
        mutable: Any = False,
    ) -> Any:
        """Calls the network, without its dropout: which units it drops is the client's own draw.

        Args:
          variables: "params" and, of Linen, what else it holds.
          images: normalized.
          train: whether BatchNorm takes the images' own statistics.
          mutable: as of `flax.linen.Module.apply`.
        """
        if self._nnx:
            outputs = self._call_nnx(variables["params"], images, train)
            return (outputs, {}) if mutable else outputs
        names = inspect.signature(type(self.module).__call__).parameters
        modes = {name: value == train for name, value in MODES.items() if name in names}
        with nn.intercept_methods(_without_dropout):
            return self.module.apply(variables, images, mutable=mutable, **modes)

    def _call_nnx(self, params: PyTree, images: Array, train: bool) -> Array:
        state = jax.tree.map(lambda x: x, self._params)
        nnx.replace_by_pure_dict(state, params)
        network = nnx.merge(self._graph, state, self._rest)
        network.train() if train else network.eval()
        # Neither a mode nor an argument of the call: dropout is left out.
        network.set_attributes(nnx.Dropout, deterministic=True, raise_if_not_found=False)
        return network(images)


def _without_dropout(next_fun, args, kwargs, context):
    """A Flax interceptor: a dropout layer passes its inputs on."""
    if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
        return args[0]
    return next_fun(*args, **kwargs)


def plain(tree: Any) -> PyTree:
    """A tree as dicts of arrays: without FrozenDict, nnx.State and boxes of metadata."""
    if isinstance(tree, nnx.State):
        return nnx.to_pure_dict(tree)
    tree = nn.meta.unbox(unfreeze(tree) if isinstance(tree, FrozenDict) else tree)
    if isinstance(tree, Mapping):
        return {name: plain(value) for name, value in tree.items()}
    return tree


def output_shape(
    network: UserNetwork, variables: PyTree, image_shape: tuple[int, int, int], train: bool = False
) -> tuple[int, ...]:
    """The shape of what the network makes of two images.

    Raises:
      UserError: it cannot be called as the package does, or makes no array.
    """
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)

    def call(images):
        if train:
            return network.apply(variables, images, train=True, mutable=["batch_stats"])[0]
        return network.apply(variables, images)

    try:
        outputs = jax.eval_shape(call, images)
    except Exception as error:  # whatever a network of someone else's raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        mode = "train=True" if train else "train=False, where it has such an argument"
        raise UserError(
            f"model: cannot be called as model.apply(variables, images) on images of "
            f"{image_shape} with {mode} ({type(error).__name__}: {reason}); give a function "
            "loss(params, images, labels) in its place"
        ) from None
    if not hasattr(outputs, "shape") or outputs.shape[:1] != (2,):
        raise UserError(
            "model: returns something else than one array of outputs, an image a row; give a "
            "function loss(params, images, labels) in its place"
        )
    return outputs.shape
