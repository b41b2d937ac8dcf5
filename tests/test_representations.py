"""What is moved in place of pixels: closed forms. All promises are in `test_contracts.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinv.attacks.base import Known
from jaxinv.attacks.gradient_matching import Method, default_rate
from jaxinv.attacks.representations import REPRESENTATIONS, Canvas, Generated, generate, keep_low
from jaxinv.data.image_prior import cosines
from jaxinv.settings.schema import Cell
from jaxinv.types import Normalization

NORMALIZATION = Normalization(jnp.full(3, 0.5), jnp.full(3, 0.25))
CANVAS = Canvas((2, 32, 32, 3), NORMALIZATION, None)


@pytest.mark.parametrize(
    ("progress", "passes"),
    [(0.0, (7,)), (0.24, (7,)), (0.25, (7, 8, 15)), (0.5, (7, 8, 15, 16, 31))],
)
def test_low_frequencies_come_first(progress, passes):
    """A wave goes through unchanged, or not at all."""
    for frequency in (7, 8, 15, 16, 31):
        wave = jnp.float32(cosines(32)[frequency])
        for image in (wave[:, None, None], wave[:, None]):
            images = jnp.broadcast_to(image, CANVAS.shape)
            found = keep_low(CANVAS, images, jnp.float32(progress))
            expected = images if frequency in passes else 0 * images
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_generator_has_the_published_layers():
    """4 x 4 maps of a latent of 128, three doublings, two 3x3 convolutions at each size, 1x1."""
    parameters = REPRESENTATIONS["generator"].draw(CANVAS, jax.random.key(0))
    assert parameters.latent.shape == (2, 128)
    dense, convolutions, last = 129 * 16 * 32, 8 * 9 * 32 * 32, 33 * 3
    assert optax.tree.size(parameters.weights) == dense + convolutions + last + 9 * 2 * 32


def test_a_generator_makes_each_image_of_its_own_numbers():
    """Equal ones give equal images; the same weights make all images of a trial."""
    parameters = REPRESENTATIONS["generator"].draw(CANVAS, jax.random.key(0))
    images = generate(CANVAS, parameters, jnp.float32(0))
    assert jnp.abs(images[0] - images[1]).max() > 0.01
    same = Generated(parameters.weights, parameters.latent[jnp.array([0, 0])])
    first, second = generate(CANVAS, same, jnp.float32(0))
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_a_generator_takes_smaller_steps_where_none_are_given():
    assert default_rate("adam", "generator") == pytest.approx(3e-3)
    assert Cell(representation="generator").lr == pytest.approx(3e-3)
    assert Cell(representation="generator", lr=0.5).lr == 0.5


def test_what_is_drawn_to_make_images_of_stays():
    known = Known(None, None, None, NORMALIZATION, None)
    method = Method(representation="generator")
    state = method.init(None, jax.random.key(0), (2, 8, 8, 3), known)

    def loss(parameters):
        canvas = Canvas((2, 8, 8, 3), NORMALIZATION, None)
        return jnp.square(generate(canvas, parameters, jnp.float32(0))).mean()

    slope = jax.jit(jax.grad(loss))(state.parameters)
    assert not slope.latent.any()
    assert all(np.asarray(x).any() for x in jax.tree.leaves(slope.weights["Conv_0"]))
