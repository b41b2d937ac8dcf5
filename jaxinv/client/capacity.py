"""Capacity: how many images one gradient can determine, from the network's layers alone.

Cut the computation of the loss anywhere. What lies behind the cut, and its gradients, is a function
of the numbers that cross it; in front of it there are so many parameters, each with one gradient.
So the derivative of the update with respect to the images has at most the rank

    numbers that cross the cut  +  parameters in front of it,

for every cut, and at most as many as the images have pixels. A layer whose output z = A W crosses
the cut itself adds less than its parameters: W^T (A^T d) = z^T d is known from z and its
derivative d, so that of its K x C numbers (K - C) C are new, none where K <= C. The bias and the
scale behind it add nothing.

This holds for any network and any attacker: what is not determined, a prior must supply. For smooth
networks of convolutions and dense layers it is met (`tests/test_capacity.py`, numerical ranks
in float64); with kinks, pooled maxima, GroupNorm or weights that several layers share the rank may
be lower, and the number is a bound.
"""

import math
from collections import Counter
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Literal

from jaxinv import client
from jaxinv.networks.convolution import conv_p
from jaxinv.networks.inspect import CALLS
from jaxinv.types import PyTree, path_name

# What leaves its one image-dependent operand to be read off the result.
_INVERTIBLE = {
    "add",
    "sub",
    "mul",
    "div",
    "neg",
    "logistic",
    "tanh",
    "exp",
    "reshape",
    "transpose",
    "squeeze",
    "expand_dims",
    "convert_element_type",
    "copy",
}
_KINKS = {
    "max",
    "min",
    "abs",
    "sign",
    "clamp",
    "select_n",
    "reduce_max",
    "reduce_min",
    "reduce_window_max",
    "select_and_gather_add",
    "argmax",
    "floor",
    "round",
}
# How GroupNorm, LayerNorm and BatchNorm in training divide by a spread of the images themselves.
_STATISTICS = {"rsqrt", "sqrt"}
_LAYERS = {conv_p.name, "dot_general", "conv_general_dilated"}


class Cut(NamedTuple):
    """A bound on the rank: numbers that cross, and gradients in front."""

    layer: str  # the last layer with weights in front of it
    per_image: int
    fixed: int


class Capacity(NamedTuple):
    """What a gradient can determine."""

    cuts: tuple[Cut, ...]  # those that bind for some number of images, the fewest images first
    unknowns: int  # numbers of an image
    parameters: int
    equality: bool  # whether the bound is met, in general; else it is a bound
    why: tuple[str, ...]  # it is no equality

    def determined(self, images: int) -> int:
        """Numbers of that many images that their gradient can determine, at the most."""
        limits = (cut.fixed + images * cut.per_image for cut in self.cuts)
        return min(images * self.unknowns, *limits)

    def free(self, images: int) -> float:
        """The share of the images' numbers that no attacker can read off the gradient alone."""
        return 1 - self.determined(images) / (images * self.unknowns)

    @property
    def images(self) -> float:
        """How many images can be determined entirely, at the most."""
        left = ((cut.fixed, self.unknowns - cut.per_image) for cut in self.cuts)
        return min(fixed / more for fixed, more in left if more > 0)

    @property
    def binding(self) -> Cut:
        """The cut that bounds them."""

        def bound(cut):
            return cut.fixed / max(self.unknowns - cut.per_image, 1e-9)

        return min((c for c in self.cuts if c.per_image < self.unknowns), key=bound)


def capacity(
    model: nn.Module, variables: PyTree, image_shape: tuple[int, int, int], batch_norm: str = "eval"
) -> Capacity:
    """Computes the capacity of a network's gradient; labels are known, the loss is cross-entropy.

    Args:
      model: any Linen classifier, called as `model.apply(variables, images)`.
      variables: their shapes alone are read.
      image_shape: height, width, channel.
      batch_norm: as in `client.loss_fn`.
    """
    loss = client.loss_fn(model, variables, batch_norm)
    return of_loss(loss, variables["params"], image_shape)


def of_loss(loss: client.LossFn, params: PyTree, image_shape: tuple[int, int, int]) -> Capacity:
    """The same of a loss: `loss(params, images, labels)` -> (mean over the images, statistics)."""
    # What grows with the batch and what does not, by two batches.
    small, large = (_Graph(loss, params, (n, *image_shape)) for n in (2, 3))
    cuts = []
    for name, two, three in zip(small.names, small.bounds, large.bounds, strict=True):
        per_image = three[0] - two[0]
        cuts.append(Cut(name, per_image, two[0] - 2 * per_image + two[1]))
    # Behind the loss nothing is left to cross. The derivatives of an image's logits sum to zero,
    # and with them those of the last layer's weights and bias.
    parameters = optax.tree.size(params)
    cuts[-1] = cuts[-1]._replace(fixed=parameters - small.closing, per_image=0)
    return Capacity(
        _envelope(cuts), math.prod(image_shape), parameters, not small.reasons, tuple(small.reasons)
    )


def _envelope(cuts: list[Cut]) -> tuple[Cut, ...]:
    """The cuts that no other undercuts for every number of images."""
    best: list[Cut] = []
    for cut in sorted(cuts, key=lambda c: (c.per_image, c.fixed)):
        if not best or cut.fixed < best[-1].fixed:
            best.append(cut)
    return tuple(reversed(best))


class _Source(NamedTuple):
    """A layer with weights, from whose output a variable was made so that it can be read back."""

    name: str
    leaf: int
    inputs: int  # K
    features: int  # C
    behind: frozenset[int]  # parameters read on the way


