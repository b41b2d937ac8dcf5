"""Attack the updates of a network of your own: what `jaxinv.invert` does.

Everything that a user can get wrong is checked here, before anything compiles; then the loop of all
attacks runs on what was sent, without a truth.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxinv import defenses
from jaxinv.attacks import CLOSED_FORM
from jaxinv.attacks.gauss_newton import GaussNewton
from jaxinv.attacks.gradient_matching import RATES, Method, check, may_drop_gradients
from jaxinv.attacks.gram import choose_rule
from jaxinv.attacks.labels import LABELS, infer
from jaxinv.attacks.priors import PRIORS, Prior, needing
from jaxinv.attacks.smoothed_gauss_newton import SmoothedGaussNewton
from jaxinv.client import kinds, updates
from jaxinv.data.image_prior import ImageFacts, ImagePrior, load_prior
from jaxinv.defenses.base import Defense, PublicFacts
from jaxinv.engine import planner, trials
from jaxinv.engine.closed_form import recover
from jaxinv.engine.targets import seed_keys
from jaxinv.errors import UserError
from jaxinv.invert.verdict import Guesses, guesses, verdict
from jaxinv.machine import runtime
from jaxinv.networks.inspect import classifier_path, find_classifier
from jaxinv.networks.user import UserNetwork, output_shape, plain
from jaxinv.types import Normalization, PyTree, Target, named

# The numbers of a second-order attack where none are given.
ANNEALING = MappingProxyType(
    {"anneal_from": 100.0, "anneal_to": 1e-6, "damping": 0.0, "tolerance": 1e-3, "inflation": 50.0}
)
# Label rules that need an update in its own scale.
NEED_SCALE = ("ilrg", "counts")

SecondOrder = GaussNewton | SmoothedGaussNewton


class Inversion(NamedTuple):
    """What the attacker ends with. Axis 0 is the seed."""

    reconstructions: Float[np.ndarray, "seed batch height width channel"]  # pixels in [0, 1]
    objectives: Float[np.ndarray, " seed"]  # NaN where the trial left the finite numbers
    labels: np.ndarray  # [batch, ...]: as given, read off the update, or the best seed's own
    trace_steps: np.ndarray  # [point]
    trace_objectives: Float[np.ndarray, "point seed"]
    guesses: Guesses  # objectives of images that say nothing, and the truth's expected one
    sent: kinds.Received  # how the update was read

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

    As `invert_all`, with the labels of this one update.
    """
    labels = settings.pop("labels", None)
    if labels is not None and not isinstance(labels, str):
        labels = [labels]
    return invert_all(model, variables, [update], labels=labels, **settings)[0]


