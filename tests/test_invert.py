"""`jaxinv.invert` on other people's models, losses and files."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze

import jaxinv
from jaxinv import client, data
from jaxinv.attacks.gradient_matching import step_decay
from jaxinv.attacks.priors import total_variation
from jaxinv.attacks.smoothed_gauss_newton import SmoothedGaussNewton
from jaxinv.client import kinds, updates
from jaxinv.data import image_prior
from jaxinv.defenses import DEFENSES
from jaxinv.engine import trials
from jaxinv.errors import UserError
from jaxinv.invert.__main__ import main as command
from jaxinv.invert.verdict import Guesses, verdict
from jaxinv.networks.user import UserNetwork, plain
from jaxinv.types import Normalization

EXAMPLES = Path(__file__).parents[1] / "examples"

TWO_STEPS = client.Local(2)
# Of calls that are refused before anyone looks at it.
A_PRIOR = {"image_prior": object(), "priors": {}}


OF_CLOSED_FORM = {"method": "analytic", "priors": {}, "iterations": None}


class Net(nn.Module):
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


class Theirs:
    """A client with one image: two ramps."""

    shape = (8, 8, 2)
    settings = {"image_shape": shape, "seeds": 3, "iterations": 200, "priors": {"tv": 1e-3}}  # noqa: RUF012

    def __init__(self):
        self.model = Net()
        ramp = jnp.linspace(0, 1, 8)
        self.image = jnp.stack([ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None]], -1)[None]
        self.variables = jax.jit(self.model.init)(jax.random.key(0), self.image)
        self.update = self.gradient(self.image, jnp.array([2]))

    def gradient(self, images, labels, model=None, loss=None, mode="eval"):
        network = UserNetwork(model or self.model, loss)
        variables = self.variables
        if model is not None:
            variables = plain(jax.jit(model.init)(jax.random.key(0), images))
        one = client.loss_fn(network, variables, mode)
        found = jax.jit(lambda p: client.gradient(one, p, images, labels)[0])(variables["params"])
        return found if model is None else (variables, found)

    def invert(self, update=None, **settings):
        update = self.update if update is None else update
        return jaxinv.invert(self.model, self.variables, update, **(self.settings | settings))

    def psnr(self, images):
        return -10 * np.log10(np.mean(np.square(images - self.image)))


@pytest.fixture(scope="module")
def theirs():
    return Theirs()


@pytest.fixture(scope="module")
def found(theirs):
    return theirs.invert()


def test_recovers_an_image_and_its_label_from_a_gradient(theirs, found):
    assert found.labels.tolist() == [2]
    assert found.reconstructions.shape == (3, 1, 8, 8, 2)
    assert found.trace_objectives.shape == (len(found.trace_steps), 3)
    assert theirs.psnr(found.best) > 20
    np.testing.assert_array_equal(found.best, found.reconstructions[found.objectives.argmin()])
    assert found.verdict == "matched"
    assert found.sent.kind == "gradient"
    second = theirs.invert(
        seeds=1,
        iterations=16,
        method=jaxinv.GaussNewton(),
        priors={},
        image_prior=smooth_prior(8),
        posterior=8,
    )
    assert second.std.shape == second.best.shape
    assert 0 < np.median(second.std) < 0.1
    assert second.labels.tolist() == [2]
    assert theirs.psnr(second.best) > theirs.psnr(found.best) + 5
    assert second.verdict == "matched"
    exact = theirs.invert(
        seeds=1,
        iterations=16,
        method=jaxinv.GaussNewton(),
        priors={},
        image_prior=smooth_prior(8),
        polish=2,
    )
    assert theirs.psnr(exact.best) > theirs.psnr(second.best) + 10
    assert exact.std is None
    assert exact.verdict == "matched"


def test_weights_and_reversed_differences_give_the_same_image(theirs, found):
    """What a gradient's update is made of does not change the attack: it is told and undone."""
    new = jax.tree.map(lambda p, g: p - 0.1 * g, theirs.variables["params"], theirs.update)
    minus = jax.tree.map(jnp.subtract, new, theirs.variables["params"])
    for sent, kind in ((new, "weights"), (freeze(minus), "new-minus-old")):
        other = theirs.invert(sent)
        assert (other.sent.kind, other.labels.tolist()) == (kind, [2])
        assert other.sent.remarks
        assert theirs.psnr(other.best) > 20
    with pytest.raises(UserError, match="update_kind=gradient points the wrong way"):
        theirs.invert(minus, update_kind="gradient")


