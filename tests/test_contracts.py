"""What every entry of every table promises, on a network of a few hundred weights.

A new entry is tested here by being in its table. An iterative attack, whatever its parts: objective
0 at the truth, two steps that stay finite and make the loss fall, states of one dtype, the same
start from the same key. A pure function: compiled as op by op, dtypes kept, the same bits twice.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinv import client, data, defenses
from jaxinv.attacks import ATTACKS, CLOSED_FORM, labels
from jaxinv.attacks.base import Candidate, Known
from jaxinv.attacks.closed_form import Given
from jaxinv.attacks.exchanges import EXCHANGES
from jaxinv.attacks.gauss_newton import PRIOR_INITS
from jaxinv.attacks.gradient_matching import (
    INITS,
    LAYERS,
    OPTIMIZERS,
    PRIOR_SCHEDULES,
    SCHEDULES,
    SIGNS,
    SIMULATIONS,
    Method,
)
from jaxinv.attacks.levenberg_marquardt import LevenbergMarquardt
from jaxinv.attacks.objectives import OBJECTIVES, compare
from jaxinv.attacks.priors import PRIORS, SEEDS, View, needing
from jaxinv.attacks.representations import REPRESENTATIONS, Canvas
from jaxinv.data import image_prior
from jaxinv.defenses.base import ClientContext, PublicFacts
from jaxinv.engine import trials
from jaxinv.engine.targets import ClientSettings, make_targets, order_keys
from jaxinv.errors import UserError
from jaxinv.learned import nets
from jaxinv.networks.imprint import imprinted
from jaxinv.networks.kinks import relu
from jaxinv.networks.layers import BATCH_NORM_MOMENTUM
from jaxinv.networks.mlp import MLP
from jaxinv.networks.vit import ViT
from jaxinv.settings.schema import Cell
from jaxinv.types import Normalization, Target, Truth

SHAPE, CLASSES, CLASSIFIER = (6, 6, 3), 4, ("Dense_1",)
NORMALIZATION = Normalization(jnp.full(3, 0.5), jnp.full(3, 0.25))
# Strengths that leave something of an update. A defense without an entry here fails the tests.
STRENGTHS = {
    "dpsgd": "dpsgd:1:1e-3",
    "noise": "noise:1e-6",
    "laplace": "laplace:1e-6",
    "relative": "relative:0.01",
    "prune": "prune:0.5",
    "prune-layer": "prune-layer:0.5",
    "top-k": "top-k:60",
    "clip": "clip:0.1",
    "sign": "sign",
    "quantize": "quantize:8",
    "soteria": "soteria:0.3",
}


class Net(nn.Module):
    """Two dense layers, BatchNorm and a nonlinearity: what every attack can use."""

    kinked: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6)(x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=BATCH_NORM_MOMENTUM)(x)
        x = relu(x) if self.kinked else nn.sigmoid(x)
        return nn.Dense(CLASSES)(x)


def wide(tree):
    """A tree's floats in float64, under `jax.enable_x64`."""

    def of(x):
        return jnp.asarray(x, jnp.float64 if x.dtype.kind == "f" else x.dtype)

    return jax.tree.map(of, tree)


def strong(tree):
    """A tree whose numbers have types of their own, not those of Python's numbers."""

    def number(x):
        return jnp.issubdtype(x.dtype, jnp.number)

    def of(x):
        return lax.convert_element_type(x, x.dtype) if number(x) else x

    return jax.tree.map(of, tree)


class Lab:
    """One private batch on a network, and any client's update of it."""

    def __init__(self, module, images=1):
        key = jax.random.key(0)
        pixels = jax.random.uniform(key, (1, images, *SHAPE))
        self.module, self.truths = module, Truth(pixels, (jnp.arange(images) + 2)[None] % CLASSES)
        self.variables = jax.jit(module.init)(jax.random.key(1), pixels[0])
        self.truth = NORMALIZATION.normalize(pixels[0])
        self.learned = {
            "denoiser": nets.Denoiser(4).init(key, pixels[0], jnp.ones(images)),
            "autoencoder": nets.Autoencoder(2).init(key, pixels[0]),
        }
        self.prior = jax.tree.map(
            jnp.float32,
            image_prior.of_spectrum(
                np.zeros(SHAPE), np.broadcast_to(np.eye(3), (*SHAPE[:2], 3, 3))
            ),
        )

    def shared(self, defense="none", known=(), **clients):
        """What the attacker gets of the one target."""
        chain = defenses.parse(defense)
        shared = make_targets(
            self.module,
            self.variables,
            self.truths,
            NORMALIZATION,
            ClientSettings(
                defense=defenses.names(chain), known_defense=known, classifier=CLASSIFIER, **clients
            ),
            0.1,
            order_keys([0]),
            defenses.strengths(chain),
        )
        return jax.tree.map(lambda x: x[0], shared.targets)