def invert_all(
    model: Any,
    variables: PyTree,
    sent: Sequence[PyTree],
    *,
    image_shape: tuple[int, int, int],
    labels: Sequence[Any] | str | None = None,
    images: int = 1,
    update_kind: str = kinds.AUTO,
    client_lr: float | None = None,
    loss: Callable[[Array, Array], Array] | None = None,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    seeds: int = 32,
    iterations: int = 1000,
    lr: float | None = None,
    priors: Mapping[str | Callable, float] = MappingProxyType({"tv": 0.01}),
    method: Method | SecondOrder | str = Method(),  # noqa: B008
    defense: str | Defense | Callable[[PyTree], PyTree] = defenses.NONE,
    image_prior: ImagePrior | None = None,
    annealing: Mapping[str, float] = ANNEALING,
    precision: str = "float32",
    memory: float | None = None,
    progress: Callable[[int, float], None] = lambda steps, psnr: None,
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
      update_kind: what was sent (`client.kinds.KINDS`), or "auto".
      client_lr: the client's learning rate: asked for where it took several steps, and where the
        scale of a difference of parameters is needed.
      loss: of a module's outputs and labels, the mean over the images; None for cross-entropy.
      mean, std: the model sees `(pixels - mean) / std`; scalars or one per channel.
      seeds: number of random seeds.
      iterations, lr: steps, learning rate; None is the optimizer's (`gradient_matching.RATES`).
      priors: weights of priors by name (`jaxinv.attacks.priors.PRIORS`) or function.
      method: `jaxinv.Method`: objective, optimizer, sign, schedule, init, box, what the client's
        BatchNorm does and its local steps, of which the default is Geiping's on a single gradient;
        `jaxinv.GaussNewton`, the second-order attack, which takes no `lr` and no `priors`; or the
        name of a closed form (`attacks.CLOSED_FORM`).
      defense: what the clients did to their updates, as far as it is known: "clip:1,noise:1e-4", a
        `Defense`, or a function of an update.
      image_prior: of a second-order attack (`jaxinv.data.image_prior`); None: natural photographs.
      annealing: numbers of a second-order attack (`gauss_newton.Numbers`).
      precision: of the arithmetic, one of `runtime.PRECISIONS`.
      memory: GiB that may be taken, of an accelerator on each; None takes nearly all there is.
      progress: called with the steps done, and nan.

    Returns:
      For each update every seed's reconstruction and objective, and how good that is.

    Raises:
      UserError: an update is not of this network or no such update, labels are no classes, or a
        setting is out of range.

    References: Geiping et al. 2020, arXiv 2003.14053.
    """
    closed_form = CLOSED_FORM.get(method) if isinstance(method, str) else None
    if isinstance(method, str):
        if closed_form is None:
            known = ", ".join(CLOSED_FORM)
            raise UserError(f"method={method}: give a Method, or a closed form: {known}")
        method, priors, iterations = Method(priors=()), {}, 1
    if isinstance(method, Method):
        check(method)
    if method.defense:
        raise UserError("method.defense: give it as defense=, with its strengths")
    if precision not in runtime.PRECISIONS:
        raise UserError(f"precision={precision}: known are {', '.join(runtime.PRECISIONS)}")
    _check_positive(
        seeds=seeds, iterations=iterations, lr=lr, memory=memory, client_lr=client_lr, images=images
    )
    height, width, channels = map(int, image_shape)
    image_shape = height, width, channels
    network = _as_network(model, loss)
    variables = _as_variables(network, variables)
    priors = {prior: weight for prior, weight in _checked(priors, variables).items() if weight > 0}
    second_order = isinstance(method, SecondOrder)
    if second_order:
        lr, priors = 1.0, {}
        image_prior = image_prior or _photographs(image_shape, mean, std)
    sent = [_of_network(variables["params"], plain(update)) for update in sent]
    classes = _classes(network, variables, image_shape, method.batch_norm)
    own = _attacked(variables, sent)

    chain, strengths = _defense(defense)
    classifier = None
    if isinstance(network, UserNetwork) and loss is None:
        classifier = find_classifier(network, variables, image_shape)
    labels = ("idlg" if images == 1 else "counts") if labels is None else labels
    given = None if isinstance(labels, str) else _given_labels(labels, len(sent), classes, loss)
    images = images if given is None else given.shape[1]
    steps = method.local.steps(images)
    if images % (method.local.batch or 1):
        raise UserError(f"method.local.batch={method.local.batch}: does not divide the images")
    if steps > 1 and client_lr is None:
        raise UserError(f"client_lr: the client takes {steps} steps; give its learning rate")
    if closed_form and (steps > 1 or len(own["params"]) < len(variables["params"])):
        raise UserError("method: a closed form is of one gradient of all layers")
    shared = [
        kinds.understand(
            update,
            own["params"],
            update_kind,
            images=images,
            steps=steps,
            rate=client_lr,
            classifier=None if chain else classifier,
            params=variables["params"],
            name="update" if len(sent) == 1 else f"update {number}",
        )
        for number, update in enumerate(sent)
    ]
    any_scale = second_order or chain
    _check_scale("method.objective=l2", any_scale or method.objective != "l2", shared)
    if given is None:
        method, given = _read_labels(
            labels,
            network,
            variables,
            [one.gradient for one in shared],
            image_shape,
            images,
            steps,
            classes,
            method,
            shared,
        )
    if not second_order and closed_form is None:
        method = _with_priors(method, priors, network, variables, image_shape, steps, chain)
    if chain:
        method = method.replace(defense=chain)

    rate = RATES.get(method.optimizer, 0.1) if lr is None and not second_order else lr
    settings = {"lr": rate, "iterations": iterations, "client_lr": client_lr or 1.0}
    with runtime.arithmetic(precision) as cast:

        def of_channels(x):
            return np.broadcast_to(np.asarray(x, np.float64), image_shape[-1:])

        normalization = Normalization(of_channels(mean), of_channels(std))
        update = jax.tree.map(lambda *x: np.stack(x), *(one.gradient for one in shared))
        target = cast(Target(update, given, _statistics(priors, variables, len(sent))))
        if chain:
            facts = PublicFacts(_path(chain, network, variables, image_shape), images)
            numbers_of = cast(jax.tree.map(np.float64, strengths))

            def tell(one):
                return defenses.adapt(chain, numbers_of, one, facts)

            target = target._replace(defense_knowledge=jax.vmap(tell)(target.update))
        problem = trials.Problem(
            network, image_shape, *cast((own,)), target, None, *cast((normalization, image_prior))
        )
        keys = seed_keys(range(len(sent)), range(seeds))
        if closed_form is not None:
            result = recover(problem, closed_form, method.objective, keys)
        else:
            plan = planner.first_plan(
                own["params"], len(sent), seeds, images, whole=bool(needing("seeds", priors))
            )
            numbers = method.numbers(seeds, {**ANNEALING, **annealing, **priors, **settings})
            limit = planner.memory_limit(memory)
            result = trials.run(
                problem, method, cast(numbers), keys, trials.Resources(plan, limit, progress)
            )
        rounding = max(one.rounding for one in shared)
        objective = np.where(result.finite, np.asarray(result.objective), np.inf)
        best = objective.argmin(axis=1)
        found = np.asarray(result.labels)[np.arange(len(best)), best]
        beside = guesses(problem, method, settings, found, rounding)
    return [
        Inversion(
            np.asarray(result.pixels[row]),
            np.where(np.isfinite(objective[row]), objective[row], np.nan),
            found[row],
            np.asarray(result.trace.step),
            np.asarray(result.trace.objective[:, row]),
            beside[row],
            shared[row],
        )
        for row in range(len(sent))
    ]


def _as_network(model: Any, loss: Callable | None) -> Any:
    """Anyone's network or loss function as the loop takes it: hashable, with one way to call it."""
    if isinstance(model, nn.Module | nnx.Module):
        return UserNetwork(model, loss)
    if loss is not None:
        raise UserError("loss: of a module's outputs; a function in place of one is a loss itself")
    if isinstance(model, type) or not callable(model):
        raise UserError(
            "model: must be a module of Flax (an instance), or a function loss(params, images, "
            "labels)"
        )
    try:
        hash(model)
    except TypeError:
        return lambda params, images, labels: model(params, images, labels)
    return model


def _as_variables(network: Any, variables: Any) -> PyTree:
    """The variables as dicts of arrays."""
    if variables is None and isinstance(network, UserNetwork) and network.holds_parameters:
        return network.variables()
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise UserError('variables: must hold "params", as returned by model.init')
    return plain(variables)


def _classes(
    network: Any, variables: PyTree, image_shape: tuple[int, int, int], batch_norm: str
) -> int | None:
    """The number of a module's outputs; None of a loss function, or where it is no row of them."""
    if batch_norm == "train-shared":
        raise UserError(
            "method.batch_norm=train-shared: statistics are no part of an update; use train"
        )
    if not isinstance(network, UserNetwork):
        if batch_norm != "eval":
            raise UserError("method.batch_norm: a loss function decides that itself; use eval")
        return None
    training = batch_norm != "eval"
    if training and "batch_stats" not in variables and not network.holds_parameters:
        raise UserError(f"method.batch_norm={batch_norm}: the model has no BatchNorm; use eval")
    shape = output_shape(network, variables, image_shape, training)
    if len(shape) != 2 and network.loss is None:
        raise UserError(
            f"model: its outputs for two images are {shape}, no logits [image, class]; give a loss "
            "of them, or a function loss(params, images, labels)"
        )
    return shape[1] if len(shape) == 2 else None


def _of_network(params: PyTree, update: PyTree) -> PyTree:
    """Checks that an update is shaped like the parameters, or some of them.

    Raises:
      UserError: a leaf has no place or another shape.
    """
    expected = {name: leaf.shape for name, leaf in updates.names_of(params).items()}
    leaves = updates.names_of(update)
    wrong = [name for name in leaves if name not in expected]
    if wrong or not leaves:
        raise UserError(
            "update: its names and shapes must be those of variables['params'], or some of them; "
            f"there is no {wrong[0] if wrong else 'array in it'} among {', '.join(expected)[:300]}"
        )
    for name, leaf in leaves.items():
        if leaf.shape != expected[name]:
            raise UserError(
                f"update: its names and shapes must be those of variables['params']; {name} is "
                f"{leaf.shape}, the network's {expected[name]}"
            )
    if len(leaves) < len(expected) and not isinstance(params, dict):
        raise UserError("update: parts of the parameters can be sent of a tree of dicts alone")
    return update


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


def _given_labels(
    given: Sequence[Any], count: int, classes: int | None, loss: Callable | None
) -> np.ndarray:
    """Labels [update, image, ...]: classes of the network, distributions, or what a loss takes.

    Raises:
      UserError: they are not one set for each update, or no classes of the network.
    """
    if len(given) != count:
        raise UserError(f"labels: {len(given)} for {count} updates; give each its own")
    try:
        labels = np.stack([np.atleast_1d(np.asarray(own)) for own in given])
    except ValueError:
        raise UserError("labels: all updates must be of as many images") from None
    whole = np.issubdtype(labels.dtype, np.integer)
    if not whole and not np.issubdtype(labels.dtype, np.floating):
        raise UserError(f"labels: {labels.dtype} is neither a class nor a number")
    if classes is not None and loss is None:
        if labels.ndim == 2 and whole and not ((labels >= 0) & (labels < classes)).all():
            wrong = labels[(labels < 0) | (labels >= classes)].flat[0]
            raise UserError(
                f"labels: {wrong} is no class; the network has {classes}, from 0 to {classes - 1}"
            )
        if labels.ndim == 2 and not whole:
            raise UserError("labels: classes are whole numbers; of another target give the loss")
        if labels.ndim > 2 and labels.shape[2:] != (classes,):
            raise UserError(
                f"labels: distributions over {classes} classes are wanted, not {labels.shape[2:]}"
            )
    return labels.astype(np.int32 if whole and labels.ndim == 2 else np.float32)


def _read_labels(
    rule, network, variables, gradients, image_shape, images, steps, classes, method, shared
):
    """Labels by a rule, [update, image]; or the method that finds them beside the images."""
    rules = [name for name in LABELS if name != "known"]
    if not isinstance(network, UserNetwork) or network.loss is not None:
        raise UserError(f"labels={rule}: cannot be read under a loss of your own; give them")
    if rule == "joint":
        if not hasattr(method, "classes"):
            raise UserError("labels=joint: not with this method; give them, or a rule")
        return method.replace(classes=classes), np.zeros((len(gradients), images), np.int32)
    if rule not in rules:
        raise UserError(f"labels={rule}: give them, joint, or one of {', '.join(rules)}")
    if rule == "idlg" and images > 1:
        raise UserError("labels=idlg: reads one label; use counts, or give them")
    _check_scale(f"labels={rule}", rule not in NEED_SCALE, shared)
    read = jax.jit(
        lambda variables, update: infer(
            rule, network, variables, update, image_shape, images, steps
        )
    )

    def single(tree):
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)

    return method, np.stack([np.asarray(read(variables, single(g))) for g in gradients])


