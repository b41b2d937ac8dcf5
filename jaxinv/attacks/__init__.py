"""Attacks: an `init` and a `step`, or a closed form, pure functions of one trial.

A published attack is a name for settings of `gradient_matching`, each of which can be given anew,
or a closed form, which has none. Only `trials.py` loops.
"""

from jaxinv.attacks import analytic, spear

# (module, variables, target, images, image_shape, key) -> analytic.Recovered
CLOSED_FORM = {"analytic": analytic.attack, "spear": spear.attack}

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
    **{name: {"tv": 0.0} for name in CLOSED_FORM},
}  # fmt: skip
