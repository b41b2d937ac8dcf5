"""What an iterative attack is to the loop: `init` and `step` of one trial, and a few defaults.

An attack is a static object, hashable: it shapes the compiled program. What may differ from seed to
seed are its *numbers*, a NamedTuple of arrays that the attack itself makes of the settings. All
that it may look at is `Known`; the truth is not in it.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxinv import client, defenses, metrics
from jaxinv.attacks.priors import needing
from jaxinv.data.image_prior import ImagePrior
from jaxinv.defenses import DEFENSES
from jaxinv.errors import UserError
from jaxinv.types import Normalization, PyTree, Target, named


class Known(NamedTuple):
    """All that the attacker of one trial has."""

    loss: client.LossFn  # of the client, as the attacker simulates it
    params: PyTree  # of the network the update was computed on
    target: Target
    normalization: Normalization
    image_prior: ImagePrior | None
    learned: Mapping[str, PyTree] = MappingProxyType({})  # what it has trained for itself, by kind


class Candidate(NamedTuple):
    """What an attack moves."""

    images: Float[Array, "*epoch image height width channel"]  # normalized
    logits: Float[Array, "image class"] | None  # of the labels; None where they are given

    def labels(self, given: Int[Array, " image"]) -> Array:
        """What a client would have for labels: those given, or the distribution of the logits."""
        return given if self.logits is None else jax.nn.softmax(self.logits)


class Losses(NamedTuple):
    """The two parts of an attack's loss at one candidate."""

    objective: Float[Array, ""]  # distance of the updates
    prior: Float[Array, ""]  # all priors, each times its weight


@dataclasses.dataclass(frozen=True)
class Attack:
    """One trial of an iterative attack: what every one of them answers to the loop.

    A subclass is a frozen dataclass of static settings, which shape the compiled program. It has
    `init`, `step` and `Numbers`; its state has the current `candidate` as a field. Everything else
    has a default here.
    """

    objective: str | Callable = "l2"  # that is reported, and chooses among seeds
    batch_norm: str = "eval"  # what the client does, and the attacker simulates: client.BATCH_NORM
    local: client.Local = client.Local()  # the client's local steps, as the attacker simulates them
    defense: tuple[str, ...] = ()  # the client's, as far as the attacker knows it

    Numbers: ClassVar[Any]  # what is traced: a NamedTuple, `iterations` among its fields
    steps_per_call: ClassVar[int] = 1  # steps between two looks of the progress bar

    @classmethod
    def of_settings(cls, settings: Any, assumed: "Assumed", **own: Any) -> Self:
        """Makes one of a cell's settings: what every attack takes from them, and its own fields."""
        return cls(
            objective=settings.objective,
            batch_norm=settings.batch_norm,
            local=assumed.local,
            defense=assumed.defense,
            **own,
        )

    @property
    def priors(self) -> tuple[str | Callable, ...]:
        """Those of `priors.PRIORS` that have a weight."""
        return ()

    @property
    def needs_image_prior(self) -> bool:
        """Whether it asks what images look like (`Known.image_prior`)."""
        return False

    @property
    def any_scale(self) -> bool:
        """Whether the update may be a multiple of what it is taken for."""
        return False

    @property
    def starts_learned(self) -> bool:
        """Whether it begins with what a trained inverter finds."""
        return False

    @property
    def couples_seeds(self) -> bool:
        """Whether a target's seeds exchange something, and must be computed together."""
        return bool(needing("seeds", self.priors))

    @property
    def passes_per_step(self) -> int:
        """Passes through the network in one step, beside what is done once."""
        return 1

    def numbers(self, seeds: int, settings: Mapping[str, Any]) -> Any:
        """Makes its numbers of settings, each one for all seeds or one for each, as [seed]."""
        names = [name for name in self.Numbers._fields if name != "iterations"]
        iterations = np.int32(settings["iterations"])
        return self.Numbers(**per_seed(settings, names, seeds), iterations=iterations)

    @abc.abstractmethod
    def init(
        self,
        numbers: Any,
        key: Array,
        shape: tuple[int, ...],
        known: Known,
        initial: Candidate | None,
    ) -> Any:
        """Makes the first state: from what another attack found, or else drawn from the key."""

    @abc.abstractmethod
    def step(
        self, numbers: Any, known: Known, index: Int[Array, ""], state: Any
    ) -> tuple[Any, Losses]:
        """Takes one step of one trial.

        Args:
          numbers: of this seed.
          known: all that the attacker has.
          index: steps taken so far. From `numbers.iterations` on the state is returned as it came,
            so that the last call only evaluates.
          state: of this trial.

        Returns:
          The next state, and the losses at the candidate the step started from.
        """

    def reconstruct(self, candidate: Candidate) -> Float[Array, "image height width channel"]:
        """The attacker's normalized images; of several epochs, their mean."""
        return average_epochs(candidate)

    def outcome(self, state: Any) -> dict[str, Array]:
        """What of the last state is kept beside the candidate."""
        del state
        return {}

    def smaller(self) -> "Attack | None":
        """The same attack in less memory, where one trial does not fit alone; or None."""

    def replace(self, **changes: Any) -> Self:
        """The same attack with other fields."""
        return dataclasses.replace(self, **changes)


