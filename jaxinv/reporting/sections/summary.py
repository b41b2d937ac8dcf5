"""Section: one row per setting, with what each metric's mean over its trials is."""

import numpy as np

from jaxinv.reporting.columns import (
    Column,
    Definition,
    Row,
    Shown,
    Table,
    baseline_column,
    capacity_column,
    decimals,
    decimals_or_failed,
    name_columns,
    size_columns,
    with_interval,
)
from jaxinv.reporting.figures.panels import averages
from jaxinv.reporting.section import Section
from jaxinv.reporting.statistics import Interval, ranked_quantile, target_interval
from jaxinv.reporting.study import CellSummary
from jaxinv.reporting.wording import percent_text

BEST_OF_K = Definition(
    "Best of k",
    "The reconstruction chosen among k seeds of a target. The attacker chooses by the lowest "
    "objective, the distance between the updates, and never sees the truth. The oracle chooses by "
    "the highest PSNR; nobody can do that without the truth. “Best” in the tables is the best of "
    "all {seeds}.",
)
CONSENSUS = Definition(
    "Consensus",
    "The mean image of the best quarter of a target’s seeds by the objective, rounded up "
    "({quarter} of {seeds}), or of all of them; on one draw of noise, if there are several. It "
    "needs no truth, and where seeds err independently their mean errs less than any of them. The "
    "images of a batch are first set in the order of the pick’s by least squared error and "
    "averaged; the means are matched to the truths. Failed seeds are left out. From the stored "
    "8-bit pictures; where the seeds’ errors are too small for these (above 50 dB), the mean of "
    "their recorded errors stands in, which the mean image’s does not exceed.",
)


def metric_column(name: str, head: str, digits: int, definition: Definition) -> Column:
    """Makes the column of a metric's mean over a cell's trials: `name` as in `metrics.Scores`."""
    column = f"{name}_mean"
    return Column(
        column,
        lambda cell: cell.mean_of(name),
        head,
        decimals(column, digits),
        baseline=lambda cell: cell.baseline(name),
        definition=definition,
    )


def best_columns(value) -> tuple[Column, ...]:
    """Makes the columns of what is made of all seeds; `value` gives a choice's PSNR in dB."""

    def several(study):
        return study.has_choice

    def beyond_pick(study):
        return averages(study.cells)

    attacker, oracle, quarter, everything = (
        (f"psnr_{name}", lambda item, name=name: value(item, name))
        for name in ("attacker_best", "oracle_best", "consensus_quarter", "consensus_all")
    )

    def column(named, head, **options):
        return Column(*named, head, decimals_or_failed(named[0]), **options)

    return (
        column(attacker, "pick", when=several, terminal=True, definition=BEST_OF_K),
        column(quarter, "consensus\nbest ¼", when=beyond_pick, terminal=True, definition=CONSENSUS),
        column(everything, "consensus\nall", when=several, definition=CONSENSUS),
        column(oracle, "oracle", when=several, terminal=True),
    )


def choice(cell: CellSummary, name: str):
    """What is made of a cell's seeds, by the name of its column."""
    return {
        "attacker_best": cell.pick,
        "consensus_quarter": cell.consensus.quarter,
        "consensus_all": cell.consensus.all,
        "oracle_best": cell.oracle,
    }[name]


def _labels_right(row: Row) -> Shown:
    return Shown(percent_text(row["label_accuracy"], 0))


SUMMARY = Table(
    lambda study: study.cells,
    (
        *name_columns("PSNR in dB"),
        *size_columns(),
        capacity_column(),
        *with_interval(
            "psnr_mean",
            lambda cell: Interval(*cell.mean[:3]),
            "mean\n[95%]",
            ends="psnr",
            of_limits=1,
            terminal=True,
            baseline=lambda cell: Interval(*target_interval(cell.baselines["baseline_psnr"])),
            definition=Definition(
                "Mean and its interval",
                "Mean over all trials of a cell; 95% Student t interval of the means per target. "
                "It covers further targets drawn like these, which more seeds cannot replace. One "
                "target has no interval.",
            ),
        ),
        Column(
            "psnr_seed_std",
            lambda cell: cell.mean.seed_std,
            "seed\nstd",
            decimals("psnr_seed_std"),
            when=lambda study: study.has_choice,
            terminal=True,
            definition=Definition(
                "Seed std",
                "Standard deviation between the seeds of one target, variances pooled over "
                "targets.",
            ),
        ),
        *best_columns(lambda cell, name: float(choice(cell, name).mean[-1])),
        baseline_column(),
        *with_interval(
            "success_rate",
            lambda cell: Interval(*cell.success[:3]),
            "above\n{threshold} dB\n[95%]",
            ends="success",
            shares=True,
            digits=0,
            terminal=True,
            baseline=lambda cell: Interval(
                (cell.baselines["baseline_psnr"] > cell.success_psnr).mean(), np.nan, np.nan
            ),
            definition=Definition(
                "Above {threshold} dB",
                "Share of trials with PSNR above the threshold. 95% Wilson interval at Kish’s "
                "effective number of trials n / (1 + (seeds − 1) ICC), with the intraclass "
                "correlation of the successes; where that is undefined, at the number of targets.",
            ),
        ),
        Column(
            "psnr_median",
            lambda cell: float(ranked_quantile(cell.psnr.ravel(), 0.5)),
            "median",
            decimals("psnr_median"),
            baseline=lambda cell: float(np.median(cell.baselines["baseline_psnr"])),
        ),
        metric_column(
            "ssim",
            "SSIM",
            3,
            Definition(
                "SSIM",
                "Structural similarity with a Gaussian window of σ = 1.5, K₁ = 0.01, K₂ = 0.03, "
                "data range 1, as in dm-pix; mean over channels and images.",
            ),
        ),
        metric_column(
            "mse",
            "MSE",
            4,
            Definition("MSE", "Mean squared error of the pixels in [0, 1]; mean over images."),
        ),
        Column(
            "label_accuracy",
            lambda cell: cell.mean_of("label_accuracy"),
            "labels\nright",
            _labels_right,
            definition=Definition(
                "Labels that are right",
                "What the labels found and the true ones have in common, repeats counted, over "
                "their number: the order of a batch is in no update.",
            ),
        ),
        Column("success_psnr", lambda cell: cell.success_psnr, baseline=lambda c: c.success_psnr),
        Column("update_cosine", lambda cell: cell.mean_of("update_cosine")),
        Column("effective_trials", lambda cell: cell.success.effective_trials),
    ),
    baselines=lambda study: study.distinct_baselines,
)

SECTION = Section(
    name="summary",
    title="Results",
    table=SUMMARY,
    note="Intervals are over targets. Every number is defined at the end of this page; the same "
    "tables are in the folder tables/.",
)
