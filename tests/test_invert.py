"""`jaxinv.invert` on a plain Flax model of somebody else's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxinv
from jaxinv.errors import UserError


class Theirs(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.sigmoid(nn.Conv(6, (3, 3), strides=2)(x))
        return nn.Dense(4)(x.reshape(x.shape[0], -1))


def test_recovers_an_image_and_its_label_from_a_gradient():
    model = Theirs()
    ramp = jnp.linspace(0, 1, 8)
    image = jnp.stack([ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None]], -1)[None]
    variables = jax.jit(model.init)(jax.random.key(0), image)

    @jax.jit
    def gradient(params):
        def loss(params):
            logits = model.apply({"params": params}, image)
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([2])).mean()

        return jax.grad(loss)(params)

    update = gradient(variables["params"])
    found = jaxinv.invert(
        model,
        variables,
        update,
        image_shape=(8, 8, 2),
        seeds=3,
        iterations=200,
        priors={"tv": 1e-3},
    )
    assert found.labels.tolist() == [2]
    assert found.reconstructions.shape == (3, 1, 8, 8, 2)
    assert found.trace_objectives.shape == (len(found.trace_steps), 3)
    psnr = -10 * np.log10(np.mean(np.square(found.best - image)))
    assert psnr > 20
    np.testing.assert_array_equal(found.best, found.reconstructions[found.objectives.argmin()])


def test_an_update_of_another_shape_is_refused():
    params = {"Dense_0": {"kernel": np.zeros((3, 2))}}
    with pytest.raises(UserError, match="names and shapes must be those of variables"):
        jaxinv.invert(Theirs(), {"params": params}, {"other": 1}, image_shape=(8, 8, 2))
    with pytest.raises(UserError, match="seeds=0: must be positive"):
        jaxinv.invert(Theirs(), {"params": params}, params, image_shape=(8, 8, 2), seeds=0)
