"""Rows to numbers: one `CellSummary` per setting of a sweep, with every statistic of the report."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxinv import defenses
from jaxinv.attacks import ATTACKS, unused_settings
from jaxinv.errors import UserError
from jaxinv.reporting import consensus as cs
from jaxinv.reporting import statistics as st
from jaxinv.reporting.wording import without_folders
from jaxinv.runs.results import BASELINES, METRICS, BlockImages, Run, target_ids_of
from jaxinv.settings.naming import heading_text, label_text, naming_settings

_FACTS = ("defense", "victim", "victim_accuracy", "victim_epsilon", "victim_delta", "capacity")
_AVERAGED = ("objective", "psnr", "mse")  # what `consensus.Trials` has of each seed


@dataclass(frozen=True, eq=False)  # its arrays have no one truth value
class CellSummary:
    """Trials and statistics of one setting; a failed trial is NaN in every metric.

    Where the client's defense was drawn several times, "seed" runs over the seeds of the first
    draw, then those of the second, and so on.
    """

    number: int
    label: str  # "tv = 0.01"; network and data set where nothing varies
    settings: dict[str, Any]  # that name the cell among the others
    asked: dict[str, Any]  # all its settings
    target_ids: list[int]
    image_ids: list[list[int]]  # per target
    seeds: list[int]  # of the attack
    draws: list[int]  # noise seeds of the client's defense; one where it draws nothing
    facts: dict[str, Any]  # what all its rows say of defense and victim
    metrics: dict[str, Float[np.ndarray, "target seed"]]
    baselines: dict[str, Float[np.ndarray, " target"]]  # of an image of the data set's mean color
    failed: Bool[np.ndarray, "target seed"]
    success_psnr: float  # dB
    pictures: Callable[[], BlockImages]  # reads them from disk
    extras: Callable[[], dict[str, np.ndarray]]  # what is beside them, of some attacks

    @property
    def heading(self) -> str:
        """The label in fewer words, for where there is little room."""
        unused = unused_settings(self.asked["attack"])
        own = {name: value for name, value in self.settings.items() if name not in unused}
        return heading_text(own) or self.label

    def behind(self, target_id: int) -> tuple[str, tuple[int, ...]]:
        """The data set and the images of a target, which its number alone does not say."""
        return self.asked["dataset"], tuple(self.image_ids[self.target_ids.index(target_id)])

    @property
    def attacked(self) -> list[tuple[str, tuple[int, ...]]]:
        """What is behind each target."""
        return [self.behind(target) for target in self.target_ids]

    @property
    def psnr(self) -> Float[np.ndarray, "target seed"]:
        """PSNR in dB; inf when exact."""
        return self.metrics["psnr"]

    @property
    def exact(self) -> Bool[np.ndarray, "target seed"]:
        """Trials that reconstructed every pixel exactly."""
        return np.isposinf(self.psnr)

    @cached_property
    def mean(self) -> st.MeanInterval:
        """Mean PSNR, its interval over targets, spread between the seeds on one update."""
        by_update = self.psnr.reshape(-1, len(self.seeds))
        spread = st.mean_interval(by_update).seed_std
        return st.mean_interval(self.psnr)._replace(seed_std=spread)

    @cached_property
    def components(self) -> st.VarianceComponents:
        """Variance of PSNR between targets, between draws of noise and between seeds."""
        return st.variance_components(
            self.psnr.reshape(len(self.target_ids), len(self.draws), len(self.seeds))
        )

    @cached_property
    def pick(self) -> st.BestOfK:
        """Best of k by the attack's own objective."""
        return st.best_of_k(self.psnr, self.metrics["objective"], draws=len(self.draws))

    @cached_property
    def oracle(self) -> st.BestOfK:
        """Best of k by PSNR, which only somebody with the truth can choose."""
        return st.best_of_k(self.psnr, -self.psnr, draws=len(self.draws))

    @cached_property
    def consensus(self) -> cs.Consensus:
        """Mean images of k seeds. Reads the cell's pictures, unless there is nothing to average."""
        if len(self.seeds) == 1:
            return cs.Consensus(self.pick, self.pick, self.psnr[:, 0])
        images = self.pictures()
        return cs.curves(self.trials(images, target) for target in self.target_ids)

    def trials(self, images: BlockImages, target_id: int) -> list[cs.Trials]:
        """One target's trials with their pictures, of each draw of noise."""
        at, seeds = self.target_ids.index(target_id), len(self.seeds)
        places = np.flatnonzero(images.target_ids == target_id)
        return [
            cs.Trials(
                images.reconstructions[place],
                images.truths[place],
                *(self.metrics[name][at, draw * seeds :][:seeds] for name in _AVERAGED),
            )
            for draw, place in enumerate(places)
        ]

    def gain(self, best: st.BestOfK) -> st.Interval:
        """PSNR in dB of a consensus of all seeds minus the pick's, paired over targets."""
        pick = self.pick.per_target[:, -1:]
        return st.paired_difference(best.per_target[:, -1:], pick)

    @cached_property
    def success(self) -> st.SuccessRate:
        """Share of trials above the threshold."""
        return st.success_rate(self.psnr, self.success_psnr)

    @cached_property
    def pick_seed(self) -> np.ndarray:
        """Seed position [target] of the lowest objective, first draw; -1 where all failed."""
        return st.choose_lowest(self.metrics["objective"][:, : len(self.seeds)])

    @cached_property
    def oracle_seed(self) -> np.ndarray:
        """Seed position [target] of the highest PSNR, first draw; -1 where all failed."""
        return st.choose_lowest(-self.psnr[:, : len(self.seeds)])

    def mean_of(self, metric: str) -> float:
        """Mean of a metric over all trials; NaN where one failed."""
        return st.mean_interval(self.metrics[metric]).mean

    @cached_property
    def labels_right(self) -> st.Interval:
        """Share of labels that the attacker has right, its interval over targets."""
        return st.Interval(*st.mean_interval(self.metrics["label_accuracy"])[:3])

    def baseline(self, metric: str) -> float:
        """Mean over targets of the mean-color baseline's `psnr`, `ssim` or `mse`."""
        return float(self.baselines[f"baseline_{metric}"].mean())