def test_a_wrong_label_does_not_look_like_a_result(theirs):
    wrong = theirs.invert(labels=[1])
    assert wrong.verdict == "not"


@pytest.mark.parametrize(
    ("objective", "word"),
    [
        (0.0, "matched"),
        (0.009, "matched"),
        (0.029, "partly"),
        (0.1, "partly"),
        (0.3, "not"),
        (np.nan, "not"),
    ],
)
def test_the_verdict_compares_with_the_better_guess(objective, word):
    assert verdict(objective, Guesses(gray=2.0, mean=1.0, zero=3.0, truth=1e-7)) == word


def test_several_updates_are_attacked_at_once(theirs):
    other = theirs.gradient(1 - theirs.image, jnp.array([0]))
    settings = theirs.settings | {"iterations": 12}
    both = jaxinv.invert_all(theirs.model, theirs.variables, [theirs.update, other], **settings)
    assert [one.labels.tolist() for one in both] == [[2], [0]]
    alone = theirs.invert(iterations=12)
    np.testing.assert_allclose(both[0].objectives, alone.objectives, rtol=2e-3)
    assert both[1].guesses != both[0].guesses
    with pytest.raises(UserError, match="labels: 1 for 2 updates"):
        jaxinv.invert_all(
            theirs.model, theirs.variables, [theirs.update, other], labels=[[2]], **settings
        )


def test_the_head_alone_is_compared_alone(theirs):
    head = {"Dense_0": theirs.update["Dense_0"]}
    found = theirs.invert(head, iterations=60)
    assert found.labels.tolist() == [2]
    assert found.objectives.min() < 0.2 * found.guesses.gray
    with pytest.raises(UserError, match="the update lacks Dense_0/kernel"):
        theirs.invert({"Conv_0": theirs.update["Conv_0"]})


def test_layers_of_zeros_were_not_sent(theirs):
    """They are left out, as if the head had come alone; and all of the head is asked for."""
    silent = {"Conv_0": jax.tree.map(jnp.zeros_like, theirs.update["Conv_0"])}
    found = theirs.invert({**theirs.update, **silent}, iterations=4)
    alone = theirs.invert({"Dense_0": theirs.update["Dense_0"]}, iterations=4)
    assert "taken as not sent: Conv_0/bias, Conv_0/kernel" in found.sent.remarks[-1]
    np.testing.assert_array_equal(found.objectives, alone.objectives)
    assert found.guesses == alone.guesses


@pytest.mark.slow
def test_signs_never_look_explained(theirs):
    """An image whose loss is 0 has a small squared distance to an update of small numbers."""
    signs = DEFENSES["sign"].apply(theirs.update, (), None, None)
    small = jax.tree.map(lambda x: 1e-4 * x, signs)
    method = jaxinv.Method(objective="l2", sign="none")
    settings = {"labels": [2], "method": method, "priors": {}, "iterations": 200}
    blind = theirs.invert(small, update_kind="gradient", **settings)
    told = theirs.invert(small, update_kind="gradient", defense="sign", **settings)
    power = sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(small))
    for found in (blind, told):
        assert found.guesses.zero == pytest.approx(power, rel=1e-3)
        assert found.verdict == "not"


