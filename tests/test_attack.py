"""The attack: schedules, priors and objectives in closed form; the loop's promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import client, metrics
from jaxinv.attacks import base, labels
from jaxinv.attacks import gradient_matching as attack
from jaxinv.attacks.objectives import compare, cosine, l2
from jaxinv.attacks.priors import total_variation
from jaxinv.engine import trials
from jaxinv.types import Normalization, Target


def test_step_schedule_drops_at_the_published_milestones():
    # floor(4800 / 2.667), floor(4800 / 1.6), floor(4800 / 1.142)
    steps = np.array([0, 1798, 1799, 2999, 3000, 4202, 4203, 4799])
    factors = jax.jit(jax.vmap(lambda s: attack.step_decay(s, jnp.int32(4800))))(steps)
    np.testing.assert_allclose(factors, [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-5)


def test_cosine_schedule_warms_up_and_ends_at_zero():
    steps = np.array([0, 49, 150, 250])
    factors = jax.jit(jax.vmap(lambda s: attack.cosine_decay(s, jnp.int32(250))))(steps)
    np.testing.assert_allclose(factors, [0.02, 1, 0.5, 0], atol=1e-6)


def test_total_variation_is_means_without_padding():
    images = jnp.arange(6.0).reshape(1, 2, 3, 1)  # rows differ by 3, columns by 1
    assert float(total_variation(images)) == 4.0


def test_objectives_in_closed_form():
    a = {"w": jnp.array([[3.0, 0.0]]), "b": jnp.array([0.0])}
    b = {"w": jnp.array([[0.0, 0.0]]), "b": jnp.array([2.0])}
    both = {"w": a["w"], "b": b["b"]}
    # One cosine over all leaves, not a mean of one per leaf.
    seven = jax.tree.map(lambda x: 7 * x, a)
    values = jax.jit(
        lambda: (cosine(compare(a, both)), cosine(compare(a, seven)), l2(compare(a, b)))
    )()
    np.testing.assert_allclose(values, [1 - 3 / 13**0.5, 0, 13], rtol=1e-6, atol=1e-6)


def test_signed_adam_takes_steps_of_the_learning_rate_inside_the_box():
    """With a constant sign Adam moves by exactly lr; the box stops it at pixel 0 and 1."""
    normalization = Normalization(jnp.zeros(1), jnp.ones(1))
    params = {"w": jnp.ones(4)}

    # The loss is -log softmax of (w.x, 0): its gradient points along x, so that the cosine
    # against all-ones pulls every pixel the same way.
    def logits(p, x):
        return jnp.stack([x.reshape(1, 4) @ p["w"], jnp.zeros(1)], axis=-1)

    loss = client.loss_fn(lambda p, x, y: client.cross_entropy(logits(p, x), y), {})
    target = Target({"w": jnp.array([1.0, 1.0, 1.0, -1.0])}, jnp.array([1]))
    method = attack.Method(schedule="constant", priors=())
    numbers = attack.Numbers(jnp.float32(0.25), jnp.float32(1), {}, jnp.int32(3))
    known = base.Known(loss, params, target, normalization, None)
    initial = base.Candidate(jnp.array([0.2, 0.3, 0.4, 0.9]).reshape(1, 2, 2, 1), None)
    state = method.init(numbers, None, (1, 2, 2, 1), known, initial)
    step = jax.jit(lambda i, s: method.step(numbers, known, i, s))
    seen = []
    for i in range(5):
        state, _ = step(jnp.int32(i), state)
        seen.append(np.asarray(state.candidate.images).ravel())
    np.testing.assert_allclose(seen[0], [0.45, 0.55, 0.65, 0.65], atol=1e-5)
    np.testing.assert_allclose(seen[2][:3], [0.95, 1.0, 1.0], atol=1e-5)
    np.testing.assert_array_equal(seen[2], seen[4])  # three iterations, then it only evaluates


def test_image_gradient_of_the_objective_against_finite_differences(problem):
    """Second-order differentiation through the whole network, in float64."""
    with jax.enable_x64(True):

        def cast(tree):
            return jax.tree.map(
                lambda x: (
                    jnp.asarray(np.asarray(x), jnp.float64)
                    if jnp.issubdtype(x.dtype, jnp.floating)
                    else jnp.asarray(np.asarray(x))
                ),
                tree,
            )

        variables = cast(problem.victim.variables)
        target = cast(jax.tree.map(lambda x: x[0], problem.targets))
        loss = client.loss_fn(problem.victim.module, variables)
        image, direction = np.random.default_rng(0).normal(size=(2, 1, *problem.shape))

        @jax.jit
        def objective(x):
            update, _ = client.gradient(loss, variables["params"], x, target.labels)
            return cosine(compare(update, target.update))

        slope = float(jnp.sum(jax.jit(jax.grad(objective))(image) * direction))
        h = 1e-5
        difference = (objective(image + h * direction) - objective(image - h * direction)) / (2 * h)
        np.testing.assert_allclose(slope, difference, rtol=1e-7)


def test_objective_is_zero_at_the_truth(problem):
    truth = jax.tree.map(lambda x: x[0], problem.truths)
    target = jax.tree.map(lambda x: x[0], problem.targets)
    loss = client.loss_fn(problem.victim.module, problem.victim.variables)

    @jax.jit
    def objective(params):
        images = problem.normalization.normalize(truth.images)
        update, _ = client.update(loss, params, images, truth.labels)
        return cosine(compare(update, target.update))

    assert abs(float(objective(problem.victim.variables["params"]))) < 1e-6


def test_a_trial_alone_equals_the_same_trial_in_a_batch(problem, result):
    """Other targets, other seeds, and the grouping change nothing but the last bits."""

    def one(tree):
        return jax.tree.map(lambda x: x[1:], tree)

    alone = problem.run(
        targets=one(problem.targets),
        truths=one(problem.truths),
        keys=problem.keys[1:, 2:3],
        group=1,
    )
    np.testing.assert_allclose(alone.pixels[0, 0], result.pixels[1, 2], atol=2e-4)
    np.testing.assert_allclose(alone.objective[0, 0], result.objective[1, 2], rtol=1e-3)


def test_four_devices_equal_one_bit_for_bit(problem, result):
    """Also that replicated parameters get no gradient summed over the devices."""
    shared = problem.run(devices=4)
    np.testing.assert_array_equal(shared.pixels, result.pixels)
    np.testing.assert_array_equal(shared.trace.objective, result.trace.objective)


def test_a_group_beyond_the_memory_is_halved_and_changes_nothing(problem, result, monkeypatch):
    small = problem.run(memory=result.bytes - 1)
    assert (result.plan.seeds_at_once, small.plan.seeds_at_once) == (2, 1)
    assert small.bytes < result.bytes
    np.testing.assert_allclose(small.pixels, result.pixels, atol=2e-4)
    np.testing.assert_allclose(small.objective, result.objective, rtol=1e-3)

    chunk = trials.run_chunk

    class RunsOut:
        """A device that is found full by the second chunk of groups of two."""

        lower = chunk.lower

        def __call__(self, *args):
            states, start = args[-1], args[-5]
            if states.candidate.images.shape[2] == 2 and start > 0:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return chunk(*args)

    monkeypatch.setattr(attack.Method, "steps_per_call", 5)
    expected = problem.run(group=1)
    monkeypatch.setattr(trials, "run_chunk", RunsOut())
    found = problem.run(group=2)
    assert found.plan.seeds_at_once == 1
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    np.testing.assert_array_equal(found.trace.objective, expected.trace.objective)


def test_one_bad_target_leaves_the_others_alone(problem, result):
    """NaN in one target's update: its trials say so, all others keep every bit."""
    poisoned = problem.targets._replace(
        update=jax.tree.map(lambda x: x.at[0].set(jnp.nan), problem.targets.update)
    )
    spoiled = problem.run(targets=poisoned)
    assert not spoiled.finite[0].any()
    assert spoiled.finite[1].all()
    np.testing.assert_array_equal(spoiled.pixels[1], result.pixels[1])