class Pair(NamedTuple):
    """A cell against another on the same targets and seeds."""

    cell: CellSummary
    reference: CellSummary
    difference: st.Interval  # of PSNR in dB, over targets


@dataclass(frozen=True, eq=False)  # itself, so that what is computed of it can be kept by it
class StudySummary:
    """A run with its cells, as tables, plots and page read it."""

    run: Run
    cells: list[CellSummary]

    @property
    def target_ids(self) -> list[int]:
        """Targets that some cell has finished, in the study's order."""
        return targets_of(self.cells)

    @property
    def planned_trials(self) -> int:
        """Trials the whole study was asked for."""
        config = self.run.config
        draws = len(config["noise_seeds"])
        chains = [defenses.parse(cell["defense"]) for cell in config["cells"]]
        updates = sum(draws if defenses.is_random(chain) else 1 for chain in chains)
        return updates * len(config["target_ids"]) * len(config["seeds"])

    @property
    def finished_trials(self) -> int:
        """Trials there are, failed ones included."""
        return sum(cell.failed.size for cell in self.cells)

    @property
    def failed_trials(self) -> int:
        """Trials that turned non-finite."""
        return int(sum(cell.failed.sum() for cell in self.cells))

    @property
    def has_spread(self) -> bool:
        """Whether some target was attacked more than once, and so tells luck from the image."""
        return any(cell.psnr.shape[1] > 1 for cell in self.cells)

    @property
    def has_choice(self) -> bool:
        """Whether some update was attacked from several seeds, among which one can choose."""
        return any(len(cell.seeds) > 1 for cell in self.cells)

    @property
    def has_exact(self) -> bool:
        """Whether some trial reconstructed every pixel exactly."""
        return any(cell.exact.any() for cell in self.cells)

    @property
    def has_draws(self) -> bool:
        """Whether some client's defense was drawn several times."""
        return any(len(cell.draws) > 1 for cell in self.cells)

    @property
    def without_labels(self) -> list[CellSummary]:
        """Cells whose labels the attacker does not know."""
        return [cell for cell in self.cells if cell.asked["labels"] != "known"]

    @property
    def distinct_baselines(self) -> list[CellSummary]:
        """First cell of each distinct set of baseline values."""
        seen: dict[tuple, CellSummary] = {}
        for cell in self.cells:
            seen.setdefault(tuple(cell.baselines["baseline_psnr"]), cell)
        return list(seen.values())

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every later cell against the first, where both have the same images and seeds."""
        first, *others = self.cells
        return [
            Pair(cell, first, st.paired_difference(cell.psnr, first.psnr))
            for cell in others
            if (cell.attacked, cell.seeds) == (first.attacked, first.seeds)
        ]

    def baseline_of(self, target_id: int) -> float:
        """Baseline PSNR in dB of one target; NaN where cells attack other images under its number.

        Raises:
          KeyError: no cell has it.
        """
        own = [cell for cell in self.cells if target_id in cell.target_ids]
        if not own:
            raise KeyError(target_id)
        if len({cell.behind(target_id) for cell in own}) > 1:
            return math.nan
        return float(own[0].baselines["baseline_psnr"][own[0].target_ids.index(target_id)])


def targets_of(cells: Sequence[CellSummary]) -> list[int]:
    """Targets that some of the cells have, in their order."""
    return list(dict.fromkeys(t for cell in cells for t in cell.target_ids))


def summarize(run: Run, success_psnr: float) -> StudySummary:
    """Arranges a run's rows as cells.

    Raises:
      UserError: a cell lacks some seed of a target, which no finished block does, or names an
        attack or a defense that this process does not know.
    """
    for cell in run.config["cells"]:
        try:
            defenses.parse(cell["defense"])
            if cell["attack"] not in ATTACKS:
                raise ValueError(f"unknown attack {cell['attack']}")
        except ValueError as error:
            raise UserError(
                f"{run.folder}: {error}; one of your own is to be entered before "
                "`jaxinv.report.build` is called"
            ) from None
    return StudySummary(
        run, [_cell(run, int(number), success_psnr) for number in np.unique(run.trials["cell"])]
    )


def _read_pictures(run: Run, number: int, target_ids: list[int]) -> BlockImages:
    """Reads a cell's pictures, which must have all its targets."""
    images = run.images(number)
    if lacking := set(target_ids) - set(images.target_ids.tolist()):
        raise UserError(
            f"{run.folder}/images: cell {number} has no pictures of target {min(lacking)}; delete "
            "the cell's files in trials/ and run the sweep's command again"
        )
    return images


