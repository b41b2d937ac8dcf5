"""Training a network: pure functions, one compiled loop, the data set on the device.

The loop takes a run of steps out of an epoch, and how many is an argument of it: the host moves
its progress bar and stops anywhere without a second compilation. Everything random is a pure
function of the seed, the epoch and the step, so a run that was cut off between two epochs goes on
to the same bits.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from jaxinv import rng
from jaxinv.networks.convolution import fast_convolutions
from jaxinv.privacy.gradient import add_noise, clipped_sum
from jaxinv.types import Normalization, PyTree

MOMENTUM = 0.9  # Nesterov's, as in the public code of Geiping et al. 2020
WEIGHT_DECAY = 5e-4  # on every parameter
PAD = 4  # zeros of the input around an image before the crop
EVALUATION_BATCH = 256

# The learning rate's factor by the fraction of training done.
SCHEDULES = {
    # Geiping et al. 2020: a tenth at 3/8, 5/8 and 7/8.
    "step": lambda done: 0.1 ** ((done >= 3 / 8) * 1.0 + (done >= 5 / 8) + (done >= 7 / 8)),
    "cosine": lambda done: 0.5 * (1 + jnp.cos(jnp.pi * done)),
    # Smith & Topin 2018: up in a straight line for a quarter, then down a cosine; for few epochs.
    "one-cycle": lambda done: jnp.where(
        done < 0.25, done / 0.25, 0.5 * (1 + jnp.cos(jnp.pi * (done - 0.25) / 0.75))
    ),
}
PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class DpSgd(NamedTuple):
    """What DP-SGD does to a step."""

    clip: float  # L2 norm of an example's gradient, at the most
    noise_multiplier: float
    batch: int  # expected
    microbatch: int  # examples whose gradients are in memory at once


class Recipe(NamedTuple):
    """What shapes the compiled loop (static)."""

    steps: int  # of the whole training; the schedule's length
    lr: float  # the highest learning rate
    schedule: str
    augment: bool  # random crop and flip
    precision: str  # of the arithmetic; parameters and statistics stay float32
    private: DpSgd | None = None  # None: the mean gradient of the batch

    def rate(self, step: Array | int) -> Array:
        """The learning rate of a step."""
        return self.lr * SCHEDULES[self.schedule]((step + 0.5) / self.steps)

    def optimizer(self) -> optax.GradientTransformation:
        """SGD with Nesterov momentum and weight decay."""
        return optax.chain(
            optax.add_decayed_weights(WEIGHT_DECAY),
            optax.sgd(self.rate, momentum=MOMENTUM, nesterov=True),
        )


class Data(NamedTuple):
    """A split on the device."""

    images: UInt8[Array, "example height width channel"]
    labels: Int[Array, " example"]


class TrainingState(NamedTuple):
    """What the next step needs, and all that must survive a kill."""

    variables: PyTree
    optimizer: PyTree
    step: Int[Array, ""]  # steps done


class Sums(NamedTuple):
    """What a run of steps measured of itself, summed over its images."""

    loss: Float[Array, ""]
    correct: Float[Array, ""]
    finite: Array  # false once a loss or a parameter was not; the loop ends there


def start(recipe: Recipe, variables: PyTree) -> TrainingState:
    """The state before the first step."""
    return TrainingState(variables, recipe.optimizer().init(variables["params"]), jnp.int32(0))


def epoch_order(seed: int, epoch: int, examples: int, batch: int) -> np.ndarray:
    """Shuffles an epoch: indices int32 [step, batch]; the rest that fills no batch is left out."""
    order = jax.random.permutation(rng.stream_key(rng.Stream.TRAINING, seed, epoch, 0), examples)
    steps = examples // batch
    return np.asarray(order[: steps * batch], np.int32).reshape(steps, batch)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def run_steps(
    module: nn.Module,
    recipe: Recipe,
    state: TrainingState,
    data: Data,
    normalization: Normalization,
    order: Int[Array, "step batch"],
    key: Array,
    first: int,
    last: int,
) -> tuple[TrainingState, Sums]:
    """Takes the steps `first` <= i < `last` of an epoch.

    Ends after a step whose loss is not finite; `state.step` then tells which it was.

    Args:
      module: the network.
      recipe: how to train it.
      state: is donated: use the returned one.
      data: the training split.
      normalization: of its pixels.
      order: the epoch's batches, as from `epoch_order`; or from `accounting.poisson_batches`.
      key: the epoch's key; step i of the epoch uses `fold_in(key, i)`.
      first: traced, like `last`: another run of steps needs no compilation.
      last: see `first`.
    """
    optimizer = recipe.optimizer()

    def step(carry):
        index, state, sums = carry
        batch = order[index]
        pixels = data.images[batch] / jnp.float32(255)
        images = normalization.normalize(pixels)
        if recipe.augment:
            images = augment(images, jax.random.fold_in(key, index))
        labels = data.labels[batch]
        if recipe.private is None:
            gradient, rest, seen = _mean_gradient(module, recipe, state, images, labels)
        else:
            noise_key = jax.random.fold_in(jax.random.fold_in(key, index), 1)
            gradient, rest, seen = _private_gradient(
                module, recipe, state, images, labels, batch >= 0, noise_key
            )
        params = state.variables["params"]
        updates, momentum = optimizer.update(gradient, state.optimizer, params)
        params = optax.apply_updates(params, updates)
        state = TrainingState({**rest, "params": params}, momentum, state.step + 1)
        finite = jnp.isfinite(seen.loss)
        return index + 1, state, Sums(sums.loss + seen.loss, sums.correct + seen.correct, finite)

    def going_on(carry):
        index, _, sums = carry
        return (index < last) & sums.finite

    zero = Sums(jnp.float32(0), jnp.float32(0), jnp.bool_(True))
    _, state, sums = jax.lax.while_loop(going_on, step, (jnp.int32(first), state, zero))
    intact = jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(state.variables)]).all()
    return state, sums._replace(finite=sums.finite & intact)


class _Seen(NamedTuple):
    """What a step measured, summed over its images."""

    loss: Float[Array, ""]
    correct: Float[Array, ""]


def _mean_gradient(module, recipe, state, images, labels):
    """The gradient of the mean loss, the new running statistics, and what was measured."""
    loss = functools.partial(_loss, module, recipe)
    (value, (logits, rest)), gradient = jax.value_and_grad(loss, has_aux=True)(
        state.variables["params"], state.variables, images, labels
    )
    correct = jnp.sum(logits.argmax(-1) == labels).astype(jnp.float32)
    return gradient, rest, _Seen(value * len(labels), correct)


def _private_gradient(module, recipe, state, images, labels, present, key):
    """DP-SGD's gradient of the images that are present; the rest as in `_mean_gradient`."""
    private = recipe.private

    def of_example(example):
        image, label = example
        gradient, _, seen = _mean_gradient(module, recipe, state, image[None], label[None])
        return gradient, seen

    total, seen = clipped_sum(
        of_example, (images, labels), present, private.clip, private.microbatch
    )
    noisy = add_noise(total, private.noise_multiplier * private.clip, key)
    rest = {name: tree for name, tree in state.variables.items() if name != "params"}
    return jax.tree.map(lambda x: x / private.batch, noisy), rest, seen


