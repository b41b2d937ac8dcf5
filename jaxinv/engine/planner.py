"""How many trials go through the network at once: what the memory holds and the cache likes.

Targets x seeds are cut into *groups* of one size. A group is one batch of the network; the groups
of a device follow one another. The wish comes first (`first_plan`); the compiled program's own
memory analysis and, should that be wrong, the device itself then make it smaller. No result depends
on it but by rounding.
"""

import math
import os
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, Shaped

from jaxinv.errors import UserError
from jaxinv.types import PyTree

SHARE = 0.9  # of a device's memory that a program may take


class GroupPlan(NamedTuple):
    """The size of a group, and over how many devices the groups are dealt out."""

    targets_at_once: int
    seeds_at_once: int
    devices: int = 1
    whole: bool = False  # whether the seeds of a target must stay together

    def halved(self) -> "GroupPlan | None":
        """Half the seeds at once, else half the targets; None where neither can be."""
        if self.seeds_at_once > 1 and not self.whole:
            return self._replace(seeds_at_once=self.seeds_at_once // 2)
        if self.targets_at_once > 1:
            return self._replace(targets_at_once=self.targets_at_once // 2)
        return None


class Grid(NamedTuple):
    """Where each trial runs. Filler repeats the last target or seed and is dropped afterwards."""

    target: Int[np.ndarray, "group targets_at_once"]
    seed: Int[np.ndarray, "group seeds_at_once"]
    shape: tuple[int, int]  # groups along the targets, along the seeds
    trials: tuple[int, int]  # targets, seeds

    def deal(self, keys: Shaped[Array | np.ndarray, "target seed ..."]) -> Array | np.ndarray:
        """Takes [target, seed, ...] to [group, targets_at_once, seeds_at_once, ...]."""
        return keys[self.target[:, :, None], self.seed[:, None, :]]

    def gather(self, trials: Array | np.ndarray) -> np.ndarray:
        """Puts [group, targets_at_once, seeds_at_once, ...] back as [target, seed, ...]."""
        grouped = np.asarray(trials)
        rest = grouped.shape[3:]
        grouped = grouped[: math.prod(self.shape)].reshape(*self.shape, *grouped.shape[1:])
        # [target group, seed group, target, seed] -> [target group, target, seed group, seed]
        rows, columns = self.shape[0] * grouped.shape[2], self.shape[1] * grouped.shape[3]
        joined = grouped.swapaxes(1, 2).reshape(rows, columns, *rest)
        return joined[: self.trials[0], : self.trials[1]]


def first_plan(
    params: PyTree, targets: int, seeds: int, batch: int = 1, whole: bool = False
) -> GroupPlan:
    """Chooses the groups: everything at once on an accelerator, what stays in the cache on a CPU.

    On a CPU a batch that leaves the cache costs more than it saves; a few images under the same
    kernels, be they of one trial or of several, are enough to read those from memory less often.

    Args:
      params: of the network.
      targets, seeds: numbers of trials.
      batch: images of one trial.
      whole: whether the seeds of a target exchange something, and must be in one group.
    """
    devices = jax.local_device_count()
    if whole:
        on_cpu = jax.default_backend() == "cpu"
        return GroupPlan(1 if on_cpu else -(-targets // devices), seeds, devices, whole)
    if jax.default_backend() != "cpu":
        if seeds >= devices:
            return GroupPlan(targets, -(-seeds // devices), devices)
        return GroupPlan(-(-targets // (devices // seeds)), 1, devices)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    images = 8 if size < 100_000 else 4
    most = min(max(1, images // batch), -(-targets * seeds // devices))
    # The size divides the number of seeds where it can: no trial is computed for nothing.
    return GroupPlan(1, max(d for d in range(1, min(most, seeds) + 1) if seeds % d == 0), devices)


def make_grid(plan: GroupPlan, targets: int, seeds: int) -> Grid:
    """Lays targets x seeds out as groups, a multiple of the devices in number."""
    rows, columns = -(-targets // plan.targets_at_once), -(-seeds // plan.seeds_at_once)
    groups = -(-rows * columns // plan.devices) * plan.devices
    group = np.minimum(np.arange(groups), rows * columns - 1)
    target = (group // columns)[:, None] * plan.targets_at_once + np.arange(plan.targets_at_once)
    seed = (group % columns)[:, None] * plan.seeds_at_once + np.arange(plan.seeds_at_once)
    return Grid(
        np.minimum(target, targets - 1),
        np.minimum(seed, seeds - 1),
        (rows, columns),
        (targets, seeds),
    )


def memory_limit(gib: float | None) -> float:
    """Bytes that a program may take on each device: what is asked for, or most of what is there."""
    devices = jax.local_device_count()
    of_host = jax.default_backend() == "cpu"  # whose devices are cores that share one memory
    if gib is not None:
        return gib * 2**30 / (devices if of_host else 1)
    if of_host:
        return SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    statistics = jax.local_devices()[0].memory_stats() or {}
    return SHARE * statistics.get("bytes_limit", math.inf)


def program_bytes(program: jax.stages.Compiled) -> int:
    """Bytes of one device while a compiled program runs: inputs, results, what lies between."""
    sizes = program.memory_analysis()
    if sizes is None:  # a backend need not say
        return 0
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        + sizes.temp_size_in_bytes
        - sizes.alias_size_in_bytes
    )


class DoesNotFit(UserError):
    """One trial alone takes more memory than there is."""


def smaller(plan: GroupPlan, needed: float, limit: float) -> GroupPlan:
    """Halves a group until it should fit, by its memory growing as its trials do.

    Raises:
      DoesNotFit: one trial alone does not.
    """
    while needed > limit:
        half = plan.halved()
        if half is None:
            raise DoesNotFit(
                f"--memory: one trial needs {needed / 2**30:.3g} GiB of a device, "
                f"{limit / 2**30:.3g} are there; raise --memory, or take a narrower network"
            )
        needed *= group_size(half) / group_size(plan)
        plan = half
    return plan


def group_size(plan: GroupPlan) -> int:
    """Number of trials at once on a device."""
    return plan.targets_at_once * plan.seeds_at_once


def describe(plan: GroupPlan, needed: int) -> str:
    """The plan in one line."""
    return (
        f"groups of {plan.targets_at_once} x {plan.seeds_at_once} trials (targets x seeds), "
        f"{plan.devices} at a time, one a device, {needed / 2**20:.3g} MiB each"
    )