@functools.cache
def lab(kinked=False, images=1):
    return Lab(Net(kinked), images)


@functools.cache
def plain(kinked=False, images=1, observe=True):
    """An undefended gradient, compared where asked with the running statistics."""
    return lab(kinked, images).shared(observe=observe)


class Program(NamedTuple):
    """One trial of an attack, or two where they are coupled: each is compiled once."""

    draw: Callable  # (numbers, given, start) -> states
    step: Callable  # (numbers, given, index, states) -> states, losses


@functools.cache
def program(lab, attack):
    """What an attack does on a network; `given` are the variables and what else is known."""
    coupled = attack.couples_seeds
    over_seeds = functools.partial(jax.vmap, axis_name=SEEDS) if coupled else lambda f: f
    key = jax.random.key(2)
    keys = jax.random.split(key) if coupled else key

    def known(variables, *given):
        loss = trials.simulate(lab.module, variables, attack)
        return Known(loss, variables["params"], *given)

    # Strongly typed, so that all steps are one program's.
    def draw(own, given, start):
        shape = (len(given[1].labels), *SHAPE)

        def init(key):
            return attack.init(own, key, shape, known(*given), start)

        return strong(over_seeds(init)(keys))

    def step(own, given, index, states):
        def one(state):
            return attack.step(own, known(*given), index, state)

        return strong(over_seeds(one)(states))

    return Program(jax.jit(draw), jax.jit(step))


def keeps_promises(
    lab,
    target,
    attack,
    start=None,
    truth=None,
    at_truth=1e-5,
    way_back=True,
    falls=True,
    **settings,
):
    """Takes two steps; see the file's words.

    Args:
      start: where to begin, for an attack that does not draw one.
      truth: the candidate that the client's update is of; the private batch where not given.
      at_truth: the objective that rounding may leave there; None where the update is noisy.
      way_back: whether the attack can begin with an image; else it refuses one.
      falls: whether the loss does.

    Returns:
      The losses on the way, [step, (objective, prior), *seed].
    """
    settings = Cell().model_dump() | {"client_lr": 0.1, "lr": 0.01} | settings | {"iterations": 2}
    own = attack.numbers(1, {k: v for k, v in settings.items() if not isinstance(v, str)})
    own = jax.tree.map(lambda x: np.asarray(x).ravel()[0], own)
    own = jax.tree.map(lambda x: jnp.float32(x) if x.dtype.kind == "f" else jnp.int32(x), own)
    given = (lab.variables, target, NORMALIZATION, lab.prior, lab.learned)
    draw, step = program(lab, attack)
    states, again = draw(own, given, start), draw(own, given, start)
    jax.tree.map(np.testing.assert_array_equal, states.candidate, again.candidate)
    truth = Candidate(lab.truth, None) if truth is None else truth
    if way_back:
        here = draw(own, given, truth)
    else:
        with pytest.raises(UserError, match="there is no way back to it from an image"):
            draw(own, given, truth)
        here, at_truth = states, None
    there, losses = step(own, given, jnp.int32(2), here)  # the last call only evaluates
    jax.tree.map(np.testing.assert_array_equal, there.candidate, here.candidate)
    if at_truth is not None:
        np.testing.assert_allclose(losses.objective, 0, atol=at_truth)

    # Both ends of the way as the last call sees them, with whatever changes on it.
    _, before = step(own, given, jnp.int32(2), states)
    seen = []
    for index in range(3):
        states, losses = step(own, given, jnp.int32(index), states)
        seen.append(np.asarray(losses))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((states.candidate, losses)))
    assert not falls or (seen[2].sum(axis=0) < np.asarray(before).sum(axis=0)).all()

    with jax.enable_x64(True):
        own, given, start = wide((own, given, start))
        states = jax.eval_shape(draw, own, given, start)
        kinds = states, jax.eval_shape(step, own, given, jnp.int32(0), states)
        assert "float32" not in {str(x.dtype) for x in jax.tree.leaves(kinds)}
    return np.array(seen)


