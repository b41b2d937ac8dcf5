"""A run in work is kept: interrupted and taken up again it ends in the same bits."""

import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv.attacks import ATTACKS
from jaxinv.attacks.gradient_matching import Method
from jaxinv.engine import planner, snapshots, trials
from jaxinv.engine.snapshots import Snapshots
from jaxinv.settings import schema


class Killed(BaseException):
    """What nothing catches."""


@pytest.fixture
def kept(problem, tmp_path, monkeypatch):
    """Runs of 12 steps in calls of at most 5, kept after every call."""
    monkeypatch.setattr(Method, "steps_per_call", 5)
    monkeypatch.setattr(snapshots, "SECONDS", 0.0)
    return Kept(problem, tmp_path, monkeypatch)


class Kept:
    def __init__(self, problem, folder, monkeypatch):
        self.problem, self.folder, self.patch = problem, folder, monkeypatch
        self.lines, self.steps = [], []  # that the calls of the last run began with

    def run(self, *, settings="", lr=0.1, killed_in=None, progress=lambda steps, psnr: None):
        """Runs; `killed_in` the call of this number."""
        program, self.steps = trials.run_chunk, []

        class Counted:
            lower = program.lower

            def __call__(_, *arguments):
                self.steps.append(int(arguments[-5]))
                if len(self.steps) == killed_in:
                    raise Killed
                return program(*arguments)

        numbers = Method().numbers(4, {"lr": lr, "client_lr": 1.0, "tv": 0.01, "iterations": 12})
        resources = trials.Resources(
            planner.GroupPlan(1, 2, 1),
            progress=progress,
            announce=self.lines.append,
            snapshots=Snapshots(self.folder, "c0000-t0000", settings),
        )
        with self.patch.context() as patch:
            patch.setattr(trials, "run_chunk", Counted())
            problem = self.problem.problem()
            return trials.run(problem, Method(), numbers, self.problem.keys, resources)

    def files(self):
        return sorted((self.folder / snapshots.FOLDER).iterdir())


def assert_same(found, expected):
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    for mine, other in zip(found.trace, expected.trace):
        np.testing.assert_array_equal(mine, other)


def test_a_killed_run_goes_on_to_the_same_bits(kept, result):
    with pytest.raises(Killed):
        kept.run(killed_in=3)
    assert len(kept.files()) == 1
    assert kept.steps == [0, 1, 6]
    assert_same(kept.run(), result)
    assert kept.steps == [6, 7, 12]
    # The end is kept too: what follows on the attack may take as long again.
    assert_same(kept.run(), result)
    assert kept.steps == []


def test_what_was_kept_of_anything_else_is_not_taken_up(kept, problem, result):
    with pytest.raises(Killed):
        kept.run(killed_in=3)
    assert_same(kept.run(lr=0.05), problem.run(lr=0.05))
    assert kept.steps[0] == 0
    assert_same(kept.run(settings="others"), result)
    assert kept.steps[0] == 0
    assert len(kept.files()) == 3


def test_a_torn_snapshot_is_one_line_and_the_work_is_done_again(kept, result):
    with pytest.raises(Killed):
        kept.run(killed_in=3)
    for content in (b"", b"PK\3\4", kept.files()[0].read_bytes()[:-100]):
        (path,) = kept.files()
        path.write_bytes(content)
        kept.lines.clear()
        assert_same(kept.run(), result)
        assert kept.steps[0] == 0
        assert f"{path} cannot be read; what it kept is computed again" in kept.lines


def test_ctrl_c_waits_for_the_call_and_keeps_it(kept, result, monkeypatch, capsys):
    monkeypatch.setattr(snapshots, "SECONDS", 1e9)
    before = signal.getsignal(signal.SIGINT)

    def stop(steps, psnr):
        if steps == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        kept.run(progress=stop)
    assert capsys.readouterr().err == "keeping what is computed; again to stop at once\n"
    assert signal.getsignal(signal.SIGINT) is before
    assert len(kept.files()) == 1
    assert_same(kept.run(), result)
    assert kept.steps[0] == 6


def test_a_finished_block_leaves_no_snapshots(kept):
    kept.run()
    Snapshots(kept.folder, "c0001-t0000", "").clear()
    assert len(kept.files()) == 1
    Snapshots(kept.folder, "c0000-t0000", "").clear()
    assert not list(kept.folder.iterdir())


def test_every_kind_of_leaf_comes_back(tmp_path):
    tree = {
        "key": jax.random.split(jax.random.key(3), (2, 3)),
        "counts": np.int32(7),
        "double": np.array([[0.1]]),
        "single": jnp.float32([np.nan, -0.0]),
        "flag": np.array(True),
    }
    path = tmp_path / "x.npz"
    snapshots.write(path, tree)
    found = snapshots.read(path, tree, print)
    assert (found["key"] == tree.pop("key")).all()
    for name, values in tree.items():
        assert found[name].dtype == values.dtype
        assert np.asarray(found[name]).tobytes() == np.asarray(values).tobytes()


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_the_same_in_every_process(attack):
    """By its words a snapshot is found again: none may name a place in memory."""
    cell = schema.Cell(attack=attack, **ATTACKS[attack].settings)
    if cell.family().make is not None:
        assert not re.search("0x[0-9a-f]", repr(cell.make_attack(10, ("Dense_0",))))


@pytest.mark.parametrize("total", [0, 1, 2, 7, 99, 100, 101, 250, 286, 4800])
@pytest.mark.parametrize("most", [1, 2, 13, 10**9])
def test_every_point_is_measured_once_whatever_the_calls(total, most):
    every, points = trials._points_every(total), 5
    step, measured = 0, []
    for _ in range(10_000):
        stride, count = trials._next_call(step, total, points, most)
        assert 1 <= count <= points
        taken = np.minimum(step + stride * np.arange(count), total)
        measured += [t for t in taken.tolist() if t % every == 0 or t == total]
        if taken[-1] == total:
            break
        step = min(step + stride * count, total)
        assert stride * count <= max(most, 1) or most < every
    assert measured == sorted({*range(0, total, every), total})
