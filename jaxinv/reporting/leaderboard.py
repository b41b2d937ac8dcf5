"""A study as tasks against attackers: what is attacked, and by whom.

A *task* is what the attacker is faced with: data, network, client, defense. An *attacker* is the
rest, but for what is fitted to a task: the number of its steps, where seconds are the same, and its
rate and weight of the total variation, where each task has the ones that a search found.
"""

import math
from typing import Any, NamedTuple

from jaxinv.attacks import ATTACKS
from jaxinv.reporting.study import CellSummary, StudySummary
from jaxinv.reporting.wording import percent_text, without_folders
from jaxinv.settings import schema
from jaxinv.settings.naming import CLEAR, SPOKEN, network_text, setting_text, spoken
from jaxinv.settings.schema import OF_VICTIM, Cell

OF_TASK = tuple(
    name
    for group in ("data", "network", "client", "defense")
    for name in schema.settings_of(group)
    if name != "adaptive"
)
STEPS, FITTED = "iterations", ("lr", "tv")
ERROR_BARS = "posterior"  # which change no image


class Entry(NamedTuple):
    """A cell as an attacker at a task."""

    attacker: str  # but for what is fitted
    fitted: str  # where the task has the same attacker with several weights: "tv 0.001"
    task: tuple[str, ...]  # its settings in words
    cell: CellSummary

    @property
    def mean(self) -> float:
        """Mean PSNR in dB, lowest where it is not known."""
        return -math.inf if math.isnan(self.cell.mean.mean) else self.cell.mean.mean


class Board(NamedTuple):
    """Entries by attacker and task."""

    attackers: list[str]
    tasks: list[tuple[str, ...]]
    entries: list[Entry]

    def at(self, task: tuple[str, ...], attacker: str | None = None) -> list[Entry]:
        """Whoever is at a task, or one attacker with all its weights; the highest mean first."""
        here = [e for e in self.entries if e.task == task and attacker in (None, e.attacker)]
        return sorted(here, key=lambda e: -e.mean)


def board(study: StudySummary) -> Board | None:
    """Arranges a study's cells; None where they are no grid of attackers and tasks."""
    # Of a single attacker its weights are what is compared.
    boards = (_board(study, fitted) for fitted in (FITTED, ()))
    return next((found for found in boards if found is not None), None)


def _board(study: StudySummary, fitted: tuple[str, ...]) -> Board | None:
    """The board on which some settings are fitted to each task."""
    asked = [cell.asked for cell in study.cells]
    varying = [name for name in Cell.model_fields if len({repr(a[name]) for a in asked}) > 1]
    own = [name for name in OF_TASK if name in varying and name not in (*OF_VICTIM, "victim")]
    named = any(name in varying for name in (*OF_VICTIM, "victim"))
    said = _victims(study)
    groups: dict[tuple, list[CellSummary]] = {}
    for cell in study.cells:
        words = [_words(name, cell.asked) for name in own]
        task = tuple([_network(cell, varying, said)] * named + words)
        groups.setdefault((_attacker(cell.asked, fitted), task), []).append(cell)
    if any(len({cell.asked[STEPS] for cell in cells}) > 1 for cells in groups.values()):
        return None
    entries = []
    for (attacker, task), cells in groups.items():
        apart = [name for name in fitted if len({cell.asked[name] for cell in cells}) > 1]
        for cell in cells:
            words = ", ".join(_words(name, cell.asked) for name in apart)
            entries.append(Entry(attacker, words, task, cell))
    attackers, tasks = (list(dict.fromkeys(key[i] for key in groups)) for i in (0, 1))
    distinct = len({entry[:3] for entry in entries}) == len(entries)
    if not distinct or min(len(attackers), len(tasks)) < 2:
        return None
    is_full = 3 * len(groups) > len(attackers) * len(tasks)
    return Board(attackers, tasks, entries) if is_full else None


def _attacker(asked: dict[str, Any], fitted: tuple[str, ...]) -> str:
    """An attack by its name, and what is not as usual in it, nor fitted to the task."""
    preset = dict(ATTACKS[asked["attack"]].settings)
    usual = Cell(attack=asked["attack"], **preset)
    # The rate that goes with what is moved, and how.
    rate = Cell(**preset | {name: asked[name] for name in ("optimizer", "representation")}).lr
    own = [
        _words(name, asked)
        for name in Cell.model_fields
        if name not in (*OF_TASK, STEPS, ERROR_BARS, *fitted)
        and asked[name] != getattr(usual, name)
        and not (name == "lr" and asked[name] == rate)
    ]
    return ", ".join([spoken("attack", asked["attack"]), *own])


def _victims(study: StudySummary) -> dict[str, str]:
    """What each victim is called: by its accuracy on the test split, and where that does not tell
    it from another one by its checkpoint."""
    names = {}
    for cell in study.cells:
        if (victim := cell.asked["victim"]) is not None:
            accuracy = percent_text(cell.facts["victim_accuracy"], 1)
            network = network_text(cell.asked["model"], cell.asked["width"])
            names[victim] = f"{network}, accuracy {accuracy}"
    said = list(names.values())
    return {v: w if said.count(w) == 1 else without_folders(str(v)) for v, w in names.items()}


def _network(cell: CellSummary, varying: list[str], victims: dict[str, str]) -> str:
    """The network that is attacked: a victim, or what is drawn."""
    asked = cell.asked
    if asked["victim"] is not None:
        return victims[asked["victim"]]
    draw = f", draw {asked['network_seed']}" if "network_seed" in varying else ""
    network = network_text(asked["model"], asked["width"])
    return f"{network}{draw}" + ", untrained" * ("victim" in varying)


def _words(name: str, asked: dict[str, Any]) -> str:
    """A setting, short enough for the name of a row or a column."""
    value = asked[name]
    if name == "images":
        return f"{value} image{'s' * (value > 1)}"
    if name in CLEAR or (name, value) in SPOKEN:
        return without_folders(spoken(name, value))
    return f"{name} {setting_text(value)}".replace("_", " ")