def _loss(module, recipe, params, variables, images, labels):
    """The mean cross-entropy, with the logits and the new running statistics."""
    precision = PRECISIONS[recipe.precision]

    def cast(x):
        return x.astype(precision)

    # XLA:CPU keeps its fast convolutions inside a loop only in the form the primitives write.
    with fast_convolutions():
        logits, changed = module.apply(
            {**variables, "params": jax.tree.map(cast, params)},
            cast(images),
            train=True,
            mutable=["batch_stats"],
        )
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (logits, changed)


def augment(
    images: Float[Array, "batch height width channel"], key: Array
) -> Float[Array, "batch height width channel"]:
    """Crops each image at random out of itself with a border of PAD zeros, and mirrors half."""
    crop_key, flip_key = jax.random.split(key)
    shape = images.shape[1:]
    corners = jax.random.randint(crop_key, (len(images), 2), 0, 2 * PAD + 1)
    padded = jnp.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (*corner, 0), shape)

    images = jax.vmap(crop)(padded, corners)
    mirrored = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def accuracy(
    module: nn.Module, variables: PyTree, data: Data, normalization: Normalization
) -> float:
    """Computes the share of images classified rightly, with running statistics, in float32."""
    return float(_count_correct(module, variables, data, normalization)) / len(data.labels)


@functools.partial(jax.jit, static_argnums=0)
def _count_correct(module, variables, data, normalization):
    """The number of images classified rightly; the last batch is filled with the label -1."""
    size = min(EVALUATION_BATCH, len(data.labels))
    batches = math.ceil(len(data.labels) / size)
    missing = batches * size - len(data.labels)
    images = jnp.pad(data.images, ((0, missing), (0, 0), (0, 0), (0, 0)))
    labels = jnp.pad(data.labels, (0, missing), constant_values=-1)

    def count(batch):
        pixels, labels = batch
        with fast_convolutions():
            logits = module.apply(variables, normalization.normalize(pixels / jnp.float32(255)))
        return jnp.sum(logits.argmax(-1) == labels)

    shape = (batches, size, *data.images.shape[1:])
    return jax.lax.map(count, (images.reshape(shape), labels.reshape(batches, size))).sum()
