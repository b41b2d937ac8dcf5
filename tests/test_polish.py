"""Levenberg-Marquardt: the last digits of an image, and which of them an update holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv.attacks import levenberg_marquardt as lm
from jaxinv.attacks.base import Candidate
from jaxinv.attacks.uncertainty import Spectrum
from jaxinv.engine import trials
from jaxinv.engine.planner import GroupPlan
from jaxinv.engine.targets import make_targets

SIZE, OUT = 12, 40
EVERYTHING = trials.Resources(GroupPlan(1, 1))


@pytest.fixture(scope="module")
def smooth():
    """Smooth residuals that vanish at one point alone."""
    random = np.random.default_rng(0)
    inner, outer = random.normal(size=(OUT, SIZE)) / 3, random.normal(size=(OUT, OUT))
    truth = random.normal(size=SIZE)

    def of(x):
        return outer @ jax.nn.sigmoid(inner @ x)

    return of, truth


def polished(smooth, initial, columns):
    of, truth = smooth
    with jax.enable_x64(True):
        shared = of(jnp.asarray(truth))
        run = jax.jit(
            lambda x: lm.descend(
                lambda y: of(y) - shared,
                jnp.linalg.norm(shared),
                x,
                jnp.float64(lm.FIRST_DAMPING),
                columns,
            )
        )
        return jax.tree.map(np.asarray, run(jnp.asarray(initial)))


@pytest.mark.parametrize("columns", [5, 0])  # 12 unknowns: two blocks and a rest; none stored
def test_converges_to_the_exact_image(smooth, columns):
    x, _, status = polished(smooth, smooth[1] + 0.3, columns)
    assert lm.STATUS[status] == "converged"
    np.testing.assert_allclose(x, smooth[1], atol=1e-10)


def test_a_hopeless_start_does_not_call_itself_converged(smooth):
    x, _, status = polished(smooth, np.full(SIZE, 1e4), columns=4)  # all sigmoids flat
    assert lm.STATUS[status] != "converged"
    assert np.abs(x - smooth[1]).max() > 1e3


def test_the_preconditioner_is_the_normal_matrix(smooth):
    of, truth = smooth
    with jax.enable_x64(True):
        factor, diagonal = jax.jit(lambda x: lm.preconditioner(of, x, 5))(jnp.asarray(truth))
        jacobian = np.asarray(jax.jacrev(of)(jnp.asarray(truth)))
    normal = jacobian.T @ jacobian
    np.testing.assert_allclose(diagonal, np.diag(normal), rtol=1e-5)
    assert factor.dtype == jnp.float32
    root = np.sqrt(np.diag(normal))
    inverse = factor.T @ factor / np.outer(root, root)
    np.testing.assert_allclose(
        inverse @ (normal + lm.SHIFT * np.diag(root**2)), np.eye(SIZE), atol=2e-3
    )


def double(tree):
    """Arrays in float64."""
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x), jnp.float64 if x.dtype.kind == "f" else None), tree
    )


@pytest.fixture(scope="module")
def exact(problem):
    """LeNetZhu's first target in float64, polished from an image 20 dB off."""
    with jax.enable_x64(True):

        def first(tree):
            return jax.tree.map(lambda x: x[:1], tree)

        variables, truths = double(problem.victim.variables), double(first(problem.truths))
        normalization = double(problem.normalization)
        targets = make_targets(problem.victim.module, variables, truths, normalization).targets
        given = trials.Problem(
            problem.victim.module, problem.shape, variables, targets, truths, normalization
        )
        noise = 0.1 * np.random.default_rng(0).normal(size=(1, 1, *truths.images.shape[1:]))
        initial = Candidate(np.asarray(normalization.normalize(truths.images + noise)), None)
        attack = lm.LevenbergMarquardt()
        own = double(attack.numbers(1, {"client_lr": 1.0, "iterations": 3}))
        keys = problem.keys[:1, :1]
        return given, trials.run(given, attack, own, keys, EVERYTHING, initial), keys


def test_lenet_gives_the_exact_image_away(exact):
    _, end, _ = exact
    assert end.status.tolist() == [["converged"]]
    assert end.scores.psnr.item() > 200
    # The digits double from step to step, so that few factorizations are needed.
    assert end.trace.psnr.ravel()[1] > end.trace.psnr.ravel()[0] + 40


@pytest.mark.slow
def test_a_spectrum_says_what_of_the_image_is_determined(exact):
    given, end, keys = exact
    with jax.enable_x64(True):
        attack = Spectrum()
        own = double(attack.numbers(1, {"client_lr": 1.0}))
        found = trials.run(given, attack, own, keys, EVERYTHING, end.candidates).outcome
        params = given.variables["params"]

        def update(x):
            loss = trials.simulate(given.module, given.variables, attack)
            labels = given.targets.labels[0]
            gradient = jax.grad(loss, has_aux=True)(
                params, x.reshape(1, *given.image_shape), labels
            )
            return lm.flat(gradient[0])

        image = jnp.asarray(end.candidates.images[0, 0].ravel())
        jacobian = np.asarray(jax.jit(jax.jacfwd(update))(image))
    _, values, directions = np.linalg.svd(jacobian)
    np.testing.assert_allclose(found["values"][0, 0], values, rtol=1e-5)
    assert values[-1] > 0  # every direction is pinned down
    least = found["directions"][0, 0].reshape(-1, values.size)
    overlap = np.abs(least[0] @ directions[-1])
    assert overlap == pytest.approx(1, abs=1e-5)


def test_what_does_not_fit_the_memory_is_done_by_fewer_columns():
    attack = lm.LevenbergMarquardt()
    sizes = []
    while attack is not None:
        sizes.append(attack.columns)
        attack = attack.smaller()
    assert sizes == [16, 4, 1, 0]
