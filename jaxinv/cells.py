"""One cell: load what it attacks, let its clients share their updates, attack each.

What a sweep does for every cell, a search for all its candidates at once.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinv import (
    checkpoints,
    config,
    data,
    defenses,
    metrics,
    models,
    planner,
    polishing,
    runtime,
    trials,
    victims,
)
from jaxinv.attacks import CLOSED_FORM
from jaxinv.attacks import gradient_matching as attack
from jaxinv.errors import UserError
from jaxinv.labels import classifier_path
from jaxinv.priors import READ_UPDATE
from jaxinv.types import Normalization, Truth

NUMBERS = (*config.SEARCHABLE, "iterations")  # what of a cell is traced


class Material(NamedTuple):
    """What a cell attacks: the victim and the private batches, [target, batch, ...]."""

    victim: victims.Victim
    normalization: Normalization
    classes: int
    images: np.ndarray  # uint8
    labels: np.ndarray
    ids: np.ndarray
    draws: np.ndarray  # [target], noise seeds of the client's defense

    def of_targets(self, here: slice, draws: int) -> "Material":
        """The same for some of the targets, each as often as its defense is drawn."""
        fields = ("images", "labels", "ids", "draws")
        own = {name: np.repeat(getattr(self, name)[here], draws, axis=0) for name in fields}
        own["draws"] = own["draws"] + np.arange(len(own["draws"])) % draws
        return self._replace(**own)


class Attacked(NamedTuple):
    """What came of a cell's attack."""

    result: trials.Result
    baseline: metrics.Scores  # of the mean colour, per target
    label_accuracy: jax.Array  # [target, seed]
    shared: trials.Shared
    spectra: polishing.Spectra | None = None  # after a polish


