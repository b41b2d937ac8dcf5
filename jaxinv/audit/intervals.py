"""Exact intervals: of a share that was counted, and of a mean of numbers between 0 and 1."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

LEVEL = 0.95


class Share(NamedTuple):
    """A share, with an interval that holds it at least as often as its level says."""

    value: float
    low: float
    high: float
    trials: int  # independent ones

    def __str__(self) -> str:
        """In percent."""
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def clopper_pearson(successes: int, trials: int, level: float = LEVEL) -> Share:
    """Computes the exact interval of a binomial share.

    Args:
      successes: of `trials` independent ones.
      trials: their number; at 0 the share is NaN, between 0 and 1.
      level: that each two-sided interval holds.

    References: Clopper & Pearson 1934 (Biometrika 26).
    """
    if trials == 0:
        return Share(math.nan, 0.0, 1.0, 0)
    tail = (1 - level) / 2
    return Share(successes / trials, *_limits(successes, successes, trials, tail), trials)


def mean_share(values: Float[np.ndarray, " trial"]) -> Share:
    """Computes an exact interval of the mean of independent numbers between 0 and 1.

    For the recall of an update of several images, which stand and fall together: one number an
    update, whatever depends on what within it. Of zeros and ones it is `clopper_pearson`. Else the
    tail of the sum is at most e times that of a binomial count with the same mean.

    References: Bentkus 2004 (Ann. Probab. 32); as a confidence interval: Bates et al. 2021,
      arXiv 2101.02703, section 3.1.
    """
    values = np.asarray(values, float)
    total, trials = float(values.sum()), len(values)
    if np.isin(values, (0.0, 1.0)).all():
        return clopper_pearson(round(total), trials)
    tail = (1 - LEVEL) / 2 / math.e
    # Rounding of the sum must not cost a whole success.
    below, above = math.floor(total + 1e-9), math.ceil(total - 1e-9)
    return Share(total / trials, *_limits(below, above, trials, tail), trials)


def _limits(below: int, above: int, trials: int, tail: float) -> tuple[float, float]:
    """The shares under which counts from `below` up, and up to `above`, are as rare as `tail`."""

    def inverse(a, b, p):
        return float(special.betaincinv(a, b, p))

    low = 0.0 if below == 0 else inverse(below, trials - below + 1, tail)
    high = 1.0 if above == trials else inverse(above + 1, trials - above, 1 - tail)
    return low, high
