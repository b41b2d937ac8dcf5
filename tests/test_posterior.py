"""The report's figure of an attack's error bars: coverage against known distributions."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from jaxinv.reporting.sections import posterior as pp


def made(sharpness, updates=6, images=1):
    """Normal errors of standard deviations that the attack takes for `1 / sharpness` as much."""
    random = np.random.default_rng(0)
    truth = random.uniform(size=(updates, images, 16, 16, 3))
    std = random.uniform(0.05, 0.2, truth.shape)
    return pp.Posterior(truth, truth + std * random.normal(size=truth.shape), std / sharpness)


@pytest.mark.parametrize("sharpness", [1, 2])
def test_coverage_is_that_of_the_normal_distribution(sharpness):
    """Calibrated: the diagonal. Half the standard deviation: the interval of half the width."""
    width = ndtri((1 + pp.NOMINAL) / 2) / sharpness
    expected = 2 * ndtr(width) - 1
    np.testing.assert_allclose(pp.coverage(made(sharpness)), expected, atol=0.02)


def test_images_of_a_batch_stand_beside_their_truths():
    truths = np.random.default_rng(0).uniform(size=(4, 5, 5, 3))
    order = np.array([2, 0, 3, 1])
    mixed = truths[order] + 0.01
    np.testing.assert_allclose(mixed[pp._order(truths, mixed)], truths + 0.01)


@pytest.mark.parametrize("width", [9.6, 4.2])
@pytest.mark.parametrize("images", [1, 4])
def test_the_figure_shows_errors_on_the_scale_of_the_deviations(width, images):
    cells = [SimpleNamespace(heading=f"noise:{v}") for v in ("0.1", "1")]
    found = [(cell, made(1, images=images)) for cell in cells]
    figure = pp.draw_posteriors(found, width)
    maps = [panel.images[0] for panel in figure.axes if panel.images]
    assert len(maps) == 4 * pp.MOST_TARGETS
    std, heat = maps[2], [m for row in range(pp.MOST_TARGETS) for m in maps[4 * row :][2:4]]
    most = max(np.asarray(m.get_array()).max() for m in heat)
    assert all(m.get_clim() == pytest.approx((0, most)) for m in heat)
    shown = np.sqrt(np.square(found[1][1].std[0]).mean(axis=-1))
    assert np.asarray(std.get_array()).max() == pytest.approx(shown.max())
