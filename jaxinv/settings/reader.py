"""From flags and sweep files to validated settings: the edge, and the one line of what is wrong.

A setting given several values is an axis; a grid's cells are the product of its axes. A sweep file
that asks several questions around one cell has a table [[vary]] for each, laid over its [grid]; the
study is all their cells, each once. Everything behind this file may trust what it is given.
"""

import difflib
import itertools
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from jaxinv import defenses, files
from jaxinv.attacks import ATTACKS, BEST, strongest, unused_settings
from jaxinv.client import Local
from jaxinv.errors import UserError
from jaxinv.settings.checks import (
    ONE_STEP,
    check_cell,
    check_plan,
    check_search,
    check_training,
    check_used,
    start_of_seeds,
)
from jaxinv.settings.fields import VICTIMS_OWN
from jaxinv.settings.flags import flag
from jaxinv.settings.requests import Auditing, Inverting, Search, SearchStudy, Training
from jaxinv.settings.schema import (
    MOST_SEED,
    OF_VICTIM,
    RENAMED,
    Cell,
    Plan,
    Study,
    SweepFile,
    Tables,
    Text,
    Workers,
)
from jaxinv.victim import checkpoints

Model = TypeVar("Model", bound=BaseModel)
Settings = dict[str, Any]

DEFAULT_STUDY = Path(__file__).parent / "default_study.toml"
SWEEPS = files.shipped("sweeps")
MOST_CHARACTERS = 2**16  # of a sweep file
# A key of more parts than any setting has: tomllib takes time and memory of their square.
_LONG_KEY = re.compile(r"""(?<![\w"'-])(?:[\w"'-]++[ \t]*\.[ \t]*){17}""")
MOST_CELLS = 10_000  # of a study
MOST_SHOWN = 200  # characters of a wrong value


def load_study(path: Path | None, flags: Mapping[str, Any], preset: str | None = None) -> Study:
    """Reads a sweep file (None: the default study), lays the flags over it, validates all.

    Args:
      path: the file, with the tables [run], [grid] and, one or more, [[vary]]; or the name of a
        shipped one, "noise.toml" or "sweeps/noise.toml".
      flags: settings by name; None where not given.
      preset: of the file's table [preset.NAME], whose run and grid replace the same settings, and
        whose vary tables all those of the file.

    Raises:
      UserError: one line that names the setting and what it may be.
    """
    source = DEFAULT_STUDY if path is None else _find(path)
    file = _read_file(source)
    tables = _with_preset(file, preset, source)
    asked = _given(flags, Cell)
    grids = [
        _lay_over(_lay_over(tables.grid, table), asked) for table in tables.vary or [Settings()]
    ]
    cells = _cells(grids)
    axes = _axes(grids, cells)
    plan = _plan(tables.run, _given(flags, Plan))
    check_plan(plan, cells)
    if plan.target_ids is not None and "images" in axes:
        raise UserError(
            "--target-ids cannot be combined with several values of --images, because the number "
            "of targets would differ; use --targets"
        )
    text = Text(**{name: getattr(file, name) for name in _still_said(path, bool(asked))})
    return Study(name_of(path, preset), text, axes, cells, plan)


def _still_said(path: Path | None, is_replaced: bool) -> tuple[str, ...]:
    """What a file says of itself that holds of a grid, some of whose settings may be replaced.

    What it costs and expects is said of its own grid; what the default study asks, too.
    """
    if not is_replaced:
        return tuple(Text.model_fields)
    return () if path is None else ("question",)


def name_of(path: Path | None, preset: str | None = None) -> str:
    """What a sweep is called, and its run folder: by its file, and the preset if there is one."""
    return "-".join(filter(None, (path.stem if path else "default", preset)))


