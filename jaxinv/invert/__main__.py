"""`python -m jaxinv.invert`: attack one update, read from a file, of a network on disk.

    python -m jaxinv.invert --update update.npz --victim lenet_zhu-cifar10 --iterations 2000

The server's view: nobody knows the truth, and the seeds are ranked by how well their updates
match. Says how well that is, beside images that anyone could guess. Writes the best ones as
`reconstructions.png`, and all as `reconstructions.npz`; with `--posterior` each pixel's standard
deviation as `std.png`.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from jaxinv import files, learned
from jaxinv.attacks import CLOSED_FORM
from jaxinv.client import updates
from jaxinv.data.image_prior import ImageFacts, load_prior
from jaxinv.errors import UserError, run_command
from jaxinv.invert.attack import Inversion, invert
from jaxinv.invert.checks import annealing_of
from jaxinv.invert.verdict import SENTENCES
from jaxinv.machine import runtime
from jaxinv.networks.inspect import parameters_in_order
from jaxinv.reporting.figures import style
from jaxinv.reporting.figures.pictures import tile
from jaxinv.settings import flags, reader, requests, schema
from jaxinv.victim import checkpoints

SHOWN = 8  # seeds in the picture
PITCH, GAP = 1.5, 0.16  # inches from one seed to the next, and between them


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""

    def command():
        parser = flags.FlagParser("python -m jaxinv.invert", __doc__.split("\n")[0])
        flags.add_inverting(parser)
        run(*reader.load_inverting(vars(parser.parse_args(argv))))

    return run_command(command)


def run(asked: requests.Inverting, cell: schema.Cell) -> None:
    """Attacks and writes the results.

    Raises:
      UserError: the update cannot be read or is of another network, or nothing stayed finite.
    """
    runtime.set_up_compiler()
    runtime.use_all_cores()
    runtime.check_precision(cell.precision)
    console, folder = Console(), _folder(asked.out)
    victim = checkpoints.load_victim(cell.victim)
    update, statistics = _received(asked, cell, victim)

    def say(line):
        """Prints a line as it is, whatever a name in it holds."""
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    with runtime.progress_bar(console) as bar:
        task = bar.add_task(f"{asked.seeds} seeds", total=cell.iterations)
        found = invert(
            victim.module,
            victim.variables,
            update,
            image_shape=victim.info.image_shape,
            mean=victim.info.mean,
            std=victim.info.std,
            labels=cell.labels if asked.classes is None else asked.classes,
            images=cell.images,
            statistics=statistics,
            update_kind=asked.update_kind,
            client_lr=asked.client_lr,
            defense=cell.defense,
            seeds=asked.seeds,
            **_attacker(asked, cell, victim.info),
            polish=cell.polish,
            posterior=cell.posterior,
            precision=cell.precision,
            memory=asked.memory,
            progress=lambda steps, psnr: bar.update(task, completed=steps),
            announce=lambda plan: say(f"plan: 1 x {asked.seeds} trials in {plan}"),
        )
    if np.isnan(found.objectives).all():
        raise UserError("--lr: no seed stayed finite; lower it, or keep --box true")
    _write(folder, found, np.argsort(found.objectives)[:SHOWN])  # NaN comes last
    for line in _words(found, victim.info.classes, bool(cell.posterior)):
        say(line)
    say(f"pictures: {folder / 'reconstructions.png'}")


def _received(
    asked: requests.Inverting, cell: schema.Cell, victim: checkpoints.TrainedVictim
) -> tuple[Any, Any]:
    """Reads the update, and the statistics of the client's batch where they are sent along."""
    order = functools.partial(
        parameters_in_order, victim.module, victim.variables, victim.info.image_shape
    )
    update = updates.load(asked.update, victim.variables["params"], order)
    if cell.batch_norm == "train-shared" and "batch_stats" in victim.variables:
        return update, updates.load_statistics(asked.update, victim.variables["batch_stats"])
    return update, None


def _attacker(
    asked: requests.Inverting, cell: schema.Cell, info: checkpoints.Info
) -> dict[str, Any]:
    """The attack of a cell, as `invert` takes it: its method, and what that reads."""
    prior = None
    if cell.has_image_prior():
        facts = ImageFacts(
            info.dataset, asked.data_dir, info.image_shape, tuple(info.mean), tuple(info.std)
        )
        prior, _ = load_prior(cell.image_prior, facts)
    trained = {kind: learned.load(kind, name) for kind, name in cell.learned().items()}
    for kind, own in trained.items():
        learned.check_fits(own, kind, info.image_shape)
        if kind == "inverter":
            learned.check_learned_from(own, info.digest, cell.defense, cell.images)
    found = {
        "image_prior": prior,
        "learned": {kind: own.variables for kind, own in trained.items()},
    }
    if cell.attack in CLOSED_FORM:
        return {"method": cell.attack, **found}
    method = cell.make_attack(len(info.classes), ()).replace(defense=())
    return {
        "method": method,
        "iterations": cell.iterations,
        "lr": cell.lr if "lr" in cell.family().reads else None,
        "priors": {name: getattr(cell, name) for name in cell.priors()},
        "annealing": {name: getattr(cell, name) for name in annealing_of(method)},
        **found,
    }


