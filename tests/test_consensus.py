"""The mean of several seeds against known answers, brute force and simulation."""

from itertools import combinations, permutations

import numpy as np
import pytest

from jaxinv.reporting import consensus as cs

NAN = np.nan


def psnr_of(pixels, truth):
    """Mean over images of the PSNR, matched by trying every order; pixels 0 ... 255."""
    orders = [list(order) for order in permutations(range(len(truth)))]
    errors = ((pixels[orders] - truth) ** 2).mean(axis=(2, 3, 4)) / 255**2
    least = errors[errors.sum(axis=1).argmin()]
    with np.errstate(divide="ignore"):
        return -10 * np.log10(least).mean()


def trials(pictures, truth, objective=None, **recorded):
    """Trials as a run would record them, of pictures matched to the truth."""
    pictures, truth = np.asarray(pictures, np.uint8), np.asarray(truth, np.uint8)
    psnr = np.array([psnr_of(p.astype(float), truth.astype(float)) for p in pictures])
    mse = ((pictures / 255 - truth / 255) ** 2).mean(axis=(1, 2, 3, 4))
    objective = np.arange(len(pictures)) if objective is None else objective
    bad = np.isnan(np.asarray(objective, float))
    seeds = cs.Trials(
        pictures,
        truth,
        np.asarray(objective, float),
        np.where(bad, NAN, psnr),
        np.where(bad, NAN, mse),
    )
    return seeds._replace(**recorded)


def noisy(seeds, images=1, std=20.0, seed=0, size=8):
    """Random truths away from black and white, with independent noise for every seed."""
    random = np.random.default_rng(seed)
    truth = random.integers(80, 176, size=(images, size, size, 3))
    pictures = truth + std * random.normal(size=(seeds, *truth.shape))
    return np.clip(pictures, 0, 255).round().astype(np.uint8), truth.astype(np.uint8)


