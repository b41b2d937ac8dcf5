"""Statistics over targets and seeds: means, variance components, best of k, success rates.

Everything takes arrays `[target, seed]` in which NaN is a failed trial. Targets are treated as a
random sample of the images one could attack, seeds as a random sample of the attack's initial
images. Seeds of one target are therefore no independent evidence: intervals are over targets.

How failures and exact reconstructions enter:
  - a mean or a variance of trials with a failure among them is NaN, never one of the survivors;
  - quantiles rank failures worst, and are NaN where they fall on one;
  - a success rate counts failures as misses;
  - an exact reconstruction has PSNR inf and is not capped: means become inf, spreads NaN.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import special

LEVEL = 0.95
Numbers = np.ndarray | np.float64  # NumPy makes the latter of an array without axes
_BOOTSTRAP_CHUNK = 4_000_000  # resampled values held at once, about 100 MB with their indices


class Interval(NamedTuple):
    """An estimate with its interval; NaN where the data do not determine it."""

    value: float
    low: float
    high: float


class MeanInterval(NamedTuple):
    """Grand mean with an interval over targets, and the spread between seeds of one target."""

    mean: float
    low: float
    high: float
    seed_std: float


class VarianceComponents(NamedTuple):
    """Standard deviations in the unit of the data, `icc` the targets' share of the variance."""

    between: Interval  # std of the targets' true means
    noise: Interval  # std between the draws of one target's noise; NaN where there is one
    within: Interval  # std between the seeds of one update
    icc: Interval  # between^2 / the sum of all


class BestOfK(NamedTuple):
    """Expected value of what k = 1 ... seeds are made into: the chosen trial, or their mean."""

    per_target: Float[np.ndarray, "target k"]
    mean: Float[np.ndarray, " k"]  # over targets
    low: Float[np.ndarray, " k"]
    high: Float[np.ndarray, " k"]


class SuccessRate(NamedTuple):
    """Share of trials above a threshold."""

    rate: float
    low: float
    high: float
    successes: int
    trials: int
    effective_trials: float  # independent trials that carry as much information


def target_interval(values: Float[np.ndarray, "target ..."]) -> tuple[Numbers, Numbers, Numbers]:
    """Computes mean and t interval over the first axis.

    Returns:
      mean, low, high, each of shape `...`. The limits are NaN for a single target or a non-finite
      mean.
    """
    values = np.asarray(values, float)
    targets = values.shape[0]
    with np.errstate(invalid="ignore"):
        mean = values.mean(axis=0)
        if targets < 2:
            return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
        standard_error = values.std(axis=0, ddof=1) / np.sqrt(targets)
        half = special.stdtrit(targets - 1, (1 + LEVEL) / 2) * standard_error
        return mean, mean - half, mean + half


def mean_interval(values: Float[np.ndarray, "target seed"]) -> MeanInterval:
    """Computes the grand mean, its interval over targets, and the spread between seeds.

    The interval is Student's t of the per-target means, `mean ± t(targets - 1) s / sqrt(targets)`:
    it covers the mean over further targets, not only over further seeds of these. The spread is
    the pooled standard deviation within targets, `sqrt(mean over targets of the seeds' variance)`.

    Edge cases: a failure makes everything NaN; PSNR inf makes the mean inf and the rest NaN; one
    target has no interval; one seed has no spread.
    """
    values = _as_table(values)
    mean, low, high = target_interval(values.mean(axis=1))
    _, within = _mean_squares(values)
    return MeanInterval(float(mean), float(low), float(high), float(np.sqrt(within)))


