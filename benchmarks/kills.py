"""Random kills: a command that is killed and run again, until it ends, ends in the same results.

    python -m benchmarks.kills --kills 100

Each of a sweep, a search and a training of toy size runs once undisturbed. Then it is started again
and again in a fresh folder and killed (SIGKILL) after a random time, until it ends by itself: rows
and pictures of the sweep, candidates of the search, digest of the network must be those of the
first. Snapshots are written after every call, so that most kills meet one. It ends with 1 at the
first difference.
"""

import argparse
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxinv import train
from jaxinv.engine import snapshots
from jaxinv.runs import blocks, results
from jaxinv.victim import checkpoints

COMMANDS = {
    "sweep": ["--targets", "2", "--seeds", "2", "--iterations", "60", "--tv", "0.01", "0"],
    "search": [
        *("--space", "tv=1e-4:1e-1", "--candidates", "4", "--rungs", "2"),
        *("--targets", "1", "--seeds", "1", "--iterations", "60"),
    ],
    "train": ["--model", "lenet_zhu", "--epochs", "3", "--lr", "0.02"],
}


def child(command: str, arguments: Sequence[str]) -> None:
    """Runs a command in small pieces, silently."""
    snapshots.SECONDS = train.STATE_SECONDS = 0.0
    blocks.TRIALS_PER_BLOCK = 2
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 for the rest of this process
    sys.exit(importlib.import_module(f"jaxinv.{command}").main(arguments))


def result(command: str, folder: Path) -> Any:
    """What a command came to, as bytes and numbers that can be compared."""
    if command == "train":
        return checkpoints.load_victim(folder).digest
    if command == "search":
        return (folder / "candidates.csv").read_bytes()
    run = results.read_run(folder)
    pictures = [run.images(cell) for cell in range(len(run.config["cells"]))]
    return [*run.trials.values(), *run.traces.values(), *(x for p in pictures for x in p)]


def start(context: Any, command: str, folder: Path) -> multiprocessing.Process:
    """Starts a command in a process of its own."""
    arguments = [*COMMANDS[command], "--out", str(folder)]
    process = context.Process(target=child, args=(command, arguments))
    process.start()
    return process


def kill_until_done(
    context: Any, command: str, folder: Path, seconds: float, random: np.random.Generator
) -> int:
    """Starts a command until it ends by itself; returns how often it was killed.

    Args:
      context: of the processes.
      command: its name.
      folder: of its results.
      seconds: that it takes; it is killed after a part of them.
      random: of the times.
    """
    kills = 0
    while True:
        process = start(context, command, folder)
        process.join(seconds * random.uniform())
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        elif process.exitcode == 0:
            return kills
        else:
            raise SystemExit(f"{command}: ended with {process.exitcode} after {kills} kills")


def main(argv: Sequence[str] | None = None) -> int:
    """Kills until all commands together were killed often enough; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="in all, at the least")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    asked = parser.parse_args(argv)
    context = multiprocessing.get_context("forkserver")  # which imports everything once
    context.set_forkserver_preload([f"jaxinv.{name}" for name in COMMANDS])
    random = np.random.default_rng(asked.seed)
    kills = dict.fromkeys(COMMANDS, 0)
    ends = dict.fromkeys(COMMANDS, 0)
    with tempfile.TemporaryDirectory() as place:
        whole, seconds = {}, {}
        for command in COMMANDS:
            for attempt in ("cold", "warm"):  # the second time its programs are compiled already
                folder, began = Path(place, command, attempt), time.monotonic()
                process = start(context, command, folder)
                process.join()
                if process.exitcode != 0:
                    raise SystemExit(f"{command}: ended with {process.exitcode}, undisturbed")
                seconds[command] = time.monotonic() - began
            whole[command] = result(command, folder)
        while sum(kills.values()) < asked.kills:
            command = min(kills, key=lambda name: kills[name])
            folder = Path(place, command, str(ends[command]))
            kills[command] += kill_until_done(context, command, folder, seconds[command], random)
            ends[command] += 1
            try:
                np.testing.assert_equal(result(command, folder), whole[command])
            except AssertionError as error:
                print(f"{command}: ended otherwise after kills: {error}")
                return 1
            print(f"{command}: {kills[command]} kills, {ends[command]} ends, all the same")
    print(f"{sum(kills.values())} kills, {sum(ends.values())} ends, all the same")
    return 0


if __name__ == "__main__":
    sys.exit(main())
