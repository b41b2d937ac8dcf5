"""The headline results in sentences, computed from the rows."""

import math

import numpy as np

from jaxinv.reporting.consensus import quarter
from jaxinv.reporting.statistics import BestOfK, Interval
from jaxinv.reporting.study import CellSummary, StudySummary
from jaxinv.reporting.wording import count_text, interval_text, number_text, percent_text


def findings(study: StudySummary) -> list[str]:
    """States the headline results in sentences computed from the rows."""
    sentences = [
        _labels_sentence(study),
        _spread_sentence(study),
        _choice_sentence(study),
        _consensus_sentence(study),
    ]
    if study.failed_trials:
        failed = count_text(study.failed_trials, "trial")
        sentences.append(
            f"{failed} of {study.finished_trials} turned non-finite; means over them are left out "
            "as —, not averaged over the survivors."
        )
    missing = study.planned_trials - study.finished_trials
    if missing > 0:
        sentences.append(
            f"The study is not finished: {study.finished_trials} of {study.planned_trials} trials "
            "are there."
        )
    return [s for s in sentences if s]


def _spread_sentence(study: StudySummary) -> str:
    """Compares the seeds' spread: between the extreme cells, or with the targets' in one cell."""
    known = [c for c in study.cells if np.isfinite(c.mean.seed_std)]
    if not known:
        return ""
    low = min(known, key=lambda c: c.mean.seed_std)
    high = max(known, key=lambda c: c.mean.seed_std)
    std = {
        c.number: number_text(c.mean.seed_std, 1 if c.mean.seed_std >= 0.1 else 2) for c in known
    }
    if low is not high:
        return (
            f"At {low.heading} the {len(low.seeds)} seeds of one target differ by "
            f"{std[low.number]} dB (standard deviation), at {high.heading} by "
            f"{std[high.number]} dB."
        )
    sentence = f"The {len(low.seeds)} seeds of one target differ by {std[low.number]} dB"
    between = low.components.between.value
    if np.isfinite(between):
        sentence += f", the {len(low.target_ids)} targets by {number_text(between, 1)} dB"
    return f"{sentence} (standard deviation)."


def _labels_sentence(study: StudySummary) -> str:
    """States how many labels were found where they are found best and worst."""
    known = [cell for cell in study.without_labels if np.isfinite(cell.labels_right.value)]
    if not known:
        return ""
    worst, *_ = ranked = sorted(known, key=lambda cell: cell.labels_right.value)
    best = ranked[-1]
    sentence = f"The attacker has {percent_text(best.labels_right.value)} of the labels right"
    if len(known) > 1:
        sentence += (
            f" at {best.heading}, {percent_text(worst.labels_right.value)} at {worst.heading}"
        )
    return f"{sentence}."


def _choice_sentence(study: StudySummary) -> str:
    """States the best cell, and what choosing among seeds adds to it."""
    known = [c for c in study.cells if np.isfinite(c.mean.mean)]
    if not known:
        return ""
    if len({c.asked["defense"] for c in known}) > 1:
        return _of_each_defense(known)
    best = max(known, key=lambda c: c.mean.mean)
    where = f"Best on average: {best.heading}, " if len(study.cells) > 1 else "On average "
    limits = interval_text(best.mean.low, best.mean.high, 1)
    sentence = f"{where}{number_text(best.mean.mean, 1)} dB{' ' + limits if limits else ''}"
    sentence += f" against {number_text(best.baseline('psnr'), 1)} dB of a mean-color image"
    if best.mean.mean < best.baseline("psnr"):
        sentence += ": less than what knowing nothing gets, the attack failed"
    gains = [choice.mean[-1] - best.mean.mean for choice in (best.pick, best.oracle)]
    if len(best.seeds) > 1 and np.isfinite(gains).all():
        signed = [f"{gain:+.1f}".replace("-", "−") for gain in gains]
        sentence += (
            f"; choosing the best of {len(best.seeds)} seeds by the objective changes it by "
            f"{signed[0]} dB, choosing with the truth by {signed[1]} dB"
        )
    return f"{sentence}."


def _of_each_defense(cells: list[CellSummary]) -> str:
    """States the best cell of each defense: that none is the best of all says nothing."""
    best: dict[str, CellSummary] = {}
    for cell in sorted(cells, key=lambda c: -c.mean.mean):
        best.setdefault(cell.asked["defense"], cell)
    order = [best[name] for name in dict.fromkeys(c.asked["defense"] for c in cells)]
    said = [f"{cell.heading} {number_text(cell.mean.mean, 1)} dB" for cell in order]
    baseline = number_text(order[0].baseline("psnr"), 1)
    return f"Best of each defense, on average: {'; '.join(said)}; a mean-color image {baseline} dB."


def _consensus_sentence(study: StudySummary) -> str:
    """States what averaging seeds changes against picking one: in the best cell, and at most."""
    known = [c for c in study.cells if len(c.seeds) > 1 and np.isfinite(c.mean.mean)]
    known = [c for c in known if np.isfinite(c.gain(_average(c)).value)]
    if not known:
        return ""
    best = max(known, key=lambda c: c.mean.mean)
    most = max(known, key=lambda c: c.gain(_average(c)).value)
    count, where = quarter(len(best.seeds)), f" at {best.heading}" if len(study.cells) > 1 else ""
    seeds = f"{len(best.seeds)} seeds"
    averaged = f"the {count} of {seeds} with the lowest objectives" if count > 1 else f"all {seeds}"
    gain = best.gain(_average(best))
    unseen = gain.low <= 0 <= gain.high
    verdict = "changes nothing that these targets can show" if unseen else "changes PSNR"
    sentence = f"Averaging {averaged} instead of picking one {verdict}{where}: {_gains(best)}"
    if most is not best:
        sentence += f"; at {most.heading}: {_gains(most)}"
    return f"{sentence}{'; one target, no interval' if math.isnan(gain.low) else ''}."


def _average(cell: CellSummary) -> BestOfK:
    """The mean of the best quarter; of all seeds where the quarter is the pick."""
    return cell.consensus.quarter if quarter(len(cell.seeds)) > 1 else cell.consensus.all


def _gains(cell: CellSummary) -> str:
    """What averaging changes, and where that was of the best quarter what averaging all does."""
    words = _signed(cell.gain(_average(cell)))
    if quarter(len(cell.seeds)) > 1:
        words += f" (all {len(cell.seeds)}: {_signed(cell.gain(cell.consensus.all))})"
    return words


def _signed(gain: Interval) -> str:
    """A difference in dB with its sign and its interval over targets."""
    limits = interval_text(gain.low, gain.high, 1)
    return f"{gain.value:+.1f} dB{' ' + limits if limits else ''}".replace("-", "−")
