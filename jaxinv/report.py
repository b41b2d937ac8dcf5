"""The report of a run: tables, plots and one page, from the rows on disk.

    python -m jaxinv.report runs/default [--success-psnr 19]

writes into the run folder `tables/*.csv`, `plots/*.png` and `*.svg`, and `report.html`, and prints
the summary. A study that is not finished is reported as far as it got.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from jaxinv.errors import OneLineParser, UserError, run_command
from jaxinv.files import write_file
from jaxinv.reporting import defense_curves, page, tables, unknowns
from jaxinv.reporting.figures import defenses, images, intervals, posterior, seeds, spectrum
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.study import Study, interval_text, number_text, summarize
from jaxinv.runs.results import Run, read_run
from jaxinv.settings.naming import setting_text

# Dimitrov et al. 2022 (Data Leakage in Federated Averaging) count a CIFAR-100 image as recovered
# above 19 dB.
SUCCESS_PSNR = 19.0


def build(folder: Path, success_psnr: float = SUCCESS_PSNR, console: Console | None = None) -> None:
    """Writes a run's tables, plots and page, and prints its summary.

    Args:
      folder: a run folder; tables/, plots/ and report.html in it are replaced.
      success_psnr: PSNR in dB above which a trial counts as a success.
      console: where the summary goes; standard output by default.
    Raises:
      UserError: the folder is no run folder, is damaged or cannot be written to.
    """
    folder = Path(folder)
    if not math.isfinite(success_psnr):
        raise UserError(f"--success-psnr must be a finite number of dB, got {success_psnr}")
    study = summarize(_read(folder), success_psnr)
    rows = {name: make(study) for name, make in tables.TABLES.items()}
    try:
        (folder / "tables").mkdir(exist_ok=True)
        for name, table in rows.items():
            tables.write(folder / "tables" / f"{name}.csv", table)
        pictures = _draw(study, folder / "plots")
        html = page.render(study, rows, pictures).encode()
        write_file(folder / "report.html", lambda file: file.write(html))
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written there ({error})") from None
    _print(study, console or Console())


def _read(folder: Path) -> Run:
    """Reads the run; damage that the reader does not name becomes one line."""
    try:
        return read_run(folder)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: rows cannot be read ({error})") from None


def _draw(study: Study, folder: Path) -> dict[str, page.Picture]:
    """Draws every figure for the page's width, to files, and again for a phone's."""
    folder.mkdir(exist_ok=True)
    album = images.read_album(study)
    figures: dict[str, Callable[[float], Figure]] = {
        "psnr_by_step": lambda width: seeds.psnr_by_step(study, width),
        "psnr_distribution": lambda width: seeds.psnr_distribution(study, width),
        "reconstructions": lambda width: images.reconstructions(study, album, width),
        "success_rate": lambda width: intervals.success_rate(study, width),
    }
    if study.has_spread:
        figures |= {
            "pixel_statistics": lambda width: images.pixel_statistics(study, album, width),
            "best_of_k": lambda width: seeds.best_of_k(study, width),
            "variance_components": lambda width: intervals.variance_components(study, width),
        }
    if study.pairs:
        figures["paired_differences"] = lambda width: intervals.paired_differences(study, width)
    if any(len(curve.points) > 1 for curve in defense_curves.curves(study)):
        figures["defense_curves"] = lambda width: defenses.defense_curves(study, width)
    if defense_curves.private_cells(study):
        figures["trade_off"] = lambda width: defenses.trade_off(study, width)
    if unknowns.labels_found(study):
        figures["label_accuracy"] = lambda width: intervals.label_accuracy(study, width)
    if posteriors := posterior.read_posteriors(study):
        figures["posterior"] = lambda width: posterior.posterior(posteriors, width)
    if spectrum.has_spectra(study):
        figures["spectrum"] = lambda width: spectrum.spectrum(study, width)
    pictures = {}
    for name, draw in figures.items():
        wide = draw(ps.WIDE)
        ps.save(wide, folder / name)
        pictures[name] = page.Picture(
            wide=page.embed_files(folder / name),
            narrow=page.embed_figure(draw(ps.NARROW)),
        )
    return pictures


def _print(study: Study, console: Console) -> None:
    """Prints the summary table and where the rest is."""
    threshold = setting_text(float(study.cells[0].success_psnr))
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("\nPSNR in dB", overflow="fold")
    averaged = ["consensus\nbest ¼"] if study.has_starts else []
    for name in ("targets\n× seeds", "failed", "mean\n[95%]", "seed\nstd", "attacker\nbest",
                 *averaged, "oracle\nbest", f"above {threshold}\n[95%]"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    best = ["attacker_best", *(["consensus_quarter"] if averaged else []), "oracle_best"]
    for row in tables.summary(study):
        is_cell = row["cell"] != ""
        size = tables.size_text(row)
        span = interval_text(row["psnr_low"], row["psnr_high"], 1)
        mean = f"{number_text(row['psnr_mean'])}\n{span}"
        limits = interval_text(100 * row["success_low"], 100 * row["success_high"], 0)
        table.add_row(
            row["setting"],
            size,
            str(row["failed"]) if is_cell else "",
            mean.rstrip(),
            number_text(row["psnr_seed_std"]) if is_cell else "",
            *(number_text(row[f"psnr_{name}"]) if is_cell else "" for name in best),
            f"{100 * row['success_rate']:.0f}%\n{limits}".rstrip(),
        )
    console.print(table)
    for sentence in page.findings(study):
        console.print(sentence, highlight=False, markup=False)
    console.print(f"report: {study.run.folder / 'report.html'}", highlight=False, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, 2 after bad input."""

    def command() -> None:
        parser = OneLineParser(
            prog="python -m jaxinv.report", description="Report on a run folder."
        )
        parser.add_argument("folder", metavar="DIR", type=Path, help="folder that a sweep wrote")
        parser.add_argument(
            "--success-psnr",
            type=float,
            default=SUCCESS_PSNR,
            metavar="DB",
            help="a trial above this PSNR counts as a success (default: %(default)g, the "
            "threshold of Dimitrov et al. 2022)",
        )
        arguments = parser.parse_args(argv)
        build(arguments.folder, arguments.success_psnr)

    return run_command(command)


if __name__ == "__main__":
    raise SystemExit(main())
