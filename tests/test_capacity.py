"""The rank of d update / d images: the formula against singular values in float64."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import client
from jaxinv import networks as models
from jaxinv.client.capacity import capacity
from jaxinv.networks import layers


class Net(nn.Module):
    """(channels, kernel, stride) of convolutions, what follows each, dense layers behind."""

    convolutions: tuple[tuple[int, int, int], ...] = ()
    hidden: tuple[int, ...] = ()
    classes: int = 4
    activation: Callable = nn.sigmoid
    after: Callable = lambda x: x

    @nn.compact
    def __call__(self, x, train=False):
        for channels, kernel, stride in self.convolutions:
            x = self.after(self.activation(nn.Conv(channels, (kernel,) * 2, strides=stride)(x)))
        x = x.reshape(len(x), -1)
        for features in self.hidden:
            x = self.activation(nn.Dense(features)(x))
        return nn.Dense(self.classes)(x)


class Shared(nn.Module):
    """One convolution twice."""

    @nn.compact
    def __call__(self, x, train=False):
        conv = nn.Conv(3, (3, 3))
        x = nn.tanh(conv(nn.tanh(conv(x))))
        return nn.Dense(4)(x.reshape(len(x), -1))


class Normed(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.tanh(layers.normalize(nn.Conv(4, (3, 3), strides=2)(x), self.kind, train))
        x = nn.tanh(layers.normalize(nn.Conv(4, (3, 3))(x), self.kind, train))
        return nn.Dense(4)(x.mean(axis=(1, 2)))


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.tanh(nn.Conv(3, (3, 3))(x))
        x = x + nn.Conv(3, (3, 3))(nn.tanh(nn.Conv(3, (3, 3))(x)))
        return nn.Dense(4)(nn.tanh(x).mean(axis=(1, 2)))


def numerical_rank(module, images, side, batch_norm="eval"):
    """Rank of the derivative in float64, at a random network and random images."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (images, side, side, 3))
        labels = jnp.arange(images) % 4
        variables = module.init(keys[1], x)
        # Away from the inits' zeros and ones, which are not generic.
        variables = jax.tree.map(
            lambda v: v.astype(jnp.float64) + 0.3 * jax.random.normal(keys[2], v.shape), variables
        )
        if "batch_stats" in variables:
            variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
        loss = client.loss_fn(module, variables, batch_norm)

        def update(x):
            gradient, _ = client.gradient(loss, variables["params"], x, labels)
            return jnp.concatenate([g.ravel() for g in jax.tree.leaves(gradient)])

        jacobian = np.asarray(jax.jit(jax.jacfwd(update))(x)).reshape(-1, x.size)
        found = capacity(module, variables, (side, side, 3), batch_norm)
    values = np.linalg.svd(jacobian, compute_uv=False)
    # The largest gap among the small ones is where rounding begins.
    ranked = values / values[0]
    rank = int((ranked > 1e-12).sum())
    return rank, found


def halved(x):
    return nn.avg_pool(x, (2, 2), (2, 2))


SMOOTH = {
    "strided": (Net(((4, 3, 2), (4, 3, 2))), 2),
    "wide kernel": (Net(((3, 5, 2), (3, 5, 1))), 4),
    "two convolutions": (Net(((2, 3, 1), (2, 3, 2))), 4),
    "dense": (Net(hidden=(20, 12)), 3),
    "narrow": (Net(((1, 3, 1), (6, 3, 1))), 2),
    "tanh": (Net(((4, 3, 2), (4, 3, 1)), activation=nn.tanh), 3),
    "average pool": (Net(((4, 3, 1), (4, 3, 1)), after=halved), 3),
    "residual": (Residual(), 3),
    "BatchNorm, running statistics": (Normed("batch"), 2),
}
KINKED = {
    "ReLU": (Net(((4, 3, 2), (4, 3, 1)), activation=nn.relu), "kinks"),
    "pooled maxima": (Net(((4, 3, 1), (4, 3, 1)), after=lambda x: layers.max_pool(x, 2)), "kinks"),
    "shared weights": (Shared(), "weights of several layers"),
}


@pytest.mark.parametrize("kind", list(SMOOTH))
def test_equal_to_the_numerical_rank_of_smooth_networks(kind):
    module, images = SMOOTH[kind]
    rank, found = numerical_rank(module, images, 6)
    assert found.equality, found.why
    assert rank == found.determined(images)


@pytest.mark.parametrize("kind", list(KINKED))
def test_bounds_the_numerical_rank_of_all_others(kind):
    module, reason = KINKED[kind]
    rank, found = numerical_rank(module, 2, 6)
    assert not found.equality
    assert reason in found.why[0]
    assert 0.3 * found.determined(2) < rank <= found.determined(2)


def test_group_norm_is_bounded():
    rank, found = numerical_rank(Normed("group"), 2, 6)
    assert rank <= found.determined(2)
    assert not found.equality
    assert any("statistics" in why for why in found.why)


def test_batch_statistics_are_bounded():
    """Images see one another: what crosses grows no slower, and what all share crosses once."""
    rank, found = numerical_rank(Normed("batch"), 3, 6, "train")
    assert rank <= found.determined(3)
    assert not found.equality
    assert any("statistics" in why for why in found.why)


def network(name, width=None):
    module = models.build(name, classes=10, width=width)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return capacity(module, variables, (32, 32, 3))


def test_lenet_lets_two_images_through_but_for_4_percent():
    """The numbers of a float64 rank on CIFAR-10: 5,904 of 6,144, where the spectrum breaks off."""
    found = network("lenet_zhu")
    assert found.equality
    assert [found.determined(b) for b in (1, 2, 4, 8)] == [3072, 5904, 7440, 10512]
    # More than the parameters, less the last layer's: the derivatives of the logits sum to zero.
    assert found.determined(1000) == 15826 - 769
    assert found.images == pytest.approx(4368 / (3072 - 768))
    assert found.binding.layer == "Conv_1/kernel"
    assert found.free(1) == 0
    assert found.free(4) == pytest.approx(0.394, abs=1e-3)


def test_wide_networks_let_as_many_through_as_they_have_parameters():
    found = network("resnet18", 16)
    assert not found.equality
    assert found.images == pytest.approx((found.parameters - 129) / 3072)


def test_the_first_dense_layer_of_an_mlp_bounds_it():
    """1,024 units: K - C free rows a unit, and each image's pre-activations."""
    found = network("mlp", 1024)
    assert found.images == pytest.approx((3072 - 1024) * 1024 / (3072 - 1024))
    assert found.binding.layer == "Dense_0/kernel"
