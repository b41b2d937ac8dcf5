"""The plan: groups, where each trial is in them, and what memory makes of them."""

import numpy as np
import pytest

from jaxinv.engine import planner
from jaxinv.engine.planner import GroupPlan, make_grid
from jaxinv.errors import UserError


@pytest.mark.parametrize("plan", [(1, 1, 1), (2, 3, 1), (2, 3, 4), (3, 5, 2), (1, 2, 3)])
def test_every_trial_comes_back_to_its_place(plan):
    """Groups that do not divide the trials are filled up; the filler is dropped."""
    grid = make_grid(GroupPlan(*plan), 3, 5)
    assert len(grid.target) % plan[2] == 0
    trials = 10 * np.arange(3)[:, None] + np.arange(5)
    dealt = grid.deal(trials)
    assert dealt.shape == (len(grid.target), *plan[:2])
    np.testing.assert_array_equal(grid.gather(dealt), trials)


@pytest.mark.parametrize(
    ("plan", "share", "expected"),
    [
        (GroupPlan(4, 32), 1.0, GroupPlan(4, 32)),
        (GroupPlan(4, 32, 2), 0.3, GroupPlan(4, 8, 2)),  # a quarter; a half would not do
        (GroupPlan(4, 7), 0.5, GroupPlan(4, 3)),
        (GroupPlan(4, 2), 0.3, GroupPlan(2, 1)),  # the seeds first, then the targets
        (GroupPlan(4, 2), 0.125, GroupPlan(1, 1)),
    ],
)
def test_groups_are_halved_until_they_fit(plan, share, expected):
    assert planner.smaller(plan, 1000.0, share * 1000) == expected


def test_one_trial_too_large_is_one_line():
    with pytest.raises(UserError, match=r"^--memory: one trial needs 1 GiB .* 0.9 are there"):
        planner.smaller(GroupPlan(1, 1), 2.0**30, 0.9 * 2**30)


def test_a_core_takes_few_images_at_once_and_wastes_no_trial():
    small, large = ({"kernel": np.zeros(size)} for size in (1_000, 100_000))
    assert planner.first_plan(small, 2, 32) == GroupPlan(1, 8, 4)  # the suite has four devices
    assert planner.first_plan(small, 2, 32, batch=4) == GroupPlan(1, 2, 4)
    assert planner.first_plan(large, 2, 32) == GroupPlan(1, 4, 4)
    assert planner.first_plan(large, 2, 32, batch=16) == GroupPlan(1, 1, 4)
    assert planner.first_plan(large, 1, 6) == GroupPlan(1, 2, 4)  # every device has some
    assert planner.first_plan(large, 8, 3) == GroupPlan(1, 3, 4)  # no seed is computed for nothing


@pytest.mark.parametrize(
    ("targets", "seeds", "plan"),
    [
        (8, 1, GroupPlan(2, 1, 4)),  # one seed: the targets are dealt out
        (8, 2, GroupPlan(4, 1, 4)),  # two: each on two devices
        (8, 3, GroupPlan(8, 1, 4)),
        (3, 32, GroupPlan(3, 8, 4)),
    ],
)
def test_every_accelerator_has_trials_of_its_own(monkeypatch, targets, seeds, plan):
    monkeypatch.setattr(planner.jax, "default_backend", lambda: "gpu")
    assert planner.first_plan({}, targets, seeds) == plan  # the suite has four devices


def test_the_cores_of_a_cpu_share_the_memory_asked_for():
    assert planner.memory_limit(2.0) == 2 * 2**30 / 4  # the suite has four devices
    assert planner.memory_limit(None) > planner.memory_limit(0.001)
