"""Training: the loop against plain optax, and the command, killed, resumed and diverging."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinv import load_victim, train
from jaxinv.errors import UserError
from jaxinv.privacy import accounting
from jaxinv.privacy.gradient import add_noise
from jaxinv.types import Normalization
from jaxinv.victim import checkpoints, training
from jaxinv.victim.untrained import untrained

# Tiles at batch 128, so that an epoch has a handful of steps.
FLAGS = ["--model", "lenet_zhu", "--dataset", "tiles", "--epochs", "3", "--lr", "0.02"]


def test_schedules_have_their_published_values():
    def rate(name, step, n=1000):
        return float(training.Recipe(n, 0.1, name, False, "float32").rate(step))

    np.testing.assert_allclose(
        [rate("step", s) for s in (0, 374, 375, 625, 875)], [0.1, 0.1, 1e-2, 1e-3, 1e-4], rtol=1e-5
    )
    np.testing.assert_allclose(rate("cosine", 499.5), 0.05, rtol=1e-5)
    np.testing.assert_allclose(rate("one-cycle", 249.5), 0.1, rtol=1e-5)
    np.testing.assert_allclose(rate("one-cycle", 124.5), 0.05, rtol=1e-5)
    assert rate("one-cycle", 999) < 1e-6


def test_steps_equal_plain_optax_written_out():
    keys = jax.random.split(jax.random.key(0))
    data = training.Data(
        jax.random.randint(keys[0], (12, 8, 8, 3), 0, 256).astype(jnp.uint8), jnp.arange(12) % 3
    )
    normalization = Normalization(jnp.full(3, 0.5), jnp.full(3, 0.25))
    victim = untrained("lenet_zhu", classes=3, width=None, seed=0, image_shape=(8, 8, 3))
    recipe = training.Recipe(4, 0.1, "cosine", False, "float32")
    order = jnp.asarray(training.epoch_order(0, 0, 12, 4))
    assert sorted(order.ravel().tolist()) == list(range(12))
    params = victim.variables["params"]
    momentum = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def gradient(params, batch):
        def loss(p):
            logits = victim.module.apply(
                {"params": p}, normalization.normalize(data.images[batch] / 255)
            )
            labels = data.labels[batch]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.grad(loss)(params)

    for step in range(3):
        rate = 0.05 * (1 + np.cos(np.pi * (step + 0.5) / 4))
        g = jax.tree.map(lambda g, p: g + 5e-4 * p, gradient(params, order[step]), params)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, g)
        params = jax.tree.map(lambda p, m, g: p - rate * (0.9 * m + g), params, momentum, g)

    state = training.start(recipe, victim.variables)
    for first, last in ((0, 1), (1, 3)):
        state, sums = training.run_steps(
            victim.module, recipe, state, data, normalization, order, keys[1], first, last
        )
    assert int(state.step) == 3
    assert bool(sums.finite)
    for ours, plain in zip(
        jax.tree.leaves(state.variables["params"]), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(ours, plain, rtol=2e-5, atol=2e-6)


def test_augmentation_shifts_by_up_to_four_and_mirrors_half():
    # Each pixel holds its own position, so a crop can be read back; the border is 0.
    rows, columns = jnp.meshgrid(jnp.arange(1.0, 13), jnp.arange(1.0, 13), indexing="ij")
    image = jnp.stack([rows, columns], -1)
    out = np.asarray(
        jax.jit(training.augment)(jnp.broadcast_to(image, (400, 12, 12, 2)), jax.random.key(0))
    )
    middle = out[:, 4:8, 4:8]  # out of the border's reach
    mirrored = middle[:, 0, 1, 1] < middle[:, 0, 0, 1]
    assert 0.4 < mirrored.mean() < 0.6  # 4 standard errors of 400 coins
    upright = np.where(mirrored[:, None, None, None], out[:, :, ::-1], out)[:, 4:8, 4:8]
    shifts = upright[:, 0, 0] - 5
    assert set(map(tuple, shifts)) <= {(i, j) for i in range(-4, 5) for j in range(-4, 5)}
    assert shifts.min() == -4
    assert shifts.max() == 4
    np.testing.assert_array_equal(upright[:, 3, 3], shifts + 8)


def test_accuracy_counts_the_last_partial_batch():
    class Reader:  # classifies an image by its first pixel's value
        def apply(self, variables, images):
            return jax.nn.one_hot(jnp.round(images[:, 0, 0, 0] * 255).astype(int), 4)

    values = np.arange(300) % 4
    labels = values.copy()
    labels[-30:] = 3 - labels[-30:]  # wrong, all in the second batch of 256
    data = training.Data(
        jnp.asarray(values, jnp.uint8).reshape(-1, 1, 1, 1), jnp.asarray(labels, jnp.int32)
    )
    plain = Normalization(jnp.zeros(1), jnp.ones(1))
    assert training.accuracy(Reader(), {}, data, plain) == pytest.approx(270 / 300)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted training with stops, its folder."""
    folder = tmp_path_factory.mktemp("train") / "whole"
    stops = ["--stop-at", "epoch:0", "step:2", "epoch:1", "accuracy:0.05"]
    assert train.main([*FLAGS, *stops, "--out", str(folder)]) == 0
    return folder


