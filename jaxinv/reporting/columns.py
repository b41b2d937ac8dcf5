"""Columns of the report's tables, each laid out once for CSV, page and terminal.

A `Column` says how its value is computed, and how it is shown where people read it. A `Table` is a
list of columns over a list of things: cells, targets, pairs of cells. The functions below make the
columns that several tables share.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxinv.reporting.statistics import Interval
from jaxinv.reporting.study import CellSummary, StudySummary
from jaxinv.reporting.wording import interval_text, is_undefined, number_text, percent_text
from jaxinv.settings.naming import setting_text

Row = dict[str, Any]  # by the column's name; undefined numbers are NaN, exact reconstructions inf
BASELINE_LABEL = "mean color"


class Shown(NamedTuple):
    """What a place of a table shows."""

    text: str
    beside: str = ""  # smaller: an interval
    below: str = ""  # smaller, on a line of its own


class Definition(NamedTuple):
    """What a word means. `{seeds}`, `{quarter}` and `{threshold}` stand for the study's own."""

    term: str
    text: str


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
      name: in the CSV.
      value: computes it from what the row is of.
      baseline: computes it from a cell in the row of the mean-color image; None: undefined there.
      head: over the column on the page; "": the column is in the CSV alone.
      show: prints it, given the whole row; by default the value itself.
      terminal: whether the terminal's summary has it too.
      when: whether the page shows it.
      definition: what the number is, for the page's list.
    """

    name: str
    value: Callable[[Any], Any]
    head: str = ""
    show: Callable[[Row], Shown] | None = None
    baseline: Callable[[CellSummary], Any] | None = None
    terminal: bool = False
    when: Callable[[StudySummary], bool] = lambda study: True
    definition: Definition | None = None

    def shown(self, row: Row) -> Shown:
        """Prints the column in a row; nothing where a baseline has no such number."""
        if is_baseline(row) and self.baseline is None:
            return Shown("")
        return Shown(setting_text(row[self.name])) if self.show is None else self.show(row)


@dataclass(frozen=True)
class Table:
    """Columns over a list of things, and over the mean-color image where it is of use.

    Attributes:
      items: what the rows are of.
      columns: in this order, in the CSV and on the page.
      baselines: cells on whose targets the mean-color image is a row of its own.
      in_files_only: the page has the table's figure instead.
    """

    items: Callable[[StudySummary], Iterable[Any]]
    columns: tuple[Column, ...]
    baselines: Callable[[StudySummary], Iterable[CellSummary]] = lambda study: ()
    in_files_only: bool = False

    def rows(self, study: StudySummary) -> list[Row]:
        """Computes every column of every row."""
        rows = [{c.name: c.value(item) for c in self.columns} for item in self.items(study)]
        return rows + [
            {c.name: math.nan if c.baseline is None else c.baseline(cell) for c in self.columns}
            for cell in self.baselines(study)
        ]

    def on_page(self, study: StudySummary) -> list[Column]:
        """The columns that the page shows."""
        if self.in_files_only:
            return []
        return [column for column in self.columns if column.head and column.when(study)]


def is_baseline(row: Row) -> bool:
    """Whether a row is of the mean-color image."""
    return row.get("cell") == ""


def decimals(name: str, digits: int = 2) -> Callable[[Row], Shown]:
    """Prints a number with so many digits after the point."""
    return lambda row: Shown(number_text(row[name], digits))


def decimals_or_failed(name: str, digits: int = 2) -> Callable[[Row], Shown]:
    """Prints a mean; where failures make it undefined, their count beside the dash."""

    def show(row: Row) -> Shown:
        is_undone = row["failed"] and math.isnan(row[name])
        return Shown(number_text(row[name], digits), f"{row['failed']} failed" if is_undone else "")

    return show


def percent(name: str, digits: int = 1) -> Callable[[Row], Shown]:
    """Prints a share in percent."""
    return lambda row: Shown(percent_text(row[name], digits))


def setting(name: str) -> Callable[[Row], Shown]:
    """Prints a strength or another setting's number; a dash where there is none."""
    return lambda row: Shown("—" if is_undefined(row[name]) else setting_text(row[name]))