def traces(
    study: StudySummary, cell: CellSummary, target_ids: list[int]
) -> tuple[np.ndarray, dict[int, Float[np.ndarray, "seed step"]]]:
    """Collects PSNR by step for some targets of a cell.

    Returns:
      The steps, and per target the PSNR of every seed, NaN where not measured.
    """
    rows = study.run.traces
    at = np.flatnonzero((rows["cell"] == cell.number) & np.isin(rows["target_id"], target_ids))
    known = np.isin(rows["seed"][at], cell.seeds) & np.isin(rows["noise_seed"][at], cell.draws)
    if not known.all():
        raise _damaged(study.run.folder, cell.number)
    steps, step_of = np.unique(rows["step"][at], return_inverse=True)
    trials = len(cell.draws) * len(cell.seeds)
    curves = {t: np.full((trials, len(steps)), np.nan) for t in target_ids}
    seed_of = _position(cell.draws, cell.seeds, rows["noise_seed"][at], rows["seed"][at])
    for target, curve in curves.items():
        mine = rows["target_id"][at] == target
        curve[seed_of[mine], step_of[mine]] = rows["psnr"][at][mine]
    return steps, curves


def _damaged(folder: Path, number: int) -> UserError:
    """The one line on a cell that lacks rows or has them twice."""
    return UserError(
        f"{folder}: cell {number} does not hold each seed of each target once; delete its files in "
        "trials/ and run the sweep's command again"
    )


def _position(draws: list[int], seeds: list[int], noise_seed: Any, seed: Any) -> np.ndarray:
    """Where trials stand among those of their target."""
    return np.searchsorted(draws, noise_seed) * len(seeds) + np.searchsorted(seeds, seed)


def _without_folders(values: dict[str, Any]) -> dict[str, Any]:
    """Names checkpoints that were given by path without the path."""
    return {k: without_folders(v) if isinstance(v, str) else v for k, v in values.items()}


def _cell(run: Run, number: int, success_psnr: float) -> CellSummary:
    """Arranges one cell's rows as [target, seed] arrays."""
    rows = {name: column[run.trials["cell"] == number] for name, column in run.trials.items()}
    there = dict.fromkeys(rows["target_id"].tolist())
    ids = [t for t in target_ids_of(run.config, number) or there if t in there]
    seeds = sorted(set(rows["seed"].tolist()))
    draws = sorted(set(rows["noise_seed"].tolist()))
    shape = len(ids), len(draws) * len(seeds)
    at = _position(draws, seeds, rows["noise_seed"], rows["seed"])
    place = [ids.index(t) for t in rows["target_id"]], at
    counts = np.zeros(shape, int)
    np.add.at(counts, place, 1)
    if (counts != 1).any():
        raise _damaged(run.folder, number)
    status = np.empty(shape, dtype=object)
    status[place] = rows["status"]
    failed = status == "nonfinite"
    columns = {}
    for name in METRICS + BASELINES:
        columns[name] = np.empty(shape)
        columns[name][place] = rows[name]
    first = [int(np.flatnonzero(rows["target_id"] == t)[0]) for t in ids]
    asked = run.config["cells"][number]
    settings = _without_folders(naming_settings(run.config["axes"], run.config["cells"], number))
    return CellSummary(
        number=number,
        label=label_text(settings) or f"{rows['model'][0]} on {rows['dataset'][0]}",
        settings=settings,
        asked=asked,
        target_ids=ids,
        image_ids=[[int(i) for i in rows["image_ids"][row]] for row in first],
        seeds=seeds,
        draws=draws,
        facts=_without_folders({name: rows[name][0] for name in _FACTS}),
        metrics={name: np.where(failed, np.nan, columns[name]) for name in METRICS},
        baselines={name: columns[name][:, 0] for name in BASELINES},
        failed=failed,
        success_psnr=success_psnr,
        pictures=lambda: _read_pictures(run, number, ids),
        extras=lambda: run.extras(number),
    )


def choose_evenly(items: list, most: int) -> list:
    """Keeps at most `most` items, spread evenly, first and last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]