def test_stops_hold_the_network_on_its_way(whole):
    victim = {
        stop: load_victim(whole.with_name(f"whole{stop}"))
        for stop in ("", "-epoch0", "-step2", "-epoch1", "-accuracy0.05")
    }
    start = untrained("lenet_zhu", classes=7, width=None, seed=0, image_shape=(32, 32, 3))
    assert victim["-epoch0"].digest == start.digest
    assert victim["-step2"].info.steps == 2
    assert victim["-epoch1"].info.epochs == 1
    assert victim["-accuracy0.05"].info.test_accuracy >= 0.05
    assert len({v.digest for s, v in victim.items() if s != "-accuracy0.05"}) == 4
    with open(whole / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[-1]["test_accuracy"]) == pytest.approx(victim[""].info.test_accuracy)
    assert not whole.with_name(".whole.training").exists()


def test_bfloat16_storage_halves_a_checkpoint_and_gives_back_the_rounded_network(whole, tmp_path):
    victim = load_victim(whole)
    info = victim.info.model_copy(update={"storage": "bfloat16"})
    rounded = checkpoints.rounded(victim.variables, "bfloat16")
    checkpoints.save(tmp_path / "small", rounded, info, [])
    small = load_victim(tmp_path / "small")
    jax.tree.map(np.testing.assert_array_equal, small.variables, rounded)
    for exact, kept in zip(jax.tree.leaves(victim.variables), jax.tree.leaves(small.variables)):
        assert kept.dtype == np.float32
        np.testing.assert_allclose(kept, exact, rtol=2**-8)
    assert small.digest != victim.digest

    def bytes_of(folder):
        return sum(f.stat().st_size for f in (folder / "arrays").rglob("*") if f.is_file())

    assert bytes_of(tmp_path / "small") < 0.7 * bytes_of(whole)


def test_goes_on_after_a_kill_to_the_same_digest(whole):
    folder = whole.with_name("killed")
    script = (
        "import os, sys\nfrom jaxinv import train\nfrom jaxinv.victim import training\n"
        "train.STEPS_PER_CALL, train.STATE_SECONDS = 2, 0\n"
        "steps = training.run_steps\n"
        "def run(*args):\n"
        "    if int(args[2].step) > 7: os.kill(os.getpid(), 9)\n"  # in the second epoch
        "    return steps(*args)\n"
        "training.run_steps = run\nsys.exit(train.main(sys.argv[1:]))"
    )
    arguments = [*FLAGS, "--out", str(folder)]
    ended = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(train.__file__).parent.parent)},
        capture_output=True,
    )
    assert ended.returncode == -9
    assert not folder.exists()
    states = folder.with_name(".killed.training").glob("step*")
    assert [state.name for state in states] == ["step00000009"]
    assert train.main(arguments) == 0
    killed, never = load_victim(folder), load_victim(whole)
    assert killed.digest == never.digest
    assert killed.info.train_accuracy == never.info.train_accuracy


