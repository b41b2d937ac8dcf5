"""What a section of the report is: a figure, a table, and the words that belong to them."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from jaxinv.reporting.columns import Table
from jaxinv.reporting.consensus import quarter
from jaxinv.reporting.study import StudySummary
from jaxinv.reporting.wording import count_text
from jaxinv.settings.naming import setting_text

MOST_ROWS = 48  # of a figure that has a row per cell; the table has all

Words = str | Callable[[StudySummary], str]


@dataclass(frozen=True)
class Section:
    """One section of the report. It stands in the file of its figure or table.

    Words may hold `{seeds}`, `{quarter}` and `{threshold}`, the study's own.

    Attributes:
      name: of its files: tables/NAME.csv, plots/NAME.png and plots/NAME.svg.
      title: its heading; sections of one title that follow each other share it.
      when: whether a study has what the section is about. Where it has not, there is no figure and
        nothing on the page; a table that has rows all the same is still written as CSV.
      draw: draws the figure at a width in inches.
      animate: makes the figure move: bytes of a GIF.
      alt: the figure in words, for those who do not see it.
      caption: what must be known to read the figure.
      table: the table.
      note: below the table.
      folded: the table's name, where it is long and folded away.
    """

    name: str
    title: str
    when: Callable[[StudySummary], bool] = lambda study: True
    draw: Callable[[StudySummary, float], Figure] | None = None
    animate: Callable[[StudySummary], bytes] | None = None
    alt: Words = ""
    caption: Words = ""
    table: Table | None = None
    note: Words = ""
    folded: str = ""


def facts(study: StudySummary) -> dict[str, str]:
    """What a study's words may name."""
    seeds = max(len(cell.seeds) for cell in study.cells)
    return {
        "seeds": count_text(seeds, "seed"),
        "quarter": str(quarter(seeds)),
        "threshold": setting_text(float(study.cells[0].success_psnr)),
    }


def said(words: Words, study: StudySummary) -> str:
    """Fills a study's facts into words, but not into a function's, which may hold a name."""
    return words.format(**facts(study)) if isinstance(words, str) else words(study)
