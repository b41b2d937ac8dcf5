"""What an attacker learns: networks against closed forms, the training, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import client, data, learned, load_victim, sweep, train
from jaxinv.attacks import gauss_newton as gn
from jaxinv.attacks.base import Candidate, Known
from jaxinv.attacks.gradient_matching import Method
from jaxinv.attacks.priors import PRIORS, USUAL_ERROR, View, noise_level
from jaxinv.data import image_prior
from jaxinv.errors import UserError
from jaxinv.invert import invert, invert_all
from jaxinv.learned import nets, training
from jaxinv.settings import reader
from jaxinv.types import Normalization
from jaxinv.victim import checkpoints

SHAPE = (7, 6, 3)
NORMALIZATION = Normalization(jnp.array([0.4, 0.5, 0.6]), jnp.array([0.2, 0.2, 0.2]))
FLAGS = ["--dataset", "tiles", "--batch", "64", "--epochs", "2", "--lr", "0.01"]


def silent(module, *inputs):
    """A network's parameters, its last layer's all zeros."""
    params = module.init(jax.random.key(0), *inputs)["params"]
    last = max(params, key=lambda name: int(name.split("_")[1]))
    return {**params, last: jax.tree.map(jnp.zeros_like, params[last])}


def wiener():
    """A denoiser that is the best linear one of white images around `CENTER`."""
    return silent(nets.Denoiser(4), jnp.zeros((1, *SHAPE)), jnp.ones(1))


def some_pixels():
    return jax.random.uniform(jax.random.key(1), (2, *SHAPE))


def test_a_silent_denoiser_is_the_linear_one():
    pixels, level = some_pixels(), jnp.array([0.1, 0.4])
    share = nets.SPREAD**2 / (nets.SPREAD**2 + np.square(level)).reshape(2, 1, 1, 1)
    wanted = nets.CENTER + share * (pixels - nets.CENTER)
    np.testing.assert_allclose(nets.denoise(wiener(), pixels, level), wanted, rtol=1e-5)


def test_quarters_and_back():
    pixels = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    quarters = nets._quarters(pixels)
    np.testing.assert_array_equal(quarters[0, 1, 2, :6], pixels[0, 2, 4:6].ravel())
    np.testing.assert_array_equal(nets._whole(quarters), pixels)


def test_every_entry_of_an_update_is_in_one_bin():
    update = {"a": jnp.zeros((2, 2000)), "b": jnp.zeros(1000)}
    flat = 5000
    unit = jnp.eye(flat, dtype=jnp.float32)[:: flat // 50]
    trees = {"a": unit[:, :4000].reshape(-1, 2, 2000), "b": unit[:, 4000:]}

    def bins_of(tree):
        found = nets.hashed(tree)
        return found[:-1] * jnp.exp(found[-1])

    bins = jax.vmap(bins_of)(trees)
    np.testing.assert_allclose(np.abs(bins).sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.unique(bins.round(6)), [-1, 0, 1])
    many = jax.tree.map(lambda x: jax.random.normal(jax.random.key(2), x.shape), update)
    length = sum(float(jnp.sum(jnp.square(x))) for x in many.values())
    # The signs make its length right on average: 5,000 entries, a relative error of 2%.
    assert float(jnp.sum(jnp.square(bins_of(many)))) == pytest.approx(length, rel=0.1)


def view_of(images, learned, index=0, progress=0.0):
    """What a prior sees of a candidate that has no update."""
    at = NORMALIZATION, learned, jnp.int32(index), jnp.float32(progress)
    return View(images, (), (), None, None, (), *at)


def test_the_denoisers_penalty_pulls_along_what_was_taken_off():
    trained = {"denoiser": {"params": wiener()}}
    images, progress = NORMALIZATION.normalize(some_pixels()), 0.5
    level = float(noise_level(progress))
    assert level == pytest.approx(np.sqrt(0.3 * 0.02))
    assert (float(noise_level(0.0)), float(noise_level(1.0))) == pytest.approx((0.3, 0.02))

    def penalty(images):
        return PRIORS["prior_denoiser"].penalty(view_of(images, trained, 3, progress))

    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), 3), images.shape)
    denoised = nets.denoise(wiener(), some_pixels() + level * noise, jnp.float32(level))
    off = some_pixels() - denoised
    np.testing.assert_allclose(penalty(images), jnp.square(off).mean(), rtol=1e-4)
    wanted = 2 * off * NORMALIZATION.std / off.size
    np.testing.assert_allclose(jax.grad(penalty)(images), wanted, rtol=1e-3, atol=1e-8)


def test_anomaly_is_the_distance_from_the_usual_error():
    trained = {"autoencoder": {"params": silent(nets.Autoencoder(2), jnp.zeros((1, *SHAPE)))}}
    images = NORMALIZATION.normalize(some_pixels())  # a silent one makes everything gray
    error = jnp.square(some_pixels() - 0.5).mean(axis=(1, 2, 3))
    wanted = jnp.abs(error - USUAL_ERROR).mean()
    found = PRIORS["prior_autoencoder"].penalty(view_of(images, trained))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    with pytest.raises(UserError, match="prior_autoencoder: there is no autoencoder"):
        PRIORS["prior_autoencoder"].penalty(view_of(images, {}))


def test_with_a_linear_denoiser_the_belief_is_a_gaussian():
    """By Tweedie's formula: images of variance SPREAD^2 with noise of the level."""
    prior = image_prior.of_spectrum(np.zeros(SHAPE), np.broadcast_to(np.eye(3), (*SHAPE[:2], 3, 3)))
    trained = {"denoiser": {"params": wiener()}}
    prior = jax.tree.map(jnp.float32, prior)
    known = Known(None, None, None, NORMALIZATION, prior, trained)
    images = NORMALIZATION.normalize(some_pixels())
    unknowns = gn.to_unknowns(known, Candidate(images, None))
    attack = gn.GaussNewton(denoiser=True)
    settings = {"anneal_from": 1.0, "anneal_to": 1.0, "damping": 0.0, "tolerance": 0.0}
    numbers = attack.numbers(
        1, settings | {"client_lr": 1.0, "prior_denoiser": 1.0, "iterations": 5}
    )
    numbers = jax.tree.map(lambda x: jnp.asarray(np.ravel(x)[0]), numbers)
    power = nets.SPREAD**2 + gn.LEVEL**2
    denoised = (some_pixels() - nets.CENTER) / power * NORMALIZATION.std
    believed = jax.jit(lambda own, index: attack.belief(own, known, index, unknowns))
    gaussian = image_prior.synthesize(prior, unknowns[0] / prior.variances)
    for share in (1.0, 0.25):
        own = numbers._replace(prior_denoiser=share)
        for index, wanted in ((0, gaussian), (4, share * denoised + (1 - share) * gaussian)):
            belief = believed(own, jnp.int32(index))
            away = jax.tree.map(jnp.subtract, unknowns, belief.center)
            slope = gn.multiply(belief.precisions, away)
            found = image_prior.synthesize(prior, slope[0])
            np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3)


