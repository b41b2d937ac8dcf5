"""Differential privacy audited: the epsilon that an attack has shown, beside the one promised.

An attacker who names the one true image of N equally likely candidates with probability p has told
the mechanism's output with the image from its output without, at a false positive rate of 1 / N on
average. Of a mu-GDP mechanism (a Gaussian one is, with mu = sqrt(steps) / multiplier) no attack
does better than p = Phi(Phi^-1(1/N) + mu) (`privacy.reconstruction_bound`). So

    mu >= Phi^-1(p_low) - Phi^-1(1/N)

with p_low the exact lower limit of what was counted, and epsilon(delta) of that mu is an empirical
lower bound: a training that promises less has an error in it.

References: Dong, Roth & Su 2022, arXiv 1905.02383 (GDP, corollary 2.13); Hayes, Mahloujifar & Balle
  2023, arXiv 2302.07225; Nasr et al. 2023, arXiv 2302.07956 (auditing through GDP).
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import integrate, optimize, special, stats

from jaxinv.audit.intervals import LEVEL, clopper_pearson

GAMES_AT_ONCE = 1000


class Bound(NamedTuple):
    """What some games have shown."""

    success: float
    low: float  # of the success, one-sided
    mu: float  # at least; 0 where nothing was shown
    epsilon: float  # at least, at `delta`
    delta: float
    games: int
    candidates: int


def lower_bound(successes: int, games: int, candidates: int, delta: float) -> Bound:
    """Bounds epsilon from below by the number of games that an attacker has won.

    Guarantees: of a mechanism that is (epsilon, delta)-private and mu-GDP, a bound above the truth
    comes at most with probability 1 - LEVEL, whatever the attack and the candidates are, as long as
    games are independent and each candidate equally likely.

    Args:
      successes: games in which the true candidate was named.
      games: independent ones.
      candidates: N of each, at least 2.
      delta: at which epsilon is asked for.
    """
    if candidates < 2:
        raise ValueError(f"candidates={candidates}: an attacker needs at least two to choose among")
    low = clopper_pearson(successes, games, 2 * LEVEL - 1).low  # one-sided
    mu = max(0.0, float(special.ndtri(low) - special.ndtri(1 / candidates))) if low > 0 else 0.0
    return Bound(successes / games, low, mu, gdp_epsilon(mu, delta), delta, games, candidates)


def gdp_delta(mu: float, epsilon: float) -> float:
    """The delta of a mu-GDP mechanism at an epsilon: corollary 2.13 of Dong, Roth & Su."""
    if mu == 0:
        return 0.0
    return float(
        stats.norm.cdf(-epsilon / mu + mu / 2)
        - math.exp(epsilon + stats.norm.logcdf(-epsilon / mu - mu / 2))
    )


def gdp_epsilon(mu: float, delta: float) -> float:
    """The least epsilon at which a mu-GDP mechanism has this delta."""
    if mu == 0 or gdp_delta(mu, 0.0) <= delta:
        return 0.0
    most = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1  # a Gaussian's tail bound
    return float(optimize.brentq(lambda e: gdp_delta(mu, e) - delta, 0.0, most, xtol=1e-9))


def expected_success(candidates: int, mu: float) -> float:
    """How often the matched filter names the one of N orthogonal gradients at the clipping norm.

    E Phi(t + mu)^(N - 1), t standard normal: its score is N(mu, 1) and all others are N(0, 1).
    """

    def density(t):
        return math.exp(stats.norm.logpdf(t - mu) + (candidates - 1) * special.log_ndtr(t))

    return float(integrate.quad(density, -10, mu + 12, limit=500, points=[mu, mu + 2])[0])


def informed_scores(
    rows: Float[np.ndarray, "step candidate entry"], targets: np.ndarray, std: float, seed: int
) -> Float[np.ndarray, "game candidate"]:
    """Plays an informed adversary's games: log-likelihood ratios over the steps of a training.

    The adversary knows all examples but one, and subtracts their clipped gradients from what each
    step releases: left are the target's own and the noise of the sum. With g the candidate's
    clipped gradient the log-likelihood ratio against its absence is, summed over the steps,

        (<g, released> - |g|^2 / 2) / std^2.

    Args:
      rows: clipped gradients of the candidates at the parameters of each step.
      targets: int [game], the true candidate of each.
      std: of the noise on each entry of the sum: multiplier x clipping norm.
      seed: of the noise.
    """
    random = np.random.default_rng(seed)
    count, entries = rows.shape[1:]
    total = np.zeros((len(targets), count), np.float32)
    for own in rows:
        half = np.square(own).sum(axis=1) / 2
        for start in range(0, len(targets), GAMES_AT_ONCE):
            some = slice(start, start + GAMES_AT_ONCE)
            noise = random.standard_normal((len(targets[some]), entries), np.float32)
            total[some] += (own[targets[some]] + np.float32(std) * noise) @ own.T - half
    return total / np.float32(std**2)
