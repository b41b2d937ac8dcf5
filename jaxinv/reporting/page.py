"""The page of a report: one HTML file that needs nothing else, for desk and phone.

`page.html` is the template, `page.css` its look; here is what they are filled with. The template
engine escapes all of it.
"""

import base64
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import jinja2
from matplotlib.figure import Figure

from jaxinv.reporting.columns import Definition, Row, Table, is_baseline
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.findings import findings
from jaxinv.reporting.section import Section, facts, said
from jaxinv.reporting.study import StudySummary
from jaxinv.reporting.wording import without_folders
from jaxinv.runs.results import SETTINGS
from jaxinv.settings.naming import setting_text

MOST_ROWS = 48  # of a table that is folded away; the CSV has all
_SVG_LIMIT = 400_000  # bytes; above it a PNG loads faster and looks the same

# Words that are over no column of their own, before and after those that are.
_FIRST = (
    Definition(
        "Target, seed, trial, cell",
        "A target is one shared update, of one or several images. A seed names one random initial "
        "image of the attack. A trial is one target attacked from one seed. A cell is one setting "
        "of the sweep and holds targets × seeds trials.",
    ),
    Definition(
        "PSNR",
        "10 log₁₀(1 / MSE) in dB, on pixels clamped to [0, 1] with data range 1; per image, then "
        "the mean over the target’s images. Reconstructions of several images are matched one to "
        "one to the truths first. An exact reconstruction has PSNR ∞ and is not capped: it makes "
        "means ∞ and spreads undefined; the tables count such trials as exact.",
    ),
)
_DRAWS = Definition(
    "Draw of noise",
    "Where a defense is random, each target’s update is defended anew in every draw, and every "
    "draw is attacked from the same seeds. Sizes are then targets × draws × seeds; the best of k "
    "is among the seeds on one draw.",
)
_FAILED = Definition(
    "Failed",
    "A trial that turned non-finite. It counts as a miss, ranks worst in medians, is never chosen "
    "while another seed is left, and makes a mean undefined (—): an average of the survivors would "
    "flatter the setting that fails.",
)


class Drawing:
    """A figure as the bytes of its files, each made once and only where it is asked for."""

    def __init__(self, figure: Figure):
        self.figure = figure

    @cached_property
    def svg(self) -> bytes:
        """The vector file."""
        return ps.to_bytes(self.figure, "svg")

    @cached_property
    def png(self) -> bytes:
        """The pixel file."""
        return ps.to_bytes(self.figure, "png")

    @property
    def data_uri(self) -> str:
        """The figure inside an address: its SVG, or the PNG where the SVG is large and larger."""
        if len(self.svg) <= _SVG_LIMIT or len(self.svg) <= len(self.png):
            return _data_uri(self.svg, "svg+xml")
        return _data_uri(self.png, "png")


class Picture(NamedTuple):
    """A section's figure for wide and for narrow screens."""

    wide: Drawing
    narrow: Drawing


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def render(
    study: StudySummary,
    sections: Iterable[Section],
    tables: Mapping[str, list[Row]],
    pictures: Mapping[str, Picture],
    moving: Mapping[str, bytes],
) -> str:
    """Renders the page.

    Args:
      study: what it is about.
      sections: those that apply to the study, in the page's order.
      tables: rows by the section's name.
      pictures: figures by the section's name.
      moving: animations, likewise.
    """
    sections = list(sections)
    config = study.run.config
    asked = config.get("study") or {}
    return (
        environment()
        .get_template("page.html")
        .render(
            title=str(config.get("name", study.run.folder.name)),
            question=asked.get("question") or "What does the attack recover?",
            findings=findings(study),
            parts=[
                _part(study, s, tables.get(s.name), pictures.get(s.name), moving.get(s.name))
                for s in sections
            ],
            definitions=_definitions(study, sections),
            run=_run_entries(study, asked),
        )
    )


