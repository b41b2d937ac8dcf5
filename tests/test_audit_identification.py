"""Which images are in an update: exact where the algebra says so, chance where nothing is said."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special, stats

from jaxinv import client, defenses
from jaxinv.audit import games, measuring
from jaxinv.audit import identification as ident
from jaxinv.audit.intervals import clopper_pearson, mean_share
from jaxinv.audit.study.scene import Scene
from jaxinv.types import Normalization
from jaxinv.victim.untrained import untrained

N, SHAPE = 48, (8, 8, 3)


@pytest.fixture(scope="module")
def scene():
    victim = untrained("lenet_zhu", classes=10, width=None, seed=0, image_shape=SHAPE)
    random = np.random.default_rng(0)
    pool = games.Pool(
        random.integers(0, 256, (N, *SHAPE), dtype=np.uint8),
        random.integers(0, 10, N).astype(np.int32),
    )
    normalization = Normalization.of((0.5,) * 3, (0.25,) * 3)
    return games.network(victim.module, victim.variables, normalization), pool


def play(scene, members, **rules):
    return games.play(*scene, members, games.Rules(**rules))


def test_score_by_jvp_is_the_dot_product(scene):
    network, pool = scene
    loss, params, candidates = network.loss, network.params, network.normalize(pool)
    keys = jax.random.split(jax.random.key(1), 3)
    updates = jax.vmap(lambda key: jax.tree.map(lambda x: jax.random.normal(key, x.shape), params))(
        keys
    )
    rows = measuring.gradients(loss, params, candidates)
    flat = jax.vmap(measuring.flat)(updates)
    # 48 is no multiple of 20: the filler at the end is dropped.
    found = measuring.scores(loss, params, candidates, updates, chunk=20)
    np.testing.assert_allclose(found, flat @ rows.T, rtol=2e-4, atol=2e-5)


def test_gradients_are_those_of_the_client(scene):
    network, pool = scene
    loss, params, candidates = network.loss, network.params, network.normalize(pool)
    rows = measuring.gradients(loss, params, candidates)
    own, _ = client.gradient(loss, params, candidates.images[5:6], candidates.labels[5:6])
    np.testing.assert_allclose(rows[5], measuring.flat(own), rtol=1e-4, atol=1e-6)
    clipped = measuring.gradients(loss, params, candidates, clip=0.5)
    assert np.linalg.norm(clipped, axis=1) == pytest.approx(
        np.minimum(np.linalg.norm(rows, axis=1), 0.5), rel=1e-4
    )


class Normed(nn.Module):
    """A network with running statistics."""

    sizes: list | None = None  # with one it has no hash

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x.reshape(len(x), -1)))
        return nn.Dense(10)(nn.sigmoid(x))


def test_running_statistics_compile_once(scene):
    """A client who filters every round gets others in each."""
    network, pool = scene
    module, candidates = Normed(), network.normalize(pool)
    variables = module.init(jax.random.key(0), candidates.images[:1])
    for scale in (1.0, 4.0):
        moved = {**variables, "batch_stats": optax.tree.scale(scale, variables["batch_stats"])}
        own = games.network(Normed(), moved, network.normalization)
        rows = measuring.gradients(own.loss, own.params, candidates)
        loss, one = client.loss_fn(module, moved), (candidates.images[5:6], candidates.labels[5:6])
        wanted, _ = client.gradient(loss, own.params, *one)
        np.testing.assert_allclose(rows[5], measuring.flat(wanted), rtol=1e-4, atol=1e-6)
        updates = jax.tree.map(lambda x: x[None], own.params)
        (found,) = measuring.scores(own.loss, own.params, candidates, updates)
        wanted = rows @ measuring.flat(own.params)
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)
    assert measuring._compiled_pass(own.loss.func, None)._cache_size() == 1
    assert measuring._compiled_scores(own.loss.func)._cache_size() == 1


def test_a_module_without_a_hash_has_a_loss(scene):
    network, pool = scene
    candidates = network.normalize(pool)
    variables = Normed().init(jax.random.key(0), candidates.images[:1])
    losses = [
        games.network(module, variables, network.normalization).loss(
            variables["params"], candidates.images[:2], candidates.labels[:2]
        )[0]
        for module in (Normed([1]), Normed())
    ]
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize("method", ["omp", "ridge", "slab"])
def test_names_every_image_without_noise(scene, method):
    members = games.draw(4, 5, N)
    outcome = games.count(play(scene, members, images=5, method=method))
    assert outcome.recall.value == 1
    assert outcome.chance == 5 / N
    assert outcome.true_positives[0.01].value == 1


def test_matched_filter_names_one_image(scene):
    played = play(scene, games.draw(8, 1, N), method="matched")
    assert games.count(played).recall.value == 1
    # An update of one image alone has a cosine of 1 to that image's gradient.
    assert played.scores[np.arange(8), played.members[:, 0]] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", list(ident.METHODS))
def test_a_shuffled_update_gives_chance(method):
    """Gradients and updates that have nothing to do with one another; 600 games of 4 in 40."""
    random = np.random.default_rng(3)
    rows = random.normal(size=(40, 200)).astype(np.float32)
    members = games.draw(600, 4, 40)
    updates = rows[members].mean(axis=1)
    updates = random.permuted(updates, axis=1)  # the same numbers elsewhere
    products = measuring.Products(
        rows @ rows.T, updates @ rows.T, np.square(updates).sum(axis=1), rows.shape[1]
    )
    ranking = ident.identify(products, 4, method, weight=1 / 4)
    played = games.Played(members, np.asarray(ranking.scores), np.asarray(ranking.picks))
    outcome = games.count(played)
    assert outcome.recall.low < outcome.chance < outcome.recall.high
    assert outcome.recall.high - outcome.recall.low < 0.1


def test_all_methods_agree_on_orthogonal_gradients():
    rows = 3 * np.eye(12, dtype=np.float32)[:10]
    members = np.array([[1, 4, 7]])
    updates = rows[members].mean(axis=1)
    products = measuring.Products(rows @ rows.T, updates @ rows.T, np.square(updates).sum(1), 12)
    for method in ident.METHODS:
        picks = ident.identify(products, 3, method, weight=1 / 3).picks
        assert sorted(np.asarray(picks)[0]) == [1, 4, 7]


def test_ridge_is_the_best_linear_estimate():
    """Log-odds against the textbook's, x = m + t K (t K^2 + v K)^-1 (c - K m)."""
    random = np.random.default_rng(9)
    rows = (random.normal(size=(12, 30)) * random.uniform(0.5, 2, (12, 1))).astype(np.float32)
    update = rows[[2, 5]].mean(axis=0, keepdims=True) + 0.3 * random.normal(size=(1, 30))
    products = measuring.Products(rows @ rows.T, update @ rows.T, np.square(update).sum(1), 30)
    found = np.asarray(ident.identify(products, 2, "ridge", 0.5, variance=0.09).scores)[0]
    gram, share = (rows @ rows.T).astype(np.float64), 2 / 12
    prior, mean = 0.25 * share * (1 - share), np.full(12, 0.5 * share)
    gain = prior * gram @ np.linalg.inv(prior * gram @ gram + 0.09 * gram)
    x = mean + gain @ (update[0] @ rows.T - gram @ mean)
    seen = np.diagonal(gain @ gram)
    expected = 0.5 / prior * (x - mean - 0.5 * seen / 2)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def success_of_simulation(gram, images, variance, games_, method="matched"):
    members = games.draw(games_, images, len(gram))
    played = games.simulate(np.float32(gram), games.root(gram), 500, members, method, variance)
    return games.count(played).recall


