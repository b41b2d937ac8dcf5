"""What a network's parameters do, read off its jaxpr: which layer makes its logits, in what order.

Names say little of a network that someone else wrote. What reaches the logits does: `logits = h W +
b`, perhaps averaged over the positions of a 1x1 convolution, with W and b that nothing else reads.
Then the gradient of b is the mean of dloss/dlogits over the images, whatever comes before.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import Array, Float

from jaxinv.errors import UserError
from jaxinv.networks.convolution import fast_convolutions
from jaxinv.types import PyTree

FEATURES_AT_ONCE = 8  # images that go through the network together
# Equations with a jaxpr inside that they only call.
CALLS = {
    "pjit",
    "jit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "checkpoint",
    "remat",
    "remat2",
}
# Those that give a value another shape or type.
_SAME = {
    "reshape",
    "squeeze",
    "broadcast_in_dim",
    "expand_dims",
    "convert_element_type",
    "copy",
    "copy_p",
    "optimization_barrier",
    "reduce_precision",
}


class Classifier(NamedTuple):
    """The layer that makes the logits: where its parameters are, and how its kernel lies."""

    kernel: tuple[str, ...]  # path of the weights
    bias: tuple[str, ...] | None  # of the bias, where it has one
    by_row: bool  # whether a class is a row of the kernel, as of an embedding, and not a column

    def matrix(self, tree: PyTree) -> Float[Array, "feature class"]:
        """The kernel, or its gradient, in a tree shaped like the parameters."""
        kernel = subtree(tree, self.kernel)
        kernel = kernel.reshape(-1, kernel.shape[-1])  # of a 1x1 convolution
        return kernel.T if self.by_row else kernel

    def vector(self, tree: PyTree) -> Float[Array, " class"] | None:
        """The bias, or its gradient; None where there is none."""
        return None if self.bias is None else subtree(tree, self.bias)


def find_classifier(
    network: Any, variables: PyTree, image_shape: tuple[int, int, int]
) -> Classifier | None:
    """Finds the layer that makes the logits; None where there is no such layer.

    Args:
      network: with an `apply(variables, images)` that gives logits [image, class].
      variables: "params" and what else it holds.
      image_shape: height, width, channel.
    """
    flat, paths = trace(network, variables, image_shape)
    if len(flat.outvars) != 1 or flat.outvars[0].aval.ndim != 2:
        return None
    made = {v: eqn for eqn in flat.eqns for v in eqn.outvars}
    read = Counter(v for eqn in flat.eqns for v in eqn.invars if not isinstance(v, Literal))
    leaves = {v: i for i, v in enumerate(flat.invars[: len(paths)])}

    def parameter(var):
        """Number of the parameter that a variable is, and whether it was transposed."""
        turned = False
        while not isinstance(var, Literal) and read[var] == 1:
            if var in leaves:
                return leaves[var], turned
            eqn = made.get(var)
            if eqn is None or eqn.primitive.name not in {*_SAME, "transpose"}:
                return None
            turned ^= eqn.primitive.name == "transpose"
            var = eqn.invars[0]
        return None

    var, bias = flat.outvars[0], None
    classes = var.aval.shape[-1]
    while (eqn := made.get(var)) is not None:
        name = eqn.primitive.name
        if name in _SAME and eqn.invars[0].aval.shape[-1:] == (classes,):
            var = eqn.invars[0]
        elif name in ("div", "mul") and (inside := _mean_of(eqn, made)) is not None:
            var = inside
        elif name == "add":
            sides = [parameter(v) for v in eqn.invars]
            if (sides[0] is None) == (sides[1] is None):
                return None
            number = (sides[0] or sides[1])[0]
            if flat.invars[number].aval.shape != (classes,):
                return None
            bias = paths[number] if bias is None else bias
            var = eqn.invars[0 if sides[0] is None else 1]
        elif name in ("dot_general", "conv_general_dilated"):
            found = parameter(eqn.invars[1])
            if found is None:
                return None
            number, turned = found
            by_row = _class_axis(eqn, turned)
            return None if by_row is None else Classifier(paths[number], bias, by_row)
        else:
            return None
    return None


def _mean_of(eqn, made):
    """The variable of which an equation makes the mean over positions; None where it does not."""
    sums, factor = eqn.invars
    if isinstance(sums, Literal):
        sums, factor = factor, sums
    inner = made.get(sums) if not isinstance(sums, Literal) else None
    if inner is None or inner.primitive.name != "reduce_sum" or not isinstance(factor, Literal):
        return None
    whole, part = inner.invars[0].aval, sums.aval
    if whole.shape[-1:] != part.shape[-1:]:
        return None
    number = math.prod(whole.shape) / math.prod(part.shape)
    share = 1 / float(factor.val) if eqn.primitive.name == "div" else float(factor.val)
    return inner.invars[0] if math.isclose(share * number, 1, rel_tol=1e-5) else None


def _class_axis(eqn, turned: bool) -> bool | None:
    """Whether classes are rows of a dense layer's or 1x1 convolution's kernel; None if neither."""
    kernel = eqn.invars[1].aval.shape
    if eqn.primitive.name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"].rhs_spec
        pointwise = all(kernel[axis] == 1 for axis in numbers[2:])
        last = numbers[0] == len(kernel) - 1
        whole = eqn.params["feature_group_count"] == 1
        return False if pointwise and last and whole and not turned else None
    (_, contracted), (batch, _) = eqn.params["dimension_numbers"]
    if len(kernel) != 2 or batch or len(contracted) != 1:
        return None
    return (contracted[0] == 1) != turned


def trace(
    network: Any, variables: PyTree, image_shape: tuple[int, int, int]
) -> tuple[Jaxpr, list[tuple[str, ...]]]:
    """The network on two images as equations without calls, and the paths of its parameters.

    The parameters are the first inputs, in the order of the paths.
    """
    found, structure = jax.tree_util.tree_flatten_with_path(variables["params"])
    paths = [tuple(str(getattr(k, "key", getattr(k, "idx", k))) for k in path) for path, _ in found]
    leaves = [leaf for _, leaf in found]
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    def logits(leaves, images):
        return network.apply({**rest, "params": structure.unflatten(leaves)}, images)

    closed = jax.make_jaxpr(logits)(leaves, jnp.zeros((2, *image_shape)))
    arguments = [*leaves, jnp.zeros((2, *image_shape))]
    return jax.make_jaxpr(lambda *x: _inline(closed, x))(*arguments).jaxpr, paths


def _inline(closed: ClosedJaxpr, arguments) -> list:
    """Evaluates a jaxpr, and the jaxprs that it calls as if their equations were its own."""
    jaxpr = closed.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *arguments)))

    def read(v):
        return v.val if isinstance(v, Literal) else values[v]

    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if eqn.primitive.name in CALLS and inner is not None:
            inner = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
            outputs = _inline(inner, operands)
        else:
            out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
            outputs = out if eqn.primitive.multiple_results else [out]
        values |= dict(zip(eqn.outvars, outputs))
    return [read(v) for v in jaxpr.outvars]


def classifier_features(
    network: Any,
    variables: PyTree,
    images: Float[Array, "batch height width channel"],
    classifier: Classifier,
) -> Float[Array, "batch feature"]:
    """Computes the features that enter any layer that makes the logits, a few images at a time.

    The logits are linear in its kernel: the derivative of the first with respect to its weights.
    """
    params = variables["params"]
    kernel = subtree(params, classifier.kernel)

    def first_logit(kernel, image):
        own = replace(params, classifier.kernel, kernel)
        with fast_convolutions():
            return network.apply({**variables, "params": own}, image[None])[0, 0]

    def of_image(image):
        gradient = jax.grad(first_logit)(kernel, image)
        gradient = gradient.reshape(-1, gradient.shape[-1])
        return gradient[0] if classifier.by_row else gradient[:, 0]

    return lax.map(of_image, images, batch_size=FEATURES_AT_ONCE)


def classifier_path(
    module: Any, variables: PyTree, image_shape: tuple[int, int, int]
) -> tuple[str, ...]:
    """Finds the dense layer that makes the logits: the path of its kernel and bias.

    Raises:
      UserError: no `flax.linen.Dense` makes them.
    """
    found = find_classifier(module, variables, image_shape)
    if found is None or found.kernel[-1] != "kernel" or found.by_row:
        raise UserError("the network has no dense layer that makes its logits, which this needs")
    return found.kernel[:-1]


def classifier_input(
    module: nn.Module, variables: PyTree, images: Float[Array, "batch height width channel"]
) -> Float[Array, "batch feature"]:
    """Computes the features that enter a `flax.linen.Dense` that makes the logits, in one call.

    Raises:
      UserError: no `flax.linen.Dense` makes them.
    """
    path, inputs = classifier_path(module, variables, images.shape[1:]), []

    def look(next_fun, args, kwargs, context):
        if context.module.path == path and context.method_name == "__call__":
            inputs.append(args[0])
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(look):
        module.apply(variables, images)
    return inputs[-1]


def dense_layers(
    module: Any, variables: PyTree, image_shape: tuple[int, int, int]
) -> list[tuple[str, ...]]:
    """Finds the dense layers of a network, in the order of their calls: their parameters' paths.

    Raises:
      UserError: the first layer is not a dense one on all of the image.
    """
    seen: list[tuple[nn.Module, int]] = []

    def look(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Dense | nn.Conv) and context.method_name == "__call__":
            seen.append((context.module, args[0].size))
        return next_fun(*args, **kwargs)

    image = jnp.zeros((1, *image_shape))
    with nn.intercept_methods(look):
        jax.eval_shape(lambda image: module.apply(variables, image), image)
    if not seen or not isinstance(seen[0][0], nn.Dense) or seen[0][1] != image.size:
        raise UserError(
            "--attack analytic, spear and unmix need a network whose first layer is dense: --model "
            "mlp"
        )
    return [layer.path for layer, _ in seen if isinstance(layer, nn.Dense)]


class Use(NamedTuple):
    """One parameter in the order in which a network reads them."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    flattened: tuple[int, int, int] | None  # height, width, channel, where a dense layer reads maps


