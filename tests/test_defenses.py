"""What clients do to their updates, by closed forms; and what an attacker makes of knowing it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import client, defenses
from jaxinv.attacks.objectives import compare, cosine
from jaxinv.defenses import pruning
from jaxinv.defenses.base import ClientContext, PublicFacts
from jaxinv.networks.inspect import classifier_input, classifier_path

SIZE = 60_000  # entries, of each of two leaves


@pytest.fixture(scope="module")
def update():
    keys = jax.random.split(jax.random.key(3))
    return {"a": jax.random.normal(keys[0], (SIZE // 100, 100)), "b": jnp.zeros(SIZE)}


def defend(text, update, key=0, scene=None):
    chain = defenses.parse(text)
    names, strengths = defenses.names(chain), defenses.strengths(chain)
    return defenses.defend(names, update, strengths, jax.random.key(key), scene)


def added(text, update, key=0):
    """The noise in each leaf, flat."""
    noisy = defend(text, update, key)
    return [np.asarray(noisy[name] - update[name]).ravel() for name in update]


@pytest.mark.parametrize(
    ("text", "variance", "kurtosis"), [("noise:0.25", 0.25, 3.0), ("laplace:0.25", 0.25, 6.0)]
)
def test_noise_has_the_variance_it_states(update, text, variance, kurtosis):
    """120,000 draws: the variance is known to 0.5% (normal) and 1% (Laplace), one sigma."""
    noise = np.concatenate(added(text, update))
    assert noise.mean() == pytest.approx(0, abs=4 * (variance / noise.size) ** 0.5)
    assert noise.var() == pytest.approx(variance, rel=0.03)
    assert (noise**4).mean() / noise.var() ** 2 == pytest.approx(kurtosis, rel=0.1)


def test_noise_is_independent_between_leaves_draws_and_positions(update):
    first, second = added("noise:1", update)
    other, _ = added("noise:1", update, key=1)
    for left, right in ((first, second), (first, other), (first[:-1], first[1:])):
        assert abs(np.corrcoef(left, right)[0, 1]) < 4 / SIZE**0.5
    np.testing.assert_array_equal(first, added("noise:1", update)[0])


def test_strengths_and_chains_share_their_draws(update):
    """What stands before it in the chain, and how strong it is, changes no draw of the noise."""
    of_one, of_four = (added(f"noise:{v}", update)[1] for v in (1, 4))
    np.testing.assert_allclose(2 * of_one, of_four, rtol=1e-6)
    np.testing.assert_allclose(of_one, added("prune:0.5,noise:1", update)[1], rtol=1e-6)
    twice = added("noise:1,noise:1", update)[1]  # each its own
    assert twice.var() == pytest.approx(2, rel=0.05)


def test_relative_noise_has_the_norm_it_states(update):
    noise = np.concatenate(added("relative:0.5", update))
    norm = np.linalg.norm(update["a"])
    assert np.linalg.norm(noise) == pytest.approx(0.5 * norm, rel=0.02)


def test_pruning_drops_the_smallest_and_exactly_as_many(rng_numpy):
    values = {"a": jnp.asarray(rng_numpy.normal(size=(7, 10))), "b": jnp.full(30, 0.5)}  # ties
    flat = np.concatenate([np.ravel(v) for v in values.values()])
    for text, zeros in (("prune:0.25", 25), ("prune:0.7", 70), ("top-k:13", 87), ("prune:0", 0)):
        pruned = defend(text, values)
        sent = np.concatenate([np.ravel(v) for v in pruned.values()])
        assert (sent == 0).sum() == zeros
        assert np.abs(flat[sent == 0]).max(initial=0) <= np.abs(flat[sent != 0]).min()
        np.testing.assert_array_equal(sent[sent != 0], flat[sent != 0])
    by_layer = defend("prune-layer:0.5", values)
    assert [(np.asarray(v) == 0).sum() for v in by_layer.values()] == [35, 15]
    assert not any(np.any(v) for v in defend("prune:1", values).values())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_smallest_entries_are_those_that_a_stable_sort_has_first(rng_numpy, dtype):
    with jax.enable_x64(True):
        mark = jax.jit(jax.vmap(pruning.smallest, (None, 0)))
        normal, wanted = rng_numpy.normal(size=40), np.arange(41)
        for values in (normal, np.round(normal, 1), np.zeros(40)):
            magnitudes = np.abs(values).astype(dtype)
            order = np.argsort(magnitudes, kind="stable")
            for count, marked in zip(wanted, mark(jnp.asarray(magnitudes), wanted)):
                np.testing.assert_array_equal(np.flatnonzero(marked), np.sort(order[:count]))


def test_clipping_bounds_the_norm_over_all_leaves():
    tree = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
    np.testing.assert_allclose(defend("clip:1", tree)["b"], [[0.8]], rtol=1e-6)
    np.testing.assert_array_equal(defend("clip:10", tree)["b"], tree["b"])
    zero = jax.tree.map(jnp.zeros_like, tree)
    slope = jax.grad(lambda t: defend("clip:1", t)["a"].sum())(zero)
    assert np.isfinite(slope["a"]).all()


def test_sign_and_quantization(update):
    signs = defend("sign", update)["a"]
    np.testing.assert_array_equal(np.sign(signs), np.sign(update["a"]))
    mean = np.abs(np.concatenate([np.ravel(v) for v in update.values()])).mean()
    assert np.unique(np.abs(signs)) == pytest.approx([mean])
    two = np.asarray(defend("quantize:2", update)["a"])
    top = np.abs(update["a"]).max()
    np.testing.assert_allclose(np.unique(two), np.array([-1, -1 / 3, 1 / 3, 1]) * top, rtol=1e-5)
    # Unbiased: the mean over draws is the update, to the standard error of 400.
    small = jax.tree.map(lambda x: x.ravel()[:50], update)
    draws = np.stack([defend("quantize:2", small, key)["a"] for key in range(400)])
    error = (draws.mean(0) - small["a"]) / (draws.std(0) / 20 + 1e-4)
    assert np.abs(error).max() < 5


@pytest.fixture(scope="module")
def scene(problem):
    images = problem.normalization.normalize(problem.truths.images)[:, 0]
    return ClientContext(problem.victim.module, problem.victim.variables, images, jnp.array([3, 7]))


def test_dp_sgd_of_one_image_is_clipping_and_noise(scene):
    one = scene._replace(images=scene.images[:1], labels=scene.labels[:1])
    loss = client.loss_fn(one.module, one.variables)
    gradient, _ = client.gradient(loss, one.variables["params"], one.images, one.labels)
    private = defend("dpsgd:0.5:0", gradient, scene=one)
    for got, expected in zip(*map(jax.tree.leaves, (private, defend("clip:0.5", gradient)))):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-7)


def test_dp_sgd_clips_each_image_alone_and_divides_its_noise_by_the_batch(scene):
    loss = client.loss_fn(scene.module, scene.variables)
    each = [
        client.gradient(loss, scene.variables["params"], scene.images[i : i + 1], label[None])[0]
        for i, label in enumerate(scene.labels)
    ]
    clipped = [defend("clip:0.2", g) for g in each]
    exact = jax.tree.map(lambda a, b: (a + b) / 2, *clipped)
    got = defend("dpsgd:0.2:0", each[0], scene=scene)
    for a, b in zip(*map(jax.tree.leaves, (got, exact))):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-7)
    noisy = defend("dpsgd:0.2:3", each[0], scene=scene)
    noise = jnp.concatenate([(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, (noisy, got)))])
    assert noise.std() == pytest.approx(3 * 0.2 / 2, rel=4 / (2 * noise.size) ** 0.5)


def test_soteria_drops_the_features_that_tell_most(scene):
    module, variables, images, _ = scene
    path = classifier_path(module, variables, images.shape[1:])
    tree = jax.tree.map(jnp.ones_like, variables["params"])
    sent = defend("soteria:0.25", tree, scene=scene)
    kernel = np.asarray(sent[path[0]]["kernel"])
    dropped = np.flatnonzero((kernel == 0).all(axis=1))
    assert (kernel == 0).sum() == len(dropped) * kernel.shape[1]  # whole features
    assert len(dropped) == round(0.25 * len(kernel))
    others = [
        v
        for name, layer in sent.items()
        for k, v in layer.items()
        if (name, k) != (path[0], "kernel")
    ]
    assert all((np.asarray(v) == 1).all() for v in others)

    def features(x):
        return classifier_input(module, variables, x[None])[0]

    def slope(x):
        return jax.jacrev(features)(x).reshape(len(kernel), -1)

    score = np.mean(
        [np.abs(features(x)) / np.linalg.norm(slope(x), axis=1) for x in images], axis=0
    )
    assert set(dropped) == set(np.argsort(score)[-len(dropped) :])


def known(text, shared, classifier=("c",), images=1):
    chain = defenses.parse(text)
    names, strengths = defenses.names(chain), defenses.strengths(chain)
    return names, defenses.adapt(names, strengths, shared, PublicFacts(classifier, images))


def distance(text, update, shared):
    """The cosine distance that an adaptive attacker sees between them."""
    names, knowledge = known(text, shared)
    expected = defenses.expect(names, knowledge, update)
    return float(cosine(compare(expected, shared, knowledge.weights)))


@pytest.mark.parametrize("text", ["prune:0.9", "prune-layer:0.9", "top-k:500", "clip:0.1"])
def test_who_knows_of_it_sees_no_distance_at_the_truth(update, text):
    shared = defend(text, update)
    assert distance(text, update, shared) == pytest.approx(0, abs=1e-5)
    if text != "clip:0.1":  # a cosine does not see a scale
        assert cosine(compare(update, shared)) > 0.01


@pytest.mark.parametrize("text", ["prune:0.9", "prune-layer:0.9", "top-k:500"])
def test_who_knows_of_pruning_sees_through_noise_on_top(update, text):
    """Nothing that was sent is 0 then: the smallest entries are those that were not."""
    small = {"a": update["a"]}
    _, knowledge = known(f"{text},noise:1e-6", defend(f"{text},noise:1e-6", small))
    expected = defenses.expect(("prune", "noise"), knowledge, small)
    np.testing.assert_array_equal(expected["a"], defend(text, small)["a"])


def test_what_changes_noise_in_front_of_it_is_found():
    for text, found in (
        ("clip:1,noise:1", None),
        ("noise:1,laplace:1", None),
        ("noise:1,clip:1", "clip"),
        ("clip:1,noise:1,sign", "sign"),
        ("dpsgd:1:1,prune:0.5", "prune"),
        ("none", None),
    ):
        assert defenses.changes_noise(defenses.parse(text)) == found


def test_signs_are_expected_softly(update):
    small = {"a": update["a"]}
    shared = defend("sign", small)
    assert distance("sign", small, shared) < 0.7 * cosine(compare(small, shared))


def test_layers_of_noise_count_less_and_never_all_count_nothing(update):
    """A leaf's weight is the share of its power that is no noise: 1/(1 + v) and 0 here."""
    shared = defend("noise:0.5", update)
    _, knowledge = known("noise:0.5", shared)
    assert knowledge.weights["a"] == pytest.approx(1 / 1.5, rel=0.02)
    assert knowledge.variances["a"] == 0.5
    assert knowledge.weights["b"].max() < 0.02
    assert distance("noise:0.5", update, shared) < cosine(compare(update, shared)) - 0.05
    for text in ("relative:0.7071", "dpsgd:1:0.70711"):
        weights = known(text, defend("noise:0.5", {"a": update["a"]}))[1].weights
        assert weights["a"] == pytest.approx(1 / 1.5, rel=0.02)
    _, nothing = known("noise:1e6", shared)
    assert all((np.asarray(w) == 1).all() for w in jax.tree.leaves(nothing.weights))


def test_the_layer_that_soteria_defends_is_left_out(update):
    shared = {"c": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    weights = known("soteria:0.5", shared)[1].weights["c"]
    assert not np.any(weights["kernel"])
    assert np.all(weights["bias"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("noise", "not of the form noise:VARIANCE"),
        ("noise:-1", "at least 0"),
        ("noise:inf", "at least 0"),
        ("prune:1.5", "at most 1"),
        ("blur:1", "unknown defense 'blur'; known are none, dpsgd"),
        ("clip:1,dpsgd:1:1", "put it first"),
    ],
)
def test_what_is_no_defense_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        defenses.parse(text)


def test_spelling_is_one():
    text = "clip: 1.0, noise:1E-4"
    assert defenses.spell(defenses.parse(text)) == "clip:1,noise:0.0001"
    assert defenses.spell(defenses.parse("none")) == "none"
    assert defenses.is_random(defenses.parse(text))
    assert not defenses.is_random(defenses.parse("prune:0.5,sign"))