def load_search(flags: Mapping[str, Any]) -> SearchStudy:
    """Validates the flags of a search.

    Raises:
      UserError: one line that names the setting and what it may be.
    """
    search = _validate(Search, _given(flags, Search))
    grid = _given(flags, Cell)
    for name, values in grid.items():
        if len(_listed(values)) > 1 or name in search.space:
            raise UserError(f"{flag(name)}: a search goes around one cell; search it with --space")
    # A prior is part of the program where its weight is not 0.
    searched = {name: low for name, (low, _) in search.space.items()}
    cell = _product(grid)[0].model_copy(update=searched)
    for name in search.space:
        if name in unused_settings(cell.attack):
            raise UserError(
                f"--space {name}: --attack {cell.attack} does not use it; search another setting"
            )
    plan = _validate(Plan, _given(flags, Plan))
    for corner in itertools.product(*search.space.values()):
        check_cell(cell.model_copy(update=dict(zip(search.space, corner))))
    check_used([grid | searched], [[cell]])
    check_search(plan, cell)
    return SearchStudy(search, cell, plan)


def load_inverting(flags: Mapping[str, Any]) -> tuple[Inverting, Cell]:
    """Validates the flags of `jaxinv.invert`.

    Raises:
      UserError: one line that names the setting and what it may be.
    """
    asked, settings = _given(flags, Inverting), _given(flags, Cell)
    if "update" not in asked:
        raise UserError(
            "--update: the file to attack; see docs/updates.md, or jaxinv.client.updates.save"
        )
    inverting = _validate(Inverting, asked)
    if "victim" not in settings:
        raise UserError("--victim: the network that the update is of; give a name or a folder")
    if settings.get("attack") == "imprint":
        raise UserError("--attack imprint: no --victim stands behind one; use jaxinv.sweep")
    classes = inverting.classes
    settings.pop("client_lr", None)  # of the update, and not of a client that is simulated
    if settings.get("defense", defenses.NONE) != defenses.NONE:
        # Of an update that is there, it is what the attacker knows: an inverter by having learned.
        own = ATTACKS.get(settings.get("attack", Cell.model_fields["attack"].default))
        reads = own.family.reads if own else {"adaptive"}
        if "adaptive" in reads:
            settings["adaptive"] = True
        elif "inverter" not in reads:
            raise UserError("--defense: this attack makes nothing of knowing it; leave it out")
    if classes is None:
        attack = ATTACKS.get(settings.get("attack"))
        if attack is None or "labels" not in attack.settings:
            one = settings.get("images", "1") == "1"
            settings.setdefault("labels", "idlg" if one else "counts")
        if settings.get("labels") == "known":
            raise UserError("--labels known: give --classes, or a rule")
    elif "labels" in settings or settings.get("images", str(len(classes))) != str(len(classes)):
        raise UserError("--classes: say the labels and their number; leave --labels, --images out")
    else:
        settings["images"] = str(len(classes))
    (cell,) = _product(settings)
    check_used([settings], [[cell]])
    for message in start_of_seeds(inverting.seeds, [cell]):
        raise UserError(message)
    return inverting, cell


