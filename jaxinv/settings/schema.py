"""Settings: what may be asked for, and what each may be.

A *cell* is one complete set of settings. Each field of a model below is a flag, and those of `Cell`
and `Plan` are keys of a sweep file. `jaxinv.settings.flags` makes the flags, `reader` reads both,
and `checks` says which settings do not go together.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from jaxinv import defenses, networks
from jaxinv.attacks import ATTACKS
from jaxinv.attacks.base import Assumed, Attack, Family
from jaxinv.attacks.exchanges import EXCHANGES
from jaxinv.attacks.gauss_newton import PRIOR_INITS
from jaxinv.attacks.gradient_matching import (
    INITS,
    LAYERS,
    LEARNED,
    OPTIMIZERS,
    PRIOR_SCHEDULES,
    RATES,
    SCHEDULES,
    SIGNS,
    SIMULATIONS,
    default_rate,
)
from jaxinv.attacks.gram import GRAM
from jaxinv.attacks.labels import LABELS
from jaxinv.attacks.objectives import OBJECTIVES
from jaxinv.attacks.priors import PRIORS, needing
from jaxinv.attacks.representations import REPRESENTATIONS
from jaxinv.client import BATCH_NORM, Local
from jaxinv.data import GROUPINGS
from jaxinv.data.image_prior import IMAGE_PRIORS
from jaxinv.errors import UserError
from jaxinv.machine import runtime
from jaxinv.machine.executors import EXECUTORS
from jaxinv.settings.fields import (
    AMPLIFY,
    BINS,
    DATA_DIR,
    JUDGE,
    MEMORY,
    MOST_COUNT,
    MOST_SEED,
    MOST_WIDTH,
    FilePath,
    Strict,
    of_tables,
    published,
    setting,
    spell_chain,
    split_ids,
    weight,
)

OF_VICTIM = ("model", "width", "network_seed")  # what a checkpoint says of its network
# Settings that had another name before version 0.2.
RENAMED = {
    "told": "adaptive",
    "norm": "prior_l2",
    "statistics": "prior_batch_norm",
    "group": "prior_group",
    "features": "prior_features",
    "order": "prior_epoch_order",
}


class AssumedClient(NamedTuple):
    """What the attacker takes the client to be: what it assumes, and else the truth."""

    images: int  # of an update
    local: Local  # the client's steps
    client_lr: float
    defense: tuple[str, ...]  # what it knows of the client's defense: all or nothing


class Cell(Strict):
    """One setting of everything. Each field is a flag, a key of a sweep file, a possible axis."""

    dataset: str = setting(
        "data",
        "tiles",
        "Images to attack: 'tiles', a tensorflow-datasets name, or the path of "
        "a folder of pictures by class or of an .npz.",
        "NAME|PATH",
    )
    images: int = setting("data", 1, "Images behind each shared update.", ge=1, le=MOST_COUNT)
    grouping: Annotated[str, of_tables(GROUPINGS)] = setting(
        "data",
        "stored",
        "How images are grouped into targets: in stored order, with different "
        "labels, or all with the same label.",
    )

    model: Annotated[str, of_tables(networks.NETWORKS)] = setting(
        "network", "lenet_zhu", "Network to attack."
    )
    width: Annotated[int | None, BeforeValidator(published)] = setting(
        "network",
        None,
        "Channels (or units) of its first layer, or 'published', as in its paper.",
        "INT|published",
        ge=1,
        le=MOST_WIDTH,
    )
    network_seed: int = setting(
        "network", 0, "Seed of the untrained network's parameters.", ge=0, le=MOST_SEED
    )
    victim: FilePath | None = setting(
        "network",
        None,
        "Attack this trained network instead: the name or folder of a checkpoint.",
        "NAME|DIR",
    )
    server: Annotated[str, of_tables(("honest", "malicious"))] = setting(
        "network",
        "honest",
        "Whether the server sends the network itself, or puts in front of it an imprint that "
        "--attack imprint reads (malicious).",
    )
    bins: int = BINS
    amplify: float = AMPLIFY

    batch_norm: Annotated[str, of_tables(BATCH_NORM)] = setting(
        "client",
        "eval",
        "Statistics of the client's BatchNorm layers: running ones (eval), the "
        "batch's own kept private (train), or the batch's own sent along (train-shared).",
    )
    client_epochs: int = setting(
        "client",
        1,
        "Passes of the client over its images before it shares its update (FedAvg).",
        ge=1,
        le=10**6,
    )
    client_batch: int | None = setting(
        "client",
        None,
        "Images in each of the client's mini-batches (default: all of them).",
        ge=1,
        le=MOST_COUNT,
    )
    client_lr: float = setting(
        "client", 1e-4, "Learning rate of the client, where it takes several steps.", gt=0
    )
    shuffled: bool = setting(
        "client",
        False,
        "Whether the client shuffles its images before each epoch, in an order "
        "that the attacker does not know.",
    )

    defense: Annotated[str, AfterValidator(spell_chain)] = setting(
        "defense",
        "none",
        "What the client does to its update, a chain such as clip:1,noise:1e-4 "
        f"of {', '.join(defenses.DEFENSES)}; or 'victim', the DP-SGD that the victim was trained "
        "with.",
        "CHAIN",
    )
    adaptive: bool = setting(
        "defense", False, "Whether the attacker knows the defense and adapts to it."
    )

    attack: Annotated[str, of_tables(ATTACKS)] = setting(
        "attack",
        "geiping",
        "Named attack: a preset for the settings below, any of which can be overridden; or best, "
        "for what has won on such a network.",
    )
    labels: Annotated[str, of_tables(LABELS, ("joint",))] = setting(
        "attack",
        "known",
        "How the attacker gets the labels: it knows them, reads them off the "
        "update by a rule, or optimizes them with the images (joint).",
    )
    assumed_images: int | None = setting(
        "attack",
        None,
        "Number of images the attacker believes the update was computed on "
        "(default: the true number).",
        ge=1,
        le=MOST_COUNT,
    )
    assumed_batch: int | None = setting(
        "attack",
        None,
        "Mini-batch size the attacker believes the client used (default: the true size).",
        ge=1,
        le=MOST_COUNT,
    )
    assumed_lr: float | None = setting(
        "attack",
        None,
        "Learning rate the attacker believes the client used (default: the true rate).",
        gt=0,
        traced=True,
    )
    objective: Annotated[str, of_tables(OBJECTIVES)] = setting(
        "attack", "cosine", "Distance between the candidate's update and the shared one."
    )
    optimizer: Annotated[str, of_tables(OPTIMIZERS)] = setting(
        "attack", "adam", "Optimizer that moves the images."
    )
    sign: Annotated[str, of_tables(SIGNS)] = setting(
        "attack",
        "hard",
        "Whether the optimizer sees the gradient's sign, a soft sign, one of five sizes "
        "(quantized), or the gradient itself (none).",
    )
    layers: Annotated[str, of_tables(LAYERS)] = setting(
        "attack",
        "all",
        "Layers whose updates are compared: all of them, or the deepest first and all after a "
        "quarter of the steps (deep_first).",
    )
    entries: float = setting(
        "attack",
        1.0,
        "Share of the update's entries that each step compares, drawn anew for every step.",
        gt=0,
        le=1,
    )
    exchange: Annotated[str, of_tables(EXCHANGES)] = setting(
        "attack",
        "none",
        "What a target's seeds tell one another on the way, which then depend on one another: the "
        "worse half goes on from the better half (halving), or all from their mean (consensus).",
    )
    simulation: Annotated[str, of_tables(SIMULATIONS)] = setting(
        "attack",
        "unrolled",
        "What stands for the client's local steps: all of them (unrolled), or one gradient at a "
        "place between its first parameters and its last, moved beside the images (surrogate).",
    )
    representation: Annotated[str, of_tables(REPRESENTATIONS)] = setting(
        "attack",
        "pixels",
        "What the optimizer moves: the pixels, the coefficients of --image-prior in units of "
        "their standard deviations (whitened), the pixels' low frequencies and then all of them "
        "(coarse_to_fine), or the weights of an untrained generator.",
    )
    lr: float = setting(
        "attack",
        lambda settings: default_rate(settings["optimizer"], settings["representation"]),
        "Learning rate of the attack "
        f"(default: {', '.join(f'{rate:g} for {name}' for name, rate in RATES.items())}; of a "
        "generator's weights 0.03 of it).",
        gt=0,
        traced=True,
    )
    schedule: Annotated[str, of_tables(SCHEDULES)] = setting(
        "attack", "step", "Learning-rate schedule."
    )
    init: Annotated[str, of_tables(INITS, (LEARNED,), PRIOR_INITS)] = setting(
        "attack",
        "normal",
        "Distribution of the initial image, or what --inverter finds (learned). For the "
        "second-order attacks: mean of the image prior, or a draw from it (prior).",
    )
    box: bool = setting("attack", True, "Whether pixels are clipped to [0, 1] after each step.")
    iterations: int = setting("attack", 500, "Steps of the attack.", ge=1, le=MOST_COUNT)
    polish: int = setting(
        "attack",
        0,
        "Steps of Levenberg-Marquardt in float64 that follow the attack.",
        ge=0,
        le=MOST_COUNT,
    )
    gram: Annotated[str, of_tables(GRAM)] = setting(
        "attack",
        "auto",
        "Compare updates without storing weight gradients: where it saves memory "
        "(accelerators) or arithmetic (CPUs), wherever it saves memory (on), or never (off).",
    )
    precision: Annotated[str, of_tables(runtime.PRECISIONS)] = setting(
        "attack", "float32", "Floating-point precision of the attack; tensorfloat32 is for GPUs."
    )

    prior_schedule: Annotated[str, of_tables(PRIOR_SCHEDULES)] = setting(
        "priors",
        "constant",
        "Weights of the priors on the way: as given, from a fifth of the steps on (late), or from "
        "ten times as much down to what is given (decay).",
    )
    tv: float = weight(0.01, "Weight of the total variation.")
    tv_isotropic: float = weight(0.0, "Weight of the isotropic total variation.")
    tv_color: float = weight(
        0.0,
        "Weight of the isotropic total variation over the channels and their pairwise differences.",
    )
    prior_l2: float = weight(0.0, "Weight of the mean square of the normalized pixels.")
    prior_batch_norm: float = weight(
        0.0,
        "Weight of the distance to the BatchNorm statistics that the client shares, or to the "
        "running ones (--batch-norm eval).",
    )
    prior_group: float = weight(
        0.0,
        "Weight of the distance to the mean image over the target's seeds, which then depend "
        "on one another.",
    )
    prior_features: float = weight(
        0.0,
        "Weight of the distance to the input of the last dense layer, read off the shared update.",
    )
    prior_epoch_order: float = weight(
        0.0,
        "Weight of the penalty that makes the images reconstructed for each local epoch "
        "agree, whatever their order. Needs --client-epochs 2 or more and --shuffled true.",
    )

    prior_autoencoder: float = weight(
        0.0, "Weight of the distance of --autoencoder's error from what is usual for an image."
    )
    prior_denoiser: float = weight(
        0.0,
        "Weight of the distance to what --denoiser makes of the candidate; of bayes, the share in "
        "(0, 1] by which the denoised image takes the place of --image-prior.",
    )
    autoencoder: FilePath = setting(
        "priors",
        "prior-autoencoder-cifar10",
        "Autoencoder of the attacker's: the name or folder of a checkpoint.",
        "NAME|DIR",
    )
    denoiser: FilePath = setting(
        "priors",
        "prior-denoiser-cifar10",
        "Denoiser of the attacker's: the name or folder of a checkpoint.",
        "NAME|DIR",
    )
    inverter: FilePath | None = setting(
        "attack",
        None,
        "Trained inverter of --attack learned or --init learned: the name or folder of a "
        "checkpoint.",
        "NAME|DIR",
    )

    image_prior: Annotated[str, of_tables(IMAGE_PRIORS)] = setting(
        "second-order attack",
        "spectrum",
        "What the attacker knows of images: mean and power "
        "spectrum, or full covariance, of the training split, or the spectrum of shipped "
        "photographs.",
    )
    anneal_from: float = setting(
        "second-order attack",
        100.0,
        "Variance of the model's error at the first step, relative to each layer's mean square.",
        gt=0,
        traced=True,
    )
    anneal_to: float = setting(
        "second-order attack",
        1e-6,
        "Variance of the model's error at the last step.",
        gt=0,
        traced=True,
    )
    cg_iterations: int = setting(
        "second-order attack",
        80,
        "Conjugate-gradient iterations of each step.",
        ge=1,
        le=MOST_COUNT,
    )
    damping: float = setting(
        "second-order attack",
        0.0,
        "Damping of each step of bayes, relative to the mean diagonal of its system.",
        ge=0,
        traced=True,
    )
    tolerance: float = setting(
        "second-order attack",
        1e-3,
        "Relative gain of a step below which bayes stops, once it has reached the noise.",
        ge=0,
        traced=True,
    )
    posterior: int = setting(
        "second-order attack",
        0,
        "Posterior draws that give each pixel of the best image of bayes "
        "a standard deviation; 0 for none.",
        ge=0,
        le=10**6,
    )
    draws: int = setting(
        "second-order attack",
        16,
        "Images that each step of smoothed_bayes draws from what it believes; an even number.",
        ge=2,
        le=10**6,
        multiple_of=2,
    )
    inflation: float = setting(
        "second-order attack",
        50.0,
        "Number of entries of the update whose errors smoothed_bayes counts as one.",
        gt=0,
        traced=True,
    )

    def local(self) -> Local:
        """What the client does."""
        return Local(self.client_epochs, self.client_batch)

    def chain(self) -> defenses.Chain:
        """The client's defense."""
        return defenses.parse(self.defense)

    def assumed(self) -> AssumedClient:
        """What the attacker takes the client to be."""
        return AssumedClient(
            self.assumed_images or self.images,
            Local(self.client_epochs, self.assumed_batch or self.client_batch),
            self.assumed_lr or self.client_lr,
            defenses.names(self.chain()) if self.adaptive else (),
        )

    def numbers(self) -> dict[str, float]:
        """What of the attack is traced: names as in `SEARCHABLE`; `client_lr` as it believes."""
        settings = {name: getattr(self, name) for name in (*SEARCHABLE, "iterations")}
        return settings | {"client_lr": self.assumed().client_lr}

    def steps(self) -> int:
        """Local steps: the most that the client takes, or is taken to take."""
        assumed = self.assumed()
        return max(self.local().steps(self.images), assumed.local.steps(assumed.images))

    def has_kinks(self) -> bool:
        """Whether the network that the client receives has ReLUs: its own, or an imprint's."""
        return self.server == "malicious" or not networks.NETWORKS[self.model].smooth

    def asks(self) -> dict[str, Any]:
        """What an attack has to fit, as `Family.unfit` takes it."""
        return {
            "steps": self.steps(),
            "each_image": self.adaptive and self.of_each_image(),
            "joint_labels": self.labels == "joint",
        }

    def of_each_image(self) -> bool:
        """Whether the client's defense takes each image's own gradient."""
        return defenses.takes_each_image(defenses.names(self.chain()))

    def priors(self) -> tuple[str, ...]:
        """The priors that have a weight."""
        return tuple(name for name in PRIORS if getattr(self, name) > 0)

    def couplings(self) -> tuple[str, ...]:
        """The settings by which the seeds of a target depend on one another."""
        met = ("exchange",) if self.exchange != "none" else ()
        return (*needing("seeds", self.priors()), *met)

    def learned(self) -> dict[str, str]:
        """The checkpoints of what the attacker has trained and uses, by kind."""
        read = self.family().reads
        kinds = [PRIORS[name].learned for name in self.priors() if name in read]
        kinds += ["inverter"] if self.uses_inverter() else []
        return {kind: getattr(self, kind) for kind in kinds if kind}

    def uses_inverter(self) -> bool:
        """Whether a trained inverter is the attack, or where it begins."""
        return "learned" in (self.init, self.attack)

    def family(self) -> Family:
        """The kind of attack."""
        return ATTACKS[self.attack].family

    def has_image_prior(self) -> bool:
        """Whether the attack asks what images look like."""
        reads = self.family().reads
        moved = "representation" not in reads or REPRESENTATIONS[self.representation].needs_prior
        return "image_prior" in reads and moved

    def make_attack(self, classes: int, classifier: tuple[str, ...]) -> Attack:
        """The iterative attack: the part of the settings that shapes the compiled program.

        Args:
          classes: of the data.
          classifier: path of the network's last dense layer; () where nothing asks for it.

        Raises:
          UserError: the attack has no iterations.
        """
        make, assumed = self.family().make, self.assumed()
        if make is None:
            raise UserError(f"--attack {self.attack}: has no iterations; give another attack")
        of_labels = classes if self.labels == "joint" else 0
        return make(
            self, Assumed(assumed.local, assumed.images, assumed.defense, of_labels, classifier)
        )