# The parts of gradient matching: each name of each table in one method at least.

# Without the box, whose first projection may raise the loss.
PLAIN = Method(schedule="constant", priors=(), box=False, classifier=CLASSIFIER)
PARTS = {
    "objective": list(OBJECTIVES),
    "sign": list(SIGNS),
    "schedule": list(SCHEDULES),
    "init_from": list(INITS),
    "box": [False, True],
    "layers": list(LAYERS),
    "prior_schedule": list(PRIOR_SCHEDULES),
    "optimizer": [name for name in OPTIMIZERS if name != "lbfgs"],  # which a named attack has
}
MIXED = [
    PLAIN.replace(**{part: names[i % len(names)] for part, names in PARTS.items()})
    for i in range(max(map(len, PARTS.values())))
]


@pytest.mark.parametrize("method", MIXED, ids=lambda m: f"{m.optimizer}-{m.sign}-{m.init_from}")
def test_parts_of_gradient_matching(method):
    keeps_promises(lab(), plain(), method)


@pytest.mark.parametrize("name", SIMULATIONS)
def test_simulations(name):
    """Of two local steps; the surrogate's one gradient is nearly what they add up to."""
    local = client.Local(2)
    target = lab().shared(local=local, assumed=local)
    method = PLAIN.replace(local=local, simulation=name)
    keeps_promises(lab(), target, method, at_truth=1e-5 if name == "unrolled" else 1e-2)


def test_a_share_of_the_entries():
    """Another share for every step, whose losses do not compare."""
    keeps_promises(lab(), plain(), PLAIN.replace(entries=0.5), falls=False)


@pytest.mark.parametrize("name", EXCHANGES)
def test_exchanges(name):
    """What a seed goes on from is moved a little, and its loss may rise."""
    keeps_promises(lab(), plain(), PLAIN.replace(exchange=name), falls=False)


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_representations(name):
    """As what an attack moves; and as functions, at the end of the way one another's inverses."""
    entry = REPRESENTATIONS[name]
    way_back = entry.to_parameters is not None
    method = PLAIN.replace(representation=name)
    keeps_promises(lab(), plain(), method, way_back=way_back, lr=0.01 * entry.pace)

    def start(key, kind):
        canvas = Canvas((2, *SHAPE), *jax.tree.map(kind, (NORMALIZATION, lab().prior)))
        if entry.draw is None:
            return canvas, jax.random.normal(key, canvas.shape).astype(kind)
        return canvas, jax.tree.map(kind, entry.draw(canvas, key))

    def shown(key, progress, kind=jnp.float32):
        canvas, parameters = start(key, kind)
        images = entry.to_images(canvas, parameters, kind(progress))
        return images, entry.to_parameters(canvas, images) if way_back else parameters

    key = jax.random.key(6)
    images, parameters = shown(key, 0.99)
    compiled, _ = jax.jit(shown)(key, 0.99)
    np.testing.assert_allclose(compiled, images, atol=1e-5)
    np.testing.assert_array_equal(compiled, jax.jit(shown)(key, 0.99)[0])
    assert images.shape == (2, *SHAPE)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
        parameters,
        start(key, jnp.float32)[1],
    )
    if not way_back:
        pixels = images * NORMALIZATION.std + NORMALIZATION.mean
        assert ((pixels > 0) & (pixels < 1)).all()
    with jax.enable_x64(True):
        kinds = jax.eval_shape(functools.partial(shown, kind=jnp.float64), key, 0.1)
        assert {x.dtype for x in jax.tree.leaves(kinds)} == {np.dtype(np.float64)}


def test_priors_of_one_gradient():
    """All that an attacker of one gradient can have, together."""
    names = tuple(name for name in PRIORS if name not in needing("epochs"))
    method = PLAIN.replace(priors=names)
    seen = keeps_promises(lab(), plain(), method, **dict.fromkeys(names, 0.01))
    assert (seen[0, 1] > 0).all()


