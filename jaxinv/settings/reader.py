"""From flags and sweep files to validated settings: the edge, and the one line of what is wrong.

A setting given several values is an axis; a grid's cells are the product of its axes. A sweep file
that asks several questions around one cell has a table [[vary]] for each, laid over its [grid]; the
study is all their cells, each once. Everything behind this file may trust what it is given.
"""

import argparse
import itertools
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from jaxinv import defenses, networks
from jaxinv.attacks import ATTACKS, CLOSED_FORM, SECOND_ORDER, unused_settings
from jaxinv.attacks.gauss_newton import STARTS
from jaxinv.attacks.gradient_matching import RATES
from jaxinv.errors import UserError
from jaxinv.settings.schema import (
    OF_VICTIM,
    VICTIMS_OWN,
    Auditing,
    Cell,
    Inverting,
    Plan,
    Search,
    SearchStudy,
    Study,
    SweepFile,
    Tables,
    Text,
    Training,
    Workers,
)
from jaxinv.victim import checkpoints

DEFAULT_STUDY = Path(__file__).parent / "default_study.toml"
# The settings of a training that mean nothing without --dp.
OF_PRIVACY = ("noise_multiplier", "target_epsilon", "clip", "delta", "accountant", "microbatch")
# What of a cell does not concern an update that is there already.
_NOT_INVERTED = {
    "dataset", "model", "width", "network_seed", "batch_norm", "grouping", "shuffled", "order",
    "statistics", "assumed_images", "assumed_batch", "assumed_lr", "polish", "posterior",
    "defense", "told",
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag per setting; their values stay text until `load_study` validates them."""
    _add_fields(parser.add_argument_group("run"), Plan)
    axes = parser.add_argument_group("settings (several values make an axis of the grid)")
    _add_fields(axes, Cell, several=tuple(Cell.model_fields))


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
    axes = {name: values for name, values in axes.items() if _varies(name, cells)}
    plan = _validate(Plan, run)
    if plan.target_ids is not None and "images" in axes:
        raise UserError(
            "--target-ids: how many targets they make differs by --images; use --targets"
        )
    name = path.stem if path else "default"
    return Study(name, text, axes, cells, plan)


def _varies(name: str, cells: Sequence[Cell]) -> bool:
    """Whether a setting tells cells apart; one that follows from the attack alone does not."""
    by_attack: dict[str, set] = {}
    for cell in cells:
        by_attack.setdefault(cell.attack, set()).add(getattr(cell, name))
    if name == "attack":
        return len(by_attack) > 1
    return any(len(values) > 1 for values in by_attack.values())


def _lay_over(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces settings; a victim and an attack stand in place of all that they say themselves."""
    replaced = set(OF_VICTIM) if "victim" in over else set()
    attacks = [name for name in _listed(over.get("attack", [])) if name in ATTACKS]
    for name in attacks:
        replaced |= set(ATTACKS[name])
    if attacks:  # nor does what none of them reads stand any longer
        replaced |= set.intersection(*map(unused_settings, attacks))
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
        if "posterior" not in given and asked.get("polish", "0") not in (0, "0"):
            asked["posterior"] = 0  # a polished image has no error bar worth its time
        cell = _with_victim(_validate(Cell, {"lr": rate} | asked))
        if unused := [name for name in given if name in unused_settings(cell.attack)]:
            raise UserError(
                f"{_flag(unused[0])}: --attack {cell.attack} does not use it; leave it out"
            )
        cells.append(cell)
        _check_cell(cells[-1])
    if len(set(cells)) < len(cells):
        raise UserError("the grid holds a cell twice; give each value of an axis once")
    return cells


def _check_cell(cell: Cell) -> None:
    """Refuses settings that do not go together.

    Raises:
      UserError: one line that names them.
    """
    networks.build(cell.model, classes=2, width=cell.width)  # refuses widths it cannot have
    images = cell.assumed_images or cell.images
    steps = cell.local().steps(cell.images)
    smoothed = cell.attack == "smoothed_bayes"
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
            cell.dp_sgd() and f"{cell.model}_gn" in networks.NETWORKS
        ),
        f"--defense {cell.defense}: of one gradient; leave --client-epochs and -batch out": (
            cell.dp_sgd() and steps > 1
        ),
        "--order: not with --told": cell.order > 0 and cell.told,
        "--polish: not with --told": cell.polish > 0 and cell.told,
        "--polish: of one set of images; leave --order out": cell.polish > 0 and cell.order > 0,
        "--order: not with --labels joint": cell.order > 0 and cell.labels == "joint",
        f"--init {cell.init}: of --attack {' and '.join(SECOND_ORDER)}; others start from noise": (
            cell.init in STARTS and cell.attack not in SECOND_ORDER
        ),
        f"--init {cell.init}: --attack {cell.attack} starts from its prior; use "
        f"{' or '.join(STARTS)}": (cell.init not in STARTS and cell.attack in SECOND_ORDER),
        f"--anneal-to {cell.anneal_to:g}: above --anneal-from {cell.anneal_from:g}; the error of "
        "the model must fall": cell.anneal_to > cell.anneal_from,
        f"--attack smoothed_bayes: of networks with ReLUs, not {cell.model}; use --attack bayes": (
            smoothed and networks.NETWORKS[cell.model].smooth
        ),
        "--attack smoothed_bayes: of one gradient; leave --client-epochs and --client-batch out": (
            smoothed and steps > 1
        ),
        "--attack smoothed_bayes: not with --labels joint": smoothed and cell.labels == "joint",
        "--attack smoothed_bayes: not with --told of DP-SGD": (
            smoothed and cell.told and cell.dp_sgd()
        ),
        "--posterior: of an image that is not polished; leave --polish or it out": (
            cell.posterior > 0 and cell.polish > 0
        ),
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
    for name in search.space:
        if name in unused_settings(grid.get("attack", ["geiping"])[0]):
            raise UserError(f"--space {name}: --attack does not use it; search another setting")
    # A prior is part of the program where its weight is not 0.
    searched = {name: low for name, (low, _) in search.space.items()}
    cell = _product(grid)[0].model_copy(update=searched)
    return SearchStudy(search, cell, _validate(Plan, of(Plan)))


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
        raise UserError("--update: the file to attack; see jaxinv.client.updates.save")
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


def add_audit_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `jaxinv.audit`."""
    _add_fields(parser, Auditing, switches=("quick",))


def load_auditing(flags: Mapping[str, Any]) -> Auditing:
    """Validates the flags of `add_audit_flags`.

    Raises:
      UserError: one line that names the setting and what it may be.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if "victim" not in given:
        raise UserError("--victim: the network that the client received; give a name or a folder")
    if "ids" not in given:
        raise UserError("--ids: the client's images; give their positions in the data set, 17,23")
    asked = _validate(Auditing, given)
    if len(asked.ids) % (asked.client_batch or 1):
        raise UserError(f"--client-batch {asked.client_batch}: does not divide the images of --ids")
    return asked


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


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag per setting of a training; `load_training` validates their values."""
    _add_fields(parser, Training, several=("stop_at",), negated=("augment",), switches=("dp",))


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
        f"{training.model}_gn": training.dp and f"{training.model}_gn" in networks.NETWORKS,
    }
    for message, holds in refused.items():
        if holds:
            raise UserError(message)


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