def test_simulated_noise_is_that_of_the_gradients():
    """Orthonormal gradients: theory. Two at a distance d: told apart with Phi(d / 2 sigma)."""
    grid = np.linspace(-8, 12, 4001)
    expected = np.trapezoid(stats.norm.pdf(grid - 2) * special.ndtr(grid) ** 49, grid)
    found = success_of_simulation(np.eye(50), 1, 0.25, 4000)
    assert abs(found.value - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5
    near = np.array([[1.0, 0.9], [0.9, 1.0]])
    expected = special.ndtr(0.2**0.5 / 2 / 0.3)
    found = success_of_simulation(near, 1, 0.09, 4000)
    assert abs(found.value - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5


def test_simulated_games_are_those_of_clients(scene):
    """Under hardly any noise the scores are those of the update without."""
    network, pool = scene
    rows = measuring.gradients(network.loss, network.params, network.normalize(pool))
    members = games.draw(3, 3, N)
    gram = rows @ rows.T
    known = gram, games.root(gram), rows.shape[1]
    quick = games.simulate(*known, members, "matched", 1e-12)
    slow = play(scene, members, images=3, method="matched")
    np.testing.assert_allclose(quick.scores, slow.scores, atol=1e-4)
    noisy = games.simulate(*known, members, "slab", variance=1e4)
    assert games.count(noisy).recall.value < 1


def test_products_a_slice_at_a_time_are_exact(scene):
    network, pool = scene
    of = network.loss, network.params, network.normalize(pool)
    rows = measuring.gradients(*of)
    found = measuring.gram(*of, stored=rows.nbytes / 3.5)
    np.testing.assert_allclose(found, rows @ rows.T, rtol=1e-4, atol=1e-6)


# --- More candidates than a method sees -----------------------------------------------------------


@pytest.mark.parametrize("defense", ["none", "prune:0.5", "quantize:8", "clip:0.01"])
def test_a_shortlist_holds_the_images(scene, defense):
    members = games.draw(3, 3, N)
    played = play(scene, members, images=3, defense=defense, shortlist=24)
    assert games.count(played).recall.value == 1
    # All others stand behind the shortlist.
    order = np.sort(played.scores, axis=1)
    assert (order[:, :-24] <= order[:, -24:-23]).all()
    assert np.isfinite(played.scores).all()


def test_known_gradients_give_the_same_shortlist(scene):
    """Of gradients that were kept and of one pass over the candidates, with a defense's scales."""
    network, pool = scene
    candidates = network.normalize(pool)
    members = games.draw(3, 3, N)
    for defense in ("none", "prune:0.5", "quantize:8"):
        rules = games.Rules(3, "slab", defense, shortlist=16)
        kept = games.play(*scene, members, rules, games.known_rows(network, candidates))
        passed = games.play(*scene, members, rules)
        np.testing.assert_array_equal(np.sort(kept.picks), np.sort(passed.picks))
        own = [np.take_along_axis(x.scores, members, axis=1) for x in (kept, passed)]
        np.testing.assert_allclose(*own, rtol=0.05)


FOLLOWING = ["noise:1e-4", "laplace:1e-4", "clip:0.1", "prune:0.5", "prune-layer:0.5", "top-k:20"]
FOLLOWING += ["sign", "quantize:8", "relative:0.5"]


def test_all_that_may_follow_are_tried():
    """So that one which asks for more than the update is found."""
    names = {part.partition(":")[0] for part in FOLLOWING}
    assert names == set(defenses.DEFENSES) - {"dpsgd", "soteria"}


@pytest.mark.parametrize("defense", ["none", *FOLLOWING])
def test_a_defense_may_follow(scene, defense):
    """Updates defended afterwards, by the same draws, are those of clients who defend."""
    members, rules = games.draw(3, 3, N), games.Rules(3, defense=defense)
    assert games.may_follow(rules)
    bare = games.share(*scene, members, games.Rules(3)).targets
    wanted, found = games.share(*scene, members, rules).targets, games.send(bare, rules)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, wanted)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for other in (games.Rules(3, defense="dpsgd:1:1"), games.Rules(3, defense="soteria:0.5")):
        assert not games.may_follow(other)
    assert not games.may_follow(games.Rules(2, defense="sign", local=client.Local(2)))


def test_private_updates_of_kept_gradients(scene):
    """Without noise those of clients with DP-SGD; with it, noise of the stated size around them."""
    network, pool = scene
    candidates = network.normalize(pool)
    rows, members = games.known_rows(network, candidates)(), games.draw(3, 3, N)
    norms = np.linalg.norm(rows.rows, axis=1)
    clip = float(np.median(norms))

    def sent(multiplier):
        rules = games.Rules(3, defense=f"dpsgd:{clip}:{multiplier}")
        own = games.send_private(rows, network.params, pool.labels, members, rules)
        return own, games.share(*scene, members, rules).targets

    own, wanted = sent(0)
    for x, y in zip(*(jax.tree.leaves(t.update) for t in (own, wanted))):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6)
    noisy, wanted = sent(2)
    noise = np.concatenate(
        [np.ravel(x - y) for x, y in zip(*(jax.tree.leaves(t.update) for t in (noisy, own)))]
    )
    np.testing.assert_allclose(noise.std(), 2 * clip / 3, rtol=0.02)
    of_games = [x - y for x, y in zip(*(jax.tree.leaves(t.update) for t in (noisy, own)))]
    assert np.abs(of_games[-1][0] - of_games[-1][1]).max() > 0.1 * noise.std()
    for name in ("strengths", "variances"):
        both = (getattr(t.defense_knowledge, name) for t in (noisy, wanted))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), *both)


