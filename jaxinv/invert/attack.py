"""Attack the updates of a network of your own: what `jaxinv.invert` does.

What a user can get wrong is checked (`checks.py`) before the attack compiles; what was sent is read
as gradients, and labels off it where a rule is asked for; then it goes through the assembly of all
attacks, without a truth.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinv import defenses
from jaxinv.attacks import ATTACKS, FAMILIES, ClosedForm
from jaxinv.attacks.base import Attack
from jaxinv.attacks.gauss_newton import GaussNewton
from jaxinv.attacks.gradient_matching import (
    Method,
    default_rate,
    may_be_surrogate,
    may_drop_gradients,
)
from jaxinv.attacks.gram import choose_rule
from jaxinv.attacks.labels import LABELS, infer
from jaxinv.client import kinds, updates
from jaxinv.data.image_prior import ImageFacts, ImagePrior, load_prior
from jaxinv.defenses.base import Defense, PublicFacts
from jaxinv.engine import planner, trials
from jaxinv.engine.assembly import Cast, Work, attack_targets
from jaxinv.engine.closed_form import Recovery
from jaxinv.engine.targets import seed_keys
from jaxinv.errors import UserError
from jaxinv.invert.checks import (
    SecondOrder,
    as_network,
    as_variables,
    check_annealing,
    check_finish,
    check_fit,
    check_labels,
    check_learned,
    check_method,
    check_normalization,
    check_numbers,
    check_outputs,
    check_priors,
    check_read,
    check_scale,
    check_start,
    check_statistics,
    check_update,
)
from jaxinv.invert.verdict import Guesses, guesses, verdict
from jaxinv.machine import runtime
from jaxinv.networks.inspect import Classifier, classifier_path, find_classifier
from jaxinv.networks.user import UserNetwork, plain
from jaxinv.types import Normalization, PyTree, Target


class Inversion(NamedTuple):
    """What the attacker ends with. Axis 0 is the seed."""

    reconstructions: Float[np.ndarray, "seed batch height width channel"]  # pixels in [0, 1]
    objectives: Float[np.ndarray, " seed"]  # NaN where the trial left the finite numbers
    labels: np.ndarray  # [batch, ...]: as given, read off the update, or the best seed's own
    trace_steps: np.ndarray  # [point]
    trace_objectives: Float[np.ndarray, "point seed"]
    guesses: Guesses  # objectives of images that say nothing, and the truth's expected one
    sent: kinds.Received  # how the update was read
    # Of the posterior around the best seed's images, in pixels: each one's standard deviation.
    std: Float[np.ndarray, "batch height width channel"] | None = None

    @property
    def best(self) -> Float[np.ndarray, "batch height width channel"]:
        """The reconstruction of lowest objective: the attacker's choice.

        Raises:
          UserError: no trial stayed finite.
        """
        if np.isnan(self.objectives).all():
            raise UserError("lr: no seed stayed finite; lower it, or keep the box")
        return self.reconstructions[np.nanargmin(self.objectives)]

    @property
    def verdict(self) -> str:
        """Whether the best seed explains the update: matched, partly, or not (`verdict.py`)."""
        finite = self.objectives[np.isfinite(self.objectives)]
        return verdict(float(finite.min()), self.guesses) if len(finite) else "not"


def invert(model: Any, variables: PyTree, update: PyTree, **settings: Any) -> Inversion:
    """Reconstructs the images behind one update, from many random seeds at once.

    As `invert_all`, with the labels and statistics of this one update.
    """
    for name in ("labels", "statistics"):
        if settings.get(name) is not None and not isinstance(settings[name], str):
            settings[name] = [settings[name]]
    return invert_all(model, variables, [update], **settings)[0]


def invert_all(
    model: Any,
    variables: PyTree,
    sent: Sequence[PyTree],
    *,
    image_shape: tuple[int, int, int],
    labels: Sequence[Any] | str | None = None,
    images: int = 1,
    statistics: Sequence[PyTree] | None = None,
    update_kind: str = kinds.AUTO,
    client_lr: float | None = None,
    loss: Callable[[Array, Array], Array] | None = None,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    seeds: int | None = None,
    iterations: int | None = None,
    lr: float | None = None,
    priors: Mapping[str | Callable, float] | None = None,
    method: Method | SecondOrder | str = Method(),  # noqa: B008
    defense: str | Defense | Callable[[PyTree], PyTree] = defenses.NONE,
    image_prior: ImagePrior | None = None,
    learned: Mapping[str, PyTree] = MappingProxyType({}),
    annealing: Mapping[str, float] = MappingProxyType({}),
    polish: int = 0,
    posterior: int = 0,
    precision: str = "float32",
    memory: float | None = None,
    progress: Callable[[int, float], None] = lambda steps, psnr: None,
    announce: Callable[[str], None] = lambda plan: None,
) -> list[Inversion]:
    """Reconstructs the images behind updates of one network, targets x seeds in one compiled loop.

    Args:
      model: a module of Flax Linen or nnx that gives logits, called with its own `train` or
        `deterministic` argument and without its dropout; or a function `loss(params, images,
        labels)`, the mean over the images. `nn.Conv` layers run on the trilinear convolution.
      variables: {"params": ...} and whatever else the model holds; None of an nnx module's own.
      sent: what the clients sent, each shaped like `variables["params"]` or a part of it: all of
        the same layers, and of as many images.
      image_shape: height, width, channel of one image.
      labels: for each update its images' classes, distributions over classes, or what `loss` takes;
        or the rule (`attacks.labels.LABELS`) by which they are read off it; or "joint", found
        beside the images; None for idlg of one image, else counts.
      images: how many images an update is of, where no labels are given.
      statistics: for each update what the client's BatchNorm layers measured of its batch, shaped
        like `variables["batch_stats"]`, where `method.batch_norm` is "train-shared".
      update_kind: what was sent (`client.kinds.KINDS`), or "auto".
      client_lr: the client's learning rate: asked for where it took several steps, and where the
        scale of a difference of parameters is needed.
      loss: of a module's outputs and labels, the mean over the images; None for cross-entropy.
      mean, std: the model sees `(pixels - mean) / std`; scalars or one per channel.
      seeds, iterations: random seeds, and steps of each; None is 32 and 1,000 of gradient matching,
        a seed and the steps of `--attack bayes` or `smoothed_bayes` of second order, a seed of a
        closed form.
      lr: learning rate of gradient matching; None is `gradient_matching.default_rate`.
      priors: weights of priors by name (`jaxinv.attacks.priors.PRIORS`) or function; None is 0.01
        of "tv" for gradient matching and none else. `jaxinv.GaussNewton` takes "prior_denoiser",
        which is the denoiser's share there.
      method: `jaxinv.Method`: objective, optimizer, sign, schedule, init, box, what the client's
        BatchNorm does and its local steps, of which the default is Geiping's on a single gradient;
        `jaxinv.GaussNewton`, the second-order attack; or the name of a closed form
        (`attacks.CLOSED_FORM`).
      defense: what the clients did to their updates, as far as it is known: "clip:1,noise:1e-4", a
        `Defense`, or a function of an update.
      image_prior: of a second-order attack, or of `method.representation="whitened"`
        (`jaxinv.data.image_prior`); None: natural photographs.
      learned: variables of what the attacker has trained (`jaxinv.learned.load`), by kind:
        "denoiser", "autoencoder", "inverter".
      annealing: numbers of a second-order attack, where they are not as in the command: of
        `jaxinv.GaussNewton` "anneal_from", "anneal_to", "damping", "tolerance".
      polish: steps of Levenberg-Marquardt in float64 that follow the attack; of smooth networks.
      posterior: draws that give each pixel of the best images of `jaxinv.GaussNewton` a standard
        deviation (`Inversion.std`); 0 for none.
      precision: of the arithmetic, one of `runtime.PRECISIONS`.
      memory: GiB that may be taken, of an accelerator on each; None takes nearly all there is.
      progress: called with the steps done, and nan.
      announce: called with the plan in a line: trials at once, and the memory that they take.

    Returns:
      For each update every seed's reconstruction and objective, and how good that is.

    Raises:
      UserError: an update is not of this network or no such update, labels are no classes, a
        setting is out of range, or one that the method does not use is given.

    References: Geiping et al. 2020, arXiv 2003.14053.
    """
    seeds, iterations, lr, client_lr, images, memory, polish, posterior = check_numbers(
        seeds=seeds,
        iterations=iterations,
        lr=lr,
        client_lr=client_lr,
        images=images,
        memory=memory,
        polish=polish,
        posterior=posterior,
    )
    attack, closed_form = check_method(method, precision)
    check_read(attack, closed_form, lr=lr, iterations=iterations, image_prior=image_prior)
    annealing = check_annealing(annealing, attack)
    usual = _effort(attack, closed_form)
    seeds, iterations = seeds or usual.seeds, iterations or usual.iterations
    chain, strengths = _defense(defense)
    check_finish(polish, posterior, attack, closed_form, bool(chain))
    victim = _victim(model, variables, loss, image_shape, attack.batch_norm)
    normalization = check_normalization(mean, std, victim.image_shape[-1])
    weights = check_priors(priors, attack, closed_form, victim.variables)
    if isinstance(attack, GaussNewton):
        attack = attack.replace(denoiser="prior_denoiser" in weights)
    check_learned(learned, weights, attack, closed_form)
    if attack.needs_image_prior:
        image_prior = image_prior or _photographs(victim.image_shape, normalization)
    trees = [check_update(victim.variables["params"], plain(update)) for update in sent]
    measured = check_statistics(attack.batch_norm, statistics, victim.variables, len(sent))

    rule = _rule(labels, images)
    if rule is None:
        known = check_labels(labels, len(sent), victim.classes, loss)
        images = known.shape[1]
    client = _client(update_kind, client_lr, images, attack, chain)
    check_fit(attack, closed_form, client.steps, chain, rule == "joint")
    if closed_form is not None:
        closed_form.check(victim.network, victim.variables, victim.image_shape, images)
    whole = closed_form is not None or attack.starts_learned
    received, own = _receive(trees, victim, client, whole)
    any_scale = attack.objective != "l2" or attack.any_scale or bool(chain)
    check_scale("method.objective=l2", any_scale, received)
    if rule is not None:
        attack, known = _read_labels(rule, victim, client, received, attack)
    attack = _ready(attack, closed_form, weights, victim, client, seeds)
    targets = _Targets(
        victim=victim,
        variables=own,
        received=received,
        labels=known,
        statistics=_observed(measured, weights, victim.variables, len(sent)),
        chain=chain,
        strengths=strengths,
        normalization=normalization,
        image_prior=image_prior,
        learned=dict(learned),
    )
    settings = {**annealing, **weights, **_rates(attack, lr, client_lr)}
    settings["iterations"] = iterations
    of_targets = attack
    if closed_form is not None:
        of_targets = Recovery(closed_form.find, attack.objective, attack.batch_norm)
    work = Work(of_targets, settings, precision, polish, posterior)
    resources = trials.Resources(
        memory=planner.memory_limit(memory), progress=progress, announce=announce
    )
    keys = seed_keys(range(len(sent)), range(seeds))
    result, extras = attack_targets(targets.problem, work, keys, resources)
    return _inversions(targets, attack, work, result, extras)


class _Effort(NamedTuple):
    """How much is tried where nothing is said."""

    seeds: int
    iterations: int


def _effort(attack: Attack, closed_form: object | None) -> _Effort:
    """Second order starts from the same image whatever the seed, and takes few steps."""
    if closed_form is not None:
        return _Effort(1, 1)
    if isinstance(attack, Method):
        return _Effort(32, 1000)
    family = FAMILIES[type(attack)]
    usual = next(named for named in ATTACKS.values() if named.family is family)
    return _Effort(1, usual.settings["iterations"])


def _rule(labels: Sequence[Any] | str | None, images: int) -> str | None:
    """The rule by which labels are read off the updates; None where they are given."""
    if labels is None:
        return "idlg" if images == 1 else "counts"
    return labels if isinstance(labels, str) else None


def _inversions(
    targets: "_Targets",
    attack: Attack,
    work: Work,
    result: trials.Result,
    extras: Mapping[str, np.ndarray] | None,
) -> list[Inversion]:
    """What came of each update, beside what anyone could guess."""
    objective = trials.comparable(result)
    best = objective.argmin(axis=1)
    labels = np.asarray(result.labels)[np.arange(len(best)), best]
    with runtime.arithmetic(work.precision) as cast:
        beside = guesses(
            targets.problem(cast),
            attack,
            work.settings["client_lr"],
            labels,
            max(one.rounding for one in targets.received),
            any_scale=work.polish > 0 or attack.any_scale,
        )
    return [
        Inversion(
            np.asarray(result.pixels[row]),
            np.where(np.isfinite(objective[row]), objective[row], np.nan),
            labels[row],
            np.asarray(result.trace.step),
            np.asarray(result.trace.objective[:, row]),
            beside[row],
            targets.received[row],
            extras["std"][row] if extras else None,
        )
        for row in range(len(labels))
    ]


class _Victim(NamedTuple):
    """The network that the updates are of."""

    network: Any  # as the loop takes it
    variables: PyTree
    image_shape: tuple[int, int, int]
    classes: int | None  # None of a loss function, or where its outputs are no row
    classifier: Classifier | None  # under the cross-entropy, where one layer makes the logits


class _Client(NamedTuple):
    """What is known of the clients."""

    update_kind: str
    rate: float | None
    images: int
    steps: int
    chain: tuple  # of its defenses


class _Targets(NamedTuple):
    """What is attacked: all of it in double precision."""

    victim: _Victim
    variables: PyTree  # with the layers that were sent apart from constant ones
    received: list[kinds.Received]
    labels: np.ndarray  # [update, image, ...]
    statistics: PyTree  # of BatchNorm, [update, ...]; () where none are compared
    chain: tuple  # of the client's defenses, as far as they are known
    strengths: tuple
    normalization: Normalization
    image_prior: ImagePrior | None
    learned: Mapping[str, PyTree]

    def problem(self, cast: Cast) -> trials.Problem:
        """All targets in one precision."""
        update = jax.tree.map(lambda *x: np.stack(x), *(one.gradient for one in self.received))
        target = cast(Target(update, self.labels, self.statistics))
        if self.chain:
            strengths = cast(jax.tree.map(np.float64, self.strengths))
            facts = PublicFacts(_path(self.chain, self.victim), self.labels.shape[1])

            def tell(update):
                return defenses.adapt(self.chain, strengths, update, facts)

            target = target._replace(defense_knowledge=jax.vmap(tell)(target.update))
        return trials.Problem(
            self.victim.network,
            self.victim.image_shape,
            *cast((self.variables,)),
            target,
            None,
            *cast((self.normalization, self.image_prior, self.learned)),
        )


def _victim(
    model: Any,
    variables: PyTree,
    loss: Callable | None,
    image_shape: Sequence[int],
    batch_norm: str,
) -> _Victim:
    """Anyone's network, checked."""
    height, width, channels = map(int, image_shape)
    shape = height, width, channels
    network = as_network(model, loss)
    variables = as_variables(network, variables)
    classes, classifier = check_outputs(network, variables, shape, batch_norm), None
    if isinstance(network, UserNetwork) and loss is None:
        classifier = find_classifier(network, variables, shape)
    return _Victim(network, variables, shape, classes, classifier)