@pytest.fixture
def gray_objective(monkeypatch):
    """The objective of a gray image, which in these tests is the private one; without an attack."""

    def no_attack(problem, method, numbers, keys, resources):
        labels = np.repeat(np.asarray(problem.targets.labels)[:, None], keys.shape[1], axis=1)
        trace = SimpleNamespace(step=np.zeros(1, int), objective=np.ones((1, *keys.shape)))
        pixels = np.zeros((*keys.shape, labels.shape[2], *problem.image_shape))
        ones = np.ones(keys.shape)
        return SimpleNamespace(
            pixels=pixels, objective=ones, labels=labels, finite=ones > 0, trace=trace
        )

    monkeypatch.setattr(trials, "run", no_attack)

    def measure(model, update, variables, labels, **settings):
        found = jaxinv.invert(
            model,
            variables,
            update,
            image_shape=(8, 8, 2),
            seeds=1,
            labels=labels,
            priors={},
            **settings,
        )
        return found.guesses.gray

    return measure


def test_labels_and_losses_are_used_as_they_are_given(theirs, gray_objective):
    """Smoothed labels, to a module; a regression's target, as a loss of outputs."""
    gray = jnp.full((1, 8, 8, 2), 0.5)
    smooth = optax.smooth_labels(jax.nn.one_hot(jnp.array([3]), 4), 0.2)
    update = theirs.gradient(gray, smooth)
    assert gray_objective(theirs.model, update, theirs.variables, smooth) < 1e-6

    def mse(outputs, target):
        return jnp.mean(jnp.square(outputs[:, 0] - target))

    target = jnp.array([0.9])
    variables, update = theirs.gradient(gray, target, Net(), mse)
    settings = {"loss": mse, "method": jaxinv.Method(objective="l2")}
    right, wrong = (
        gray_objective(theirs.model, update, variables, y, **settings) for y in ([0.9], [0.0])
    )
    assert right < 1e-6 < wrong


def test_the_verdict_allows_for_the_rounding_of_what_was_sent(theirs, gray_objective):
    """At the truth the objective of an update in bfloat16 is the one that is expected there."""
    update = theirs.gradient(jnp.full((1, 8, 8, 2), 0.5), jnp.array([2]))
    sent = jax.tree.map(lambda x: x.astype(jnp.bfloat16), update)
    objective = gray_objective(theirs.model, sent, theirs.variables, [2])
    expected = kinds.understand(sent, theirs.variables["params"]).rounding ** 2 / 2
    assert 0.2 < objective / expected < 5
    moved = gray_objective(theirs.model, sent, theirs.variables, [2], mean=0.2)
    assert moved > 100 * expected  # `mean` and `std` say what the network sees of a pixel


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3), strides=2)(x))
        return nn.Dense(4)(nn.sigmoid(x).reshape(len(x), -1))


def test_statistics_that_are_sent_along_pull_towards_the_batch(theirs, monkeypatch):
    """The prior is 0 at a batch of those statistics, and asked for by --batch-norm train-shared."""
    model, gray = Normalized(), jnp.full((1, 8, 8, 2), 0.5)
    variables = plain(model.init(jax.random.key(0), gray, train=False))
    loss = client.loss_fn(UserNetwork(model), variables, "train-shared")
    update, seen = client.gradient(loss, variables["params"], theirs.image, jnp.array([2]))
    handed = []

    def no_attack(problem, method, numbers, keys, resources):
        handed.append((problem.targets.statistics, method))
        raise UserError("enough")

    monkeypatch.setattr(trials, "run", no_attack)
    settings = {
        "image_shape": theirs.shape,
        "method": jaxinv.Method(batch_norm="train-shared"),
        "priors": {"prior_batch_norm": 0.1},
    }
    with pytest.raises(UserError, match="enough"):
        jaxinv.invert(model, variables, update, statistics=seen["batch_stats"], **settings)
    statistics, method = handed[0]
    assert method.priors == ("prior_batch_norm",)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), statistics, seen)
    with pytest.raises(UserError, match="train-shared: give the statistics that came with"):
        jaxinv.invert(model, variables, update, **settings)
    with pytest.raises(UserError, match="names and shapes of variables"):
        jaxinv.invert(model, variables, update, statistics={"a": np.ones(3)}, **settings)
    settings["method"] = jaxinv.Method(batch_norm="train")
    with pytest.raises(UserError, match="keeps the client's statistics private"):
        jaxinv.invert(model, variables, update, **settings)


