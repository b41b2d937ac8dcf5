"""Defenses: what a client does to its update before it sends it.

A defense is one entry of `DEFENSES`: a pure function of the update, its strengths and a key; beside
it, what an attacker who was told of it makes of that. A chain of them is written
"clip:1,noise:1e-4" and applied from left to right. Names are static and strengths are traced: a
whole range of them shares one compilation.

An attacker who is told knows the chain and its strengths, not the random draws. It puts its
candidate's update through what the defense does on average (`expect`), and knows the variance of
what the defense added to each layer (`variance`), infinite where nothing of it can be trusted.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxinv import client, labels, rng
from jaxinv.convolution import fast_convolutions
from jaxinv.privacy import add_noise, clip_factor, clipped_sum
from jaxinv.types import PyTree, tree_size

NONE = "none"
Chain = tuple[tuple[str, tuple[float, ...]], ...]


class Scene(NamedTuple):
    """What a client knows beside its update, for the defenses that ask."""

    module: nn.Module
    variables: PyTree
    images: Float[Array, "batch height width channel"]  # normalised
    labels: Array


class Facts(NamedTuple):
    """What an attacker who was told of a defense knows of the rest: static."""

    classifier: tuple[str, ...]  # path of the last dense layer
    images: int  # of the update


class Told(NamedTuple):
    """What an attacker who was told of the defense works with."""

    strengths: tuple[tuple[Array, ...], ...]  # of the chain
    variances: PyTree  # of the noise on each leaf's entries, a scalar a leaf; inf: not to be used
    weights: PyTree  # of each leaf in an inner product, in [0, 1], by its variance


class Defense(NamedTuple):
    """An entry of `DEFENSES`."""

    # (update, strengths, key, scene) -> update
    apply: Callable[[PyTree, tuple, Array, Scene], PyTree]
    parameters: tuple[tuple[str, float, float], ...]  # of each strength: name, least, most
    # (update, strengths, shared) -> what the defense makes of the update on average
    expect: Callable[[PyTree, tuple, PyTree], PyTree] = lambda update, strengths, shared: update
    # (shared, strengths, facts) -> variance of what it adds to each leaf's entries, scalars
    variance: Callable[[PyTree, tuple, Facts], PyTree] | None = None
    random: bool = False
    first: bool = False  # replaces the update by one of its own
    inverse: bool = False  # whether more of the last strength protects less


def parse(text: str) -> Chain:
    """Reads "clip:1,noise:1e-4"; "none" is the empty chain.

    Raises:
      ValueError: a name is unknown, or a strength is missing, too many or outside its range.
    """
    if text == NONE:
        return ()
    chain = []
    for position, part in enumerate(text.replace(" ", "").split(",")):
        name, *numbers = part.split(":")
        if name not in DEFENSES:
            raise ValueError(f"unknown defense '{name}'; known are none, {', '.join(DEFENSES)}")
        defense = DEFENSES[name]
        form = ":".join([name, *(p[0].upper() for p in defense.parameters)])
        try:
            strengths = tuple(map(float, numbers))
        except ValueError:
            raise ValueError(f"'{part}' is not of the form {form}") from None
        if len(strengths) != len(defense.parameters):
            raise ValueError(f"'{part}' is not of the form {form}")
        for value, (what, least, most) in zip(strengths, defense.parameters):
            if not least <= value <= most or not math.isfinite(value):
                top = "" if math.isinf(most) else f" and at most {most:g}"
                raise ValueError(f"'{part}': the {what} must be at least {least:g}{top}")
        if defense.first and position:
            raise ValueError(f"'{name}' makes the update itself; put it first")
        chain.append((name, strengths))
    return tuple(chain)


def spell(chain: Chain) -> str:
    """Writes a chain as `parse` reads it, the same for the same chain."""
    spelled = (":".join([name, *(f"{s:g}" for s in strengths)]) for name, strengths in chain)
    return ",".join(spelled) or NONE


def names(chain: Chain) -> tuple[str, ...]:
    """The part of a chain that shapes the program."""
    return tuple(name for name, _ in chain)


def strengths(chain: Chain) -> tuple[tuple[float, ...], ...]:
    """The part of a chain that is traced."""
    return tuple(strengths for _, strengths in chain)


def is_random(chain: Chain) -> bool:
    """Whether another draw gives another update."""
    return any(DEFENSES[name].random for name in names(chain))


def defend(
    chain: tuple[str, ...], update: PyTree, strengths: tuple, key: Array, scene: Scene
) -> PyTree:
    """Applies a chain to an update.

    Args:
      chain: names of `DEFENSES`.
      update: as `client.update` has it.
      strengths: of each.
      key: of this trial's draw. A defense's noise does not depend on what stands before it in the
        chain: strengths and chains compare on the same draws.
      scene: what the client knows beside it.
    """
    for position, (name, own) in enumerate(zip(chain, strengths)):
        before = chain[:position].count(name)
        of_name = jax.random.fold_in(rng.name_key(key, name), before)
        update = DEFENSES[name].apply(update, own, of_name, scene)
    return update


def tell(chain: tuple[str, ...], strengths: tuple, shared: PyTree, facts: Facts) -> Told:
    """Works out how far an attacker who knows the chain can trust what was shared.

    The weights are positive-part James-Stein estimates, the share of a leaf's power that is no
    noise: a leaf that is mostly noise tells little of the image and drowns the others in a cosine.
    Where nothing at all can be trusted, all weights are 1 again.

    Args:
      chain, strengths: the defense.
      shared: the defended update.
      facts: on the rest.
    """
    variances = jax.tree.map(lambda x: jnp.zeros((), x.dtype), shared)
    for name, own in zip(chain, strengths):
        if DEFENSES[name].variance is not None:
            found = DEFENSES[name].variance(shared, own, facts)
            variances = jax.tree.map(jnp.add, variances, found)

    def weight(x, variance):
        power = jnp.sum(jnp.square(x))
        # A leaf of nothing but zeros, without noise, is known as well as any other.
        noise = jnp.where(variance > 0, x.size * variance / jnp.maximum(power, 1e-30), 0)
        return jnp.maximum(0, 1 - noise)

    weights = jax.tree.map(weight, shared, variances)
    left = sum(w * jnp.sum(jnp.abs(x)) for w, x in zip(*map(jax.tree.leaves, (weights, shared))))
    weights = jax.tree.map(lambda w: jnp.where(left > 0, w, 1.0), weights)
    return Told(strengths, variances, weights)


def expect(chain: tuple[str, ...], told: Told, update: PyTree, shared: PyTree) -> PyTree:
    """Puts a candidate's update through what the chain does on average."""
    for name, own in zip(chain, told.strengths):
        update = DEFENSES[name].expect(update, own, shared)
    return update


