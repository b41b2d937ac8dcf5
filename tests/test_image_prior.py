"""Gaussian image priors: transforms, estimates, and where they are kept."""

import numpy as np
import pytest
from scipy import fft

from jaxinv.data import image_prior as ip
from jaxinv.errors import UserError

TILES = ip.ImageFacts("tiles", None, (32, 32, 3), (0.5, 0.4, 0.3), (0.25, 0.2, 0.2))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "jaxinv" / "priors"


def test_cosines_are_scipys():
    np.testing.assert_allclose(ip.cosines(7), fft.dct(np.eye(7), norm="ortho", axis=0), atol=1e-12)


@pytest.mark.parametrize("kind", ["spectrum", "covariance"])
def test_the_transform_is_orthonormal_and_comes_back(kind):
    random = np.random.default_rng(0)
    pixels = random.normal(size=(50, 6, 5, 3))
    prior = (
        ip.of_covariance(pixels)
        if kind == "covariance"
        else ip.of_spectrum(pixels.mean(axis=0), ip.estimate_spectrum(pixels))
    )
    images = random.normal(size=(2, 6, 5, 3))
    found = np.asarray(ip.coefficients(prior, images))
    np.testing.assert_allclose((found**2).sum(), (images**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(ip.synthesize(prior, found), images, atol=1e-5)


@pytest.mark.parametrize("kind", ["spectrum", "covariance"])
def test_variances_are_those_of_the_images(kind):
    """Of white noise with correlated colors: the colors' eigenvalues at every frequency."""
    random = np.random.default_rng(0)
    mix = np.array([[2.0, 0, 0], [1, 1, 0], [0, 0, 0.5]])
    pixels = random.normal(size=(4000, 4, 4, 3)) @ mix.T
    make = {
        "covariance": ip.of_covariance,
        "spectrum": lambda p: ip.of_spectrum(p.mean(axis=0), ip.estimate_spectrum(p)),
    }[kind]
    expected = np.sort(np.linalg.eigvalsh(mix @ mix.T))
    variances = np.sort(make(pixels).variances.ravel())
    of_each = variances.reshape(3, 16).mean(axis=1)  # the three lie far apart
    np.testing.assert_allclose(of_each, expected, rtol=0.05)


def test_a_covariance_of_few_images_is_still_one():
    """Fewer images than pixels: the directions they do not span get the spectrum's variance."""
    pixels = np.random.default_rng(0).normal(size=(10, 8, 8, 1))
    assert ip.of_covariance(pixels).variances.min() > 0.1


def test_a_spectrum_of_one_over_frequency_is_the_same_at_every_size():
    def law(n):
        return 1 / np.maximum(np.hypot(*np.meshgrid(*[np.arange(n) / n] * 2)), 1 / 32) ** 2

    found = ip.resample_spectrum(law(32)[..., None, None], 48, 64)[..., 0, 0]
    assert found.shape == (48, 64)
    expected = (
        1 / np.maximum(np.hypot(np.arange(48)[:, None] / 48, np.arange(64) / 64), 1 / 32) ** 2
    )
    error = np.abs(np.log(found / expected))
    assert error[6:-2, 8:-2].max() < 0.05
    np.testing.assert_array_equal(
        ip.resample_spectrum(law(32)[..., None, None], 32, 32)[..., 0, 0], law(32)
    )


def test_a_prior_is_made_once_and_a_torn_one_again(cache, monkeypatch):
    prior, source = ip.load_prior("spectrum", TILES)
    assert source.name == "tiles/train"
    assert source.images > 500
    (path,) = cache.iterdir()
    monkeypatch.setitem(ip.IMAGE_PRIORS, "spectrum", None)  # is not called again
    again, same = ip.load_prior("spectrum", TILES)
    assert same == source
    np.testing.assert_array_equal(again.variances, prior.variances)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent))
    path.write_bytes(path.read_bytes()[:1000])
    np.testing.assert_array_equal(ip.load_prior("spectrum", TILES)[0].variances, prior.variances)


def test_photographs_fit_other_sizes_and_grey_images():
    gray = TILES._replace(shape=(28, 40, 1), mean=(0.5,), std=(0.25,))
    prior, source = ip.load_prior("photographs", gray)
    assert prior.mean.shape == prior.variances.shape == (28, 40, 1)
    assert source.name == "shipped photographs"
    assert prior.variances[0, 0, 0] > 100 * prior.variances[-1, -1, 0]  # low frequencies dominate


def test_what_does_not_fit_is_one_line():
    with pytest.raises(UserError, match=r"12288 numbers an image .* use spectrum"):
        ip.load_prior("covariance", TILES._replace(shape=(64, 64, 3)))
    with pytest.raises(UserError, match="the training images of tiles are"):
        ip.load_prior("spectrum", TILES._replace(shape=(28, 28, 3)))
    with pytest.raises(UserError, match="of 1 or 3 channels, not 2"):
        ip.load_prior("photographs", TILES._replace(shape=(8, 8, 2), std=(1.0, 1.0)))
    with pytest.raises(UserError, match="no finite positive variances"):
        ip.of_spectrum(np.zeros((2, 2, 1)), np.full((2, 2, 1, 1), np.nan))