def paired_difference(
    values: Float[np.ndarray, "target seed"], reference: Float[np.ndarray, "target reference_seed"]
) -> Interval:
    """Computes the mean difference of two cells that share their targets and seeds.

    A cell may have every seed for several draws of a defense's noise. Student's t interval of the
    per-target differences of means: what makes a target hard in both cells cancels. NaN with a
    failed trial, infinite with an exact one in one of the two, and no interval then; nor of one
    target.
    """
    values, reference = _as_table(values), _as_table(reference)
    if len(values) != len(reference):
        raise ValueError(f"cells differ in targets: {len(values)} and {len(reference)}")
    with np.errstate(invalid="ignore"):
        differences = values.mean(axis=1) - reference.mean(axis=1)
    return Interval(*(float(v) for v in target_interval(differences)))


def variance_components(
    values: Float[np.ndarray, "target *draw seed"],
    *,
    bootstrap_seed: int = 0,
    resamples: int = 2000,
) -> VarianceComponents:
    """Splits the variance into targets, draws of noise and seeds: balanced nested random effects.

    value[i, d, j] = mean + target[i] + noise[i, d] + seed[i, d, j]. With the analysis of
    variance's mean squares, `within^2 = MSW`, `noise^2 = max(0, (MSD - MSW) / seeds)` and
    `between^2 = max(0, (MSB - MSD) / (draws seeds))`; without draws MSW stands for MSD. Intervals
    are percentiles of a bootstrap in stages: targets with replacement, then draws within each drawn
    target, then seeds within each of those.

    Limits: truncation at 0 biases `between` upwards where it is small. The percentile interval of
    `between` rests on the few targets there are and is too short with few: simulated at between =
    within = 1 with 32 seeds, the nominal 95% cover the truth in about 67% of studies with 4
    targets, 81% with 10 and 91% with 30. That of `within` pools all trials, yet its seeds are drawn
    with replacement, which shrinks it by (seeds - 1) / seeds: with 2 or 3 seeds it is useless.

    Edge cases: one target leaves `between` and `icc` NaN; one seed leaves all NaN, as the
    sources cannot be told apart; any failed or exact trial makes everything NaN; no variance at
    all leaves `icc` NaN.

    Args:
      values: one number per trial, for instance PSNR in dB; with or without an axis of draws.
      bootstrap_seed: names the resampling; the same seed gives the same intervals.
      resamples: number of bootstrap resamples.

    References: Searle, Casella, McCulloch, Variance Components, 1992, ch. 3; Davison, Hinkley,
      Bootstrap Methods and their Application, 1997, sec. 3.8.
    """
    values = np.asarray(values, float)
    if values.ndim == 2:
        values = _as_table(values)[:, None]
    estimates = _components(values)
    if not np.isfinite(values).all():
        return VarianceComponents(*(Interval(np.nan, np.nan, np.nan) for _ in estimates))
    draws = np.stack(_resample_components(values, bootstrap_seed, resamples), axis=-1)
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    intervals = []
    for estimate, column in zip(estimates, draws.T):
        column = column[~np.isnan(column)]  # icc of a resample without any variance
        known = not np.isnan(estimate) and column.size > 0
        low, high = np.quantile(column, tails) if known else (np.nan, np.nan)
        intervals.append(Interval(float(estimate), float(low), float(high)))
    return VarianceComponents(*intervals)


