"""The report of a run of many cells, with made-up rows: seconds, and where they go.

python -m benchmarks.many_cells --cells 1000 [--profile]
"""

import argparse
import cProfile
import pstats
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from synthetic_run import write_run

from jaxinv import report


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the run, reports it and prints the seconds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", type=int, default=1000, help="that differ in one number")
    parser.add_argument("--targets", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--profile", action="store_true", help="print what took longest")
    asked = parser.parse_args(argv)
    weights = np.geomspace(1e-6, 1, asked.cells).tolist()
    spread = {"seed_std": np.full(asked.cells, 0.5), "targets": asked.targets}
    with tempfile.TemporaryDirectory() as folder:
        write_run(folder, axes={"tv": weights}, seeds=asked.seeds, **spread)
        profile = cProfile.Profile()
        began, worked = time.monotonic(), time.process_time()
        if asked.profile:
            profile.enable()
        report.build(Path(folder), console=Console(quiet=True))
        profile.disable()
        seconds, worked = time.monotonic() - began, time.process_time() - worked
        size = (Path(folder) / "report.html").stat().st_size
    if asked.profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(45)
    print(
        f"{asked.cells} cells: {seconds:.1f} s, {worked:.1f} of them at work, a page of "
        f"{size / 2**20:.1f} MiB"
    )


if __name__ == "__main__":
    main()