def settings_of(group: str) -> tuple[str, ...]:
    """The settings of a cell that stand under a heading of `--help`."""
    fields = Cell.model_fields.items()
    return tuple(name for name, field in fields if field.json_schema_extra["group"] == group)


# What may differ from seed to seed in one program.
SEARCHABLE = tuple(
    name for name, field in Cell.model_fields.items() if field.json_schema_extra["traced"]
)


class Plan(Strict):
    """What is asked of every cell: the same targets and seeds, so that cells compare in pairs."""

    targets: int = setting(
        "data", 4, "Attack the first N targets of the test split.", "N", ge=1, le=MOST_COUNT
    )
    target_ids: Annotated[
        tuple[Annotated[int, Field(ge=0, le=MOST_COUNT)], ...] | None, BeforeValidator(split_ids)
    ] = setting(
        "data",
        None,
        "Attack these images instead, by their place in the test split: 3,5,8.",
        "ID,ID,...",
        min_length=1,
    )
    data_dir: FilePath | None = DATA_DIR
    judge: FilePath | None = JUDGE
    lpips: bool = setting(
        "data", False, "Whether LPIPS is measured too; needs pip install 'jaxinv[lpips]'."
    )
    noise_seeds: int = setting(
        "defense",
        1,
        "Draws of a random defense per target, each attacked from every seed.",
        ge=1,
        le=10**6,
    )
    seeds: int = setting(
        "attack", 32, "Random initial images from which each target is attacked.", ge=1, le=10**6
    )
    memory: float | None = MEMORY
    out: FilePath | None = setting(
        "output", None, "Run folder (default: runs/NAME of the study).", "DIR"
    )

    @model_validator(mode="after")
    def _targets_are_said_once(self) -> "Plan":
        """Refuses what says twice which images are attacked, or an image twice."""
        if self.target_ids is not None:
            if "targets" in self.model_fields_set:
                raise ValueError("--target-ids says which targets; leave --targets out")
            if len(set(self.target_ids)) < len(self.target_ids):
                raise ValueError("--target-ids: give each image once")
        return self


