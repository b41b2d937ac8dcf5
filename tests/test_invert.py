"""`jaxinv.invert` on other people's models, losses and files."""

import re
import runpy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxinv
from jaxinv import client, data
from jaxinv.client import updates
from jaxinv.data import image_prior
from jaxinv.errors import UserError
from jaxinv.types import Normalization

# Imported, the command would take the name of the function it calls.
command = runpy.run_module("jaxinv.invert")["main"]


class Theirs(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.sigmoid(nn.Conv(6, (3, 3), strides=2)(x))
        return nn.Dense(4)(x.reshape(x.shape[0], -1))


def smooth_prior(size):
    """Of images in two channels whose power falls with the frequency."""
    u, v = np.mgrid[0:size, 0:size]
    power = 4 / (1 + u + v) ** 2
    covariance = power[..., None, None] * np.eye(2)
    return jax.tree.map(
        jnp.float32, image_prior.of_spectrum(np.full((size, size, 2), 0.5), covariance)
    )


def test_recovers_an_image_and_its_label_from_a_gradient():
    model = Theirs()
    ramp = jnp.linspace(0, 1, 8)
    image = jnp.stack([ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None]], -1)[None]
    variables = jax.jit(model.init)(jax.random.key(0), image)

    @jax.jit
    def gradient(params):
        def loss(params):
            logits = model.apply({"params": params}, image)
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([2])).mean()

        return jax.grad(loss)(params)

    update = gradient(variables["params"])
    found = jaxinv.invert(
        model,
        variables,
        update,
        image_shape=(8, 8, 2),
        seeds=3,
        iterations=200,
        priors={"tv": 1e-3},
    )
    assert found.labels.tolist() == [2]
    assert found.reconstructions.shape == (3, 1, 8, 8, 2)
    assert found.trace_objectives.shape == (len(found.trace_steps), 3)
    psnr = -10 * np.log10(np.mean(np.square(found.best - image)))
    assert psnr > 20
    np.testing.assert_array_equal(found.best, found.reconstructions[found.objectives.argmin()])
    second = jaxinv.invert(
        model, variables, update, image_shape=(8, 8, 2), seeds=1, iterations=16,
        method=jaxinv.GaussNewton(), image_prior=smooth_prior(8),
    )  # fmt: skip
    assert second.labels.tolist() == [2]
    assert -10 * np.log10(np.mean(np.square(second.best - image))) > psnr + 5


def test_an_update_of_another_shape_is_refused():
    params = {"Dense_0": {"kernel": np.zeros((3, 2))}}
    with pytest.raises(UserError, match="names and shapes must be those of variables"):
        jaxinv.invert(Theirs(), {"params": params}, {"other": 1}, image_shape=(8, 8, 2))
    with pytest.raises(UserError, match="seeds=0: must be positive"):
        jaxinv.invert(Theirs(), {"params": params}, params, image_shape=(8, 8, 2), seeds=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adm"}, "method.optimizer='adm': unknown; known are adam, sgd, lbfgs"),
        ({"sign": "no"}, "method.sign='no': unknown; known are hard, soft, none"),
        ({"objective": "cos"}, "method.objective='cos': unknown; known are cosine, l2"),
        ({"init_from": "gray"}, "method.init_from='gray': unknown; known are normal"),
        ({"optimizer": "lbfgs"}, "method.optimizer='lbfgs': .* use sign='none'"),
        ({"defense": ("prune",)}, "method.defense: invert takes the update as it is"),
    ],
)
def test_a_method_is_checked(settings, message):
    params = {"Dense_0": {"kernel": np.zeros((3, 2))}}
    with pytest.raises(UserError, match=message):
        jaxinv.invert(
            Theirs(), {"params": params}, params, image_shape=(8, 8, 2),
            method=jaxinv.Method(**settings),
        )  # fmt: skip
    with pytest.raises(UserError, match=r"priors\['prior_epoch_order'\]=0.1: known are prior_f"):
        jaxinv.invert(
            Theirs(),
            {"params": params},
            params,
            image_shape=(8, 8, 2),
            priors={"prior_epoch_order": 0.1},
        )