def test_batch_norm_in_training_mode_is_simulated(theirs, gray_objective):
    model, gray = Normalized(), jnp.full((1, 8, 8, 2), 0.5)
    variables = plain(model.init(jax.random.key(0), gray, train=False))
    loss = client.loss_fn(UserNetwork(model), variables, "train")
    update = client.gradient(loss, variables["params"], gray, jnp.array([2]))[0]
    objective = {
        mode: gray_objective(model, update, variables, None, method=jaxinv.Method(batch_norm=mode))
        for mode in ("train", "eval")
    }
    assert objective["train"] < 1e-5 < 1e-2 < objective["eval"]
    with pytest.raises(UserError, match="batch_norm=train: the model has no BatchNorm"):
        theirs.invert(method=jaxinv.Method(batch_norm="train"))


@pytest.mark.slow
def test_closed_forms_labels_found_beside_and_modules_without_a_hash(theirs):
    layers = [lambda x: x.reshape(len(x), -1), nn.Dense(8), nn.relu, nn.Dense(4)]
    model = nn.Sequential(layers)  # its list of layers has no hash
    variables, update = theirs.gradient(theirs.image, jnp.array([2]), model)
    settings = {"image_shape": theirs.shape, "seeds": 1}
    exact = jaxinv.invert(model, variables, update, method="analytic", **settings)
    assert theirs.psnr(exact.best) > 100
    assert exact.verdict == "matched"
    method = jaxinv.Method(objective="l2", optimizer="lbfgs", sign="none", schedule="constant")
    joint = jaxinv.invert(
        model,
        variables,
        update,
        method=method,
        labels="joint",
        iterations=40,
        priors={},
        **settings,
    )
    assert joint.labels.tolist() == [2]
    with pytest.raises(UserError, match="first layer is dense"):
        theirs.invert(method="analytic", priors={}, iterations=None)


def test_functions_stand_in_place_of_names(theirs):
    """The published recipe, written as functions, takes the same steps as by its names."""
    settings = {"iterations": 12, "seeds": 2}
    named = theirs.invert(method=jaxinv.Method(gram="memory"), **settings)
    own = theirs.invert(
        method=jaxinv.Method(
            objective=lambda between: 1 - between.cross / jnp.sqrt(between.own * between.shared),
            optimizer=lambda: optax.scale_by_adam(),
            sign=lambda gradient, progress: jnp.sign(gradient),
            schedule=lambda step, iterations: step_decay(step, iterations),
        ),
        priors={lambda view: total_variation(view.images): 1e-3},
        **settings,
    )
    np.testing.assert_allclose(own.best, named.best, atol=2e-3)


def test_a_defense_that_is_known_is_simulated(theirs, gray_objective):
    gray, squash = jnp.full((1, 8, 8, 2), 0.5), lambda u: jax.tree.map(jnp.tanh, u)
    update = squash(jax.tree.map(lambda x: 10 * x, theirs.gradient(gray, jnp.array([2]))))

    def known(u):
        return squash(jax.tree.map(lambda x: 10 * x, u))

    arguments = theirs.model, update, theirs.variables, [2]
    assert gray_objective(*arguments, defense=known) < 1e-6
    assert gray_objective(*arguments) > 1e-3
    assert gray_objective(*arguments, defense="clip:1") > 1e-3
    with pytest.raises(UserError, match="defense=clap:1: unknown defense"):
        theirs.invert(defense="clap:1")


