"""Levenberg-Marquardt: the last digits of an image, and which of them an update holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import polishing, trials
from jaxinv.attacks import levenberg_marquardt as lm
from jaxinv.attacks.gradient_matching import Candidate, Method

SIZE, OUT = 12, 40


@pytest.fixture(scope="module")
def smooth():
    """Smooth residuals that vanish at one point alone."""
    random = np.random.default_rng(0)
    inner, outer = random.normal(size=(OUT, SIZE)) / 3, random.normal(size=(OUT, OUT))
    truth = random.normal(size=(3, 4))
    of = lambda x: outer @ jax.nn.sigmoid(inner @ x.ravel())  # noqa: E731
    return of, truth


def polished(smooth, start, columns, steps=12):
    of, truth = smooth
    with jax.enable_x64(True):
        shared = of(jnp.asarray(truth))
        run = jax.jit(
            lambda x: lm.polish(
                lambda y: of(y) - shared, jnp.linalg.norm(shared), x, steps, columns
            )
        )
        return jax.tree.map(np.asarray, run(jnp.asarray(start)))


@pytest.mark.parametrize("columns", [5, 0])  # 12 unknowns: two blocks and a rest; none stored
def test_converges_quadratically_to_the_exact_image(smooth, columns):
    end = polished(smooth, smooth[1] + 0.3, columns)
    assert lm.STATUS[end.status] == "converged"
    np.testing.assert_allclose(end.x, smooth[1], atol=1e-10)
    residuals = end.trace[np.isfinite(end.trace)]
    # The exponent about doubles where rounding is not reached; with one factorisation used again
    # and again, it is a multiple.
    late = np.log10(residuals[(residuals < 1e-2) & (residuals > 1e-12)])
    if columns:
        assert len(residuals) <= 3
        assert np.log10(residuals[-1]) < 1.6 * np.log10(residuals[-2])
    else:
        assert late[-1] < 1.6 * late[-2]


def test_a_hopeless_start_does_not_call_itself_converged(smooth):
    end = polished(smooth, np.full((3, 4), 1e4), columns=4, steps=4)  # all sigmoids flat
    assert lm.STATUS[end.status] != "converged"
    assert end.residual > 1e-3


def test_spectrum_is_that_of_the_jacobian(smooth):
    of, truth = smooth
    with jax.enable_x64(True):
        x = jnp.asarray(truth)
        values, least = jax.jit(lambda x: lm.spectrum(of, x, 2, 4))(x)
        jacobian = np.asarray(jax.jacrev(of)(x)).reshape(OUT, SIZE)
        _, expected, directions = np.linalg.svd(jacobian)
        np.testing.assert_allclose(values, expected, rtol=1e-6)
        found = np.asarray(least).reshape(2, SIZE)
        np.testing.assert_allclose(np.abs(found @ directions[-2:].T), [[0, 1], [1, 0]], atol=1e-6)


def test_lenet_gives_the_exact_image_away(problem, result):
    """LeNetZhu through `polishing.polish`: to rounding, from an image 20 dB off."""
    with jax.enable_x64(True):
        first = lambda tree: jax.tree.map(lambda x: np.asarray(x)[:1], tree)  # noqa: E731
        exact = lambda tree: jax.tree.map(  # noqa: E731
            lambda x: np.asarray(x, np.float64 if x.dtype.kind == "f" else None), tree
        )
        module, variables = problem.victim.module, exact(problem.victim.variables)
        truths, normalization = exact(first(problem.truths)), exact(problem.normalization)
        targets = trials.make_targets(module, variables, truths, normalization).targets
        noise = 0.1 * np.random.default_rng(0).normal(size=(1, 1, *truths.images.shape[1:]))
        start = np.asarray(normalization.normalize(truths.images + noise))
        trace = result.trace._replace(
            **{name: getattr(result.trace, name)[:, :1, :1] for name in ("psnr", "objective")}
        )
        one = result._replace(
            candidates=Candidate(start, None), trace=trace, objective=result.objective[:1, :1],
            labels=np.asarray(result.labels)[:1, :1],
        )  # fmt: skip
        asked = module, variables, targets
        end = polishing.polish(
            one, *asked, truths, normalization, Method(), 1.0, steps=8, memory=np.inf
        )
        assert end.status.tolist() == [["converged"]]
        assert end.scores.psnr.item() > 200
        found = polishing.spectra(end, *asked, Method(), 1.0, memory=np.inf)
        assert found.values.shape == (1, np.prod(problem.shape))
        assert found.values[0, -1] > 0  # every direction is pinned down


def test_what_does_not_fit_the_memory_is_computed_by_fewer_columns():
    @functools.partial(jax.jit, static_argnums=0)
    def program(columns, _, x):
        return jnp.full(1000 * columns + 1, x)

    run = functools.partial(polishing._each_alone, program, (), variables=0.0)
    inputs = [(1.0,), (2.0,)]
    for memory, columns in ((np.inf, 4), (10_000, 2), (100, 0)):
        ends = run(columns=(4, 2, 0), trials=inputs, memory=memory)
        np.testing.assert_array_equal(ends[:, 0], [1, 2])
        assert ends.shape[1] == 1000 * columns + 1
    assert run(columns=(4, 2), trials=inputs, memory=100) is None