def parameters_in_order(
    network: Any, variables: PyTree, image_shape: tuple[int, int, int]
) -> list[Use]:
    """The parameters in the order in which a call reads them first; those it does not read last."""
    flat, paths = trace(network, variables, image_shape)
    made = {v: eqn for eqn in flat.eqns for v in eqn.outvars}
    uses = []
    for number, eqn in _first_reads(flat, len(paths)):
        dense = eqn is not None and eqn.primitive.name == "dot_general"
        maps = _maps_of(eqn.invars[0], made) if dense else None
        uses.append(Use(paths[number], flat.invars[number].aval.shape, maps))
    return uses


def depths(function: Callable[..., Any], params: PyTree, *arguments: Any) -> PyTree:
    """How deep each parameter lies, in (0, 1]: its place among all, in the order of their use.

    Args:
      function: `function(params, *arguments)`, of which nothing is computed.
      params: of n arrays; the one that is read last has depth 1, the first 1 / n.
      arguments: arrays.

    Returns:
      Numbers of Python, in a tree shaped like the parameters.
    """
    leaves, structure = jax.tree.flatten(params)

    def called(*given):
        of_params, others = given[: len(leaves)], given[len(leaves) :]
        return function(structure.unflatten(of_params), *others)

    closed = jax.make_jaxpr(called)(*leaves, *arguments)
    flat = jax.make_jaxpr(lambda *x: _inline(closed, x))(*leaves, *arguments).jaxpr
    order = [number for number, _ in _first_reads(flat, len(leaves))]
    return structure.unflatten([(order.index(i) + 1) / len(order) for i in range(len(order))])


