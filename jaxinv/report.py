"""The report of a run: tables, plots and one page, from the rows on disk.

    python -m jaxinv.report runs/default [--success-psnr 19]

writes into the run folder `tables/*.csv`, `plots/*.png` and `*.svg`, and `report.html`, and prints
the summary. A study that is not finished is reported as far as it got.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from jaxinv import files
from jaxinv.errors import OneLineParser, UserError, run_command
from jaxinv.reporting import page, terminal
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.sections import SECTIONS
from jaxinv.reporting.study import StudySummary, summarize
from jaxinv.runs.results import read_run
from jaxinv.settings.fields import check_plain

# Dimitrov et al. 2022 (Data Leakage in Federated Averaging) count a CIFAR-100 image as recovered
# above 19 dB.
SUCCESS_PSNR = 19.0


def build(folder: Path, success_psnr: float = SUCCESS_PSNR, console: Console | None = None) -> None:
    """Writes a run's tables, plots and page, and prints its summary.

    Guarantees: nothing is written before all of it is made, and no file is ever there half.

    Args:
      folder: a run folder; tables, plots and report.html of an earlier report are replaced.
      success_psnr: PSNR in dB above which a trial counts as a success.
      console: where the summary goes; standard output by default.
    Raises:
      UserError: the folder is no run folder, is damaged or cannot be written to.
    """
    folder = Path(folder)
    if not math.isfinite(success_psnr):
        raise UserError(f"--success-psnr must be a finite number of dB, got {success_psnr}")
    study = summarize(read_run(folder), success_psnr)
    sections = [section for section in SECTIONS if section.when(study)]
    tables = {s.name: s.table.rows(study) for s in SECTIONS if s.table is not None}
    pictures = {s.name: draw(study, s.draw) for s in sections if s.draw is not None}
    moving = {s.name: s.animate(study) for s in sections if s.animate is not None}
    contents = {
        **{
            f"tables/{name}.csv": files.csv_bytes(rows, digits=8)
            for name, rows in tables.items()
            if rows
        },
        **{f"plots/{name}.png": picture.wide.png for name, picture in pictures.items()},
        **{f"plots/{name}.svg": picture.wide.svg for name, picture in pictures.items()},
        **{f"plots/{name}.gif": content for name, content in moving.items()},
        "report.html": page.render(study, sections, tables, pictures, moving).encode(),
    }
    places = [f"tables/{section.name}.csv" for section in SECTIONS]
    places += [f"plots/{s.name}.{kind}" for s in SECTIONS for kind in ("png", "svg", "gif")]
    outdated = [folder / place for place in places if place not in contents]
    _write({folder / place: content for place, content in contents.items()}, outdated)
    terminal.print_summary(study, tables["summary"], console or Console())


def draw(study: StudySummary, figure: Callable[[StudySummary, float], Figure]) -> page.Picture:
    """Draws a section's figure for the page's width, and again for a phone's."""
    wide, narrow = (page.Drawing(figure(study, width)) for width in (ps.WIDE, ps.NARROW))
    return page.Picture(wide, narrow)


def _write(contents: dict[Path, bytes], outdated: Iterable[Path]) -> None:
    """Writes the files, if all can be, and removes those of an earlier report that are no more."""
    for path in contents:
        if path.is_dir():
            raise UserError(f"{path} is a folder; move it away, the report is to be a file there")
        if path.parent.exists() and not path.parent.is_dir():
            raise UserError(f"{path.parent} is a file; move it away, the report needs a folder")
    for path, content in contents.items():
        files.write_file(path, lambda file, content=content: file.write(content))
    for path in outdated:
        path.unlink(missing_ok=True)


def _plain_float(text: str) -> float:
    """Reads a number as settings are read: Python's own spelling `1_0` is none."""
    try:
        check_plain(text)
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {text!r}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, 2 after bad input."""

    def command() -> None:
        parser = OneLineParser(
            prog="python -m jaxinv.report", description="Report on a run folder."
        )
        parser.add_argument("folder", metavar="DIR", type=Path, help="folder that a sweep wrote")
        parser.add_argument(
            "--success-psnr",
            type=_plain_float,
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