def _client(
    update_kind: str, rate: float | None, images: int, method: Attack, chain: tuple
) -> _Client:
    """What the clients did, checked."""
    batch, steps = method.local.batch, method.local.steps(images)
    if images % (batch or 1):
        raise UserError(f"method.local.batch={batch}: does not divide the images")
    if steps > 1 and rate is None:
        raise UserError(f"client_lr: the client takes {steps} steps; give its learning rate")
    if steps > 1 and method.batch_norm == "train-shared":
        raise UserError("method.batch_norm=train-shared: statistics of one step; leave local out")
    return _Client(update_kind, rate, images, steps, chain)


def _receive(
    trees: Sequence[PyTree], victim: _Victim, client: _Client, whole: bool
) -> tuple[list[kinds.Received], PyTree]:
    """Reads what was sent as gradients.

    Args:
      trees: shaped like the parameters or some of them.
      victim, client: whose they are.
      whole: whether they must be one gradient of all layers.

    Returns:
      The gradients, and the variables with the layers that were sent apart from constant ones.
    """
    own, params = _attacked(victim.variables, trees), victim.variables["params"]
    if whole and (client.steps > 1 or len(own["params"]) < len(params)):
        raise UserError("method: a closed form, or an inverter, is of one gradient of all layers")
    received = [
        kinds.understand(
            tree,
            own["params"],
            client.update_kind,
            images=client.images,
            steps=client.steps,
            rate=client.rate,
            classifier=None if client.chain else victim.classifier,
            params=params,
            name="update" if len(trees) == 1 else f"update {number}",
        )
        for number, tree in enumerate(trees)
    ]
    if isinstance(params, dict) and not whole and not client.chain:
        received = _without_zeros(received)
        own = _attacked(victim.variables, [one.gradient for one in received])
    return received, own


