"""A bilinear layer as three primitives that are one another's derivatives, closed at every order.

A convolution, the gradient of its input and the gradient of its kernel are the three partial
derivatives of one trilinear form

    F(a, w, d) = <conv(a, w), d>      conv = dF/dd,  dgrad(d, w) = dF/da,  wgrad(a, d) = dF/dw

so differentiating any of them with respect to any operand gives another of them. Each is a JAX
primitive here, bilinear by declaration, which buys three things plain `lax.conv_general_dilated`
does not have under `vmap(grad(grad))`:

* every derivative, forward or reverse, at any order, is again one of the three (JAX's own transpose
  of a vmapped kernel gradient is a convolution whose kernel is the whole delta map: 100 to 400
  times slower on a CPU);
* the batching rules know which operand varies. A mapped image under one kernel only grows the
  batch; kernels of their own per trial grow the group axis;
* each part is computed as suits it, whatever it is the derivative of.

Shapes carry a leading group axis: images `[group, batch, height, width, channel]`, kernels
`[group, ...]`; one group means a kernel shared by all. `convolution.py` and `depthwise.py` say what
the three parts are.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


class Geometry(NamedTuple):
    """What is static about one convolution: enough to infer the shape of any of the three parts."""

    image: tuple[int, int]  # input height, width
    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right)

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the output."""
        height, width = (
            (size + sum(pad) - k) // stride + 1
            for size, k, stride, pad in zip(self.image, self.kernel, self.strides, self.padding)
        )
        return height, width

    @property
    def splits(self) -> bool:
        """Whether taps can be dealt out, rows to the image and columns to the deltas (below)."""
        overlap = all(pad < self.kernel[1] for pad in self.padding[1])
        return self.strides[1] == 1 and overlap and self.image[1] < 2 * self.output[1]

    @property
    def reverse_padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Padding of the dilated deltas that makes a stride-1 convolution the data gradient."""
        rows, columns = (
            (k - 1 - pad[0], size + pad[0] - (out - 1) * stride - 1)
            for size, k, stride, pad, out in zip(
                self.image, self.kernel, self.strides, self.padding, self.output
            )
        )
        return rows, columns


def trilinear(
    name: str, conv: Callable, dgrad: Callable, wgrad: Callable, wgrad_on_cpu: Callable
) -> tuple[Primitive, Primitive, Primitive]:
    """Makes the three primitives of a layer, which take `geometry=`.

    Args:
      name: in front of theirs.
      conv: (images, kernels, geometry) -> deltas.
      dgrad: (deltas, kernels, geometry) -> images.
      wgrad: (images, deltas, geometry) -> kernels.
      wgrad_on_cpu: the same, as a CPU's caches need it.
    """
    conv_p, dgrad_p, wgrad_p = (Primitive(f"{name}_{part}") for part in ("conv", "dgrad", "wgrad"))
    # The transposes of each part with respect to its first and second operand: the other two parts.
    _define(
        conv_p,
        conv,
        lambda d, a, w, geometry: dgrad_p.bind(d, w, geometry=geometry),
        lambda d, a, w, geometry: wgrad_p.bind(a, d, geometry=geometry),
        _batch_shared,
    )
    _define(
        dgrad_p,
        dgrad,
        lambda a, d, w, geometry: conv_p.bind(a, w, geometry=geometry),
        lambda a, d, w, geometry: wgrad_p.bind(a, d, geometry=geometry),
        _batch_shared,
    )
    _define(
        wgrad_p,
        wgrad,
        lambda w, a, d, geometry: dgrad_p.bind(d, w, geometry=geometry),
        lambda w, a, d, geometry: conv_p.bind(a, w, geometry=geometry),
        _batch_grouped,
    )
    on_cpu = mlir.lower_fun(wgrad_on_cpu, multiple_results=False)
    mlir.register_lowering(wgrad_p, on_cpu, platform="cpu")
    return conv_p, dgrad_p, wgrad_p


def _batch_shared(primitive, operands, dims, *, geometry):
    """Batching of conv and dgrad: images into the batch axis, own kernels into the group axis."""
    images, kernels = operands
    size = next(x.shape[d] for x, d in zip(operands, dims) if d is not None)
    if dims[1] is None:
        images = jnp.moveaxis(images, dims[0], 1)
        groups, _, batch = images.shape[:3]
        folded = images.reshape(groups, size * batch, *images.shape[3:])
        out = primitive.bind(folded, kernels, geometry=geometry)
        return out.reshape(groups, size, batch, *out.shape[2:]), 1
    return _batch_grouped(primitive, operands, dims, geometry=geometry)


def _batch_grouped(primitive, operands, dims, *, geometry):
    """Batching where every element has operands of its own: both fold into the group axis."""
    size = next(x.shape[d] for x, d in zip(operands, dims) if d is not None)
    folded = []
    for x, dim in zip(operands, dims):
        front = jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        folded.append(front.reshape(-1, *front.shape[2:]))
    out = primitive.bind(*folded, geometry=geometry)
    return out.reshape(size, -1, *out.shape[1:]), 0


def _define(primitive: Primitive, compute: Callable, lhs_rule, rhs_rule, batch_rule) -> None:
    """Gives a primitive its value, shape, derivatives, batching and lowering."""
    primitive.def_impl(jax.jit(primitive.bind, static_argnames="geometry"))

    def abstract(x, y, *, geometry):
        shape = jax.eval_shape(functools.partial(compute, geometry=geometry), x, y)
        return x.update(shape=shape.shape)

    primitive.def_abstract_eval(abstract)
    ad.defbilinear(primitive, lhs_rule, rhs_rule)
    batching.primitive_batchers[primitive] = functools.partial(batch_rule, primitive)
    mlir.register_lowering(primitive, mlir.lower_fun(compute, multiple_results=False))