def _words(found: Inversion, classes: Sequence[str], with_std: bool) -> Iterator[str]:
    """What was found, line by line."""
    for remark in found.sent.remarks:
        yield f"update: {remark}"
    yield f"labels: {', '.join(classes[label] for label in found.labels)}"
    best, median = np.nanmin(found.objectives), np.nanmedian(found.objectives)
    yield f"objective: best {best:.3g}, median {median:.3g} of {len(found.objectives)} seeds"
    yield beside(found)
    yield SENTENCES[found.verdict]
    if found.std is not None:
        yield f"standard deviation of a pixel: median {np.median(found.std):.2g} of its range"
    elif with_std:
        yield "standard deviations: one trial of them does not fit the memory"


def _write(folder: Path, found: Inversion, shown: np.ndarray) -> None:
    """Writes arrays and pictures.

    Raises:
      UserError: the folder cannot be written.
    """
    arrays = {
        "reconstructions": found.reconstructions,
        "objectives": found.objectives,
        "labels": found.labels,
        "guesses": np.array(found.guesses),
        "verdict": np.array(found.verdict),
    }
    if found.std is not None:
        arrays["std"] = found.std
    files.write_file(folder / "reconstructions.npz", lambda f: np.savez_compressed(f, **arrays))
    style.save(draw(found, shown), folder / "reconstructions", ("png",))
    if found.std is not None:
        style.save(draw_std(found), folder / "std", ("png",))


def beside(found: Inversion) -> str:
    """The objectives that the best seed's is to be compared with."""
    gray, mean, zero, truth = found.guesses
    nothing = f", of an update of zeros {zero:.3g}" if np.isfinite(zero) else ""
    return (
        f"for comparison: objective of a gray image {gray:.3g}, of the mean image {mean:.3g}"
        f"{nothing}, to be expected at the truth {truth:.1g}"
    )


@style.styled
def draw(found: Inversion, seeds: np.ndarray) -> Figure:
    """Draws these seeds' reconstructions, the best first, with the verdict above them."""
    tiles = [tile(found.reconstructions[seed]).squeeze() for seed in seeds]
    tall, wide = tiles[0].shape[:2]
    width = max(5.0, 0.32 + PITCH * len(seeds))
    sheet = style.Sheet(
        width,
        style.Heading(SENTENCES[found.verdict].split(";")[0], beside(found)),
        panels=len(seeds),
        columns=len(seeds),
        panel_height=(PITCH - GAP) * tall / wide,
        margins=style.Margins(
            left=0.16,
            right=width - 0.16 - PITCH * len(seeds) + GAP,
            bottom=0.08,
            gap=GAP,
            above=0.4,
        ),
    )
    for rank, (axes, pixels, seed) in enumerate(zip(sheet.axes, tiles, seeds)):
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
        best = "" if rank else "best\n"
        axes.set_title(f"{best}objective {found.objectives[seed]:.2g}", fontsize=8.4)
        axes.set_axis_off()
    return sheet.figure


@style.styled
def draw_std(found: Inversion) -> Figure:
    """Draws the best images beside each pixel's standard deviation, its mean over the channels."""
    figure = Figure(figsize=(5.4, 2.6), layout="constrained")
    best, spread = figure.subplots(1, 2)
    best.imshow(tile(found.best).squeeze(), cmap="gray", vmin=0, vmax=1)
    best.set_title("best seed", fontsize=9)
    shown = tile(found.std).mean(axis=-1)
    colors = spread.imshow(shown, cmap="magma", vmin=0, interpolation="none")
    spread.set_title("standard deviation", fontsize=9)
    figure.colorbar(colors, ax=spread)
    for axes in (best, spread):
        axes.set_axis_off()
    return figure


def _folder(out: str) -> Path:
    """The folder of the results, which is there or can be made.

    Raises:
      UserError: something else is in its place, or it is no path.
    """
    folder = Path(out)
    if "\0" in out or not out.strip():
        raise UserError("--out: is no path; give a folder")
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"--out {out}: {place} is a file; give a folder")
    return folder


if __name__ == "__main__":
    sys.exit(main())