def _amounts(texts: Any) -> Any:
    """Reads `num_gpus=1 slurm_partition=long`: whole numbers, fractions, words."""
    amounts = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not (name.isidentifier() and value):
            raise ValueError("give such as num_gpus=1 (ray) or timeout_min=60 (slurm)")
        for kind in (int, float, str):
            with contextlib.suppress(ValueError):
                amounts[name] = kind(value)
                break
    return amounts


class Workers(Strict):
    """Where the cells of a sweep are computed. Each field is a flag."""

    executor: Annotated[str, of_tables(("local",), EXECUTORS)] = setting(
        "machines",
        "local",
        "Where cells run: one after another on this machine (local), or in "
        "parallel on a Ray or Slurm cluster.",
    )
    resources: Annotated[dict[str, int | float | str], BeforeValidator(_amounts)] = setting(
        "machines",
        {},
        "What each cell needs there, such as num_gpus=1 (ray) or gpus_per_node=1 (slurm).",
        "NAME=AMOUNT",
    )


class Text(Strict):
    """What a sweep file says of itself."""

    question: str = "What does the attack recover?"
    cost: str = ""
    expectation: str = ""


class Tables(Strict):
    """The settings in a sweep file, and those of its presets that replace them."""

    run: dict[str, Any] = Field({})
    grid: dict[str, Any] = Field({})
    vary: list[dict[str, Any]] | None = Field(None, min_length=1)


class SweepFile(Text, Tables):
    """All that a sweep file may hold; Plan and Cell say what its settings may be."""

    preset: dict[str, Tables] = Field({})


@dataclass(frozen=True)
class Study:
    """A validated sweep: its words, its cells in order, and what is asked of each."""

    name: str
    text: Text
    axes: dict[str, list]  # settings that vary, in order
    cells: tuple[Cell, ...]
    plan: Plan

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.plan.out or f"runs/{self.name}")
