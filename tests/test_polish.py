"""Levenberg-Marquardt: the last digits of an image, and which of them an update holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv.attacks import levenberg_marquardt as lm

SIZE, OUT = 12, 40


@pytest.fixture(scope="module")
def problem():
    """Smooth residuals that vanish at one point alone."""
    random = np.random.default_rng(0)
    inner, outer = random.normal(size=(OUT, SIZE)) / 3, random.normal(size=(OUT, OUT))
    truth = random.normal(size=(3, 4))
    of = lambda x: outer @ jax.nn.sigmoid(inner @ x.ravel())  # noqa: E731
    return of, truth


def polished(problem, start, dense, steps=12):
    of, truth = problem
    with jax.enable_x64(True):
        shared = of(jnp.asarray(truth))
        run = jax.jit(
            lambda x: lm.polish(lambda y: of(y) - shared, jnp.linalg.norm(shared), x, steps, dense)
        )
        return jax.tree.map(np.asarray, run(jnp.asarray(start)))


@pytest.mark.parametrize("dense", [True, False])
def test_converges_quadratically_to_the_exact_image(problem, dense):
    end = polished(problem, problem[1] + 0.3, dense)
    assert lm.STATUS[end.status] == "converged"
    np.testing.assert_allclose(end.x, problem[1], atol=1e-10)
    residuals = end.trace[np.isfinite(end.trace)]
    # The exponent about doubles where rounding is not reached; with one factorisation used again
    # and again, it is a multiple.
    late = np.log10(residuals[(residuals < 1e-2) & (residuals > 1e-12)])
    if dense:
        assert len(residuals) <= 3
        assert np.log10(residuals[-1]) < 1.6 * np.log10(residuals[-2])
    else:
        assert late[-1] < 1.6 * late[-2]


def test_a_hopeless_start_does_not_call_itself_converged(problem):
    end = polished(problem, np.full((3, 4), 1e4), dense=True, steps=4)  # all sigmoids flat
    assert lm.STATUS[end.status] != "converged"
    assert end.residual > 1e-3


def test_spectrum_is_that_of_the_jacobian(problem):
    of, truth = problem
    with jax.enable_x64(True):
        x = jnp.asarray(truth)
        values, least = jax.jit(lambda x: lm.spectrum(of, x, 2))(x)
        jacobian = np.asarray(jax.jacrev(of)(x)).reshape(OUT, SIZE)
        _, expected, directions = np.linalg.svd(jacobian)
        np.testing.assert_allclose(values, expected, rtol=1e-6)
        found = np.asarray(least).reshape(2, SIZE)
        np.testing.assert_allclose(np.abs(found @ directions[-2:].T), [[0, 1], [1, 0]], atol=1e-6)
