"""DP-SGD against its definition, other implementations and published figures."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize, special, stats

from jaxinv.errors import UserError
from jaxinv.privacy import accounting
from jaxinv.privacy.gradient import add_noise, clipped_sum

EXAMPLES, CLIP = 12, 0.7


@pytest.fixture(scope="module")
def problem():
    """A small regression: parameters, examples, the gradient of one."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"w": jax.random.normal(keys[0], (5, 3)), "b": jax.random.normal(keys[1], (3,))}
    examples = jax.random.normal(keys[2], (EXAMPLES, 5)), jax.random.normal(keys[3], (EXAMPLES, 3))

    def loss(params, example):
        x, y = example
        return jnp.square(jnp.tanh(x @ params["w"] + params["b"]) - y).sum()

    def gradient(example):
        value, found = jax.value_and_grad(loss)(params, example)
        return found, {"loss": value, "count": jnp.float32(1)}

    return params, examples, loss, gradient


def summed(problem, present=None, **options):
    _, examples, _, gradient = problem
    present = jnp.ones(EXAMPLES, bool) if present is None else present
    return clipped_sum(gradient, examples, present, CLIP, **options)


def test_each_example_is_clipped_alone_over_all_leaves(problem):
    _, examples, _, gradient = problem
    total = {"w": 0.0, "b": 0.0}
    clipped = 0
    for i in range(EXAMPLES):
        own, _ = gradient(jax.tree.map(lambda x, i=i: x[i], examples))
        norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in own.values()))
        clipped += norm > CLIP
        total = {k: total[k] + own[k] * min(1, CLIP / norm) for k in own}
    assert clipped > EXAMPLES // 2
    got, seen = summed(problem)
    for name in total:
        np.testing.assert_allclose(got[name], total[name], rtol=1e-5, atol=1e-5)
    assert seen["count"] == EXAMPLES


@pytest.mark.parametrize("microbatch", [1, 4, 12])
def test_microbatches_change_nothing(problem, microbatch):
    present = jnp.arange(EXAMPLES) % 3 > 0
    whole, in_parts = (summed(problem, present, microbatch=m) for m in (None, microbatch))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, in_parts
    )
    assert whole[1]["count"] == present.sum()


def test_absent_examples_do_not_count_whatever_they_hold(problem):
    _, (x, y), _, gradient = problem
    present = jnp.arange(EXAMPLES) < 5
    spoiled = jnp.where(present[:, None], x, jnp.nan), y
    got, _ = clipped_sum(gradient, spoiled, present, CLIP)
    expected, _ = clipped_sum(gradient, (x[:5], y[:5]), jnp.ones(5, bool), CLIP)
    np.testing.assert_allclose(got["w"], expected["w"], rtol=1e-5, atol=1e-5)


def test_the_clipped_sum_is_that_of_optax_and_jax_privacy(problem):
    params, examples, loss, _ = problem
    each = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, examples)
    aggregate = optax.contrib.differentially_private_aggregate(CLIP, 0.0, 0)
    mean, _ = aggregate.update(each, aggregate.init(params))
    got, _ = summed(problem)
    for name in got:
        np.testing.assert_allclose(got[name] / EXAMPLES, mean[name], rtol=1e-5, atol=1e-5)
    clipping = pytest.importorskip("jax_privacy.clipping")
    theirs = clipping.clipped_grad(loss, l2_clip_norm=CLIP, batch_argnums=1)(params, examples)
    for name in got:
        np.testing.assert_allclose(got[name], theirs[name], rtol=1e-5, atol=1e-5)


def noise_is(noise, std):
    """Whether a two-sided test of the variance accepts a standard deviation, at 1e-3."""
    statistic = np.sum(np.square(noise)) / std**2
    tail = stats.chi2.cdf(statistic, noise.size)
    return 5e-4 < tail < 1 - 5e-4


def test_noise_has_the_scale_and_two_thirds_and_three_halves_of_it_are_rejected():
    """20,000 draws: the standard deviation is known to 0.5%."""
    tree = {"a": jnp.zeros((100, 100)), "b": jnp.zeros(10_000)}
    multiplier, clip = 1.1, 0.7

    def draw(scale):
        return np.concatenate(
            [
                np.ravel(leaf)
                for leaf in add_noise(tree, scale * multiplier * clip, jax.random.key(5)).values()
            ]
        )

    assert noise_is(draw(1.0), multiplier * clip)
    assert not noise_is(draw(2 / 3), multiplier * clip)
    assert not noise_is(draw(3 / 2), multiplier * clip)
    assert stats.kstest(draw(1.0) / (multiplier * clip), "norm").pvalue > 1e-3
    # Optax's draws pass and fail the same test.
    aggregate = optax.contrib.differentially_private_aggregate(clip, multiplier, 3)
    zeros = jax.tree.map(lambda x: jnp.zeros((1, *x.shape)), tree)
    theirs, _ = aggregate.update(zeros, aggregate.init(tree))
    theirs = np.concatenate([np.ravel(leaf) for leaf in theirs.values()])
    assert noise_is(theirs, multiplier * clip)
    assert not noise_is(theirs, 1.5 * multiplier * clip)