def brute_force(these, k, share):
    """Mean PSNR of the mean image over all k-subsets, one image per target."""
    found = []
    for subset in combinations(range(len(these.objective)), k):
        ranked = sorted(
            (s for s in subset if these.objective[s] == these.objective[s]),
            key=lambda s: these.objective[s],
        )
        mean = these.pictures[ranked[: -(-k // share)]].astype(float)
        found.append(psnr_of(mean.mean(axis=0), these.truth.astype(float)) if ranked else NAN)
    return np.mean(found)


def test_opposite_errors_cancel():
    truth = np.full((1, 4, 4, 3), 100)
    error = np.random.default_rng(0).integers(-40, 41, size=truth.shape)
    quarter, whole = cs.expected_psnr(trials([truth + error, truth - error], truth))
    single = -10 * np.log10(np.mean((error / 255) ** 2))
    np.testing.assert_allclose(quarter, [single, single])
    np.testing.assert_allclose(whole, [single, np.inf])


def test_independent_noise_falls_with_the_number_averaged():
    pictures, truth = noisy(16, std=20.0, size=32)
    quarter, whole = cs.expected_psnr(trials(pictures, truth))
    variance = (20**2 + 1 / 12) / 255**2  # of the noise and of rounding
    expected = -10 * np.log10(variance / np.arange(1, 17))
    # 3072 values: the squared error's standard error is 2.6%, thus 0.11 dB; four of them.
    np.testing.assert_allclose(whole, expected, atol=0.45)
    np.testing.assert_allclose(quarter, expected[-(-np.arange(1, 17) // 4) - 1], atol=0.45)


@pytest.mark.parametrize("objective", [[3, 1, 5, 2, 4, 6], [3, NAN, 5, NAN, 4, 1]])
def test_curves_equal_brute_force(objective):
    these = trials(*noisy(6, std=40.0), objective)
    for curve, share in zip(cs.expected_psnr(these), (4, 1)):
        expected = [brute_force(these, k, share) for k in range(1, 7)]
        np.testing.assert_allclose(curve, expected, rtol=1e-9)
        assert np.isnan(expected).sum() == np.isnan(objective).sum()


def test_a_sample_of_the_subsets_agrees_with_all_of_them(monkeypatch):
    random = np.random.default_rng(1)
    these = trials(*noisy(11, std=40.0), random.permutation(11))
    sampled = cs.expected_psnr(these)
    np.testing.assert_array_equal(sampled, cs.expected_psnr(these))
    monkeypatch.setattr(cs, "_SUBSETS", 10**6)
    monkeypatch.setattr(cs, "_WORK", 10**8)
    exact = cs.expected_psnr(these)
    for curve, other, share in zip(exact, sampled, (4, 1)):
        assert curve[5] == pytest.approx(brute_force(these, 6, share))
        assert (curve != other).any()
        np.testing.assert_allclose(curve, other, atol=0.05)
        np.testing.assert_allclose(curve[[0, -1]], other[[0, -1]], rtol=1e-12)


def test_images_in_any_order_are_aligned_to_the_pick_and_the_mean_to_the_truth():
    pictures, truth = noisy(6, images=3, std=25.0)
    random = np.random.default_rng(5)
    mixed = np.stack([p[random.permutation(3)] for p in pictures])
    plain, other = trials(pictures, truth), trials(mixed, truth)
    np.testing.assert_allclose(cs.expected_psnr(other), cs.expected_psnr(plain), rtol=1e-9)
    whole = cs.expected_psnr(other)[1, -1]
    assert whole == pytest.approx(psnr_of(pictures.mean(axis=0), truth.astype(float)))
    np.testing.assert_allclose(cs.mean_image(other), pictures[:2].mean(axis=0) / 255)


def test_the_order_is_not_taken_from_the_truth():
    """Pick and seed each match the truth as they stand, but match each other the other way round.

    Images of two pixels: what tells the two apart points 60 degrees to either side of the truth's.
    """
    shape = 2, 1, 2, 1
    truth, pick, seed = (
        np.reshape([120 + x, 120 + y, 120 - x, 120 - y], shape)
        for x, y in ((20, 0), (10, 18), (10, -18))
    )
    whole = cs.expected_psnr(trials([pick, seed], truth))[1]
    assert whole[1] == pytest.approx(-10 * np.log10((20**2 + 18**2) / 2 / 255**2))
    helped = psnr_of((pick + seed) / 2, truth)
    assert helped == pytest.approx(-10 * np.log10(10**2 / 2 / 255**2))


def test_matching_is_of_least_total_cost():
    costs = np.random.default_rng(0).random((40, 4, 4))
    least = [min(sum(c[range(4), order]) for order in permutations(range(4))) for c in costs]
    np.testing.assert_allclose(cs._matched(costs).sum(axis=1), least)


def test_failed_seeds_enter_no_mean():
    pictures, truth = noisy(8)
    pictures[[1, 4]] = 0
    failed = trials(pictures, truth, [0, NAN, 2, 3, NAN, 5, 6, 7])
    left = trials(pictures[[0, 2, 3, 5, 6, 7]], truth)
    assert cs.expected_psnr(failed)[1, -1] == pytest.approx(cs.expected_psnr(left)[1, -1])
    assert np.isnan(cs.expected_psnr(failed)[:, :2]).all()
    np.testing.assert_array_equal(cs.mean_image(failed)[0], pictures[[0, 2]].mean(axis=0)[0] / 255)
    # The best quarter of eight is two; with one seed left it is that one.
    lone = trials(pictures, truth, [NAN, NAN, 2, *[NAN] * 5])
    np.testing.assert_allclose(cs.expected_psnr(lone)[:, -1], lone.psnr[2])
    none = trials(pictures, truth, [NAN] * 8)
    assert np.isnan(cs.expected_psnr(none)).all()
    assert np.isnan(cs.mean_image(none)).all()


def test_what_eight_bits_do_not_show_is_not_called_exact():
    _, truth = noisy(1)
    alike = trials(np.repeat(truth[None], 8, axis=0), truth)
    np.testing.assert_array_equal(cs.expected_psnr(alike), np.full((2, 8), np.inf))
    fine = alike._replace(psnr=np.full(8, 80.0), mse=np.full(8, 1e-8))
    np.testing.assert_allclose(cs.expected_psnr(fine), np.full((2, 8), 80.0))


def test_draws_of_noise_are_averaged_after_each_has_its_own_consensus():
    draws = [[trials(*noisy(8, seed=2 * t + d)) for d in range(2)] for t in range(3)]
    found = cs.curves(draws)
    by_hand = np.array([[cs.expected_psnr(one) for one in target] for target in draws])
    np.testing.assert_allclose(found.quarter.per_target, by_hand[:, :, 0].mean(axis=1))
    np.testing.assert_allclose(found.all.mean, by_hand[:, :, 1].mean(axis=(0, 1)))
    np.testing.assert_allclose(found.first_draw, by_hand[:, 0, 0, -1])
    assert (found.quarter.low < found.quarter.mean).all()
