"""What the benchmarks attack, and the loop assembled on it as a sweep does."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinv import data
from jaxinv.attacks import ATTACKS
from jaxinv.attacks.base import Attack
from jaxinv.attacks.gradient_matching import RATES
from jaxinv.data.image_prior import ImageFacts, load_prior
from jaxinv.engine import cells, planner, trials
from jaxinv.engine.targets import SharedUpdates, seed_keys
from jaxinv.settings import schema
from jaxinv.types import Normalization, PyTree
from jaxinv.victim import untrained as victims

CLASSES = 10  # as the PyTorch references have; the tiles have fewer
SHAPE = (32, 32, 3)


class Assembled(NamedTuple):
    """All that `trials.run` is given."""

    attack: Attack
    problem: trials.Problem
    numbers: Any
    keys: jax.Array  # [target, seed]
    plan: planner.GroupPlan


def cell_of(attack: str, **settings) -> schema.Cell:
    """The cell of a named attack, with some of its settings given anew."""
    given = {**ATTACKS[attack].settings, **settings}
    rate = RATES[given.get("optimizer", "adam")]
    return schema.Cell(attack=attack, **{"lr": rate} | given)


def tiles(cell: schema.Cell, targets: int) -> cells.CellInputs:
    """The first tiles, again from the first where there are too few, on an untrained network."""
    there = data.load("tiles")
    chosen = np.arange(targets * cell.images).reshape(targets, -1) % len(there.ids)
    prior = source = None
    if cell.has_image_prior():
        facts = ImageFacts("tiles", None, SHAPE, tuple(there.mean), tuple(there.std))
        prior, source = load_prior(cell.image_prior, facts)
    return cells.CellInputs(
        untrained(cell.model, cell.width),
        Normalization.of(there.mean, there.std),
        CLASSES,
        there.images[chosen],
        there.labels[chosen],
        there.ids[chosen],
        np.zeros(targets, int),
        prior,
        source,
    )


@functools.cache
def untrained(name: str, width: int | None) -> victims.Victim:
    """The untrained network, of that name and width."""
    return victims.untrained(name, classes=CLASSES, width=width, seed=0, image_shape=SHAPE)


def assemble(
    cell: schema.Cell,
    inputs: cells.CellInputs,
    seeds: int,
    cast: Callable[[PyTree], PyTree],
    shared: SharedUpdates | None = None,
) -> Assembled:
    """Lets the clients share their updates and makes what the loop takes.

    Args:
      cell: the settings.
      inputs: what is attacked.
      seeds: of each target.
      cast: of `runtime.arithmetic`.
      shared: by the clients, where they have done so.
    """
    attack = cells.attack_of(cell, inputs)
    problem, keys = share(cell, inputs, seeds, cast, shared)
    plan = planner.first_plan(
        problem.variables["params"], *keys.shape, cell.images, attack.couples_seeds
    )
    return Assembled(attack, problem, cast(attack.numbers(seeds, cell.numbers())), keys, plan)


def share(
    cell: schema.Cell,
    inputs: cells.CellInputs,
    seeds: int,
    cast: Callable[[PyTree], PyTree],
    shared: SharedUpdates | None = None,
) -> tuple[trials.Problem, jax.Array]:
    """Lets the clients share their updates: what trials share, and keys [target, seed]."""
    if shared is None:
        shared = cells.share(cell, inputs, cast)
    problem = cells.problem_of(inputs, shared.targets, cast)
    return problem, seed_keys(inputs.ids[:, 0], range(seeds))
