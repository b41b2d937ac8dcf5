"""What a user can get wrong of an update's attack: each is one line that names the setting."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from flax import nnx
from pydantic import ValidationError

from jaxinv import defenses
from jaxinv.attacks import CLOSED_FORM, FAMILIES, ClosedForm
from jaxinv.attacks.base import Attack, check_names
from jaxinv.attacks.gauss_newton import PRIOR_INITS, GaussNewton
from jaxinv.attacks.gradient_matching import LEARNED, Method, check
from jaxinv.attacks.objectives import OBJECTIVES
from jaxinv.attacks.priors import PRIORS, Prior, entry_of, needing
from jaxinv.attacks.smoothed_gauss_newton import SmoothedGaussNewton
from jaxinv.client import BATCH_NORM, kinds, updates
from jaxinv.defenses.base import Defense
from jaxinv.errors import UserError
from jaxinv.learned import KINDS
from jaxinv.machine import runtime
from jaxinv.networks.user import UserNetwork, output_shape, plain
from jaxinv.settings.schema import Cell, Plan
from jaxinv.types import Normalization, PyTree

SecondOrder = GaussNewton | SmoothedGaussNewton
USUAL_PRIORS = {"tv": 0.01}  # of gradient matching
# The fields of a second-order attack that are names, and those that are settings of a cell.
_NAMES = {"objective": OBJECTIVES, "init_from": PRIOR_INITS, "batch_norm": BATCH_NORM}
_COUNTS = ("cg_iterations", "draws")


def check_number(name: str, value: Any, setting: str) -> Any:
    """The number that a setting of the commands takes a value for.

    Args:
      name: of the value, in the error.
      value: as it was given.
      setting: a field of a cell or a plan.

    Raises:
      UserError: the commands refuse it.
    """
    model = Cell if setting in Cell.model_fields else Plan
    try:
        return getattr(model.model_validate({setting: value}), setting)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
    raise UserError(f"{name}={value}: {message[0].lower()}{message[1:]}")


def check_numbers(**values: Any) -> tuple[Any, ...]:
    """Numbers by the names of settings, as `check_number`; None stays what it is."""
    return tuple(x if x is None else check_number(name, x, name) for name, x in values.items())


def check_method(method: Attack | str, precision: str) -> tuple[Attack, ClosedForm | None]:
    """The method, and the closed form that stands in its place.

    Raises:
      UserError: there is no such method, closed form or precision, or no such value of a field.
    """
    closed_form = None
    if isinstance(method, str):
        if method not in CLOSED_FORM:
            known = ", ".join(CLOSED_FORM)
            raise UserError(f"method={method}: give a Method, or a closed form: {known}")
        method, closed_form = Method(priors=()), CLOSED_FORM[method]
    if isinstance(method, Method):
        check(method)
    elif isinstance(method, SecondOrder):
        check_names(method, _NAMES)
        counts = {name: getattr(method, name) for name in _COUNTS if hasattr(method, name)}
        numbers = {name: check_number(f"method.{name}", x, name) for name, x in counts.items()}
        method = method.replace(**numbers)
    else:
        raise UserError(f"method={method}: give a Method, a GaussNewton, or a closed form's name")
    if method.defense:
        raise UserError("method.defense: give it as defense=, with its strengths")
    if precision not in runtime.PRECISIONS:
        raise UserError(f"precision={precision}: known are {', '.join(runtime.PRECISIONS)}")
    return method, closed_form


def check_read(method: Attack, closed_form: ClosedForm | None, **given: Any) -> None:
    """Refuses settings that a method does not read.

    Args:
      method, closed_form: as `check_method` gives them.
      given: `lr`, `iterations` and `image_prior`; None where not given.

    Raises:
      UserError: one line that names the first of them.
    """
    reasons = {}
    if closed_form is not None or isinstance(method, SecondOrder):
        reasons["lr"] = "of gradient matching"
    if closed_form is not None:
        reasons["iterations"] = "a closed form has none"
    if not method.needs_image_prior:
        reasons["image_prior"] = "of a second-order attack, or of representation='whitened'"
    for name, value in given.items():
        if value is not None and name in reasons:
            raise UserError(f"{name}: {reasons[name]}; leave it out")


def annealing_of(method: Attack) -> dict[str, float]:
    """The numbers of a second-order attack that `annealing` can give, as where it does not."""
    of_others = ("client_lr", "iterations", "prior_denoiser")
    names = method.Numbers._fields if isinstance(method, SecondOrder) else ()
    return {name: Cell.model_fields[name].default for name in names if name not in of_others}


def check_annealing(annealing: Mapping[str, float], method: Attack) -> dict[str, float]:
    """All of `annealing_of`, with the numbers that are given.

    Raises:
      UserError: the method has no such number, or it is out of range.
    """
    numbers = annealing_of(method)
    for name, value in annealing.items():
        if name not in numbers:
            known = f"takes {', '.join(numbers)}" if numbers else "has none; leave it out"
            raise UserError(f"annealing[{name!r}]: method={type(method).__name__} {known}")
        numbers[name] = check_number(f"annealing[{name!r}]", value, name)
    if "anneal_to" in numbers and numbers["anneal_to"] > numbers["anneal_from"]:
        raise UserError(
            f"annealing['anneal_to']={numbers['anneal_to']:g}: above anneal_from, "
            f"{numbers['anneal_from']:g}; the error of the model must fall"
        )
    return numbers


def check_normalization(
    mean: float | Sequence[float], std: float | Sequence[float], channels: int
) -> Normalization:
    """What the network sees of pixels, [channel].

    Raises:
      UserError: a number is not finite, a standard deviation not above 0, or their count another.
    """
    of_channels = []
    for name, value in (("mean", mean), ("std", std)):
        try:
            numbers = np.broadcast_to(np.asarray(value, np.float64), (channels,))
        except (TypeError, ValueError):
            raise UserError(
                f"{name}={value}: give one number, or one for each of {channels} channels"
            ) from None
        if not np.isfinite(numbers).all() or (name == "std" and not (numbers > 0).all()):
            raise UserError(f"{name}={value}: must be {'above 0' if name == 'std' else 'finite'}")
        of_channels.append(numbers)
    return Normalization(*of_channels)


def check_fit(
    method: Attack,
    closed_form: ClosedForm | None,
    steps: int,
    chain: Sequence[str | Defense],
    joint_labels: bool,
) -> None:
    """Refuses an attack that is not for such updates.

    Args:
      method, closed_form: as `check_method` gives them.
      steps: of the client.
      chain: of its defenses, as far as they are known.
      joint_labels: whether labels are to be found beside the images.

    Raises:
      UserError: one line that says why.
    """
    each_image = defenses.takes_each_image(chain)
    family = FAMILIES.get(type(method))
    if family is not None and (why := family.unfit(steps=steps, each_image=each_image)):
        raise UserError(f"method={type(method).__name__}: {why}; use another")
    if joint_labels and (closed_form is not None or not hasattr(method, "classes")):
        raise UserError("labels=joint: the method takes labels as given; give them, or a rule")
    if each_image and steps > 1:
        raise UserError("defense: takes each image's own gradient of one step; leave local out")


def check_start(method: Attack, steps: int, seeds: int) -> None:
    """Refuses a start that a trained inverter does not give.

    Raises:
      UserError: one line that says why.
    """
    if not isinstance(method, Method) or not method.starts_learned:
        return
    start = f"method.init_from={LEARNED!r}"
    if method.classes:
        raise UserError(f"labels=joint: {start} takes labels as given; give them, or a rule")
    if steps > 1:
        raise UserError(f"{start}: of one gradient; leave method.local out")
    if seeds > 1 and method.entries == 1:
        raise UserError(f"seeds={seeds}: of {start} all are the same; give 1")


def check_finish(
    polish: int, posterior: int, method: Attack, closed_form: ClosedForm | None, defended: bool
) -> None:
    """Refuses a polish or a posterior of an attack that has none.

    Raises:
      UserError: one line that says which.
    """
    for name, value in (("polish", polish), ("posterior", posterior)):
        if value and closed_form is not None:
            raise UserError(f"{name}: of an attack with iterations; leave it out")
    if polish and posterior:
        raise UserError("posterior: of an image that is not polished; leave polish or it out")
    if polish and defended:
        raise UserError("polish: not under a defense that is known; leave it out")
    if posterior and not isinstance(method, GaussNewton):
        raise UserError("posterior: of jaxinv.GaussNewton alone; use that, or leave it out")


def as_network(model: Any, loss: Callable | None) -> Any:
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


def as_variables(network: Any, variables: Any) -> PyTree:
    """The variables as dicts of arrays."""
    if variables is None and isinstance(network, UserNetwork) and network.holds_parameters:
        return network.variables()
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise UserError('variables: must hold "params", as returned by model.init')
    return plain(variables)


def check_outputs(
    network: Any, variables: PyTree, image_shape: tuple[int, int, int], batch_norm: str
) -> int | None:
    """Counts a module's outputs; None of a loss function, or where they are no row.

    Raises:
      UserError: they are no logits, or there is no BatchNorm of such a mode.
    """
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


def check_update(params: PyTree, update: PyTree) -> PyTree:
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


def check_statistics(
    batch_norm: str, statistics: Sequence[PyTree] | None, variables: PyTree, count: int
) -> list[PyTree] | None:
    """Checks what was sent of the batches' statistics: one tree for each update, or none.

    Raises:
      UserError: they are missing or too many, or not those of the network's BatchNorm.
    """
    if batch_norm != "train-shared":
        if statistics is not None:
            raise UserError("statistics: are sent where method.batch_norm is train-shared; use it")
        return None
    if statistics is None:
        raise UserError(
            "method.batch_norm=train-shared: give the statistics that came with the update; of "
            "those kept private use train"
        )
    if "batch_stats" not in variables:
        raise UserError(f"method.batch_norm={batch_norm}: of a Linen module's BatchNorm; use train")
    if len(statistics) != count:
        raise UserError(f"statistics: {len(statistics)} for {count} updates; give each its own")
    expected = {k: x.shape for k, x in updates.names_of(variables["batch_stats"]).items()}
    trees = [plain(tree) for tree in statistics]
    for tree in trees:
        if {k: x.shape for k, x in updates.names_of(tree).items()} != expected:
            raise UserError(
                "statistics: must have the names and shapes of variables['batch_stats']: "
                + ", ".join(expected)[:300]
            )
        kinds.check_numbers(tree, "statistics")
    return trees


def check_labels(
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


def check_scale(setting: str, holds: bool, shared: Sequence[kinds.Received]) -> None:
    """Refuses updates of unknown scale to what needs it."""
    for one in shared:
        if not holds and not one.scaled:
            found = f" ({one.remarks[-1]})" if one.remarks else ""
            raise UserError(
                f"{setting}: needs the update's scale, which is not known{found}; say update_kind: "
                "gradient, summed-gradient, or of a difference of parameters client_lr too"
            )


def check_priors(
    priors: Mapping[Any, float] | None,
    method: Attack,
    closed_form: ClosedForm | None,
    variables: PyTree,
) -> dict[Any, float]:
    """The priors that have a weight.

    Raises:
      UserError: one is none, has no weight, is not read, or needs what is not there.
    """
    batch_norm, matching = method.batch_norm, isinstance(method, Method) and closed_form is None
    if priors is None:
        priors = USUAL_PRIORS if matching else {}
    for prior in method.priors if isinstance(method, Method) else ():
        if prior not in priors and prior not in Method.priors:
            raise UserError(f"method.priors: {prior} has no weight; give it in priors=")
    weights = {}
    for prior, weight in priors.items():
        own = not isinstance(prior, str) and (callable(prior) or isinstance(prior, Prior))
        if not own and (prior not in PRIORS or prior in needing("epochs")):
            known = ", ".join(sorted(set(PRIORS) - {*needing("epochs")}))
            raise UserError(f"priors[{prior!r}]={weight}: known are {known}")
        # The weight of a function has the limits of any other.
        weights[prior] = check_number(f"priors[{prior!r}]", weight, "tv" if own else prior)
    weights = {prior: weight for prior, weight in weights.items() if weight > 0}
    shared = isinstance(method, GaussNewton) and "prior_denoiser"  # that it has a use for
    for prior in weights if not matching else ():
        if prior != shared:
            raise UserError(f"priors[{prior!r}]: of gradient matching; leave it out")
        if weights[prior] > 1:
            raise UserError(
                f"priors[{prior!r}]={weights[prior]:g}: of GaussNewton the denoiser's share in "
                "what is believed; give 1 at the most"
            )
    if isinstance(method, GaussNewton) and method.denoiser and not weights:
        raise UserError("method.denoiser: give its share in (0, 1], priors={'prior_denoiser': 0.5}")
    if "prior_batch_norm" in weights and "batch_stats" not in variables:
        raise UserError("priors['prior_batch_norm']: the model has no BatchNorm; leave it out")
    if "prior_batch_norm" in weights and batch_norm == "train":
        raise UserError(
            "priors['prior_batch_norm']: batch_norm=train keeps the client's statistics "
            "private; use eval or train-shared"
        )
    return weights


def check_learned(
    learned: Mapping[str, PyTree],
    priors: Mapping[Any, float],
    method: Attack,
    closed_form: ClosedForm | None,
) -> None:
    """Refuses what the attacker has trained where nothing uses it, or it is no such thing.

    Raises:
      UserError: one line that names it.
    """
    used = {entry_of(prior).learned for prior in priors}
    if closed_form is CLOSED_FORM["learned"] or method.starts_learned:
        used.add("inverter")
    own = any(not isinstance(prior, str) for prior in priors)  # it may look at all of them
    for kind, variables in learned.items():
        if kind not in KINDS:
            raise UserError(f"learned[{kind!r}]: unknown; known are {', '.join(KINDS)}")
        if not isinstance(variables, Mapping) or "params" not in variables:
            raise UserError(f"learned[{kind!r}]: give variables, as jaxinv.learned.load has them")
        if kind not in used and not own:
            asked = "of an inverter" if kind == "inverter" else f"of priors['prior_{kind}']"
            raise UserError(f"learned[{kind!r}]: {asked}; ask for that, or leave it out")