def test_one_that_was_left_out_stands_out_of_the_rest():
    """Ten candidates alike hide an eleventh of the update from the first shortlist of ten."""
    random = np.random.default_rng(11)
    rows = random.normal(size=(30, 60)).astype(np.float32)
    rows[:10] = rows[0] + 0.4 * rows[:10]
    rows[20] *= 0.3
    update = rows[[3, 20]].mean(axis=0, keepdims=True)
    measured = measuring.Measured(
        *(rows, None, None, np.square(rows).sum(1), update @ rows.T, np.square(update).sum(1), 60)
    )
    first = measured.cross[0] / np.sqrt(measured.squares)
    assert 20 not in np.argsort(-first)[:10]
    found = ident.identify_among(measured, 2, "slab", 1 / 2, most=10)
    assert sorted(found.picks[0]) == [3, 20]


def test_a_shortlist_of_all_is_no_shortlist(scene):
    members = games.draw(3, 3, N)
    whole, short = (play(scene, members, images=3, shortlist=n) for n in (N, N - 1))
    np.testing.assert_array_equal(np.sort(whole.picks), np.sort(short.picks))


def test_too_many_candidates_are_not_kept(scene, monkeypatch):
    network, pool = scene
    candidates = network.normalize(pool)
    assert games.known_rows(network, candidates) is not None
    monkeypatch.setattr(measuring, "STORED", 1000)
    assert games.known_rows(network, candidates) is None
    outcome = games.count(play(scene, games.draw(3, 3, N), images=3, shortlist=16))
    assert outcome.recall.value == 1


