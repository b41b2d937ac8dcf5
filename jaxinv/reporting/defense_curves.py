"""Cells that differ in a defense's strength alone, arranged as curves."""

import math
from functools import lru_cache
from typing import NamedTuple

from jaxinv import defenses
from jaxinv.reporting.study import CellSummary, StudySummary
from jaxinv.reporting.wording import without_folders
from jaxinv.settings.naming import heading_text


class Curve(NamedTuple):
    """One defense at several strengths, all else equal."""

    names: tuple[str, ...]  # of the chain
    title: str  # the chain, its last strength left open
    label: str  # what else the study varies, but for the attacker's knowledge: "cosine + TV"
    is_blind: bool  # whether the attacker does not know the defense
    parameter: str  # what the last strength is; nothing where there is none
    inverse: bool  # whether more of it protects less
    # The weakest protection first; NaN where nothing has a strength.
    points: list[tuple[float, CellSummary]]
    reference: CellSummary | None  # the same without a defense


@lru_cache(maxsize=1)  # a report is of one study
def curves(study: StudySummary) -> list[Curve]:
    """Groups cells by chain and by all that varies beside its last strength."""
    found: dict[tuple, list[tuple[float, CellSummary]]] = {}
    references: dict[str, CellSummary] = {}
    for cell in study.cells:
        chain = defenses.parse(cell.facts["defense"])
        # An attacker can only adapt to a defense: without one, both compare with the same cell.
        if not chain:
            references[_label(study, cell)] = cell
        else:
            *front, (name, strengths) = chain
            *fixed, last = strengths or (math.nan,)
            of_attacker = _label(study, cell), not cell.asked["adaptive"]
            key = (tuple(front), name, tuple(fixed), *of_attacker)
            found.setdefault(key, []).append((last, cell))
    result = []
    for (front, name, fixed, label, is_blind), points in found.items():
        title = defenses.spell(front) + "," if front else ""
        title += ":".join([name, *(f"{value:g}" for value in fixed)])
        entry = defenses.DEFENSES[name]
        parameter = entry.parameters[-1][0] if entry.parameters else ""
        points.sort(key=lambda p: p[0], reverse=entry.inverse)
        names = (*(n for n, _ in front), name)
        own = Curve(
            names=names,
            title=title,
            label=without_folders(label),
            is_blind=is_blind,
            parameter=parameter,
            inverse=entry.inverse,
            points=points,
            reference=references.get(label),
        )
        result.append(own)
    return result


def _label(study: StudySummary, cell: CellSummary) -> str:
    """Names a cell by the settings that vary, but for its defense and what is known of it."""
    axes = [name for name in study.run.config["axes"] if name not in ("defense", "adaptive")]
    return heading_text({name: cell.asked[name] for name in axes})
