"""Clients that take several local steps, and attackers that know less than the client."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import client, metrics
from jaxinv.attacks import gradient_matching as attack
from jaxinv.attacks.base import Candidate, Known
from jaxinv.attacks.objectives import compare, cosine
from jaxinv.attacks.priors import SEEDS, group_distance
from jaxinv.client import Local
from jaxinv.engine import planner, trials
from jaxinv.engine.targets import ClientSettings, make_targets, order_keys, seed_keys
from jaxinv.types import Normalization, Target, Truth

SHAPE = (4, 4, 1)


def loss(params, images, labels):
    """A small network, plain enough to follow by hand."""
    hidden = jax.nn.sigmoid(images.reshape(len(images), -1) @ params["w"] + params["b"])
    logs = jax.nn.log_softmax(hidden @ params["v"])
    return -jnp.mean(jnp.take_along_axis(logs, labels[:, None], axis=1)), ()


@pytest.fixture(scope="module")
def inputs():
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape))

    with jax.enable_x64(True):
        params = {"w": draw(16, 8), "b": draw(8), "v": draw(8, 3)}
        return params, draw(4, *SHAPE), jnp.array([0, 2, 1, 2])


def by_hand(params, images, labels, epochs, batch, rate):
    """The client as a plain loop, from the parameters' difference."""

    now = params
    for _ in range(epochs):
        for i in range(0, len(images), batch):
            slope = jax.grad(loss, has_aux=True)(now, images[i : i + batch], labels[i : i + batch])[
                0
            ]
            now = jax.tree.map(lambda w, g: w - rate * g, now, slope)
    return jax.tree.map(lambda first, last: (first - last) / rate, params, now)


@pytest.mark.parametrize(("epochs", "batch"), [(1, None), (1, 2), (3, 1), (2, None)])
def test_update_is_what_the_local_steps_add_up_to(inputs, epochs, batch):
    with jax.enable_x64(True):
        params, images, labels = inputs
        found = jax.jit(
            lambda: client.update(loss, params, images, labels, Local(epochs, batch), 0.3)[0]
        )()
        expected = by_hand(params, images, labels, epochs, batch or 4, 0.3)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, expected
        )


def test_one_step_is_the_gradient_bit_for_bit(inputs):
    params, images, labels = (*jax.tree.map(jnp.float32, inputs[:2]), inputs[2])
    one = jax.jit(lambda: client.update(loss, params, images, labels, Local(1, 4), 7.0)[0])()
    plain = jax.jit(lambda: client.gradient(loss, params, images, labels)[0])()
    jax.tree.map(np.testing.assert_array_equal, one, plain)


def test_derivative_through_the_local_steps_against_finite_differences(inputs):
    with jax.enable_x64(True):
        params, images, labels = inputs
        local = Local(2, 2)
        sent = client.update(loss, params, images, labels, local, 0.3)[0]
        start, direction = np.random.default_rng(1).normal(size=(2, *images.shape))

        @jax.jit
        def objective(x):
            return cosine(compare(client.update(loss, params, x, labels, local, 0.3)[0], sent))

        slope = float(jnp.sum(jax.jit(jax.grad(objective))(start) * direction))
        h = 1e-6
        difference = (objective(start + h * direction) - objective(start - h * direction)) / (2 * h)
        np.testing.assert_allclose(slope, difference, rtol=1e-6)
        assert abs(float(objective(images))) < 1e-14