def test_too_many_candidates_are_named_by_exact_products(scene, monkeypatch):
    """In as many passes as the study has time for: what the kept gradients say."""
    network, pool = scene
    members, rules = games.draw(3, 3, N), games.Rules(3, "ridge")

    def played():
        return Scene("tiny", network, pool, None, False).play_exactly(members, rules)

    kept = played()
    monkeypatch.setattr(measuring, "STORED", 4 * N * 1000)
    monkeypatch.setattr(measuring, "SKETCH", 60)
    found = played()
    np.testing.assert_array_equal(np.sort(found.picks), np.sort(kept.picks))
    np.testing.assert_allclose(found.scores, kept.scores, atol=0.05 * np.abs(kept.scores).max())


def test_gradients_that_are_nearly_the_same_are_told_apart():
    """As an untrained MobileNetV2's: what tells them apart is lost in a linear estimate."""
    random = np.random.default_rng(0)
    count, entries = 400, 500
    apart = random.normal(size=(count, entries)) * 0.985 ** np.arange(entries)
    rows = np.float32(random.normal(size=entries) + 0.03 * apart)
    members = games.draw(20, 4, count)
    updates = rows[members].mean(axis=1)
    products = measuring.Products(
        rows @ rows.T, updates @ rows.T, np.square(updates).sum(axis=1), entries
    )

    def recall(method):
        ranking = ident.identify(products, 4, method, 1 / 4)
        played = games.Played(members, np.asarray(ranking.scores), np.asarray(ranking.picks))
        return games.count(played).recall.value

    assert recall("slab") > 0.9
    assert recall("ridge") < 0.5