def _check_scale(setting: str, holds: bool, shared: Sequence[kinds.Received]) -> None:
    """Refuses updates of unknown scale to what needs it."""
    for one in shared:
        if not holds and not one.scaled:
            found = f" ({one.remarks[-1]})" if one.remarks else ""
            raise UserError(
                f"{setting}: needs the update's scale, which is not known{found}; say update_kind: "
                "gradient, summed-gradient, or of a difference of parameters client_lr too"
            )


def _with_priors(
    method: Method,
    priors: Mapping,
    network: Any,
    variables: PyTree,
    image_shape: tuple[int, ...],
    steps: int,
    chain: tuple,
) -> Method:
    """The method with its priors, and what follows from them for the program."""
    classifier = ()
    if "prior_features" in priors:
        classifier = classifier_path(network, variables, jnp.zeros((1, *image_shape)))
    method = method.replace(priors=tuple(priors), classifier=classifier)
    if not may_drop_gradients(priors, steps, chain):
        return method.replace(gram=None)
    return method if method.gram else method.replace(gram=choose_rule("auto", method.objective))


def _defense(defense: Any) -> tuple[tuple, tuple]:
    """What is known of the client's defense: a chain, and its strengths."""
    if isinstance(defense, str):
        try:
            chain = defenses.parse(defense)
        except ValueError as error:
            raise UserError(f"defense={defense}: {error}") from None
        return defenses.names(chain), defenses.strengths(chain)
    if not isinstance(defense, Defense):
        own = defense
        defense = Defense(lambda update, *_: own(update), (), lambda update, *_: own(update))
    return (defense,), ((),)