@pytest.mark.parametrize("rule", [None, "memory"])
def test_a_surrogate_is_one_gradient_on_the_way(inputs, rule):
    """Two thirds of the way, by hand; and it goes on to where the cosine is larger."""
    with jax.enable_x64(True):
        params, images, labels = inputs
        local = Local(3, 2)
        sent = client.update(loss, params, images, labels, local, 0.3)[0]
        normalization = Normalization(jnp.zeros(1), jnp.ones(1))
        known = Known(loss, params, Target(sent, labels), normalization, None)
        method = attack.Method(simulation="surrogate", local=local, priors=(), gram=rule, box=False)
        settings = {"lr": 0.0, "client_lr": 0.3, "iterations": 400}
        numbers = jax.tree.map(lambda x: x.ravel()[0], method.numbers(1, settings))
        candidate = Candidate(images, None)

        def at(place):
            return cosine(method.compare(numbers, known, candidate, 0.0, place)[0])

        there = jax.tree.map(lambda w, u: w - 2 / 3 * 0.3 * u, params, sent)
        expected = cosine(compare(jax.grad(loss, has_aux=True)(there, images, labels)[0], sent))
        np.testing.assert_allclose(at(2 / 3), expected, atol=1e-12)
        state = method.init(numbers, jax.random.key(0), images.shape, known, candidate)
        step = jax.jit(lambda index, state: method.step(numbers, known, index, state)[0])
        for index in range(400):
            state = step(index, state)
        np.testing.assert_array_equal(state.candidate.images, images)
        places = jnp.linspace(0, 1, 101)
        assert abs(state.surrogate.place - places[jnp.argmin(jax.vmap(at)(places))]) < 0.02


def test_an_order_of_its_own_in_each_epoch(inputs):
    """The client of a shuffled target is a client that takes its images in that order."""
    with jax.enable_x64(True):
        params, images, labels = inputs
        orders = np.array([[2, 0, 3, 1], [1, 3, 0, 2]])
        found = client.update(loss, params, images[orders], labels[orders], Local(2, 2), 0.3)[0]
        joined = jax.tree.map(lambda x: x[orders.ravel()], (images, labels))
        expected = by_hand(params, *joined, 1, 2, 0.3)
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-10)


class Problem:
    """One target of two images on the small network, as the loop wants it."""

    normalization = Normalization(jnp.zeros(1), jnp.full(1, 0.5))

    def __init__(self, problem, images=2):
        self.victim = problem.victim
        pixels = jax.random.uniform(jax.random.key(5), (1, images, *problem.shape))
        self.truths = Truth(pixels, jnp.arange(3, 3 + images)[None])
        self.shape, self.normalization = problem.shape, problem.normalization

    def run(self, clients, method, seeds=2, plan=None, iterations=6, **numbers):
        """Attacks one target."""
        module, variables = self.victim.module, self.victim.variables
        targets = make_targets(
            module, variables, self.truths, self.normalization, clients, 0.1, order_keys([0])
        ).targets
        settings = {"lr": 0.1, "iterations": iterations, "client_lr": 0.1, **numbers}
        problem = trials.Problem(
            module, self.shape, variables, targets, self.truths, self.normalization
        )
        return trials.run(
            problem,
            method,
            method.numbers(seeds, settings),
            seed_keys([0], range(seeds)),
            trials.Resources(plan or planner.GroupPlan(1, seeds)),
        )


def test_joint_labels_are_found_beside_the_image(problem):
    """DLG with Adam: the logits' label, and initial logits that no seed shares."""
    one = Problem(problem, images=1)
    method = attack.Method(
        objective="l2", priors=(), sign="none", schedule="constant", box=False, classes=10
    )
    result = one.run(ClientSettings("joint"), method, iterations=60)
    assert result.labels.shape == (1, 2, 1)
    assert result.labels.ravel().tolist() == [3, 3]
    assert (result.objective < result.trace.objective[0] / 3).all()


@pytest.mark.slow
def test_epochs_of_unknown_order_have_images_of_their_own_that_become_one(problem):
    local = Local(2, 1)
    method = attack.Method(priors=("tv", "prior_epoch_order"), local=local, by_epoch=True)
    clients = ClientSettings(local=local, shuffled=True)
    result = Problem(problem).run(clients, method, tv=0.01, prior_epoch_order=0.1)
    assert result.pixels.shape == (1, 2, 2, *problem.shape)
    assert result.finite.all()
    assert (result.objective < result.trace.objective[0]).all()
    candidate = jnp.stack([jnp.arange(3.0), jnp.arange(3.0)[::-1] + 0.5]).reshape(2, 3, 1, 1, 1)
    merged = method.reconstruct(Candidate(candidate, None))
    np.testing.assert_allclose(merged.ravel(), [0.25, 1.25, 2.25])