def test_the_truth_changes_measurements_only(problem, result):
    other = problem.run(truths=problem.truths._replace(images=1 - problem.truths.images))
    np.testing.assert_array_equal(other.pixels, result.pixels)
    np.testing.assert_array_equal(other.objective, result.objective)
    assert not np.allclose(other.scores.psnr, result.scores.psnr)


def test_trace_runs_from_the_start_to_the_last_step(result):
    np.testing.assert_array_equal(result.trace.step, np.arange(13))
    np.testing.assert_allclose(result.trace.psnr[-1], result.scores.psnr, rtol=1e-5)
    assert (result.trace.objective[-1] < result.trace.objective[0]).all()


def test_numbers_share_one_compilation(problem, result):
    before = trials.run_chunk._cache_size()
    problem.run(lr=0.05, iterations=11)
    assert trials.run_chunk._cache_size() == before


def test_every_start_may_have_numbers_of_its_own(problem, result):
    """A candidate of a search is attacked as if it were alone."""
    slow = problem.run(lr=0.05)
    mixed = problem.run(lr=np.array([0.1, 0.05, 0.05, 0.1]))
    for seed, expected in enumerate((result, slow, slow, result)):
        np.testing.assert_array_equal(mixed.pixels[:, seed], expected.pixels[:, seed])
    assert not np.allclose(slow.pixels, result.pixels)


