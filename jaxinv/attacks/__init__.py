"""Attacks: an `init` and a `step` (`base.Attack`), or a closed form, pure functions of one trial.

A named attack is a name for settings, each of which can be given anew, of one of three families:
gradient matching, second order (Gauss-Newton, annealed or smoothed), or a closed form, which has
next to none.
Only `engine/trials.py` loops.
"""

from jaxinv.attacks import analytic, spear

# (module, variables, target, images, image_shape, key) -> analytic.Recovered
CLOSED_FORM = {"analytic": analytic.attack, "spear": spear.attack}

SECOND_ORDER = ("bayes", "smoothed_bayes")

# The settings that each family has no use for: to give one is an error.
_OF_MATCHING = {
    "tv", "tv_isotropic", "tv_color", "norm", "statistics", "group", "features", "order",
    "optimizer", "sign", "lr", "schedule", "box", "gram",
}  # fmt: skip
_OF_ANNEALED = {"anneal_from", "anneal_to", "damping", "tolerance", "posterior"}
_OF_SMOOTHED = {"draws", "inflation"}
_OF_SECOND_ORDER = {"image_prior", "cg_iterations"} | _OF_ANNEALED | _OF_SMOOTHED


def unused_settings(attack: str) -> set[str]:
    """The settings that an attack does not read."""
    if attack in CLOSED_FORM:
        return _OF_MATCHING | _OF_SECOND_ORDER | {"init", "iterations", "polish", "told"}
    if attack in SECOND_ORDER:
        return _OF_MATCHING | (_OF_SMOOTHED if attack == "bayes" else _OF_ANNEALED)
    return _OF_SECOND_ORDER


_EUCLIDEAN = {
    "objective": "l2", "optimizer": "lbfgs", "sign": "none", "schedule": "constant", "box": False,
    "tv": 0.0,
}  # fmt: skip

ATTACKS = {
    # Geiping et al. 2020, arXiv 2003.14053: the defaults of all settings.
    "geiping": {},
    # Zhu et al. 2019, arXiv 1906.08935: images and labels together.
    "dlg": _EUCLIDEAN | {"labels": "joint"},
    # The same with known labels: the baseline of Geiping et al. 2020, Table 1.
    "euclidean": _EUCLIDEAN,
    # Yin et al. 2021, arXiv 2104.07586.
    "gradinversion": {
        "objective": "l2", "sign": "none", "schedule": "cosine", "tv": 1e-4, "norm": 1e-6,
        "statistics": 0.1, "group": 0.01,
    },
    # The "modern" settings of breaching (Geiping et al. 2022).
    "modern": {
        "sign": "soft", "schedule": "cosine", "init": "patterned", "tv": 0.0, "tv_color": 0.1,
        "features": 0.1,
    },
    # Annealed Gauss-Newton to the most probable image under a Gaussian image prior.
    "bayes": {
        "objective": "l2", "tv": 0.0, "init": "mean", "iterations": 28, "posterior": 32,
    },
    # Smoothed Gauss-Newton: the same for networks with ReLUs, whose kinks it rounds off.
    "smoothed_bayes": {
        "objective": "l2", "tv": 0.0, "init": "mean", "iterations": 24, "cg_iterations": 30,
    },
    **{name: {"tv": 0.0} for name in CLOSED_FORM},
}  # fmt: skip
