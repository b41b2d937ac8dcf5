"""The report's sections in the order of the page, each in the file of its figure or table.

A new figure or table is one file here, with its `SECTION`, and one entry in `SECTIONS`.
"""

from jaxinv.reporting.sections import (
    assumptions,
    best_of_k,
    defense_curves,
    defenses,
    dp_sgd,
    emergence,
    labels,
    leaderboard,
    likeness,
    paired_differences,
    per_target,
    pixel_statistics,
    posterior,
    psnr_by_step,
    psnr_by_target,
    psnr_distribution,
    reconstructions,
    spectrum,
    success_rate,
    summary,
    variance_components,
)

SECTIONS = tuple(
    module.SECTION
    for module in (
        summary,
        leaderboard,
        labels,
        psnr_distribution,
        psnr_by_target,
        psnr_by_step,
        reconstructions,
        emergence,
        pixel_statistics,
        likeness,
        best_of_k,
        variance_components,
        success_rate,
        posterior,
        spectrum,
        assumptions,
        paired_differences,
        defense_curves,
        defenses,
        dp_sgd,
        per_target,
    )
)
