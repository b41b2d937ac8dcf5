"""Cells that differ in a defense's strength alone, arranged as curves."""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from jaxinv import defenses
from jaxinv.reporting.study import CellSummary, StudySummary
from jaxinv.reporting.wording import without_folders
from jaxinv.settings.naming import label_text


class Curve(NamedTuple):
    """One defense at several strengths, all else equal."""

    names: tuple[str, ...]  # of the chain
    title: str  # the chain, its last strength left open
    label: str  # what else the study varies: "adaptive = True"
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
            references[_label(study, cell, ("defense", "adaptive"))] = cell
        else:
            *front, (name, strengths) = chain
            *fixed, last = strengths or (math.nan,)
            key = (tuple(front), name, tuple(fixed), _label(study, cell, ("defense",)))
            found.setdefault(key, []).append((last, cell))
    result = []
    for (front, name, fixed, label), points in found.items():
        title = defenses.spell(front) + "," if front else ""
        title += ":".join([name, *(f"{value:g}" for value in fixed)])
        without_adaptive = _label(study, points[0][1], ("defense", "adaptive"))
        entry = defenses.DEFENSES[name]
        parameter = entry.parameters[-1][0] if entry.parameters else ""
        points.sort(key=lambda p: p[0], reverse=entry.inverse)
        names = (*(n for n, _ in front), name)
        reference = references.get(without_adaptive)
        label = without_folders(label)
        result.append(Curve(names, title, label, parameter, entry.inverse, points, reference))
    return result


def _label(study: StudySummary, cell: CellSummary, left_out: Iterable[str]) -> str:
    """Names a cell by the settings that vary, some left out."""
    axes = study.run.config["axes"]
    return label_text({name: cell.asked[name] for name in axes if name not in left_out})
