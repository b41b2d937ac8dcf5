"""Settings: what may be asked for, and what each may be.

A *cell* is one complete set of settings. Each field of a model below is a flag, and those of `Cell`
and `Plan` are keys of a sweep file; `jaxinv.settings.reader` reads both.
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from jaxinv import defenses, networks
from jaxinv.attacks import ATTACKS, SECOND_ORDER
from jaxinv.attacks.base import Attack
from jaxinv.attacks.gauss_newton import STARTS, GaussNewton
from jaxinv.attacks.gradient_matching import INITS, OPTIMIZERS, RATES, SCHEDULES, SIGNS, Method
from jaxinv.attacks.gram import GRAM, choose_rule
from jaxinv.attacks.labels import LABELS
from jaxinv.attacks.objectives import OBJECTIVES
from jaxinv.attacks.priors import PRIORS, READ_UPDATE
from jaxinv.attacks.smoothed_gauss_newton import SmoothedGaussNewton
from jaxinv.client import BATCH_NORM, Local
from jaxinv.data import GROUPINGS
from jaxinv.data.image_prior import IMAGE_PRIORS
from jaxinv.machine import runtime
from jaxinv.machine.executors import EXECUTORS
from jaxinv.privacy.accounting import ACCOUNTANTS
from jaxinv.victim.training import PRECISIONS
from jaxinv.victim.training import SCHEDULES as TRAINING_SCHEDULES

OF_VICTIM = ("model", "width", "network_seed")  # what a checkpoint says of its network
# What may differ from seed to seed in one program.
SEARCHABLE = (
    "lr", "client_lr", *PRIORS, "anneal_from", "anneal_to", "damping", "tolerance", "inflation",
)  # fmt: skip
VICTIMS_OWN = "victim"  # the defense that a victim was trained with


def _known(table) -> AfterValidator:
    """A validator that accepts a table's names and lists them otherwise."""

    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"unknown; known are {', '.join(table)}")
        return name

    return AfterValidator(check)


def _published(width: Any) -> Any:
    """Reads the width "published": a sweep file's preset must be able to take a width back."""
    return None if width == "published" else width


def _chain(text: str) -> str:
    """Spells a chain of defenses in the one way there is."""
    return text if text == VICTIMS_OWN else defenses.spell(defenses.parse(text))


def _split(ids: Any) -> Any:
    """Reads "3,5,8", as a flag gives it."""
    return ids.split(",") if isinstance(ids, str) else ids


