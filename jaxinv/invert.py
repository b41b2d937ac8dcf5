"""`python -m jaxinv.invert`: attack one update, read from a file, of a network on disk.

    python -m jaxinv.invert --update update.npz --victim lenet_zhu-cifar10 --iterations 2000

The server's view: nobody knows the truth, and the seeds are ranked by how well their updates
match. Writes `reconstructions.png`, the best seeds first, and `reconstructions.npz`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from jaxinv import files
from jaxinv.client import updates
from jaxinv.data.image_prior import ImageFacts, load_prior
from jaxinv.errors import UserError, run_command
from jaxinv.inversion import ANNEALING, Inversion, invert
from jaxinv.machine import runtime
from jaxinv.reporting.figures import style
from jaxinv.reporting.figures.images import tile
from jaxinv.settings import flags, reader, schema
from jaxinv.victim import checkpoints

SHOWN = 8  # seeds in the picture


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""

    def command():
        parser = flags.FlagParser("python -m jaxinv.invert", __doc__.split("\n")[0])
        flags.add_inverting(parser)
        run(*reader.load_inverting(vars(parser.parse_args(argv))))

    return run_command(command)


def run(asked: schema.Inverting, cell: schema.Cell) -> None:
    """Attacks and writes the results.

    Raises:
      UserError: the update cannot be read or is of another network, or nothing stayed finite.
    """
    console, folder = Console(), Path(asked.out)
    victim = checkpoints.load_victim(cell.victim)
    update = updates.load(asked.update, victim.variables["params"])
    runtime.use_compilation_cache()
    runtime.use_all_cores()
    runtime.check_precision(cell.precision)
    method = cell.make_attack(len(victim.info.classes), ())
    prior = None
    if cell.has_image_prior():
        info = victim.info
        facts = ImageFacts(
            info.dataset, asked.data_dir, info.image_shape, tuple(info.mean), tuple(info.std)
        )
        prior, _ = load_prior(cell.image_prior, facts)
    with runtime.progress_bar(console) as bar:
        task = bar.add_task(f"{asked.seeds} seeds", total=cell.iterations)
        found = invert(
            victim.module, victim.variables, update,
            image_shape=victim.info.image_shape, mean=victim.info.mean, std=victim.info.std,
            labels=cell.labels if asked.classes is None else asked.classes, images=cell.images,
            seeds=asked.seeds, iterations=cell.iterations, lr=cell.lr, client_lr=cell.client_lr,
            priors={name: getattr(cell, name) for name in method.priors}, method=method,
            image_prior=prior, annealing={name: getattr(cell, name) for name in ANNEALING},
            precision=cell.precision, memory=asked.memory,
            progress=lambda steps, psnr: bar.update(task, completed=steps),
        )  # fmt: skip
    if np.isnan(found.objectives).all():
        raise UserError("--lr: no seed stayed finite; lower it, or keep --box true")
    order = np.argsort(found.objectives)  # NaN comes last
    names = [victim.info.classes[label] for label in found.labels]
    arrays = {"reconstructions": found.reconstructions, "objectives": found.objectives,
              "labels": found.labels}  # fmt: skip
    files.write_file(folder / "reconstructions.npz", lambda f: np.savez_compressed(f, **arrays))
    style.save(draw(found, order[:SHOWN]), folder / "reconstructions", ("png",))
    console.print(f"labels: {', '.join(names)}")
    console.print(f"objective: best {found.objectives[order[0]]:.3g}", end=", ")
    console.print(f"median {np.nanmedian(found.objectives):.3g} of {asked.seeds} seeds")
    console.print(f"pictures: {folder / 'reconstructions.png'}")


@style.styled
def draw(found: Inversion, seeds: np.ndarray) -> Figure:
    """Draws these seeds' reconstructions beside one another, each with its objective."""
    figure = Figure(figsize=(1.5 * len(seeds), 1.8), layout="constrained")
    for axes, seed in zip(figure.subplots(1, len(seeds), squeeze=False)[0], seeds):
        axes.imshow(tile(found.reconstructions[seed]).squeeze(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(f"{found.objectives[seed]:.2g}", fontsize=9)
        axes.set_axis_off()
    return figure


if __name__ == "__main__":
    sys.exit(main())
