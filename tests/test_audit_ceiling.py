"""The ceiling: exact where the update is linear in the images, and met by the posterior's mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import client
from jaxinv.audit import ceiling as ceil
from jaxinv.data import image_prior
from jaxinv.victim.untrained import untrained

SIDE = 4
NOISE = 0.05
STD = np.array([0.5, 0.25])


def prior_of(side, dtype=jnp.float64):
    """Correlated, of two channels."""
    u, v = np.mgrid[0:side, 0:side]
    power = 4 / (1 + u + v) ** 2
    covariance = power[..., None, None] * np.array([[1.0, 0.6], [0.6, 1.0]])
    mean = np.full((side, side, 2), 0.5)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), image_prior.of_spectrum(mean, covariance))


def linear_update(images):
    """The gradient of <parameters, A x>: A x, on two leaves."""
    flat = images.reshape(len(images), -1)
    size = flat.shape[1]
    matrix = np.random.default_rng(0).normal(size=(20, size))

    def loss(p, x, y):
        return ((p["a"] @ (matrix[:12] @ x) + p["b"] @ (matrix[12:] @ x)).mean(), ())

    params = {"a": jnp.zeros(12), "b": jnp.zeros(8)}
    return client.gradient(loss, params, flat.sum(axis=0)[:, None][:, 0], None)[0], matrix


def dense_covariance(prior, matrix, variances):
    """S of the pixels and the posterior's covariance, by textbook."""
    size = prior.mean.size
    basis = np.asarray(
        image_prior.synthesize(prior, jnp.eye(size).reshape(size, *prior.mean.shape))
    ).reshape(size, size)
    cov = basis.T * np.asarray(prior.variances).ravel() @ basis
    precision = np.linalg.inv(cov) + matrix.T @ (matrix / variances[:, None])
    return cov, np.linalg.inv(precision)


@pytest.fixture
def linear():
    with jax.enable_x64(True):
        prior = prior_of(SIDE)
        images = prior.mean[None] + 0.1
        variances = {"a": jnp.float64(NOISE), "b": jnp.float64(4 * NOISE)}
        _, matrix = linear_update(images)
        noise = np.repeat([NOISE, 4 * NOISE], [12, 8])
        yield prior, images, variances, matrix, noise


def test_exact_on_a_linear_model(linear):
    prior, images, variances, matrix, noise = linear

    def update_of(x):
        return linear_update(x)[0]

    found = ceil.ceiling(update_of, images, prior, variances, STD)
    cov, posterior = dense_covariance(prior, matrix, noise)
    scale = np.tile(STD, SIDE * SIDE)
    np.testing.assert_allclose(
        found.spread[0].ravel(), scale * np.sqrt(np.diagonal(posterior)), rtol=1e-8
    )
    assert found.mse[0] == pytest.approx((scale**2 * np.diagonal(posterior)).mean(), rel=1e-8)
    assert found.prior_mse[0] == pytest.approx((scale**2 * np.diagonal(cov)).mean(), rel=1e-8)
    assert found.psnr[0] == pytest.approx(-10 * np.log10(found.mse[0]))
    assert found.dense
    assert found.probe_error == 0


def test_the_posterior_mean_attains_it_and_nothing_else_does(linear):
    """4,000 images drawn from the prior, each estimated from its noisy update."""
    prior, images, variances, matrix, noise = linear
    found = ceil.ceiling(lambda x: linear_update(x)[0], images, prior, variances, STD)
    cov, posterior = dense_covariance(prior, matrix, noise)
    random = np.random.default_rng(1)
    count, size = 4000, len(cov)
    x = random.multivariate_normal(np.zeros(size), cov, count)
    u = x @ matrix.T + random.normal(size=(count, 20)) * np.sqrt(noise)
    estimate = (u / noise) @ matrix @ posterior
    scale = np.tile(STD, SIDE * SIDE)
    errors = np.square(scale * (estimate - x)).mean(axis=1)
    assert errors.mean() == pytest.approx(found.mse[0], abs=4 * errors.std() / count**0.5)
    # Another ridge, as of an attacker who takes the noise for a hundred times what it is.
    wrong = np.linalg.inv(np.linalg.inv(cov) + 0.01 * matrix.T @ (matrix / noise[:, None]))
    worse = np.square(scale * (0.01 * (u / noise) @ matrix @ wrong - x)).mean()
    assert worse > 1.1 * found.mse[0]


def test_probes_agree_with_the_matrix(linear):
    prior, images, variances, *_ = linear

    def update_of(x):
        return linear_update(x)[0]

    dense = ceil.ceiling(update_of, images, prior, variances, STD)
    probed = ceil.ceiling(update_of, images, prior, variances, STD, dense=False)
    assert not probed.dense
    assert probed.mse.mean() == pytest.approx(
        dense.mse.mean(), abs=5 * probed.probe_error * dense.mse.mean()
    )
    assert 0 < probed.probe_error < 0.3


def test_a_curve_is_the_ceiling_at_every_variance(linear):
    prior, images, *_ = linear

    def update_of(x):
        return linear_update(x)[0]

    curve = ceil.curve(update_of, images, prior, STD)
    for variance in (1e-3, 0.05, 20.0):
        same = {"a": jnp.float64(variance), "b": jnp.float64(variance)}
        found = ceil.ceiling(update_of, images, prior, same, STD)
        assert curve.psnr(variance) == pytest.approx(found.psnr[0], abs=1e-6)
    assert curve.psnr(np.inf) == pytest.approx(found.prior_psnr[0], abs=1e-6)