def test_private_steps_equal_dp_sgd_written_out():
    """Two steps of Poisson batches, noise included, against a loop over the examples."""
    keys = jax.random.split(jax.random.key(0))
    data = training.Data(
        jax.random.randint(keys[0], (9, 8, 8, 3), 0, 256).astype(jnp.uint8), jnp.arange(9) % 3
    )
    normalization = Normalization(jnp.full(3, 0.5), jnp.full(3, 0.25))
    victim = untrained("lenet_zhu", classes=3, width=None, seed=0, image_shape=(8, 8, 3))
    private = training.DpSgd(clip=0.3, noise_multiplier=0.2, batch=4, microbatch=2)
    recipe = training.Recipe(2, 0.1, "cosine", False, "float32", private)
    order = jnp.array([[0, 4, 7, -1, -1, -1], [1, 2, 3, 8, 5, -1]])
    start = victim.variables["params"]
    params, momentum = start, jax.tree.map(jnp.zeros_like, start)

    @jax.jit
    def gradient(params, i):
        def loss(p):
            image = normalization.normalize(data.images[i] / 255)[None]
            logits = victim.module.apply({"params": p}, image)
            return optax.softmax_cross_entropy_with_integer_labels(logits, data.labels[i][None])[0]

        return jax.grad(loss)(params)

    for step, batch in enumerate(order.tolist()):
        total = jax.tree.map(jnp.zeros_like, params)
        for i in (i for i in batch if i >= 0):
            own = gradient(params, jnp.int32(i))
            norm = optax.global_norm(own)
            total = jax.tree.map(lambda t, g, n=norm: t + g * min(1.0, 0.3 / n), total, own)
        noise_key = jax.random.fold_in(jax.random.fold_in(keys[1], step), 1)
        noisy = add_noise(total, 0.2 * 0.3, noise_key)
        g = jax.tree.map(lambda x, p: x / 4 + 5e-4 * p, noisy, params)
        rate = 0.05 * (1 + np.cos(np.pi * (step + 0.5) / 2))
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, g)
        params = jax.tree.map(lambda p, m, g, r=rate: p - r * (0.9 * m + g), params, momentum, g)
    state, sums = training.run_steps(
        victim.module,
        recipe,
        training.start(recipe, victim.variables),
        data,
        normalization,
        order,
        keys[1],
        0,
        2,
    )
    assert sums.correct <= 8
    for got, expected in zip(*map(jax.tree.leaves, (state.variables["params"], params))):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


PRIVATE = [
    "--model",
    "lenet_zhu",
    "--epochs",
    "2",
    "--lr",
    "0.1",
    "--batch",
    "64",
    "--dp",
    "--noise-multiplier",
    "1",
    "--delta",
    "1e-4",
]


def test_a_private_training_says_what_it_cost_and_resumes_to_the_same_digest(tmp_path, monkeypatch):
    assert train.main([*PRIVATE, "--out", str(tmp_path / "whole")]) == 0
    whole = load_victim(tmp_path / "whole")
    spent, steps = whole.info.privacy, whole.info.steps
    assert (spent.noise_multiplier, spent.clip, spent.steps) == (1, 1, steps)
    mechanism = accounting.Mechanism(1.0, spent.sampling_rate, steps)
    assert spent.epsilon_pld == pytest.approx(accounting.epsilon(mechanism, 1e-4, "pld"))
    assert spent.epsilon_rdp > spent.epsilon_pld
    assert "Poisson" in spent.assumptions
    with open(tmp_path / "whole" / "log.csv") as file:
        rows = [float(row["epsilon"]) for row in csv.DictReader(file)]
    assert 0 < rows[0] < rows[1] == pytest.approx(spent.epsilon_pld)

    class Killed(BaseException):
        pass

    own = train.Trainer._train_epoch

    def dies(self, *arguments):
        if self.epoch == 1:
            raise Killed
        own(self, *arguments)

    monkeypatch.setattr(train.Trainer, "_train_epoch", dies)
    with pytest.raises(Killed):
        train.main([*PRIVATE, "--out", str(tmp_path / "killed")])
    monkeypatch.setattr(train.Trainer, "_train_epoch", own)
    assert train.main([*PRIVATE, "--out", str(tmp_path / "killed")]) == 0
    assert load_victim(tmp_path / "killed").digest == whole.digest


