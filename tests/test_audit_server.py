"""A malicious server's closed forms, and what the client sees of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import client
from jaxinv.audit import server
from jaxinv.victim.untrained import untrained

SHAPE = (8, 8, 3)


@pytest.fixture(scope="module")
def scene():
    victim = untrained("lenet_zhu", classes=10, width=None, seed=0, image_shape=SHAPE)
    random = np.random.default_rng(0)
    images = random.normal(size=(24, *SHAPE)) + 0.7 * random.normal(size=(24, 1, 1, 1))
    labels = jnp.arange(24) % 10
    loss = client.loss_fn(victim.module, victim.variables)
    return loss, victim.variables["params"], jnp.asarray(images, jnp.float32), labels


def test_an_imprint_gives_every_image_alone_in_its_bin(scene):
    loss, params, images, labels = scene
    means = np.asarray(images).reshape(24, -1).mean(axis=1)
    layer = server.imprint(192, 32, float(means.mean()), float(means.std()))
    malicious = server.imprinted(loss)
    update, _ = jax.jit(lambda p: client.gradient(malicious, p, images, labels))((layer, params))
    found = server.read(update[0])
    bins = np.searchsorted(-np.asarray(layer.bias), means) - 1
    alone = [i for i in range(24) if (bins == bins[i]).sum() == 1]
    assert 5 < len(alone) < 24
    flat = np.asarray(images).reshape(24, -1)
    for i in alone:
        assert np.abs(found.images[bins[i]] - flat[i]).max() < 0.02
    shared = [i for i in range(24) if i not in alone]
    for i in shared:
        assert np.abs(found.images[bins[i]] - flat[i]).max() > 0.05
    assert (found.weights != 0).sum() == len(set(bins))


@pytest.mark.parametrize(("images", "bins"), [(64, 128), (8, 8)])
def test_expected_number_alone(images, bins):
    """Uniform bins, 4,000 draws; 39 of 64 in 128 bins."""
    random = np.random.default_rng(1)
    counts = [
        (np.bincount(random.integers(0, bins, images), minlength=bins) == 1).sum()
        for _ in range(4000)
    ]
    error = np.std(counts) / 4000**0.5
    assert server.expected_alone(images, bins) == pytest.approx(np.mean(counts), abs=4 * error)


def test_fishing_leaves_one_class(scene):
    """In front of the last layer the batch's gradient is that of the one image fished for."""
    loss, params, images, _ = scene
    labels = jnp.array([3, 0, 1, 2, 4, 5, 6, 7], jnp.int32)
    kernel, bias = server.fish_class(params["Dense_0"]["kernel"], params["Dense_0"]["bias"], 3)
    fished = {**params, "Dense_0": {"kernel": kernel, "bias": bias}}
    batch, _ = client.gradient(loss, fished, images[:8], labels)
    alone, _ = client.gradient(loss, fished, images[:1], labels[:1])
    for name in ("Conv_0", "Conv_1", "Conv_2"):
        np.testing.assert_allclose(
            8 * batch[name]["kernel"], alone[name]["kernel"], rtol=1e-4, atol=1e-7
        )
    seen = server.inspect(loss, fished, images[:8], labels)
    assert "Conv_0/kernel" in seen.dominated
    honest = server.inspect(loss, params, images[:8], labels)
    assert not honest.dominated
    assert max(honest.d_snr.values()) < 1


def test_a_client_sees_an_imprint(scene):
    loss, params, images, labels = scene
    layer = server.imprint(192, 32, 0.0, 1.0)
    seen = server.inspect(server.imprinted(loss), (layer, params), images[:6], labels[:6])
    assert seen.parallel == 1
    assert server.inspect(loss, params, images[:6], labels[:6]).parallel == 0


def test_d_snr_by_hand():
    assert server.d_snr(np.array([6.0, 1, 2])) == 2
    assert server.d_snr(np.array([3.0])) == np.inf
    assert np.isnan(server.d_snr(np.zeros(3)))


def test_uniqueness_by_hand():
    """Orthogonal: 1. At 60 degrees: sin 60. A sum of the others, or nothing: 0."""
    rows = np.array([[1.0, 0, 0], [0, 2, 0]])
    assert server.uniqueness(rows @ rows.T) == pytest.approx([1, 1])
    rows = np.array([[1.0, 0], [0.5, 3**0.5 / 2]])
    assert server.uniqueness(rows @ rows.T) == pytest.approx([3**0.5 / 2] * 2)
    rows = np.array([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]])
    assert server.uniqueness(rows @ rows.T) == pytest.approx([0, 0, 0, 1, 0], abs=1e-6)