def test_swaps_repair_a_greedy_choice():
    """The candidate (1, 1) explains most of (1, 0) + (0, 1), and has no part in it."""
    rows = np.float32([[1, 0, 0], [0, 1, 0], [1, 1, 0.05], [0, 0, 1]])
    update = rows[[0, 1]].mean(axis=0, keepdims=True)
    products = measuring.Products(rows @ rows.T, update @ rows.T, np.square(update).sum(1), 3)
    gram, cross = jnp.asarray(products.gram), jnp.asarray(products.cross[0])
    own = measuring.Products(gram, cross, products.power[0], 3)
    assert 2 in np.asarray(ident._greedy(own, 2, 0.5))
    assert sorted(np.asarray(ident.identify(products, 2, "omp", 0.5).picks)[0]) == [0, 1]


def test_slab_explains_what_a_greedy_choice_does_where_gradients_are_dependent():
    """An image's gradients with all its labels, weighted by their probabilities, add up to zero.

    Of so many solutions of least squares none need be near the images.
    """
    images, classes, batch = 80, 4, 8
    left: dict[str, list] = {"omp": [], "slab": []}
    for seed in range(10):
        random = np.random.default_rng(seed)
        errors = random.dirichlet(np.full(classes, 5.0), images)[:, None] - np.eye(classes)
        features = random.standard_normal((images, 20))
        rows = np.einsum("icd,if->icdf", errors, features).reshape(images * classes, -1)
        members = random.choice(images, batch, replace=False)
        update = rows[members * classes + random.integers(0, classes, batch)].mean(axis=0)
        products = measuring.Products(
            np.float32(rows @ rows.T),
            np.float32(rows @ update)[None],
            np.float32([update @ update]),
            rows.shape[1],
        )
        for method, lengths in left.items():
            picks = np.asarray(ident.identify(products, batch, method, 1 / batch).picks[0])
            lengths.append(np.linalg.norm(update - rows[picks].sum(axis=0) / batch))
    assert np.all(np.array(left["slab"]) <= np.array(left["omp"]) + 1e-6)
    assert np.sum(np.array(left["slab"]) < 1e-6) >= 8


def test_unknown_weight_finds_the_same_images(scene):
    members = games.draw(3, 3, N)
    played = play(scene, members, images=3, method="omp", defense="clip:0.01")
    assert games.count(played).recall.value == 1


def test_named_under_noise_as_often_as_theory_says():
    """Orthonormal gradients: the best of N is the true one with probability E Phi(t + d)^(N-1)."""
    random = np.random.default_rng(4)
    count, spread, total = 50, 0.5, 4000
    members = games.draw(total, 1, count)
    noise = spread * random.normal(size=(total, count))
    updates = (np.eye(count)[members[:, 0]] + noise).astype(np.float32)
    products = measuring.Products(
        np.eye(count, dtype=np.float32), updates, np.square(updates).sum(1), count
    )
    for method in ("matched", "omp", "ridge", "slab"):
        ranking = ident.identify(products, 1, method, weight=1.0, variance=spread**2)
        hits = (np.asarray(ranking.picks)[:, 0] == members[:, 0]).sum()
        grid = np.linspace(-8, 12, 4001)
        expected = np.trapezoid(
            stats.norm.pdf(grid - 1 / spread) * special.ndtr(grid) ** (count - 1), grid
        )
        share = clopper_pearson(int(hits), total, level=0.999)
        assert share.low < expected < share.high, method


def test_pruned_updates_are_compared_where_they_were_sent(scene):
    members = games.draw(3, 3, N)
    outcome = games.count(play(scene, members, images=3, defense="prune:0.9"))
    assert outcome.recall.value == 1


def test_known_dp_noise_and_clipping(scene):
    """Little noise on clipped gradients: named; much: not."""
    members = games.draw(6, 1, N)
    for multiplier, low, high in ((0.05, 1, 1), (1e4, 0, 0.5)):
        outcome = games.count(play(scene, members, defense=f"dpsgd:1:{multiplier}"))
        assert low <= outcome.recall.value <= high


@pytest.mark.parametrize("kept", [False, True])
def test_a_layer_that_was_perturbed_is_left_out(scene, kept):
    """Soteria's zeros in the classifier are no measurement, and the other layers say enough."""
    network, pool = scene
    rows = games.known_rows(network, network.normalize(pool)) if kept else None
    rules = games.Rules(3, defense="soteria:0.5")
    outcome = games.count(games.play(*scene, games.draw(3, 3, N), rules, rows))
    assert outcome.recall.value == 1