class _Strict(BaseModel):
    """Unknown keys are errors, values are frozen, infinities and NaN are no numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Cell(_Strict):
    """One setting of everything. Each field is a flag, a key of a sweep file, a possible axis."""

    dataset: str = Field("tiles", description="'tiles' or a tensorflow-datasets name")
    model: Annotated[str, _known(networks.NETWORKS)] = Field(
        "lenet_zhu", description="network attacked"
    )
    width: Annotated[int | None, BeforeValidator(_published)] = Field(
        None, ge=1, description="its width, or 'published'"
    )
    network_seed: int = Field(0, ge=0, description="seed of the network's initialisation")
    victim: str | None = Field(None, description="attack this checkpoint, a name or a folder")
    batch_norm: Annotated[str, _known(BATCH_NORM)] = Field(
        "eval", description="the client's BatchNorm: eval, train, or train-shared"
    )
    images: int = Field(1, ge=1, description="images per target")
    grouping: Annotated[str, _known(GROUPINGS)] = Field(
        "stored", description="which make a target: stored, distinct or repeated labels"
    )
    client_epochs: int = Field(1, ge=1, description="the client's passes over its images (FedAvg)")
    client_batch: int | None = Field(
        None, ge=1, description="images of one of its steps (default: all)"
    )
    client_lr: float = Field(1e-4, gt=0, description="its learning rate, where it takes more steps")
    shuffled: bool = Field(
        False, description="an order of its own in each epoch, unknown to the attacker"
    )
    assumed_images: int | None = Field(
        None, ge=1, description="images the attacker takes for those of the update (default: known)"
    )
    assumed_batch: int | None = Field(
        None, ge=1, description="images it takes for those of a step (default: known)"
    )
    assumed_lr: float | None = Field(
        None, gt=0, description="rate it takes for the client's (default: known)"
    )
    labels: Annotated[str, _known((*LABELS, "joint"))] = Field(
        "known", description=f"how the attacker has them: {', '.join(LABELS)}, joint (optimised)"
    )
    defense: Annotated[str, AfterValidator(_chain)] = Field(
        "none", description=f"what the client does to its update, such as clip:1,noise:1e-4 "
        f"(of {', '.join(defenses.DEFENSES)}), or 'victim': the DP-SGD it was trained with"
    )  # fmt: skip
    told: bool = Field(False, description="whether the attacker knows the defense")
    attack: Annotated[str, _known(ATTACKS)] = Field(
        "geiping", description=f"published defaults of what follows: {', '.join(ATTACKS)}"
    )
    objective: Annotated[str, _known(OBJECTIVES)] = Field("cosine", description="update distance")
    tv: float = Field(0.01, ge=0, description="weight of the total variation")
    tv_isotropic: float = Field(0.0, ge=0, description="weight of the isotropic one")
    tv_color: float = Field(0.0, ge=0, description="weight of the isotropic one with opponents")
    norm: float = Field(0.0, ge=0, description="weight of the mean square")
    statistics: float = Field(
        0.0, ge=0, description="weight of the BatchNorm statistics, shared or (eval) running"
    )
    group: float = Field(
        0.0, ge=0, description="weight of the distance to the starts' mean: couples the trials"
    )
    features: float = Field(
        0.0, ge=0, description="weight of the features before the last layer, read off the update"
    )
    order: float = Field(
        0.0, ge=0, description="weight of the distance of the epochs' images as sets (shuffled)"
    )
    optimizer: Annotated[str, _known(OPTIMIZERS)] = Field("adam", description="optimiser")
    sign: Annotated[str, _known(SIGNS)] = Field("hard", description="sign taken of the gradient")
    lr: float = Field(
        RATES["adam"], gt=0, description="learning rate; of lbfgs 1, a factor on its own step"
    )
    schedule: Annotated[str, _known(SCHEDULES)] = Field("step", description="rate's course")
    init: Annotated[str, _known((*INITS, *STARTS))] = Field(
        "normal", description=f"distribution of the start: {', '.join(INITS)}; of bayes "
        f"{' or '.join(STARTS)}, the image prior's mean or a draw from it"
    )  # fmt: skip
    box: bool = Field(True, description="project onto pixels in [0, 1] after each step")
    iterations: int = Field(500, ge=1, description="steps of the attack")
    image_prior: Annotated[str, _known(IMAGE_PRIORS)] = Field(
        "spectrum", description="what bayes knows of images: mean and power spectrum, or full "
        "covariance, of the data set's training split, or the spectrum of shipped photographs",
    )  # fmt: skip
    anneal_from: float = Field(
        100.0, gt=0, description="variance of the model error of bayes at its first step, relative "
        "to each layer's mean square",
    )  # fmt: skip
    anneal_to: float = Field(1e-6, gt=0, description="the same at its last step")
    cg_iterations: int = Field(
        80, ge=1, description="conjugate-gradient iterations of one step of bayes"
    )
    damping: float = Field(
        0.0, ge=0, description="of a step of bayes, relative to the mean diagonal of its system"
    )
    tolerance: float = Field(
        1e-3, ge=0, description="relative gain below which bayes stops, where the noise is reached"
    )
    posterior: int = Field(
        0, ge=0, description="draws that give each pixel of bayes' best image a standard deviation"
    )
    draws: int = Field(
        16, ge=2, multiple_of=2, description="images of the belief that a step of smoothed_bayes "
        "looks at, an even number",
    )  # fmt: skip
    inflation: float = Field(
        50.0, gt=0, description="entries of the update whose errors smoothed_bayes counts as one"
    )
    polish: int = Field(
        0, ge=0, description="steps of Levenberg-Marquardt afterwards, in float64 (client too)"
    )
    gram: Annotated[str, _known(GRAM)] = Field(
        "auto", description="objective without stored weight gradients: auto, on, or off"
    )
    precision: Annotated[str, _known(runtime.PRECISIONS)] = Field(
        "float32", description="of the arithmetic: float32, float64, or tensorfloat32 (GPUs)"
    )

    def local(self) -> Local:
        """What the client does."""
        return Local(self.client_epochs, self.client_batch)

    def chain(self) -> defenses.Chain:
        """The client's defense."""
        return defenses.parse(self.defense)

    def dp_sgd(self) -> bool:
        """Whether the client clips each image's gradient."""
        return "dpsgd" in defenses.names(self.chain())

    def told_names(self) -> tuple[str, ...]:
        """The defenses that the attacker knows."""
        return defenses.names(self.chain()) if self.told else ()

    def priors(self) -> tuple[str, ...]:
        """The priors that have a weight."""
        return tuple(name for name in PRIORS if getattr(self, name) > 0)

    def has_image_prior(self) -> bool:
        """Whether the attack asks what images look like."""
        return self.attack in SECOND_ORDER

    def make_attack(self, classes: int, classifier: tuple[str, ...]) -> Attack:
        """The iterative attack: the part of the settings that shapes the compiled program.

        Args:
          classes: of the data.
          classifier: path of the network's last dense layer; () where nothing asks for it.
        """
        local = Local(self.client_epochs, self.assumed_batch or self.client_batch)
        told = self.told_names()
        of_labels = classes if self.labels == "joint" else 0
        if self.attack == "smoothed_bayes":
            return SmoothedGaussNewton(
                self.objective, self.init, self.cg_iterations, self.draws, self.batch_norm, local,
                told,
            )  # fmt: skip
        if self.attack in SECOND_ORDER:
            return GaussNewton(
                self.objective, self.init, self.cg_iterations, self.batch_norm, local, of_labels,
                told,
            )  # fmt: skip
        images = self.assumed_images or self.images
        whole = local.steps(images) > 1 or READ_UPDATE & set(self.priors()) or told
        fields = ("objective", "optimizer", "sign", "schedule", "box", "batch_norm")
        return Method(
            **{name: getattr(self, name) for name in fields},
            init_from=self.init,
            priors=self.priors(),
            local=local,
            by_epoch=self.order > 0,
            classes=of_labels,
            classifier=classifier,
            defense=told,
            gram=None if whole else choose_rule(self.gram, self.objective),
        )


