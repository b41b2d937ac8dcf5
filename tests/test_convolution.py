"""The trilinear convolution against plain autodiff of `lax.conv_general_dilated`, in float64."""

import os
from contextlib import nullcontext

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinv import networks
from jaxinv.attacks.objectives import compare, cosine
from jaxinv.networks import convolution
from jaxinv.networks.convolution import conv_general_dilated, fast_convolutions
from jaxinv.networks.mobilenet import InvertedResidual
from jaxinv.networks.resnet import Bottleneck, ResNet

DIMENSIONS = ("NHWC", "HWIO", "NHWC")

# Strided, 1x1, even-sized, uneven padding, an image that the strides do not tile; fewer positions
# than channels and features, where im2col is smaller than the kernel; a border that the data
# gradient cuts off.
CASES = [
    ((3, 3), (1, 1), ((1, 1), (1, 1)), (6, 5), (3, 4)),
    ((5, 5), (2, 2), ((2, 2), (2, 2)), (9, 8), (3, 4)),
    ((1, 1), (2, 2), ((0, 0), (0, 0)), (7, 8), (3, 4)),
    ((2, 4), (2, 1), ((0, 1), (1, 2)), (7, 9), (3, 4)),
    ((3, 3), (1, 1), ((1, 1), (1, 1)), (2, 2), (32, 33)),
    ((1, 1), (1, 1), ((1, 0), (0, 1)), (3, 4), (3, 4)),
]


def second_order(conv, images, kernel):
    """A gradient of a gradient, reverse over reverse and forward over reverse, as in an attack."""

    def gradient_norm(x):
        gradient = jax.grad(lambda w: jnp.sum(jnp.sin(conv(x, w))))(kernel)
        return jnp.sum(jnp.tanh(gradient))

    reverse = jax.vmap(jax.value_and_grad(gradient_norm))(images)
    forward = jax.vmap(lambda x: jax.jvp(gradient_norm, (x,), (jnp.cos(x),)))(images)
    return jax.tree.leaves((reverse, forward))


@pytest.mark.parametrize(("kernel", "strides", "padding", "size", "channels"), CASES)
def test_equals_plain_autodiff_at_second_order_under_vmap(kernel, strides, padding, size, channels):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0))
        weights = jax.random.normal(keys[0], (*kernel, *channels), jnp.float64)
        images = jax.random.normal(keys[1], (3, 2, *size, channels[0]), jnp.float64)

        def run(conv):
            def operation(x, w):
                return conv(x, w, strides, padding, dimension_numbers=DIMENSIONS)

            return jax.jit(lambda x: second_order(operation, x, weights))(images)

        for ours, plain in zip(run(conv_general_dilated), run(lax.conv_general_dilated)):
            np.testing.assert_allclose(ours, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_kernel_gradient_of_a_training_batch_is_summed_in_parts(stride, monkeypatch):
    """Six images, two of which fit at once."""
    monkeypatch.setattr(convolution, "PART_FLOATS", 2 * 32 * 32 * (3 * 2 + 3 * 3) // stride**2)
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(2))
        weights = jax.random.normal(keys[0], (3, 3, 2, 3), jnp.float64)
        images = jax.random.normal(keys[1], (6, 32, 32, 2), jnp.float64)

        def gradient(conv):
            def loss(w):
                return jnp.sum(
                    jnp.sin(conv(images, w, (stride, stride), "SAME", dimension_numbers=DIMENSIONS))
                )

            return jax.jit(jax.grad(loss))

        ours = gradient(conv_general_dilated)
        assert "while" in ours.lower(weights).as_text()
        plain = gradient(lax.conv_general_dilated)(weights)
        np.testing.assert_allclose(ours(weights), plain, rtol=1e-11)


def test_a_kernel_of_its_own_per_example_equals_a_loop():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(1))
        weights = jax.random.normal(keys[0], (3, 2, 2, 3, 4), jnp.float64)
        images = jax.random.normal(keys[1], (3, 2, 6, 6, 3), jnp.float64)

        def conv(x, w):
            return conv_general_dilated(x, w, (2, 1), "SAME")

        batched = jax.jit(jax.vmap(conv))(images, weights)
        plain = [
            lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=DIMENSIONS)
            for x, w in zip(images, weights)
        ]
        np.testing.assert_allclose(batched, jnp.stack(plain), rtol=1e-12)


# Strided with an image that the strides do not tile, 1x1, even-sized with uneven padding; one
# kernel for all examples, or one each. Nine taps at most: every tap is code to compile.
DEPTHWISE_CASES = [
    ((3, 3), (2, 2), ((1, 1), (1, 1)), (6, 5), False),
    ((3, 3), (1, 1), ((1, 1), (1, 1)), (5, 4), True),
    ((1, 1), (2, 2), ((0, 0), (0, 0)), (5, 6), False),
    ((2, 4), (2, 1), ((0, 1), (1, 2)), (5, 6), True),
]