def test_priors_of_epochs():
    local = client.Local(2)
    method = PLAIN.replace(priors=needing("epochs"), by_epoch=True, local=local)
    target = lab().shared(local=local, assumed=local)
    truth = Candidate(jnp.stack([lab().truth] * 2), None)
    keeps_promises(lab(), target, method, truth=truth, **dict.fromkeys(method.priors, 0.01))


@pytest.mark.parametrize("name", PRIORS)
def test_prior_as_a_function(name):
    one, target = lab(), plain()
    images = jax.random.normal(jax.random.key(3), (2, 1, *SHAPE))  # of two seeds
    if name in needing("epochs"):
        images = jnp.stack([images, images[::-1]], axis=1)
    update, statistics = (
        jax.tree.map(lambda x: x + 1, tree) for tree in (target.update, target.statistics)
    )

    def penalty(images, update, statistics, target):
        of_network = one.variables["params"], CLASSIFIER
        at = NORMALIZATION, one.learned, jnp.int32(0), jnp.zeros(())
        view = View(images, update, statistics, target, *of_network, *at)
        return PRIORS[name].penalty(view)

    of_seeds = jax.vmap(penalty, in_axes=(0, None, None, None), axis_name=SEEDS)
    arguments = (images, update, statistics, target)
    plainly = of_seeds(*arguments)
    assert (plainly > 0).all()
    np.testing.assert_allclose(jax.jit(of_seeds)(*arguments), plainly, rtol=1e-5)
    with jax.enable_x64(True):
        assert jax.eval_shape(of_seeds, *wide(arguments)).dtype == np.float64


# The named attacks, and the polish behind them.


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in CLOSED_FORM])
def test_named_attacks(name):
    cell = Cell(attack=name, **ATTACKS[name].settings)
    kinked = name == "smoothed_bayes"
    one, target = lab(kinked), plain(kinked, observe=cell.prior_batch_norm > 0)
    attack = cell.make_attack(CLASSES, CLASSIFIER)
    logits = 100.0 * jax.nn.one_hot(target.labels, CLASSES) if cell.labels == "joint" else None
    settings = cell.numbers() | {"anneal_to": 1.0}
    settings["lr"] *= 1 if cell.optimizer == "lbfgs" else 0.1
    keeps_promises(one, target, attack, truth=Candidate(one.truth, logits), **settings)


@pytest.mark.parametrize("start", [name for name in PRIOR_INITS if name != "mean"])  # bayes has it
def test_second_order_starts(start):
    cell = Cell(**ATTACKS["bayes"].settings | {"attack": "bayes", "init": start})
    attack = cell.make_attack(CLASSES, ())
    keeps_promises(lab(), plain(observe=False), attack, anneal_to=1.0)


def test_polish():
    near = lab().truth + 0.1 * jax.random.normal(jax.random.key(4), lab().truth.shape)
    attack = LevenbergMarquardt()
    keeps_promises(lab(), plain(observe=False), attack, start=Candidate(near, None))


# What clients do.


@pytest.mark.parametrize("batch_norm", [name for name in client.BATCH_NORM if name != "eval"])
def test_batch_norm_protocols(batch_norm):
    """In evaluation mode are the clients of all other tests."""
    two = lab(images=2)
    target = two.shared(batch_norm=batch_norm)
    assert bool(jax.tree.leaves(target.statistics)) == (batch_norm == "train-shared")
    priors = needing("statistics") if batch_norm == "train-shared" else ()
    method = PLAIN.replace(batch_norm=batch_norm, priors=priors, optimizer="sgd", sign="none")
    # The statistics of two images leave the objective nearly flat: a longer step, to see it fall.
    keeps_promises(two, target, method, statistics=0.01, lr=1.0)