def _noise(draw: Callable | None = None) -> Defense:
    """Noise of a given variance on every entry."""

    def apply(update, strengths, key, scene):
        del scene
        return add_noise(update, jnp.sqrt(strengths[0]), key, draw)

    variance = lambda shared, strengths, facts: _alike(shared, strengths[0])  # noqa: E731
    return Defense(apply, (("variance", 0, math.inf),), variance=variance, random=True)


def _alike(shared: PyTree, variance: Array) -> PyTree:
    """The same variance for every leaf."""
    return jax.tree.map(lambda x: jnp.asarray(variance, x.dtype), shared)


def _relative_noise(update, strengths, key, scene):
    """Gaussian noise whose expected norm is the strength times the update's."""
    del scene
    return add_noise(update, strengths[0] * _norm(update) / math.sqrt(tree_size(update)), key)


def _relative_variance(shared, strengths, facts):
    """The noise has the share s^2 / (1 + s^2) of the power that was shared."""
    del facts
    share = jnp.square(strengths[0]) / (1 + jnp.square(strengths[0]))
    return _alike(shared, share * jnp.square(_norm(shared)) / tree_size(shared))


def _norm(tree: PyTree) -> Float[Array, ""]:
    """The L2 norm over all leaves."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def _rank(values: Float[Array, " entry"]) -> Array:
    """The position of each entry in ascending order; ties have positions of their own."""
    return jnp.zeros(values.size, jnp.int32).at[jnp.argsort(values)].set(jnp.arange(values.size))


def _keep_largest(values: Array, dropped: Array) -> Array:
    """Sets the `dropped` entries of least magnitude to zero, no more where magnitudes tie."""
    kept = _rank(jnp.abs(values).ravel()) >= dropped
    return jnp.where(kept.reshape(values.shape), values, 0)


def _count(fraction: Array, size: int) -> Array:
    """The whole number of entries that a fraction is, rounded: float32 knows no 0.7 of ten."""
    return jnp.round(fraction * size).astype(jnp.int32)


def _globally(update: PyTree, dropped: Array) -> PyTree:
    """Drops the entries of least magnitude among all leaves."""
    flat, restore = jax.flatten_util.ravel_pytree(update)
    return restore(_keep_largest(flat, dropped))


def _prune(update, strengths, key, scene):
    """Magnitude pruning over all parameters."""
    return _globally(update, _count(strengths[0], tree_size(update)))


def _prune_layer(update, strengths, key, scene):
    """Magnitude pruning of each leaf."""
    return jax.tree.map(lambda x: _keep_largest(x, _count(strengths[0], x.size)), update)


def _top_k(update, strengths, key, scene):
    """Keeps the k entries of largest magnitude."""
    kept = jnp.round(strengths[0]).astype(jnp.int32)
    return _globally(update, tree_size(update) - kept)


def _only_sent(update, strengths, shared):
    """What was pruned of the shared update is left out of the candidate's (masked cosine)."""
    return jax.tree.map(lambda u, s: jnp.where(s != 0, u, 0), update, shared)


