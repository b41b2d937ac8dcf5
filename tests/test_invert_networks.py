"""Anyone's network: the layer of its logits, its labels, and the one way in which it is called."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from flax.nnx import bridge

from jaxinv import client
from jaxinv.attacks import labels
from jaxinv.errors import UserError
from jaxinv.networks.convolution import conv_general_dilated
from jaxinv.networks.inspect import (
    classifier_features,
    find_classifier,
    parameters_in_order,
    subtree,
)
from jaxinv.networks.user import UserNetwork, output_shape, plain

SHAPE, CLASSES, TRUE = (8, 8, 3), 5, 2


def body(x):
    return nn.sigmoid(nn.Conv(8, (3, 3), strides=2)(x))


def flat(x):
    return x.reshape(len(x), -1)


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES)(flat(body(x)))


class Widths(nn.Module):
    widths: object

    @nn.compact
    def __call__(self, x):
        x = flat(x)
        for width in self.widths[:-1]:
            x = nn.sigmoid(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class Scaled(nn.Module):
    mean: object

    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES)(flat(x - self.mean))


class SqueezeAndExcite(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = body(x)
        gate = nn.sigmoid(nn.Dense(8)(nn.relu(nn.Dense(4)(x.mean((1, 2))))))
        return nn.Conv(CLASSES, (1, 1))(x * gate[:, None, None]).mean((1, 2))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Embed(CLASSES, 6).attend(nn.Dense(6)(flat(body(x))))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        x = nn.Conv(8, (4, 4), strides=4)(x).reshape(len(x), -1, 8)
        attend = nn.MultiHeadDotProductAttention(2, deterministic=deterministic, dropout_rate=0.2)
        return nn.Dense(CLASSES)(nn.LayerNorm()(x + attend(nn.LayerNorm()(x))).mean(1))


class Trains(nn.Module):
    """Trains by default, with BatchNorm and dropout."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(body(x))
        return nn.Dense(CLASSES)(nn.Dropout(0.5, deterministic=not train)(flat(x)))


class Gated(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = flat(body(x))
        return nn.Dense(CLASSES)(x) * nn.sigmoid(nn.Dense(1)(x))


class TiedTwice(nn.Module):
    """Its last layer's weights are read a second time."""

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(CLASSES, 6)
        x = nn.Dense(6)(flat(body(x)))
        return table.attend(x + table(jnp.zeros(len(x), int)))


class OfNnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.dense = nnx.Linear(128, CLASSES, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.drop(flat(nnx.sigmoid(self.conv(x)))))


READ = {
    "dense": (Dense(), ("Dense_0", "kernel")),
    "list of widths": (Widths([6, CLASSES]), ("Dense_1", "kernel")),
    "array": (Scaled(np.float32([0.5, 0.4, 0.3])), ("Dense_0", "kernel")),
    "sequential": (
        nn.Sequential([nn.Conv(8, (3, 3), strides=2), nn.sigmoid, flat, nn.Dense(CLASSES)]),
        ("layers_3", "kernel"),
    ),
    "squeeze-and-excite": (SqueezeAndExcite(), ("Conv_1", "kernel")),
    "tied": (Tied(), ("Embed_0", "embedding")),
    "attention": (Attention(), ("Dense_0", "kernel")),
    "trains": (Trains(), ("Dense_0", "kernel")),
    "bridge": (bridge.to_linen(OfNnx), ("dense", "kernel")),
    "nnx": (OfNnx(nnx.Rngs(0)), ("dense", "kernel")),
}


@pytest.fixture(scope="module")
def image():
    return jnp.asarray(np.random.default_rng(0).uniform(size=(1, *SHAPE)), jnp.float32)


def prepared(module, image):
    """The network, its variables, and the gradient of one image."""
    network = UserNetwork(module)
    if isinstance(module, nnx.Module):
        variables = network.variables()
    else:
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        modes = {Attention: {"deterministic": True}, Trains: {"train": False}}
        own = modes.get(type(module), {})
        variables = plain(freeze(jax.jit(lambda: module.init(keys, image, **own))()))
    return network, variables, gradient(network, variables, image)


def gradient(network, variables, image):
    """Of one image."""
    loss = client.loss_fn(network, variables)

    def of(params):
        return client.gradient(loss, params, image, jnp.array([TRUE]))[0]

    return jax.jit(of)(variables["params"])


@pytest.mark.parametrize("name", READ)
def test_the_label_is_read_off_the_layer_that_makes_the_logits(image, name):
    module, path = READ[name]
    network, variables, update = prepared(module, image)
    hash(network)
    assert network == network
    assert output_shape(network, variables, SHAPE) == (2, CLASSES)
    found = find_classifier(network, variables, SHAPE)
    assert found.kernel == path
    read = labels.infer("idlg", network, variables, update, SHAPE, 1)
    assert read.tolist() == [TRUE]
    # The bias gradient is softmax - onehot, and the weight gradient that times the features.
    logits, features = jax.jit(
        lambda variables: (
            network.apply(variables, image)[0],
            classifier_features(network, variables, image, found)[0],
        )
    )(variables)
    error = jax.nn.softmax(logits) - jnp.eye(CLASSES)[TRUE]
    if found.bias is not None:
        np.testing.assert_allclose(found.vector(update), error, atol=1e-6)
    np.testing.assert_allclose(found.matrix(update), jnp.outer(features, error), atol=1e-5)


@pytest.mark.parametrize("module", [Gated(), TiedTwice()])
def test_where_no_one_layer_makes_the_logits_the_label_must_be_given(image, module):
    network, variables, update = prepared(module, image)
    assert find_classifier(network, variables, SHAPE) is None
    with pytest.raises(UserError, match="labels=idlg: cannot be read, for no one layer alone"):
        labels.infer("idlg", network, variables, update, SHAPE, 1)


def test_a_part_without_that_layer_tells_no_label(image):
    network, variables, update = prepared(Dense(), image)
    with pytest.raises(UserError, match="the update lacks Dense_0/kernel"):
        labels.infer("idlg", network, variables, {"Conv_0": update["Conv_0"]}, SHAPE, 1)


def test_only_rules_that_look_at_noise_send_it_through_the_network(image, monkeypatch):
    network, variables, update = prepared(Dense(), image)
    monkeypatch.setattr(labels, "natural_noise", None)
    for rule in ("idlg", "llg", "ilrg"):
        assert labels.infer(rule, network, variables, update, SHAPE, 1).tolist() == [TRUE]
    with pytest.raises(TypeError):
        labels.infer("counts", network, variables, update, SHAPE, 1)


def test_training_mode_takes_the_images_own_statistics_and_drops_nothing(image):
    network, variables, _ = prepared(Trains(), image)
    loss = client.loss_fn(network, variables, "train")
    found, _ = loss(variables["params"], image, jnp.array([TRUE]))
    params, x = variables["params"], image
    x = nn.sigmoid(nn.Conv(8, (3, 3), strides=2).apply({"params": params["Conv_0"]}, x))
    x = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5)
    logits = flat(x) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    assert float(found) == pytest.approx(float(-jax.nn.log_softmax(logits)[0, TRUE]), rel=1e-4)