def environment() -> jinja2.Environment:
    """The template engine: everything escaped, a name that is not there an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxinv.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = _unbroken
    return environment


def _unbroken(text: str) -> str:
    """Keeps "tv = 0.01" on one line."""
    return text.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")


def _part(
    study: StudySummary,
    section: Section,
    rows: list[Row] | None,
    picture: Picture | None,
    moving: bytes | None,
) -> dict[str, Any]:
    """What the template shows of a section."""
    figure = picture and {
        "wide": picture.wide.data_uri,
        "narrow": picture.narrow.data_uri,
        "alt": said(section.alt, study),
        "caption": said(section.caption, study),
    }
    return {
        "name": section.name,
        "title": section.title,
        "figure": figure,
        "moving": moving and _data_uri(moving, "gif"),
        "table": section.table and _table(study, section.table, rows or [], bool(section.folded)),
        "folded": section.folded,
        "note": said(section.note, study),
    }


def _table(
    study: StudySummary, table: Table, rows: list[Row], folded: bool
) -> dict[str, Any] | None:
    """What the template shows of a table; None where the page leaves it out."""
    columns = table.on_page(study)
    if not columns or not rows:
        return None
    shown = rows[:MOST_ROWS] if folded else rows
    left_out = f"The first {len(shown)} of {len(rows)} rows." if len(shown) < len(rows) else ""
    return {
        "heads": [said(column.head, study) for column in columns],
        "rows": [
            {"is_baseline": is_baseline(row), "shown": [column.shown(row) for column in columns]}
            for row in shown
        ],
        "left_out": left_out,
    }


def _definitions(study: StudySummary, sections: Iterable[Section]) -> list[Definition]:
    """Defines what the page shows, each word once."""
    columns = [c for s in sections if s.table for c in s.table.on_page(study)]
    used = [
        *_FIRST,
        *([_DRAWS] if study.has_draws else []),
        *(column.definition for column in columns if column.definition),
        _FAILED,
    ]
    known = facts(study)
    return [Definition(d.term.format(**known), d.text.format(**known)) for d in dict.fromkeys(used)]


def _run_entries(study: StudySummary, asked: Mapping[str, Any]) -> list[dict[str, str]]:
    """What was run, with what, and how far it got."""
    config = study.run.config
    axes = config.get("axes") or {}
    varied = "; ".join(f"{k}: {', '.join(map(setting_text, v))}" for k, v in axes.items())
    digests = sorted({str(d)[:12] for d in study.run.trials["victim_digest"]})
    entries = [("Command", "", config.get("command", ""))]
    entries += [
        (f"{name.capitalize()}, as stated before", asked[name], "")
        for name in ("cost", "expectation")
        if asked.get(name)
    ]
    entries += [
        ("Settings that vary", varied or "none", ""),
        ("Settings that do not", _fixed_settings(study), ""),
        (
            "Trials",
            f"{study.finished_trials} of {study.planned_trials} there, {study.failed_trials} "
            "failed",
            "",
        ),
        ("Attacked parameters (sha256)", ", ".join(digests[:6]), ""),
    ]
    for session in config.get("sessions") or []:
        versions = ", ".join(f"{k} {v}" for k, v in (session.get("versions") or {}).items())
        started = str(session.get("started", ""))[:16].replace("T", " ")
        words = f"{session.get('device', '')}; {versions};"
        entries.append((f"Session {started}", words, session.get("command", "")))
    return [
        {"term": term, "text": without_folders(str(text)), "command": without_folders(str(command))}
        for term, text, command in entries
    ]


def _fixed_settings(study: StudySummary) -> str:
    """Settings with one value in all rows; those that say that something is off are left out."""
    parts = []
    for name, _ in SETTINGS:
        values = {setting_text(v) for v in study.run.trials[name]}
        off = ("nan", "None", "0", "False") if name != "network_seed" else ()
        if len(values) == 1 and (value := values.pop()) not in off:
            parts.append(f"{name.removesuffix('_type')} = {value}")
    return ", ".join(parts)
