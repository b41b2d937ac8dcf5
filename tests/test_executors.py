"""Cells on other machines: the rows of a local run, also after a worker is killed in mid-cell."""

import concurrent.futures
import os
import re
import signal
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinv import report, sweep
from jaxinv.machine import executors
from jaxinv.runs import results
from jaxinv.settings import reader

BLOCKS = 7  # of each of two cells: a prime number of targets makes each a block
ARGUMENTS = [
    *("--model", "mlp", "--width", "8", "--targets", str(BLOCKS), "--seeds", "20"),
    *("--iterations", "2", "--tv", "0.01", "0"),
]

# Slurm's commands, for a cluster of this machine alone on which a job starts at once.
SLURM = {
    "sbatch": '( export SLURM_JOB_ID=$BASHPID; exec bash "$1" ) > /dev/null 2>&1 &\n'
    'echo "Submitted batch job $!"',
    "srun": 'shift 5; exec "$@"',  # --unbuffered --output FILE --error FILE
    "sacct": 'echo "JobID|State|NodeList"\nfor word in "$@"; do\n'
    "  [[ $word =~ ^[0-9]+$ ]] || continue\n"
    '  state=FAILED; kill -0 "$word" 2> /dev/null && state=RUNNING\n'
    '  echo "$word|$state|here"\ndone',
    "scancel": 'kill "$1"',
}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The run of one machine."""
    folder = tmp_path_factory.mktemp("runs") / "local"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "build", lambda folder, console: None)
        assert sweep.main([*ARGUMENTS, "--out", str(folder)]) == 0
    return results.read_run(folder)


def own_processes(word):
    """Processes that this one started, itself or through them, whose command line holds a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            named = word in (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(
                errors="replace"
            )
            if named and os.getpid() in ancestors(int(path.name)):
                found.append(int(path.name))
        except OSError:
            continue  # it is gone
    return sorted(found)


def ancestors(process):
    """A process's parent, its parent's parent, and so on."""
    found = []
    while process > 1:
        status = Path("/proc", str(process), "status").read_text()
        process = int(re.search(r"^PPid:\s+(\d+)$", status, re.MULTILINE).group(1))
        found.append(process)
    return found


def start_ray(ray):
    """A Ray of this machine alone, whose own start gives up after 30 seconds."""
    for _ in range(3):
        try:
            ray.init(num_cpus=1, include_dashboard=False)  # so that the cells follow one another
            return
        except Exception as error:
            ray.shutdown()
            reason = f"Ray does not start here: {error}"
    pytest.skip(reason)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the worker in /proc")
@pytest.mark.slow
def test_ray_retries_a_killed_cell_to_the_same_rows(local, tmp_path, monkeypatch, capsys):
    """The first cell's worker is killed after its first block."""
    ray, folder = pytest.importorskip("ray"), tmp_path / "run"
    monkeypatch.setattr(report, "build", lambda folder, console: None)
    # A machine may be busy with other tests.
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "600")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "100")
    over = threading.Event()

    def kill():
        """Returns how many blocks of the first cell were done."""

        def blocks():
            return len(list((folder / "trials").glob("c0000-*.parquet")))

        while not blocks():
            if over.wait(0.005):
                return 0
        os.kill(own_processes("ray::jaxinv-cell")[0], signal.SIGKILL)
        return blocks()

    start_ray(ray)
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        try:
            killing = beside.submit(kill)
            assert sweep.main([*ARGUMENTS, "--executor", "ray", "--out", str(folder)]) == 0
        finally:
            over.set()
            ray.shutdown()
    assert 0 < killing.result() < BLOCKS  # in mid-cell
    assert "its cell goes on in another" in " ".join(capsys.readouterr().out.split())
    run = results.read_run(folder)
    for name in local.trials:
        np.testing.assert_array_equal(local.trials[name], run.trials[name])
    np.testing.assert_array_equal(local.images(1).reconstructions, run.images(1).reconstructions)
    assert run.config["sessions"][-1]["device"] == local.config["sessions"][-1]["device"]


WORK = """
import os, pathlib, signal

def work(folder, answer):
    here = pathlib.Path(folder) / answer
    if not here.exists():
        here.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return answer.upper(), os.getcwd()
"""


@pytest.mark.slow  # it waits for half a minute
def test_slurm_makes_a_killed_call_again(tmp_path, monkeypatch):
    # As `jaxinv.machine.executors` imports it.
    monkeypatch.setenv("SUBMITIT_LOG_LEVEL", "NOCONFIG")
    submitit = pytest.importorskip("submitit")
    for name, script in SLURM.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "of_a_job.py").write_text(WORK)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    # Submitit asks for the state of its jobs once a minute.
    monkeypatch.setattr(submitit.slurm.slurm.SlurmJob.watcher, "_delay_s", 1)
    executor = executors.start("slurm", "of_a_job:work", {"timeout_min": 5}, tmp_path)
    lines = []
    calls = [(str(tmp_path), "a"), (str(tmp_path), "b")]
    done = executors.run(executor, calls, lambda: None, lines.append)
    assert done == [("A", os.getcwd()), ("B", os.getcwd())]
    assert len(lines) >= 2  # a busy machine may lose a call once more
    assert all(line.startswith("a worker died (job ") for line in lines)


class Lost:
    """An executor whose workers die a number of times, or whose calls fail."""

    def __init__(self, deaths, error=None):
        self.deaths, self.error, self.calls, self.cancelled = deaths, error, [], []
        self.executor = executors.Executor(
            "lost",
            self.submit,
            lambda handle: handle != "never",
            self.result,
            self.cancelled.append,
        )

    def submit(self, call):
        self.calls.append(call)
        return call[0]

    def result(self, handle):
        if self.error:
            raise self.error
        if self.calls.count((handle,)) <= self.deaths:
            raise executors.WorkerDied("gone")
        return handle.upper()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(executors, "POLL", 0.01)


def test_calls_are_made_again_as_often_as_promised():
    lost, lines = Lost(deaths=executors.RETRIES), []
    assert executors.run(lost.executor, [("a",), ("b",)], lambda: None, lines.append) == ["A", "B"]
    assert len(lines) == 2 * executors.RETRIES
    lost = Lost(deaths=executors.RETRIES + 1)
    with pytest.raises(executors.UserError, match=r"--executor lost: a worker died 4 times"):
        executors.run(lost.executor, [("a",)], lambda: None, lines.append)


def test_an_error_of_a_call_ends_the_others():
    lost = Lost(0, error=executors.UserError("--width: no"))
    with pytest.raises(executors.UserError, match="--width: no"):
        executors.run(lost.executor, [("a",), ("never",)], lambda: None, lambda line: None)
    assert lost.cancelled == ["never"]


def test_a_worker_refuses_a_precision_that_it_does_not_have(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    asked = {"model": "mlp", "width": "8", "tv": "0", "targets": "1", "seeds": "1"}
    asked |= {"precision": "tensorfloat32", "iterations": "1", "out": str(tmp_path)}
    with pytest.raises(executors.UserError, match="--precision tensorfloat32: of GPUs"):
        sweep.run_cell(reader.load_study(None, asked), 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resources", "num_gpus=1"], "name an --executor"),
        (["--executor", "dask"], "known are local, ray, slurm"),
        (["--executor", "ray", "--resources", "num_gpus"], "give such as num_gpus=1"),
        (["--executor", "ray", "--resources", "gpus=1"], "--resources: Ray says"),
        (["--executor", "slurm"], "no sbatch here"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, words, tmp_path, capsys):
    out = tmp_path / "run"
    assert sweep.main([*ARGUMENTS, *arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not out.exists()
