"""The second-order attack: closed forms on a linear problem, its promises, and its settings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import client
from jaxinv.attacks import gauss_newton as gn
from jaxinv.attacks.base import Candidate, Known
from jaxinv.attacks.uncertainty import Posterior
from jaxinv.data import image_prior
from jaxinv.defenses.base import DefenseKnowledge
from jaxinv.engine import trials
from jaxinv.engine.planner import GroupPlan
from jaxinv.engine.targets import ClientSettings, make_targets, seed_keys
from jaxinv.networks.layers import BATCH_NORM_MOMENTUM
from jaxinv.types import Normalization, Target, Truth

SHAPE = (4, 3, 2)  # of an image
PIXELS, ENTRIES = 24, 40
NUMBERS = {
    "anneal_from": 10.0,
    "anneal_to": 1e-6,
    "damping": 0.0,
    "tolerance": 0.0,
    "client_lr": 1.0,
}


def make_prior(seed=0, shape=SHAPE):
    """A prior of random variances, by the cosine transform."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(*shape, shape[-1]))
    covariance = mixed @ mixed.swapaxes(-1, -2) + 0.1 * np.eye(shape[-1])
    return image_prior.of_spectrum(random.normal(size=shape), covariance)


def dense(prior):
    """The prior's covariance as a matrix."""
    unit = jnp.eye(int(np.prod(prior.mean.shape))).reshape(-1, *prior.mean.shape)
    waves = np.asarray(image_prior.coefficients(prior, unit)).reshape(len(unit), -1)
    return (waves * np.asarray(prior.variances).ravel()) @ waves.T


class Linear:
    """A client whose update is A x + b: the loss is <w, A x + b>, whose gradient in w it is."""

    def __init__(self, variance, seed=1, entries=ENTRIES):
        random = np.random.default_rng(seed)
        self.matrix = random.normal(size=(entries, PIXELS))
        self.offset = random.normal(size=entries)
        self.prior, self.variance = make_prior(), variance
        root = np.linalg.cholesky(dense(self.prior))
        self.truth = np.asarray(self.prior.mean).ravel() + root @ random.normal(size=PIXELS)
        noise = np.sqrt(variance) * random.normal(size=entries)
        self.update = {"w": self.matrix @ self.truth + self.offset + noise}
        self.variables = {"params": {"w": jnp.zeros(entries)}}

    def loss(self, params, images, labels):
        del labels
        return params["w"] @ (self.matrix @ images.reshape(-1) + self.offset)

    def problem(self, updates=None, noise=None):
        """As the loop is given it; the attacker knows the variance of the noise."""
        update = {"w": np.stack([self.update["w"]] if updates is None else updates)}
        count = len(update["w"])
        variance = np.full(count, self.variance if noise is None else noise)
        weights = {"w": np.ones(count)}
        knowledge = DefenseKnowledge(((variance,),), {"w": variance}, weights, ((),))
        target = Target(update, np.zeros((count, 1), np.int32), (), knowledge)
        truths = Truth(np.zeros((count, 1, *SHAPE)), np.zeros((count, 1), np.int32))
        normalization = Normalization(jnp.zeros(2), jnp.ones(2))
        return trials.Problem(
            self.loss, SHAPE, self.variables, target, truths, normalization, self.prior
        )

    def posterior(self, variance=None):
        """Mean and covariance in closed form (Bishop 2006, section 2.3.3)."""
        variance = self.variance if variance is None else variance
        precision = np.linalg.inv(dense(self.prior)) + self.matrix.T @ self.matrix / variance
        covariance = np.linalg.inv(precision)
        mean = np.asarray(self.prior.mean).ravel()
        residual = self.update["w"] - self.offset - self.matrix @ mean
        return mean + covariance @ self.matrix.T @ residual / variance, covariance


ATTACK = gn.GaussNewton(defense=("noise",), cg_iterations=200, any_scale=False)


def run(linear, problem=None, attack=ATTACK, seeds=1, iterations=12, **numbers):
    with jax.enable_x64(True):
        problem = jax.tree.map(
            lambda x: jnp.asarray(
                np.asarray(x), None if np.asarray(x).dtype.kind == "i" else jnp.float64
            ),
            linear.problem() if problem is None else problem,
        )
        settings = NUMBERS | numbers | {"iterations": iterations, "posterior": 4000}
        keys = seed_keys(range(len(problem.targets.labels)), range(seeds))
        own = jax.tree.map(jnp.asarray, attack.numbers(seeds, settings))
        result = trials.run(problem, attack, own, keys, trials.Resources(GroupPlan(1, 1)))
        return result, problem, settings, keys


@pytest.fixture(scope="module")
def linear():
    return Linear(0.3)


@pytest.fixture(scope="module")
def solved(linear):
    return run(linear)


