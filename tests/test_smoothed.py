"""Smoothed Gauss-Newton: the kinks it rounds off, and the attack on small networks."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import client, networks
from jaxinv.attacks import smoothed_gauss_newton as smoothed
from jaxinv.attacks.base import Known
from jaxinv.attacks.smoothed_gauss_newton import SmoothedGaussNewton
from jaxinv.data.image_prior import of_spectrum, unwhiten, whiten
from jaxinv.defenses.base import DefenseKnowledge
from jaxinv.engine import planner, trials
from jaxinv.engine.targets import make_targets, seed_keys
from jaxinv.errors import UserError
from jaxinv.networks import kinks, layers
from jaxinv.networks.imprint import Imprinted
from jaxinv.settings import reader
from jaxinv.types import Normalization, Truth

SHAPE = (6, 6, 1)
NORMALIZATION = Normalization(jnp.full(1, 0.5), jnp.full(1, 0.25))
ATTACK = SmoothedGaussNewton(draws=8, cg_iterations=10)
SETTINGS = {"inflation": 50.0, "client_lr": 1.0, "iterations": 20}


class Small(nn.Module):
    """A convolution, a pool and two dense layers, each kink through the hook."""

    shift: float = 0.0  # of what goes into the ReLUs: far from 0 they are all open
    pool: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        x = kinks.relu(nn.Conv(16, (3, 3))(x) + self.shift)
        x = layers.max_pool(x, 2) if self.pool else x
        x = kinks.relu(nn.Dense(64)(layers.flatten(x)) + self.shift)
        return nn.Dense(3)(x)


class OfItsOwn(nn.Module):
    """Calls Flax's ReLU itself."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(layers.flatten(x))))


class Scene:
    """Two targets of one image each, of a network."""

    def __init__(self, module):
        self.module = module
        row = 2.0 ** -np.arange(SHAPE[0])
        spectrum = 10 * np.multiply.outer(row, row)[..., None, None]
        self.prior = of_spectrum(np.zeros(SHAPE), spectrum)
        self.prior = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), self.prior)
        self.variables = module.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
        drawn = jax.random.normal(jax.random.key(1), (2, 1, *SHAPE))
        images = NORMALIZATION.pixels(jax.vmap(lambda z: unwhiten(self.prior, z))(drawn))
        self.truths = Truth(images, jnp.array([[0], [2]]))
        self.targets = make_targets(module, self.variables, self.truths, NORMALIZATION).targets

    def problem(self, rows=slice(None)):
        own = jax.tree.map(lambda x: x[rows], (self.targets, self.truths))
        return trials.Problem(self.module, SHAPE, self.variables, *own, NORMALIZATION, self.prior)

    def run(self, rows=slice(None), seeds=2, group=2):
        keys = seed_keys([0, 1], range(2))[rows, :seeds]
        numbers = ATTACK.numbers(seeds, SETTINGS)
        plan = planner.GroupPlan(1, group, 1)
        return trials.run(
            self.problem(rows), ATTACK, numbers, keys, trials.Resources(plan, math.inf)
        )


@pytest.fixture(scope="module")
def scene():
    return Scene(Small())


@pytest.fixture(scope="module")
def found(scene):
    return scene.run()


def test_a_smoothed_kink_is_the_mean_over_the_noise(rng_numpy):
    x = jnp.linspace(-3, 3, 7)
    spread = jnp.linspace(0.2, 2, 7)
    noisy = x + spread * rng_numpy.standard_normal((200_000, 7)).astype(np.float32)
    with kinks.smoothing([spread]):
        np.testing.assert_allclose(kinks.relu(x), jax.nn.relu(noisy).mean(axis=0), atol=0.01)
    with kinks.smoothing([spread, spread]):
        np.testing.assert_allclose(kinks.relu6(x), jax.nn.relu6(noisy).mean(axis=0), atol=0.01)
    with kinks.smoothing([spread]):
        mean = jnp.maximum(noisy, 0.5).mean(axis=0)
        np.testing.assert_allclose(kinks.larger(x, jnp.full(7, 0.5)), mean, atol=0.01)