def test_what_needs_the_scale_asks_for_it(theirs):
    images = jnp.concatenate([theirs.image, 1 - theirs.image, theirs.image**2])
    sent = jax.tree.map(lambda x: 0.01 * x, theirs.gradient(images, jnp.array([2, 0, 2])))
    with pytest.raises(UserError, match=r"labels=counts: needs .* \(about 0.0\d+ times the mean"):
        theirs.invert(sent, images=3)
    with pytest.raises(UserError, match="objective=l2: needs the update's scale"):
        theirs.invert(sent, labels=[2, 0, 2], method=jaxinv.Method(objective="l2"))
    with pytest.raises(UserError, match="objective=l2: needs the update's scale"):
        theirs.invert(sent, labels=[2, 0, 2], method=SmoothedGaussNewton(), **A_PRIOR)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": [4]}, "labels: 4 is no class; the network has 4, from 0 to 3"),
        ({"labels": [-1]}, "labels: -1 is no class"),
        ({"labels": [0.9]}, "classes are whole numbers"),
        ({"labels": [[0.5, 0.5]]}, "distributions over 4 classes are wanted"),
        ({"labels": "idgl"}, "labels=idgl: give them, joint, or one of idlg, llg"),
        ({"labels": "idlg", "images": 2}, "labels=idlg: reads one label"),
        ({"seeds": 0}, "seeds=0: input should be greater than or equal to 1"),
        ({"iterations": 2.5}, "iterations=2.5: input should be a valid integer"),
        ({"std": 0.0}, "std=0.0: must be above 0"),
        ({"std": [1.0, -1.0]}, "std=.*: must be above 0"),
        ({"mean": np.nan}, "mean=nan: must be finite"),
        ({"mean": [0.5, 0.5, 0.5]}, "mean=.*: give one number, or one for each of 2 channels"),
        ({"priors": {"tw": 1.0}}, "known are"),
        ({"priors": {"tv": np.inf}}, r"priors\['tv'\]=inf: input should be a finite number"),
        ({"priors": {max: -1.0}}, r"priors\[.*max.*\]=-1.0: input should be greater than or equal"),
        ({"method": 3}, "method=3: give a Method, a GaussNewton, or a closed form's name"),
        ({"learned": {"denoizer": 1}}, r"learned\['denoizer'\]: unknown; known are denoiser, auto"),
        ({"learned": {"denoiser": 1}}, r"learned\['denoiser'\]: give variables"),
        (
            {"learned": {"denoiser": {"params": {}}}},
            r"learned\['denoiser'\]: of priors\['prior_denoiser'\]; ask for that, or leave it out",
        ),
        ({"learned": {"inverter": {"params": {}}}}, r"learned\['inverter'\]: of an inverter"),
        ({"annealing": {"anneal_to": 0.1}}, r"annealing\['anneal_to'\]: method=Method has none"),
        ({"image_prior": object()}, "image_prior: of a second-order attack, or of representation"),
        ({"priors": {"prior_batch_norm": 1.0}}, "the model has no BatchNorm"),
        ({"method": "dlg"}, "method=dlg: give a Method, or a closed form: analytic, spear, unmix"),
        ({"method": jaxinv.Method(local=TWO_STEPS)}, "client_lr: the client takes 2 steps"),
        ({"update_kind": "delta"}, "update_kind=delta: known are auto"),
        ({"precision": "half"}, "precision=half: known are"),
        ({"posterior": 8}, "posterior: of jaxinv.GaussNewton alone"),
        ({"polish": 1, "posterior": 8}, "posterior: of an image that is not polished"),
        ({"polish": 1, "defense": "clip:1"}, "polish: not under a defense that is known"),
        (
            {"defense": "noise:1,sign"},
            "defense=noise:1,sign: what sign makes of the noise in front",
        ),
        (
            {"labels": "joint", "priors": {"prior_features": 0.1}},
            "prior_features: reads features by the label; labels=joint has none",
        ),
        (OF_CLOSED_FORM | {"polish": 1}, "polish: of an attack with iterations"),
        (OF_CLOSED_FORM | {"lr": 0.1}, "lr: of gradient matching; leave it out"),
        (OF_CLOSED_FORM | {"iterations": 9}, "iterations: a closed form has none; leave it out"),
        (OF_CLOSED_FORM | {"priors": {"tv": 0.1}}, r"priors\['tv'\]: of gradient matching; leave"),
        (OF_CLOSED_FORM | {"labels": "joint"}, "labels=joint: the method takes labels as given"),
        (OF_CLOSED_FORM | {"method": "imprint"}, "reads what a server imprinted"),
        (
            {"method": SmoothedGaussNewton(local=TWO_STEPS), "client_lr": 0.1} | A_PRIOR,
            "method=SmoothedGaussNewton: is of one gradient",
        ),
        (
            {"method": SmoothedGaussNewton(), "defense": "dpsgd:1:0.1"} | A_PRIOR,
            "method=SmoothedGaussNewton: cannot adapt to a defense of each image's gradient",
        ),
        (
            {"method": jaxinv.Method(local=TWO_STEPS), "client_lr": 0.1, "defense": "dpsgd:1:0.1"},
            "defense: takes each image's own gradient of one step",
        ),
        ({"method": jaxinv.Method(priors=("prior_l2",))}, "method.priors: prior_l2 has no weight"),
        ({"statistics": {}}, "statistics: are sent where method.batch_norm is train-shared"),
    ],
)
def test_settings_that_cannot_be_are_one_line(theirs, settings, message):
    with pytest.raises(UserError, match=message):
        theirs.invert(**settings)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ({}, {"lr": 5.0}, "lr: of gradient matching; leave it out"),
        ({}, {"priors": {"prior_l2": 100.0}}, r"priors\['prior_l2'\]: of gradient matching; leave"),
        (
            {},
            {"priors": {"prior_denoiser": 7}},
            r"priors\['prior_denoiser'\]=7: .* share .* give 1",
        ),
        ({"denoiser": True}, {}, r"method.denoiser: give its share .*\{'prior_denoiser': 0.5\}"),
        ({"objective": "foo"}, {}, "method.objective='foo': unknown; known are cosine, l2"),
        ({"init_from": "normal"}, {}, "method.init_from='normal': unknown; known are mean, prior"),
        ({"batch_norm": "on"}, {}, "method.batch_norm='on': unknown; known are eval"),
        ({"cg_iterations": 0}, {}, "method.cg_iterations=0: input should be greater than"),
        (
            {},
            {"annealing": {"aneal_to": 1.0}},
            r"annealing\['aneal_to'\]: method=GaussNewton takes anneal_from, anneal_to, damping",
        ),
        (
            {},
            {"annealing": {"anneal_to": -1.0}},
            r"annealing\['anneal_to'\]=-1.0: input should be g",
        ),
        (
            {},
            {"annealing": {"anneal_to": 200.0}},
            r"=200: above anneal_from, 100; the error of the",
        ),
    ],
)
def test_settings_of_second_order_are_checked(theirs, method, settings, message):
    with pytest.raises(UserError, match=message):
        theirs.invert(method=jaxinv.GaussNewton(**method), **A_PRIOR | settings)