def test_a_linear_problem_gives_the_posterior_mean(linear, solved):
    mean, _ = linear.posterior()
    np.testing.assert_allclose(solved[0].candidates.images.ravel(), mean, atol=1e-4)


def test_draws_have_the_posterior_covariance(linear, solved):
    result, problem, settings, keys = solved
    with jax.enable_x64(True):
        attack = Posterior(attack=ATTACK)
        numbers = jax.tree.map(jnp.asarray, attack.numbers(1, settings))
        found = trials.run(
            problem, attack, numbers, keys, trials.Resources(GroupPlan(1, 1)), result.candidates
        )
    _, covariance = linear.posterior()
    expected = np.sqrt(np.diag(covariance))
    error = np.abs(found.outcome["std"].ravel() / expected - 1)
    assert error.max() < 4 / np.sqrt(2 * 4000)  # standard errors of a standard deviation
    assert error.max() > 1e-6


def test_the_posterior_is_calibrated(linear):
    """The share of pixels within one and two standard deviations, over problems like this one."""
    inside = []
    for seed in range(60):
        other = Linear(0.3, seed)
        mean, covariance = other.posterior()
        inside.append(np.abs(other.truth - mean) / np.sqrt(np.diag(covariance)))
    share = np.mean(np.array(inside) < 1), np.mean(np.array(inside) < 2)
    np.testing.assert_allclose(share, (0.683, 0.954), atol=0.03)


def test_under_infinite_noise_the_prior_is_left(linear):
    result, *_ = run(linear, linear.problem(noise=1e12))
    np.testing.assert_allclose(
        result.candidates.images[0, 0, 0], linear.prior.mean, atol=3 * gn.SYMMETRY_BREAKING
    )


def test_a_layer_that_is_not_to_be_trusted_is_left_out(linear):
    result, *_ = run(linear, linear.problem(noise=np.inf))
    assert np.isfinite(result.candidates.images).all()
    np.testing.assert_allclose(result.candidates.images[0, 0, 0], linear.prior.mean, atol=0.01)


def test_noise_that_nobody_told_of_is_found():
    """Blind: the variance of what is left stands for the noise, so that it is not fitted."""
    noisy = Linear(200.0, entries=4 * PIXELS)

    def distance(x):
        return np.linalg.norm(np.ravel(x) - noisy.truth)

    blind, *_ = run(noisy, attack=ATTACK.replace(defense=()), iterations=40)
    knowing = distance(noisy.posterior()[0])
    fitted = np.linalg.lstsq(noisy.matrix, noisy.update["w"] - noisy.offset, rcond=None)[0]
    assert distance(blind.candidates.images) < 1.2 * knowing
    assert distance(fitted) > 1.4 * knowing


def test_targets_in_a_batch_equal_those_alone(linear, solved):
    update = linear.update["w"]
    both, *_ = run(linear, linear.problem([update[::-1].copy(), update]))
    np.testing.assert_allclose(
        both.candidates.images[1, 0], solved[0].candidates.images[0, 0], atol=1e-3
    )
    assert not np.allclose(both.candidates.images[0], both.candidates.images[1], atol=0.1)


def test_products_are_those_of_the_jacobian(problem):
    """On LeNetZhu, in the prior's coefficients, in float64."""
    with jax.enable_x64(True):

        def wide(tree):
            return jax.tree.map(
                lambda x: jnp.asarray(x, jnp.float64 if x.dtype.kind == "f" else None), tree
            )

        variables, target = wide(problem.victim.variables), wide(problem.targets)
        target = jax.tree.map(lambda x: x[0], target)
        loss = client.loss_fn(problem.victim.module, variables)
        prior = wide(jax.tree.map(np.asarray, make_prior(shape=(8, 8, 3))))
        known = Known(loss, variables["params"], target, problem.normalization, prior)
        attack = gn.GaussNewton()
        own = attack.numbers(1, NUMBERS | {"iterations": 3})
        own = jax.tree.map(lambda x: jnp.asarray(x).ravel()[0], own)
        image = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
        unknowns = gn.to_unknowns(known, Candidate(image, None))

        @jax.jit
        def products():
            def residuals(u):
                return attack.residual_function(own, known)(u)[0]

            linear = gn.linearize(residuals, unknowns)
            direction = gn.random_signs(unknowns)
            pushed = linear.jvp(direction)
            jacobian = jax.jacrev(
                lambda u: jnp.concatenate(
                    [x.ravel() for x in jax.tree.leaves(residuals((u, None)))]
                )
            )(unknowns[0]).reshape(-1, 192)
            flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(pushed)])
            pulled = linear.vjp(pushed)[0].ravel()
            return jacobian, direction[0].ravel(), flat, pulled

        jacobian, direction, pushed, pulled = products()
        np.testing.assert_allclose(pushed, jacobian @ direction, rtol=1e-7, atol=1e-10)
        np.testing.assert_allclose(pulled, jacobian.T @ (jacobian @ direction), rtol=1e-7)