def test_a_network_that_cannot_be_called_is_one_line():
    class Needs(nn.Module):
        @nn.compact
        def __call__(self, x, temperature):
            return nn.Dense(CLASSES)(flat(x)) / temperature

    network = UserNetwork(Needs())
    variables = Needs().init(jax.random.key(0), jnp.zeros((1, *SHAPE)), 1.0)
    with pytest.raises(UserError, match=r"model: cannot be called.*temperature.*give a function"):
        output_shape(network, variables, SHAPE)


def test_the_loss_of_a_network_may_be_ones_own(image):
    """Multi-label outputs under a sigmoid."""
    targets = jnp.array([[1.0, 0, 1, 0, 0]])

    def own(logits, labels):
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

    network, variables, _ = prepared(Dense(), image)
    loss = client.loss_fn(UserNetwork(Dense(), own), variables)
    found, _ = loss(variables["params"], image, targets)
    assert float(found) == pytest.approx(float(own(network.apply(variables, image), targets)))


def test_constant_parameters_are_part_of_the_network(image):
    network, variables, update = prepared(Dense(), image)
    split = {
        "params": {"Dense_0": variables["params"]["Dense_0"]},
        "constants": {"Conv_0": variables["params"]["Conv_0"]},
    }
    head = gradient(network, split, image)
    np.testing.assert_allclose(head["Dense_0"]["bias"], update["Dense_0"]["bias"], rtol=1e-5)


def test_parameters_are_listed_in_the_order_of_their_use(image):
    network, variables, _ = prepared(SqueezeAndExcite(), image)
    order = [use.path for use in parameters_in_order(network, variables, SHAPE)]
    layers = list(dict.fromkeys(path[0] for path in order))
    # Flax numbers them as they are made: the outer of two calls in one line comes first.
    assert layers == ["Conv_0", "Dense_1", "Dense_0", "Conv_1"]
    network, variables, _ = prepared(Dense(), image)
    maps = {use.path: use.flattened for use in parameters_in_order(network, variables, SHAPE)}
    assert maps[("Dense_0", "kernel")] == (4, 4, 8)
    assert subtree(variables["params"], ("Dense_0", "kernel")).shape == (128, CLASSES)


@pytest.mark.parametrize("features", [1, 3])
def test_negative_padding_is_a_crop_as_in_plain_flax(rng_numpy, features):
    """Of a convolution and, with as many groups as channels, of a depthwise one."""
    groups = 3 if features == 1 else 1
    images = jnp.float32(rng_numpy.normal(size=(2, 8, 7, 3)))
    kernel = jnp.float32(rng_numpy.normal(size=(3, 3, features, 3)))
    settings = (1, 1), ((-1, 1), (2, -2)), None, None, ("NHWC", "HWIO", "NHWC"), groups

    def of(convolve):
        def out(x, w):
            return jnp.sum(jnp.sin(convolve(x, w, *settings)))

        return jax.jit(jax.value_and_grad(out, argnums=(0, 1)))(images, kernel)

    found, expected = of(conv_general_dilated), of(jax.lax.conv_general_dilated)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found, expected)
