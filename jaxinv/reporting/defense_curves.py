"""Cells that differ in a defense's strength, arranged as curves; and what each of them says."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxinv import defenses
from jaxinv.privacy import accounting
from jaxinv.reporting.study import Cell, Study
from jaxinv.settings.naming import label_text, setting_text

NEAR_BASELINE = 1.0  # dB above the mean colour: an attack that gets no further is stopped
PRIOR = 1e-4  # the images that could have been the one: CIFAR-10's test split, say
UNDEFENDED = "no defense"


class Curve(NamedTuple):
    """One defense at several strengths, all else equal."""

    names: tuple[str, ...]  # of the chain
    title: str  # the chain, its last strength left open
    label: str  # what else the study varies: "told = True"
    parameter: str  # what the last strength is; nothing where there is none
    inverse: bool  # whether more of it protects less
    points: list[
        tuple[float, Cell]
    ]  # the weakest protection first; NaN where nothing has a strength
    reference: Cell | None  # the same without a defense


class Private(NamedTuple):
    """A cell on a network that was trained with DP-SGD, attacked through the same."""

    cell: Cell
    epsilon: float  # of the training; inf without noise or without DP-SGD
    accuracy: float  # of the network, on the test split
    multiplier: float | None  # of the noise in the attacked update; None: no DP-SGD
    clip: float | None
    release_bound: float  # on the success of any attack on this update, at the prior `PRIOR`


def curves(study: Study) -> list[Curve]:
    """Groups cells by chain and by all that varies beside its last strength."""
    found: dict[tuple, list[tuple[float, Cell]]] = {}
    references: dict[str, Cell] = {}
    for cell in study.cells:
        chain = defenses.parse(cell.facts["defense"])
        # An attacker is told of a defense alone: without one, both compare with the same cell.
        if not chain:
            references[_label(study, cell, ("defense", "told"))] = cell
        else:
            *front, (name, strengths) = chain
            *fixed, last = strengths or (math.nan,)
            key = (tuple(front), name, tuple(fixed), _label(study, cell, ("defense",)))
            found.setdefault(key, []).append((last, cell))
    result = []
    for (front, name, fixed, label), points in found.items():
        title = defenses.spell(front) + "," if front else ""
        title += ":".join([name, *(f"{value:g}" for value in fixed)])
        without_told = _label(study, points[0][1], ("defense", "told"))
        entry = defenses.DEFENSES[name]
        parameter = entry.parameters[-1][0] if entry.parameters else ""
        points.sort(key=lambda p: p[0], reverse=entry.inverse)
        names = (*(n for n, _ in front), name)
        reference = references.get(without_told)
        result.append(Curve(names, title, label, parameter, entry.inverse, points, reference))
    return result


def _label(study: Study, cell: Cell, left_out: Iterable[str]) -> str:
    """Names a cell by the settings that vary, some left out."""
    settings = study.run.config["cells"][cell.number]
    axes = study.run.config["axes"]
    return label_text({name: settings[name] for name in axes if name not in left_out})


def private_cells(study: Study) -> list[Private]:
    """Networks trained with DP-SGD, and those without it or any defense beside them; by epsilon."""
    trained = [c for c in study.cells if c.facts["victim"] is not None]
    if all(_is_nan(c.facts["victim_delta"]) for c in trained):
        return []
    rows = []
    for cell in trained:
        if _is_nan(cell.facts["victim_delta"]) and cell.facts["defense"] != defenses.NONE:
            continue
        epsilon = cell.facts["victim_epsilon"]
        strengths = dict(defenses.parse(cell.facts["defense"])).get("dpsgd")
        clip, multiplier = (None, None) if strengths is None else strengths
        bound = 1.0
        if multiplier:
            bound = accounting.reconstruction_bound(accounting.Spent(multiplier), PRIOR)
        rows.append(
            Private(
                cell, math.inf if _is_nan(epsilon) else float(epsilon),
                float(cell.facts["victim_accuracy"]), multiplier, clip, bound,
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: row.epsilon)


def _is_nan(value: Any) -> bool:
    return value is None or math.isnan(value)


def stops(cell: Cell) -> bool:
    """Whether the attack gets nowhere: no success, and a mean within `NEAR_BASELINE` of the colour.

    The upper limit of the mean's interval is what must lie there. Failures are none of the
    attack's success: where every trial failed, the defense sent nothing to attack.
    """
    if cell.failed.all():
        return True
    limit = cell.mean.high
    return cell.success.rate == 0 and limit < cell.baseline("psnr") + NEAR_BASELINE


def verdicts(study: Study) -> list[dict[str, Any]]:
    """One row per curve: the least strength tried that stops the attack, and what it costs."""
    rows = []
    for curve in curves(study):
        if not _is_nan(curve.points[0][1].facts["victim_delta"]):
            continue  # a network of its own training: `private_rows`
        # From there on: a strength that stops by luck below one that does not is no answer.
        reached = max((i for i, p in enumerate(curve.points) if not stops(p[1])), default=-1)
        stopping = curve.points[reached + 1 :]
        strength, cell = stopping[0] if stopping else curve.points[-1]
        mean, undefended = cell.mean, curve.reference
        ends = [setting_text(curve.points[i][0]) for i in (0, -1)] if curve.parameter else []
        rows.append(
            {
                "defense": curve.title,
                "setting": curve.label,
                "parameter": curve.parameter,
                "stops": bool(stopping),
                "strength": strength,
                "tried": " to ".join(dict.fromkeys(ends)),
                "psnr_mean": mean.mean,
                "psnr_low": mean.low,
                "psnr_high": mean.high,
                "baseline_psnr": cell.baseline("psnr"),
                "undefended_psnr": math.nan if undefended is None else undefended.mean.mean,
                "success_rate": cell.success.rate,
                "update_cosine": float(cell.metrics["update_cosine"].mean()),
                "update_error": float(cell.metrics["update_error"].mean()),
                "victim_accuracy": float(cell.facts["victim_accuracy"] or math.nan),
                "failed": int(cell.failed.sum()),
            }
        )  # fmt: skip
    return rows


def private_rows(study: Study) -> list[dict[str, Any]]:
    """One row per network of `private_cells`: utility, privacy and leakage."""
    rows = []
    for row in private_cells(study):
        mean, facts = row.cell.mean, row.cell.facts
        rows.append(
            {
                "cell": row.cell.number,
                "victim": facts["victim"],
                "setting": row.cell.label,
                "noise_multiplier": math.nan if row.multiplier is None else row.multiplier,
                "clip": math.nan if row.clip is None else row.clip,
                "epsilon": row.epsilon,
                "delta": facts["victim_delta"],
                "test_accuracy": row.accuracy,
                "psnr_mean": mean.mean,
                "psnr_low": mean.low,
                "psnr_high": mean.high,
                "baseline_psnr": row.cell.baseline("psnr"),
                "success_rate": row.cell.success.rate,
                "update_cosine": float(row.cell.metrics["update_cosine"].mean()),
                "prior": PRIOR,
                "release_bound": row.release_bound,
            }
        )  # fmt: skip
    return rows
