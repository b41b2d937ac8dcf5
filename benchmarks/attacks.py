"""What a trial-iteration of each attack costs, under vmap over targets and seeds.

    python -m benchmarks.attacks [--attacks geiping bayes ...] [--seconds 5]

The attacks that iterate on LeNetZhu, those on the running statistics on ResNet20 (16); FedAvg by
its local steps. Whole attacks: Gauss-Newton on LeNetZhu, whose steps do not all cost the same, and
the closed forms on networks of dense layers.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.assembly import assemble, cell_of, share, tiles
from benchmarks.attack import jax_form
from benchmarks.race import race
from jaxinv.attacks import CLOSED_FORM
from jaxinv.attacks.exchanges import EXCHANGES
from jaxinv.attacks.gradient_matching import LAYERS
from jaxinv.attacks.representations import REPRESENTATIONS
from jaxinv.engine import trials
from jaxinv.engine.closed_form import Recovery, recover
from jaxinv.machine import runtime
from jaxinv.settings import schema

SIZE = (4, 8)  # targets, seeds
RESNET = {"model": "resnet20", "width": 16}
# What is timed by the step: settings beside those of the attack.
CASES = {
    "geiping": {},
    "geiping, adaptive to pruning": {"defense": "prune:0.9", "adaptive": True},
    "dlg": {},
    "euclidean": {},
    "modern": {},
    "geiping, 8 images": {"images": 8},
    "geiping, 8 images in 4 local steps": {"images": 8, "client_batch": 2},
    "geiping, 5 local epochs": {"client_epochs": 5},
    "geiping, 5 local epochs by surrogate": {"client_epochs": 5, "simulation": "surrogate"},
    **{
        f"geiping, {name}": {"representation": name} for name in REPRESENTATIONS if name != "pixels"
    },
    **{f"geiping, {name}": {"layers": name} for name in LAYERS if name != "all"},
    **{f"geiping, {name}": {"exchange": name} for name in EXCHANGES if name != "none"},
    "geiping on ResNet20": RESNET,
    "gradinversion on ResNet20": RESNET,
}
DENSE = {"model": "mlp", "width": 256, "precision": "float64"}
# What is timed as a whole.
WHOLE = {
    "bayes": {},
    "analytic": DENSE,
    "spear": DENSE | {"images": 4},
    "unmix": DENSE | {"images": 4},
}
ROUNDS = 5  # of a whole attack, at the most; the best counts


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = (*CASES, *WHOLE)
    parser.add_argument("--attacks", nargs="+", default=known, choices=known, metavar="NAME")
    parser.add_argument("--seconds", type=float, default=5, help="time per figure, about")
    arguments = parser.parse_args(argv)
    runtime.use_all_cores()
    console = Console(width=120)
    console.print(
        f"jax {jax.__version__}, {runtime.hardware()}, {SIZE[0]} targets x {SIZE[1]} seeds"
    )
    cells = {
        name: cell_of(name.split()[0].rstrip(","), **CASES.get(name, WHOLE.get(name)))
        for name in arguments.attacks
    }
    forms = [jax_form(name, cell, SIZE) for name, cell in cells.items() if name in CASES]
    out = Table("attack", "ms / trial-iteration", "temp MiB / trial", "compile s")
    for form, once in zip(forms, race(forms, arguments.seconds)):
        out.add_row(
            form.name,
            f"{1e3 * once / form.trials:.3g}",
            f"{form.memory / form.trials:.3g}",
            f"{form.compile_seconds:.1f}",
        )
    for name, cell in cells.items():
        if name in WHOLE:
            spent = time_whole(cell, arguments.seconds)
            steps = f" of {cell.iterations} steps" if name not in CLOSED_FORM else ""
            images = f", {cell.images} images" if name in CLOSED_FORM else ""
            out.add_row(f"{name}{images}, whole{steps}", f"{spent:.3g}", "", "")
    console.print(out)


def time_whole(cell: schema.Cell, seconds: float) -> float:
    """Times a whole attack after its compilation: ms a trial, the best of some rounds."""
    with runtime.arithmetic(cell.precision) as cast:
        attack = whole_attack(cell, cast)
        attack()
        best, begun = float("inf"), time.perf_counter()
        for _ in range(ROUNDS):
            started = time.perf_counter()
            attack()
            best = min(best, time.perf_counter() - started)
            if time.perf_counter() - begun > seconds:
                break
    return 1e3 * best / (SIZE[0] * SIZE[1])


def whole_attack(cell: schema.Cell, cast: Callable) -> Callable[[], trials.Result]:
    """The attack of a cell on its targets, measurements included, to be called."""
    inputs = tiles(cell, SIZE[0])
    if cell.attack in CLOSED_FORM:
        problem, keys = share(cell, inputs, SIZE[1], cast)
        recovery = Recovery(CLOSED_FORM[cell.attack].find, cell.objective, cell.batch_norm)
        return lambda: recover(problem, recovery, keys)
    made = assemble(cell, inputs, SIZE[1], cast)
    resources = trials.Resources(made.plan)
    return lambda: trials.run(made.problem, made.attack, made.numbers, made.keys, resources)


if __name__ == "__main__":
    main()