def test_a_smoothed_attack_draws_an_even_number_and_anneals_nothing(theirs):
    with pytest.raises(UserError, match=r"method.draws=3: input should be a multiple of 2"):
        theirs.invert(method=SmoothedGaussNewton(draws=3), **A_PRIOR)
    with pytest.raises(UserError, match="method=SmoothedGaussNewton takes inflation"):
        theirs.invert(method=SmoothedGaussNewton(), annealing={"anneal_to": 1.0}, **A_PRIOR)


def test_a_denoiser_has_the_share_that_is_given(theirs, monkeypatch):
    """It reaches the loop; where no share is given, no denoiser is asked."""
    seen = []

    def look(problem, method, numbers, keys, resources):
        seen.append(
            (method.denoiser, float(numbers.prior_denoiser[0]), float(numbers.anneal_to[0]))
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(trials, "run", look)
    settings = {"method": jaxinv.GaussNewton(), "image_prior": smooth_prior(8)}
    settings |= {"annealing": {"anneal_to": 1e-3}}
    shared = {"priors": {"prior_denoiser": 0.5}, "learned": {"denoiser": {"params": {}}}}
    for more in (shared, {"priors": {}}):
        with pytest.raises(KeyboardInterrupt):
            theirs.invert(**settings | more)
    assert seen == [(True, 0.5, pytest.approx(1e-3)), (False, 0.0, pytest.approx(1e-3))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adm"}, "method.optimizer='adm': unknown; known are adam, sgd, lbfgs"),
        ({"sign": "no"}, "method.sign='no': unknown; known are hard, soft, quantized, none"),
        ({"objective": "cos"}, "method.objective='cos': unknown; known are cosine, l2"),
        ({"init_from": "black"}, "method.init_from='black': unknown; known are normal"),
        ({"optimizer": "lbfgs"}, "method.optimizer='lbfgs': .* use sign='none'"),
        (
            {"exchange": "consensus", "representation": "generator"},
            "method.exchange='consensus': takes means",
        ),
        ({"simulation": "one"}, "method.simulation='one': unknown; known are unrolled, surrogate"),
        ({"simulation": "surrogate"}, "method.simulation='surrogate': of several local steps"),
        ({"defense": ("prune",)}, "method.defense: give it as defense=, with its strengths"),
        ({"entries": 0.0}, "method.entries=0: a share; give one above 0"),
        ({"entries": 0.5, "exchange": "halving"}, "method.entries: seeds that compare different"),
        ({"init_from": "learned"}, "of method.init_from='learned' all are the same; give 1"),
    ],
)
def test_a_method_is_checked(theirs, settings, message):
    with pytest.raises(UserError, match=message):
        theirs.invert(method=jaxinv.Method(**settings))
    with pytest.raises(UserError, match=r"priors\['prior_epoch_order'\]=0.1: known are prior_a"):
        theirs.invert(priors={"prior_epoch_order": 0.1})