def test_quantized_updates_are_weighted_by_layer(scene):
    members = games.draw(3, 3, N)
    outcome = games.count(play(scene, members, images=3, defense="quantize:4", method="slab"))
    assert outcome.recall.value == 1


@pytest.mark.parametrize("defense", ["quantize:4", "prune:0.9", "dpsgd:0.5:0.01"])
def test_kept_gradients_give_the_products_of_a_pass(scene, defense, monkeypatch):
    """Weights, masks and clipping are put on what was kept; a pass computes them anew."""
    network, _ = scene
    members = games.draw(3, 3, N)
    seen = []

    def note(measured, *rest):
        seen.append(measured.products())
        return ident.identify(seen[-1], *rest[:-1])

    monkeypatch.setattr(ident, "identify_among", note)
    rules, candidates = games.Rules(3, defense=defense), network.normalize(scene[1])
    for rows in (None, games.known_rows(network, candidates)):
        games.play(*scene, members, rules, rows)
    half = len(seen) // 2
    assert half == (1 if "dpsgd" in defense else 3)
    for of_pass, of_kept in zip(seen[:half], seen[half:]):
        scale = np.abs(of_pass.gram).max()
        np.testing.assert_allclose(of_kept.gram, of_pass.gram, rtol=1e-4, atol=1e-5 * scale)
        np.testing.assert_allclose(of_kept.cross, of_pass.cross, rtol=1e-3, atol=1e-5 * scale)


def test_local_steps_by_the_midpoint(scene):
    members = games.draw(3, 4, N)
    local = client.Local(epochs=4)
    outcome = games.count(play(scene, members, images=4, local=local, client_lr=0.05))
    assert outcome.recall.value == 1
    # To first order the sum of the steps' gradients is the midpoint's, times epochs / batch.
    network, pool = scene
    shared = games.share(*scene, members, games.Rules(4, local=local, client_lr=0.01))
    update = jax.tree.map(lambda x: x[0], shared.targets.update)
    errors = []
    for at in (network.params, measuring.midpoint(network.params, update, 0.01, 4)):
        rows = measuring.gradients(network.loss, at, network.normalize(pool))
        errors.append(np.linalg.norm(rows[members[0]].mean(0) * 4 - measuring.flat(update)))
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("images", [1, 4])
def test_unknown_labels_are_tried_all(scene, images):
    members = games.draw(4, images, N)
    outcome = games.count(play(scene, members, images=images, classes=10))
    assert outcome.candidates == N
    assert outcome.recall.value == 1


def test_an_image_is_named_once_whatever_its_labels():
    """Of three images with two labels each: the first twice, then the best of the others."""
    scores = np.array([[9.0, 8, 1, 2, 0, 3]])
    found = ident.best_of_labels(ident.Ranking(scores, np.array([[0, 1]])), 2)
    np.testing.assert_array_equal(found.scores, [[9, 2, 3]])
    np.testing.assert_array_equal(found.picks, [[0, 2]])
    # A pick stands before what scores higher.
    found = ident.best_of_labels(ident.Ranking(scores, np.array([[2, 0]])), 2)
    np.testing.assert_array_equal(np.sort(found.picks), [[0, 1]])


def test_sketch_keeps_inner_products_and_sums():
    random = np.random.default_rng(5)
    rows = random.normal(size=(30, 40_000)).astype(np.float32)
    small = measuring.sketch(rows, 4096)
    np.testing.assert_allclose(
        small[:3].sum(0), measuring.sketch(rows[:3].sum(0)[None], 4096)[0], rtol=1e-3, atol=1e-3
    )
    norms = np.linalg.norm(rows, axis=1)
    error = (small @ small.T - rows @ rows.T) / norms[:, None] / norms
    spread = error[np.triu_indices(30, 1)].std()
    assert spread == pytest.approx(4096**-0.5, rel=0.2)