def test_the_derivatives_of_a_smoothed_kink_are_those_of_its_formula():
    x, spread = jnp.linspace(-3, 3, 13), 0.7

    def formula(x):
        return x * jax.scipy.stats.norm.cdf(x / spread) + spread * jax.scipy.stats.norm.pdf(
            x / spread
        )

    def own(x):
        return kinks.smooth_relu(x, jnp.float32(spread))

    for plain, written in ((formula, own), (jax.grad(formula), jax.grad(own))):
        np.testing.assert_allclose(
            jax.vmap(jax.grad(plain))(x), jax.vmap(jax.grad(written))(x), atol=1e-5
        )


def test_what_is_recorded_and_what_is_not_leaves_every_bit():
    x = jnp.asarray(np.random.default_rng(0).normal(0, 4, (2, 6, 6, 3)), jnp.float32)
    x = x.at[0, :2, :2].set(0.0).at[1, 0, 0].set(6.0)  # ties, and inputs on the kinks

    def plain(x):
        tiles = x.reshape(2, 3, 2, 3, 2, 3)
        tall = jnp.where(tiles[:, :, 0] >= tiles[:, :, 1], tiles[:, :, 0], tiles[:, :, 1])
        pooled = jnp.where(tall[:, :, :, 0] >= tall[:, :, :, 1], tall[:, :, :, 0], tall[:, :, :, 1])
        return jnp.sin(nn.relu(x)).sum() + jnp.sin(nn.relu6(x)).sum() + jnp.sin(pooled).sum()

    def hooked(x):
        values = kinks.relu(x), kinks.relu6(x), layers.max_pool(x, 2)
        return sum(jnp.sin(v).sum() for v in values)

    def recorded(x):
        with kinks.recording() as inputs:
            value = hooked(x)
        assert [d.shape for d in inputs] == [x.shape] * 3 + [(2, 3, 3, 2, 3), (2, 3, 3, 3)]
        return value

    expected = jax.jit(jax.value_and_grad(plain))(x)
    for function in (hooked, recorded, hooked):
        got = jax.jit(jax.value_and_grad(function))(x)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    np.testing.assert_array_equal(layers.max_pool(x, 2), nn.max_pool(x, (2, 2), strides=(2, 2)))


def test_contexts_nest_and_end_with_an_error():
    x = jnp.array([0.0])
    with kinks.recording() as inputs:
        with pytest.raises(StopIteration), kinks.smoothing([]):
            kinks.relu(x)
        assert kinks.relu(x) == 0
    assert len(inputs) == 1
    assert kinks.relu(x) == 0


def test_where_all_kinks_are_open_a_step_is_one_of_gauss_newton():
    """J is then the network's own, to the last digits, and v what curvature leaves."""
    scene = Scene(Small(shift=30.0, pool=False))
    problem = scene.problem()
    target = jax.tree.map(lambda x: x[0], problem.targets)
    loss = client.loss_fn(scene.module, scene.variables)
    known = Known(loss, scene.variables["params"], target, NORMALIZATION, scene.prior)
    truth = NORMALIZATION.normalize(scene.truths.images[0])
    numbers = jax.tree.map(jnp.float32, ATTACK.numbers(1, SETTINGS))
    numbers = jax.tree.map(lambda x: x[0] if x.ndim else x, numbers)
    narrow = 0.05
    z = whiten(scene.prior, truth)
    off = z + narrow * jax.random.normal(jax.random.key(3), z.shape)
    state = ATTACK.init(numbers, jax.random.key(2), truth.shape, known)
    state = state._replace(
        candidate=state.candidate._replace(images=unwhiten(scene.prior, off)),
        spread=jnp.full(z.shape, narrow),
    )
    moved, losses = jax.jit(lambda s: ATTACK.step(numbers, known, jnp.int32(0), s))(state)
    after, _ = jax.jit(lambda s: ATTACK.step(numbers, known, jnp.int32(99), s))(moved)
    jax.tree.map(np.testing.assert_array_equal, after.candidate, moved.candidate)

    def distance(s):
        return jnp.linalg.norm(s.candidate.images - truth)

    assert distance(moved) < 0.5 * distance(state)
    assert losses.objective > 0
    assert (moved.spread <= narrow).all()


