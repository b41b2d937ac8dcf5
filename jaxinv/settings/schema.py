"""Settings: what may be asked for, and what each may be.

A *cell* is one complete set of settings. Each field of a model below is a flag, and those of `Cell`
and `Plan` are keys of a sweep file. `jaxinv.settings.flags` makes the flags, `reader` reads both,
and `checks` says which settings do not go together.
"""

import contextlib
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from jaxinv import defenses, networks
from jaxinv.attacks import ATTACKS
from jaxinv.attacks.base import Assumed, Family, FamilyAttack
from jaxinv.attacks.gauss_newton import PRIOR_INITS
from jaxinv.attacks.gradient_matching import INITS, OPTIMIZERS, RATES, SCHEDULES, SIGNS
from jaxinv.attacks.gram import GRAM
from jaxinv.attacks.labels import LABELS
from jaxinv.attacks.objectives import OBJECTIVES
from jaxinv.attacks.priors import PRIORS
from jaxinv.client import BATCH_NORM, Local
from jaxinv.client.kinds import AUTO, KINDS
from jaxinv.data import GROUPINGS
from jaxinv.data.image_prior import IMAGE_PRIORS
from jaxinv.errors import UserError
from jaxinv.machine import runtime
from jaxinv.machine.executors import EXECUTORS
from jaxinv.privacy.accounting import ACCOUNTANTS
from jaxinv.victim.training import PRECISIONS
from jaxinv.victim.training import SCHEDULES as TRAINING_SCHEDULES

OF_VICTIM = ("model", "width", "network_seed")  # what a checkpoint says of its network
VICTIMS_OWN = "victim"  # the defense that a victim was trained with
# Settings that had another name before version 0.2.
RENAMED = {
    "told": "adaptive",
    "norm": "prior_l2",
    "statistics": "prior_batch_norm",
    "group": "prior_group",
    "features": "prior_features",
    "order": "prior_epoch_order",
}
MOST_SEED = 2**32 - 1  # a key of JAX is made of 32 bits; a larger seed would repeat a smaller one
MOST_COUNT = 2**31 - 1  # compiled loops count in 32 bits
MOST_WIDTH = 2**14
LEAST_FLOAT, MOST_FLOAT = 1.2e-38, 3.4e38  # what float32 can hold without becoming 0 or infinite
MOST_NAME = 200  # bytes of a file's name, with room for the endings of temporary files (255)
MOST_PATH = 2000
MOST_DEFENSES = 8  # of a chain; a longer one takes minutes to compile


class OneOf:
    """Accepts the names that stand in some tables at the time, and lists them otherwise."""

    def __init__(self, *tables: Iterable[str]):
        self._tables = tables

    @property
    def names(self) -> tuple[str, ...]:
        """All names, a user's own entries among them."""
        return tuple(name for table in self._tables for name in table)

    def __call__(self, name: str) -> str:
        """Returns the name.

        Raises:
          ValueError: it is not in the table.
        """
        if name not in self.names:
            raise ValueError(f"unknown; known are {', '.join(self.names)}")
        return name


def _of(*tables: Iterable[str]) -> AfterValidator:
    """What a setting may be: a name in one of these tables."""
    return AfterValidator(OneOf(*tables))


def _flag(
    group: str,
    default: Any,
    text: str,
    metavar: str | None = None,
    traced: bool = False,
    **limits: Any,
) -> Any:
    """A field that is a flag.

    Args:
      group: heading of `--help` under which it stands.
      default: its value where it is not given; a function of the settings above it, or ... for a
        value that must be given.
      text: one sentence of `--help`.
      metavar: what stands for its value there; by its type where not given.
      traced: whether it may differ from seed to seed in one program: a search may vary it.
      limits: as pydantic names them (ge, gt, le, lt, min_length, ...).
    """
    shown = {"group": group, "metavar": metavar, "traced": traced}
    if callable(default):
        return Field(default_factory=default, description=text, json_schema_extra=shown, **limits)
    return Field(default, description=text, json_schema_extra=shown, **limits)


def _weight(default: float, text: str) -> Any:
    """The weight of a prior; 0 leaves it out."""
    return _flag("priors", default, text, ge=0, traced=True)


