"""Attacking what a checkpoint holds, and clients that normalize with their batch's statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import client, data
from jaxinv.attacks.priors import statistics_distance
from jaxinv.engine import cells
from jaxinv.errors import UserError
from jaxinv.settings import reader
from jaxinv.victim import checkpoints
from jaxinv.victim.untrained import untrained


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained LeNetZhu of network seed 5, kept as if it had been trained on the tiles."""
    tiles = data.load("tiles", split="test", ids=1)
    victim = untrained(
        "lenet_zhu", classes=len(tiles.classes), width=None, seed=5, image_shape=(32, 32, 3)
    )
    info = checkpoints.Info(
        model="lenet_zhu",
        width=None,
        dataset="tiles",
        classes=tiles.classes,
        image_shape=(32, 32, 3),
        mean=tiles.mean,
        std=tiles.std,
        recipe={"seed": 5},
        epochs=0,
        steps=0,
        train_accuracy=None,
        test_accuracy=0.1,
        seconds=0,
        hardware="",
        versions={},
    )
    folder = tmp_path_factory.mktemp("checkpoints") / "lenet"
    checkpoints.save(folder, victim.variables, info, [])
    return folder, victim


def test_a_victim_names_the_network(checkpoint):
    folder, victim = checkpoint
    study = reader.load_study(None, {"victim": [str(folder)], "tv": ["0.1"]})
    (cell,) = study.cells
    assert (cell.model, cell.width, cell.network_seed) == ("lenet_zhu", None, 5)
    inputs = cells.Loader(study.plan)(cell)
    assert inputs.victim.digest == victim.digest
    with pytest.raises(UserError, match="--victim names the network; leave --model out"):
        reader.load_study(None, {"victim": [str(folder)], "model": ["mlp"]})
    with pytest.raises(UserError, match="--victim nobody: no such checkpoint"):
        reader.load_study(None, {"victim": ["nobody"]})


def test_batch_norm_protocols_need_batch_norm():
    study = reader.load_study(None, {"batch_norm": ["train"]})
    with pytest.raises(UserError, match="--batch-norm train: lenet_zhu has no BatchNorm; use eval"):
        cells.Loader(study.plan)(study.cells[0])


def test_presets_replace_what_the_file_says(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(
        '[grid]\nmodel = "resnet18"\nwidth = 4\ntv = 0.1\n[preset.full.grid]\nwidth = "published"\n'
        "[preset.full.run]\nseeds = 7\n"
    )
    small, full = (reader.load_study(file, {}, preset) for preset in (None, "full"))
    assert (small.cells[0].width, full.cells[0].width) == (4, None)
    assert (full.cells[0].tv, full.plan.seeds) == (0.1, 7)
    with pytest.raises(UserError, match="known: full"):
        reader.load_study(file, {}, "huge")


def test_statistics_of_a_layer_of_ones_own_stay_with_the_client():
    import flax.linen as nn

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            seen = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
            if train:
                seen.value = x.mean(axis=(0, 1, 2))
            return (x - seen.value).sum(axis=(1, 2))

    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), jnp.float32)
    variables = Own().init(jax.random.key(0), images)
    logits, _ = client.apply_fn(Own(), variables, "train")({}, images)
    np.testing.assert_allclose(logits, (images - images.mean((0, 1, 2))).sum((1, 2)), atol=1e-4)
    with pytest.raises(UserError, match=r"mean says nothing of the batch, .*; use train"):
        client.apply_fn(Own(), variables, "train-shared")({}, images)


@pytest.mark.parametrize("momentum", [0.9, 0.99])  # this package's, and Flax's where none is said
def test_training_mode_normalizes_with_the_batch_and_returns_its_statistics(momentum):
    """One BatchNorm by hand: mean and variance over batch and places, running statistics unread."""
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.BatchNorm(not train, momentum=momentum, epsilon=1e-5)(x)
            return x.sum(axis=(1, 2))

    images = jnp.asarray(np.random.default_rng(0).normal(2, 3, size=(2, 4, 4, 3)), jnp.float32)
    variables = Net().init(jax.random.key(0), images)
    params, mean = variables["params"], images.mean(axis=(0, 1, 2))
    variance = images.var(axis=(0, 1, 2))
    apply = client.apply_fn(Net(), variables, "train-shared")
    logits, statistics = apply(params, images)
    sent = statistics["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(sent["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(sent["var"], variance, rtol=1e-4)
    expected = ((images - mean) / jnp.sqrt(variance + 1e-5)).sum(axis=(1, 2))
    np.testing.assert_allclose(logits, expected, atol=2e-4)
    evaluated, nothing = client.apply_fn(Net(), variables)(params, images)
    np.testing.assert_allclose(evaluated, (images / np.sqrt(1 + 1e-5)).sum((1, 2)), rtol=1e-5)
    assert nothing == ()
    assert float(statistics_distance(statistics, statistics)) == 0
    shifted = jax.tree.map(lambda x: x + 2.0, statistics)
    np.testing.assert_allclose(statistics_distance(shifted, statistics), 8.0, rtol=1e-5)