class Loader:
    """Loads what cells attack, each data set and each victim once."""

    def __init__(self, plan: config.Plan, split: str = "test"):
        self._plan, self._split = plan, split
        self._datasets: dict[tuple, data.Dataset] = {}
        self._victims: dict[tuple, victims.Victim] = {}

    def __call__(self, cell: config.Cell) -> Material:
        """Loads a cell's victim and private batches.

        Raises:
          UserError: the data set is not there, or its images do not suit the network.
        """
        dataset = self._dataset(cell)
        shape = dataset.images.shape[1:]
        models.check_image_size(cell.model, cell.dataset, shape)
        victim = self._victim(cell, dataset)
        if "batch_stats" not in victim.variables:
            if cell.batch_norm != "eval":
                raise UserError(
                    f"--batch-norm {cell.batch_norm}: {cell.model} has no BatchNorm; use eval"
                )
            if cell.statistics > 0:
                raise UserError(f"--statistics: {cell.model} has no BatchNorm; give 0")
        images, labels, ids = self._targets(cell, dataset)
        return Material(
            victim, Normalization.of(dataset.mean, dataset.std), len(dataset.classes),
            images, labels, ids, np.zeros(len(ids), int),
        )  # fmt: skip

    def _targets(self, cell: config.Cell, dataset: data.Dataset) -> tuple[np.ndarray, ...]:
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

    def _victim(self, cell: config.Cell, dataset: data.Dataset) -> victims.Victim:
        """The network of a cell: a checkpoint's, or freshly initialised."""
        shape, classes = dataset.images.shape[1:], len(dataset.classes)
        key = (cell.victim, cell.model, cell.width, cell.network_seed, classes, shape)
        if key not in self._victims:
            if cell.victim is None:
                self._victims[key] = victims.untrained(
                    cell.model, classes=classes, width=cell.width,
                    seed=cell.network_seed, image_shape=shape,
                )  # fmt: skip
            else:
                trained = checkpoints.load_victim(cell.victim)
                checkpoints.check_fits(trained, dataset)
                self._victims[key] = trained.as_victim()
        return self._victims[key]

    def _dataset(self, cell: config.Cell) -> data.Dataset:
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
    cell: config.Cell, material: Material, keys: jax.Array, numbers: Mapping[str, Any],
    memory: float | None, progress: Callable[[int, float], None] = lambda steps, psnr: None,
    announce: Callable[[str], None] = lambda plan: None,
) -> Attacked:  # fmt: skip
    """Lets clients share their updates and attacks each from many starts, as a cell says.

    Args:
      cell: the settings; those in `NUMBERS` are taken from `numbers`.
      material: the victim and the private batches.
      keys: [target, start].
      numbers: each one for all starts, or [start].
      memory: GiB to take; None takes nearly all there is.
      progress, announce: see `trials.run`.
    """
    with runtime.arithmetic(cell.precision) as cast:
        truths = cast(Truth(material.images / np.float32(255), material.labels))
        normalization, variables = cast((material.normalization, material.victim.variables))
        module, method = material.victim.module, method_of(cell, material)
        clients = trials.Clients(
            cell.labels, cell.batch_norm, cell.local(), cell.shuffled, cell.assumed_images,
            method.local, observe=cell.batch_norm == "eval" and cell.statistics > 0,
            defense=defenses.names(cell.chain()), told=method.defense,
            classifier=method.classifier,
        )  # fmt: skip
        strengths = defenses.strengths(cell.chain())
        noise = trials.noise_keys(material.ids[:, 0], material.draws)
        orders = trials.order_keys(material.ids[:, 0])
        # What is polished to the last digit is an update that has them.
        with runtime.arithmetic("float64" if cell.polish else cell.precision) as exact:
            asked = exact((variables, truths, normalization))
            shared = trials.make_targets(
                module, *asked, clients, cell.client_lr, orders, strengths, noise
            )
        sent = shared.targets
        targets = cast(sent)
        if cell.attack in CLOSED_FORM:
            result = trials.recover(
                CLOSED_FORM[cell.attack], module, variables, targets, truths, normalization,
                method.objective, keys,
            )  # fmt: skip
            return Attacked(
                result, *_per_target(truths, result.labels, normalization, material.classes), shared
            )
        if cell.assumed_lr is not None:
            numbers = {**numbers, "client_lr": cell.assumed_lr}
        plan = planner.first_plan(
            variables["params"], *keys.shape, targets.labels.shape[1], "group" in method.priors
        )
        result = trials.run(
            module, variables, targets, truths, normalization, method,
            cast(attack.Numbers.of(keys.shape[1], **numbers)), material.images.shape[2:], keys,
            plan, planner.memory_limit(memory), progress, announce,
        )  # fmt: skip
        measured = _per_target(truths, result.labels, normalization, material.classes)
        spectra = None
        if cell.polish:
            rate = cell.client_lr if cell.assumed_lr is None else cell.assumed_lr
            limit = planner.memory_limit(memory)
            with runtime.arithmetic("float64") as exact:
                variables, truths, normalization = exact((variables, truths, normalization))
                result = polishing.polish(
                    result, module, variables, sent, truths, normalization, method, rate,
                    cell.polish, limit,
                )  # fmt: skip
                spectra = polishing.spectra(result, module, variables, sent, method, rate, limit)
        return Attacked(result, *measured, shared, spectra)


def method_of(cell: config.Cell, material: Material) -> attack.Method:
    """What a cell compiles to, for a network and its data."""
    classifier = ()
    if READ_UPDATE & set(cell.priors()) or "soteria" in cell.told_names():
        victim = material.victim
        classifier = classifier_path(victim.module, victim.variables, material.images[0])
    return cell.method(material.classes, classifier)


@functools.partial(jax.jit, static_argnums=3)
def _per_target(
    truths: Truth, labels: jax.Array, normalization: Normalization, classes: int
) -> tuple[metrics.Scores, jax.Array]:
    """The mean-colour baseline of each target, and the label accuracy of each [target, seed]."""
    accuracy = lambda t, found: metrics.label_accuracy(t, found, classes)  # noqa: E731
    of_target = jax.vmap(jax.vmap(accuracy, in_axes=(None, 0)))
    return (
        jax.vmap(lambda truth: metrics.mean_colour(truth, normalization))(truths),
        of_target(truths.labels, labels),
    )
