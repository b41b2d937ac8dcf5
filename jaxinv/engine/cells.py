"""One cell: load what it attacks, let its clients share their updates, attack each.

What a sweep does for every cell, a search for all its candidates at once.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv import data, defenses, metrics, networks
from jaxinv.attacks import CLOSED_FORM
from jaxinv.attacks.base import Attack, Candidate
from jaxinv.attacks.levenberg_marquardt import LevenbergMarquardt
from jaxinv.attacks.priors import READ_UPDATE
from jaxinv.attacks.uncertainty import Posterior, Spectrum
from jaxinv.data.image_prior import Facts, ImagePrior, Source, load_prior
from jaxinv.engine import planner, trials
from jaxinv.engine.closed_form import recover
from jaxinv.engine.targets import Clients, Shared, make_targets, noise_keys, order_keys
from jaxinv.errors import UserError
from jaxinv.machine import runtime
from jaxinv.networks.inspect import classifier_path
from jaxinv.settings import schema
from jaxinv.types import Normalization, PyTree, Target, Truth
from jaxinv.victim import checkpoints
from jaxinv.victim.untrained import Victim, untrained

NUMBERS = (*schema.SEARCHABLE, "iterations")  # what of a cell is traced
WITH_SPECTRUM = 4  # targets of a study: the eigenvalues of one take longer than all before them


class Material(NamedTuple):
    """What a cell attacks: the victim and the private batches, [target, batch, ...]."""

    victim: Victim
    normalization: Normalization
    classes: int
    images: np.ndarray  # uint8
    labels: np.ndarray
    ids: np.ndarray
    draws: np.ndarray  # [target], noise seeds of the client's defense
    image_prior: ImagePrior | None = None  # where the attack has one
    prior_source: Source | None = None
    position: int = 0  # of the first target in the study's list

    def truths(self) -> Truth:
        """The private batches, pixels in [0, 1]."""
        return Truth(self.images / np.float32(255), self.labels)

    def of_targets(self, here: slice, draws: int) -> "Material":
        """The same for some of the targets, each as often as its defense is drawn."""
        fields = ("images", "labels", "ids", "draws")
        own = {name: np.repeat(getattr(self, name)[here], draws, axis=0) for name in fields}
        own["draws"] = own["draws"] + np.arange(len(own["draws"])) % draws
        return self._replace(**own, position=here.start)


class Attacked(NamedTuple):
    """What came of a cell's attack."""

    result: trials.Result
    baseline: metrics.Scores  # of the mean colour, per target
    label_accuracy: jax.Array  # [target, seed]
    shared: Shared
    extras: dict[str, np.ndarray] | None = None  # [target, ...]: spectra, std of pixels