def kind_of(annotation: Any) -> type | None:
    """The one of bool, int and float that a setting's values are; None for other types."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation, *_ = (t for t in typing.get_args(annotation) if t is not type(None))
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation if annotation in (bool, int, float) else None


def _published(width: Any) -> Any:
    """Reads the width "published": a sweep file's preset must be able to take a width back."""
    return None if width == "published" else width


def _chain(text: str) -> str:
    """Spells a chain of defenses in the one way there is."""
    if text == VICTIMS_OWN:
        return text
    if not text.isascii():
        raise ValueError("write it with plain letters and digits")
    chain = defenses.parse(text)
    if len(chain) > MOST_DEFENSES:
        raise ValueError(f"a chain of {len(chain)}; give {MOST_DEFENSES} at most")
    for value in (value for strengths in defenses.strengths(chain) for value in strengths):
        _check_float(value)
    return defenses.spell(chain)


def _check_plain(text: str) -> None:
    """Refuses digits with underscores between them, which Python takes for a number, and others."""
    if "_" in text or not text.isascii():
        raise ValueError("write a number with plain digits")


def _split(ids: Any) -> Any:
    """Reads "3,5,8", as a flag gives it."""
    if not isinstance(ids, str):
        return ids
    _check_plain(ids)
    return ids.split(",")


def _path(text: str) -> str:
    """Accepts what a file system can name.

    Raises:
      ValueError: it is empty, holds a character that cannot be printed, or is too long.
    """
    if not text or not text.isprintable():
        raise ValueError("no name of a file or folder")
    longest = max(len(part.encode(errors="replace")) for part in Path(text).parts)
    if longest > MOST_NAME or len(text.encode(errors="replace")) > MOST_PATH:
        raise ValueError(f"too long; give names of at most {MOST_NAME} bytes")
    return text


FilePath = Annotated[str, AfterValidator(_path)]


def _check_float(value: float) -> None:
    """Refuses what float32 cannot hold: it would become infinite or 0 on its way."""
    if value and not LEAST_FLOAT <= abs(value) <= MOST_FLOAT:
        raise ValueError(f"beyond what float32 holds, {LEAST_FLOAT:g} to {MOST_FLOAT:g}")


class _Strict(BaseModel):
    """Unknown keys are errors, values are frozen, infinities and NaN are no numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses what Python takes for a number and a reader does not: 1_0, True, ٣."""
        kind = kind_of(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, str) and kind in (int, float):
            _check_plain(value)
        if isinstance(value, bool) and kind in (int, float):
            raise ValueError("a number is wanted, not true or false")
        if isinstance(value, int) and not isinstance(value, bool) and kind is bool:
            raise ValueError("give true or false")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _in_float32(cls, value: Any) -> Any:
        """Refuses numbers that the program could not hold."""
        if isinstance(value, float):
            _check_float(value)
        return value


# Of several commands.
_DATA_DIR = _flag(
    "data", None, "Folder of the tensorflow-datasets (default: $TFDS_DATA_DIR).", "DIR"
)
_MEMORY = _flag(
    "output", None, "GiB of memory to use on each accelerator (default: nearly all).", gt=0
)


class Attacker(NamedTuple):
    """What the attacker takes the client to be: what it assumes, and else the truth."""

    images: int  # of an update
    local: Local  # the client's steps
    client_lr: float
    defense: tuple[str, ...]  # what it knows of the client's defense: all or nothing


