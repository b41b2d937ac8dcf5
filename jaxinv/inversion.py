"""`jaxinv.invert`: attack one update of a model of your own."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinv.attacks.gauss_newton import GaussNewton
from jaxinv.attacks.gradient_matching import RATES, Method, check, may_drop_gradients
from jaxinv.attacks.gram import choose_rule
from jaxinv.attacks.labels import LABELS, infer
from jaxinv.attacks.priors import PRIORS, needing
from jaxinv.attacks.smoothed_gauss_newton import SmoothedGaussNewton
from jaxinv.data.image_prior import ImageFacts, ImagePrior, load_prior
from jaxinv.engine import planner, trials
from jaxinv.engine.targets import seed_keys
from jaxinv.errors import UserError
from jaxinv.machine import runtime
from jaxinv.networks.inspect import classifier_path
from jaxinv.types import Normalization, PyTree, Target

# The numbers of a second-order attack where none are given.
ANNEALING = MappingProxyType(
    {"anneal_from": 100.0, "anneal_to": 1e-6, "damping": 0.0, "tolerance": 1e-3, "inflation": 50.0}
)


class Inversion(NamedTuple):
    """What the attacker ends with. Axis 0 is the seed."""

    reconstructions: Float[np.ndarray, "seed batch height width channel"]  # pixels in [0, 1]
    objectives: Float[np.ndarray, " seed"]  # NaN where the trial left the finite numbers
    labels: Int[np.ndarray, " batch"]  # as given, read off the update, or found with the best
    trace_steps: Int[np.ndarray, " point"]
    trace_objectives: Float[np.ndarray, "point seed"]

    @property
    def best(self) -> Float[np.ndarray, "batch height width channel"]:
        """The reconstruction of lowest objective: the attacker's choice.

        Raises:
          ValueError: no trial stayed finite.
        """
        if np.isnan(self.objectives).all():
            raise ValueError("no trial stayed finite; lower lr, or keep the box")
        return self.reconstructions[np.nanargmin(self.objectives)]


def invert(
    model: nn.Module | Callable[[PyTree, Array, Array], Array],
    variables: PyTree,
    update: PyTree,
    *,
    image_shape: tuple[int, int, int],
    labels: Array | Sequence[int] | str = "idlg",
    images: int = 1,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    seeds: int = 32,
    iterations: int = 1000,
    lr: float | None = None,
    priors: Mapping[str, float] = MappingProxyType({"tv": 0.01}),
    method: Method | GaussNewton | SmoothedGaussNewton = Method(),  # noqa: B008
    image_prior: ImagePrior | None = None,
    annealing: Mapping[str, float] = ANNEALING,
    client_lr: float = 1e-4,
    precision: str = "float32",
    memory: float | None = None,
    progress: Callable[[int, float], None] = lambda steps, psnr: None,
) -> Inversion:
    """Reconstructs the images behind an update, from many random seeds at once.

    Args:
      model: any Flax Linen classifier, called as `model.apply(variables, images)`; or a function
        `loss(params, images, labels)`, the mean over the images. `nn.Conv` layers run on the
        trilinear convolution while the attack lasts.
      variables: {"params": ...} and whatever else the model holds (running statistics).
      update: the gradient of the client's loss, shaped like `variables["params"]`; or, with
        `method.local` of several steps, initial minus final parameters, in any scale.
      image_shape: height, width, channel of one image.
      labels: class of each private image; or the rule (`attacks.labels.LABELS`) by which they are
        read off the update of a module.
      images: how many to read.
      mean, std: the model sees `(pixels - mean) / std`; scalars or one per channel.
      seeds: number of random seeds.
      iterations, lr: steps, learning rate; None is the optimizer's (`gradient_matching.RATES`).
      priors: weights of priors by name (`jaxinv.attacks.priors.PRIORS`).
      method: `jaxinv.Method`, objective, optimizer, sign, schedule, init, box and the client's
        local steps, of which the default is Geiping's on a single gradient; or
        `jaxinv.GaussNewton`, the second-order attack, which takes no `lr` and no `priors`.
      image_prior: of a second-order attack (`jaxinv.data.image_prior`); None: natural photographs.
      annealing: numbers of a second-order attack (`gauss_newton.Numbers`).
      client_lr: the rate of the client's local steps, where there are several.
      precision: of the arithmetic, one of `runtime.PRECISIONS`.
      memory: GiB that may be taken, of an accelerator on each; None takes nearly all there is.
      progress: called with the steps done, and nan.

    Returns:
      Every seed's reconstruction and objective, and the objectives on the way.

    Raises:
      UserError: the update is not shaped like the parameters, or a setting is out of range.

    References: Geiping et al. 2020, arXiv 2003.14053.
    """
    if isinstance(method, Method):
        check(method)
    if method.batch_norm != "eval":
        raise UserError("method.batch_norm: invert simulates a client in evaluation mode; use eval")
    if method.defense:
        raise UserError("method.defense: invert takes the update as it is; leave it out")
    if precision not in runtime.PRECISIONS:
        raise UserError(f"precision={precision}: known are {', '.join(runtime.PRECISIONS)}")
    _check(
        variables, update, priors, seeds=seeds, iterations=iterations, lr=lr, memory=memory,
        client_lr=client_lr,
    )  # fmt: skip
    second_order = isinstance(method, GaussNewton | SmoothedGaussNewton)
    if second_order:
        lr, priors = 1.0, {}
        image_prior = image_prior or _photographs(image_shape, mean, std)
    lr = RATES[method.optimizer] if lr is None else lr
    weights = {name: weight for name, weight in priors.items() if weight > 0}
    classifier = ()
    if needing("update", weights):
        classifier = classifier_path(model, variables, jnp.zeros((1, *image_shape)))
    if isinstance(labels, str):
        rules = [name for name in LABELS if name != "known"]
        if labels not in rules or not isinstance(model, nn.Module):
            raise UserError(f"labels={labels}: give them, or of a module one of {', '.join(rules)}")
        labels = infer(
            labels, model, variables, update, image_shape, images, method.local.steps(images)
        )
    labels = jnp.atleast_1d(jnp.asarray(labels, jnp.int32))
    if len(labels) % (method.local.batch or 1):
        raise UserError(f"method.local.batch={method.local.batch}: does not divide the images")
    if not second_order:
        method = method._replace(priors=tuple(weights), classifier=classifier)
        free = may_drop_gradients(weights, method.local.steps(len(labels)))
        method = method._replace(gram=choose_rule("auto", method.objective) if free else None)
    settings = {"lr": lr, "iterations": iterations, "client_lr": client_lr}
    with runtime.arithmetic(precision) as cast:
        of_channels = lambda x: np.broadcast_to(np.asarray(x, np.float64), image_shape[-1:])  # noqa: E731
        normalization = Normalization(of_channels(mean), of_channels(std))
        target = jax.tree.map(lambda x: np.asarray(x)[None], Target(update, labels))
        problem = trials.Problem(
            model, tuple(image_shape), *cast((variables, target)), None,
            *cast((normalization, image_prior)),
        )  # fmt: skip
        plan = planner.first_plan(
            variables["params"], 1, seeds, len(labels), whole=bool(needing("seeds", weights))
        )
        numbers = cast(method.numbers(seeds, {**ANNEALING, **annealing, **weights, **settings}))
        result = trials.run(
            problem, method, numbers, seed_keys([0], range(seeds)),
            trials.Resources(plan, planner.memory_limit(memory), progress),
        )  # fmt: skip
    objectives = np.where(result.finite[0], result.objective[0], np.nan)
    found = np.asarray(result.labels[0])[np.argsort(objectives)[0]]  # NaN comes last
    return Inversion(
        result.pixels[0],
        objectives,
        found,
        result.trace.step,
        result.trace.objective[:, 0],
    )


def _photographs(
    shape: tuple[int, int, int], mean: float | Sequence[float], std: float | Sequence[float]
) -> ImagePrior:
    """What photographs look like to a network with this normalization."""
    spread = lambda x: tuple(np.broadcast_to(np.asarray(x, float), shape[-1:]).tolist())  # noqa: E731
    facts = ImageFacts("photographs", None, tuple(shape), spread(mean), spread(std))
    return load_prior("photographs", facts)[0]


def _check(
    variables: PyTree, update: PyTree, priors: Mapping[str, float], **positive: float | None
) -> None:
    """Checks what a user can get wrong before anything compiles."""
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise UserError(f"{name}={value}: must be positive")
    for name, weight in priors.items():
        unknown = {*needing("statistics"), *needing("epochs")}  # to one who has an update alone
        if name not in PRIORS or name in unknown or not weight >= 0:
            known = ", ".join(sorted(set(PRIORS) - unknown))
            raise UserError(f"priors[{name!r}]={weight}: known are {known}, weights from 0 up")
    if "params" not in variables:
        raise UserError('variables: must hold "params", as returned by model.init')
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (variables["params"], update)]
    if shapes[0] != shapes[1]:
        raise UserError(
            "update: its names and shapes must be those of variables['params']; "
            f"parameters {shapes[0]}, update {shapes[1]}"
        )