class Loader:
    """Loads what cells attack, each data set and each victim once."""

    def __init__(self, plan: schema.Plan, split: str = "test"):
        self._plan, self._split = plan, split
        self._datasets: dict[tuple, data.Dataset] = {}
        self._victims: dict[tuple, Victim] = {}
        self._priors: dict[tuple, tuple] = {}

    def __call__(self, cell: schema.Cell) -> Material:
        """Loads a cell's victim and private batches.

        Raises:
          UserError: the data set is not there, or its images do not suit the network.
        """
        dataset = self._dataset(cell)
        shape = dataset.images.shape[1:]
        networks.check_image_size(cell.model, cell.dataset, shape)
        victim = self._victim(cell, dataset)
        if "batch_stats" not in victim.variables:
            if cell.batch_norm != "eval":
                raise UserError(
                    f"--batch-norm {cell.batch_norm}: {cell.model} has no BatchNorm; use eval"
                )
            if cell.statistics > 0:
                raise UserError(f"--statistics: {cell.model} has no BatchNorm; give 0")
        images, labels, ids = self._targets(cell, dataset)
        prior, source = self._prior(cell, dataset) if cell.has_image_prior() else (None, None)
        return Material(
            victim, Normalization.of(dataset.mean, dataset.std), len(dataset.classes),
            images, labels, ids, np.zeros(len(ids), int), prior, source,
        )  # fmt: skip

    def _prior(self, cell: schema.Cell, dataset: data.Dataset) -> tuple[ImagePrior, Source]:
        """What the attacker of a cell believes of images."""
        shape = dataset.images.shape[1:]
        facts = Facts(
            cell.dataset, self._plan.data_dir, shape, tuple(dataset.mean), tuple(dataset.std)
        )
        key = cell.image_prior, facts
        if key not in self._priors:
            self._priors[key] = load_prior(*key)
        return self._priors[key]

    def _targets(self, cell: schema.Cell, dataset: data.Dataset) -> tuple[np.ndarray, ...]:
        """The images, labels and ids of a cell's targets, [target, image, ...]."""
        if self._plan.target_ids is None:
            chosen = data.group(
                dataset.labels, self._plan.targets, cell.images, len(dataset.classes),
                cell.grouping,
            )  # fmt: skip
        elif cell.grouping == "stored":
            chosen = np.arange(len(dataset.ids)).reshape(-1, cell.images)
        else:
            raise UserError(f"--grouping {cell.grouping}: chooses the images; use --targets")
        return dataset.images[chosen], dataset.labels[chosen], dataset.ids[chosen]

    def _victim(self, cell: schema.Cell, dataset: data.Dataset) -> Victim:
        """The network of a cell: a checkpoint's, or freshly initialised."""
        shape, classes = dataset.images.shape[1:], len(dataset.classes)
        key = (cell.victim, cell.model, cell.width, cell.network_seed, classes, shape)
        if key not in self._victims:
            if cell.victim is None:
                self._victims[key] = untrained(
                    cell.model, classes=classes, width=cell.width,
                    seed=cell.network_seed, image_shape=shape,
                )  # fmt: skip
            else:
                trained = checkpoints.load_victim(cell.victim)
                checkpoints.check_fits(trained, dataset)
                self._victims[key] = trained.as_victim()
        return self._victims[key]

    def _dataset(self, cell: schema.Cell) -> data.Dataset:
        """The images of a cell's targets: the first ones, or those asked for."""
        ids = self._plan.target_ids
        if ids is not None and len(ids) % cell.images:
            raise UserError(f"--target-ids: {len(ids)} do not make targets of {cell.images} images")
        wanted = self._plan.targets * cell.images if ids is None else tuple(ids)
        if ids is None and cell.grouping != "stored":
            wanted = None  # all there are, to choose from
        key = (cell.dataset, wanted)
        if key not in self._datasets:
            self._datasets[key] = data.load(
                cell.dataset, split=self._split, ids=wanted, data_dir=self._plan.data_dir
            )
        return self._datasets[key]


