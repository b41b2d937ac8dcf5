"""Closed forms: exact images from dense layers, and mixtures called so."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import client, metrics
from jaxinv.attacks import CLOSED_FORM
from jaxinv.attacks.closed_form import Given, Recovered
from jaxinv.engine.closed_form import Recovery, recover
from jaxinv.engine.targets import seed_keys
from jaxinv.engine.trials import Problem
from jaxinv.errors import UserError
from jaxinv.networks.mlp import MLP
from jaxinv.types import Normalization, Target

SHAPE = (4, 4, 2)


class Stack(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64, use_bias=self.bias)(x.reshape(len(x), -1)))
        return nn.Dense(5, use_bias=self.bias)(x)


def attacked(name, module, images, labels):
    """What an attack makes of a client's gradient, in float64."""
    variables = module.init(jax.random.key(0), images)
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables)

    @jax.jit
    def run():
        loss = client.loss_fn(module, variables)
        update, _ = client.gradient(loss, variables["params"], images, labels)
        target = Target(update, labels)
        given = Given(module, variables, target, len(labels), SHAPE, jax.random.key(1))
        return CLOSED_FORM[name].find(given)

    found = run()
    return metrics.match(found.images, images), found.exact


@pytest.mark.parametrize("bias", [True, False])
def test_one_image_is_exact_with_and_without_biases(bias):
    with jax.enable_x64(True):
        image = jax.random.normal(jax.random.key(2), (1, *SHAPE), jnp.float64)
        found, exact = attacked("analytic", Stack(bias), image, jnp.array([3]))
        np.testing.assert_allclose(found, image, atol=1e-9)
        assert exact.all()


@pytest.mark.parametrize(
    ("name", "module", "images"),
    [
        ("spear", Stack(), 2),
        ("spear", Stack(), 3),
        ("unmix", Stack(), 3),
        ("unmix", MLP(5, width=256), 16),
    ],
)
def test_a_batch_is_taken_apart(name, module, images):
    with jax.enable_x64(True):
        batch = jax.random.normal(jax.random.key(3), (images, *SHAPE), jnp.float64)
        found, exact = attacked(name, module, batch, jnp.arange(images) % 5)
        np.testing.assert_allclose(found, batch, atol=1e-7)
        assert exact.all()


def test_what_is_not_alone_at_any_neuron_is_called_a_mixture():
    """Two images that differ by little open the same neurons."""
    with jax.enable_x64(True):
        one = jax.random.normal(jax.random.key(4), SHAPE, jnp.float64)
        batch = jnp.stack([one, one + 1e-3])
        found, exact = attacked("analytic", Stack(), batch, jnp.array([0, 1]))
        assert not exact.any()
        assert np.abs(np.asarray(found - batch)).max() > 1e-4


def test_of_too_many_images_none_is_called_exact():
    """24 images of 64 neurons: fewer zeros of each than it takes."""
    with jax.enable_x64(True):
        batch = jax.random.normal(jax.random.key(3), (24, *SHAPE), jnp.float64)
        found, exact = attacked("unmix", Stack(), batch, jnp.arange(24) % 5)
        assert np.isfinite(found).all()
        assert not exact.any()


def test_a_network_that_does_not_start_dense_is_refused():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5)(nn.Conv(2, (3, 3))(x).reshape(len(x), -1))

    with pytest.raises(UserError, match="--model mlp"):
        attacked("spear", Net(), jnp.ones((1, *SHAPE)), jnp.array([1]))


class Patched(nn.Module):
    """Embedded patches with a class token before them, then anything."""

    features: int

    @nn.compact
    def __call__(self, x):
        z = nn.Conv(self.features, (2, 2), strides=2, padding="VALID")(x).reshape(len(x), 4, -1)
        token = self.param("token", nn.initializers.normal(1.0), (1, 1, self.features))
        z = jnp.concatenate([jnp.broadcast_to(token, (len(x), *token.shape[1:])), z], axis=1)
        z = z + self.param("positions", nn.initializers.normal(1.0), (1, *z.shape[1:]))
        z = z + nn.MultiHeadDotProductAttention(num_heads=1)(nn.LayerNorm()(z))
        return nn.Dense(5)(jnp.sin(z).reshape(len(z), -1))


@pytest.mark.parametrize("features", [8, 3])
def test_patches_are_determined_where_channels_are_as_many(features):
    """Of 4 patches: by 8 channels, and not by 3."""
    with jax.enable_x64(True):
        image = jax.random.normal(jax.random.key(6), (1, *SHAPE), jnp.float64)
        found, exact = attacked("patches", Patched(features), image, jnp.array([1]))
        assert exact.all() == (features == 8)
        assert (np.abs(np.asarray(found - image)).max() < 1e-8) == (features == 8)


def test_patches_need_one_image_and_learned_positions():
    variables = jax.eval_shape(Patched(8).init, jax.random.key(0), jnp.ones((1, *SHAPE)))
    with pytest.raises(UserError, match="--images 1"):
        CLOSED_FORM["patches"].find(Given(Patched(8), variables, None, 2, SHAPE, None))
    CLOSED_FORM["patches"].check(Patched(8), variables, SHAPE, 1)
    other = jax.eval_shape(Stack().init, jax.random.key(0), jnp.ones((1, *SHAPE)))
    with pytest.raises(UserError, match="--model vit"):
        CLOSED_FORM["patches"].check(Stack(), other, SHAPE, 1)


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x.reshape(len(x), -1)))
        return nn.Dense(5)(jnp.sin(x))


def test_what_is_found_is_compared_under_the_batch_norm_of_the_client():
    """The images themselves explain their update."""
    images, labels = jax.random.normal(jax.random.key(2), (2, *SHAPE)), jnp.array([0, 1])
    variables = Normalized().init(jax.random.key(0), images)
    loss = client.loss_fn(Normalized(), variables, "train")
    update, _ = client.gradient(loss, variables["params"], images, labels)
    target = jax.tree.map(lambda x: x[None], Target(update, labels))
    normalization = Normalization(jnp.zeros(2), jnp.ones(2))
    problem = Problem(Normalized(), SHAPE, variables, target, None, normalization)
    keys = seed_keys([0], [0])
    recovery = Recovery(lambda *_: Recovered(images, None), "cosine", "train")
    found = recover(problem, recovery, keys)
    assert abs(found.objective.item()) < 1e-5