def test_group_consistency_draws_the_starts_together(problem):
    """Without any other force than the pull to the mean, the spread over seeds shrinks."""
    spread = {}
    for weight in (1e-6, 1e3):
        result = Problem(problem, images=1).run(
            ClientSettings(),
            attack.Method(priors=("prior_group",), sign="none"),
            seeds=3,
            plan=planner.GroupPlan(1, 3, 1, whole=True),
            iterations=40,
            prior_group=weight,
        )
        spread[weight] = np.std(result.pixels, axis=1).mean()
    assert spread[1e3] < 0.3 * spread[1e-6]


def test_a_seed_that_failed_draws_no_other_to_it():
    """The mean is of the others, and so is the gradient."""

    @functools.partial(jax.vmap, axis_name=SEEDS)
    def slope(images):
        return jax.grad(group_distance)(images)

    images = jnp.stack([jnp.zeros(SHAPE), jnp.full(SHAPE, jnp.nan), jnp.ones(SHAPE)])
    pulled = slope(images)
    np.testing.assert_allclose(pulled[0], -1 / images[0].size)  # twice half of the way
    np.testing.assert_allclose(pulled[2], 1 / images[0].size)


def test_who_finds_labels_beside_the_images_is_told_their_number_alone(problem):
    one = Problem(problem)
    clients = ClientSettings("joint", assumed_images=3)
    given = problem.victim.module, problem.victim.variables, one.truths, one.normalization
    assert make_targets(*given, clients).targets.labels.tolist() == [[0, 0, 0]]


def test_the_clients_rate_is_not_rounded_in_float64(problem):
    """It differs from the attacker's otherwise, and the truth would not explain the update."""
    one, local = Problem(problem), Local(2, 1)
    with jax.enable_x64(True):
        variables, truths = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64) if x.dtype == jnp.float32 else x,
            (problem.victim.variables, one.truths),
        )
        given = problem.victim.module, variables, truths, one.normalization
        found = make_targets(*given, ClientSettings(local=local), 0.1).targets.update
        own = client.loss_fn(problem.victim.module, variables)
        images = one.normalization.normalize(truths.images[0])
        expected = client.update(own, variables["params"], images, truths.labels[0], local, 0.1)[0]
        for a, b in zip(*map(jax.tree.leaves, (found, expected))):
            np.testing.assert_allclose(a[0], b, rtol=1e-11, atol=1e-15)


def test_a_defense_that_looks_at_the_images_finds_them_whatever_their_order(problem):
    clients = ClientSettings(local=Local(2, 1), shuffled=True, defense=("soteria",))
    given = problem.victim.module, problem.victim.variables
    one = Problem(problem)
    given = *given, one.truths, one.normalization, clients, 0.1, order_keys([0])
    share = make_targets(*given, strengths=((0.5,),)).targets.update
    kernel = share[sorted(name for name in share if "Dense" in name)[-1]]["kernel"][0]
    assert (np.abs(kernel).sum(axis=1) == 0).mean() == pytest.approx(0.5, abs=0.01)


def test_an_attacker_that_takes_too_few_images_is_measured_on_all():
    truth = jnp.stack([jnp.full(SHAPE, v) for v in (0.0, 0.5, 1.0)])
    found = metrics.match(truth[2:], truth, 0.25)
    np.testing.assert_array_equal(found.mean((1, 2, 3)), [0.25, 0.25, 1.0])
    more = jnp.concatenate([truth[:0:-1], jnp.full((2, *SHAPE), 0.1), truth[:1]])
    np.testing.assert_array_equal(metrics.match(more, truth), truth)


def test_the_work_of_local_steps_is_counted_for_each(problem):
    def of_images(count):
        update = jax.tree.map(lambda x: x[None], problem.victim.variables["params"])
        target = Target(update, jnp.zeros((1, count), jnp.int32))
        return problem.problem(targets=target).replace(truths=None)

    def count(local):
        return trials.step_flops(of_images(4), attack.Method(local=local))

    once = trials.step_flops(of_images(2), attack.Method())
    assert count(client.Local(3, 2)) == pytest.approx(6 * once)
    assert count(client.Local(1, 4)) > once
