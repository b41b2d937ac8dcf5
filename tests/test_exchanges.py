"""What the seeds of a target tell one another, and what changes on the way: known answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv.attacks import exchanges
from jaxinv.attacks.gradient_matching import LAYERS, PRIOR_SCHEDULES, Method, mask
from jaxinv.attacks.objectives import compare
from jaxinv.attacks.priors import SEEDS
from jaxinv.networks.inspect import depths

PLACES = {"a": jnp.arange(5.0), "b": 10 * jnp.arange(5.0)[:, None]}


def meet(name, losses):
    """All five seeds of a target at once: where each goes on, and whether that is elsewhere."""
    of_seeds = jax.vmap(exchanges.EXCHANGES[name].meet, axis_name=SEEDS)
    return jax.jit(of_seeds)(jnp.array(losses), PLACES)


def test_the_worse_half_goes_on_from_the_better_half():
    """Ranks are 3, 0, 4 (not finite), 1, 2: two of five are given up, the worst for the second."""
    place, elsewhere = meet("halving", [0.4, 0.1, np.nan, 0.2, 0.3])
    assert elsewhere.tolist() == [True, False, True, False, False]
    assert place["a"].tolist() == [1, 1, 3, 3, 4]
    np.testing.assert_array_equal(place["b"][:, 0], 10 * place["a"])


def test_of_equal_seeds_none_is_given_up_twice():
    place, elsewhere = meet("halving", [0.0] * 5)
    assert elsewhere.tolist() == [False, False, False, True, True]
    assert place["a"].tolist() == [0, 1, 2, 0, 1]


def test_the_mean_is_of_those_that_are_finite():
    place, elsewhere = meet("consensus", [0.4, 0.1, np.nan, np.inf, 0.3])
    assert elsewhere.all()
    np.testing.assert_allclose(place["a"], np.full(5, (0 + 1 + 4) / 3), rtol=1e-6)


@pytest.mark.parametrize(("name", "steps"), [("halving", [100, 200, 300]), ("consensus", [300])])
def test_seeds_meet_at_their_steps(name, steps):
    due = functools.partial(exchanges.is_due, exchanges.EXCHANGES[name])
    index = jnp.arange(800)
    found = jax.jit(jax.vmap(due, in_axes=(0, None)))(index, jnp.int32(800))
    assert np.flatnonzero(found).tolist() == steps


def test_a_nudge_has_its_size_in_every_leaf():
    place = {"a": jnp.full(20_000, 3.0), "b": jnp.full(20_000, -0.01)}
    for leaf, size in (("a", 0.3), ("b", 0.001)):
        moved = exchanges.nudged(jax.random.key(0), jnp.int32(5), place)[leaf] - place[leaf]
        np.testing.assert_allclose(moved.std(), size, rtol=0.02)
        assert abs(float(moved.mean())) < 0.05 * size


def test_in_the_loop_the_seeds_agree_after_a_consensus(problem):
    """Meeting at step 4 of 12, from which steps of nothing lead nowhere else."""
    spread = {}
    for name in ("none", "consensus"):
        method = Method(exchange=name, priors=(), box=False)
        result = problem.run(method=method, group=4, lr=1e-9)
        spread[name] = np.std(np.asarray(result.candidates.images), axis=1).mean()
    # Four draws of size 1 have a mean of size a half, of which a nudge is a tenth.
    np.testing.assert_allclose(spread["consensus"], 0.1 * 0.5 * spread["none"], rtol=0.05)


def test_a_layer_is_as_deep_as_its_use_is_late():
    """Whatever the names, of which those of a dict are sorted."""

    def loss(params, x):
        return jnp.sum(jax.nn.relu(x @ params["z"] + params["c"]) @ params["a"])

    params = {"a": jnp.ones((3, 2)), "c": jnp.ones(3), "unused": jnp.ones(1), "z": jnp.ones((4, 3))}
    found = depths(loss, params, jnp.ones((1, 4)))
    assert found == {"z": 0.25, "c": 0.5, "a": 0.75, "unused": 1.0}


def test_the_deepest_layers_come_first():
    at = {
        p: [float(LAYERS["deep_first"](d, jnp.float32(p))) for d in (0.1, 0.5, 0.9)]
        for p in (0, 0.125, 0.25)
    }
    assert at == {0: [0, 0, 1], 0.125: [0, 1, 1], 0.25: [1, 1, 1]}


def test_a_step_compares_a_share_of_the_entries_and_the_end_all():
    """The same for both updates; 0.7 of 40,000 entries, with a standard deviation of 92."""
    shared = {"a": jnp.ones((100, 200)), "b": jnp.ones(20_000)}
    drawn = [mask(jax.random.key(seed), 0.7, shared) for seed in (0, 1)]
    kept = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(one)]) for one in drawn]
    assert all(set(np.unique(one)) == {0, 1} for one in kept)
    np.testing.assert_allclose([one.sum() for one in kept], 28_000, atol=4 * 92)
    assert 0.4 < (kept[0] == kept[1]).mean() < 0.7  # 0.58 of two independent ones
    between = compare(jax.tree.map(lambda x: 2 * x, shared), shared, drawn[0])
    np.testing.assert_allclose(between, kept[0].sum() * np.array([4, 2, 1, 1]), rtol=1e-5)


def test_the_objective_that_is_reported_is_of_all_entries(problem):
    """Steps of nothing: what is left is the objective of the start, which no mask has changed."""
    last = [
        problem.run(method=Method(entries=share, priors=(), box=False), lr=1e-9).objective
        for share in (1.0, 0.5)
    ]
    np.testing.assert_allclose(*last, rtol=1e-4)


def test_weights_of_priors_change_on_the_way():
    at = jnp.float32([0.0, 0.19, 0.2, 0.5])
    expected = {"constant": [1, 1, 1, 1], "late": [0, 0, 1, 1], "decay": 10 ** (1 - np.asarray(at))}
    for name, factors in expected.items():
        np.testing.assert_allclose(PRIOR_SCHEDULES[name](at), factors, rtol=1e-6)