class Plan(_Strict):
    """What is asked of every cell: the same targets and seeds, so that cells compare in pairs."""

    targets: int = Field(4, ge=1, description="attack the first N targets of the test split")
    target_ids: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...] | None, BeforeValidator(_split)
    ] = Field(
        None, description="attack these images instead, comma-separated, in the original order"
    )
    seeds: int = Field(32, ge=1, description="random starts per target")
    noise_seeds: int = Field(
        1, ge=1, description="draws of a random defense per target, each attacked from every start"
    )
    memory: float | None = Field(
        None, gt=0, description="GiB to take, of each accelerator (default: nearly all there is)"
    )
    data_dir: str | None = Field(None, description="tensorflow-datasets folder (or TFDS_DATA_DIR)")
    out: str | None = Field(None, description="run folder; runs/NAME if not given")


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
    try:
        value = float(number) if kind == "accuracy" else int(number)
    except ValueError:
        value = -1
    if kind not in ("epoch", "step", "accuracy") or value < 0 or (kind == "accuracy" and value > 1):
        raise ValueError("give such as epoch:2, step:500 or accuracy:0.5 (at most 1)")
    return Stop(kind, value)


class Training(_Strict):
    """What `jaxinv.train` is asked for. Each field but `augment` is a flag."""

    model: Annotated[str, _known(networks.NETWORKS)] = Field("lenet_zhu", description="network")
    width: int | None = Field(None, ge=1, description="its width; the published one if not given")
    dataset: str = Field("tiles", description="'tiles' or a tensorflow-datasets name")
    epochs: int = Field(120, ge=1, description="passes over the training split")
    lr: float = Field(0.1, gt=0, description="highest learning rate")
    schedule: Annotated[str, _known(TRAINING_SCHEDULES)] = Field(
        "step", description="rate's course: step, cosine or one-cycle"
    )
    batch: int = Field(128, ge=1, description="images per step")
    augment: bool = Field(True, description="random crop and flip")
    precision: Annotated[str, _known(PRECISIONS)] = Field(
        "float32", description="of the arithmetic; bfloat16 for accelerators"
    )
    storage: Annotated[str, _known(PRECISIONS)] = Field(
        "float32", description="Precision of the checkpoint's variables: bfloat16 halves its size."
    )
    seed: int = Field(0, ge=0, description="of the initialisation, the order and the augmentation")
    dp: bool = Field(False, description="train with DP-SGD; --batch is the expected one")
    noise_multiplier: float | None = Field(
        None, ge=0, description="standard deviation of its noise, in units of --clip"
    )
    target_epsilon: float | None = Field(
        None, gt=0, description="the least noise that keeps epsilon below this, instead"
    )
    clip: float = Field(1.0, gt=0, description="L2 norm of an example's gradient, at the most")
    delta: float | None = Field(None, gt=0, lt=1, description="at which epsilon is stated")
    accountant: Annotated[str, _known(ACCOUNTANTS)] = Field(
        "pld", description="by which --target-epsilon is kept: pld (tight) or rdp"
    )
    microbatch: int | None = Field(
        None, ge=1, description="examples whose gradients are in memory at once (default: 8 on a "
        "CPU, else 128)",
    )  # fmt: skip
    stop_at: tuple[Annotated[Stop, BeforeValidator(_stop)], ...] = Field(
        (), description="keep a checkpoint at each of these too: epoch:2 step:500 accuracy:0.5"
    )
    data_dir: str | None = Field(None, description="tensorflow-datasets folder (or TFDS_DATA_DIR)")
    out: str | None = Field(None, description="name in checkpoints/, or a path; MODEL-wWIDTH-DATA")


