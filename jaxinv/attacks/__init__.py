"""Attacks: an `init` and a `step` (`base.Attack`), or a closed form, pure functions of one trial.

A named attack is a name for settings, each of which can be given anew, of one of three families:
gradient matching, second order (Gauss-Newton, annealed or smoothed), or a closed form, which has
next to none.
Only `engine/trials.py` loops.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn

from jaxinv.attacks import (
    analytic,
    gauss_newton,
    gradient_matching,
    imprint,
    learned_inverter,
    patches,
    smoothed_gauss_newton,
    spear,
    unmix,
)
from jaxinv.attacks.base import Family
from jaxinv.attacks.closed_form import ClosedForm
from jaxinv.networks.inspect import dense_layers
from jaxinv.types import PyTree


def _of_dense(
    module: nn.Module, variables: PyTree, image_shape: tuple[int, int, int], images: int
) -> None:
    """Raises a UserError unless the network's first layer is dense."""
    del images
    dense_layers(module, variables, image_shape)


CLOSED_FORM = {
    "analytic": ClosedForm(analytic.attack, _of_dense),
    "spear": ClosedForm(spear.attack, _of_dense),
    "unmix": ClosedForm(unmix.attack, unmix.check),
    "patches": ClosedForm(patches.attack, patches.check),
    "imprint": ClosedForm(imprint.attack, imprint.check),
    "learned": ClosedForm(learned_inverter.attack, learned_inverter.check),
}


class Named(NamedTuple):
    """An entry of `ATTACKS`."""

    family: Family
    settings: Mapping[str, Any]  # what it takes for the defaults of all others


_EUCLIDEAN = {
    "objective": "l2",
    "optimizer": "lbfgs",
    "sign": "none",
    "schedule": "constant",
    "box": False,
    "tv": 0.0,
}

_CLOSED = Family(None, frozenset(), local_steps=False, joint_labels=False)
_TRAINED = _CLOSED._replace(reads=frozenset({"inverter"}))

ATTACKS = {
    # Geiping et al. 2020, arXiv 2003.14053: the defaults of all settings.
    "geiping": Named(gradient_matching.FAMILY, {}),
    # Zhu et al. 2019, arXiv 1906.08935: images and labels together.
    "dlg": Named(gradient_matching.FAMILY, _EUCLIDEAN | {"labels": "joint"}),
    # The same with known labels: the baseline of Geiping et al. 2020, Table 1.
    "euclidean": Named(gradient_matching.FAMILY, _EUCLIDEAN),
    # Yin et al. 2021, arXiv 2104.07586.
    "gradinversion": Named(
        gradient_matching.FAMILY,
        {
            "objective": "l2",
            "sign": "none",
            "schedule": "cosine",
            "tv": 1e-4,
            "prior_l2": 1e-6,
            "prior_batch_norm": 0.1,
            "prior_group": 0.01,
        },
    ),
    # The "modern" settings of breaching (Geiping et al. 2022).
    "modern": Named(
        gradient_matching.FAMILY,
        {
            "sign": "soft",
            "schedule": "cosine",
            "init": "patterned",
            "tv": 0.0,
            "tv_color": 0.1,
            "prior_features": 0.1,
        },
    ),
    # Annealed Gauss-Newton to the most probable image under a Gaussian image prior.
    "bayes": Named(
        gauss_newton.FAMILY,
        {"objective": "l2", "tv": 0.0, "init": "mean", "iterations": 28, "posterior": 32},
    ),
    # Smoothed Gauss-Newton: the same for networks with ReLUs, whose kinks it rounds off.
    "smoothed_bayes": Named(
        smoothed_gauss_newton.FAMILY,
        {"objective": "l2", "tv": 0.0, "init": "mean", "iterations": 24, "cg_iterations": 30},
    ),
    **{name: Named(_CLOSED, {"tv": 0.0}) for name in CLOSED_FORM},
    # Wu et al. 2023, arXiv 2210.10880.
    "learned": Named(_TRAINED, {"tv": 0.0}),
}


# Of an attack's own class.
FAMILIES = {
    gradient_matching.Method: gradient_matching.FAMILY,
    gauss_newton.GaussNewton: gauss_newton.FAMILY,
    smoothed_gauss_newton.SmoothedGaussNewton: smoothed_gauss_newton.FAMILY,
}

BEST = "best"


def strongest(
    *,
    kinked: bool,
    trained: bool,
    imprinted: bool = False,
    patched: bool = False,
    adaptive: bool = False,
    asks: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The settings of `--attack best`: what has won on such networks (docs/results.md).

    Args:
      kinked: whether the network has kinks.
      trained: whether it has seen data.
      imprinted: whether the server has put an imprint in front of it.
      patched: whether it embeds patches, and one image's gradient comes undefended.
      adaptive: whether the attack is to adapt to a defense.
      asks: what it has to fit, as `Family.unfit` takes it.
    """
    wins = {
        "imprint": imprinted,
        "patches": patched,
        "bayes": not kinked,
        "smoothed_bayes": kinked and not trained,
    }
    for attack, is_won in wins.items():
        family = ATTACKS[attack].family
        adapts = not adaptive or "adaptive" in family.reads
        if is_won and adapts and not family.unfit(**asks):
            return {"attack": attack}
    return {"attack": "geiping", "representation": "generator"}


def unused_settings(attack: str) -> set[str]:
    """The settings of other attacks that this one does not read: to give one is an error."""
    read = frozenset().union(*(named.family.reads for named in ATTACKS.values()))
    return set(read - ATTACKS[attack].family.reads)
