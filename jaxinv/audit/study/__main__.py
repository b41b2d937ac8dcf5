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
from jaxinv.settings import flags

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
        parser = flags.FlagParser("python -m jaxinv.audit.study", __doc__)
        add_options(parser)
        asked = vars(parser.parse_args(argv))
        parts = asked.pop("parts")
        runtime.set_up_compiler()
        for part in parts:
            PARTS[part](scene.Options(**asked))

    return run_command(command)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the parts, and a flag for each of `scene.Options`."""
    parts = f"Tables to compute, or the figure: {', '.join(PARTS)}."
    parser.add_argument("parts", nargs="+", choices=list(PARTS), metavar="PART", help=parts)

    def several(flag, default, metavar, text, kind=str):
        shown = f"{text} (default: {' '.join(map(str, default))})"
        options = {"nargs": "+", "default": list(default), "metavar": metavar, "help": shown}
        parser.add_argument(flag, type=kind, **options)

    def one(flag, default, metavar, text, **options):
        shown = f"{text} (default: {default})"
        parser.add_argument(flag, default=default, metavar=metavar, help=shown, **options)

    several("--victims", scene.VICTIMS, "NAME", "Checkpoints, or networks as NAME:WIDTH.")
    several("--batches", scene.BATCHES, "INT", "Images of an update.", int)
    several("--defenses", scene.DEFENSES, "CHAIN", "What the clients do to their updates.")
    several("--noises", scene.NOISES, "FLOAT", "Variances, of noise and ceiling.", float)
    one("--candidates", 2000, "INT", "Images among which those of an update are named.", type=int)
    one("--shortlist", ident.MOST, "INT", "Candidates that a method sees at the most.", type=int)
    one("--games", 200, "INT", "Updates of each kind; of the ceiling, images.", type=int)
    methods = f"{{{','.join(ident.METHODS)}}}"
    one("--method", "slab", methods, "Method of identification.", choices=ident.METHODS)
    one("--out", Path("runs/audit-study"), "DIR", "Folder of the rows and the figure.", type=Path)


if __name__ == "__main__":
    sys.exit(main())
