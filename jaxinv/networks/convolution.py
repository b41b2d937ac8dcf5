"""The convolution all networks run on: three bilinear primitives (`trilinear.py`).

A mapped image under one kernel only grows the batch; a kernel of its own per trial becomes a
batched matrix product. The data gradient is written with an explicitly flipped kernel, which
XLA:CPU needs to keep its fast path inside `lax.scan`.

Shapes: images `[group, batch, height, width, channel]`, kernels
`[group, kernel_height, kernel_width, channel, feature]`; one group means a kernel shared by all.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxinv.networks import depthwise
from jaxinv.networks.trilinear import Geometry, trilinear

# --- How each part is computed ------------------------------------------------------------------
#
# One kernel for all goes to XLA's convolution, but where im2col is smaller than the kernel, or no
# copy at all (1x1): there a matrix product is faster, and on images of 2x2, where XLA:CPU falls
# back to a loop over single numbers, 100 times so.
#
# A kernel of its own per group, and every kernel gradient, is a batched matrix product. Whole
# im2col copies each pixel once per tap, k*k times, and on a CPU the copies take longer than the
# product. Where the columns have stride 1, the taps are dealt out instead: the k row taps stacked
# into the image's channels, the k column taps into the deltas' features. Their product holds every
# pair of taps once, the arithmetic is the same, and each side is copied k times.

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
PART_FLOATS = 2**20  # of a kernel gradient's operands at once, on a CPU: what its caches hold


def _conv(images, kernels, geometry):
    """conv: images [g n h w c], kernels [g kh kw c o] -> [g n oh ow o]."""
    if images.shape[0] == 1:
        return _conv_shared(images, kernels, geometry)
    groups, features = kernels.shape[0], kernels.shape[-1]
    if geometry.splits:
        product = jnp.einsum("gtk,gko->gto", _row_taps(images, geometry), _paired(kernels))
        return _sum_column_taps(product, geometry, features)
    product = jnp.einsum(
        "gtk,gko->gto", patches(images, geometry), kernels.reshape(groups, -1, features)
    )
    return product.reshape(groups, -1, *geometry.output, features)


def _conv_shared(images, kernels, geometry):
    """`_conv` by one kernel: images [1 n h w c], kernels [1 kh kw c o] -> [1 n oh ow o]."""
    features = kernels.shape[-1]
    positions = images.shape[1] * math.prod(geometry.output)
    copies = positions >= features and geometry.kernel != (1, 1)
    if copies or min(*geometry.padding[0], *geometry.padding[1]) < 0:
        return lax.conv_general_dilated(
            images[0], kernels[0], geometry.strides, geometry.padding, dimension_numbers=_DIMENSIONS
        )[None]
    product = patches(images, geometry)[0] @ kernels.reshape(-1, features)
    return product.reshape(1, images.shape[1], *geometry.output, features)


def _dgrad(deltas, kernels, geometry):
    """dgrad: deltas [g n oh ow o], kernels [g kh kw c o] -> [g n h w c]."""
    groups, batch, *_, features = deltas.shape
    if groups == 1:
        # XLA:CPU canonicalizes convolutions outside loops only, so the flip is written out, and
        # the barrier keeps it from being folded back.
        flipped = lax.optimization_barrier(kernels[:, ::-1, ::-1].swapaxes(3, 4))
        if geometry.strides == (1, 1):
            reverse = Geometry(geometry.output, geometry.kernel, (1, 1), geometry.reverse_padding)
            return _conv_shared(deltas, flipped, reverse)
        return lax.conv_general_dilated(
            deltas[0],
            flipped[0],
            (1, 1),
            geometry.reverse_padding,
            lhs_dilation=geometry.strides,
            dimension_numbers=_DIMENSIONS,
        )[None]
    if geometry.splits:
        rows = jnp.einsum("gto,gko->gtk", _column_taps(deltas, geometry), _paired(kernels))
        shape = (geometry.output[0], geometry.image[1], geometry.kernel[0], kernels.shape[3])
        return _overlap_add(rows.reshape(groups, batch, *shape), geometry, spatial=0)
    columns = jnp.einsum(
        "gto,gko->gtk", deltas.reshape(groups, -1, features), kernels.reshape(groups, -1, features)
    ).reshape(groups, batch, *geometry.output, *kernels.shape[1:4])
    rows = lax.optimization_barrier(_overlap_add(columns, geometry, spatial=0))
    return _overlap_add(rows, geometry, spatial=1)


def _wgrad(images, deltas, geometry):
    """wgrad: images [g n h w c], deltas [g n oh ow o] -> [g kh kw c o]."""
    product = jnp.einsum("gtk,gto->gko", *_wgrad_operands(images, deltas, geometry))
    groups, channels, features = deltas.shape[0], images.shape[-1], deltas.shape[-1]
    kernel_h, kernel_w = geometry.kernel
    if geometry.splits:
        return product.reshape(groups, kernel_h, channels, kernel_w, features).swapaxes(2, 3)
    return product.reshape(groups, kernel_h, kernel_w, channels, features)


def _wgrad_operands(images, deltas, geometry):
    """The factors [g t k], [g t o] whose product over all positions t is the kernel gradient."""
    if geometry.splits:
        return _row_taps(images, geometry), _column_taps(deltas, geometry)
    return patches(images, geometry), deltas.reshape(deltas.shape[0], -1, deltas.shape[-1])


def _wgrad_in_parts(images, deltas, geometry):
    """`_wgrad` with as many images at once as leave its operands in the cache, summed.

    Whole, they are up to 75 MB a layer of a training batch, and the memory is what takes the time.
    """
    groups, batch = images.shape[:2]
    operands = functools.partial(_wgrad_operands, geometry=geometry)
    floats = sum(x.size for x in jax.eval_shape(operands, images[:, :1], deltas[:, :1]))
    most = min(batch, PART_FLOATS // floats)
    size = max((d for d in range(1, most + 1) if batch % d == 0), default=1)
    if size == batch:
        return _wgrad(images, deltas, geometry)

    def split(x):
        return x.reshape(groups, batch // size, size, *x.shape[2:]).swapaxes(0, 1)

    def add(total, part):
        return total + _wgrad(*part, geometry), None

    shape = (groups, *geometry.kernel, images.shape[-1], deltas.shape[-1])
    zero = jnp.zeros(shape, jnp.result_type(images, deltas))
    return lax.scan(add, zero, (split(images), split(deltas)))[0]


def _paired(kernels):
    """Kernels [g kh kw c o] as the matrices [g, kh*c, kw*o] of row taps against column taps."""
    groups, kernel_h, kernel_w, channels, features = kernels.shape
    return kernels.swapaxes(2, 3).reshape(groups, kernel_h * channels, kernel_w * features)


def _row_taps(images, geometry):
    """The images once per kernel row: [g n h w c] -> [g, n*oh*w, kh*c]."""
    stride, (out_h, _) = geometry.strides[0], geometry.output
    images = jnp.pad(images, ((0, 0), (0, 0), geometry.padding[0], (0, 0), (0, 0)))
    taps = [
        lax.slice_in_dim(images, i, i + (out_h - 1) * stride + 1, stride, axis=2)
        for i in range(geometry.kernel[0])
    ]
    # Fused into the product, XLA:CPU would leave its matrix library.
    rows = lax.optimization_barrier(jnp.concatenate(taps, axis=-1))
    return rows.reshape(images.shape[0], -1, rows.shape[-1])


def _column_taps(deltas, geometry):
    """The deltas once per kernel column: [g n oh ow o] -> [g, n*oh*w, kw*o].

    What stands at image column x of tap j is the output column that j carries x to.
    """
    width, taps = geometry.image[1], geometry.kernel[1]
    padding = geometry.reverse_padding[1]
    padded = jnp.pad(deltas, ((0, 0), (0, 0), (0, 0), padding, (0, 0)))
    shifted = [
        lax.slice_in_dim(padded, taps - 1 - j, taps - 1 - j + width, axis=3) for j in range(taps)
    ]
    columns = lax.optimization_barrier(jnp.concatenate(shifted, axis=-1))
    return columns.reshape(deltas.shape[0], -1, columns.shape[-1])


def _sum_column_taps(product, geometry, features):
    """The transpose of `_column_taps`: [g, n*oh*w, kw*o] -> [g n oh ow o]."""
    (out_h, out_w), taps = geometry.output, geometry.kernel[1]
    product = product.reshape(product.shape[0], -1, out_h, geometry.image[1], taps * features)
    padded = jnp.pad(product, ((0, 0), (0, 0), (0, 0), geometry.padding[1], (0, 0)))
    total = 0.0
    for j in range(taps):
        tap = lax.slice_in_dim(padded, j, j + out_w, axis=3)
        total += lax.slice_in_dim(tap, j * features, (j + 1) * features, axis=4)
    return total


def patches(images: Array, geometry: Geometry) -> Array:
    """Lays out im2col: [g n h w c] -> [g, n*oh*ow, kh*kw*c], by slicing rows, then columns."""
    (kernel_h, kernel_w), (stride_h, stride_w) = geometry.kernel, geometry.strides
    out_h, out_w = geometry.output
    images = jnp.pad(images, ((0, 0), (0, 0), *geometry.padding, (0, 0)))
    rows = jnp.stack(
        [
            lax.slice_in_dim(images, i, i + (out_h - 1) * stride_h + 1, stride_h, axis=2)
            for i in range(kernel_h)
        ],
        axis=4,
    )  # [g n oh w kh c]
    # Fused into one another, the two stacks compile for minutes and run many times slower.
    rows = lax.optimization_barrier(rows)
    patches = jnp.stack(
        [
            lax.slice_in_dim(rows, j, j + (out_w - 1) * stride_w + 1, stride_w, axis=3)
            for j in range(kernel_w)
        ],
        axis=5,
    )  # [g n oh ow kh kw c]
    return patches.reshape(images.shape[0], -1, kernel_h * kernel_w * images.shape[-1])


def _overlap_add(columns, geometry, spatial):
    """One axis of col2im, the transpose of `patches`: sums the taps of axis 4 into the image.

    Output row y of stride s gets the taps of its phase y mod s alone, so that each phase is a sum
    of shifted arrays and no zeros are inserted between them.
    """
    axis = 2 + spatial
    stride, size = geometry.strides[spatial], geometry.image[spatial]
    low = geometry.padding[spatial][0]
    taps = columns.shape[4]
    steps = -(-taps // stride)
    phases = []
    for phase in range(stride):
        total = None
        for tap in range(phase, taps, stride):
            piece = lax.index_in_dim(columns, tap, axis=4, keepdims=False)
            shift = tap // stride
            pads = [(0, 0)] * piece.ndim
            pads[axis] = (shift, steps - 1 - shift)
            piece = jnp.pad(piece, pads)
            total = piece if total is None else total + piece
        phases.append(jnp.zeros_like(phases[0]) if total is None else total)
    image = jnp.stack(phases, axis + 1).reshape(
        *columns.shape[:axis], -1, *phases[0].shape[axis + 1 :]
    )
    pads = [(0, 0)] * image.ndim
    pads[axis] = (0, max(0, low + size - image.shape[axis]))
    return lax.slice_in_dim(jnp.pad(image, pads), low, low + size, axis=axis)


conv_p, dgrad_p, wgrad_p = trilinear("trilinear", _conv, _dgrad, _wgrad, _wgrad_in_parts)


# --- Under any Flax network ---------------------------------------------------------------------


def conv_general_dilated(
    lhs,
    rhs,
    window_strides,
    padding,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count=1,
    precision=None,
):
    """`lax.conv_general_dilated` on the trilinear primitives, as `flax.linen.Conv` calls it.

    Depthwise convolutions have primitives of their own. What neither covers (dilation, other
    feature groups, not two spatial axes) goes to `lax`, with the same values.
    """
    plain = all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    alone = feature_group_count == lhs.shape[-1] == rhs.shape[-1]  # each channel: depthwise
    if rhs.ndim != 4 or not plain or not (feature_group_count == 1 or alone):
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            precision=precision,
        )
    image, kernel = lhs.shape[1:3], rhs.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(image, kernel, window_strides, padding)
    if min(map(min, padding)) < 0:  # a crop, which comes first
        crop = [(min(low, 0), min(high, 0), 0) for low, high in padding]
        lhs = lax.pad(lhs, jnp.zeros((), lhs.dtype), [(0, 0, 0), *crop, (0, 0, 0)])
        image = lhs.shape[1:3]
        padding = [(max(low, 0), max(high, 0)) for low, high in padding]
    geometry = Geometry(
        tuple(image), tuple(kernel), tuple(window_strides), tuple(map(tuple, padding))
    )
    if alone:
        return depthwise.conv_p.bind(lhs[None], rhs[None, :, :, 0], geometry=geometry)[0]
    return conv_p.bind(lhs[None], rhs[None], geometry=geometry)[0]


def fast_convolutions():
    """A context in which every `nn.Conv` runs on the trilinear primitives, whoever wrote the model.

    Use it around `module.apply`. Convolutions that were given an operation of their own keep it.
    """

    def interceptor(next_fun, args, kwargs, context):
        module = context.module
        if type(module) is not nn.Conv or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if module.conv_general_dilated is not None or module.conv_general_dilated_cls is not None:
            return next_fun(*args, **kwargs)
        # A bound Linen module is frozen; its method reads the field when it runs.
        object.__setattr__(module, "conv_general_dilated", conv_general_dilated)
        try:
            return next_fun(*args, **kwargs)
        finally:
            object.__setattr__(module, "conv_general_dilated", None)

    return nn.intercept_methods(interceptor)
