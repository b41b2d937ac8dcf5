"""Section: from which strength a defense leaves the attack nothing, and at what cost."""

import math
from typing import NamedTuple

import numpy as np

from jaxinv.reporting.columns import (
    Column,
    Definition,
    Row,
    Shown,
    Table,
    baseline_column,
    decimals,
    failure_columns,
    percent,
    with_interval,
)
from jaxinv.reporting.defense_curves import Curve, curves
from jaxinv.reporting.section import Section
from jaxinv.reporting.statistics import Interval
from jaxinv.reporting.study import CellSummary, StudySummary
from jaxinv.reporting.wording import is_undefined
from jaxinv.settings.naming import setting_text

NEAR_BASELINE = 1.0  # dB above the mean color: an attack that gets no further has nothing
TITLE = "Which defense leaves this attack nothing, at what cost"


class Verdict(NamedTuple):
    """The least strength of a defense that leaves the attack nothing; the greatest where none does.

    A strength that does so by luck, below one that does not, is no answer.
    """

    curve: Curve
    stops: bool
    strength: float
    cell: CellSummary


def leaves_nothing(cell: CellSummary) -> bool:
    """Whether the attack gets nowhere: no success, and a mean within `NEAR_BASELINE` of the color.

    The upper limit of the mean's interval is what must lie there. Failures are none of the
    attack's success: where every trial failed, the defense sent nothing to attack.
    """
    if cell.failed.all():
        return True
    limit = cell.mean.high
    return cell.success.rate == 0 and limit < cell.baseline("psnr") + NEAR_BASELINE


def verdicts(study: StudySummary) -> list[Verdict]:
    """One verdict per curve; networks with a training of their own stand in `dp_sgd`."""
    found = []
    for curve in curves(study):
        if not is_undefined(curve.points[0][1].facts["victim_delta"]):
            continue
        enough = [leaves_nothing(cell) for _, cell in curve.points]
        reached = max((i for i, nothing in enumerate(enough) if not nothing), default=-1) + 1
        stops = reached < len(enough)
        found.append(Verdict(curve, stops, *curve.points[reached if stops else -1]))
    return found


def _tried(verdict: Verdict) -> str:
    """The least and the greatest strength of a curve."""
    curve = verdict.curve
    ends = [setting_text(curve.points[i][0]) for i in (0, -1)] if curve.parameter else []
    return " to ".join(dict.fromkeys(ends))


def _undefended(verdict: Verdict) -> float:
    reference = verdict.curve.reference
    return math.nan if reference is None else reference.mean.mean


def _defense(row: Row) -> Shown:
    return Shown(row["defense"], below=row["setting"])


def _from_strength(row: Row) -> Shown:
    least = f"from {row['parameter']} {setting_text(row['strength'])}"
    return Shown("no" if not row["stops"] else least if row["parameter"] else "yes")


def cosine_column(cell) -> Column:
    """Makes the column of what a defense leaves of the update's direction."""
    return Column(
        "update_cosine",
        lambda item: cell(item).mean_of("update_cosine"),
        "cosine to the\ntrue update",
        decimals("update_cosine", 3),
        definition=Definition(
            "Cosine to the true update",
            "Between what the client sent and what it would have sent without the defense: the "
            "direction in which training goes on. 1: the defense costs nothing.",
        ),
    )


def _columns() -> tuple[Column, ...]:
    def cell(verdict):
        return verdict.cell

    return (
        Column("defense", lambda v: v.curve.title, "defense", _defense),
        Column("setting", lambda v: v.curve.label),
        Column("parameter", lambda v: v.curve.parameter),
        Column("stops", lambda v: v.stops, "leaves this\nattack nothing", _from_strength),
        Column("strength", lambda v: v.strength),
        Column("tried", _tried, "tried"),
        *failure_columns(lambda v: int(v.cell.failed.sum()), lambda v: int(v.cell.exact.sum())),
        *with_interval(
            "psnr_mean",
            lambda v: Interval(*v.cell.mean[:3]),
            "PSNR in dB\nthere [95%]",
            ends="psnr",
        ),
        baseline_column(cell),
        Column("undefended_psnr", _undefended, "undefended", decimals("undefended_psnr")),
        Column(
            "success_rate",
            lambda v: v.cell.success.rate,
            "above\n{threshold} dB",
            percent("success_rate", 0),
        ),
        cosine_column(cell),
        Column("update_error", lambda v: v.cell.mean_of("update_error")),
        Column(
            "victim_accuracy",
            lambda v: float(v.cell.facts["victim_accuracy"] or np.nan),
            "test\naccuracy",
            percent("victim_accuracy"),
        ),
    )


SECTION = Section(
    name="defenses",
    title=TITLE,
    when=lambda study: bool(verdicts(study)),
    table=Table(verdicts, _columns()),
    note="A defense leaves an attack nothing here when no trial is above the threshold and the "
    f"upper limit of the mean PSNR lies less than {NEAR_BASELINE:g} dB above the mean color, at "
    "the strength named and at all above it. That is a statement about the attacks in this table "
    "and no others. Not tried: attacks with a learned image prior, attacks that average several "
    "updates of one client, attacks that choose the network’s parameters, and every combination of "
    "settings that was not swept.",
)