def test_idlg_reads_the_label_off_any_network(problem):
    victim = problem.victim
    for target, truth in ((0, 3), (1, 7)):
        update = jax.tree.map(lambda x: x[target], problem.targets.update)
        found = labels.infer("idlg", victim.module, victim.variables, update, problem.shape, 1)
        assert found.tolist() == [truth]


@pytest.mark.parametrize("sign", ["hard", "soft", "none"])
def test_signs_keep_the_direction(sign):
    gradient = jnp.array([-3.0, 0.0, 1e-3])
    out = attack.SIGNS[sign](gradient, jnp.float32(0.5))
    np.testing.assert_array_equal(jnp.sign(out), jnp.sign(gradient))


def test_of_another_images_gradient_another_image_comes(problem):
    """Negative control: the objective falls as far, and nothing of the image is there."""
    swapped = jax.tree.map(lambda x: x[::-1], problem.targets)
    right = problem.run(iterations=200, tv=0.0)
    wrong = problem.run(iterations=200, tv=0.0, targets=swapped)
    baseline = jax.vmap(lambda truth: metrics.mean_color(truth, problem.normalization))
    of_baseline = np.asarray(baseline(problem.truths).psnr)[:, None]
    assert (np.asarray(right.scores.psnr) > of_baseline + 20).all()
    assert (np.asarray(wrong.scores.psnr) < of_baseline + 1).all()  # the margin, in dB
    assert np.abs([right.objective, wrong.objective]).max() < 1e-4


def test_pictures_of_the_way_change_nothing_and_lead_to_the_end(problem):
    plain, kept = problem.run(), problem.run(frames=4)
    np.testing.assert_array_equal(plain.pixels, kept.pixels)
    np.testing.assert_array_equal(plain.trace.psnr, kept.trace.psnr)
    assert plain.frames.pixels.shape[0] == 0
    assert kept.frames.step.tolist() == trials.frame_steps(12, 4) == [0, 1, 2, 5]
    # What was kept after five steps is where an attack with the same first five steps stands.
    pixels = kept.frames.pixels / 255
    psnr = -10 * np.log10(
        np.square(pixels - problem.truths.images[:, None]).mean(axis=(3, 4, 5, 6))
    )
    np.testing.assert_allclose(psnr[:, :, :], kept.trace.psnr[kept.frames.step], atol=0.05)