def test_the_attack_finds_the_images(found):
    """Of a network with kinks, from the prior's mean; and the spread ends where it can."""
    first, last = found.trace.objective[0], found.trace.objective[-1]
    assert (last < 0.01 * first).all()
    assert (found.scores.psnr > found.trace.psnr[0] + 15).all()


def test_a_trial_does_not_depend_on_its_neighbors_and_repeats(scene, found):
    alone = scene.run(rows=slice(1, 2), seeds=1, group=1)
    np.testing.assert_allclose(alone.pixels[0, 0], found.pixels[1, 0], atol=5e-3)
    again = scene.run()
    np.testing.assert_array_equal(again.pixels, found.pixels)
    assert not np.array_equal(found.pixels[:, 0], found.pixels[:, 1])  # seeds draw their own


def test_noise_bounds_the_weights(scene):
    """Where it is known; and where a residual is there that the draws do not scatter by."""
    target = jax.tree.map(lambda x: x[0], scene.targets)
    variance = jax.tree.map(lambda x: jnp.float32(0.25), target.update)
    target = target._replace(defense_knowledge=DefenseKnowledge((), variance, ()))
    known = Known(None, None, target, NORMALIZATION, scene.prior)
    numbers = smoothed.Numbers(jnp.float32(50), jnp.float32(1), 1)

    def weights(defense, off):
        """All of them, where the draws' updates are all alike, and off the shared one."""
        mean = jax.tree.map(lambda x: x + off, (target.update, ()))
        seen = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), mean)
        attack, none = ATTACK.replace(defense=defense), jax.tree.map(jnp.zeros_like, seen)
        found = attack.weights(numbers, known, seen, mean, none)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)])

    np.testing.assert_allclose(weights(("noise",), 0.0), 4, rtol=1e-3)
    np.testing.assert_allclose(weights((), 0.5), 4, rtol=1e-3)
    assert weights((), 0.0).min() > 1e3


def test_an_imprint_has_kinks_of_its_own():
    """In front of a network that has none."""
    module = Imprinted(networks.build("lenet_zhu", classes=3), bins=4)
    with kinks.recording() as seen:
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert [x.shape for x in seen] == [(1, 4)]


def test_a_network_without_recorded_kinks_is_named():
    scene = Scene(OfItsOwn())
    with pytest.raises(UserError, match=r"--attack smoothed_bayes: .*use --attack bayes"):
        scene.run()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "of networks with ReLUs, not lenet_zhu"),
        ({"model": "convnet", "labels": "joint"}, "smoothed_bayes takes labels as given"),
        ({"model": "convnet", "client_epochs": "2"}, "of one gradient"),
        ({"model": "convnet", "posterior": "8"}, "--posterior: --attack smoothed_bayes"),
        ({"model": "convnet", "anneal_from": "8"}, "--anneal-from: --attack smoothed_bayes"),
        ({"model": "convnet", "draws": "7"}, "--draws"),
        ({"model": "convnet", "init": "normal"}, "smoothed_bayes does not begin so"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        reader.load_study(None, {"attack": "smoothed_bayes", **flags})


@pytest.mark.parametrize(
    "more",
    [{"client_epochs": "2"}, {"labels": "joint"}, {"defense": "dpsgd:1:1", "adaptive": "true"}],
)
def test_bayes_meets_kinks_where_no_smoothed_attack_does(more):
    (cell,) = reader.load_study(None, {"attack": "bayes", "model": "convnet_gn", **more}).cells
    assert cell.has_kinks()


def test_settings_of_one_attack_are_no_other_ones():
    cell = reader.load_study(None, {"attack": "smoothed_bayes", "model": "convnet"}).cells[0]
    assert isinstance(cell.make_attack(10, ()), SmoothedGaussNewton)
    assert (cell.iterations, cell.cg_iterations, cell.posterior) == (24, 30, 0)
    for attack in ("bayes", "geiping"):
        with pytest.raises(UserError, match="--draws"):
            reader.load_study(None, {"attack": attack, "draws": "8"})