@pytest.mark.parametrize("name", defenses.DEFENSES)
def test_defenses(name):
    """As functions, and against the attacker that is blind to them."""
    one, defense, facts = lab(), defenses.DEFENSES[name], PublicFacts(CLASSIFIER, 1)
    chain = defenses.parse(STRENGTHS[name])
    update, strengths = plain().update, jax.tree.map(jnp.float32, defenses.strengths(chain))

    def defended(seed, update, strengths):
        scene = ClientContext(one.module, one.variables, one.truth, one.truths.labels[0])
        sent = defenses.defend((name,), update, strengths, jax.random.key(seed), scene)
        knowledge = defenses.adapt((name,), strengths, sent, facts)
        return sent, knowledge, defenses.expect((name,), knowledge, update)

    compiled = jax.jit(defended)
    (sent, knowledge, expected), (again, *_), (other, *_) = (
        compiled(seed, update, strengths) for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, sent, again)
    same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (sent, other)))]
    assert all(same) != defense.random
    assert jax.tree.map(jnp.result_type, sent) == jax.tree.map(jnp.result_type, update)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(sent))
    for a, b in zip(*map(jax.tree.leaves, (sent, defended(0, update, strengths)[0]))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * scale)
    with jax.enable_x64(True):
        kinds = jax.eval_shape(defended, 0, *wide((update, strengths)))
        assert "float32" not in {str(x.dtype) for x in jax.tree.leaves(kinds)}

    # What an adaptive attacker makes of it.
    weights = np.array(jax.tree.leaves(knowledge.weights))
    assert ((weights >= 0) & (weights <= 1)).all()
    assert all((np.asarray(v) >= 0).all() for v in jax.tree.leaves(knowledge.variances))
    if name in OF_ONE_UPDATE:
        at_truth = OBJECTIVES["cosine"](compare(expected, sent, knowledge.weights))
        np.testing.assert_allclose(at_truth, 0, atol=1e-6)
    target = plain()._replace(update=sent)
    keeps_promises(one, target, PLAIN, at_truth=None)


# Defenses that an adaptive attacker can repeat, and others; all of the table.
OF_ONE_UPDATE = ("prune", "prune-layer", "top-k", "clip", "soteria")
ADAPTIVE = [OF_ONE_UPDATE, ("dpsgd", "noise", "laplace"), ("relative", "quantize"), ("sign",)]


def test_every_defense_has_its_adaptive_attacker():
    assert {name for chain in ADAPTIVE for name in chain} == set(defenses.DEFENSES)


@pytest.mark.parametrize("chain", ADAPTIVE, ids="-".join)
def test_adaptive_attackers(chain):
    target = lab().shared(",".join(STRENGTHS[name] for name in chain), known=chain)
    method = PLAIN.replace(defense=chain)
    keeps_promises(lab(), target, method, at_truth=1e-5 if chain == OF_ONE_UPDATE else None)


def test_a_defense_draws_the_same_wherever_it_stands_in_the_table(monkeypatch):
    update = {"w": jnp.zeros(5)}

    def draw():
        return defenses.defend(("noise",), update, ((jnp.float32(1.0),),), jax.random.key(0), None)[
            "w"
        ]

    before = draw()
    backwards = dict(reversed(defenses.DEFENSES.items()))
    monkeypatch.setattr(defenses, "DEFENSES", {"new": None, **backwards})
    np.testing.assert_array_equal(draw(), before)


@pytest.mark.parametrize("grouping", data.GROUPINGS)
def test_groupings(grouping):
    given = np.array([0, 0, 1, 0, 1, 2, 2, 1])
    expected = {
        "stored": [[0, 1], [2, 3]],
        "distinct": [[0, 2], [1, 4]],
        "repeated": [[0, 1], [2, 4]],
    }
    chosen = data.group(given, 2, 2, 3, grouping)
    np.testing.assert_array_equal(chosen, expected[grouping])
    assert len(set(chosen.ravel())) == chosen.size


def test_a_class_with_too_few_images_is_passed_over():
    chosen = data.group(np.array([2, 0, 1, 0, 1, 1, 1]), 3, 2, 3, "repeated")
    assert chosen.tolist() == [[1, 3], [2, 4], [5, 6]]
    with pytest.raises(UserError, match="too few images for --grouping repeated"):
        data.group(np.array([2, 0, 1, 0]), 2, 2, 3, "repeated")


# What is read off an update.


@pytest.mark.parametrize("rule", labels.LABELS)
def test_label_rules(rule):
    """One image: every rule finds its class."""
    if rule == "known":
        assert labels.LABELS[rule] is None
        return
    one = lab()

    def read(update):
        return labels.infer(rule, one.module, one.variables, update, SHAPE, 1)

    update = plain().update
    found, again = jax.jit(read)(update), jax.jit(read)(update)
    assert found.tolist() == again.tolist() == one.truths.labels[0].tolist()
    assert found.dtype == np.int32
    assert read(update).tolist() == found.tolist()


