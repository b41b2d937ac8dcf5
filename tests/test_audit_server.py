"""A malicious server's closed forms, and what the client sees of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import client
from jaxinv.attacks.closed_form import Given
from jaxinv.attacks.imprint import attack, read
from jaxinv.audit import games, measuring, server
from jaxinv.networks.imprint import LAYER, expected_alone, imprinted
from jaxinv.networks.inspect import classifier_features, find_classifier
from jaxinv.types import Normalization, Target
from jaxinv.victim.untrained import untrained

SHAPE = (8, 8, 3)


@pytest.fixture(scope="module")
def scene():
    victim = untrained("lenet_zhu", classes=10, width=None, seed=0, image_shape=SHAPE)
    random = np.random.default_rng(0)
    images = random.normal(size=(24, *SHAPE)) + 0.7 * random.normal(size=(24, 1, 1, 1))
    labels = jnp.arange(24) % 10
    loss = client.loss_fn(victim.module, victim.variables)
    return victim, loss, victim.variables["params"], jnp.asarray(images, jnp.float32), labels


def test_an_imprint_gives_every_image_alone_in_its_bin(scene):
    victim, _, _, images, labels = scene
    means = np.asarray(images).reshape(24, -1).mean(axis=1)
    others = np.random.default_rng(1).normal(means.mean(), means.std(), 1000)
    module, variables = imprinted(victim.module, victim.variables, SHAPE, 32, others)
    loss = client.loss_fn(module, variables)
    take = jax.jit(lambda p: client.gradient(loss, p, images, labels))
    found = read(take(variables["params"])[0]["imprint"])
    bins = np.searchsorted(-np.asarray(variables["params"]["imprint"]["bias"]), means) - 1
    alone = [i for i in range(24) if (bins == bins[i]).sum() == 1]
    assert 5 < len(alone) < 24
    flat = np.asarray(images).reshape(24, -1)
    for i in alone:
        assert np.abs(found.images[bins[i]] - flat[i]).max() < 0.02
    shared = [i for i in range(24) if i not in alone]
    for i in shared:
        assert np.abs(found.images[bins[i]] - flat[i]).max() > 0.05
    assert (found.weights != 0).sum() == len(set(bins))


@pytest.mark.parametrize(
    ("defense", "amplify", "read_back"),
    [("none", 1, True), ("noise:1", 1, False), ("noise:1", 1e9, True)],
)
def test_a_malicious_server_reads_as_many_as_expected(defense, amplify, read_back):
    """Brightness normal over images, as the bins assume: B (1 - 1/k)^(B - 1) of them, or none.

    With an amplified last layer nine in ten: one in ten images is classified rightly, without a
    gradient.
    """
    victim = untrained("lenet_zhu", classes=10, width=None, seed=0, image_shape=SHAPE)
    random = np.random.default_rng(2)
    images = random.normal(size=(400, *SHAPE)) + random.normal(size=(400, 1, 1, 1))
    labels = (np.arange(400) % 10).astype(np.int32)
    network = games.network(
        victim.module, victim.variables, Normalization.of((0.5,) * 3, (0.25,) * 3)
    )
    candidates = measuring.Candidates(np.float32(images), labels)
    found = server.play(network, candidates, games.draw(41, 8, 400), defense, 16, amplify)
    assert found.expected == pytest.approx((15 / 16) ** 7)
    assert found.exact.trials == 40
    if read_back:
        assert found.exact.low < found.expected < found.exact.high
        assert abs(found.exact.value - found.expected) < 0.12
    else:
        assert found.exact.value == found.own == 0


@pytest.mark.parametrize(("images", "bins"), [(64, 128), (8, 8)])
def test_expected_number_alone(images, bins):
    """Uniform bins, 4,000 draws; 39 of 64 in 128 bins."""
    random = np.random.default_rng(1)
    counts = [
        (np.bincount(random.integers(0, bins, images), minlength=bins) == 1).sum()
        for _ in range(4000)
    ]
    error = np.std(counts) / 4000**0.5
    assert expected_alone(images, bins) == pytest.approx(np.mean(counts), abs=4 * error)


def test_fishing_leaves_one_class(scene):
    """In front of the last layer the batch's gradient is that of the one image fished for."""
    _, loss, params, images, _ = scene
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