def _without_zeros(received: list[kinds.Received]) -> list[kinds.Received]:
    """Leaves out what is zero in all updates: a client sends that for layers which it keeps."""
    zeros = [
        {name for name, x in updates.names_of(one.gradient).items() if not x.any()}
        for one in received
    ]
    silent = set.intersection(*zeros)
    if not silent:
        return received
    remark = f"zero everywhere, taken as not sent: {', '.join(sorted(silent))}"
    return [
        one._replace(
            gradient=_only(one.gradient, lambda name: name not in silent),
            remarks=(*one.remarks, remark),
        )
        for one in received
    ]


def _attacked(variables: PyTree, sent: Sequence[PyTree]) -> PyTree:
    """The variables with the parameters that were sent apart from the constant ones."""
    names = [tuple(updates.names_of(update)) for update in sent]
    if any(own != names[0] for own in names):
        raise UserError("updates: all must be of the same layers; attack them one by one")
    if len(names[0]) == len(updates.names_of(variables["params"])):
        return variables
    keep = set(names[0])

    def split(sent):
        return _only(variables["params"], lambda name: (name in keep) == sent)

    return {**variables, "params": split(True), "constants": split(False)}


def _only(tree: PyTree, wanted: Callable[[str], bool], front: str = "") -> PyTree:
    """The leaves of a tree of dicts whose name is wanted."""
    kept = {}
    for key, below in tree.items():
        name = f"{front}/{key}" if front else str(key)
        if isinstance(below, dict):
            if part := _only(below, wanted, name):
                kept[key] = part
        elif wanted(name):
            kept[key] = below
    return kept