def test_an_update_of_another_network_is_refused(theirs):
    with pytest.raises(UserError, match=r"must be those of.*there is no other among Conv"):
        theirs.invert({"other": np.ones(3)})
    with pytest.raises(UserError, match=r"Dense_0/bias is \(3,\), the network's \(4,\)"):
        theirs.invert({"Dense_0": {"bias": np.ones(3)}})
    with pytest.raises(UserError, match="update: Dense_0/bias has 1 NaN of 4"):
        theirs.invert({"Dense_0": {"bias": np.array([1, 2, np.nan, 1])}})
    with pytest.raises(UserError, match="model: must be a module of Flax"):
        jaxinv.invert(Net, theirs.variables, theirs.update, **theirs.settings)


def test_importing_the_command_leaves_the_function():
    code = (
        "import jaxinv, jaxinv.invert, jaxinv.invert.__main__; from jaxinv.invert import Inversion;"
        "assert jaxinv.invert.__name__ == 'invert' and callable(jaxinv.invert)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
        loss,
        {"params": params},
        update,
        image_shape=(2, 2, 3),
        labels=labels,
        seeds=4,
        iterations=300,
        client_lr=0.1,
        priors={},
        method=jaxinv.Method(local=local),
    )
    assert np.nanmin(found.objectives) < 1e-3
    np.testing.assert_allclose(found.best, images, atol=0.1)
    with pytest.raises(UserError, match="labels=idlg: cannot be read under a loss of your own"):
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


