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


class _Equation(NamedTuple):
    """An equation of the loss.

    Values have names: "images", ("parameter", leaf) or (equation, output, shape); a constant's is
    None.
    """

    kind: str
    eqn: Any
    operands: list
    made: list


class _Graph:
    """A loss as a list of equations, and the bound of the cut behind each of those on images.

    Attributes:
      names: [cut], the last layer with weights in front of it.
      bounds: [cut], numbers that cross it, and gradients in front that those do not give.
      reasons: why the bound may not be met.
      closing: numbers of the last layer's gradient that the others give.
    """

    def __init__(self, loss: client.LossFn, params: PyTree, shape: tuple[int, ...]):
        leaves, structure = jax.tree.flatten(params)
        self.leaf_names = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
        shapes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.float32) for x in leaves]
        images = jax.ShapeDtypeStruct(shape, jnp.float32)
        labels = jnp.zeros(shape[0], jnp.int32)
        closed = jax.make_jaxpr(lambda p, x: loss(structure.unflatten(p), x, labels)[0])(
            shapes, images
        )
        self.sizes = [math.prod(x.shape) for x in shapes]
        self.equations: list[_Equation] = []
        inputs = [("parameter", i) for i in range(len(leaves))] + ["images"]
        outputs = self._inline(closed.jaxpr, inputs)
        self._find_dependence()
        self.sources: dict[Any, _Source] = {}
        self.names, self.bounds, self.reasons, self.closing = [], [], [], 0
        self._walk(outputs, math.prod(shape))
        self._find_shared()

    def _inline(self, jaxpr, inputs: list) -> list:
        """Appends a jaxpr's equations, those of inner calls in their place; returns its outputs."""
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
                self.equations.append(_Equation(eqn.primitive.name, eqn, operands, outputs))
            values.update(zip(eqn.outvars, outputs))
        return [read(v) for v in jaxpr.outvars]

    def _find_dependence(self) -> None:
        """Finds what is made of the images, and the parameters that each equation brings to it."""
        self.of_images: set = {"images"}
        self.reads = {("parameter", i): frozenset({i}) for i in range(len(self.leaf_names))}
        self.brings: list[frozenset[int]] = []  # [equation]
        for equation in self.equations:
            params = frozenset().union(*(self.reads.get(v, ()) for v in equation.operands))
            on_images = not self.of_images.isdisjoint(equation.operands)
            if on_images:
                self.of_images |= set(equation.made)
            else:
                self.reads |= dict.fromkeys(equation.made, params)
            self.brings.append(params if on_images else frozenset())
        self.times = Counter(i for params in self.brings for i in params)

    def _walk(self, outputs: list, unknowns: int) -> None:
        """Cuts the graph behind every equation on images in turn."""
        last_use = {v: n for n, e in enumerate(self.equations) for v in e.operands}
        last_use |= dict.fromkeys(outputs, len(self.equations))
        live = {"images": unknowns}  # what crosses the cut, with its size
        in_front: frozenset[int] = frozenset()
        layer, since = "the images", set()  # what was met since the last layer
        for number, equation in enumerate(self.equations):
            on_images = [v for v in equation.operands if v in self.of_images]
            if not on_images:
                continue
            in_front |= self.brings[number]
            if (found := self._layer(equation)) is not None:
                layer = found.name
                positions = equation.made[0][2]
                self.closing = found.inputs + 1 if len(positions) == 2 else 0
                # What stands behind the last layer takes nothing: no gradient is left to find.
                self.reasons += [reason for reason in sorted(since) if reason not in self.reasons]
                since = set()
            else:
                found = self._read_back(equation, on_images, self.brings[number])
            if found is not None:
                self.sources[equation.made[0]] = found
            if equation.kind in _KINKS:
                since.add(f"kinks ({equation.kind})")
            if equation.kind in _STATISTICS:
                since.add(f"normalization by the images' own statistics ({equation.kind})")
            live |= {v: math.prod(v[2]) for v in equation.made}
            live = {v: size for v, size in live.items() if last_use.get(v, -1) > number}
            self.names.append(layer)
            self.bounds.append(self._bound(live, in_front))

    def _layer(self, equation: _Equation) -> _Source | None:
        """An equation as a layer z = A W with weights of its own, W [K, C] in one parameter."""
        if equation.kind not in _LAYERS:
            return None
        inputs, weights = equation.operands[:2]
        params = self.reads.get(weights, frozenset())
        if inputs not in self.of_images or weights in self.of_images or len(params) != 1:
            return None
        (leaf,) = params
        eqn = equation.eqn
        features = eqn.outvars[0].aval.shape[-1]
        size = math.prod(eqn.invars[1].aval.shape)
        if equation.kind == "conv_general_dilated" and eqn.params["feature_group_count"] != 1:
            return None
        if size != self.sizes[leaf] or size % features or self.times[leaf] != 1:
            return None
        return _Source(self.leaf_names[leaf], leaf, size // features, features, frozenset())

    def _read_back(
        self, equation: _Equation, on_images: list, brought: frozenset[int]
    ) -> _Source | None:
        """The layer whose output is known from the equation's result; None where it is not."""
        own = self.sources.get(on_images[0])
        if own is None or len(on_images) > 1 or equation.kind not in _INVERTIBLE:
            return None
        if any(self.times[i] > 1 for i in brought):
            return None
        return own._replace(behind=own.behind | brought)

    def _bound(self, live: dict[Any, int], in_front: frozenset[int]) -> tuple[int, int]:
        """Numbers that cross, and gradients in front that they do not give."""
        crossing, fixed, known = 0, 0, set()
        for value, size in live.items():
            source = self.sources.get(value)
            if source is None:
                crossing += size
                continue
            rank = min(source.inputs, source.features)
            crossing += size // source.features * rank
            if source.leaf not in known:
                known |= {source.leaf, *source.behind}
                fixed += max(source.inputs - source.features, 0) * source.features
        return crossing, fixed + sum(self.sizes[i] for i in in_front - known)

    def _find_shared(self) -> None:
        """Names the weights that several layers share, as a reason."""
        layers = Counter(
            i
            for equation, params in zip(self.equations, self.brings)
            if equation.kind in _LAYERS
            for i in params
        )
        shared = [self.leaf_names[i] for i, times in layers.items() if times > 1]
        if shared:
            self.reasons.append(f"weights of several layers ({', '.join(shared[:3])})")
