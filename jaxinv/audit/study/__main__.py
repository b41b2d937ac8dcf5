"""`python -m jaxinv.audit.study`: tables and figure of what updates leak, for docs/results.md.

    python -m jaxinv.audit.study noise [--victims lenet_zhu lenet_zhu-cifar10 ...] [--games 200]
    python -m jaxinv.audit.study identification methods labels harder false-alarms fishing privacy
    python -m jaxinv.audit.study capacity ceiling cost
    python -m jaxinv.audit.study figure

Each part prints its table as Markdown and keeps its rows in `OUT/PART.csv`: what is there is not
computed again. `figure` draws from the rows of `noise` and `ceiling`. A victim is a checkpoint's
name, or a network's for an untrained one: `resnet18:16` at width 16.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxinv.audit import identification as ident
from jaxinv.audit.study import bounds, costs, figure, fishing, harder, naming, privacy, scene
from jaxinv.errors import run_command
from jaxinv.machine import runtime

PARTS: dict[str, Callable[[scene.Options], None]] = {
    "identification": naming.identification,
    "noise": naming.noise,
    "methods": naming.methods,
    "labels": naming.labels,
    "harder": harder.harder,
    "false-alarms": harder.false_alarms,
    "fishing": fishing.fishing,
    "privacy": privacy.private,
    "ceiling": bounds.ceiling,
    "capacity": bounds.capacities,
    "cost": costs.cost,
    "figure": figure.figure,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Computes the parts; returns the exit code."""

    def command():
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("parts", nargs="+", choices=list(PARTS))
        parser.add_argument("--victims", nargs="+", default=list(scene.VICTIMS))
        parser.add_argument("--batches", nargs="+", type=int, default=list(scene.BATCHES))
        parser.add_argument("--defenses", nargs="+", default=list(scene.DEFENSES))
        parser.add_argument("--noises", nargs="+", type=float, default=list(scene.NOISES))
        parser.add_argument("--candidates", type=int, default=2000)
        parser.add_argument("--shortlist", type=int, default=ident.MOST)
        parser.add_argument("--games", type=int, default=200)
        parser.add_argument("--method", default="slab", choices=ident.METHODS)
        parser.add_argument("--out", type=Path, default=Path("runs/audit-study"))
        asked = vars(parser.parse_args(argv))
        parts = asked.pop("parts")
        runtime.set_up_compiler()
        for part in parts:
            PARTS[part](scene.Options(**asked))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