def test_a_loss_function_will_do():
    """A client that is no Flax module at all, and a batch in two local steps."""

    def loss(params, images, labels):
        logits = jax.nn.sigmoid(images.reshape(len(images), -1) @ params["w"]) @ params["v"]
        return client.cross_entropy(logits, labels)

    random = np.random.default_rng(0)
    params = {"w": random.normal(size=(12, 30)), "v": random.normal(size=(30, 3))}
    params = jax.tree.map(jnp.float32, params)
    images, labels = jnp.float32(random.uniform(size=(2, 2, 2, 3))), jnp.array([0, 2])
    local = client.Local(1, 1)
    own = client.loss_fn(loss, {})
    update = jax.jit(lambda: client.update(own, params, images, labels, local, 0.1)[0])()
    found = jaxinv.invert(
        loss, {"params": params}, update, image_shape=(2, 2, 3), labels=labels, seeds=4,
        iterations=300, client_lr=0.1, priors={}, method=jaxinv.Method(local=local),
    )  # fmt: skip
    assert np.nanmin(found.objectives) < 1e-3
    np.testing.assert_allclose(found.best, images, atol=0.1)
    with pytest.raises(UserError, match="labels=idlg: give them"):
        jaxinv.invert(loss, {"params": params}, update, image_shape=(2, 2, 3))


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """An update of a shipped tile on a shipped victim, as a file; and its label's name."""
    victim = jaxinv.load_victim("lenet_zhu-tiles")
    tiles = data.load("tiles", split="test", ids=[3])
    image = Normalization.of(victim.info.mean, victim.info.std).normalize(tiles.images / 255)
    loss = client.loss_fn(victim.module, victim.variables)
    params = victim.variables["params"]
    update = jax.jit(lambda: client.gradient(loss, params, image, tiles.labels)[0])()
    path = tmp_path_factory.mktemp("update") / "update.npz"
    updates.save(path, update)
    return path, update, tiles.classes[tiles.labels[0]]


def test_an_update_comes_back_from_both_kinds_of_file(sent, tmp_path):
    import orbax.checkpoint as ocp

    path, update, _ = sent
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", update)
    for place in (path, tmp_path / "orbax"):
        jax.tree.map(np.testing.assert_array_equal, updates.load(place, update), update)


def test_the_command_reads_the_label_and_writes_the_pictures(sent, tmp_path, capsys):
    path, _, label = sent
    flags = ["--victim", "lenet_zhu-tiles", "--seeds", "2", "--iterations", "4", "--out"]
    assert command(["--update", str(path), *flags, str(tmp_path / "out")]) == 0
    assert f"labels: {label}" in capsys.readouterr().out
    assert (tmp_path / "out" / "reconstructions.png").stat().st_size > 1000
    with np.load(tmp_path / "out" / "reconstructions.npz") as arrays:
        assert arrays["reconstructions"].shape == (2, 1, 32, 32, 3)


OF_TILES = ["--update", "U", "--victim", "lenet_zhu-tiles"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--victim", "lenet_zhu-tiles"], "--update: the file to attack"),
        (["--update", "U"], "--victim: the network that the update is of"),
        (["--update", "U", "--victim", "lenet_zhu-cifar10"], r"Dense_0/bias is \(7,\)"),
        (["--update", "no.npz", "--victim", "lenet_zhu-tiles"], "no.npz: cannot be read as"),
        (["--update", "U", "--victim", "lenet_zhu-tiles", "--labels", "known"], "give --classes"),
        ([*OF_TILES, "--attack", "analytic"], "--attack analytic: of a sweep"),
        ([*OF_TILES, "--client-lr", "0.5"], "--client-lr 0.5: the client takes one step"),
        ([*OF_TILES, "--gram", "on"], "unrecognized arguments: --gram on"),
    ],
)
def test_bad_input_is_one_line(sent, tmp_path, capsys, flags, message):
    flags = [str(sent[0]) if flag == "U" else flag for flag in flags]
    assert command([*flags, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