def test_accountants_give_the_published_figures():
    """N = 50,000, batch 256, multiplier 1.1, 1,000 steps, delta 1e-5."""
    spent = accounting.Mechanism(1.1, 256 / 50_000, 1000)
    assert accounting.epsilon(spent, 1e-5, "rdp") == pytest.approx(0.979, abs=5e-4)
    assert accounting.epsilon(spent, 1e-5, "pld") == pytest.approx(0.730, abs=5e-4)
    assert accounting.epsilon(accounting.Mechanism(0.0), 1e-5) == np.inf


def test_epsilon_of_one_gaussian_is_the_closed_form():
    """delta(eps) = Phi(1/2s - eps s) - e^eps Phi(-1/2s - eps s) (Balle & Wang 2018)."""
    for multiplier in (0.7, 2.0):

        def curve(eps, s=multiplier):
            return special.ndtr(0.5 / s - eps * s) - np.exp(eps) * special.ndtr(-0.5 / s - eps * s)

        exact = optimize.brentq(lambda eps: curve(eps) - 1e-5, 0, 50)
        got = accounting.epsilon(accounting.Mechanism(multiplier), 1e-5)
        assert exact <= got <= 1.002 * exact


def test_calibration_gives_the_noise_back():
    multiplier = accounting.calibrate(4.0, 1e-5, 1.0, 1, "rdp")
    below, above = (
        accounting.epsilon(accounting.Mechanism(m), 1e-5, "rdp")
        for m in (multiplier, 0.999 * multiplier)
    )
    assert below <= 4.0 < above
    with pytest.raises(UserError, match="--target-epsilon"):
        accounting.calibrate(1e-9, 1e-5, 1.0, 1, "rdp")


def test_the_bound_is_the_power_of_the_best_test():
    """For one Gaussian by simulation: the best event is a threshold on the true direction."""
    prior, multiplier = 0.01, 0.8
    draws = np.random.default_rng(0).normal(size=400_000)
    threshold = -special.ndtri(prior) * multiplier  # exceeded with the prior's probability
    power = (1 + multiplier * draws > threshold).mean()
    bound = accounting.reconstruction_bound(accounting.Mechanism(multiplier), prior)
    assert bound == pytest.approx(power, abs=4 * (power / draws.size) ** 0.5)
    # Four steps are one of half the noise; sampling lowers it, and never below the prior.
    composed = accounting.reconstruction_bound(accounting.Mechanism(2 * multiplier, 1.0, 4), prior)
    assert composed == pytest.approx(bound, rel=1e-6)
    sampled = accounting.reconstruction_bound(accounting.Mechanism(2 * multiplier, 0.1, 4), prior)
    assert prior < sampled < bound
    nearly_all = accounting.reconstruction_bound(accounting.Mechanism(multiplier, 1 - 1e-9), prior)
    assert nearly_all == pytest.approx(bound, rel=2e-3)
    assert accounting.reconstruction_bound(accounting.Mechanism(0.0), prior) == 1.0


def test_poisson_batches_hold_every_example_with_the_same_probability():
    examples, rate, steps = 40, 0.3, 4000
    sizes = accounting.poisson_sizes(7, examples, rate, steps)
    assert sizes.mean() == pytest.approx(12, abs=4 * (examples * rate * 0.7 / steps) ** 0.5)
    assert sizes.var() == pytest.approx(examples * rate * (1 - rate), rel=0.15)
    batches = accounting.poisson_batches(7, 0, examples, sizes, 40)
    assert ((batches >= 0).sum(axis=1) == sizes).all()
    seen = np.zeros((steps, examples))
    for row, batch in zip(seen, batches):
        row[batch[batch >= 0]] += 1
    assert seen.max() == 1
    assert np.abs(seen.mean(axis=0) - rate).max() < 5 * (rate * (1 - rate) / steps) ** 0.5
    # Alone: that one is there says nothing of another.
    correlation = np.corrcoef(seen.T)[~np.eye(examples, dtype=bool)]
    assert np.abs(correlation).max() < 5 / steps**0.5
    other = accounting.poisson_batches(7, 1, examples, sizes, 40)
    assert (other != batches).any()
