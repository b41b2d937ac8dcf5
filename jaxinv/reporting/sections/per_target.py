"""Section: one row per setting and target, the target's baseline beside it."""

from jaxinv.reporting.columns import (
    Column,
    Table,
    baseline_column,
    decimals,
    failure_columns,
    name_columns,
)
from jaxinv.reporting.section import Section
from jaxinv.reporting.sections.summary import best_columns, choice
from jaxinv.reporting.statistics import mean_interval, ranked_quantile
from jaxinv.reporting.study import StudySummary


def _targets(study: StudySummary) -> list[tuple]:
    """Every cell with the place of each of its targets."""
    return [(cell, at) for cell in study.cells for at in range(len(cell.target_ids))]


def _psnr(name: str, head: str, value) -> Column:
    """A column in dB, computed from a target's PSNR [1, seed]."""
    return Column(
        name, lambda item: float(value(item[0].psnr[item[1]][None])), head, decimals(name)
    )


SECTION = Section(
    name="per_target",
    title="By target",
    folded="Table of every target and setting, PSNR in dB",
    table=Table(
        _targets,
        (
            *name_columns("setting", lambda item: item[0]),
            Column("target", lambda item: item[0].target_ids[item[1]], "target"),
            Column("images", lambda item: " ".join(map(str, item[0].image_ids[item[1]]))),
            Column("seeds", lambda item: len(item[0].seeds)),
            *failure_columns(
                lambda item: int(item[0].failed[item[1]].sum()),
                lambda item: int(item[0].exact[item[1]].sum()),
            ),
            _psnr("psnr_mean", "mean", lambda psnr: mean_interval(psnr).mean),
            _psnr("psnr_seed_std", "seed\nstd", lambda psnr: mean_interval(psnr).seed_std),
            _psnr("psnr_median", "median", lambda psnr: ranked_quantile(psnr[0], 0.5)),
            _psnr("psnr_worst", "worst", lambda psnr: ranked_quantile(psnr[0], 0.0)),
            *best_columns(lambda item, name: float(choice(item[0], name).per_target[item[1], -1])),
            baseline_column(value=lambda item: float(item[0].baselines["baseline_psnr"][item[1]])),
        ),
    ),
)
