"""What DP-SGD is worth, and what no attack can exceed.

Each example is in a batch with probability q = batch / examples, alone (Poisson sampling). Two data
sets are neighbors when one has an example more than the other.

References: Abadi et al. 2016, arXiv 1607.00133 (the mechanism: `gradient.py`).
"""

import functools
import logging
import math
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

from jaxinv.errors import UserError

ACCOUNTANTS = ("pld", "rdp")
ASSUMPTIONS = "Poisson sampling, neighbors by adding or removing an example"
LEAST_NOISE, MOST_NOISE = 0.2, 1e4  # multipliers between which one is searched
PLD_INTERVAL = 1e-4  # of the discretized privacy loss


class Mechanism(NamedTuple):
    """The mechanism that a training or one release is."""

    multiplier: float  # of the noise, in units of the clipping norm
    rate: float = 1.0  # probability with which an example is in a batch
    steps: int = 1


def _event(mechanism: Mechanism):
    """The mechanism in dp-accounting's terms (imported when needed: it takes a second)."""
    import dp_accounting as dpa

    event = dpa.GaussianDpEvent(mechanism.multiplier)
    if mechanism.rate < 1:
        event = dpa.PoissonSampledDpEvent(mechanism.rate, event)
    return dpa.SelfComposedDpEvent(event, mechanism.steps)


def _accountant(kind: str):
    from dp_accounting import pld, rdp

    # It warns of every order of the Rényi divergence that it leaves out.
    logging.getLogger("absl").setLevel(logging.ERROR)
    if kind == "rdp":
        return rdp.RdpAccountant()
    return pld.PLDAccountant(value_discretization_interval=PLD_INTERVAL)


@functools.lru_cache(maxsize=256)
def epsilon(mechanism: Mechanism, delta: float, accountant: str = "pld") -> float:
    """Computes epsilon at a delta, by dp-accounting; inf without noise.

    Args:
      mechanism: the mechanism, under `ASSUMPTIONS`.
      delta: above 0.
      accountant: "pld" (privacy loss distribution, tight) or "rdp" (Rényi, an upper bound).
    """
    if mechanism.multiplier == 0:
        return math.inf
    return float(_accountant(accountant).compose(_event(mechanism)).get_epsilon(delta))


def calibrate(
    target_epsilon: float, delta: float, rate: float, steps: int, accountant: str
) -> float:
    """Finds the least noise multiplier whose epsilon does not exceed the target.

    Raises:
      UserError: there is none up to `MOST_NOISE`.
    """

    from dp_accounting import ExplicitBracketInterval, calibrate_dp_mechanism

    def epsilon_at(multiplier):
        return epsilon(Mechanism(multiplier, rate, steps), delta, accountant)

    if epsilon_at(MOST_NOISE) > target_epsilon:
        raise UserError(f"--target-epsilon {target_epsilon:g}: no noise reaches it; give more")
    if epsilon_at(LEAST_NOISE) <= target_epsilon:
        raise UserError(
            f"--target-epsilon {target_epsilon:g}: hardly any noise is needed; give less, or "
            "--noise-multiplier"
        )
    multiplier = calibrate_dp_mechanism(
        lambda: _accountant(accountant),
        lambda multiplier: _event(Mechanism(multiplier, rate, steps)),
        target_epsilon,
        delta,
        ExplicitBracketInterval(LEAST_NOISE, MOST_NOISE),
        tol=1e-5,
    )
    return float(f"{multiplier * 1.00005:.5g}")  # rounded up: epsilon stays below the target


@functools.lru_cache(maxsize=256)
def reconstruction_bound(mechanism: Mechanism, prior: float) -> float:
    """Bounds the probability with which any attack reconstructs an example.

    No attacker who sees all that the mechanism releases, knows the network, the algorithm and every
    other example, succeeds more often than this, if the best guess without the release succeeds
    with probability `prior`: the sup of P[E] over events E of probability `prior` without the
    example, here the least of e^eps prior + delta(eps) over eps. What success means is the
    attacker's to choose, as long as `prior` is its probability.

    References: Hayes, Mahloujifar & Balle 2023, arXiv 2302.07225, theorem 2 and its corollary
      (tight); Balle, Cherubin & Hayes 2022, arXiv 2201.04845, definition 2 (ReRo).
    """
    if mechanism.multiplier == 0:
        return 1.0
    if mechanism.rate == 1:  # one Gaussian of all steps together: exact
        mean = math.sqrt(mechanism.steps) / mechanism.multiplier
        return float(special.ndtr(special.ndtri(prior) + mean))
    loss = _accountant("pld").compose(_event(mechanism))

    def curve(eps):
        return math.exp(min(eps, 700)) * prior + loss.get_delta(eps)

    found = optimize.minimize_scalar(curve, bounds=(0, -math.log(prior)), method="bounded")
    return float(min(1.0, found.fun, curve(0.0)))


def poisson_sizes(seed: int, examples: int, rate: float, steps: int) -> np.ndarray:
    """Draws the number of examples in every batch of a training: [step]."""
    return np.random.default_rng([seed, 0]).binomial(examples, rate, steps)


def poisson_batches(
    seed: int, epoch: int, examples: int, sizes: np.ndarray, room: int
) -> np.ndarray:
    """Draws an epoch's batches: indices int32 [step, room], -1 where a batch has no more.

    Each example with the same probability, alone: given its size, a batch is any subset.
    """
    random = np.random.default_rng([seed, 1, epoch])
    batches = np.full((len(sizes), room), -1, np.int32)
    for batch, size in zip(batches, sizes):
        batch[:size] = random.choice(examples, size, replace=False)
    return batches
