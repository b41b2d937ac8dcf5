"""Metrics against scikit-image, and the matching against brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from jaxinv import metrics
from jaxinv.types import Normalization, Truth

# Compiled whole: op by op they take ten times as long to test.
psnr, ssim, match, score, mean_color = map(
    jax.jit, (metrics.psnr, metrics.ssim, metrics.match, metrics.score, metrics.mean_color)
)


@pytest.fixture
def pair(rng_numpy):
    truth = rng_numpy.uniform(size=(2, 16, 20, 3)).astype(np.float32)
    noisy = np.clip(truth + rng_numpy.normal(0, 0.1, truth.shape), 0, 1).astype(np.float32)
    return noisy, truth


def test_psnr_and_ssim_equal_scikit_image(pair):
    noisy, truth = pair
    decibels = [peak_signal_noise_ratio(t, n, data_range=1) for n, t in zip(noisy, truth)]
    similarity = [
        structural_similarity(
            t,
            n,
            data_range=1,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for n, t in zip(noisy, truth)
    ]
    np.testing.assert_allclose(psnr(noisy, truth), decibels, rtol=1e-5)
    np.testing.assert_allclose(ssim(noisy, truth), similarity, atol=1e-5)


def test_images_smaller_than_the_window_have_no_ssim(pair):
    noisy, truth = pair
    assert np.isnan(ssim(noisy[:, :10], truth[:, :10])).all()
    assert np.isfinite(ssim(noisy[:, :11, :11], truth[:, :11, :11])).all()


def test_psnr_is_inf_when_exact_and_a_mean_of_decibels_otherwise(pair):
    noisy, truth = pair
    assert np.isinf(psnr(truth, truth)).all()
    scores = score(Truth(jnp.asarray(truth), jnp.zeros(2, int)), jnp.asarray(noisy))
    np.testing.assert_allclose(scores.psnr, np.mean(psnr(noisy, truth)), rtol=1e-6)


def test_matching_is_the_best_of_all_permutations(rng_numpy):
    truth = rng_numpy.uniform(size=(4, 8, 8, 1)).astype(np.float32)
    mixed = np.clip(truth[[2, 0, 3, 1]] + rng_numpy.normal(0, 0.4, truth.shape), 0, 1)
    mixed = mixed.astype(np.float32)
    best = min(
        itertools.permutations(range(4)), key=lambda p: np.square(mixed[list(p)] - truth).sum()
    )
    np.testing.assert_array_equal(match(jnp.asarray(mixed), truth), mixed[list(best)])


def test_a_lost_image_does_not_spoil_the_matching_of_the_others(rng_numpy):
    truth = rng_numpy.uniform(size=(3, 8, 8, 1)).astype(np.float32)
    mixed = truth[[1, 2, 0]]
    mixed[0] = np.nan
    matched = np.asarray(match(jnp.asarray(mixed), truth))
    np.testing.assert_array_equal(matched[[0, 2]], truth[[0, 2]])


def test_mean_color_baseline():
    truth = Truth(jnp.full((1, 16, 16, 3), 0.75), jnp.zeros(1, int))
    scores = mean_color(truth, Normalization(jnp.full(3, 0.25), jnp.ones(3)))
    np.testing.assert_allclose(scores.mse, 0.25)
    np.testing.assert_allclose(scores.psnr, 10 * np.log10(4), rtol=1e-6)


def test_label_accuracy_is_the_overlap_of_multisets():
    truth, guess = jnp.array([1, 1, 2, 3]), jnp.array([1, 2, 2, 1])
    assert float(metrics.label_accuracy(truth, guess, 5)) == 0.75