@pytest.mark.parametrize(("kernel", "strides", "padding", "size", "own"), DEPTHWISE_CASES)
def test_depthwise_equals_plain_autodiff_at_second_order_under_vmap(
    kernel, strides, padding, size, own
):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(2))
        weights = jax.random.normal(keys[0], (3, *kernel, 1, 4), jnp.float64)
        images = jax.random.normal(keys[1], (3, 2, *size, 4), jnp.float64)

        def run(conv):
            def operation(x, w):
                return conv(
                    x, w, strides, padding, dimension_numbers=DIMENSIONS, feature_group_count=4
                )

            def gradient_norm(x, w):
                gradient = jax.grad(lambda w: jnp.sum(jnp.sin(operation(x, w))))(w)
                return jnp.sum(jnp.tanh(gradient))

            second = jax.value_and_grad(gradient_norm, argnums=(0, 1))
            return jax.jit(jax.vmap(second, (0, 0) if own else (0, None)))(
                images, weights if own else weights[0]
            )

        ours, plain = (
            jax.tree.leaves(run(c)) for c in (conv_general_dilated, lax.conv_general_dilated)
        )
        for x, y in zip(ours, plain, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-11)


class Mixed(nn.Module):
    """A plain network: one covered convolution, one that is not (dilated)."""

    @nn.compact
    def __call__(self, x):
        x = nn.sigmoid(nn.Conv(4, (3, 3), strides=2)(x))
        return nn.Conv(2, (3, 3), kernel_dilation=2)(x).mean((1, 2))


# One of each kind of block, as shallow as shows it; the table's networks only repeat them.
SHALLOW = {
    "convnet": lambda: networks.build("convnet", classes=3, width=2),
    "basic": lambda: ResNet(3, 2, (1, 1)),
    "bottleneck_gn": lambda: ResNet(3, 4, (1,), Bottleneck, "group"),
    "inverted": lambda: Inverted(),
}
WIDTHS = {"lenet_zhu": None, "mobilenetv2": 8, "mobilenetv2_gn": 8}
# The whole table takes minutes to compile: JAXINV_ALL_NETWORKS=1 pytest tests/test_convolution.py
WHOLE = {
    name: lambda name=name: networks.build(name, classes=3, width=WIDTHS.get(name, 2))
    for name in (networks.NETWORKS if "JAXINV_ALL_NETWORKS" in os.environ else ())
}


class Inverted(nn.Module):
    """An inverted residual as in MobileNetV2, added to its input."""

    @nn.compact
    def __call__(self, x, train=False):
        x = InvertedResidual(3, 1, 2, "batch")(x, train)
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.mark.parametrize(
    "name", [pytest.param("convnet", marks=pytest.mark.slow), *list(SHALLOW)[1:], *WHOLE]
)
def test_a_network_attacked_equals_plain_autodiff_in_float64(name):
    size = 9 if "convnet" in name else 8
    with jax.enable_x64(True):
        module = (SHALLOW | WHOLE)[name]()
        images = jax.random.normal(jax.random.key(0), (2, size, size, 3), jnp.float64)
        variables = jax.jit(module.init)(jax.random.key(1), images)
        variables = jax.tree.map(lambda x: x.astype(jnp.float64), variables)
        params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

        def attack_gradient(context):
            def update(x):
                def loss(params):
                    with context():
                        logits = module.apply({**rest, "params": params}, x)
                    return -nn.log_softmax(logits)[:, 1].mean()

                return jax.grad(loss)(params)

            target = jax.tree.map(jnp.cos, params)  # any direction will do
            return jax.jit(jax.value_and_grad(lambda x: cosine(compare(update(x), target))))(images)

        fast, plain = attack_gradient(fast_convolutions), attack_gradient(nullcontext)
        scale = np.abs(plain[1]).max()
        assert scale > 0
        np.testing.assert_allclose(fast[0], plain[0], rtol=1e-9)
        np.testing.assert_allclose(fast[1] / scale, plain[1] / scale, atol=1e-9)


def test_serves_any_flax_network_and_falls_back_by_itself():
    model, images = Mixed(), jnp.linspace(0, 1, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
    variables = jax.jit(model.init)(jax.random.key(0), images)

    def fast(variables):
        with fast_convolutions():
            return model.apply(variables, images)

    names = str(jax.make_jaxpr(fast)(variables))
    assert names.count("trilinear_conv") == 1
    assert names.count("conv_general_dilated") == 1
    np.testing.assert_allclose(
        jax.jit(fast)(variables), jax.jit(model.apply)(variables, images), rtol=1e-5
    )
    assert "trilinear" not in str(jax.make_jaxpr(model.apply)(variables, images))
