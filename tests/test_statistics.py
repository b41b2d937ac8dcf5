"""Statistics against hand-made answers, brute force and simulation."""

from itertools import combinations

import numpy as np
import pytest

from jaxinv.reporting import statistics as st

NAN = np.nan


def test_mean_interval_by_hand():
    # Means per target 2 and 6; their std is sqrt(8), t(1, 97.5%) = 12.7062.
    result = st.mean_interval(np.array([[1.0, 3.0], [5.0, 7.0]]))
    assert result.mean == 4
    assert result.high - result.mean == pytest.approx(12.7062 * np.sqrt(8) / np.sqrt(2), rel=1e-5)
    assert result.mean - result.low == pytest.approx(result.high - result.mean)
    assert result.seed_std == pytest.approx(np.sqrt(2))


def test_mean_interval_where_it_is_undefined():
    one_target = st.mean_interval(np.array([[1.0, 3.0]]))
    assert (one_target.mean, one_target.seed_std) == (2, pytest.approx(np.sqrt(2)))
    assert np.isnan([one_target.low, one_target.high]).all()
    assert np.isnan(st.mean_interval(np.array([[1.0], [3.0]])).seed_std)
    assert np.isnan(st.mean_interval(np.array([[1.0, NAN], [3.0, 4.0]]))).all()
    exact = st.mean_interval(np.array([[1.0, np.inf], [3.0, 4.0]]))
    assert exact.mean == np.inf
    assert np.isnan(exact[1:]).all()


def test_mean_interval_covers_the_mean_over_targets():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        values = 18 + 2 * random.normal(size=(5, 1)) + random.normal(size=(5, 4))
        result = st.mean_interval(values)
        hits += result.low <= 18 <= result.high
    # Binomial standard error 1.1%: four of them. An interval over all 20 trials covers about 70%.
    assert abs(hits / 400 - 0.95) < 0.044


def test_paired_difference_against_scipy():
    """The t interval of the per-target differences, and only of those."""
    from scipy import stats

    generator = np.random.default_rng(3)
    hard = 10 * generator.normal(size=(6, 1))  # makes targets differ, in both cells alike
    reference = hard + generator.normal(size=(6, 4))
    values = hard + 1 + generator.normal(size=(6, 4))
    result = st.paired_difference(values, reference)
    test = stats.ttest_rel(values.mean(axis=1), reference.mean(axis=1))
    expected = (test.confidence_interval(0.95).low, test.confidence_interval(0.95).high)
    np.testing.assert_allclose(result[1:], expected, rtol=1e-12)
    np.testing.assert_allclose(result.value, (values - reference).mean(), rtol=1e-12)
    values[2, 1] = np.nan
    assert np.isnan(st.paired_difference(values, reference)).all()


def test_variance_components_by_hand():
    # Means 2, 6, 10: MSB = 2 * 32 / 2 = 32. Within: 3 * 2 / 3 = 2. Between: (32 - 2) / 2 = 15.
    values = np.array([[1.0, 3.0], [5.0, 7.0], [9.0, 11.0]])
    result = st.variance_components(values, resamples=50)
    assert result.between.value == pytest.approx(np.sqrt(15))
    assert result.within.value == pytest.approx(np.sqrt(2))
    assert result.icc.value == pytest.approx(15 / 17)


def test_variance_components_truncate_a_negative_estimate():
    result = st.variance_components(np.array([[1.0, 3.0], [1.0, 3.0]]), resamples=50)
    assert result.between.value == 0
    assert result.icc.value == 0
    assert result.within.value == pytest.approx(np.sqrt(2))


def test_variance_components_recover_a_simulation():
    random = np.random.default_rng(3)
    estimates = []
    for _ in range(300):
        values = 2 * random.normal(size=(6, 1)) + random.normal(size=(6, 8))
        mean_squares = st.variance_components(values, resamples=1)
        estimates.append([mean_squares.between.value**2, mean_squares.within.value**2])
    mean, error = np.mean(estimates, axis=0), np.std(estimates, axis=0) / np.sqrt(300)
    assert (np.abs(mean - [4, 1]) < 4 * error).all()
    assert (np.abs(mean - [2, 1.5]) > 4 * error).all()  # what std for variance would look like