def trained_at(folder, *flags):
    """The variables that a training leaves."""
    assert train.main([*flags, *FLAGS, "--out", str(folder)]) == 0
    kind = flags[1] if flags[0] == "--prior" else "inverter"
    return learned.load(kind, str(folder))


DENOISER = ("--prior", "denoiser", "--width", "2")


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole = trained_at(tmp_path / "whole", *DENOISER)
    assert whole.info.test_loss < 1.1
    given = reader.load_training(
        {"prior": "denoiser", "width": "2", "dataset": "tiles", "batch": "64", "epochs": "2"}
        | {"lr": "0.01", "out": str(tmp_path / "cut")}
    )
    learner = train.Learner(given)
    steps, calls = training.run_steps, []

    def once(*arguments):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(steps(*arguments))
        return calls[-1]

    monkeypatch.setattr(training, "run_steps", once)
    monkeypatch.setattr("jaxinv.learner.STEPS_PER_CALL", 3)
    monkeypatch.setattr("jaxinv.learner.STATE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        learner.run()
    assert int(calls[0][0].step) == 3
    monkeypatch.setattr(training, "run_steps", steps)
    cut = trained_at(tmp_path / "cut", *DENOISER)
    assert cut.info.digest == whole.info.digest
    assert cut.info.train_loss == pytest.approx(whole.info.train_loss, rel=1e-5)
    assert not (tmp_path / ".cut.training").exists()


@pytest.fixture(scope="module")
def inverter(tmp_path_factory):
    """An inverter of noisy updates, trained for a moment."""
    folder = tmp_path_factory.mktemp("inverter") / "small"
    flags = ("--inverter", "lenet_zhu-tiles", "--defense", "noise:1e-6", "--width", "8")
    return folder, trained_at(folder, *flags)


def test_an_inverter_learns(inverter):
    info = inverter[1].info
    assert (info.victim, info.defense) == ("lenet_zhu-tiles", "noise:1e-06")
    first = float(np.genfromtxt(inverter[0] / "log.csv", delimiter=",", names=True)["test_loss"][0])
    assert info.test_loss < first


def test_an_inverter_of_another_network_of_the_same_name_is_no_training_finished(
    inverter, monkeypatch, capsys
):
    load = checkpoints.load_victim
    monkeypatch.setattr(
        checkpoints, "load_victim", lambda *name: load(*name)._replace(digest="another")
    )
    flags = ["--inverter", "lenet_zhu-tiles", "--defense", "noise:1e-6", "--width", "8"]
    assert train.main([*flags, *FLAGS, "--out", str(inverter[0])]) == 2
    error = capsys.readouterr().err
    assert "holds a training with inverter lenet_zhu-tiles of digest" in error
    assert "not lenet_zhu-tiles of digest another" in error


def test_inverters_attack_as_they_have_learned(inverter, tmp_path, capsys):
    folder = str(inverter[0])
    command = ["--attack", "learned", "--inverter", folder, "--targets", "2", "--seeds", "1"]
    noisy = ["--defense", "noise:1e-6"]
    ours = ["--victim", "lenet_zhu-tiles", *noisy, *command, "--out", str(tmp_path / "run")]
    assert sweep.main(ours) == 0
    rows = sweep.results.read_run(tmp_path / "run").trials
    assert rows["learned_source"][0].startswith("inverter of tiles/train")
    assert rows["learned_saw_class"].all()
    assert (rows["status"] == "ok").all()
    for arguments, message in (
        ([*noisy, *command], "has learned from the updates of lenet_zhu-tiles"),
        (["--victim", "lenet_zhu-tiles", *command], "with --defense noise:1e-06, not none"),
        ([*ours, "--images", "2"], "has learned from updates of 1 images, not 2"),
        (["--attack", "learned"], "give --inverter"),
        (["--prior-denoiser", "1", "--denoiser", folder], "holds no denoiser"),
    ):
        capsys.readouterr()
        assert sweep.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_an_update_from_anywhere_goes_through_the_inverter(inverter):
    victim = load_victim("lenet_zhu-tiles")
    shape, info = victim.info.image_shape, victim.info
    sent = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(5), x.shape), victim.variables["params"]
    )
    settings = {"image_shape": shape, "labels": [3], "mean": info.mean, "std": info.std}
    settings |= {"method": "learned", "seeds": 1}
    given = victim.module, victim.variables, sent
    found = invert(*given, **settings, learned={"inverter": inverter[1].variables})
    wanted = nets.invert(inverter[1].variables, nets.hashed(sent)[None], jnp.array([[3]]), shape)
    np.testing.assert_allclose(found.reconstructions, wanted, atol=1e-5)
    # Of each of two updates, one step of nothing from there.
    other = jax.tree.map(lambda x: x[::-1], sent)
    begins = settings | {"method": Method(init_from="learned", priors=(), box=False)}
    begins |= {"labels": [[3], [4]], "priors": {}, "iterations": 1, "lr": 1e-9}
    learned_ = {"inverter": inverter[1].variables}
    for precision in ("float32", "float64"):
        starts = invert_all(
            *given[:2], [sent, other], **begins, learned=learned_, precision=precision
        )
        for start, update, label in zip(starts, (sent, other), (3, 4)):
            bins = nets.hashed(update)[None]
            wanted = nets.invert(inverter[1].variables, bins, jnp.array([[label]]), shape)
            np.testing.assert_allclose(start.reconstructions, wanted, atol=1e-5)
    for wrong, message in (
        ({"labels": "joint"}, "labels=joint: method.init_from='learned' takes labels as given"),
        ({"seeds": 2}, "seeds=2: of method.init_from='learned' all are the same; give 1"),
    ):
        with pytest.raises(UserError, match=message):
            invert_all(*given[:2], [sent, other], **begins | wrong, learned=learned_)
    part = {name: x for name, x in sent.items() if name != "Conv_1"}
    with pytest.raises(UserError, match="or an inverter, is of one gradient of all layers"):
        invert_all(*given[:2], [part, part], **begins, learned=learned_)
    with pytest.raises(UserError, match="no trained inverter: give the --inverter"):
        invert(*given, **settings)


