"""Training what an attacker learns from the training split: one compiled loop, kept as it goes.

Adam on mirrored halves of the images. Everything random is a function of the seed and the step, and
the state is written every minute: a training that was killed goes on to the same bits.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from jaxinv import client, defenses, metrics
from jaxinv.defenses.base import ClientContext
from jaxinv.learned import nets
from jaxinv.types import Normalization, PyTree
from jaxinv.victim.training import SCHEDULES

LEAST_NOISE, MOST_NOISE = 0.02, 0.5  # levels a denoiser is trained for, in units of pixels
TESTED = 2000  # images of the test split on which the loss is reported
LEAST_STD = 0.1  # of a bin, against what is usual: behind pruning most are 0 nearly always
TINY = 1e-8  # where none differs


class Examples(NamedTuple):
    """A split on the device."""

    images: UInt8[Array, "example height width channel"]
    labels: Int[Array, " example"]

    def take(self, which: Int[Array, " image"]) -> "Examples":
        """Some of them, pixels in [0, 1]."""
        return Examples(self.images[which] / jnp.float32(255), self.labels[which])


class Task(NamedTuple):
    """What is learned: static."""

    loss: Callable[..., Float[Array, ""]]  # (params, context, Examples of pixels, key)
    lr: float  # the highest
    schedule: str
    steps: int  # in all

    def optimizer(self) -> optax.GradientTransformation:
        """Adam."""
        return optax.adam(lambda step: self.lr * SCHEDULES[self.schedule](step / self.steps))


class State(NamedTuple):
    """What the next step needs."""

    params: PyTree
    optimizer: PyTree
    step: Int[Array, ""]


def denoising_loss(
    params: PyTree, context: tuple[()], examples: Examples, key: Array
) -> Float[Array, ""]:
    """The mean squared error of a denoiser at a random level each.

    In units of what is asked of the network, so that all levels count alike.
    """
    del context
    pixels = examples.images
    of_level, of_noise = jax.random.split(key)
    low, high = jnp.log(LEAST_NOISE), jnp.log(MOST_NOISE)
    level = jnp.exp(jax.random.uniform(of_level, (len(pixels),), minval=low, maxval=high))
    noise = level[:, None, None, None] * jax.random.normal(of_noise, pixels.shape)
    error = jnp.square(nets.denoise(params, pixels + noise, level) - pixels).mean(axis=(1, 2, 3))
    return jnp.mean(error * (1 / jnp.square(level) + 1 / nets.SPREAD**2))


def autoencoding_loss(
    params: PyTree, context: tuple[()], examples: Examples, key: Array
) -> Float[Array, ""]:
    """The mean squared error of what comes back through an autoencoder."""
    del context, key
    return jnp.square(nets.encode(params, examples.images) - examples.images).mean()


LOSSES = {"denoiser": denoising_loss, "autoencoder": autoencoding_loss}  # of pixels alone


class Updates(NamedTuple):
    """The context of an inverter: whose updates it learns from, and their scale."""

    variables: PyTree  # of the victim
    normalization: Normalization
    strengths: tuple  # of the clients' defense
    scale: PyTree  # of the bins, "mean" and "std"


def in_groups(examples: Examples, images: int) -> Examples:
    """Images as updates hold them, [update, image, ...]; those that are left over are dropped."""
    updates = len(examples.labels) // images
    return jax.tree.map(
        lambda x: x[: updates * images].reshape(updates, images, *x.shape[1:]), examples
    )


def update_bins(
    module: nn.Module, chain: tuple[str, ...], context: Updates, groups: Examples, key: Array
) -> Float[Array, "update bin"]:
    """What clients of some images each send, defended and hashed."""
    variables = context.variables
    loss = client.loss_fn(module, variables)

    def one(pixels, labels, key):
        images = context.normalization.normalize(pixels)
        update, _ = client.gradient(loss, variables["params"], images, labels)
        own = ClientContext(module, variables, images, labels)
        return nets.hashed(defenses.defend(chain, update, context.strengths, key, own))

    return jax.vmap(one)(*groups, jax.random.split(key, len(groups.labels)))


def inverting_loss(
    module: nn.Module,
    chain: tuple[str, ...],
    images: int,
    params: PyTree,
    context: Updates,
    examples: Examples,
    key: Array,
) -> Float[Array, ""]:
    """The mean squared error of an inverter, each image of an update against the one it is nearest.

    An update does not say in which order its images came: the assignment is the one of least error.

    Args:
      module: the victim's.
      chain: names of the clients' defenses.
      images: of each update.
      params: of the inverter.
      context, examples, key: as in `Task.loss`.
    """
    groups = in_groups(examples, images)
    bins = update_bins(module, chain, context, groups, key)
    variables = {"params": params, "scale": context.scale}
    found = nets.invert(variables, bins, groups.labels, examples.images.shape[1:])
    wanted = jax.vmap(metrics.match)(groups.images, lax.stop_gradient(found))
    return jnp.square(found - wanted).mean()


def scale_of(hashed: Float[Array, "update number"]) -> dict[str, Float[Array, " number"]]:
    """Mean and standard deviation of each number of hashed updates.

    The deviation is not below a share of what is usual: a bin that differs from 0 in one of a
    thousand updates would be thousands of deviations off there, and nothing else would be seen.
    """
    std = hashed.std(axis=0)
    usual = jnp.sqrt(jnp.square(std).mean())
    return {"mean": hashed.mean(axis=0), "std": jnp.maximum(std, LEAST_STD * usual + TINY)}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def bin_scale(
    module: nn.Module, chain: tuple[str, ...], images: int, context: Updates, examples: Examples
) -> dict[str, Float[Array, " number"]]:
    """`scale_of` the updates of some images."""

    def one(index):
        own = jax.random.fold_in(jax.random.key(0), index)
        group = examples.take(index * images + jnp.arange(images))
        return update_bins(module, chain, context, in_groups(group, images), own)[0]

    return scale_of(lax.map(one, jnp.arange(len(examples.labels) // images)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def run_steps(
    task: Task,
    state: State,
    context: PyTree,
    examples: Examples,
    order: Int[Array, "step batch"],
    key: Array,
    first: int,
    last: int,
) -> tuple[State, Float[Array, ""]]:
    """Takes the steps `first` <= i < `last` of an epoch; returns the sum of their losses too.

    Args:
      task: what is learned.
      state: is donated: use the returned one.
      context: what the loss is given beside the images.
      examples: the training split.
      order: the epoch's batches.
      key: the epoch's; step i uses `fold_in(key, i)`.
      first, last: traced.
    """

    def step(index, carry):
        state, total = carry
        of_mirror, of_loss = jax.random.split(jax.random.fold_in(key, index))
        batch = examples.take(order[index])
        mirrored = jax.random.bernoulli(of_mirror, shape=(len(batch.labels), 1, 1, 1))
        pixels = jnp.where(mirrored, batch.images[:, :, ::-1], batch.images)
        value, gradient = jax.value_and_grad(task.loss)(
            state.params, context, batch._replace(images=pixels), of_loss
        )
        change, optimizer = task.optimizer().update(gradient, state.optimizer)
        params = optax.apply_updates(state.params, change)
        return State(params, optimizer, state.step + 1), total + value

    return lax.fori_loop(first, last, step, (state, jnp.zeros(())))


@functools.partial(jax.jit, static_argnums=(0, 4))
def mean_loss(task: Task, params: PyTree, context: PyTree, examples: Examples, batch: int) -> Array:
    """The mean loss over a split, in whole batches, by the same draws each time."""

    def one(index):
        pixels = examples.take(index * batch + jnp.arange(batch))
        return task.loss(params, context, pixels, jax.random.key(index))

    return lax.map(one, jnp.arange(len(examples.labels) // batch)).mean()