def best_of_k(
    values: Float[np.ndarray, "target seed"],
    scores: Float[np.ndarray, "target seed"],
    draws: int = 1,
) -> BestOfK:
    """Computes the exact expected value of the best of k seeds, the best having the lowest score.

    Over all k-subsets of a target's n seeds the trial of rank i (from 0) by score is chosen with
    probability `C(n - 1 - i, k - 1) / C(n, k)`; the expectation weights the trials' values with it.
    For the attacker `scores` is the objective; for the oracle, who knows the truth, it is `-PSNR`.
    Where the axis of seeds holds several draws of a defense's noise, one after another, the choice
    is among the seeds of each draw, and the mean over draws is returned: an attacker has one.

    Guarantees: k = 1 is the plain mean over seeds and k = n the chosen trial's value. Among equal
    scores the choice is uniform.
    Edge cases: a NaN score is never chosen unless all k are NaN; where some k-subset is all NaN,
    thus for k <= number of failures, the expectation is NaN. The mean over targets is NaN where it
    is for any target. A value of inf makes every k that may choose it inf.

    Returns:
      The expectation per target, and its mean with a t interval over targets.
    References: David, Nagaraja, Order Statistics, 2003, sec. 3.7 (sampling without replacement).
    """
    values, scores = _as_table(values), _as_table(scores)
    targets, seeds = len(values), values.shape[1] // draws
    values, scores = (x.reshape(targets * draws, seeds) for x in (values, scores))
    weights = _choice_weights(seeds)
    curves = np.full(values.shape, np.nan)
    for curve, value, score in zip(curves, values, scores):
        ordered = _ordered_by_score(value, score)
        with np.errstate(invalid="ignore"):  # weight 0 silences inf and NaN
            terms = np.where(weights > 0, weights * ordered, 0.0)
        curve[:] = terms.sum(axis=1)
        curve[: np.isnan(score).sum()] = np.nan
    curves = curves.reshape(targets, draws, seeds).mean(axis=1)
    return BestOfK(curves, *target_interval(curves))


def choose_lowest(scores: Float[np.ndarray, "target seed"]) -> Int[np.ndarray, " target"]:
    """Finds each target's seed position of the lowest score; -1 where every trial failed."""
    scores = _as_table(scores)
    failed = np.isnan(scores)
    position = np.argmin(np.where(failed, np.inf, scores), axis=1)
    # A lone +inf beside failures is a valid score: argmin must not land on a failure for it.
    first_valid = np.argmin(failed, axis=1)
    on_failure = failed[np.arange(len(scores)), position]
    return np.where(failed.all(axis=1), -1, np.where(on_failure, first_valid, position))


def success_rate(psnr: Float[np.ndarray, "target seed"], threshold: float) -> SuccessRate:
    """Computes the share of trials with PSNR above a threshold, failures counting as misses.

    Trials of one target succeed together, so n = targets x seeds trials are worth only Kish's
    effective number `n / (1 + (seeds - 1) ICC)`, ICC being the intraclass correlation of the
    success indicators. The interval is Wilson's at that number.

    Edge cases: where the ICC is undefined (one target, or all trials alike) the effective number is
    the number of targets, the smallest it can be; exact trials (inf) are successes.

    References: Wilson 1927 (JASA 22); Kish, Survey Sampling, 1965, sec. 5.4.
    """
    hits = (_as_table(psnr) > threshold).astype(float)
    targets, seeds = hits.shape
    icc = _components(hits[:, None])[-1]
    effective = float(targets) if np.isnan(icc) else hits.size / (1 + (seeds - 1) * icc)
    rate = hits.mean()
    z = special.ndtri((1 + LEVEL) / 2)
    shrink = 1 + z**2 / effective
    center = (rate + z**2 / (2 * effective)) / shrink
    half = z * np.sqrt(rate * (1 - rate) / effective + z**2 / (4 * effective**2)) / shrink
    return SuccessRate(
        rate=float(rate),
        low=float(max(0.0, center - half)) if rate > 0 else 0.0,
        high=float(min(1.0, center + half)) if rate < 1 else 1.0,
        successes=int(hits.sum()),
        trials=hits.size,
        effective_trials=float(effective),
    )


def ranked_quantile(
    values: Float[np.ndarray, "*batch seed"], quantile: float
) -> Float[np.ndarray, "*batch"]:
    """Computes a quantile over the last axis, NaN ranking below every number.

    Linear interpolation between order statistics, as `np.quantile`. NaN where the quantile falls on
    a failed trial; inf where it falls on, or between a number and, an exact one.
    """
    ordered = np.sort(np.where(np.isnan(values), -np.inf, values), axis=-1)
    position = quantile * (ordered.shape[-1] - 1)
    below, above = ordered[..., int(np.floor(position))], ordered[..., int(np.ceil(position))]
    with np.errstate(invalid="ignore"):
        between = below + (above - below) * (position - np.floor(position))
    result = np.where(below == above, below, between)
    return np.where(np.isneginf(below), np.nan, result)