def test_sketched_candidates_are_named_all_the_same(scene, monkeypatch):
    monkeypatch.setattr(measuring, "SKETCH", 256)
    network, pool = scene
    members = games.draw(3, 3, N)
    shared = games.share(*scene, members, games.Rules(images=3))
    measured = measuring.measure(
        network.loss, network.params, network.normalize(pool), shared.targets.update, stored=0
    )
    assert measured.rows.shape == (N, 256)
    picks = np.asarray(ident.identify_among(measured, 3, "omp", 1 / 3).picks)
    assert (np.sort(picks) == np.sort(members)).all()


def test_an_update_without_candidates_has_no_high_score():
    """Images of others resemble candidates of larger gradients, but leave most of their update."""
    random = np.random.default_rng(10)
    alike = random.normal(size=(60, 200)) + 2 * random.normal(size=200)
    rows = np.float32(alike * random.uniform(0.1, 2, (60, 1)))
    found = []
    for members in (games.draw(50, 4, 40), 40 + games.draw(200, 4, 20)):
        updates, known = rows[members].mean(axis=1), rows[:40]
        power = np.square(updates).sum(axis=1)
        products = measuring.Products(known @ known.T, updates @ known.T, power, 200)
        ranking = ident.identify(products, 4, "slab", weight=1 / 4)
        found.append(games.Played(members, np.asarray(ranking.scores), np.asarray(ranking.picks)))
    own, empty = found
    share, _ = games.found_without_alarm(own, empty.scores)
    assert share.value == 1


def test_a_sketched_problem_is_solved_exactly(scene, monkeypatch):
    """Least squares of 48 unknowns in 56 sums, each far off: nothing is lost without noise."""
    monkeypatch.setattr(measuring, "SKETCH", 56)
    network, pool = scene
    members = games.draw(3, 3, N)
    shared = games.share(*scene, members, games.Rules(images=3))
    measured = measuring.measure(
        network.loss, network.params, network.normalize(pool), shared.targets.update, stored=0
    )
    picks = np.asarray(ident.identify_among(measured, 3, "ridge", 1 / 3).picks)
    assert (np.sort(picks) == np.sort(members)).all()


def test_threshold_that_one_in_a_hundred_empty_updates_reaches():
    random = np.random.default_rng(6)
    empty = random.normal(size=(1000, 20))
    members = np.zeros((500, 1), int)
    scores = random.normal(size=(500, 20))
    scores[:, 0] += 3.0
    share, threshold = games.found_without_alarm(games.Played(members, scores, members), empty)
    # The largest of 20 normals exceeds t in 1% of the updates: 1 - Phi(t)^20 = 0.01.
    assert threshold == pytest.approx(stats.norm.ppf(0.99 ** (1 / 20)), abs=0.3)
    assert share.low < stats.norm.sf(stats.norm.ppf(0.99 ** (1 / 20)) - 3) < share.high


def test_variants_and_nearest():
    images = np.random.default_rng(7).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    found = games.variants(images)
    assert (found["flipped"][:, :, ::-1] == images).all()
    assert (found["one pixel down"][:, 1:] == images[:, :-1]).all()
    labels = np.array([0, 1, 0, 0, 1, 0])
    images[3] = images[0]
    assert games.nearest(images, labels, 0, 2).tolist() == [0, 3]
    assert labels[games.nearest(images, labels, 0, 4)].tolist() == [0] * 4


# --- Intervals ----------------------------------------------------------------------------------


def test_clopper_pearson_is_scipys():
    for k, n in ((0, 10), (3, 10), (10, 10), (95, 200)):
        expected = stats.binomtest(k, n).proportion_ci(0.95, "exact")
        assert clopper_pearson(k, n)[1:3] == pytest.approx(tuple(expected), abs=1e-12)


def test_interval_of_a_mean_covers():
    """Means of (0, 1/4, ..., 1), all images of an update failing together: hard and covered."""
    random = np.random.default_rng(8)
    values = (random.random((2000, 30)) < 0.9) * 0.75 + 0.25 * (random.random((2000, 30)) < 0.5)
    truth = 0.9 * 0.75 + 0.125
    held = [s.low <= truth <= s.high for s in map(mean_share, values)]
    assert np.mean(held) > 0.95
    # Zeros and ones alone are counted exactly.
    assert mean_share(np.array([1, 0, 1, 1.0])) == clopper_pearson(3, 4)