def _path(chain, network, variables, image_shape):
    """Where the classifier is, for a defense that asks."""
    if not any(named(defenses.DEFENSES, name).tells_classifier for name in chain):
        return ()
    return classifier_path(network, variables, jnp.zeros((1, *image_shape)))


def _statistics(priors: Mapping, variables: PyTree, count: int) -> PyTree:
    """The running statistics, for the prior that compares with them, [update, ...]."""
    if "prior_batch_norm" not in priors:
        return ()

    def spread(x):
        return np.broadcast_to(x, (count, *np.shape(x)))

    return {"batch_stats": jax.tree.map(spread, variables["batch_stats"])}


def _photographs(
    shape: tuple[int, int, int], mean: float | Sequence[float], std: float | Sequence[float]
) -> ImagePrior:
    """What photographs look like to a network with this normalization."""

    def spread(x):
        return tuple(np.broadcast_to(np.asarray(x, float), shape[-1:]).tolist())

    facts = ImageFacts("photographs", None, tuple(shape), spread(mean), spread(std))
    return load_prior("photographs", facts)[0]


def _checked(priors: Mapping[Any, float], variables: PyTree) -> Mapping[Any, float]:
    """Refuses priors that are none."""
    for prior, weight in priors.items():
        own = not isinstance(prior, str) and (callable(prior) or isinstance(prior, Prior))
        known = own or (prior in PRIORS and prior not in needing("epochs"))
        if not known or not weight >= 0:
            known = ", ".join(sorted(set(PRIORS) - {*needing("epochs")}))
            raise UserError(f"priors[{prior!r}]={weight}: known are {known}, weights from 0 up")
        if prior == "prior_batch_norm" and weight > 0 and "batch_stats" not in variables:
            raise UserError("priors['prior_batch_norm']: the model has no BatchNorm; leave it out")
    return priors


def _check_positive(**values: float | None) -> None:
    """Refuses numbers that are not above 0."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise UserError(f"{name}={value}: must be positive")