def _as_table(values: np.ndarray) -> Float[np.ndarray, "target seed"]:
    """Checks that there is at least one target and one seed."""
    values = np.asarray(values, float)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"values must be [target, seed] and not empty, got shape {values.shape}")
    return values


def _mean_squares(
    values: Float[np.ndarray, "*batch target seed"],
) -> tuple[Float[Numbers, "*batch"], Float[Numbers, "*batch"]]:
    """Mean squares between and within targets; NaN without degrees of freedom."""
    targets, seeds = values.shape[-2:]
    with np.errstate(invalid="ignore", divide="ignore"):
        means = values.mean(axis=-1)
        grand = means.mean(axis=-1, keepdims=True)
        between = seeds * ((means - grand) ** 2).sum(axis=-1) / np.float64(targets - 1)
        squares = ((values - means[..., None]) ** 2).sum(axis=(-2, -1))
        within = squares / np.float64(targets * (seeds - 1))
    return between, within


def _components(values: Float[np.ndarray, "*batch target draw seed"]) -> tuple[Numbers, ...]:
    """Point estimates: std between targets, between draws, within; intraclass correlation."""
    *front, targets, draws, seeds = values.shape
    with np.errstate(invalid="ignore", divide="ignore"):
        _, within = _mean_squares(values.reshape(*front, targets * draws, seeds))
        between_square, draw_square = (seeds * m for m in _mean_squares(values.mean(axis=-1)))
        noise = np.maximum(0.0, (draw_square - within) / seeds)  # NaN of one draw
        below = within if draws == 1 else draw_square
        between = np.maximum(0.0, (between_square - below) / (draws * seeds))
        total = between + within + (0 if draws == 1 else noise)
        return np.sqrt(between), np.sqrt(noise), np.sqrt(within), between / total


def _resample_components(
    values: Float[np.ndarray, "target draw seed"], bootstrap_seed: int, resamples: int
) -> list[np.ndarray]:
    """Estimates of `_components` on two-stage bootstrap resamples, each of shape [resample]."""
    random = np.random.default_rng(bootstrap_seed)
    targets, draws, seeds = values.shape
    chunk = max(1, _BOOTSTRAP_CHUNK // values.size)
    parts = []
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        rows = random.integers(targets, size=(count, targets, 1, 1))
        layers = 0
        if draws > 1:
            layers = random.integers(draws, size=(count, targets, draws, 1))
        columns = random.integers(seeds, size=(count, targets, draws, seeds))
        parts.append(_components(values[rows, layers, columns]))
    return [np.concatenate(column) for column in zip(*parts)]


def _choice_weights(seeds: int) -> Float[np.ndarray, "k rank"]:
    """P(rank i is the best of k) by the recursion w[i + 1] = w[i] (n - i - k) / (n - 1 - i).

    The recursion needs no binomials, which overflow from about a thousand seeds.
    """
    k = np.arange(1, seeds + 1)[:, None]
    rank = np.arange(seeds - 1)[None, :]
    ratios = np.maximum(0, seeds - rank - k) / (seeds - 1 - rank)
    return np.cumprod(np.hstack([k / seeds, ratios]), axis=1)


def _ordered_by_score(
    values: Float[np.ndarray, " seed"], scores: Float[np.ndarray, " seed"]
) -> Float[np.ndarray, " seed"]:
    """Values by rising score, each replaced by the mean of those that share its score."""
    _, group = np.unique(np.where(np.isnan(scores), np.nan, scores), return_inverse=True)
    sums = np.zeros(group.max() + 1)
    np.add.at(sums, group, values)
    means = sums / np.bincount(group)
    return means[np.sort(group)]
