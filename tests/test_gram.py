"""Gram statistics against the gradients themselves, in float64."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import client
from jaxinv.attacks import gram
from jaxinv.attacks.objectives import OBJECTIVES, compare


class Mixed(nn.Module):
    """Layers that need no weight gradient, named so, among all kinds that do."""

    @nn.compact
    def __call__(self, x):
        x = nn.sigmoid(nn.Conv(4, (3, 3), name="many_positions")(x))
        shared = nn.Conv(4, (3, 3), use_bias=False, name="called_twice")
        x = nn.sigmoid(shared(nn.sigmoid(shared(x))))
        x = nn.sigmoid(nn.Conv(6, (3, 3), strides=2, name="gram_strided")(x))
        x = nn.sigmoid(nn.remat(nn.Conv)(6, (3, 3), name="inside_remat")(x))
        x = nn.sigmoid(nn.Conv(8, (2, 2), padding="VALID", name="gram_valid")(x))
        x = nn.sigmoid(nn.Dense(6, name="gram_dense")(x.reshape(len(x), -1)))
        read_twice = self.param("read_twice", nn.initializers.normal(1.0), (6, 4))
        return x @ read_twice + jnp.sum(read_twice**2, axis=0)


@pytest.mark.parametrize(
    ("setting", "objective", "rule"),
    [
        ("auto", "cosine", "arithmetic"),  # on this CPU
        ("auto", "l2", None),  # which would lose digits
        ("on", "l2", "memory"),
        ("off", "cosine", None),
    ],
)
def test_which_layers_a_setting_means(setting, objective, rule):
    assert gram.choose_rule(setting, objective) == rule


def test_less_arithmetic_is_less_memory_too():
    sizes = list(
        itertools.product((1, 2, 10, 63, 64, 65, 300), (3, 27, 75, 576, 4608), (2, 10, 64, 512))
    )
    chosen = {name: {s for s in sizes if holds(*s)} for name, holds in gram.RULES.items()}
    assert set() < chosen["arithmetic"] < chosen["memory"]


def test_equals_the_comparison_of_the_gradients():
    """With a weight of its own for each leaf."""
    module = Mixed()
    with jax.enable_x64(True):
        images = jax.random.normal(jax.random.key(0), (3, 2, 4, 4, 3), jnp.float64)
        labels = jnp.array([1, 3])
        variables = module.init(jax.random.key(1), images[0])
        params = jax.tree.map(lambda x: x.astype(jnp.float64), variables["params"])
        loss = client.loss_fn(module, {})
        sent = jax.jit(lambda: client.gradient(loss, params, images[2], labels))()[0]

        leaves, structure = jax.tree.flatten(params)
        weights = structure.unflatten([1 / (i + 1) for i in range(len(leaves))])

        def plain(x):
            return compare(client.gradient(loss, params, x, labels)[0], sent, weights)

        def ours(x):
            return gram.compare_updates(loss, params, x, labels, sent, "memory", weights)[0]

        def attacked(comparison):
            """Values and image gradients of every objective, of two images at once."""

            def both(x):
                return jnp.stack([f(comparison(x)) for f in OBJECTIVES.values()])

            return jax.jit(lambda x: (jax.vmap(both)(x), jax.vmap(jax.jacrev(both))(x)))(images[:2])

        for own, expected in zip(attacked(ours), attacked(plain)):
            scale = np.abs(expected).max(axis=tuple(range(2, expected.ndim)), keepdims=True)
            np.testing.assert_allclose(own / scale, expected / scale, atol=1e-9)

        network = jax.make_jaxpr(loss)(params, images[0], labels)
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        layers = gram.find_layers(network.jaxpr, len(paths), "memory")
        names = [jax.tree_util.keystr(paths[x.leaf], simple=True) for x in layers.values()]
        assert sorted(names) == [f"gram_{x}kernel" for x in ("dense", "strided", "valid")]

        # What is not stored: as many weight gradients fewer.
        def count(f):
            return str(jax.make_jaxpr(f)(images[0])).count("trilinear_wgrad")

        assert count(ours) == count(plain) - 2