def test_an_inverter_of_several_images_sees_the_update_of_all():
    victim = load_victim("lenet_zhu-tiles")
    shape, info = victim.info.image_shape, victim.info
    tiles = data.load("tiles", split="test", ids=4)
    groups = training.in_groups(
        training.Examples(jnp.asarray(tiles.images), jnp.asarray(tiles.labels)).take(jnp.arange(4)),
        2,
    )
    normalization = Normalization.of(info.mean, info.std)
    context = training.Updates(victim.variables, normalization, (), None)
    bins = training.update_bins(victim.module, (), context, groups, jax.random.key(0))
    loss = client.loss_fn(victim.module, victim.variables)
    for i in range(2):
        images = normalization.normalize(tiles.images[2 * i : 2 * i + 2] / np.float32(255))
        labels = tiles.labels[2 * i : 2 * i + 2]
        sent, _ = client.gradient(loss, victim.variables["params"], images, labels)
        np.testing.assert_allclose(bins[i], nets.hashed(sent), rtol=1e-4, atol=1e-6)
    # One that always says the first update's images, in the other order, has no error on it.
    module, inputs = learned.network("inverter", 4, shape, 7, 2)
    params = silent(module, *inputs)
    pixels = jnp.clip(groups.images[0][::-1], 1e-3, 1 - 1e-3)
    bias = jnp.log(pixels / (1 - pixels)).ravel()
    params = {**params, "Dense_2": {**params["Dense_2"], "bias": bias}}
    scale = {"mean": jnp.zeros(nets.HASHED), "std": jnp.ones(nets.HASHED)}
    examples = training.Examples(groups.images[0], groups.labels[0])
    given = victim.module, (), 2, params, context._replace(scale=scale), examples
    assert training.inverting_loss(*given, jax.random.key(0)) < 1e-6