def test_bootstrap_is_named_by_its_seed_and_holds_the_estimate():
    values = np.random.default_rng(0).normal(size=(8, 6)) + np.arange(8)[:, None]
    first, again, other = (
        st.variance_components(values, bootstrap_seed=s, resamples=200) for s in (1, 1, 2)
    )
    np.testing.assert_equal(first, again)
    assert first.between != other.between
    for interval in (first.between, first.within, first.icc):
        assert interval.low < interval.value < interval.high


def test_draws_of_noise_are_a_level_of_their_own():
    """Simulated at 2, 1.5 and 1 dB, each known to a few percent; against the formulas by hand."""
    random = np.random.default_rng(3)
    shape = 300, 6, 5
    values = sum(
        std * random.normal(size=shape[:level] + (1,) * (3 - level))
        for std, level in ((2, 1), (1.5, 2), (1, 3))
    )
    found = st.variance_components(values, resamples=50)
    assert found.between.value == pytest.approx(2, rel=0.15)
    assert found.noise.value == pytest.approx(1.5, rel=0.05)
    assert found.within.value == pytest.approx(1, rel=0.03)
    assert found.icc.value == pytest.approx(
        found.between.value**2 / sum(c.value**2 for c in found[:3]), rel=1e-9
    )
    means = values.mean(axis=2)
    by_hand = means.var(axis=1, ddof=1).mean() - values.var(axis=2, ddof=1).mean() / 5
    assert found.noise.value == pytest.approx(by_hand**0.5)
    flat = st.variance_components(values[:, 0], resamples=50)
    assert np.isnan(flat.noise.value)
    np.testing.assert_equal(flat, st.variance_components(values[:, :1], resamples=50))


def test_the_best_of_k_is_chosen_among_the_starts_on_one_draw():
    values = np.array([[1.0, 2, 3, 10, 20, 30]])  # two draws of three seeds
    best = st.best_of_k(values, -values, draws=2)
    np.testing.assert_allclose(best.mean, [11, (8 / 3 + 80 / 3) / 2, 16.5])


def test_bootstrap_of_targets_without_seed_noise():
    # Seeds agree exactly, so only the first stage moves: within is 0 and ICC 1 in each resample.
    values = np.repeat([[1.0], [2.0], [5.0]], 4, axis=1)
    result = st.variance_components(values, resamples=100)
    assert result.within == (0, 0, 0)
    assert result.icc == (1, 1, 1)
    assert result.between.value == pytest.approx(np.std([1, 2, 5], ddof=1))


@pytest.mark.parametrize("values", [[[1.0]], [[1.0], [2.0]], [[1.0, NAN], [2.0, 3.0]]])
def test_variance_components_undefined(values):
    result = st.variance_components(np.array(values), resamples=20)
    assert np.isnan(np.array(result)).all()


def test_variance_components_of_one_target_know_the_seeds_only():
    result = st.variance_components(np.array([[1.0, 2.0, 3.0]]), resamples=50)
    assert result.within.value == 1
    assert np.isnan([*result.between, *result.icc]).all()


def _brute_force(values, scores, k):
    """Mean of the chosen value over all k-subsets, ties split evenly."""
    chosen = []
    for subset in combinations(range(len(values)), k):
        valid = [i for i in subset if not np.isnan(scores[i])]
        lowest = min((scores[i] for i in valid), default=NAN)
        chosen.append(np.mean([values[i] for i in valid if scores[i] == lowest] or [NAN]))
    return np.mean(chosen)


@pytest.mark.parametrize(
    "scores",
    [
        [0.3, 0.1, 0.5, 0.2, 0.4, 0.6],
        [0.3, 0.1, 0.1, 0.2, 0.2, 0.2],  # ties
        [0.3, NAN, 0.5, NAN, 0.4, 0.4],  # failures, and a tie
    ],
)
def test_best_of_k_equals_brute_force(scores):
    scores = np.array(scores)
    values = np.where(np.isnan(scores), NAN, [20.0, 18.5, 17.0, 19.0, 22.0, 16.0])
    result = st.best_of_k(values[None], scores[None])
    expected = [_brute_force(values, scores, k) for k in range(1, 7)]
    np.testing.assert_allclose(result.per_target[0], expected, rtol=1e-12)
    assert np.isnan(expected).sum() == np.isnan(scores).sum()
    oracle = st.best_of_k(values[None], -values[None])
    np.testing.assert_allclose(
        oracle.mean, [_brute_force(values, -values, k) for k in range(1, 7)], rtol=1e-12
    )