def _clip(update, strengths, key, scene):
    """Scales the update down to an L2 norm, over all parameters."""
    factor = clip_factor(update, strengths[0])
    return jax.tree.map(lambda x: factor * x, update)


def _sign(update, strengths, key, scene):
    """Sends signs, times the mean magnitude over all parameters.

    References: Bernstein et al. 2018 (signSGD); the scale: Karimireddy et al. 2019, 1901.09847.
    """
    size = sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(update)) / tree_size(update)
    return jax.tree.map(lambda x: size * jnp.sign(x), update)


def _soft_sign(update, strengths, shared):
    """What a sign is on average where an entry is uncertain by its leaf's mean magnitude."""

    def soft(x):
        scale = lax.stop_gradient(jnp.abs(x).mean()) + 1e-30
        return jax.scipy.special.erf(x / (math.sqrt(2) * scale))

    return jax.tree.map(soft, update)


def _quantize(update, strengths, key, scene):
    """Rounds each leaf at random to 2^bits levels from -max to max, unbiased.

    References: Alistarh et al. 2017 (QSGD), arXiv 1610.02132, with the maximum for the norm.
    """
    steps = jnp.exp2(jnp.round(strengths[0])) - 1
    leaves, structure = jax.tree.flatten(update)

    def quantized(x, key):
        top = jnp.maximum(jnp.abs(x).max(), 1e-30)
        level = (x / top + 1) / 2 * steps
        level = jnp.floor(level + jax.random.uniform(key, x.shape, x.dtype))
        return (jnp.minimum(level, steps) / steps * 2 - 1) * top

    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([quantized(x, k) for x, k in zip(leaves, keys)])


def _quantization_variance(shared, strengths, facts):
    """Rounding at random to levels a step apart: step^2 / 6, on average over a cell."""
    del facts
    steps = jnp.exp2(jnp.round(strengths[0])) - 1
    return jax.tree.map(lambda x: jnp.square(2 * jnp.abs(x).max() / steps) / 6, shared)