class _Graph:
    """A loss as a list of equations, and the bound of the cut behind each."""

    def __init__(self, loss: client.LossFn, params: PyTree, shape: tuple[int, ...]):
        leaves, structure = jax.tree.flatten(params)
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        shapes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.float32) for x in leaves]
        images = jax.ShapeDtypeStruct(shape, jnp.float32)
        labels = jnp.zeros(shape[0], jnp.int32)
        closed = jax.make_jaxpr(lambda p, x: loss(structure.unflatten(p), x, labels)[0])(
            shapes, images
        )
        self.sizes = [math.prod(x.shape) for x in shapes]
        self.equations: list[tuple[str, Any, list, list]] = []
        inputs = [("parameter", i) for i in range(len(leaves))] + ["images"]
        outputs = self._inline(closed.jaxpr, inputs)
        self._analyze(names, outputs, math.prod(shape))

    def _inline(self, jaxpr, inputs: list) -> list:
        """Appends a jaxpr's equations, those of inner calls in their place; returns its outputs.

        A value is a name: what it was at the start, or (number of the equation, output, shape).
        """
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        values = dict(zip(jaxpr.invars, inputs))

        def read(v):
            return None if isinstance(v, Literal) else values.get(v)

        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
            if eqn.primitive.name in CALLS and inner is not None:
                outputs = self._inline(inner, operands)
            else:
                number = len(self.equations)
                outputs = [(number, i, tuple(v.aval.shape)) for i, v in enumerate(eqn.outvars)]
                self.equations.append((eqn.primitive.name, eqn, operands, outputs))
            values.update(zip(eqn.outvars, outputs))
        return [read(v) for v in jaxpr.outvars]

    def _analyze(self, names: list[str], outputs: list, unknowns: int) -> None:
        depends: dict[Any, bool] = {"images": True}
        reads: dict[Any, frozenset[int]] = {
            ("parameter", i): frozenset({i}) for i in range(len(names))
        }
        sources: dict[Any, _Source] = {}
        last_use = {
            value: n for n, (_, _, operands, _) in enumerate(self.equations) for value in operands
        }
        last_use.update({value: len(self.equations) for value in outputs})
        read_by = []  # parameters that each equation reads and brings to the images
        for _, _, operands, made in self.equations:
            of_images = any(depends.get(v, False) for v in operands)
            params = frozenset().union(
                *(reads.get(v, frozenset()) for v in operands if not depends.get(v, False))
            )
            for value in made:
                depends[value] = of_images
                reads[value] = frozenset() if of_images else params
            read_by.append(params if of_images else frozenset())
        times = Counter(i for params in read_by for i in params)
        layers = Counter(
            i
            for params, (kind, *_) in zip(read_by, self.equations)
            if kind in _LAYERS
            for i in params
        )
        self.names, self.bounds, self.reasons = [], [], []
        self.closing = 0  # numbers of the last layer's gradient that the others give
        before: frozenset[int] = frozenset()
        live: dict[Any, int] = {"images": unknowns}
        layer, kinks_since = "the images", set()
        for number, (kind, eqn, operands, made) in enumerate(self.equations):
            of_images = [v for v in operands if depends.get(v, False)]
            before |= read_by[number]
            found = self._layer(kind, eqn, operands, depends, reads, times, names)
            if found is not None:
                layer = found.name
                positions = made[0][2]
                self.closing = found.inputs + 1 if len(positions) == 2 else 0
                if kinks_since:
                    self.reasons += [k for k in sorted(kinks_since) if k not in self.reasons]
                    kinks_since = set()
                sources[made[0]] = found
            elif kind in _INVERTIBLE and len(of_images) == 1 and of_images[0] in sources:
                own = sources[of_images[0]]
                if all(times[i] == 1 for i in read_by[number]):
                    sources[made[0]] = own._replace(behind=own.behind | read_by[number])
            if of_images and kind in _KINKS:
                kinks_since.add(f"kinks ({kind})")
            if of_images and kind in _STATISTICS:
                kinks_since.add(f"normalization by the images' own statistics ({kind})")
            for value in made:
                if depends[value] and last_use.get(value, -1) > number:
                    live[value] = math.prod(value[2])
            for value in [v for v in live if last_use.get(v, -1) <= number]:
                del live[value]
            if of_images:
                self.names.append(layer)
                self.bounds.append(self._bound(live, before, sources))
        shared = [names[i] for i, n in layers.items() if n > 1]
        if shared:
            self.reasons.append(f"weights of several layers ({', '.join(shared[:3])})")

    def _bound(self, live, before, sources) -> tuple[int, int]:
        """Numbers that cross, and gradients in front that they do not give."""
        crossing, known = 0, set()
        fixed = 0
        for value, size in live.items():
            source = sources.get(value)
            if source is None:
                crossing += size
                continue
            rank = min(source.inputs, source.features)
            crossing += size // source.features * rank
            if source.leaf not in known:
                known |= {source.leaf, *source.behind}
                fixed += max(source.inputs - source.features, 0) * source.features
        fixed += sum(self.sizes[i] for i in before - known)
        return crossing, fixed

    def _layer(self, kind, eqn, operands, depends, reads, times, names) -> _Source | None:
        """An equation as a layer z = A W with weights of its own, W [K, C] in one parameter."""
        if kind not in _LAYERS:
            return None
        inputs, weights = operands[:2]
        params = reads.get(weights, frozenset())
        if not depends.get(inputs, False) or depends.get(weights, False) or len(params) != 1:
            return None
        (leaf,) = params
        features = eqn.outvars[0].aval.shape[-1]
        size = math.prod(eqn.invars[1].aval.shape)
        if kind == "conv_general_dilated" and eqn.params["feature_group_count"] != 1:
            return None
        if size != self.sizes[leaf] or size % features or times[leaf] != 1:
            return None
        return _Source(names[leaf], leaf, size // features, features, frozenset())