def test_the_command_reads_the_label_and_writes_the_pictures(sent, tmp_path, capsys):
    path, _, label = sent
    flags = ["--victim", "lenet_zhu-tiles", "--seeds", "2", "--iterations", "4", "--out"]
    assert command(["--update", str(path), *flags, str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert f"labels: {label}" in shown
    assert "not: no better than a guess" in shown  # after four steps
    assert re.search(
        r"a gray image 0\.\d+, of the mean image 0\.\d+, to be expected at the truth 6e-08", shown
    )
    assert (tmp_path / "out" / "reconstructions.png").stat().st_size > 1000
    with np.load(tmp_path / "out" / "reconstructions.npz") as arrays:
        assert arrays["reconstructions"].shape == (2, 1, 32, 32, 3)
        assert str(arrays["verdict"]) == "not"


@pytest.mark.slow
def test_the_command_draws_error_bars_beside_the_best_image(sent, tmp_path, capsys):
    flags = ["--victim", "lenet_zhu-tiles", "--attack", "bayes", "--seeds", "1"]
    flags += ["--iterations", "3", "--cg-iterations", "4", "--posterior", "8", "--out"]
    assert command(["--update", str(sent[0]), *flags, str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"plan: 1 x 1 trials in groups of .* MiB each", shown)
    assert "standard deviation of a pixel: median 0." in shown
    assert (tmp_path / "out" / "std.png").stat().st_size > 1000
    with np.load(tmp_path / "out" / "reconstructions.npz") as arrays:
        assert arrays["std"].shape == (1, 32, 32, 3)
        assert (arrays["std"] > 0).all()


OF_TILES = ["--update", "U", "--victim", "lenet_zhu-tiles"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--victim", "lenet_zhu-tiles"], "--update: the file to attack"),
        (["--update", "U"], "--victim: the network that the update is of"),
        (["--update", "U", "--victim", "lenet_zhu-cifar10"], r"Dense_0/bias is \(7,\)"),
        (["--update", "no.npz", "--victim", "V"], "no.npz: cannot be read as"),
        (["--update", "U", "--victim", "V", "--labels", "known"], "give --classes"),
        (
            ["--update", "U", "--victim", "V", "--classes", "99"],
            "99 is no class; the network has 7",
        ),
        (["--update", "U", "--victim", "V", "--attack", "analytic"], "first layer is dense"),
        (["--update", "U", "--victim", "V", "--batch-norm", "train"], "the model has no BatchNorm"),
        (["--update", "U", "--victim", "V", "--prior-batch-norm", "1"], "no BatchNorm"),
        (["--update", "U", "--victim", "V", "--client-epochs", "2"], "client_lr: .* takes 2 steps"),
        (["--update", "U", "--victim", "V", "--update-kind", "weights"], "is it a gradient"),
        (["--update", "U", "--victim", "V", "--gram", "on"], "unrecognized arguments: --gram on"),
        (["--update", "U", "--victim", "V", "--attack", "imprint"], "no --victim stands behind"),
        (["--update", "U", "--victim", "V", "--out", "U"], "is a file; give a folder"),
    ],
)
def test_bad_input_is_one_line(sent, tmp_path, capsys, flags, message):
    names = {"U": str(sent[0]), "V": "lenet_zhu-tiles"}
    flags = [names.get(flag, flag) for flag in flags]
    flags += [] if "--out" in flags else ["--out", str(tmp_path / "out")]
    assert command(flags) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_the_example_of_flower_runs_from_the_servers_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(EXAMPLES / "flower_update.py"))
    assert example["main"](["--seeds", "2", "--iterations", "4"]) == 0
    shown = capsys.readouterr().out
    assert "round_1.npz: of a photograph of class rocket" in shown
    assert "labels: rocket" in shown
    assert "0.1 times the mean gradient" in shown
