"""A study as attackers against tasks: what is attacked, and by whom.

A *task* is what the attacker is faced with: data, network, client, defense. An *attacker* is the
rest, but for what is fitted to a task: the number of its steps, where seconds are the same, and its
rate and weight of the total variation, where each task has the ones that a search found.
"""

from typing import Any, NamedTuple

from jaxinv.attacks import ATTACKS
from jaxinv.reporting.study import CellSummary, StudySummary
from jaxinv.reporting.wording import without_folders
from jaxinv.settings import schema
from jaxinv.settings.naming import setting_text, spoken
from jaxinv.settings.schema import OF_VICTIM, Cell

OF_TASK = tuple(
    name
    for group in ("data", "network", "client", "defense")
    for name in schema.settings_of(group)
    if name != "adaptive"
)
FITTED = ("iterations", "lr", "tv")


class Board(NamedTuple):
    """Cells by attacker and task."""

    attackers: list[str]
    tasks: list[tuple[str, ...]]  # each its settings in words
    cells: dict[tuple[str, tuple[str, ...]], CellSummary]

    def best(self, task: tuple[str, ...]) -> str:
        """The attacker of the highest mean PSNR at a task."""
        here = {a: self.cells[a, task].mean.mean for a in self.attackers if (a, task) in self.cells}
        return max(here, key=lambda a: (here[a] == here[a], here[a]))  # NaN last


def board(study: StudySummary) -> Board | None:
    """Arranges a study's cells; None where they are no grid of attackers and tasks."""
    asked = [cell.asked for cell in study.cells]
    varying = [name for name in Cell.model_fields if len({repr(a[name]) for a in asked}) > 1]
    own = [name for name in OF_TASK if name in varying and name not in OF_VICTIM]
    named = any(name in varying for name in (*OF_VICTIM, "victim"))
    tasks = [
        tuple(
            [_network(a, varying)] * named + [_words(name, a) for name in own if name != "victim"]
        )
        for a in asked
    ]
    places = [(_attacker(a, FITTED), task) for a, task in zip(asked, tasks)]
    if len(set(places)) < len(places):  # a task has the same attacker at several weights
        places = [(_attacker(a, FITTED[:1]), task) for a, task in zip(asked, tasks)]
    cells = dict(zip(places, study.cells))
    attackers, tasks = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    grid = len(attackers) * len(tasks)
    if len(cells) < len(study.cells) or min(len(attackers), len(tasks)) < 2:
        return None
    return Board(attackers, tasks, cells) if 3 * len(cells) > grid else None


def _attacker(asked: dict[str, Any], fitted: tuple[str, ...]) -> str:
    """An attack by its name, and what is not as usual in it, nor fitted to the task."""
    preset = dict(ATTACKS[asked["attack"]].settings)
    usual = Cell(attack=asked["attack"], **preset)
    # The rate that goes with what is moved, and how.
    rate = Cell(**preset | {name: asked[name] for name in ("optimizer", "representation")}).lr
    own = [
        _words(name, asked)
        for name in Cell.model_fields
        if name not in (*OF_TASK, *fitted)
        and asked[name] != getattr(usual, name)
        and not (name == "lr" and asked[name] == rate)
    ]
    return ", ".join([spoken("attack", asked["attack"]), *own])


def _network(asked: dict[str, Any], varying: list[str]) -> str:
    """The network that is attacked: its checkpoint, or what is drawn."""
    if asked["victim"] is not None:
        return without_folders(str(asked["victim"]))
    width = "" if asked["width"] is None else f" ({asked['width']})"
    draw = f", draw {asked['network_seed']}" if "network_seed" in varying else ""
    return f"{asked['model']}{width}{draw}" + ", untrained" * ("victim" in varying)


def _words(name: str, asked: dict[str, Any]) -> str:
    """A setting, short enough for the head of a column."""
    value = asked[name]
    if name == "images":
        return f"{value} image{'s' * (value > 1)}"
    if name in ("dataset", "representation"):
        return without_folders(str(value))
    return f"{name} {setting_text(value)}".replace("_", " ")
