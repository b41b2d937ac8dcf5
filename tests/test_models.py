"""The networks against their published parameter counts and inits."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import networks
from jaxinv.errors import UserError
from jaxinv.networks import layers
from jaxinv.networks.resnet import ResNet
from jaxinv.victim.untrained import digest, untrained

# Published counts, 10 classes on 32x32x3.
COUNTS = [
    ("lenet_zhu", None, 15_826),
    ("convnet", 64, 2_904_970),
    ("convnet", 32, 733_642),
    ("convnet", 16, 187_114),
    ("resnet20", 16, 272_474),
    ("resnet20", 64, 4_327_754),
    ("resnet18", 64, 11_173_962),
    ("resnet34", 64, 21_282_122),
    ("resnet50", 64, 23_520_842),
    # torchvision's 3,504,872 with a dense layer of 10 instead of 1000 classes.
    ("mobilenetv2", 32, 3_504_872 - 1281 * 1000 + 1281 * 10),
    # By hand: patches, positions; a block's attention, norms and two dense layers; norm and head.
    (
        "vit",
        192,
        (48 + 1 + 64) * 192
        + 6 * (4 * (192 + 1) * 192 + 4 * 192 + 8 * 192 * 192 + 5 * 192)
        + 2 * 192
        + 193 * 10,
    ),
    ("mlp", 1024, 3072 * 1024 + 2 * 1024 * 1024 + 10 * 1024 + 3 * 1024 + 10),
]


@functools.cache
def shapes(name, width):
    module = networks.build(name, classes=10, width=width)
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def count(name, width):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(name, width)["params"]))


@pytest.mark.parametrize(("name", "width", "published"), COUNTS)
def test_parameter_counts(name, width, published):
    assert count(name, width) == published


def basic_resnet_count(width, blocks):
    """By hand: 9ab per 3x3 from a to b channels, ab per 1x1, 2b per norm, one dense layer."""

    def conv(a, b, kernel):
        return kernel**2 * a * b + 2 * b

    total, before = conv(3, width, 3), width
    for features in (width, 2 * width, 4 * width):
        total += conv(before, features, 3) + (2 * blocks - 1) * conv(features, features, 3)
        total += conv(before, features, 1) * (before != features)
        before = features
    return total + 10 * before + 10


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 3), ("resnet32", 5), ("resnet56", 9)])
def test_resnets_of_any_width_have_the_count_by_hand(name, blocks):
    assert count(name, 10) == basic_resnet_count(10, blocks)


@pytest.mark.parametrize("name", ["convnet", "resnet20", "resnet18", "mobilenetv2"])
def test_group_norm_twin_has_the_same_parameters_and_no_statistics(name):
    assert count(name, 8) == count(f"{name}_gn", 8)
    assert set(shapes(f"{name}_gn", 8)) == {"params"}
    assert set(shapes(name, 8)) == {"params", "batch_stats"}


def test_group_norm_keeps_images_apart_and_batch_norm_in_training_does_not():
    images = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))

    @functools.partial(jax.jit, static_argnums=0)
    def alone_and_together(norm):
        module = ResNet(classes=3, width=2, blocks=(1, 1), norm=norm)
        variables = module.init(jax.random.key(1), images)

        def apply(x):
            return module.apply(variables, x, train=True, mutable=["batch_stats"])

        return apply(images[:1])[0], apply(images)[0][:1]

    np.testing.assert_allclose(*alone_and_together("group"), rtol=1e-4, atol=1e-5)
    alone, together = alone_and_together("batch")
    assert np.abs(alone - together).max() > 1e-2


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return layers.normalize(x, "group", train=False)


@pytest.mark.parametrize(
    ("channels", "groups"), [(64, 32), (320, 32), (16, 8), (24, 12), (144, 24), (5, 1), (1, 1)]
)
def test_group_norm_groups_divide_the_channels_and_hold_two(channels, groups):
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, channels))
    norm = jax.nn.standardize(x.reshape(1, 16, groups, -1), axis=(1, 3), epsilon=1e-5)
    out, _ = Norm().init_with_output(jax.random.key(1), x)
    np.testing.assert_allclose(out, norm.reshape(x.shape), rtol=1e-3, atol=1e-4)


def test_group_norm_is_that_of_the_library():
    """With the same parameters, its second derivatives included, and in bfloat16."""
    x = 3 + jax.random.normal(jax.random.key(0), (2, 4, 5, 12))
    ours, theirs = layers.GroupNorm(6), nn.GroupNorm(num_groups=6, epsilon=1e-5)
    start = ours.init(jax.random.key(0), x)
    assert jax.tree.structure(start) == jax.tree.structure(theirs.init(jax.random.key(0), x))
    params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), start)

    @functools.partial(jax.jit, static_argnums=0)
    def measured(module):
        def loss(p, x):
            return jnp.sin(module.apply(p, x)).sum()

        def norm(x):
            return sum(jnp.vdot(g, g) for g in jax.tree.leaves(jax.grad(loss)(params, x)))

        return module.apply(params, x), jax.grad(loss, argnums=1)(params, x), jax.grad(norm)(x)

    for got, expected in zip(measured(ours), measured(theirs)):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    half = ours.apply(params, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), ours.apply(params, x), atol=0.1)


def test_a_width_the_multiplier_cannot_make_is_refused():
    with pytest.raises(UserError, match="--width 12: mobilenetv2 has widths that 8 divides"):
        networks.build("mobilenetv2", classes=10, width=12)
    # Different widths are different networks.
    assert count("mobilenetv2", 8) < count("mobilenetv2", 16) < count("mobilenetv2", 32)


def test_unknown_network_lists_the_known_ones():
    with pytest.raises(UserError, match="lenet_zhu, mlp, vit, convnet, resnet20"):
        networks.build("lenet", classes=10)


def test_lenet_draws_every_parameter_from_its_interval():
    victim = untrained("lenet_zhu", classes=10, width=None, seed=0, image_shape=(32, 32, 3))
    leaves = np.concatenate([x.ravel() for x in jax.tree.leaves(victim.variables["params"])])
    assert leaves.min() >= -0.5
    assert leaves.max() <= 0.5
    # U(-0.5, 0.5) has std 1/sqrt(12); 15,826 draws give it to about 0.4%.
    assert abs(leaves.std() - 12**-0.5) < 5e-3


def test_digest_tells_parameters_apart():
    tree = {"a": np.zeros(3, np.float32), "b": np.ones(2, np.float32)}
    assert digest(tree) == digest(dict(reversed(tree.items())))
    changed = tree | {"a": np.array([0, 0, 1e-30], np.float32)}
    assert digest(tree) != digest(changed)


def test_the_maximum_is_found_again_on_the_way_back():
    """Compiled as one program, which may round the normalized input twice, in two ways."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 7, 6, 8))
    weights = jax.random.normal(keys[1], (2, 2, 2, 8))
    scale = jax.random.normal(keys[2], (8,))
    norm = {"params": {"scale": scale, "bias": 0.3 * scale}}

    def pooled(x):
        features = nn.relu(layers.GroupNorm(4).apply(norm, x))
        return (layers.max_pool(features, 3) * weights).sum()

    one_by_one = jax.grad(pooled)(x)
    assert jnp.abs(one_by_one).max() > 0.1
    np.testing.assert_allclose(jax.jit(jax.grad(pooled))(x), one_by_one, atol=1e-6)
    # Of equal entries the first one counts.
    np.testing.assert_array_equal(
        jax.grad(lambda x: layers.max_pool(x, 2).sum())(jnp.ones((1, 2, 2, 1))).ravel(),
        [1, 0, 0, 0],
    )