def attack_cell(
    cell: schema.Cell, material: Material, keys: jax.Array, numbers: Mapping[str, Any],
    memory: float | None, progress: Callable[[int, float], None] = lambda steps, psnr: None,
    announce: Callable[[str], None] = lambda plan: None,
) -> Attacked:  # fmt: skip
    """Lets clients share their updates and attacks each from many seeds, as a cell says.

    Args:
      cell: the settings; those in `NUMBERS` are taken from `numbers`.
      material: the victim and the private batches.
      keys: [target, seed].
      numbers: each one for all seeds, or [seed].
      memory: GiB to take; None takes nearly all there is.
      progress, announce: see `trials.Resources`.
    """
    if cell.assumed_lr is not None:
        numbers = {**numbers, "client_lr": cell.assumed_lr}
    with runtime.arithmetic(cell.precision) as cast:
        attack = attack_of(cell, material)
        # An update that is polished to its last digit must have that digit.
        with runtime.arithmetic("float64" if cell.polish else cell.precision) as exact:
            shared = share(cell, material, attack, exact)
        problem = problem_of(material, shared.targets, cast)
        if cell.attack in CLOSED_FORM:
            result = recover(problem, CLOSED_FORM[cell.attack], cell.objective, keys)
            return Attacked(result, *_per_target(problem, result.labels, material.classes), shared)
        plan = planner.first_plan(
            problem.variables["params"], *keys.shape, problem.targets.labels.shape[1],
            "group" in attack.priors,
        )  # fmt: skip
        limit = planner.memory_limit(memory)
        resources = trials.Resources(plan, limit, progress, announce)
        own = cast(attack.numbers(keys.shape[1], numbers))
        result = trials.run(problem, attack, own, keys, resources)
        measured = _per_target(problem, result.labels, material.classes)
        extras = None
        if cell.posterior:
            found = around_best(
                result, problem, Posterior(attack), {**numbers, "posterior": cell.posterior}, keys,
                limit, cast,
            )  # fmt: skip
            extras = found and in_pixels(found, problem.normalization)
    if cell.polish:
        with runtime.arithmetic("float64") as cast:
            problem = problem_of(material, shared.targets, cast)
            few = max(0, WITH_SPECTRUM - material.position)
            result, extras = polish(
                cell, result, problem, attack, numbers, keys, limit, cast, few
            )  # fmt: skip
    return Attacked(result, *measured, shared, extras)


def share(
    cell: schema.Cell, material: Material, attack: Attack, cast: Callable[[PyTree], PyTree]
) -> Shared:
    """Lets the clients of a cell share their updates."""
    clients = Clients(
        cell.labels, cell.batch_norm, cell.local(), cell.shuffled, cell.assumed_images,
        attack.local, observe=cell.batch_norm == "eval" and cell.statistics > 0,
        defense=defenses.names(cell.chain()), told=cell.told_names(),
        classifier=classifier_of(cell, material),
    )  # fmt: skip
    truths, normalization, variables = cast(
        (material.truths(), material.normalization, material.victim.variables)
    )
    return make_targets(
        material.victim.module, variables, truths, normalization, clients, cell.client_lr,
        order_keys(material.ids[:, 0]), defenses.strengths(cell.chain()),
        noise_keys(material.ids[:, 0], material.draws),
    )  # fmt: skip


def problem_of(
    material: Material, targets: Target, cast: Callable[[PyTree], PyTree]
) -> trials.Problem:
    """What the trials of a cell share, in one precision."""
    victim = material.victim
    return trials.Problem(
        victim.module, material.images.shape[2:],
        *cast((victim.variables, targets, material.truths(), material.normalization,
               material.image_prior)),
    )  # fmt: skip


def polish(
    cell: schema.Cell, result: trials.Result, problem: trials.Problem, attack: Attack,
    numbers: Mapping[str, Any], keys: jax.Array, limit: float, cast: Callable[[PyTree], PyTree],
    few: int,
) -> tuple[trials.Result, dict[str, np.ndarray] | None]:  # fmt: skip
    """Takes what an attack found towards the exact images; labels found beside them stand.

    Returns:
      The result, its trace the attack's with the polish's behind it; and the spectra of the first
      `few` targets.
    """
    finishing = LevenbergMarquardt(cell.objective, cell.batch_norm, attack.local)
    own = finishing.numbers(keys.shape[1], {**numbers, "iterations": cell.polish})
    plan = planner.Plan(1, 1, jax.local_device_count())
    start = Candidate(result.candidates.images, _one_hot_logits(result, cell))
    polished = trials.run(problem, finishing, cast(own), keys, trials.Resources(plan, limit), start)
    before, after = result.trace, polished.trace
    steps = np.append(before.step, before.step[-1] + after.step[1:])
    columns = (
        np.concatenate([old, np.asarray(new)[1:]]) for old, new in zip(before[1:], after[1:])
    )
    polished = polished._replace(trace=trials.Trace(steps, *columns), labels=result.labels)
    if not few:
        return polished, None
    spectrum = Spectrum(cell.batch_norm, attack.local)
    return polished, around_best(polished, problem, spectrum, numbers, keys, limit, cast, few)