def test_a_curve_never_falls_for_what_an_attacker_is_told(linear):
    prior, images, *_ = linear
    counts = (1, 17, images.size - 1, images.size)
    curves = [ceil.curve(_linear_only, images, prior, STD, most=most) for most in counts]
    assert tuple(len(curve.seen) for curve in curves) == counts
    for variance in (1e-3, 0.05, 20.0):
        found = [curve.psnr(variance) for curve in curves]
        assert found == sorted(found, reverse=True)


def test_a_curve_knows_what_its_own_image_costs(linear):
    """The posterior mean's error at one image, by textbook; on average it is the ceiling."""
    prior, images, _, matrix, _ = linear
    size, variance = images.size, 0.05
    cov, posterior = dense_covariance(prior, matrix, np.full(len(matrix), variance))
    scale = np.tile(STD, SIDE * SIDE)
    gain = posterior @ matrix.T / variance
    noise = np.square(scale[:, None] * gain).sum() * variance
    random = np.random.default_rng(4)
    errors = []
    for row in random.multivariate_normal(np.zeros(size), cov, 40):
        own = prior.mean + row.reshape(prior.mean.shape)
        curve = ceil.curve(_linear_only, own[None], prior, STD)
        bias = scale * ((gain @ matrix - np.eye(size)) @ row)
        expected = -10 * np.log10((np.square(bias).sum() + noise) / size)
        assert curve.psnr_here(variance) == pytest.approx(expected, abs=1e-6)
        errors.append(10 ** (-curve.psnr_here(variance) / 10))
    ceiling = 10 ** (-curve.psnr(variance) / 10)
    assert np.mean(errors) == pytest.approx(ceiling, abs=4 * np.std(errors) / 40**0.5)


def test_a_curve_tells_when_the_contrast_of_an_image_is_divided_away(linear):
    prior, images, *_ = linear

    def update_of(x):
        left = x - prior.mean
        return {"a": left / jnp.linalg.norm(left)}

    assert ceil.curve(update_of, images, prior, STD).itself == pytest.approx(0, abs=1e-6)
    assert ceil.curve(_linear_only, images, prior, STD).itself > 0.1


def _linear_only(x):
    return linear_update(x)[0]


def test_rank_bound_is_met_where_the_rest_is_all_that_is_left(linear):
    """An update that tells the r coefficients of most variance exactly, and nothing else."""
    prior, images, *_ = linear
    size, rank = images.size, 20
    basis = image_prior.synthesize(prior, jnp.eye(size).reshape(size, *prior.mean.shape))
    variances = np.broadcast_to(prior.variances, prior.mean.shape).ravel()
    told = np.asarray(basis).reshape(size, -1)[np.argsort(-variances)[:rank]]

    def update_of(x):
        return {"a": told @ x.ravel()}

    found = ceil.ceiling(update_of, images, prior, {"a": jnp.float64(1e-12)}, np.ones(2))
    bound = ceil.rank_bound(prior, np.ones(2), 1, rank)
    assert found.mse[0] == pytest.approx(bound, rel=1e-6)
    # Any other update of that rank leaves more.
    other = np.random.default_rng(3).normal(size=told.shape)
    found = ceil.ceiling(
        lambda x: {"a": other @ x.ravel()}, images, prior, {"a": jnp.float64(1e-12)}, np.ones(2)
    )
    assert found.mse[0] > bound
    assert ceil.rank_bound(prior, np.ones(2), 1, size) == 0


def test_probes_that_were_stopped_early_say_so(linear, monkeypatch):
    prior, images, variances, *_ = linear

    def update_of(x):
        return linear_update(x)[0]

    assert ceil.ceiling(update_of, images, prior, variances, STD, dense=False).solved
    monkeypatch.setattr(ceil, "CG_ITERATIONS", 2)
    # Another function, for which a program is compiled anew.
    found = ceil.ceiling(lambda x: update_of(x), images, prior, variances, STD, dense=False)
    assert not found.solved


def test_a_leaf_that_tells_nothing_is_left_out(linear):
    prior, images, variances, matrix, noise = linear

    def update_of(x):
        return linear_update(x)[0]

    found = ceil.ceiling(update_of, images, prior, variances | {"b": jnp.inf}, STD)
    _, posterior = dense_covariance(prior, matrix[:12], noise[:12])
    scale = np.tile(STD, SIDE * SIDE)
    assert found.mse[0] == pytest.approx((scale**2 * np.diagonal(posterior)).mean(), rel=1e-8)


def test_more_noise_lowers_it_to_the_prior():
    """On a network: monotone in the noise, the prior's PSNR at the end."""
    with jax.enable_x64(True):
        victim = untrained("lenet_zhu", classes=10, width=None, seed=0, image_shape=(8, 8, 3))
        u, v = np.mgrid[0:8, 0:8]
        covariance = (2 / (1 + u + v) ** 2)[..., None, None] * np.eye(3)
        prior = image_prior.of_spectrum(np.zeros((8, 8, 3)), covariance)
        prior = jax.tree.map(jnp.float64, prior)
        params = jax.tree.map(jnp.float64, victim.variables["params"])
        loss = client.loss_fn(victim.module, victim.variables)
        labels = jnp.array([3])
        images = 0.3 * jax.random.normal(jax.random.key(0), (1, 8, 8, 3), jnp.float64)
        update_of = jax.jit(lambda x: client.gradient(loss, params, x, labels)[0])
        update = update_of(images)
        psnr = []
        for noise in (0.0, 1e-4, 1e-2, 1.0, 1e6):
            known = jax.tree.map(lambda x: jnp.full((), noise, x.dtype), update)
            variances = ceil.noise_variances(update, known)
            found = ceil.ceiling(update_of, images, prior, variances, np.full(3, 0.25))
            psnr.append(found.psnr[0])
        assert (np.diff(psnr) < 0).all()
        assert psnr[-1] == pytest.approx(found.prior_psnr[0], abs=0.01)
        assert psnr[0] > 60