def test_fishing_within_a_class_leaves_what_is_above_the_threshold(scene):
    """8 images of one class: with the edge below the highest of a feature, that image is alone."""
    victim, loss, params, images, _ = scene
    labels = jnp.full(8, 3, jnp.int32)
    place = find_classifier(victim.module, victim.variables, SHAPE)
    features = np.asarray(
        classifier_features(victim.module, victim.variables, images[:8], place), np.float64
    )
    feature = server.most_normal(features)
    second, highest = np.argsort(features[:, feature])[-2:]
    edge = (features[highest, feature] + features[second, feature]) / 2
    layer = params["Dense_0"]["kernel"], params["Dense_0"]["bias"]
    kernel, bias = server.fish_feature(*layer, 3, feature, edge)
    fished = {**params, "Dense_0": {"kernel": kernel, "bias": bias}}
    batch, _ = client.gradient(loss, fished, images[:8], labels)
    alone, _ = client.gradient(loss, fished, images[highest][None], labels[:1])
    for name in ("Conv_0", "Conv_1", "Conv_2"):
        own = np.asarray(alone[name]["kernel"])
        error = np.abs(8 * batch[name]["kernel"] - own).max()
        assert error < 1e-5 * np.abs(own).max()
    ratios = server.d_snrs(loss, fished, images[:8], labels)
    assert all(ratio > 100 for name, ratio in ratios.items() if "Conv" in name)


def test_the_most_normal_feature():
    """Of a normal, a rectified, a constant and a two-valued one."""
    random = np.random.default_rng(0)
    normal = random.normal(size=(400, 2))
    columns = [np.maximum(normal[:, 0], 0), normal[:, 1], np.ones(400), random.integers(0, 2, 400)]
    assert server.most_normal(np.stack(columns, axis=1)) == 1


def test_fishing_by_hand(scene):
    """Of 4 images two share a class: 2 of 4 can be fished for, and come alone."""
    victim, loss, *_, images, labels = scene
    normalization = Normalization.of((0.5,) * 3, (0.25,) * 3)
    network = games.Network(victim.module, victim.variables, normalization, loss)
    candidates = measuring.Candidates(np.asarray(images), np.asarray(labels))
    found = server.fish(network, candidates, np.array([[0, 10, 1, 2]] * 3))
    assert found.alone.value == 0.5
    assert found.cosine == pytest.approx(1, abs=1e-4)


def test_bins_that_all_hold_something_are_no_evidence():
    """Four of four hold an image each, or noise: the update does not say which."""
    kernel = jnp.cumsum(jnp.arange(1.0, 9).reshape(2, 4)[:, ::-1], axis=1)[:, ::-1]
    layer = {"kernel": kernel, "bias": jnp.arange(4.0, 0, -1)}
    for bins, exact in ((4, False), (5, True)):
        more = ((0, 0), (0, bins - 4))
        padded = {"kernel": jnp.pad(kernel, more), "bias": jnp.pad(layer["bias"], more[1])}
        target = Target({LAYER: padded}, jnp.zeros(4, int))
        found = attack(Given(None, None, target, 4, (1, 2, 1), jax.random.key(0)))
        assert (found.exact == exact).all()
        assert found.images.shape == (4, 1, 2, 1)


def test_a_client_sees_an_imprint(scene):
    victim, loss, params, images, labels = scene
    module, variables = imprinted(victim.module, victim.variables, SHAPE, 32, np.linspace(-1, 1))
    malicious = client.loss_fn(module, variables)
    seen = server.inspect(malicious, variables["params"], images[:6], labels[:6])
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
