"""Rules that read labels off an update: on gradients made by hand, and on networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import client
from jaxinv.attacks import labels

CLASSES, FEATURES = 5, 12


def last_layer(truth, spread=0.0, scale=1.0):
    """The last layer of a network that sees features around 1, and its gradient for a batch."""
    random = np.random.default_rng(0)
    kernel = 0.05 * random.normal(size=(FEATURES, CLASSES))
    features = 1 + spread * random.normal(size=(len(truth), FEATURES))
    softmax = np.array(jax.nn.softmax(features @ kernel))
    of_logits = softmax - np.eye(CLASSES)[truth]
    return labels.LastLayer(
        jnp.asarray(kernel),
        jnp.zeros(CLASSES),
        jnp.asarray(scale * of_logits.T @ features),
        jnp.asarray(scale * of_logits.sum(axis=0)),
        jnp.asarray(spread * random.normal(size=(20, FEATURES))),
    )


@pytest.mark.parametrize("rule", ["llg", "ilrg", "counts"])
@pytest.mark.parametrize("truth", [[3], [0, 0, 0, 4], [1, 2, 2, 3, 3, 3, 3, 0, 4, 4, 4, 4]])
def test_counts_labels_with_repeats_and_more_images_than_classes(rule, truth):
    if rule == "llg" and len(truth) > CLASSES:
        pytest.skip("its estimate of one image's impact is too rough for that")
    layer = last_layer(np.array(truth), spread=0.02, scale=1 / len(truth))
    found = jax.jit(labels.LABELS[rule].count, static_argnums=1)(layer, len(truth))
    np.testing.assert_array_equal(found, np.bincount(truth, minlength=CLASSES))


def test_llg_does_not_see_the_scale():
    truth = np.array([0, 0, 2, 4, 4])
    found, expected = (labels.llg(last_layer(truth, scale=s), 5) for s in (1e-4, 1.0))
    np.testing.assert_array_equal(found, expected)


def test_apportion_keeps_the_sum_and_gives_to_the_largest_remainders():
    assert labels.apportion(jnp.array([1.4, 2.7, -0.3, 0.9]), 5).tolist() == [1, 3, 0, 1]


class Net(nn.Module):
    bias: bool

    @nn.compact
    def __call__(self, x):
        x = nn.sigmoid(nn.Conv(6, (3, 3), strides=2)(x))
        return nn.Dense(CLASSES, use_bias=self.bias)(x.reshape(len(x), -1))


@pytest.mark.parametrize("bias", [True, False])
def test_reads_a_batch_off_the_update_of_a_network_and_of_its_local_steps(bias):
    module, truth = Net(bias), jnp.array([4, 1, 1, 0])
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    variables = module.init(jax.random.key(0), images)
    local = client.Local(2, 2)

    @jax.jit
    def found():
        loss = client.loss_fn(module, variables)
        sent = client.update(loss, variables["params"], images, truth, local, 1e-3)[0]
        return labels.infer("counts", module, variables, sent, (8, 8, 3), 4, local.steps(4))

    assert found().tolist() == [0, 1, 1, 4]


def test_noise_looks_like_photographs():
    """Neighbors are alike, and the frequencies fall as one over themselves."""
    images = np.asarray(labels.natural_noise(jax.random.key(0), (64, 32, 32, 3)))
    left, right = images[:, :, :-1].ravel(), images[:, :, 1:].ravel()
    assert np.corrcoef(left, right)[0, 1] > 0.7
    power = np.abs(np.fft.fft(images, axis=2)).mean(axis=(0, 1, 3))
    assert power[1] > 2 * power[4] > 4 * power[15]


def test_the_fit_is_generalized_least_squares():
    """Against the covariance of the gradient's entries written out, and inverted as it is."""
    with jax.enable_x64(True):
        layer = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64), last_layer(np.array([0, 2, 2, 4]), spread=0.3)
        )
        means = 1 + 0.2 * np.random.default_rng(1).normal(size=(CLASSES, FEATURES))
        normal, slope = labels._fit(layer, jnp.asarray(means))
        unit = np.sqrt(np.sum(means.mean(0) ** 2) + np.mean(np.sum(layer.dummies**2, axis=1)))
        expected, scatter = [], []
        for label, mean in enumerate(means):
            features = mean + np.asarray(layer.dummies)
            errors = np.asarray(jax.nn.softmax(features @ layer.kernel)) - np.eye(CLASSES)[label]
            inputs = np.c_[np.ones(len(features)), features / unit]
            entries = np.einsum("dc,df->dcf", errors, inputs).reshape(len(features), -1)
            expected.append(entries.mean(0))
            scatter.append(entries - entries.mean(0))
        expected, scatter = np.stack(expected), np.concatenate(scatter)
        covariance = scatter.T @ scatter / len(scatter)
        noise = labels.NOISE * np.trace(covariance) / len(scatter)
        inverse = np.linalg.inv(covariance + noise * np.eye(len(covariance)))
        shared = np.c_[layer.bias_gradient, layer.kernel_gradient / unit].ravel()
        np.testing.assert_allclose(normal, expected @ inverse @ expected.T, rtol=1e-6)
        np.testing.assert_allclose(slope, expected @ inverse @ shared, rtol=1e-6)