def with_interval(
    name: str,
    value: Callable[[Any], Interval],
    head: str = "",
    *,
    ends: str = "",
    shares: bool = False,
    digits: int = 2,
    of_limits: int | None = None,
    **options: Any,
) -> tuple[Column, ...]:
    """Makes three columns, value and limits, which people read as one: "16.20 [14.10, 18.30]".

    Args:
      name: of the value's column.
      value: computes all three.
      head: over the one column that is shown.
      ends: what the limits' names start with, by default what the value's does.
      shares: the numbers are shares, shown in percent.
      digits: of the value that is shown, after the point.
      of_limits: the limits' digits, by default as many.
      options: of the value's column; `baseline` computes an interval as well.
    """
    ends = ends or name
    low, high = f"{ends}_low", f"{ends}_high"
    unit = 100 if shares else 1

    def show(row: Row) -> Shown:
        if not math.isfinite(row[name]) and not shares:
            return decimals_or_failed(name, digits)(row)
        limits = interval_text(
            unit * row[low], unit * row[high], digits if of_limits is None else of_limits
        )
        shown = percent_text if shares else number_text
        return Shown(shown(row[name], digits), limits)

    def part(index: int, of: Callable[[Any], Interval] | None) -> Callable[[Any], float] | None:
        return None if of is None else lambda item: float(of(item)[index])

    baseline = options.pop("baseline", None)
    return (
        Column(name, part(0, value), head, show, part(0, baseline), **options),
        Column(low, part(1, value), baseline=part(1, baseline)),
        Column(high, part(2, value), baseline=part(2, baseline)),
    )


def name_columns(
    head: str = "", cell: Callable[[Any], CellSummary] = lambda item: item
) -> tuple[Column, ...]:
    """Makes the columns that say which cell a row is of; `head` is over its setting."""
    return (
        Column("cell", lambda item: cell(item).number, baseline=lambda of: ""),
        Column(
            "setting",
            lambda item: cell(item).label,
            head,
            baseline=lambda of: BASELINE_LABEL,
            terminal=True,
        ),
    )


def size_columns(
    cell: Callable[[Any], CellSummary] = lambda item: item,
    *,
    targets: Callable[[Any], int] | None = None,
    failed: Callable[[Any], int] | None = None,
) -> tuple[Column, ...]:
    """Makes the columns that say how many trials a row is of, how many failed or were exact.

    Args:
      cell: of what the row is of.
      targets: their number, where it is not the cell's.
      failed: their number, where it is not the cell's.
    """
    return (
        Column(
            "targets",
            targets or (lambda item: len(cell(item).target_ids)),
            "targets\n× seeds",
            _size,
            baseline=lambda of: len(of.target_ids),
            terminal=True,
        ),
        Column("seeds", lambda item: len(cell(item).seeds), baseline=lambda of: ""),
        Column("draws", lambda item: len(cell(item).draws), baseline=lambda of: ""),
        *failure_columns(
            failed or (lambda item: int(cell(item).failed.sum())),
            lambda item: int(cell(item).exact.sum()),
        ),
    )


def failure_columns(
    failed: Callable[[Any], int], exact: Callable[[Any], int]
) -> tuple[Column, ...]:
    """Makes the columns that count the failed and the exact trials."""
    return (
        Column("failed", failed, "failed", baseline=lambda of: 0, terminal=True),
        Column("exact", exact, "exact", baseline=lambda of: 0, when=lambda study: study.has_exact),
    )


def baseline_column(
    cell: Callable[[Any], CellSummary] = lambda item: item,
    value: Callable[[Any], float] | None = None,
) -> Column:
    """Makes the column of the mean-color image's PSNR in dB, a cell's or another `value`."""
    return Column(
        "baseline_psnr",
        value or (lambda item: cell(item).baseline("psnr")),
        "mean\ncolor",
        decimals("baseline_psnr"),
        baseline=lambda of: of.baseline("psnr"),
        definition=Definition(
            "Mean color",
            "The same metrics for an image filled with the data set’s mean color: what one scores "
            "without attacking at all.",
        ),
    )


def capacity_column(cell: Callable[[Any], CellSummary] = lambda item: item) -> Column:
    """Makes the column of how many images an update can determine, shown beside batches."""
    return Column(
        "capacity",
        lambda item: cell(item).facts["capacity"],
        "images\nat most",
        decimals("capacity", 1),
        terminal=True,
        when=lambda study: any(len(ids) > 1 for c in study.cells for ids in c.image_ids),
        definition=Definition(
            "Images at most",
            "How many images one gradient of the network can determine, by its layers alone, "
            "whoever attacks: of more than that some part is left open, which only knowledge of "
            "images can fill. Nothing is said of several local steps.",
        ),
    )


def _size(row: Row) -> Shown:
    """How many trials: targets x draws of noise, where there are several, x seeds."""
    counts = [row["targets"], *([] if row["draws"] == 1 else [row["draws"]]), row["seeds"]]
    return Shown(" × ".join(str(count) for count in counts if count != ""))