def test_another_recipe_does_not_join_a_folder(whole, capsys):
    assert train.main([*FLAGS, "--seed", "1", "--out", str(whole)]) == 2
    assert "holds a training with seed 0, not 1" in capsys.readouterr().err
    assert train.main([*FLAGS, "--out", str(whole)]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stop-at", "epoch:0", "step:2", "accuracy:0.05"], ""),
        (["--stop-at", "accuracy:1"], ""),  # it was not reached
        (["--stop-at", "epoch:2"], "--stop-at epoch:2: the training has passed it, and kept no"),
        (["--stop-at", "step:3"], "--stop-at step:3: the training has passed it"),
        (["--stop-at", "accuracy:0.01"], "--stop-at accuracy:0.01: the training has passed it"),
        (["--storage", "bfloat16"], "--storage bfloat16: .*whole is kept in float32; choose"),
    ],
)
def test_a_finished_training_has_what_is_asked_for_or_says_so(whole, capsys, flags, message):
    assert train.main([*FLAGS, *flags, "--out", str(whole)]) == (2 if message else 0)
    told = capsys.readouterr()
    assert re.search(message or "trained already", told.err or told.out)


def test_a_stop_that_was_passed_in_a_state_is_refused(tmp_path, monkeypatch, capsys):
    """A training that was stopped after its first epoch is asked for that epoch's network."""
    own = train.Trainer._train_epoch

    def dies(self, *arguments):
        if self.epoch == 1:
            raise KeyboardInterrupt
        own(self, *arguments)

    monkeypatch.setattr(train.Trainer, "_train_epoch", dies)
    command = [*FLAGS, "--out", str(tmp_path / "cut")]
    assert train.main(command) == 130
    assert train.main([*command, "--stop-at", "epoch:1"]) == 2
    assert "--stop-at epoch:1: the training has passed it" in capsys.readouterr().err
    assert train.main([*command, "--stop-at", "epoch:2"]) == 130  # that is to come


def test_a_folder_of_something_else_is_not_touched(tmp_path, capsys):
    assert train.main([*FLAGS, "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path}: is there and is no checkpoint" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_divergence_names_step_loss_and_rate_and_keeps_the_last_state(
    tmp_path, capsys, monkeypatch
):
    steps = training.run_steps

    def poisoned(module, recipe, state, *rest):
        if int(state.step) > 0:
            variables = jax.tree.map(lambda x: x * jnp.inf, state.variables)
            state = state._replace(variables=variables)
        return steps(module, recipe, state, *rest)

    monkeypatch.setattr(training, "run_steps", poisoned)
    assert train.main([*FLAGS, "--out", str(tmp_path / "bad")]) == 2
    message = capsys.readouterr().err
    assert "training diverged: loss nan at step" in message
    assert "learning rate 0.02;" in message
    assert load_victim(tmp_path / "bad-epoch1").info.epochs == 1
    assert not (tmp_path / "bad").exists()


def test_a_state_of_another_training_is_not_resumed(whole):
    folder = whole.with_name("other")
    state = whole.with_name(".other.training") / "step00000005"
    checkpoints.write(state, {"x": np.zeros(2)}, {"recipe": {}, "log": [], "seconds": 0.0}, [])
    with pytest.raises(UserError, match="holds a training with dataset None"):
        train.Trainer(
            train.reader.load_training({"epochs": "3", "lr": "0.02", "out": str(folder)})
        ).run()