def test_best_of_k_ends_at_the_mean_and_at_the_chosen():
    values = np.array([[1.0, 2.0, 6.0], [4.0, 5.0, 9.0]])
    scores = np.array([[0.2, 0.1, 0.3], [0.3, 0.2, 0.1]])
    result = st.best_of_k(values, scores)
    np.testing.assert_allclose(result.per_target[:, 0], [3, 6])
    np.testing.assert_allclose(result.per_target[:, -1], [2, 9])
    np.testing.assert_allclose(result.mean[[0, -1]], [4.5, 5.5])
    np.testing.assert_array_equal(st.choose_lowest(scores), [1, 2])


def test_best_of_k_is_finite_where_binomials_overflow():
    values = np.arange(1200.0)[None]
    best = st.best_of_k(values, -values)
    # Expected maximum of k draws without replacement from 1..n is k (n + 1) / (k + 1).
    k = np.arange(1, 1201)
    np.testing.assert_allclose(best.mean + 1, k * 1201 / (k + 1), rtol=1e-9)


def test_best_of_k_with_exact_and_all_failed():
    exact = st.best_of_k(np.array([[np.inf, 2.0]]), np.array([[0.1, 0.2]]))
    np.testing.assert_array_equal(exact.mean, [np.inf, np.inf])
    missed = st.best_of_k(np.array([[np.inf, 2.0]]), np.array([[0.3, 0.2]]))
    np.testing.assert_array_equal(missed.mean, [np.inf, 2.0])
    unscored = st.best_of_k(np.array([[7.0, 2.0]]), np.array([[NAN, 0.2]]))
    np.testing.assert_array_equal(unscored.mean, [NAN, 2.0])
    failed = np.full((1, 2), NAN)
    assert np.isnan(st.best_of_k(failed, failed).mean).all()
    np.testing.assert_array_equal(st.choose_lowest(failed), [-1])
    np.testing.assert_array_equal(st.choose_lowest(np.array([[NAN, np.inf]])), [1])


def test_success_rate_of_independent_trials_is_plain_wilson():
    # One seed: 3 of 10 above. Wilson 1927: 0.1078 to 0.6032 (statsmodels proportion_confint).
    psnr = np.array([[20.0]] * 3 + [[10.0]] * 7)
    result = st.success_rate(psnr, 19.0)
    assert (result.rate, result.successes, result.trials) == (0.3, 3, 10)
    assert result.effective_trials == 10
    assert (result.low, result.high) == pytest.approx((0.10779, 0.60322), abs=1e-5)


def test_success_rate_counts_targets_where_seeds_are_alike():
    psnr = np.repeat([[20.0]] * 3 + [[10.0]] * 7, 8, axis=1)  # ICC 1: as good as ten trials
    result = st.success_rate(psnr, 19.0)
    assert result.effective_trials == pytest.approx(10)
    assert (result.low, result.high) == pytest.approx((0.10779, 0.60322), abs=1e-5)


def test_success_rate_edges():
    failed = st.success_rate(np.array([[NAN, 20.0], [20.0, NAN]]), 19.0)
    assert (failed.rate, failed.effective_trials) == (0.5, 4)  # negative ICC counts as 0
    none = st.success_rate(np.full((4, 32), 10.0), 19.0)
    assert (none.rate, none.low, none.effective_trials) == (0, 0, 4)
    assert none.high == pytest.approx(1.96**2 / (4 + 1.96**2), abs=1e-3)
    assert st.success_rate(np.array([[np.inf]]), 19.0).rate == 1
    assert st.success_rate(np.array([[19.0]]), 19.0).rate == 0  # above, not at


def test_ranked_quantile_ranks_failures_worst():
    values = np.array([4.0, NAN, 1.0, 3.0, 2.0])
    assert st.ranked_quantile(values, 0.5) == 2
    assert st.ranked_quantile(values, 1.0) == 4
    assert np.isnan(st.ranked_quantile(values, 0.0))
    assert np.isnan(st.ranked_quantile(values, 0.125))  # between the failure and 1
    assert st.ranked_quantile(np.array([1.0, np.inf, np.inf]), 0.5) == np.inf
    plain = np.random.default_rng(0).normal(size=(3, 7))
    np.testing.assert_allclose(st.ranked_quantile(plain, 0.3), np.quantile(plain, 0.3, axis=1))


def test_an_empty_table_is_refused():
    with pytest.raises(ValueError, match=r"\[target, seed\]"):
        st.mean_interval(np.zeros((3, 0)))