def _soteria(update, strengths, key, scene):
    """Perturbs the representation that the last dense layer's gradient gives away.

    Of the features r before that layer, the given share with the largest |r_i| / |d r_i / d image|
    is left out of the layer's weight gradient: those that cost the reconstruction most per change.

    References: Sun et al. 2021 (Soteria), arXiv 2012.06043, eq. 7 and its public code.
    """
    module, variables, images, _ = scene
    path = labels.classifier_path(module, variables, images)

    def features(image):
        with fast_convolutions():
            return labels.classifier_input(module, variables, image[None])[0]

    def of_image(image):
        values, pull = jax.vjp(features, image)
        unit = lambda i: jax.nn.one_hot(i, values.size, dtype=values.dtype)  # noqa: E731
        slope = lax.map(lambda i: jnp.linalg.norm(pull(unit(i))[0]), jnp.arange(values.size))
        return jnp.abs(values) / jnp.maximum(slope, 1e-12)

    score = lax.map(of_image, images).mean(axis=0)
    kept = _rank(score) < score.size - _count(strengths[0], score.size)
    return _on_kernel(path, lambda leaf: jnp.where(kept[:, None], leaf, 0), update)


def _on_kernel(path: tuple[str, ...], change: Callable, tree: PyTree) -> PyTree:
    """Changes the kernel of one layer."""

    def visit(at, leaf):
        return change(leaf) if tuple(k.key for k in at) == (*path, "kernel") else leaf

    return jax.tree_util.tree_map_with_path(visit, tree)


def _all_of_classifier(shared, strengths, facts):
    """An attacker who knows of it leaves the defended layer out.

    References: Balunović et al. 2022, arXiv 2111.04706, section 5.
    """
    del strengths
    zero = _alike(shared, 0.0)
    return _on_kernel(facts.classifier, lambda x: jnp.full_like(x, jnp.inf), zero)


def _dp_sgd(update, strengths, key, scene):
    """DP-SGD's gradient in place of the mean: each image's clipped, noise on the sum.

    The batch is the client's images; what `jaxinv.train --dp` takes steps with.
    """
    del update
    clip, multiplier = strengths
    loss = client.loss_fn(scene.module, scene.variables)
    mean = clipped_mean(loss, scene.variables["params"], scene.images, scene.labels, clip)
    return add_noise(mean, multiplier * clip / len(scene.images), key)


def clipped_mean(
    loss: client.LossFn, params: PyTree, images: Float[Array, "batch height width channel"],
    labels: Array, clip: Array | float,
) -> PyTree:  # fmt: skip
    """Computes the mean of the images' gradients, each clipped to an L2 norm."""

    def gradient(example):
        image, label = example
        return client.gradient(loss, params, image[None], label[None])

    total, _ = clipped_sum(gradient, (images, labels), jnp.ones(len(images), bool), clip)
    return jax.tree.map(lambda x: x / len(images), total)


def _dp_sgd_variance(shared, strengths, facts):
    """The noise of the sum, divided as the sum is."""
    return _alike(shared, jnp.square(strengths[0] * strengths[1] / facts.images))


_ANY = math.inf
DEFENSES: dict[str, Defense] = {
    "dpsgd": Defense(
        _dp_sgd, (("clipping norm", 1e-30, _ANY), ("noise multiplier", 0, _ANY)),
        variance=_dp_sgd_variance, random=True, first=True,
    ),
    "noise": _noise(),
    "laplace": _noise(lambda key, shape, dtype: jax.random.laplace(key, shape, dtype) / 2**0.5),
    "relative": Defense(
        _relative_noise, (("ratio", 0, _ANY),), variance=_relative_variance, random=True
    ),
    "prune": Defense(_prune, (("fraction", 0, 1),), _only_sent),
    "prune-layer": Defense(_prune_layer, (("fraction", 0, 1),), _only_sent),
    "top-k": Defense(_top_k, (("count", 1, _ANY),), _only_sent, inverse=True),
    "clip": Defense(
        _clip, (("norm", 1e-30, _ANY),), lambda update, own, shared: _clip(update, own, None, None)
    ),
    "sign": Defense(_sign, (), _soft_sign),
    "quantize": Defense(
        _quantize, (("bits", 1, 24),), variance=_quantization_variance, random=True, inverse=True
    ),
    "soteria": Defense(_soteria, (("fraction", 0, 1),), variance=_all_of_classifier),
}  # fmt: skip
