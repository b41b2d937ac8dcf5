"""The page of many runs: of each its question, findings, figures, and a link to its report.

`gallery.html` is the template. The page stands in the folder above the runs and shows the figures
that their reports wrote.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxinv.reporting import page
from jaxinv.reporting.findings import findings
from jaxinv.reporting.section import said
from jaxinv.reporting.sections import SECTIONS
from jaxinv.reporting.study import StudySummary
from jaxinv.reporting.wording import count_text, without_folders

# What says most of a run: a curve or the differences where it has them, else every seed or target;
# and what the attack recovers.
_LEADING = (
    "dp_sgd",
    "defense_curves",
    "labels",
    "paired_differences",
    "psnr_distribution",
    "psnr_by_target",
)
_PICTURES = "reconstructions"


def render(studies: Sequence[StudySummary], seconds: Sequence[float]) -> str:
    """Renders the page.

    Args:
      studies: the runs, in order; each in a folder beside the page, with its report.
      seconds: that each has taken so far.
    """
    entries = [_entry(study, spent) for study, spent in zip(studies, seconds)]
    trials = sum(study.finished_trials for study in studies)
    words = f"{count_text(len(studies), 'sweep')}, {count_text(trials, 'trial')}, "
    template = page.environment().get_template("gallery.html")
    return template.render(entries=entries, words=words + _duration(sum(seconds)))


def _entry(study: StudySummary, seconds: float) -> dict[str, Any]:
    """What the template shows of a run."""
    config = study.run.config
    asked = config.get("study") or {}
    folder = study.run.folder
    there = [s for s in SECTIONS if s.draw and (folder / "plots" / f"{s.name}.png").is_file()]
    by_name = {section.name: section for section in there}
    leading = next((name for name in _LEADING if name in by_name), None)
    figures = [
        {
            "source": Path(folder.name, "plots", f"{name}.png").as_posix(),
            "alt": said(by_name[name].alt, study),
        }
        for name in (leading, _PICTURES)
        if name in by_name
    ]
    devices = {str(session.get("device", "")) for session in config.get("sessions") or []}
    return {
        "name": str(config.get("name", folder.name)),
        "question": asked.get("question") or "What does the attack recover?",
        "findings": findings(study),
        "figures": figures,
        "report": Path(folder.name, "report.html").as_posix(),
        "command": without_folders(str(config.get("command", ""))),
        "cost": f"{study.finished_trials} of {count_text(study.planned_trials, 'trial')}, "
        f"{_duration(seconds)}; {'; '.join(sorted(devices))}",
    }


def _duration(seconds: float) -> str:
    """Seconds as a reader says them: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