def _read_labels(
    rule: str, victim: _Victim, client: _Client, received: Sequence[kinds.Received], method: Attack
) -> tuple[Attack, np.ndarray]:
    """Labels by a rule, [update, image]; or the method that finds them beside the images."""
    network = victim.network
    if not isinstance(network, UserNetwork) or network.loss is not None:
        raise UserError(f"labels={rule}: cannot be read under a loss of your own; give them")
    if rule == "joint":
        found = np.zeros((len(received), client.images), np.int32)
        return method.replace(classes=victim.classes), found
    if (entry := LABELS.get(rule)) is None:
        rules = ", ".join(name for name, entry in LABELS.items() if entry is not None)
        raise UserError(f"labels={rule}: give them, joint, or one of {rules}")
    if entry.one_image and client.images > 1:
        raise UserError(f"labels={rule}: reads one label; use counts, or give them")
    check_scale(f"labels={rule}", not entry.scaled, received)

    @jax.jit
    def read(variables, update):
        shape = victim.image_shape
        return infer(rule, network, variables, update, shape, client.images, client.steps)

    def single(tree):
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)

    found = [np.asarray(read(victim.variables, single(one.gradient))) for one in received]
    return method, np.stack(found)


def _ready(
    attack: Attack,
    closed_form: ClosedForm | None,
    priors: Mapping,
    victim: _Victim,
    client: _Client,
    seeds: int,
) -> Attack:
    """The attack as it is run: checked, with its priors and what it knows of the defense."""
    check_start(attack, client.steps, seeds)
    if isinstance(attack, Method) and closed_form is None:
        attack = _with_priors(attack, priors, victim, client)
    if attack.couples_seeds and seeds == 1:
        raise UserError("seeds=1: with this method they look at one another; give 2 or more")
    return attack.replace(defense=client.chain) if client.chain else attack