# Learned ones are of what they have learned: tests/test_learned.py.
@pytest.mark.parametrize("name", [name for name in CLOSED_FORM if name != "learned"])
def test_closed_forms(name):
    """One image from the gradient of a network it is for, exact by its own evidence."""
    module, shape = MLP(CLASSES, width=32), SHAPE
    if name == "patches":
        module, shape = ViT(CLASSES, width=64, depth=1), (8, 8, 3)
    with jax.enable_x64(True):
        image = jax.random.normal(jax.random.key(5), (1, *shape), jnp.float64)
        variables = wide(jax.jit(module.init)(jax.random.key(1), image))
        if name == "imprint":
            module, variables = imprinted(module, variables, shape, 8, np.linspace(-1, 1))
            variables = wide(variables)
        loss = client.loss_fn(module, variables)
        sent, _ = jax.jit(
            lambda: client.gradient(loss, variables["params"], image, jnp.array([2]))
        )()

        def recover(key):
            target = Target(sent, jnp.array([2], jnp.int32))
            return CLOSED_FORM[name].find(Given(module, variables, target, 1, shape, key))

        compiled = jax.jit(recover)
        found, again = (compiled(jax.random.key(0)) for _ in range(2))
        assert found.exact.all()
        assert found.images.dtype == np.float64
        np.testing.assert_allclose(found.images, image, atol=1e-7)
        np.testing.assert_array_equal(found.images, again.images)
        np.testing.assert_allclose(recover(jax.random.key(0)).images, found.images, atol=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name):
    def draw(seed):
        return jax.tree.map(
            lambda x: jax.random.normal(jax.random.key(seed), x.shape, x.dtype), plain().update
        )

    own, sent = draw(1), draw(2)

    def of(a, b):
        return OBJECTIVES[name](compare(a, b))

    np.testing.assert_allclose(of(own, own), 0, atol=1e-6)
    assert of(own, sent) > 0
    np.testing.assert_allclose(jax.jit(of)(own, sent), of(own, sent), rtol=1e-5)
    with jax.enable_x64(True):
        assert jax.eval_shape(of, *wide((own, sent))).dtype == np.float64


@pytest.mark.parametrize(
    "table",
    [SIGNS, SCHEDULES, INITS, PRIOR_SCHEDULES, LAYERS],
    ids=["signs", "schedules", "inits", "prior schedules", "layers"],
)
def test_pure_functions(table):
    for function in filter(None, table.values()):
        if table is INITS:

            def call(key, function=function):
                return function(key, (2, *SHAPE))

            arguments = (jax.random.key(0),)
        elif table is SIGNS:
            call, arguments = function, (jnp.array([-3.0, 0.0, 0.2]), jnp.float32(0.5))
        elif table is PRIOR_SCHEDULES:
            call, arguments = function, (jnp.float32(0.3),)
        elif table is LAYERS:
            call, arguments = functools.partial(function, 0.5), (jnp.float32(0.1),)
            assert function(0.1, jnp.float32(0.99)) == 1  # nothing is left out in the end
        else:
            call, arguments = function, (jnp.int32(3), jnp.int32(8))
        compiled, plainly = jax.jit(call)(*arguments), call(*arguments)
        np.testing.assert_allclose(compiled, plainly, rtol=1e-6)
        assert compiled.dtype == plainly.dtype == np.float32
        np.testing.assert_array_equal(compiled, jax.jit(call)(*arguments))


def test_signs_by_their_formulas():
    gradient, half = np.array([-3.0, 0.0, 0.2], np.float32), jnp.float32(0.5)
    expected = {
        "hard": np.sign(gradient),
        "soft": np.tanh(gradient / 2) * 2,
        "quantized": np.sign(gradient),  # of a median of 0.2 both are beyond the largest step
        "none": gradient,
    }
    assert set(expected) == set(SIGNS)
    for name, values in expected.items():
        np.testing.assert_allclose(SIGNS[name](gradient, half), values, rtol=1e-6)
    # Halves of a median of 1: 0.4 rounds to half of it, 0.2 to nothing but the sign.
    graded = SIGNS["quantized"](jnp.array([-0.4, 0.2, 1.0, 1.0, -9.0]), half)
    np.testing.assert_allclose(graded, [-0.6, 0.2, 1.0, 1.0, -1.0], rtol=1e-6)
    assert np.isfinite(SIGNS["quantized"](jnp.zeros(3), half)).all()
