"""The summary for a terminal: the columns of the page's first table that fit there."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxinv.reporting.columns import Row
from jaxinv.reporting.findings import findings
from jaxinv.reporting.section import said
from jaxinv.reporting.sections.summary import SUMMARY
from jaxinv.reporting.study import StudySummary


def print_summary(study: StudySummary, rows: list[Row], console: Console) -> None:
    """Prints the summary's rows, the findings, and where the rest is.

    Every text is printed as it is: a name with square brackets is no markup.
    """
    columns = [column for column in SUMMARY.on_page(study) if column.terminal]
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for index, column in enumerate(columns):
        is_name = index == 0
        table.add_column(
            Text(said(column.head, study)),
            justify="left" if is_name else "right",
            no_wrap=not is_name,
            min_width=8 if is_name else None,
            overflow="fold",
            vertical="top",
        )
    for row in rows:
        shown = [column.shown(row) for column in columns]
        table.add_row(*(Text("\n".join(filter(None, (s.text, s.beside)))) for s in shown))
    console.print(table)
    for sentence in findings(study):
        console.print(sentence, highlight=False, markup=False)
    console.print(f"report: {study.run.folder / 'report.html'}", highlight=False, markup=False)