def _ranges(texts: Any) -> Any:
    """Reads `tv=1e-5:1e-1` and more of them."""
    ranges = {}
    for text in texts:
        name, _, ends = text.partition("=")
        low, _, high = ends.partition(":")
        try:
            ranges[name] = (float(low), float(high))
        except ValueError:
            ranges[name] = (0.0, 0.0)
        if name not in SEARCHABLE or not 0 < ranges[name][0] < ranges[name][1] < math.inf:
            known = ", ".join(SEARCHABLE)
            raise ValueError(f"give such as tv=1e-5:1e-1, both above 0; names are {known}")
    return ranges


class Search(_Strict):
    """What `jaxinv.search` is asked for beside one cell and a plan. Each field is a flag."""

    space: Annotated[dict[str, tuple[float, float]], BeforeValidator(_ranges)] = Field(
        ("tv=1e-5:1e-1",), min_length=1, validate_default=True,
        description="ranges to search, evenly in the logarithm: tv=1e-5:1e-1 lr=0.01:1",
    )  # fmt: skip
    candidates: int = Field(64, ge=1, description="settings tried on the first rung")
    rungs: int = Field(3, ge=1, description="each with a quarter of the candidates, 4x the steps")
    criterion: Literal["objective", "psnr"] = Field(
        "objective", description="what chooses: the attack's own objective, or psnr"
    )
    draw: Literal["sobol", "random"] = Field("sobol", description="how candidates are drawn")
    seed: int = Field(0, ge=0, description="of that draw")


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

    executor: Annotated[str, _known(("local", *EXECUTORS))] = Field(
        "local", description="a cell after the other here; or side by side: ray, or slurm"
    )
    resources: Annotated[dict[str, int | float | str], BeforeValidator(_amounts)] = Field(
        {}, description="what a cell needs: num_gpus=1 (ray), gpus_per_node=1 (slurm)"
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
    """All that a sweep file may hold; what its settings may be is told by Plan and Cell."""

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

    update: str = Field(
        description="the update: an .npz, or a folder of Orbax (jaxinv.client.updates)"
    )
    classes: Annotated[tuple[Annotated[int, Field(ge=0)], ...] | None, BeforeValidator(_split)] = (
        Field(None, description="the images' classes where they are known: 3,5; else --labels")
    )
    seeds: int = Field(32, ge=1, description="random starts")
    memory: float | None = Field(None, gt=0, description="GiB to take, of each accelerator")
    data_dir: str | None = Field(None, description="tensorflow-datasets folder (or TFDS_DATA_DIR)")
    out: str = Field("runs/inversion", description="folder of the pictures and arrays")


class Auditing(_Strict):
    """What `jaxinv.audit` is asked for. Each field is a flag."""

    victim: str = Field(description="the network that the client received: a name or a folder")
    ids: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_split)] = Field(
        min_length=1, description="the client's images, by their position in the data set: 17,23"
    )
    update: str | None = Field(
        None, description="what it sends: an .npz, or a folder of Orbax; without, it is computed"
    )
    dataset: str | None = Field(None, description="of the images; without, the victim's own")
    split: str = Field("test", description="of the data set")
    data_dir: str | None = Field(None, description="tensorflow-datasets folder (or TFDS_DATA_DIR)")
    defense: Annotated[str, AfterValidator(_chain)] = Field(
        "none", description="what the client does to its update, known to the attacker: noise:1e-2"
    )
    client_epochs: int = Field(1, ge=1, description="passes of the client over its images")
    client_batch: int | None = Field(None, ge=1, description="images of a local step; else all")
    client_lr: float = Field(0.1, gt=0, description="rate of the local steps")
    candidates: int = Field(2000, ge=2, description="among whom the images are named")
    games: int = Field(100, ge=2, description="with batches like this one, for the intervals")
    method: Literal["auto", "matched", "omp", "ridge", "slab"] = Field(
        "auto", description="of identification"
    )
    image_prior: Annotated[str, _known(IMAGE_PRIORS)] = Field(
        "spectrum", description="what the attacker knows of images: a Gaussian prior"
    )
    quick: bool = Field(False, description="no ceiling and no reconstruction: seconds")
    seed: int = Field(0, ge=0, description="of the games")
    out: str = Field("runs/audit", description="folder of the page and the numbers")