def _one_hot_logits(result, cell):
    """Labels that were found beside the images, as logits so sure that they stand."""
    if cell.labels != "joint":
        return None
    classes = result.candidates.logits.shape[-1]
    return np.asarray(100.0 * jax.nn.one_hot(result.labels, classes))


def around_best(
    result: trials.Result, problem: trials.Problem, attack: Attack, numbers: Mapping[str, Any],
    keys: jax.Array, limit: float, cast: Callable[[PyTree], PyTree], few: int | None = None,
) -> dict[str, np.ndarray] | None:  # fmt: skip
    """Finds what the update leaves open at the end of each target's best seed.

    Returns:
      Arrays [target, ...] of the first `few` targets; nothing where one trial does not fit the
      memory.
    """
    first = lambda tree: jax.tree.map(lambda x: x[:few], tree)  # noqa: E731
    problem = problem.replace(targets=first(problem.targets), truths=first(problem.truths))
    objective = np.where(result.finite, np.asarray(result.objective), np.inf)[:few]
    best = objective.argmin(axis=1)
    rows = np.arange(len(best))
    pick = lambda x: np.asarray(x)[rows, best][:, None]  # noqa: E731
    start = jax.tree.map(pick, result.candidates)
    own = {k: np.mean(v) if np.ndim(v) else v for k, v in numbers.items()}
    plan = planner.Plan(1, 1, jax.local_device_count())
    try:
        found = trials.run(
            problem, attack, cast(attack.numbers(1, own)), keys[rows, best][:, None],
            trials.Resources(plan, limit), start,
        )  # fmt: skip
    except UserError:
        return None
    return {name: x[:, 0] for name, x in found.outcome.items()}


def in_pixels(found: dict[str, np.ndarray], normalization: Normalization) -> dict[str, np.ndarray]:
    """The image around which a posterior was found and its standard deviation, not clipped."""
    mean, std = np.asarray(normalization.mean), np.asarray(normalization.std)
    return {"best": found["images"] * std + mean, "std": found["std"] * std}


def attack_of(cell: schema.Cell, material: Material) -> Attack:
    """The iterative attack of a cell, for a network and its data."""
    return cell.make_attack(material.classes, classifier_of(cell, material))


def shapes_of(material: Material, attack: Attack, images: int) -> trials.Problem:
    """One target of so many images, without numbers: what a step's work is counted on."""
    victim = material.victim
    observed = "statistics" in attack.priors
    sent = {"batch_stats": victim.variables["batch_stats"]} if observed else ()
    target = Target(victim.variables["params"], jnp.zeros(images, jnp.int32), sent)
    problem = trials.Problem(
        victim.module, material.images.shape[2:], victim.variables,
        jax.tree.map(lambda x: x[None], target), None, material.normalization,
        material.image_prior,
    )  # fmt: skip
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.result_type(x)), problem)


def classifier_of(cell: schema.Cell, material: Material) -> tuple[str, ...]:
    """The path of the network's last dense layer, where the attacker asks for it; else ()."""
    if READ_UPDATE & set(cell.priors()) or "soteria" in cell.told_names():
        victim = material.victim
        return classifier_path(victim.module, victim.variables, material.images[0])
    return ()


@functools.partial(jax.jit, static_argnums=2)
def _per_target(
    problem: trials.Problem, labels: jax.Array, classes: int
) -> tuple[metrics.Scores, jax.Array]:
    """The mean-colour baseline of each target, and the label accuracy of each [target, seed]."""
    truths, normalization = problem.truths, problem.normalization
    accuracy = lambda t, found: metrics.label_accuracy(t, found, classes)  # noqa: E731
    of_target = jax.vmap(jax.vmap(accuracy, in_axes=(None, 0)))
    return (
        jax.vmap(lambda truth: metrics.mean_colour(truth, normalization))(truths),
        of_target(truths.labels, labels),
    )