class Assumed(NamedTuple):
    """What of the client and its network an attack is built for, beside its own settings."""

    local: client.Local = client.Local()  # the client's steps
    images: int = 1  # of the update
    defense: tuple[str, ...] = ()  # as far as it is known
    classes: int = 0  # where the labels are optimized beside the images, else 0
    classifier: tuple[str, ...] = ()  # path of the last dense layer, where something asks for it


class Family(NamedTuple):
    """A kind of attack: how it is made of settings, which of them it reads, what it is for."""

    make: Callable[[Any, Assumed], Attack] | None  # of a cell's settings; None: no iterations
    reads: frozenset[str]  # settings beyond those of client and network, the labels, the objective
    inits: tuple[str, ...] = ()  # what `init` may be
    local_steps: bool = True  # whether an update of several steps can be attacked
    joint_labels: bool = True  # whether labels can be optimized beside the images
    each_image: bool = True  # whether it can adapt to a defense of each image's gradient
    only_kinked: bool = False  # whether it is for networks with kinks alone
    only_smooth: bool = False  # and for those without, where one that is for kinks fits

    def unfit(
        self, *, steps: int = 1, each_image: bool = False, joint_labels: bool = False
    ) -> str | None:
        """Says why it is not for an update, such as "is of one gradient"; None where it fits.

        Args:
          steps: of the client.
          each_image: whether it has to adapt to a defense of each image's gradient.
          joint_labels: whether labels are to be optimized beside the images.
        """
        if steps > 1 and not self.local_steps:
            return "is of one gradient"
        if each_image and not self.each_image:
            return "cannot adapt to a defense of each image's gradient"
        if joint_labels and not self.joint_labels:
            return "takes labels as given"
        return None


def check_names(attack: Attack, tables: Mapping[str, Iterable[str]]) -> None:
    """Checks the fields of an attack that are names in tables; a function stands for itself.

    Raises:
      UserError: one is unknown; the known ones are listed.
    """
    for field, table in tables.items():
        name = getattr(attack, field)
        if isinstance(name, str) and name not in table:
            raise UserError(f"method.{field}={name!r}: unknown; known are {', '.join(table)}")


def per_seed(
    settings: Mapping[str, Any], names: Iterable[str], seeds: int
) -> dict[str, Float[np.ndarray, " seed"]]:
    """Takes numbers out of settings, each given one for all seeds or [seed], as [seed]."""
    return {
        name: np.broadcast_to(np.asarray(settings[name], np.float64), (seeds,)) for name in names
    }


class Simulation(NamedTuple):
    """What the attacker takes the client to do: static."""

    local: client.Local = client.Local()  # its local steps
    by_epoch: bool = False  # images of their own for each epoch, whose order is not known
    defense: tuple[str, ...] = ()  # as far as the attacker knows it


def simulate_update(
    simulation: Simulation, known: Known, client_lr: Array, candidate: Candidate
) -> tuple[PyTree, PyTree]:
    """Computes the update that a candidate would cause, as its defense would send it on average.

    Returns:
      The update, and the statistics of the candidate's batch.
    """
    images, labels = candidate.images, candidate.labels(known.target.labels)
    first = named(DEFENSES, simulation.defense[0]) if simulation.defense else None
    if first is not None and first.of_each_image is not None:
        strengths = known.target.defense_knowledge.strengths[0]
        update = first.of_each_image(known.loss, known.params, images, labels, strengths)
        statistics = ()
    else:
        if simulation.by_epoch:
            labels = jnp.broadcast_to(labels, (len(images), *labels.shape))
        update, statistics = client.update(
            known.loss, known.params, images, labels, simulation.local, client_lr
        )
    if simulation.defense:
        update = defenses.expect(simulation.defense, known.target.defense_knowledge, update)
    return update, statistics


def scale_towards(update: PyTree, shared: PyTree) -> PyTree:
    """The multiple of an update that is nearest to the shared one in least squares."""
    power = optax.tree.vdot(update, update)
    factor = optax.tree.vdot(update, shared) / jnp.maximum(power, jnp.finfo(power.dtype).tiny)
    return optax.tree.scale(factor, update)


def average_epochs(candidate: Candidate) -> Float[Array, "image height width channel"]:
    """The attacker's images, normalized: those of the epochs matched to the first's, and averaged.

    References: Dimitrov et al. 2022, arXiv 2206.12395, section 5.4.
    """
    if candidate.images.ndim == 4:
        return candidate.images
    first, *rest = candidate.images
    return jnp.stack([first, *(metrics.match(other, first) for other in rest)]).mean(axis=0)
