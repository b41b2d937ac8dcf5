"""Gram statistics: what a layer adds to the objective, without its weight gradient.

A layer of T output positions turns patches A [T, K] into A W [T, C]. With the deltas D [T, C], the
derivative of the loss with respect to its output, the weight gradient is A^T D, K x C numbers for
every trial. The objectives ask of it nothing but

    <A^T D, A^T D> = <A A^T, D D^T>      <A^T D, V> = <A V, D>

the first of two [T, T] matrices, the second of a convolution of the layer's input with the shared
update V. That takes less memory where 2 T^2 < K C, which are the wide layers behind the strides and
every dense layer, and less arithmetic where T (K + C) < K C, which are the widest of those.

It works on the network's jaxpr: a convolution or dense layer that reads a parameter which nothing
else reads is a layer; zeros are added to its output, whose gradient is the deltas. What does not
look like that (shared weights, layers inside `nn.remat` or `nn.scan`, other precisions) keeps its
weight gradient, and so does every layer of a function that is no network of Flax's at all.

References: Goodfellow 2015, "Efficient per-example gradient computations", arXiv 1510.01799 (the
norm, dense layers); Bu et al. 2022, arXiv 2205.10683 (convolutions, the choice by layer).
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jaxtyping import Array, Float

from jaxinv import client
from jaxinv.attacks.objectives import Comparison, compare
from jaxinv.networks.convolution import conv_p, patches
from jaxinv.networks.trilinear import Geometry
from jaxinv.types import PyTree

# Which layers, of T positions, K inputs and C features, do without their weight gradient.
RULES = {
    "memory": lambda t, k, c: 2 * t**2 < k * c,
    "arithmetic": lambda t, k, c: t * (k + c) < k * c,
}


def choose_rule(setting: str, objective: str | Callable) -> str | None:
    """The rule that a setting, one of `GRAM`, stands for; None keeps every weight gradient.

    On a CPU trials follow one another, and time is what bounds them rather than memory. A squared
    distance is left alone unless asked for, for the digits it would lose (`compare_updates`), and
    so is an objective that is not of the table.
    """
    if setting == "off" or (setting == "auto" and objective != "cosine"):
        return None
    on_cpu = jax.default_backend() == "cpu"
    return "arithmetic" if setting == "auto" and on_cpu else "memory"


GRAM = ("auto", "on", "off")


class Layer(NamedTuple):
    """A layer whose weight gradient is not needed."""

    leaf: int  # its weights among the leaves of the parameters
    output: jax.core.ShapedArray
    geometry: Geometry | None  # None for a dense layer


def compare_updates(
    loss: client.LossFn,
    params: PyTree,
    images: Float[Array, "batch height width channel"],
    labels: Array,
    shared: PyTree,
    rule: str,
    weights: PyTree | None = None,
) -> tuple[Comparison, PyTree]:
    """Compares the update that these images would cause with the one that was shared.

    What `compare(client.gradient(...), shared)` computes, up to rounding. The squared distance of
    a layer treated here is <u,u> - 2<u,t> + <t,t>, which keeps 7 digits of |t|^2 in float32 and
    no more: an attack that must go further, to an exact image, needs the gradients themselves.

    Args:
      loss, params: of the network.
      images: normalized.
      labels: as in `client.cross_entropy`.
      shared: the update, shaped like `params`.
      rule: one of `RULES`.
      weights: a number for each leaf of `params`, as of `compare`; None for 1.

    Returns:
      The comparison, and the statistics of the batch.
    """
    leaves, structure = jax.tree.flatten(params)
    network, result = jax.make_jaxpr(
        lambda leaves, images: loss(structure.unflatten(leaves), images, labels), return_shape=True
    )(leaves, images)
    layers = find_layers(network.jaxpr, len(leaves), rule)
    inside = {layer.leaf for layer in layers.values()}
    rest = {i: leaf for i, leaf in enumerate(leaves) if i not in inside}

    def tapped(rest, taps):
        weights = [rest.get(i, leaf) for i, leaf in enumerate(leaves)]
        outputs, inputs = _evaluate(network, [*weights, images], taps)
        value, statistics = jax.tree.unflatten(jax.tree.structure(result), outputs)
        return value, (inputs, statistics)

    taps = {i: jnp.zeros(x.output.shape, x.output.dtype) for i, x in layers.items()}
    gradients, (inputs, statistics) = jax.grad(tapped, argnums=(0, 1), has_aux=True)(rest, taps)
    update, deltas = gradients
    sent = structure.flatten_up_to(shared)
    weigh = [1.0] * len(leaves) if weights is None else structure.flatten_up_to(weights)
    of_rest = None if weights is None else {i: weigh[i] for i in rest}
    parts = [compare(update, {i: sent[i] for i in rest}, of_rest)]
    for i, layer in layers.items():
        part = _compare_layer(layer, inputs[i], deltas[i], sent[layer.leaf])
        parts.append(Comparison(*(weigh[layer.leaf] * x for x in part)))
    return jax.tree.map(lambda *x: sum(x), *parts), statistics


def find_layers(jaxpr: jax.extend.core.Jaxpr, leaves: int, rule: str) -> dict[int, Layer]:
    """Finds the layers to which a rule applies: number of the equation -> layer.

    Args:
      jaxpr: of a network, its first `leaves` inputs the parameters.
      leaves: number of the parameters.
      rule: one of `RULES`.
    """
    read = Counter(v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, Literal))
    read.update(v for v in jaxpr.outvars if not isinstance(v, Literal))
    # The variables that hold a parameter and are read once, under its own shape or with an axis
    # of 1 in front, as the convolution has it.
    holds = {v: i for i, v in enumerate(jaxpr.invars[:leaves]) if read[v] == 1}
    layers = {}
    for number, eqn in enumerate(jaxpr.eqns):
        weights = eqn.invars[-1] if eqn.invars else None
        if isinstance(weights, Literal) or weights not in holds:
            continue
        if eqn.primitive.name in ("broadcast_in_dim", "reshape") and read[eqn.outvars[0]] == 1:
            if eqn.outvars[0].aval.shape == (1, *weights.aval.shape):
                holds[eqn.outvars[0]] = holds[weights]
        elif eqn.primitive is conv_p or _is_dense(eqn):
            output = eqn.outvars[0].aval
            features = output.shape[-1]
            if RULES[rule](output.size // features, weights.aval.size // features, features):
                layers[number] = Layer(holds[weights], output, eqn.params.get("geometry"))
    return layers


def _is_dense(eqn: jax.extend.core.JaxprEqn) -> bool:
    """Whether an equation is `inputs @ weights` with inputs [..., K] and weights [K, C]."""
    if eqn.primitive.name != "dot_general":
        return False
    inputs, weights = (v.aval for v in eqn.invars)
    dimensions = (((inputs.ndim - 1,), (0,)), ((), ()))
    return weights.ndim == 2 and eqn.params["dimension_numbers"] == dimensions


def _evaluate(
    network: jax.extend.core.ClosedJaxpr, arguments: list[Array], taps: dict[int, Array]
) -> tuple[list[Array], dict[int, Array]]:
    """Runs a jaxpr with `taps` added to the outputs of its equations; also returns their inputs."""
    jaxpr = network.jaxpr
    values: dict[Any, Array] = dict(zip(jaxpr.constvars, network.consts))
    values |= dict(zip(jaxpr.invars, arguments))

    def read(v):
        return v.val if isinstance(v, Literal) else values[v]

    inputs = {}
    for number, eqn in enumerate(jaxpr.eqns):
        params = eqn.primitive.get_bind_params(eqn.params)
        operands = [read(v) for v in eqn.invars]
        out = eqn.primitive.bind(*operands, **params)
        if number in taps:
            inputs[number] = operands[0]
            out = out + taps[number]
        outputs = out if eqn.primitive.multiple_results else [out]
        values |= dict(zip(eqn.outvars, outputs))
    return [read(v) for v in jaxpr.outvars], inputs


def _compare_layer(layer: Layer, inputs: Array, deltas: Array, shared: Array) -> Comparison:
    """A layer's part of the comparison, of what went into it, its deltas and its shared update."""
    if layer.geometry is None:
        rows = inputs.reshape(-1, inputs.shape[-1])
        product = inputs @ shared
    else:
        rows = patches(inputs, layer.geometry)[0]
        product = conv_p.bind(inputs, shared[None], geometry=layer.geometry)
    columns = deltas.reshape(len(rows), -1)
    own = jnp.sum((rows @ rows.T) * (columns @ columns.T))
    cross = jnp.sum(product * deltas)
    sent = jnp.sum(shared * shared)
    return Comparison(own, cross, sent, own - 2 * cross + sent)