def load_auditing(flags: Mapping[str, Any]) -> Auditing:
    """Validates the flags of `jaxinv.audit`.

    Raises:
      UserError: one line that names the setting and what it may be.
    """
    given = _given(flags, Auditing)
    if "victim" not in given:
        raise UserError("--victim: the network that the client received; give a name or a folder")
    if "ids" not in given:
        raise UserError("--ids: the client's images; give their positions in the data set, 17,23")
    asked = _validate(Auditing, given)
    if asked.defense == VICTIMS_OWN:
        raise UserError("--defense victim: of a sweep; spell it out, such as dpsgd:1:1")
    if len(set(asked.ids)) < len(asked.ids):
        raise UserError("--ids: give each image once")
    if asked.candidates < 2 * len(asked.ids):
        raise UserError(
            f"--candidates {asked.candidates}: an update of {len(asked.ids)} images needs "
            f"{2 * len(asked.ids)} to choose among, or more"
        )
    if len(asked.ids) % (asked.client_batch or 1):
        raise UserError(f"--client-batch {asked.client_batch}: does not divide the images of --ids")
    for name in ("bins", "amplify"):
        if name in given and asked.server == "honest":
            raise UserError(f"--{name}: of an imprint; ask for --server malicious")
    for name in ("image_prior", "judge"):
        if name in given and asked.quick:
            raise UserError(f"{flag(name)}: of what --quick leaves out; leave one of them out")
    if asked.update is None and "update_kind" in given:
        raise UserError("--update-kind: of an update in a file; give --update, or leave it out")
    chain = {name for name, _ in defenses.parse(asked.defense)}
    if asked.server == "malicious" and chain & {"dpsgd", "soteria"}:
        raise UserError(
            f"--server malicious: its imprint is not made for --defense {asked.defense}"
        )
    steps = Local(asked.client_epochs, asked.client_batch).steps(len(asked.ids))
    if "client_lr" in given and asked.update is None and steps == 1:
        raise UserError(f"--client-lr {asked.client_lr:g}: {ONE_STEP}")
    if steps > 1:
        if asked.update is not None and asked.client_lr is None:
            raise UserError(f"--client-lr: the client takes {steps} steps; give its learning rate")
        if defenses.takes_each_image(chain):
            raise UserError(f"--defense {asked.defense}: of one gradient; leave local steps out")
        if asked.server == "malicious":
            raise UserError("--server malicious: reads one gradient; leave local steps out")
    return asked


def load_workers(flags: Mapping[str, Any]) -> Workers:
    """Validates the flags that say where a sweep is computed.

    Raises:
      UserError: one line that names the setting and what it may be.
    """
    workers = _validate(Workers, _given(flags, Workers))
    if workers.resources and workers.executor == "local":
        raise UserError("--resources: a local run takes all this machine has; name an --executor")
    return workers


def load_training(flags: Mapping[str, Any]) -> Training:
    """Validates the flags of a training.

    Raises:
      UserError: one line that names the setting and what it may be.
    """
    given = _given(flags, Training)
    training = _validate(Training, given)
    check_training(training, given)
    return training


def _given(flags: Mapping[str, Any], model: type[BaseModel]) -> Settings:
    """The flags of one model that were given."""
    return {name: flags[name] for name in model.model_fields if flags.get(name) is not None}


def presets_of(path: Path) -> tuple[str, ...]:
    """Names of a sweep file's presets.

    Raises:
      UserError: it cannot be read.
    """
    return tuple(_read_file(_find(path)).preset)


def _find(path: Path) -> Path:
    """The sweep file at a path, else the shipped one of that name."""
    shipped = SWEEPS / path.name
    named = path.parent in (Path(), Path(SWEEPS.name)) and shipped.is_file()
    return shipped if named and not path.exists() else path


def _read_file(source: Path) -> SweepFile:
    """Reads a sweep file; what its settings may be is not looked at yet.

    Raises:
      UserError: it cannot be read, is too large or no TOML, or has other tables.
    """
    try:
        with source.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"more than {MOST_CHARACTERS:,} characters")
        if _LONG_KEY.search(text):
            raise RecursionError
        content = tomllib.loads(text)
    except FileNotFoundError:
        known = sorted(path.stem for path in SWEEPS.glob("*.toml"))
        near = difflib.get_close_matches(source.stem, known, 1)
        hint = f"did you mean {near[0]}.toml?" if near else f"sweeps/ has {', '.join(known)}"
        raise UserError(f"sweep file {_brief(source)}: there is no such file; {hint}") from None
    except (OSError, ValueError) as error:  # bad TOML, Unicode and numbers are ValueErrors
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"sweep file {_brief(source)} cannot be read: {reason}") from None
    except RecursionError:
        raise UserError(f"sweep file {source} cannot be read: its values nest too deeply") from None
    return _validate(SweepFile, content, prefix="", where=f" in {source}")


