"""What a user can get wrong of an update's attack: each is one line that names the setting."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from flax import nnx

from jaxinv import defenses
from jaxinv.attacks import CLOSED_FORM, FAMILIES, ClosedForm
from jaxinv.attacks.base import Attack
from jaxinv.attacks.gauss_newton import GaussNewton
from jaxinv.attacks.gradient_matching import LEARNED, Method, check
from jaxinv.attacks.priors import PRIORS, Prior, needing
from jaxinv.client import kinds, updates
from jaxinv.defenses.base import Defense
from jaxinv.errors import UserError
from jaxinv.machine import runtime
from jaxinv.networks.user import UserNetwork, output_shape, plain
from jaxinv.types import PyTree


def check_positive(**values: float | None) -> None:
    """Refuses numbers that are not above 0."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise UserError(f"{name}={value}: must be positive")


def check_method(method: Attack | str, precision: str) -> tuple[Attack, ClosedForm | None]:
    """The method, and the closed form that stands in its place.

    Raises:
      UserError: there is no such method, closed form or precision.
    """
    closed_form = None
    if isinstance(method, str):
        if method not in CLOSED_FORM:
            known = ", ".join(CLOSED_FORM)
            raise UserError(f"method={method}: give a Method, or a closed form: {known}")
        method, closed_form = Method(priors=()), CLOSED_FORM[method]
    if isinstance(method, Method):
        check(method)
    if method.defense:
        raise UserError("method.defense: give it as defense=, with its strengths")
    if precision not in runtime.PRECISIONS:
        raise UserError(f"precision={precision}: known are {', '.join(runtime.PRECISIONS)}")
    return method, closed_form


def check_fit(method: Attack, steps: int, chain: Sequence[str | Defense]) -> None:
    """Refuses an attack that is not for such updates.

    Args:
      method: asked for.
      steps: of the client.
      chain: of its defenses, as far as they are known.

    Raises:
      UserError: one line that says why.
    """
    each_image = defenses.takes_each_image(chain)
    family = FAMILIES.get(type(method))
    if family is not None and (why := family.unfit(steps=steps, each_image=each_image)):
        raise UserError(f"method={type(method).__name__}: {why}; use another")
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
        if value < 0:
            raise UserError(f"{name}={value}: must be 0 or more")
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
    priors: Mapping[Any, float], method: Attack, variables: PyTree
) -> dict[Any, float]:
    """The priors that have a weight.

    Raises:
      UserError: one is none, has no weight, or needs what is not there.
    """
    batch_norm = method.batch_norm
    for prior in method.priors if isinstance(method, Method) else ():
        if prior not in priors and prior not in Method.priors:
            raise UserError(f"method.priors: {prior} has no weight; give it in priors=")
    for prior, weight in priors.items():
        own = not isinstance(prior, str) and (callable(prior) or isinstance(prior, Prior))
        known = own or (prior in PRIORS and prior not in needing("epochs"))
        if not known or not weight >= 0:
            known = ", ".join(sorted(set(PRIORS) - {*needing("epochs")}))
            raise UserError(f"priors[{prior!r}]={weight}: known are {known}, weights from 0 up")
        if prior == "prior_batch_norm" and weight > 0 and "batch_stats" not in variables:
            raise UserError("priors['prior_batch_norm']: the model has no BatchNorm; leave it out")
        if prior == "prior_batch_norm" and weight > 0 and batch_norm == "train":
            raise UserError(
                "priors['prior_batch_norm']: batch_norm=train keeps the client's statistics "
                "private; use eval or train-shared"
            )
    return {prior: weight for prior, weight in priors.items() if weight > 0}
