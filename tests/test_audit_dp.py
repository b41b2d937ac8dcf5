"""Epsilon from identification: never more than was spent, and not much less."""

import functools

import numpy as np
import pytest
from scipy import special

from jaxinv.audit import dp
from jaxinv.privacy import accounting

DELTA = 1e-5


def success_of(candidates, mu, games, random):
    """Orthogonal gradients at the clipping norm: the true score N(mu, 1) against the best other.

    The largest of N - 1 normals is drawn by its distribution function, Phi(t)^(N - 1).
    """
    best = special.ndtri(random.random(games) ** (1 / (candidates - 1)))
    return int((random.normal(mu, 1, games) > best).sum())


@pytest.mark.parametrize(
    ("multiplier", "steps"), [(0.3, 1), (0.5, 1), (1, 1), (2, 1), (4, 1), (4, 25)]
)
def test_never_above_the_accountant(multiplier, steps):
    """1,000 audits of 400 games each: above the truth in 5% of them at the most."""
    random = np.random.default_rng(0)
    promised = accounting.epsilon(accounting.Mechanism(multiplier, 1.0, steps), DELTA)
    mu = steps**0.5 / multiplier
    bound = functools.cache(lambda wins: dp.lower_bound(wins, 400, 100, DELTA).epsilon)
    shown = np.array([bound(success_of(100, mu, 400, random)) for _ in range(1000)])
    assert (shown > promised).mean() <= 0.05
    if 1 <= mu < 4:  # beyond, 400 games are all won and say no more
        assert np.median(shown) > 0.3 * promised


@pytest.mark.parametrize(("multiplier", "factor"), [(0.5, 1.1), (1.0, 1.15)])
def test_within_a_factor_of_the_accountant(multiplier, factor):
    """N = 10,000 candidates and 100,000 games."""
    random = np.random.default_rng(1)
    promised = accounting.epsilon(accounting.Mechanism(multiplier), DELTA)
    wins = success_of(10_000, 1 / multiplier, 100_000, random)
    found = dp.lower_bound(wins, 100_000, 10_000, DELTA)
    assert promised / factor < found.epsilon <= promised


def test_half_the_noise_is_caught():
    random = np.random.default_rng(2)
    promised = accounting.epsilon(accounting.Mechanism(1.0), DELTA)
    honest = dp.lower_bound(success_of(1000, 1.0, 5000, random), 5000, 1000, DELTA)
    faulty = dp.lower_bound(success_of(1000, 2.0, 5000, random), 5000, 1000, DELTA)
    assert honest.epsilon <= promised < faulty.epsilon


def test_gdp_epsilon_is_the_accountants():
    """Of the Gaussian mechanism, by dp-accounting's privacy loss distribution."""
    for multiplier in (0.5, 1.0, 3.0):
        own = dp.gdp_epsilon(1 / multiplier, DELTA)
        assert own == pytest.approx(
            accounting.epsilon(accounting.Mechanism(multiplier), DELTA), rel=2e-3
        )
    assert dp.gdp_delta(1.0, dp.gdp_epsilon(1.0, 1e-3)) == pytest.approx(1e-3, rel=1e-6)
    assert dp.gdp_epsilon(0.0, DELTA) == 0


@pytest.mark.parametrize(
    ("multiplier", "attained", "bound"),
    [(0.5, 0.0376, 0.0428), (1.0, 0.00300, 0.00327), (2.0, 0.00061, 0.00064)],
)
def test_expected_success_of_orthogonal_gradients(multiplier, attained, bound):
    """N = 10,000, and the bound that the reports print, by hand."""
    assert dp.expected_success(10_000, 1 / multiplier) == pytest.approx(attained, rel=0.01)
    limit = accounting.reconstruction_bound(accounting.Mechanism(multiplier), 1e-4)
    assert limit == pytest.approx(bound, rel=0.01)
    assert attained < limit


def test_nothing_won_shows_nothing():
    found = dp.lower_bound(0, 100, 10, DELTA)
    assert found.mu == found.epsilon == 0
    with pytest.raises(ValueError, match="at least two"):
        dp.lower_bound(1, 2, 1, DELTA)


def test_informed_scores_win_as_often_as_theory_says():
    """Ten steps of orthogonal gradients of norm 1: mu = sqrt(10) / 3."""
    rows = np.broadcast_to(np.eye(40, dtype=np.float32), (10, 40, 40))
    targets = np.random.default_rng(3).integers(0, 40, 6000)
    scores = dp.informed_scores(rows, targets, std=3.0, seed=4)
    wins = (scores.argmax(axis=1) == targets).mean()
    expected = dp.expected_success(40, 10**0.5 / 3)
    assert wins == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 6000) ** 0.5)
    # The log-likelihood ratio of the true one: mean mu^2 / 2, variance mu^2.
    own = scores[np.arange(6000), targets]
    assert own.mean() == pytest.approx(10 / 9 / 2, abs=0.06)
    assert own.var() == pytest.approx(10 / 9, rel=0.1)