def _rates(attack: Attack, lr: float | None, client_lr: float | None) -> dict[str, float]:
    """The learning rates: the client's, of one step any, and that of gradient matching."""
    rates = {"client_lr": client_lr or 1.0}
    if isinstance(attack, Method):
        rates["lr"] = lr or default_rate(attack.optimizer, attack.representation)
    return rates


def _with_priors(method: Method, priors: Mapping, victim: _Victim, client: _Client) -> Method:
    """The method with its priors, and what follows from them for the program."""
    classifier = ()
    if "prior_features" in priors:
        if method.classes:
            raise UserError("prior_features: reads features by the label; labels=joint has none")
        classifier = classifier_path(victim.network, victim.variables, victim.image_shape)
    method = method.replace(priors=tuple(priors), classifier=classifier)
    if method.simulation == "surrogate" and not may_be_surrogate(
        method.objective, priors, client.steps, client.chain
    ):
        raise UserError(
            "method.simulation='surrogate': of several local steps, with objective='cosine' and "
            "without defense= and prior_epoch_order"
        )
    if not may_drop_gradients(
        priors, client.steps, client.chain, method.simulation, method.entries
    ):
        return method.replace(gram=None)
    return method if method.gram else method.replace(gram=choose_rule("auto", method.objective))


def _defense(defense: Any) -> tuple[tuple, tuple]:
    """What is known of the client's defense: a chain, and its strengths."""
    if isinstance(defense, str):
        try:
            chain = defenses.parse(defense)
        except ValueError as error:
            raise UserError(f"defense={defense}: {error}") from None
        if changed := defenses.changes_noise(chain):
            raise UserError(
                f"defense={defense}: what {changed} makes of the noise in front of it is not "
                "known; leave defense out"
            )
        return defenses.names(chain), defenses.strengths(chain)
    if not isinstance(defense, Defense):
        own = defense
        defense = Defense(lambda update, *_: own(update), (), lambda update, *_: own(update))
    return (defense,), ((),)


def _path(chain: tuple, victim: _Victim) -> tuple[str, ...]:
    """Where the classifier is, for a defense that asks."""
    if not defenses.asks_for_classifier(chain):
        return ()
    return classifier_path(victim.network, victim.variables, victim.image_shape)


def _observed(
    measured: list[PyTree] | None, priors: Mapping, variables: PyTree, count: int
) -> PyTree:
    """Statistics of BatchNorm to compare with, [update, ...]: the batches' own, or running ones."""
    if measured is None and "prior_batch_norm" not in priors:
        return ()
    trees = measured or [variables["batch_stats"]] * count
    return {"batch_stats": jax.tree.map(lambda *x: np.stack(x), *trees)}


def _photographs(shape: tuple[int, int, int], normalization: Normalization) -> ImagePrior:
    """What photographs look like to a network with this normalization."""
    of_channels = (tuple(x.tolist()) for x in normalization)
    return load_prior("photographs", ImageFacts("photographs", None, shape, *of_channels))[0]