def test_a_bin_that_is_nearly_always_empty_does_not_drown_the_others(rng_numpy):
    hashed = rng_numpy.normal(size=(500, 40)).astype(np.float32)
    hashed[:, 0] = 0
    hashed[3, 0] = 1e-3  # a deviation of 4e-5 of its own
    scale = training.scale_of(jnp.asarray(hashed))
    np.testing.assert_allclose(scale["std"][1:], hashed.std(axis=0)[1:], rtol=1e-5)
    assert scale["std"][0] == pytest.approx(0.1 * np.sqrt(np.square(hashed.std(axis=0)).mean()))
    assert np.isfinite(1 / training.scale_of(jnp.ones((2, 3)))["std"]).all()


def test_a_hashed_update_says_its_size_apart(rng_numpy):
    update = {"w": jnp.asarray(rng_numpy.normal(size=(70, 80)), jnp.float32)}
    of_one, of_many = (nets.hashed(jax.tree.map(lambda x: c * x, update)) for c in (1, 1000))
    np.testing.assert_allclose(of_many[:-1], of_one[:-1], rtol=1e-4, atol=1e-6)
    assert of_many[-1] - of_one[-1] == pytest.approx(np.log(1000), rel=1e-5)
    assert np.square(of_one[:-1]).mean() == pytest.approx(1, rel=1e-5)
    assert np.isfinite(nets.hashed(jax.tree.map(jnp.zeros_like, update))).all()


@pytest.mark.slow
def test_an_inverter_of_several_images_attacks_such_updates(tmp_path):
    folder = tmp_path / "two"
    flags = ("--inverter", "lenet_zhu-tiles", "--images", "2", "--width", "8")
    info = trained_at(folder, *flags).info
    assert info.update_images == 2
    command = ["--victim", "lenet_zhu-tiles", "--inverter", str(folder), "--images", "2"]
    command += ["--targets", "2", "--seeds", "1"]
    for how in (["--attack", "learned"], ["--init", "learned", "--iterations", "2"]):
        out = str(tmp_path / how[0])
        assert sweep.main([*command, *how, "--out", out]) == 0
        rows = sweep.results.read_run(out).trials
        assert rows["learned_source"][0].startswith("inverter of tiles/train")
        assert (rows["status"] == "ok").all()


def test_a_prior_is_of_images_of_one_shape():
    (info,) = (learned.load("denoiser", "prior-denoiser-cifar10"),)
    learned.check_fits(info, "denoiser", (32, 32, 3))
    with pytest.raises(UserError, match="--denoiser: is of 32x32x3 images of cifar10, not of 8x8"):
        learned.check_fits(info, "denoiser", (8, 8, 3))


@pytest.mark.parametrize("kind", learned.PRIORS)
def test_the_shipped_priors_are_small_and_know_photographs(kind):
    folder = checkpoints.find(f"prior-{kind}-cifar10", kind)
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 2**21
    params = learned.load(kind, f"prior-{kind}-cifar10").variables["params"]
    pixels = data.load("tiles", split="test").images[:8] / np.float32(255)
    if kind == "denoiser":
        noise = 0.1 * jax.random.normal(jax.random.key(0), pixels.shape)
        left = jnp.square(nets.denoise(params, pixels + noise, jnp.float32(0.1)) - pixels).mean()
        assert left < 0.3 * 0.1**2
    else:
        noisy = jnp.clip(pixels + 0.1 * jax.random.normal(jax.random.key(0), pixels.shape), 0, 1)
        own, other = (jnp.square(nets.encode(params, x) - x).mean() for x in (pixels, noisy))
        assert own < 0.5 * other