class Cell(_Strict):
    """One setting of everything. Each field is a flag, a key of a sweep file, a possible axis."""

    dataset: str = _flag(
        "data",
        "tiles",
        "Images to attack: 'tiles', a tensorflow-datasets name, or the path of "
        "a folder of pictures by class or of an .npz.",
        "NAME|PATH",
    )
    images: int = _flag("data", 1, "Images behind each shared update.", ge=1, le=MOST_COUNT)
    grouping: Annotated[str, _of(GROUPINGS)] = _flag(
        "data",
        "stored",
        "How images are grouped into targets: in stored order, with different "
        "labels, or all with the same label.",
    )

    model: Annotated[str, _of(networks.NETWORKS)] = _flag(
        "network", "lenet_zhu", "Network to attack."
    )
    width: Annotated[int | None, BeforeValidator(_published)] = _flag(
        "network",
        None,
        "Channels (or units) of its first layer, or 'published', as in its paper.",
        "INT|published",
        ge=1,
        le=MOST_WIDTH,
    )
    network_seed: int = _flag(
        "network", 0, "Seed of the untrained network's parameters.", ge=0, le=MOST_SEED
    )
    victim: FilePath | None = _flag(
        "network",
        None,
        "Attack this trained network instead: the name or folder of a checkpoint.",
        "NAME|DIR",
    )

    batch_norm: Annotated[str, _of(BATCH_NORM)] = _flag(
        "client",
        "eval",
        "Statistics of the client's BatchNorm layers: running ones (eval), the "
        "batch's own kept private (train), or the batch's own sent along (train-shared).",
    )
    client_epochs: int = _flag(
        "client",
        1,
        "Passes of the client over its images before it shares its update (FedAvg).",
        ge=1,
        le=10**6,
    )
    client_batch: int | None = _flag(
        "client",
        None,
        "Images in each of the client's mini-batches (default: all of them).",
        ge=1,
        le=MOST_COUNT,
    )
    client_lr: float = _flag(
        "client",
        1e-4,
        "Learning rate of the client, where it takes several steps.",
        gt=0,
        traced=True,
    )
    shuffled: bool = _flag(
        "client",
        False,
        "Whether the client shuffles its images before each epoch, in an order "
        "that the attacker does not know.",
    )

    defense: Annotated[str, AfterValidator(_chain)] = _flag(
        "defense",
        "none",
        "What the client does to its update, a chain such as clip:1,noise:1e-4 "
        f"of {', '.join(defenses.DEFENSES)}; or 'victim', the DP-SGD that the victim was trained "
        "with.",
        "CHAIN",
    )
    adaptive: bool = _flag(
        "defense", False, "Whether the attacker knows the defense and adapts to it."
    )

    attack: Annotated[str, _of(ATTACKS)] = _flag(
        "attack",
        "geiping",
        "Named attack: a preset for the settings below. Any of them can be overridden.",
    )
    labels: Annotated[str, _of(LABELS, ("joint",))] = _flag(
        "attack",
        "known",
        "How the attacker gets the labels: it knows them, reads them off the "
        "update by a rule, or optimizes them with the images (joint).",
    )
    assumed_images: int | None = _flag(
        "attack",
        None,
        "Number of images the attacker believes the update was computed on "
        "(default: the true number).",
        ge=1,
        le=MOST_COUNT,
    )
    assumed_batch: int | None = _flag(
        "attack",
        None,
        "Mini-batch size the attacker believes the client used (default: the true size).",
        ge=1,
        le=MOST_COUNT,
    )
    assumed_lr: float | None = _flag(
        "attack",
        None,
        "Learning rate the attacker believes the client used (default: the true rate).",
        gt=0,
    )
    objective: Annotated[str, _of(OBJECTIVES)] = _flag(
        "attack", "cosine", "Distance between the candidate's update and the shared one."
    )
    optimizer: Annotated[str, _of(OPTIMIZERS)] = _flag(
        "attack", "adam", "Optimizer that moves the images."
    )
    sign: Annotated[str, _of(SIGNS)] = _flag(
        "attack",
        "hard",
        "Whether the optimizer sees the gradient's sign, a soft sign, or the "
        "gradient itself (none).",
    )
    lr: float = _flag(
        "attack",
        lambda settings: RATES[settings["optimizer"]],
        "Learning rate of the attack "
        f"(default: {', '.join(f'{rate:g} for {name}' for name, rate in RATES.items())}).",
        gt=0,
        traced=True,
    )
    schedule: Annotated[str, _of(SCHEDULES)] = _flag("attack", "step", "Learning-rate schedule.")
    init: Annotated[str, _of(INITS, PRIOR_INITS)] = _flag(
        "attack",
        "normal",
        "Distribution of the initial image. For the second-order attacks: mean "
        "of the image prior, or a draw from it (prior).",
    )
    box: bool = _flag("attack", True, "Whether pixels are clipped to [0, 1] after each step.")
    iterations: int = _flag("attack", 500, "Steps of the attack.", ge=1, le=MOST_COUNT)
    polish: int = _flag(
        "attack",
        0,
        "Steps of Levenberg-Marquardt in float64 that follow the attack.",
        ge=0,
        le=MOST_COUNT,
    )
    gram: Annotated[str, _of(GRAM)] = _flag(
        "attack",
        "auto",
        "Compare updates without storing weight gradients: where it saves memory "
        "(accelerators) or arithmetic (CPUs), wherever it saves memory (on), or never (off).",
    )
    precision: Annotated[str, _of(runtime.PRECISIONS)] = _flag(
        "attack", "float32", "Floating-point precision of the attack; tensorfloat32 is for GPUs."
    )

    tv: float = _weight(0.01, "Weight of the total variation.")
    tv_isotropic: float = _weight(0.0, "Weight of the isotropic total variation.")
    tv_color: float = _weight(
        0.0,
        "Weight of the isotropic total variation over the channels and their pairwise differences.",
    )
    prior_l2: float = _weight(0.0, "Weight of the mean square of the normalized pixels.")
    prior_batch_norm: float = _weight(
        0.0,
        "Weight of the distance to the BatchNorm statistics that the client shares, or to the "
        "running ones (--batch-norm eval).",
    )
    prior_group: float = _weight(
        0.0,
        "Weight of the distance to the mean image over the target's seeds, which then depend "
        "on one another.",
    )
    prior_features: float = _weight(
        0.0,
        "Weight of the distance to the input of the last dense layer, read off the shared update.",
    )
    prior_epoch_order: float = _weight(
        0.0,
        "Weight of the penalty that makes the images reconstructed for each local epoch "
        "agree, whatever their order. Needs --client-epochs 2 or more and --shuffled true.",
    )

    image_prior: Annotated[str, _of(IMAGE_PRIORS)] = _flag(
        "second-order attack",
        "spectrum",
        "What the attacker knows of images: mean and power "
        "spectrum, or full covariance, of the training split, or the spectrum of shipped "
        "photographs.",
    )
    anneal_from: float = _flag(
        "second-order attack",
        100.0,
        "Variance of the model's error at the first step, relative to each layer's mean square.",
        gt=0,
        traced=True,
    )
    anneal_to: float = _flag(
        "second-order attack",
        1e-6,
        "Variance of the model's error at the last step.",
        gt=0,
        traced=True,
    )
    cg_iterations: int = _flag(
        "second-order attack",
        80,
        "Conjugate-gradient iterations of each step.",
        ge=1,
        le=MOST_COUNT,
    )
    damping: float = _flag(
        "second-order attack",
        0.0,
        "Damping of each step of bayes, relative to the mean diagonal of its system.",
        ge=0,
        traced=True,
    )
    tolerance: float = _flag(
        "second-order attack",
        1e-3,
        "Relative gain of a step below which bayes stops, once it has reached the noise.",
        ge=0,
        traced=True,
    )
    posterior: int = _flag(
        "second-order attack",
        0,
        "Posterior draws that give each pixel of the best image of bayes "
        "a standard deviation; 0 for none.",
        ge=0,
        le=10**6,
    )
    draws: int = _flag(
        "second-order attack",
        16,
        "Images that each step of smoothed_bayes draws from what it believes; an even number.",
        ge=2,
        le=10**6,
        multiple_of=2,
    )
    inflation: float = _flag(
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

    def attacker(self) -> Attacker:
        """What the attacker takes the client to be."""
        return Attacker(
            self.assumed_images or self.images,
            Local(self.client_epochs, self.assumed_batch or self.client_batch),
            self.assumed_lr or self.client_lr,
            defenses.names(self.chain()) if self.adaptive else (),
        )

    def numbers(self) -> dict[str, float]:
        """What of the attack is traced, as the attacker has it: names as in `SEARCHABLE`."""
        settings = {name: getattr(self, name) for name in (*SEARCHABLE, "iterations")}
        return settings | {"client_lr": self.attacker().client_lr}

    def of_each_image(self) -> bool:
        """Whether the client's defense takes each image's own gradient."""
        return any(defenses.DEFENSES[name].of_each_image for name in defenses.names(self.chain()))

    def priors(self) -> tuple[str, ...]:
        """The priors that have a weight."""
        return tuple(name for name in PRIORS if getattr(self, name) > 0)

    def family(self) -> Family:
        """The kind of attack."""
        return ATTACKS[self.attack].family

    def has_image_prior(self) -> bool:
        """Whether the attack asks what images look like."""
        return "image_prior" in self.family().reads

    def make_attack(self, classes: int, classifier: tuple[str, ...]) -> FamilyAttack:
        """The iterative attack: the part of the settings that shapes the compiled program.

        Args:
          classes: of the data.
          classifier: path of the network's last dense layer; () where nothing asks for it.

        Raises:
          UserError: the attack has no iterations.
        """
        make, attacker = self.family().make, self.attacker()
        if make is None:
            raise UserError(f"--attack {self.attack}: has no iterations; give another attack")
        of_labels = classes if self.labels == "joint" else 0
        assumed = Assumed(attacker.local, attacker.images, attacker.defense, of_labels, classifier)
        return make(self, assumed)


# What may differ from seed to seed in one program.
SEARCHABLE = tuple(
    name for name, field in Cell.model_fields.items() if field.json_schema_extra["traced"]
)


class Plan(_Strict):
    """What is asked of every cell: the same targets and seeds, so that cells compare in pairs."""

    targets: int = _flag(
        "data", 4, "Attack the first N targets of the test split.", "N", ge=1, le=MOST_COUNT
    )
    target_ids: Annotated[
        tuple[Annotated[int, Field(ge=0, le=MOST_COUNT)], ...] | None, BeforeValidator(_split)
    ] = _flag(
        "data",
        None,
        "Attack these images instead, by their place in the test split: 3,5,8.",
        "ID,ID,...",
        min_length=1,
    )
    data_dir: FilePath | None = _DATA_DIR
    noise_seeds: int = _flag(
        "defense",
        1,
        "Draws of a random defense per target, each attacked from every seed.",
        ge=1,
        le=10**6,
    )
    seeds: int = _flag(
        "attack", 32, "Random initial images from which each target is attacked.", ge=1, le=10**6
    )
    memory: float | None = _MEMORY
    out: FilePath | None = _flag(
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


class Stop(NamedTuple):
    """Where a training keeps a checkpoint on its way."""

    kind: str  # "epoch" | "step" | "accuracy" (the first epoch that ends with it on the test split)
    value: float

    @property
    def name(self) -> str:
        """What is added to the checkpoint's name: `epoch2`, `accuracy0.5`."""
        return f"{self.kind}{self.value:g}"


def _stop(text: str) -> Stop:
    """Reads `epoch:2`, `step:500` or `accuracy:0.5`."""
    kind, _, number = text.partition(":")
    _check_plain(number)
    try:
        value = float(number) if kind == "accuracy" else int(number)
    except ValueError:
        value = -1
    if kind not in ("epoch", "step", "accuracy") or value < 0 or (kind == "accuracy" and value > 1):
        raise ValueError("give such as epoch:2, step:500 or accuracy:0.5 (at most 1)")
    return Stop(kind, value)


class Training(_Strict):
    """What `jaxinv.train` is asked for. Each field is a flag."""

    dataset: str = _flag(
        "data",
        "tiles",
        "Images to train on: 'tiles', a tensorflow-datasets name, or the path of "
        "a folder of pictures by class or of an .npz.",
        "NAME|PATH",
    )
    augment: bool = _flag("data", True, "Whether images are randomly cropped and flipped.")
    data_dir: FilePath | None = _DATA_DIR
    model: Annotated[str, _of(networks.NETWORKS)] = _flag(
        "network", "lenet_zhu", "Network to train."
    )
    width: int | None = _flag(
        "network",
        None,
        "Channels (or units) of its first layer (default: that of its paper).",
        ge=1,
        le=MOST_WIDTH,
    )
    epochs: int = _flag("training", 120, "Passes over the training split.", ge=1, le=10**6)
    lr: float = _flag("training", 0.1, "Highest learning rate.", gt=0)
    schedule: Annotated[str, _of(TRAINING_SCHEDULES)] = _flag(
        "training", "step", "Learning-rate schedule."
    )
    batch: int = _flag(
        "training", 128, "Images per step; with --dp, the expected number.", ge=1, le=MOST_COUNT
    )
    precision: Annotated[str, _of(PRECISIONS)] = _flag(
        "training", "float32", "Floating-point precision; bfloat16 is for accelerators."
    )
    seed: int = _flag(
        "training",
        0,
        "Seed of the initial parameters, the order of the images and the augmentation.",
        ge=0,
        le=MOST_SEED,
    )
    dp: bool = _flag("privacy", False, "Whether to train with DP-SGD.")
    noise_multiplier: float | None = _flag(
        "privacy", None, "Standard deviation of the noise of DP-SGD, in units of --clip.", ge=0
    )
    target_epsilon: float | None = _flag(
        "privacy",
        None,
        "Choose the least noise that keeps epsilon below this, in place of --noise-multiplier.",
        gt=0,
    )
    clip: float = _flag("privacy", 1.0, "Largest L2 norm of each example's gradient.", gt=0)
    delta: float | None = _flag(
        "privacy",
        None,
        "Target delta; epsilon is reported at this delta (required with --dp).",
        gt=0,
        lt=1,
    )
    accountant: Annotated[str, _of(ACCOUNTANTS)] = _flag(
        "privacy", "pld", "How --target-epsilon is accounted for: pld (tight) or rdp."
    )
    microbatch: int | None = _flag(
        "privacy",
        None,
        "Examples whose gradients are in memory at once (default: 8 on a CPU, else 128).",
        ge=1,
        le=MOST_COUNT,
    )
    stop_at: tuple[Annotated[Stop, BeforeValidator(_stop)], ...] = _flag(
        "output",
        (),
        "Keep a checkpoint at each of these too: epoch:2 step:500 accuracy:0.5.",
        "WHEN",
    )
    storage: Annotated[str, _of(PRECISIONS)] = _flag(
        "output", "float32", "Precision of the checkpoint's variables: bfloat16 halves its size."
    )
    out: FilePath | None = _flag(
        "output",
        None,
        "Name in checkpoints/, or a path (default: MODEL-wWIDTH-DATASET).",
        "NAME|DIR",
    )


def _ranges(texts: Any) -> Any:
    """Reads `tv=1e-5:1e-1` and more of them."""
    ranges = {}
    for text in texts:
        name, _, ends = text.partition("=")
        low, _, high = ends.partition(":")
        if name in RENAMED:
            raise ValueError(f"'{name}' is now '{RENAMED[name]}'")
        if name in ranges:
            raise ValueError(f"'{name}' has two ranges; give one")
        _check_plain(ends)
        try:
            ranges[name] = (float(low), float(high))
        except ValueError:
            ranges[name] = (0.0, 0.0)
        if name not in SEARCHABLE or not 0 < ranges[name][0] < ranges[name][1] < math.inf:
            known = ", ".join(SEARCHABLE)
            raise ValueError(f"give such as tv=1e-5:1e-1, both above 0; names are {known}")
        for end in ranges[name]:
            _check_float(end)
    return ranges


class Search(_Strict):
    """What `jaxinv.search` is asked for beside one cell and a plan. Each field is a flag."""

    space: Annotated[dict[str, tuple[float, float]], BeforeValidator(_ranges)] = _flag(
        "search",
        ("tv=1e-5:1e-1",),
        "Ranges to search, evenly in the logarithm, such as tv=1e-5:1e-1 lr=0.01:1.",
        "NAME=LOW:HIGH",
        min_length=1,
        validate_default=True,
    )
    candidates: int = _flag("search", 64, "Settings tried on the first rung.", ge=1, le=2**16)
    rungs: int = _flag(
        "search",
        3,
        "Rounds, each with a quarter of the candidates and four times the steps.",
        ge=1,
        le=10,
    )
    criterion: Literal["objective", "psnr"] = _flag(
        "search", "objective", "What chooses the best: the attack's own objective, or PSNR."
    )
    draw: Literal["sobol", "random"] = _flag("search", "sobol", "How the candidates are drawn.")
    seed: int = _flag("search", 0, "Seed for drawing the candidates.", ge=0, le=MOST_SEED)


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


class Workers(_Strict):
    """Where the cells of a sweep are computed. Each field is a flag."""

    executor: Annotated[str, _of(("local",), EXECUTORS)] = _flag(
        "machines",
        "local",
        "Where cells run: one after another on this machine (local), or in "
        "parallel on a Ray or Slurm cluster.",
    )
    resources: Annotated[dict[str, int | float | str], BeforeValidator(_amounts)] = _flag(
        "machines",
        {},
        "What each cell needs there, such as num_gpus=1 (ray) or gpus_per_node=1 (slurm).",
        "NAME=AMOUNT",
    )


class Text(_Strict):
    """What a sweep file says of itself."""

    question: str = "A grid given by flags."
    cost: str = ""
    expectation: str = ""


class Tables(_Strict):
    """The settings in a sweep file, and those of its presets that replace them."""

    run: dict[str, Any] = {}
    grid: dict[str, Any] = {}
    vary: list[dict[str, Any]] | None = Field(None, min_length=1)


class SweepFile(Text, Tables):
    """All that a sweep file may hold; Plan and Cell say what its settings may be."""

    preset: dict[str, Tables] = {}


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


@dataclass(frozen=True)
class SearchStudy:
    """A validated search: what is tried, around which cell, on what."""

    search: Search
    cell: Cell
    plan: Plan

    @property
    def folder(self) -> Path:
        """The search's folder."""
        return Path(self.plan.out or "runs/search")


class Inverting(_Strict):
    """What `jaxinv.invert` is asked for beside the settings of one cell. Each field is a flag."""

    update: FilePath = _flag(
        "update",
        ...,
        "The shared update: an .npz or .safetensors file, or a folder of Orbax (docs/updates.md).",
        "FILE|DIR",
    )
    update_kind: Annotated[str, _of((AUTO, *KINDS))] = _flag(
        "update", AUTO, "What was sent; auto tells from the numbers what can be told."
    )
    client_lr: float | None = _flag(
        "update", None, "The client's learning rate, where it is known.", gt=0
    )
    classes: Annotated[
        tuple[Annotated[int, Field(ge=0, le=MOST_COUNT)], ...] | None, BeforeValidator(_split)
    ] = _flag(
        "update",
        None,
        "Classes of the images, where they are known, such as 3,5.",
        "CLASS,CLASS,...",
        min_length=1,
    )
    data_dir: FilePath | None = _DATA_DIR
    seeds: int = _flag("attack", 32, "Random initial images.", ge=1, le=10**6)
    memory: float | None = _MEMORY
    out: FilePath = _flag("output", "runs/inversion", "Folder of the pictures and arrays.", "DIR")


class Auditing(_Strict):
    """What `jaxinv.audit` is asked for. Each field is a flag."""

    victim: FilePath = _flag(
        "network",
        ...,
        "Network that the client received: a checkpoint's name or folder.",
        "NAME|DIR",
    )
    ids: Annotated[
        tuple[Annotated[int, Field(ge=0, le=MOST_COUNT)], ...], BeforeValidator(_split)
    ] = _flag(
        "data",
        ...,
        "The client's images, by their position in the data set, such as 17,23.",
        "ID,ID,...",
        min_length=1,
    )
    update: FilePath | None = _flag(
        "update",
        None,
        "What the client sends: an .npz or .safetensors file, or a folder of Orbax "
        "(default: it is computed).",
        "FILE|DIR",
    )
    dataset: str | None = _flag(
        "data", None, "Data set of the images (default: that of the victim).", "NAME"
    )
    split: str = _flag("data", "test", "Split of the data set.", "NAME")
    data_dir: FilePath | None = _DATA_DIR
    defense: Annotated[str, AfterValidator(_chain)] = _flag(
        "defense",
        defenses.NONE,
        "What the client does to its update, known to the attacker, such as noise:1e-2.",
        "NAME:STRENGTH,...",
    )
    client_epochs: int = _flag(
        "client", 1, "Passes of the client over its images.", ge=1, le=MOST_COUNT
    )
    client_batch: int | None = _flag(
        "client", None, "Images of a local step (default: all).", ge=1, le=MOST_COUNT
    )
    client_lr: float = _flag("client", 0.1, "Learning rate of the local steps.", gt=0)
    candidates: int = _flag(
        "attack", 2000, "Images among which those of the update are named.", ge=2, le=10**6
    )
    games: int = _flag(
        "attack", 100, "Updates like this one that give the intervals.", ge=2, le=10**6
    )
    method: Annotated[str, _of(("auto", "matched", "omp", "ridge", "slab"))] = _flag(
        "attack", "auto", "Method of identification."
    )
    image_prior: Annotated[str, _of(IMAGE_PRIORS)] = _flag(
        "second-order attack", "spectrum", "What the attacker knows of images."
    )
    quick: bool = _flag("attack", False, "Whether ceiling and reconstruction are left out.")
    seed: int = _flag("attack", 0, "Seed of the games.", ge=0, le=MOST_SEED)
    out: FilePath = _flag("output", "runs/audit", "Folder of the page and the numbers.", "DIR")
