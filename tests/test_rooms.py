"""The rooms of the package: imports go down the floors that docs/architecture.md lists."""

import ast
import functools
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "jaxinv"


def documented_floors():
    """The numbered list of docs/architecture.md, from the ground up."""
    lines = (REPOSITORY / "docs" / "architecture.md").read_text().splitlines()
    numbered = [line for line in lines if re.match(r"\d+\. `", line)]
    return [re.findall(r"`(\w+)`", line) for line in numbered]


FLOORS = documented_floors()
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path):
    """The folder below the package that a file is in, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """The rooms that a file imports from, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *parts = name.split(".")
            if package == "jaxinv":
                # What is no room is a name that the package itself exports.
                yield parts[0] if parts and parts[0] in FLOOR_OF else "__init__"


@functools.cache
def graph():
    """What each room imports from, but itself."""
    rooms = {room: set() for room in FLOOR_OF}
    for path in PACKAGE.rglob("*.py"):
        rooms[room_of(path)] |= set(imported(path)) - {room_of(path)}
    return rooms


def test_every_room_is_on_one_floor():
    there = {room_of(path) for path in PACKAGE.rglob("*.py")}
    listed = [room for rooms in FLOORS for room in rooms]
    assert sorted(listed) == sorted(there)


@pytest.mark.parametrize("room", sorted(FLOOR_OF))
def test_no_room_imports_from_a_higher_floor(room):
    higher = {other for other in graph()[room] if FLOOR_OF[other] > FLOOR_OF[room]}
    assert not higher


def test_no_rooms_import_each_other_in_a_circle():
    rooms = graph()
    order = list(TopologicalSorter(rooms).static_order())  # raises a CycleError that names it
    assert len(order) == len(rooms)
    assert sum(map(len, rooms.values())) > 50  # the imports were seen
