"""Settings: read from a sweep file and from flags, validated once, here.

A *cell* is one complete set of settings. A setting given several values is an axis; a grid's cells
are the product of its axes. A sweep file that asks several questions around one cell has a table
[[vary]] for each, laid over its [grid]; the study is all their cells, each once. Everything behind
this file may trust what it is given.
"""

import argparse
import contextlib
import itertools
import math
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from jaxinv import checkpoints, defenses, models, runtime
from jaxinv.attacks import ATTACKS, CLOSED_FORM
from jaxinv.attacks.gradient_matching import INITS, OPTIMIZERS, RATES, SCHEDULES, SIGNS, Method
from jaxinv.client import BATCH_NORM, Local
from jaxinv.data import GROUPINGS
from jaxinv.errors import UserError
from jaxinv.executors import EXECUTORS
from jaxinv.gram import GRAM, choose_rule
from jaxinv.labels import LABELS
from jaxinv.objectives import OBJECTIVES
from jaxinv.priors import PRIORS, READ_UPDATE
from jaxinv.privacy import ACCOUNTANTS
from jaxinv.training import PRECISIONS
from jaxinv.training import SCHEDULES as TRAINING_SCHEDULES

OF_VICTIM = ("model", "width", "network_seed")  # what a checkpoint says of its network
SEARCHABLE = ("lr", "client_lr", *PRIORS)  # what may differ from start to start in one program
VICTIMS_OWN = "victim"  # the defense that a victim was trained with
DEFAULT_STUDY = Path(__file__).parent / "default_study.toml"


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
    model: Annotated[str, _known(models.NETWORKS)] = Field(
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
    init: Annotated[str, _known(INITS)] = Field("normal", description="distribution of the start")
    box: bool = Field(True, description="project onto pixels in [0, 1] after each step")
    iterations: int = Field(500, ge=1, description="steps of the attack")
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

    def method(self, classes: int, classifier: tuple[str, ...]) -> Method:
        """The part that shapes the compiled program.

        Args:
          classes: of the data.
          classifier: path of the network's last dense layer; () where nothing asks for it.
        """
        local = Local(self.client_epochs, self.assumed_batch or self.client_batch)
        images = self.assumed_images or self.images
        told = self.told_names()
        whole = local.steps(images) > 1 or READ_UPDATE & set(self.priors()) or told
        fields = ("objective", "optimizer", "sign", "schedule", "init", "box", "batch_norm")
        return Method(
            **{name: getattr(self, name) for name in fields},
            priors=self.priors(),
            local=local,
            by_epoch=self.order > 0,
            classes=classes if self.labels == "joint" else 0,
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


# The settings of a training that mean nothing without --dp.
OF_PRIVACY = ("noise_multiplier", "target_epsilon", "clip", "delta", "accountant", "microbatch")


class Training(_Strict):
    """What `jaxinv.train` is asked for. Each field but `augment` is a flag."""

    model: Annotated[str, _known(models.NETWORKS)] = Field("lenet_zhu", description="network")
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


def add_search_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a search, and those of a study."""
    _add_fields(parser.add_argument_group("search"), Search, several=("space",))
    add_flags(parser)


def load_search(flags: Mapping[str, Any]) -> SearchStudy:
    """Validates the flags of a search.

    Raises:
      UserError: one line that names the setting and what it may be.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    of = lambda model: {k: v for k, v in given.items() if k in model.model_fields}  # noqa: E731
    search = _validate(Search, of(Search))
    grid = of(Cell)
    for name, values in grid.items():
        if len(values) > 1 or name in search.space:
            raise UserError(f"{_flag(name)}: a search goes around one cell; search it with --space")
    # A prior is part of the program where its weight is not 0.
    searched = {name: low for name, (low, _) in search.space.items()}
    cell = _product(grid)[0].model_copy(update=searched)
    return SearchStudy(search, cell, _validate(Plan, of(Plan)))


class Inverting(_Strict):
    """What `jaxinv.invert` is asked for beside the settings of one cell. Each field is a flag."""

    update: str = Field(description="the update: an .npz, or a folder of Orbax (jaxinv.updates)")
    classes: Annotated[tuple[Annotated[int, Field(ge=0)], ...] | None, BeforeValidator(_split)] = (
        Field(None, description="the images' classes where they are known: 3,5; else --labels")
    )
    seeds: int = Field(32, ge=1, description="random starts")
    memory: float | None = Field(None, gt=0, description="GiB to take, of each accelerator")
    out: str = Field("runs/inversion", description="folder of the pictures and arrays")


# What of a cell does not concern an update that is there already.
_NOT_INVERTED = {
    "dataset", "model", "width", "network_seed", "batch_norm", "grouping", "shuffled", "order",
    "statistics", "assumed_images", "assumed_batch", "assumed_lr", "polish", "defense", "told",
}  # fmt: skip


def add_inverting_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `jaxinv.invert`."""
    _add_fields(parser.add_argument_group("update"), Inverting)
    parser_of_cell = parser.add_argument_group("settings")
    _add_fields(parser_of_cell, Cell, left_out=_NOT_INVERTED)


def load_inverting(flags: Mapping[str, Any]) -> tuple[Inverting, Cell]:
    """Validates the flags of `add_inverting_flags`.

    Raises:
      UserError: one line that names the setting and what it may be.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    of = lambda model: {k: v for k, v in given.items() if k in model.model_fields}  # noqa: E731
    if "update" not in given:
        raise UserError("--update: the file to attack; see jaxinv.updates.save")
    inverting = _validate(Inverting, of(Inverting))
    settings = of(Cell)
    if "victim" not in settings:
        raise UserError("--victim: the network that the update is of; give a name or a folder")
    classes = inverting.classes
    if classes is None:
        settings.setdefault("labels", "idlg" if settings.get("images", "1") == "1" else "counts")
        if settings["labels"] in ("known", "joint"):
            raise UserError(f"--labels {settings['labels']}: give --classes, or a rule")
    elif "labels" in settings or settings.get("images", str(len(classes))) != str(len(classes)):
        raise UserError("--classes: say the labels and their number; leave --labels, --images out")
    else:
        settings["images"] = str(len(classes))
    return inverting, _product(settings)[0]


def add_workers_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say where a sweep is computed."""
    _add_fields(parser.add_argument_group("machines"), Workers, several=("resources",))


def load_workers(flags: Mapping[str, Any]) -> Workers:
    """Validates the flags of `add_workers_flags`.

    Raises:
      UserError: one line that names the setting and what it may be.
    """
    given = {name: flags[name] for name in Workers.model_fields if flags[name] is not None}
    workers = _validate(Workers, given)
    if workers.resources and workers.executor == "local":
        raise UserError("--resources: a local run takes all this machine has; name an --executor")
    return workers


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag per setting; their values stay text until `load_study` validates them."""
    _add_fields(parser.add_argument_group("run"), Plan)
    axes = parser.add_argument_group("settings (several values make an axis of the grid)")
    _add_fields(axes, Cell, several=tuple(Cell.model_fields))


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag per setting of a training; `load_training` validates their values."""
    _add_fields(parser, Training, several=("stop_at",), negated=("augment",), switches=("dp",))


def _add_fields(
    parser,
    model: type[BaseModel],
    several: Collection[str] = (),
    negated: Collection[str] = (),
    switches: Collection[str] = (),
    left_out: Collection[str] = (),
) -> None:
    """Adds a flag per field: of one value or `several`, or one that switches it off or on."""
    for name, field in model.model_fields.items():
        if name in left_out:
            continue
        if name in negated:
            parser.add_argument(
                _flag(f"no_{name}"), dest=name, action="store_false", default=None,
                help=f"without {field.description}",
            )  # fmt: skip
        elif name in switches:
            parser.add_argument(
                _flag(name), action="store_true", default=None, help=field.description
            )
        else:
            default = "" if field.is_required() else f" (default: {field.default})"
            parser.add_argument(
                _flag(name), nargs="+" if name in several else None, metavar="VALUE",
                help=field.description + default,
            )  # fmt: skip


def load_training(flags: Mapping[str, Any]) -> Training:
    """Validates the flags of a training.

    Raises:
      UserError: one line that names the setting and what it may be.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    training = _validate(Training, given)
    _check_private(training, given)
    for stop in training.stop_at:
        if stop.kind == "epoch" and stop.value > training.epochs:
            raise UserError(f"--stop-at epoch:{stop.value:g}: there are {training.epochs} --epochs")
    return training


def _check_private(training: Training, given: Collection[str]) -> None:
    """Refuses settings of a training with DP-SGD that do not go together.

    Raises:
      UserError: one line that names them.
    """
    extra = [name for name in OF_PRIVACY if name in given]
    refused = {
        f"{_flag(extra[0]) if extra else ''}: a setting of DP-SGD; add --dp": (
            extra and not training.dp
        ),
        "--dp: say how much noise: one of --noise-multiplier and --target-epsilon": (
            training.dp and (training.noise_multiplier is None) == (training.target_epsilon is None)
        ),
        "--dp: an epsilon means nothing without its delta; give --delta, such as 1e-5": (
            training.dp and training.delta is None
        ),
        f"--dp: no example has a gradient of its own under BatchNorm; use --model "
        f"{training.model}_gn": training.dp and f"{training.model}_gn" in models.NETWORKS,
    }
    for message, holds in refused.items():
        if holds:
            raise UserError(message)


def load_study(path: Path | None, flags: Mapping[str, Any], preset: str | None = None) -> Study:
    """Reads a sweep file (None: the default study), lays the flags over it, validates all.

    Args:
      path: the file, with the tables [run], [grid] and, one or more, [[vary]].
      flags: settings by name; None where not given.
      preset: of the file's table [preset.NAME], whose run and grid replace the same settings, and
        whose vary tables all those of the file.

    Raises:
      UserError: one line that names the setting and what it may be.
    """
    source = path or DEFAULT_STUDY
    try:
        content = tomllib.loads(source.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"sweep file {source} cannot be read: {error}") from None
    file = _validate(SweepFile, content, prefix="", where=f" in {source}")
    if preset is not None and preset not in file.preset:
        known = ", ".join(file.preset) or "none"
        raise UserError(f"--preset {preset}: {source} does not have it; known: {known}")
    over = Tables() if preset is None else file.preset[preset]
    grid, run = file.grid | over.grid, file.run | over.run
    varied = over.vary or file.vary or [{}]
    text = Text(**{name: getattr(file, name) for name in Text.model_fields})
    given = {name: value for name, value in flags.items() if value is not None}
    run |= {name: value for name, value in given.items() if name in Plan.model_fields}
    if "targets" in given and "target_ids" not in given:
        run.pop("target_ids", None)
    asked = {name: value for name, value in given.items() if name in Cell.model_fields}
    if asked:  # what the file costs and expects is said of its own grid
        text = text.model_copy(update={"cost": "", "expectation": ""})
    grids = [_lay_over(_lay_over(grid, table), asked) for table in varied]
    cells = tuple(dict.fromkeys(cell for grid in grids for cell in _product(grid)))
    names = dict.fromkeys(name for grid in grids for name in grid)
    axes = {name: list(dict.fromkeys(getattr(c, name) for c in cells)) for name in names}
    axes = {name: values for name, values in axes.items() if len(values) > 1}
    plan = _validate(Plan, run)
    if plan.target_ids is not None and "images" in axes:
        raise UserError(
            "--target-ids: how many targets they make differs by --images; use --targets"
        )
    name = path.stem if path else "default"
    return Study(name, text, axes, cells, plan)


def _lay_over(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces settings; a victim and an attack stand in place of all that they say themselves."""
    replaced = set(OF_VICTIM) if "victim" in over else set()
    for name in _listed(over.get("attack", [])):
        replaced |= set(ATTACKS.get(name, ()))
    if "optimizer" in replaced | set(over):  # the rate was another one's
        replaced.add("lr")
    return {**{name: value for name, value in under.items() if name not in replaced}, **over}


def _listed(value: Any) -> list:
    """The values of an axis, or the one of a setting."""
    return value if isinstance(value, list) else [value]


def _product(grid: Mapping[str, Any]) -> list[Cell]:
    """Validates the cells of one grid, the product of its lists.

    Raises:
      UserError: one line that names the setting and what it may be.
    """
    if "victim" in grid and (named := [name for name in OF_VICTIM if name in grid]):
        raise UserError(f"--victim names the network; leave {', '.join(map(_flag, named))} out")
    lists = {name: _listed(values) for name, values in grid.items()}
    for name, values in lists.items():
        if not values:
            raise UserError(f"{_flag(name)}: an axis needs at least one value")
    products = itertools.product(*lists.values())
    cells = []
    for values in products:
        given = dict(zip(lists, values))
        asked = ATTACKS.get(given.get("attack"), {}) | given
        rate = RATES.get(asked.get("optimizer"), RATES["adam"])
        cells.append(_with_victim(_validate(Cell, {"lr": rate} | asked)))
        _check_cell(cells[-1])
    if len(set(cells)) < len(cells):
        raise UserError("the grid holds a cell twice; give each value of an axis once")
    return cells


def _check_cell(cell: Cell) -> None:
    """Refuses settings that do not go together.

    Raises:
      UserError: one line that names them.
    """
    models.build(cell.model, classes=2, width=cell.width)  # refuses widths it cannot have
    images = cell.assumed_images or cell.images
    steps = cell.local().steps(cell.images)
    refused = {
        "--labels idlg reads one label; use --images 1 or --labels known": (
            cell.labels == "idlg" and images > 1
        ),
        f"--client-batch {cell.client_batch}: does not divide --images {cell.images}": (
            cell.images % (cell.client_batch or 1)
        ),
        f"--assumed-batch {cell.assumed_batch}: does not divide the {images} images assumed": (
            images % (cell.assumed_batch or cell.client_batch or 1)
        ),
        "--assumed-images: the labels known would tell their number; use another --labels": (
            images != cell.images and cell.labels == "known"
        ),
        "--batch-norm train-shared: statistics of one step; leave --client-epochs and -batch out": (
            cell.batch_norm == "train-shared" and steps > 1
        ),
        "--statistics: --batch-norm train keeps the client's private; use eval or train-shared": (
            cell.batch_norm == "train" and cell.statistics > 0
        ),
        f"--optimizer lbfgs: needs the gradient itself, not --sign {cell.sign}; use --sign none": (
            cell.optimizer == "lbfgs" and cell.sign != "none"
        ),
        "--order: compares the client's epochs; give --client-epochs 2 or more, --shuffled true": (
            cell.order > 0 and (cell.client_epochs == 1 or not cell.shuffled)
        ),
        f"--attack {cell.attack}: of one gradient; leave --client-epochs and --client-batch out": (
            cell.attack in CLOSED_FORM and steps > 1
        ),
        "--told: there is no --defense to be told of": cell.told and not cell.chain(),
        f"--defense {cell.defense}: takes each image's own gradient, which BatchNorm does not "
        f"have; use --model {cell.model}_gn": (
            cell.dp_sgd() and f"{cell.model}_gn" in models.NETWORKS
        ),
        f"--defense {cell.defense}: of one gradient; leave --client-epochs and -batch out": (
            cell.dp_sgd() and steps > 1
        ),
        "--order: not with --told": cell.order > 0 and cell.told,
        "--polish: not with --told": cell.polish > 0 and cell.told,
        "--polish: of one set of images; leave --order out": cell.polish > 0 and cell.order > 0,
        "--order: not with --labels joint": cell.order > 0 and cell.labels == "joint",
    }
    for message, holds in refused.items():
        if holds:
            raise UserError(message)


def _with_victim(cell: Cell) -> Cell:
    """Fills in what a cell's checkpoint says of the network."""
    own = cell.defense == VICTIMS_OWN
    if cell.victim is None:
        if own:
            raise UserError("--defense victim: says what a --victim was trained with; name one")
        return cell
    info = checkpoints.read_info(checkpoints.find(cell.victim))
    known = {"model": info.model, "width": info.width, "network_seed": info.recipe["seed"]}
    if own:
        known["defense"] = defenses.NONE
        if info.privacy is not None:
            strengths = info.privacy.clip, info.privacy.noise_multiplier
            known["defense"] = defenses.spell((("dpsgd", strengths),))
    return cell.model_copy(update=known)


def _validate(model: type[BaseModel], values: Mapping[str, Any], prefix="--", where="") -> Any:
    """Validates a mapping; the first error becomes one line."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        path = first["loc"] or ("settings",)
        setting = str(path[0]) if prefix else ".".join(map(str, path))
        if first["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields)
            raise UserError(f"unknown setting '{setting}'{where}; known are {known}") from None
        message = first["msg"].removeprefix("Value error, ").lower()
        name = _flag(setting) if prefix else setting
        raise UserError(f"{name} {first['input']}: {message}{where}") from None


def _flag(setting: str) -> str:
    """The flag's spelling of a setting."""
    return f"--{setting.replace('_', '-')}"
