"""The networks against their published parameter counts and inits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import models
from jaxinv.errors import UserError
from jaxinv.victims import digest, untrained

# Published counts, 10 classes on 32x32x3.
COUNTS = [
    ("lenet_zhu", None, 15_826),
    ("convnet", 64, 2_904_970),
    ("convnet", 32, 733_642),
    ("convnet", 16, 187_114),
    ("resnet20", 16, 272_474),
    ("resnet20", 64, 4_327_754),
    ("mlp", 1024, 3072 * 1024 + 2 * 1024 * 1024 + 10 * 1024 + 3 * 1024 + 10),
]


@pytest.mark.parametrize(("name", "width", "count"), COUNTS)
def test_parameter_counts(name, width, count):
    module = models.build(name, classes=10, width=width)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


def test_unknown_network_lists_the_known_ones():
    with pytest.raises(UserError, match="lenet_zhu, convnet, resnet20, mlp"):
        models.build("lenet", classes=10)


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
