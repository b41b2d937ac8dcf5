"""Measures beside PSNR: known values on the image itself, on nothing, and by hand."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinv
from jaxinv import data, metrics
from jaxinv.engine.likeness import (
    likeness,
    line_up,
    load_judge,
    load_perceptual,
    variation_distance,
)


@pytest.fixture(scope="module")
def tiles():
    found = data.load("tiles", split="test", ids=range(40))
    return found.images / np.float32(255), found.mean


@pytest.fixture(scope="module")
def judge():
    info = jaxinv.load_victim("lenet_zhu-tiles").info
    return load_judge("lenet_zhu-tiles", info.image_shape, info.classes, "another")


def test_the_image_itself(tiles, judge):
    images, mean = tiles
    found = likeness(images[:4], images[:4], np.array(mean), line_up(images[4:], judge))
    assert (found.named_by_pixels, found.named_by_judge, found.same_class, found.avd) == (
        1,
        1,
        1,
        0,
    )
    flat = np.broadcast_to(np.float32(mean), images[:4].shape)
    before = np.asarray(metrics.ssim(*map(jnp.asarray, (flat, images[:4]))))
    assert found.rdlv == pytest.approx((1 / before - 1).mean(), rel=1e-4)


def test_nothing(tiles):
    """The mean color gains nothing, and is one candidate's neighbor at the most."""
    images, mean = tiles
    flat = np.broadcast_to(np.float32(mean), images[:4].shape)
    found = likeness(flat, images[:4], np.array(mean), line_up(images[4:]))
    assert found.rdlv == pytest.approx(0, abs=1e-6)
    assert found.named_by_pixels <= 0.25
    assert np.isnan(found.named_by_judge)
    assert np.isnan(found.same_class)


def test_images_taken_for_others(tiles, judge):
    images, mean = tiles
    found = likeness(images[[1, 0, 2, 3]], images[:4], np.array(mean), line_up(images[4:], judge))
    assert found.named_by_pixels == found.named_by_judge == 0.5


def test_features_are_what_the_last_layer_multiplies(tiles, judge):
    images, _ = tiles
    features, classes = judge.look(images)
    layer = judge.variables["params"]["Dense_0"]
    logits = features @ layer["kernel"] + layer["bias"]
    assert (logits.argmax(axis=1) == classes).all()
    expected = jax.jit(judge.module.apply)(judge.variables, judge.normalization.normalize(images))
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


def test_variation_distance_by_hand():
    """One pixel of 1 in a corner of zeros.

    First differences: of the four neighborhoods one has |1 + 1| = 2 at the corner's own; the mean
    square over 2 x 2 is 1. Second: the only neighborhood is the far corner's, where all is 0.
    """
    truth = np.zeros((1, 3, 3, 1))
    pixels = truth.copy()
    pixels[0, 2, 2] = 1
    assert variation_distance(pixels, truth) == pytest.approx([(4 / 4 + 0.5 * 4) ** 0.5])
    # A constant has no variation: PSNR sees it, AVD does not.
    assert variation_distance(truth + 0.3, truth) == 0


def test_lpips_sees_images_as_its_package_wants_them(tiles, monkeypatch):
    """In [-1, 1], channels first: the distance of a stand-in is a known one."""
    pytest.importorskip("torch")

    class Network:
        def eval(self):
            return self

        def __call__(self, left, right):
            assert left.shape[1] == 3
            assert -1 <= float(left.min()) < 0 < float(left.max()) <= 1
            return (left - right).abs().mean(dim=(1, 2, 3), keepdim=True)

    package = types.ModuleType("lpips")
    package.LPIPS = lambda net, verbose: Network()
    monkeypatch.setitem(sys.modules, "lpips", package)
    images, mean = tiles
    lineup = line_up(images[4:], perceptual=load_perceptual())
    found = likeness(images[[1, 0]], images[:2], np.array(mean), lineup)
    assert found.lpips == pytest.approx(2 * np.abs(images[0] - images[1]).mean(), rel=1e-5)