def _with_preset(file: SweepFile, preset: str | None, source: Path) -> Tables:
    """The file's tables, with those of the preset over them."""
    if preset is None:
        return file
    if preset not in file.preset:
        known = ", ".join(file.preset) or "none"
        raise UserError(f"--preset {preset}: {source} does not have it; known: {known}")
    over = file.preset[preset]
    return Tables(run=file.run | over.run, grid=file.grid | over.grid, vary=over.vary or file.vary)


def _plan(run: Settings, asked: Settings) -> Plan:
    """Lays the flags over a file's [run]; of --targets and --target-ids one replaces the other."""
    if {"targets", "target_ids"} & set(asked):
        run = {name: value for name, value in run.items() if name not in ("targets", "target_ids")}
    return _validate(Plan, run | asked)


def _cells(grids: Sequence[Settings]) -> tuple[Cell, ...]:
    """The cells of all grids in order, each once."""
    count = sum(math.prod(len(_listed(values)) for values in grid.values()) for grid in grids)
    if count > MOST_CELLS:
        raise UserError(f"the study has {count:,} cells; {MOST_CELLS:,} at most: give fewer values")
    made = [_product(grid) for grid in grids]
    check_used(grids, made)
    return tuple(dict.fromkeys(cell for cells in made for cell in cells))


def _axes(grids: Iterable[Settings], cells: Sequence[Cell]) -> dict[str, list]:
    """The settings that vary between cells, with their values."""
    names = dict.fromkeys(name for grid in grids for name in grid)
    return {
        name: list(dict.fromkeys(getattr(cell, name) for cell in cells))
        for name in names
        if _varies(name, cells)
    }


def _varies(name: str, cells: Sequence[Cell]) -> bool:
    """Whether a setting tells cells apart; one that follows from the attack alone does not."""
    by_attack: dict[str, set] = {}
    for cell in cells:
        by_attack.setdefault(cell.attack, set()).add(getattr(cell, name))
    if name == "attack":
        return len(by_attack) > 1
    return any(len(values) > 1 for values in by_attack.values())


RATE_OF = ("optimizer", "representation")  # with what a rate goes


def _lay_over(under: Settings, over: Settings) -> Settings:
    """Replaces settings; a victim and an attack stand in place of all that they say themselves."""
    replaced = set(OF_VICTIM) if "victim" in over else set()
    attacks = [name for name in _listed(over.get("attack", [])) if _preset(name) is not None]
    for name in attacks:
        replaced |= set(ATTACKS[name].settings)
    if BEST in _listed(over.get("attack", [])):  # whichever that is: it brings all its own
        replaced |= frozenset().union(*(named.family.reads for named in ATTACKS.values()))
    if attacks:  # nor does what none of them reads stand any longer
        replaced |= set.intersection(*map(unused_settings, attacks))
    if any(name in replaced or _is_another(name, under, over) for name in RATE_OF):
        replaced.add("lr")  # the rate was another one's
    return {name: value for name, value in under.items() if name not in replaced} | over


def _is_another(name: str, under: Settings, over: Settings) -> bool:
    """Whether a setting, or some value of its axis, takes the place of another value."""
    usual = (_preset(under.get("attack")) or {}).get(name, Cell.model_fields[name].default)
    before = _listed(under.get(name, usual))
    return name in over and any(value not in before for value in _listed(over[name]))


def _preset(attack: Any) -> Settings | None:
    """The settings that an attack is a name for; None where there is no such attack."""
    named = ATTACKS.get(attack) if isinstance(attack, str) else None
    return named and dict(named.settings)


def _listed(value: Any) -> list:
    """The values of an axis, or the one of a setting."""
    return value if isinstance(value, list) else [value]


