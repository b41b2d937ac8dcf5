"""What a defense is: what it does to an update, and what an adaptive attacker makes of that."""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinv.types import PyTree

ANY = math.inf  # a strength without an upper limit


class ClientContext(NamedTuple):
    """What a client knows beside its update, for the defenses that ask."""

    module: nn.Module
    variables: PyTree
    images: Float[Array, "batch height width channel"]  # normalized
    labels: Array


class PublicFacts(NamedTuple):
    """What an adaptive attacker knows of the rest: static."""

    classifier: tuple[str, ...]  # path of the last dense layer
    images: int  # of the update


class DefenseKnowledge(NamedTuple):
    """What an adaptive attacker works with."""

    strengths: tuple[tuple[Array, ...], ...]  # of the chain
    variances: PyTree  # of the noise on each leaf's entries, a scalar a leaf; inf: not to be used
    weights: PyTree  # of each leaf in an inner product, in [0, 1], by its variance
    learned: tuple[PyTree, ...] = ()  # of the shared update, by each of the chain (`Defense.learn`)


class Defense(NamedTuple):
    """An entry of `DEFENSES`."""

    # (update, strengths, key, context) -> update
    apply: Callable[[PyTree, tuple, Array, ClientContext | None], PyTree]
    parameters: tuple[tuple[str, float, float], ...]  # of each strength: name, least, most
    # (update, strengths, learned) -> what the defense makes of the update on average
    expect: Callable[[PyTree, tuple, PyTree], PyTree] = lambda update, strengths, learned: update
    # (shared, strengths) -> what `expect` asks for of the shared update, found once
    learn: Callable[[PyTree, tuple], PyTree] = lambda shared, strengths: ()
    # (shared, strengths, facts) -> variance of what it adds to each leaf's entries, scalars
    variance: Callable[[PyTree, tuple, PublicFacts], PyTree] | None = None
    # (loss, params, images, labels, strengths) -> the update itself, of each image's own gradient,
    # in place of the client's; without noise, as an adaptive attacker computes it
    of_each_image: Callable[..., PyTree] | None = None
    random: bool = False
    rescales: bool = False  # whether noise that stands before it has another variance after it
    tells_classifier: bool = False  # whether `variance` asks for the last dense layer's path
    inverse: bool = False  # whether more of the last strength protects less


def alike(shared: PyTree, variance: Array | float) -> PyTree:
    """The same variance for every leaf."""
    return jax.tree.map(lambda x: jnp.asarray(variance, x.dtype), shared)
