"""The victim's side: the update a federated client shares for its private batch.

One gradient (FedSGD), or what several local steps of gradient descent add up to (FedAvg, McMahan et
al. 2017, arXiv 1602.05629). The attacker calls the same functions on its candidate, so that sign,
scale and reduction agree by construction.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinv.errors import UserError
from jaxinv.networks.convolution import fast_convolutions
from jaxinv.networks.user import UserNetwork
from jaxinv.types import PyTree

# Parameters, normalized images -> logits, and the batch's own statistics (() where not computed).
ApplyFn = Callable[[PyTree, Array], tuple[Array, PyTree]]
# Parameters, normalized images, labels -> the loss whose gradient a client shares, and statistics.
LossFn = Callable[[PyTree, Array, Array], tuple[Array, PyTree]]

# What BatchNorm does on the client, and what of it the server sees: part of the threat model.
BATCH_NORM = {
    "eval": "running statistics, constants of the network",
    "train": "the batch's own statistics, kept private",
    "train-shared": "the batch's own statistics, sent along with the update",
}


class Local(NamedTuple):
    """What a client does between receiving the parameters and sending its update."""

    epochs: int = 1  # passes over its images
    batch: int | None = None  # images of a step; None takes all

    def steps(self, images: int) -> int:
        """Gradient steps on that many images."""
        return self.epochs * (images // (self.batch or images))


def apply_fn(
    module: nn.Module | UserNetwork,
    variables: PyTree,
    batch_norm: str = "eval",
    observe: bool = False,
) -> ApplyFn:
    """Makes a pure function of a network, on the trilinear convolution.

    Running statistics are an input that nothing changes. In evaluation mode they are constants of
    the network; in training mode the images' own statistics take their place, and are returned as
    `{"batch_stats": {layer: {"mean", "var"}}}`.

    Args:
      module: called as `module.apply(variables, images)`, with `train=True` in training mode.
      variables: "params" and what else the module holds.
      batch_norm: one of `BATCH_NORM`.
      observe: whether evaluation mode returns the statistics of each BatchNorm's input, which it
        does not use.

    Calling the function raises a UserError where statistics are to be sent ("train-shared") of
    another layer than `flax.linen.BatchNorm`.
    """

    def evaluating(params, images):
        params, seen = whole(variables, params), {}

        def look(next_fun, args, kwargs, context):
            if isinstance(context.module, nn.BatchNorm):
                axes = tuple(range(args[0].ndim - 1))
                seen[context.module.path] = {"mean": args[0].mean(axes), "var": args[0].var(axes)}
            return next_fun(*args, **kwargs)

        with fast_convolutions(), nn.intercept_methods(look) if observe else nullcontext():
            logits = module.apply({**variables, "params": params}, images)
        return logits, {"batch_stats": unflatten_dict(seen)} if observe else ()

    def training(params, images):
        # From zero, Flax's moving average is (1 - momentum) times the batch's statistics.
        zeros = jax.tree.map(jnp.zeros_like, variables.get("batch_stats", {}))
        params, momenta = whole(variables, params), {}

        def look(next_fun, args, kwargs, context):
            if isinstance(context.module, nn.BatchNorm):
                momenta[context.module.path] = context.module.momentum
            return next_fun(*args, **kwargs)

        with fast_convolutions(), nn.intercept_methods(look):
            logits, moved = module.apply(
                {**variables, "params": params, "batch_stats": zeros},
                images,
                train=True,
                mutable=["batch_stats"],
            )
        averages = {name: flatten_dict(tree) for name, tree in moved.items()}
        for layers in averages.values():
            for path in layers:
                momentum = momenta.get(path[:-1], 1.0)
                if momentum < 1:
                    layers[path] /= 1 - momentum
                elif batch_norm == "train-shared":
                    raise UserError(
                        f"batch_norm: {'/'.join(path)} says nothing of the batch, for it is of no "
                        "flax.linen.BatchNorm that moves; use train"
                    )
        return logits, {name: unflatten_dict(layers) for name, layers in averages.items()}

    return evaluating if batch_norm == "eval" else training


def loss_fn(
    model: nn.Module | UserNetwork | Callable,
    variables: PyTree,
    batch_norm: str = "eval",
    observe: bool = False,
) -> LossFn:
    """Makes the loss of a client: the cross-entropy of a module, or a function taken as it is.

    Args:
      model: a network; or `loss(params, images, labels)`, a scalar, the mean over the images.
      variables, batch_norm, observe: as in `apply_fn`; nothing to a function.
    """
    if not isinstance(model, nn.Module | UserNetwork):

        def plain(params, images, labels):
            with fast_convolutions():
                return model(whole(variables, params), images, labels), ()

        return plain
    apply = apply_fn(model, variables, batch_norm, observe)
    of_logits = (model.loss if isinstance(model, UserNetwork) else None) or cross_entropy

    def loss(params, images, labels):
        logits, statistics = apply(params, images)
        return of_logits(logits, labels), statistics

    return loss


def whole(variables: PyTree, params: PyTree) -> PyTree:
    """All parameters of a network: those that a client trains, and beside them its constant ones.

    A client that trains some layers alone keeps the others, `variables["constants"]`.
    """
    return _merged(variables["constants"], params) if "constants" in variables else params


def _merged(constants: PyTree, params: PyTree) -> PyTree:
    """Two trees of dicts that have no leaf in common, as one."""
    both = constants.keys() & params.keys()
    return {**constants, **params, **{k: _merged(constants[k], params[k]) for k in both}}


def cross_entropy(
    logits: Float[Array, "batch class"], labels: Int[Array, " batch"] | Float[Array, "batch class"]
) -> Float[Array, ""]:
    """Computes the mean cross-entropy over the images.

    Labels are classes, or a distribution over them for each image.
    """
    if labels.ndim == logits.ndim:
        return optax.softmax_cross_entropy(logits, labels).mean()
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def gradient(
    loss: LossFn, params: PyTree, images: Float[Array, "batch height width channel"], labels: Array
) -> tuple[PyTree, PyTree]:
    """Computes the gradient of a loss with respect to the parameters.

    Args:
      loss: of the network.
      params: where the gradient is taken.
      images: normalized.
      labels: as in `cross_entropy`.

    Returns:
      The gradient, and the statistics of the batch.
    """
    return jax.grad(loss, has_aux=True)(params, images, labels)


def update(
    loss: LossFn,
    params: PyTree,
    images: Float[Array, "image height width channel"],
    labels: Array,
    local: Local = Local(),  # noqa: B008
    rate: Float[Array, ""] | float = 1.0,
) -> tuple[PyTree, PyTree]:
    """Computes what a client shares: the sum of the gradients of its local steps.

    After steps w <- w - rate * gradient that sum is (w_first - w_last) / rate, the update of
    FedAvg up to a factor, without the digits that the difference of the two would lose in float32.
    One step's is the gradient. Differentiable with respect to the images through all steps, each
    computed again on the way back: memory grows with the steps by the parameters alone.

    Args:
      loss, params: of the network, and the parameters that the client received.
      images: normalized, in the order in which the client takes them, `local.batch` at a time; once
        for all epochs, or [epoch, image, ...] with an order of its own in each.
      labels: as in `cross_entropy`, with the images' leading axes.
      local: how many steps, and of how many images.
      rate: the client's learning rate.

    Returns:
      The update, and the statistics of the last step's batch.
    """
    by_epoch = images.ndim == 5
    count = images.shape[1 if by_epoch else 0]
    if local.steps(count) == 1:
        return gradient(loss, params, *((images[0], labels[0]) if by_epoch else (images, labels)))

    def split(x):
        return x.reshape(-1, local.batch or count, *x.shape[1:])

    @jax.checkpoint
    def step(total, batch):
        now = jax.tree.map(lambda first, moved: first - rate * moved, params, total)
        found, statistics = gradient(loss, now, *batch)
        return jax.tree.map(jnp.add, total, found), statistics

    def epoch(total, own):
        return lax.scan(step, total, jax.tree.map(split, own or (images, labels)))

    total = jax.tree.map(jnp.zeros_like, params)
    order = (images, labels) if by_epoch else None
    total, statistics = lax.scan(epoch, total, order, length=local.epochs)
    return total, jax.tree.map(lambda x: x[-1, -1], statistics)