def _product(grid: Settings) -> list[Cell]:
    """Validates the cells of one grid, the product of its lists.

    Raises:
      UserError: one line that names the setting and what it may be.
    """
    if "victim" in grid and (named := [name for name in OF_VICTIM if name in grid]):
        raise UserError(f"--victim names the network; leave {', '.join(map(flag, named))} out")
    lists = {name: _listed(values) for name, values in grid.items()}
    for name, values in lists.items():
        if not values:
            raise UserError(f"{flag(name)}: an axis needs at least one value")
    cells = [_cell(dict(zip(lists, values))) for values in itertools.product(*lists.values())]
    if len(set(cells)) < len(cells):
        raise UserError("the grid holds a cell twice; give each value of an axis once")
    return cells


# What `--attack best` looks at.
OF_TASK = (
    *(*OF_VICTIM, "victim", "server", "images", "client_epochs", "client_batch", "defense"),
    *("adaptive", "labels", "assumed_images", "assumed_batch"),
)


def _cell(given: Settings) -> Cell:
    """Validates one cell: its attack's settings, and what was given over them."""
    if given.get("attack") == BEST:
        chosen = _strongest({k: v for k, v in given.items() if k in OF_TASK})
        given = chosen | given | {"attack": chosen["attack"]}
    asked = (_preset(given.get("attack")) or {}) | given
    if "posterior" not in given and asked.get("polish", "0") not in (0, "0"):
        asked["posterior"] = 0  # a polished image has no error bar worth its time
    cell = _with_victim(_validate(Cell, asked))
    for name in given:
        if name in unused_settings(cell.attack):
            raise UserError(f"{flag(name)}: --attack {cell.attack} does not use it; leave it out")
    check_cell(cell)
    return cell


def _strongest(given: Settings) -> Settings:
    """The settings of the attack that has won where these of `OF_TASK` are given."""
    task = _with_victim(_validate(Cell, given))
    imprinted = task.server == "malicious"
    alone = task.images == task.assumed().images == 1
    return strongest(
        kinked=task.has_kinks(),
        trained=task.victim is not None,
        imprinted=imprinted,
        patched=task.model == "vit" and alone and not imprinted and not task.chain(),
        adaptive=task.adaptive,
        asks=task.asks(),
    )


def _with_victim(cell: Cell) -> Cell:
    """Fills in what a cell's checkpoint says of the network."""
    own = cell.defense == VICTIMS_OWN
    if cell.victim is None:
        if own:
            raise UserError("--defense victim: says what a --victim was trained with; name one")
        return cell
    info = checkpoints.read_info(checkpoints.find(cell.victim))
    seed = info.recipe.get("seed")
    if type(seed) is not int or not 0 <= seed <= MOST_SEED:  # true is an int to Python
        raise UserError(f"--victim {cell.victim}: info.json: recipe.seed: no seed of a network")
    known = {"model": info.model, "width": info.width, "network_seed": seed}
    if own:
        known["defense"] = defenses.NONE
        if info.privacy is not None:
            strengths = info.privacy.clip, info.privacy.noise_multiplier
            known["defense"] = defenses.spell((("dpsgd", strengths),))
    return cell.model_copy(update=known)


def _validate(model: type[Model], values: Settings, prefix: str = "--", where: str = "") -> Model:
    """Validates a mapping; the first error becomes one line."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        raise UserError(message)
    setting = str(first["loc"][0]) if prefix else ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        if setting in RENAMED:
            raise UserError(f"the setting '{setting}' is now '{RENAMED[setting]}'{where}")
        known = ", ".join(model.model_fields)
        raise UserError(f"unknown setting '{_brief(setting)}'{where}; known are {known}")
    name = flag(setting) if prefix else setting
    raise UserError(f"{name} {_brief(first['input'])}: {message[0].lower()}{message[1:]}{where}")


def _brief(value: Any) -> str:
    """A value as it was given, in one short line."""
    try:
        text = str(value)
    except ValueError:  # a number of more digits than Python prints
        return "(a number of thousands of digits)"
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