@pytest.fixture(scope="module")
def of_lenet(problem):
    """The attack on LeNetZhu's two 8x8 images of noise, under a prior of about that."""
    flat = image_prior.of_spectrum(
        np.zeros((8, 8, 3)), np.broadcast_to(np.eye(3) * 1.3, (8, 8, 3, 3))
    )
    attack = gn.GaussNewton(cg_iterations=60)
    given = problem.problem(image_prior=jax.tree.map(jnp.float32, flat))
    own = attack.numbers(2, NUMBERS | {"anneal_from": 100.0, "iterations": 16})
    return given, attack, own


def test_lenet_gives_its_images_away(problem, of_lenet):
    given, attack, own = of_lenet
    result = trials.run(given, attack, own, problem.keys[:, :2], trials.Resources(GroupPlan(1, 1)))
    assert result.scores.psnr.min() > 30
    assert (result.objective < 1e-3 * result.trace.objective[0]).all()
    other = given.replace(truths=given.truths._replace(images=1 - given.truths.images))
    again = trials.run(other, attack, own, problem.keys[:, :2], trials.Resources(GroupPlan(1, 1)))
    np.testing.assert_array_equal(again.pixels, result.pixels)  # the truth is for metrics alone


def test_the_scale_of_an_update_does_not_matter(problem, of_lenet):
    """A learning rate, or a clip: both are multiples that nobody has to know."""
    given, attack, own = of_lenet
    scaled = jax.tree.map(lambda x: 0.01 * x, given.targets.update)
    other = given.replace(targets=given.targets._replace(update=scaled))
    result = trials.run(other, attack, own, problem.keys[:, :2], trials.Resources(GroupPlan(1, 1)))
    assert result.scores.psnr.min() > 30


class Normed(nn.Module):
    """A smooth network with BatchNorm, as small as can be."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), strides=2)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=BATCH_NORM_MOMENTUM)(x)
        return nn.Dense(4)(nn.sigmoid(x).reshape(len(x), -1))


@pytest.mark.parametrize("batch_norm", client.BATCH_NORM)
def test_every_batch_norm_protocol_is_met(batch_norm, problem):
    """A batch of two; its statistics, where they are sent, are observed as the update is."""
    module = Normed()
    images = jax.random.uniform(jax.random.key(3), (1, 2, 8, 8, 3))
    variables = jax.jit(module.init)(jax.random.key(0), images[0])
    truths = Truth(images, jnp.array([[0, 2]]))
    clients = ClientSettings(batch_norm=batch_norm)
    targets = make_targets(module, variables, truths, problem.normalization, clients).targets
    assert bool(jax.tree.leaves(targets.statistics)) == (batch_norm == "train-shared")
    prior = jax.tree.map(
        jnp.float32,
        image_prior.of_spectrum(
            np.zeros((8, 8, 3)), np.broadcast_to(np.eye(3) * 1.3, (8, 8, 3, 3))
        ),
    )
    given = trials.Problem(
        module, (8, 8, 3), variables, targets, truths, problem.normalization, prior
    )
    attack = gn.GaussNewton(cg_iterations=20, batch_norm=batch_norm)
    own = attack.numbers(1, NUMBERS | {"iterations": 6})
    keys = seed_keys([0], [0])
    result = trials.run(given, attack, own, keys, trials.Resources(GroupPlan(1, 1)))
    assert result.finite.all()
    assert (result.objective < 0.1 * result.trace.objective[0]).all()


def test_a_wrong_update_gives_nothing_back(problem, of_lenet):
    """Negative control: of another network's gradient no image comes."""
    given, attack, own = of_lenet
    turned = jax.tree.map(lambda x: -x[..., ::-1], given.targets.update)
    wrong = given.replace(targets=given.targets._replace(update=turned))
    result = trials.run(wrong, attack, own, problem.keys[:, :2], trials.Resources(GroupPlan(1, 1)))
    assert np.nanmax(result.scores.psnr) < 15


def test_the_error_of_the_model_falls_from_the_first_number_to_the_last():
    attack = gn.GaussNewton()
    own = attack.numbers(1, NUMBERS | {"iterations": 8})
    own = jax.tree.map(lambda x: jnp.asarray(x).ravel()[0], own)
    errors = np.array([attack.model_error(own, jnp.int32(i)) for i in range(9)])
    np.testing.assert_allclose(errors[[0, 7, 8]], [10, 1e-6, 1e-6], rtol=1e-4)
    np.testing.assert_allclose(errors[1:8] / errors[:7], errors[1] / errors[0], rtol=1e-3)