def _first_reads(flat: Jaxpr, count: int) -> list[tuple[int, JaxprEqn | None]]:
    """The first `count` inputs in the order in which they are read, and the equations that do.

    What none reads comes last.
    """
    numbers = {v: i for i, v in enumerate(flat.invars[:count])}
    reads: dict[int, JaxprEqn | None] = {}
    for eqn in flat.eqns:
        for var in eqn.invars:
            if not isinstance(var, Literal) and var in numbers:
                reads.setdefault(numbers[var], eqn)
    return [*reads.items(), *((i, None) for i in range(count) if i not in reads)]


def _maps_of(var, made) -> tuple[int, int, int] | None:
    """Height, width and channels of the maps that a row of features was before it was flat."""
    while (eqn := made.get(var)) is not None and eqn.invars:
        before = eqn.invars[0].aval.shape
        if eqn.primitive.name == "reshape" and len(before) == 4:
            return before[1:] if math.prod(before[1:]) == var.aval.shape[-1] else None
        if before != var.aval.shape:
            return None
        var = eqn.invars[0]
    return None


def subtree(tree: PyTree, path: tuple[str, ...]) -> PyTree:
    """The part of a tree of parameters that belongs to one layer."""
    for name in path:
        tree = tree[name] if name in tree else tree[int(name)]
    return tree


def replace(tree: PyTree, path: tuple[str, ...], leaf: Array) -> PyTree:
    """The tree with another leaf at a path."""
    first, *rest = path
    first = first if first in tree else int(first)
    return {**tree, first: replace(tree[first], tuple(rest), leaf) if rest else leaf}
