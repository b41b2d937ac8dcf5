"""The consensus: the mean image of several seeds' reconstructions, which needs no truth to make.

Where seeds of one attack err independently, their mean errs less than any of them. An attacker can
average the best quarter of the seeds by the objective, or all of them. Its PSNR follows from inner
products alone: with the errors e_i = x_i - truth, the mean over a set S of seeds has the squared
error sum_{i, j in S} <e_i, e_j> / |S|^2, so every subset of the seeds costs a few multiplications.

Everything is computed from the stored 8-bit pictures. Rounding them adds 1e-6 to a squared error,
which is nothing below 50 dB; for what is above see `_psnr_of_means`.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import combinations
from math import comb
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy.optimize import linear_sum_assignment

from jaxinv.reporting import statistics as st

_SUBSETS = 256  # of one size, at most; fewer where seeds or images are many, for time
_WORK = 4096  # subsets of all sizes times images of one target
_ROUNDED = 1e-5  # squared error, pixels in [0, 1], below which 8-bit pictures no longer tell


class Trials(NamedTuple):
    """All seeds of one target on one draw of the defense's noise; NaN where a seed failed."""

    pictures: UInt8[np.ndarray, "seed batch height width channel"]
    truth: UInt8[np.ndarray, "batch height width channel"]
    objective: Float[np.ndarray, " seed"]
    psnr: Float[np.ndarray, " seed"]  # dB, as recorded
    mse: Float[np.ndarray, " seed"]  # as recorded, pixels in [0, 1]


class Consensus(NamedTuple):
    """Expected PSNR in dB of the mean image of k seeds, over all choices of k."""

    quarter: st.BestOfK  # of the ceil(k / 4) with the lowest objective
    all: st.BestOfK
    first_draw: Float[np.ndarray, " target"]  # best quarter of all seeds on the first draw of noise


class _Products(NamedTuple):
    """Inner products of pictures over pixels; of whole numbers 0 ... 255, and therefore exact."""

    between: Float[np.ndarray, "image seed seed"]
    with_truth: Float[np.ndarray, "image seed truth"]
    of_truth: Float[np.ndarray, " truth"]


def quarter(seeds: Int[np.ndarray, "*set"] | int) -> Any:
    """How many seeds are the best quarter: ceil(seeds / 4), so that up to four it is the pick."""
    return -(-seeds // 4)


def curves(targets: Iterable[Sequence[Trials]]) -> Consensus:
    """Computes what averaging k seeds reaches, with t intervals over targets.

    Several images of a target are stored in the truth's order, which no attacker has. Each seed's
    images are therefore set in the order of the pick's, the seed with the lowest objective of all,
    by least squared error; means are taken in that order, and each mean is matched to the truth as
    a reconstruction is. A smaller choice of seeds would have a pick of its own to go by: that the
    common one stands for it is a simplification, which ends at k = all seeds.

    Guarantees: where a mean is of one seed its PSNR is the recorded one, so that up to k = 4 the
    best quarter is exactly `best_of_k`'s choice; exact too where a target has no more k-subsets
    than are tried (256 at one image and up to 16 seeds), always at k = 1 and k = n. Elsewhere the
    mean over random subsets, the same in every call.
    Edge cases: a failed seed enters no mean; where fewer are left than the mean is to have, it is
    of those; NaN where some choice of k has none left, thus for k <= number of failures. Equal
    objectives go by the order of the seeds. An exact mean has inf. An attacker who assumed more
    images than there were is spared the surplus, which is not stored.

    Args:
      targets: per target, the trials of each draw of noise; the mean over draws is returned.
    """
    table = np.array([[expected_psnr(trials) for trials in draws] for draws in targets])
    # [target, draw, mean, k]
    with np.errstate(invalid="ignore"):
        best, whole = np.moveaxis(table.mean(axis=1), 1, 0)

    def interval(values):
        return st.BestOfK(values, *st.target_interval(values))

    return Consensus(interval(best), interval(whole), table[:, 0, 0, -1])


def expected_psnr(trials: Trials) -> Float[np.ndarray, "mean k"]:
    """Computes the expected PSNR of the mean of k seeds: the best quarter of them, and all."""
    seeds, batch = trials.pictures.shape[:2]
    # Of one seed, what the best of k is, known exactly.
    picked = st.best_of_k(trials.psnr[None], trials.objective[None]).per_target[0]
    curves = np.stack([picked, picked])
    failed = np.isnan(trials.objective)
    if failed.all():
        return curves
    products = _products(_aligned(trials), trials.truth)
    members, k = _subsets(seeds, max(8, min(_SUBSETS, _WORK // (seeds * batch))))
    for curve, count in zip(curves, (quarter(k), k)):
        of_several = count > 1
        chosen = _lowest(members[of_several], count[of_several], trials.objective)
        psnr = _psnr_of_means(trials, products, chosen)
        sizes, which, sets = np.unique(k[of_several], return_inverse=True, return_counts=True)
        curve[sizes - 1] = np.bincount(which, psnr, len(sizes)) / sets
    curves[:, : failed.sum()] = np.nan
    return curves


def mean_image(trials: Trials) -> Float[np.ndarray, "batch height width channel"]:
    """Makes the mean image of the best quarter of all seeds, pixels in [0, 1].

    Its images stand in the truth's order, to be looked at beside it. NaN where all seeds failed.
    """
    seeds = len(trials.objective)
    everything = np.ones((1, seeds), bool)
    chosen = _lowest(everything, np.array([quarter(seeds)]), trials.objective)[0]
    if not chosen.any():
        return np.full(trials.truth.shape, np.nan)
    mean = _aligned(trials)[chosen].mean(axis=0)
    return _in_order_of(trials.truth.astype(float), mean[None])[0] / 255


def _aligned(trials: Trials) -> Float[np.ndarray, "seed batch height width channel"]:
    """Every seed's images in the order of the pick's."""
    pictures = trials.pictures.astype(float)
    return _in_order_of(pictures[st.choose_lowest(trials.objective[None])[0]], pictures)


def _in_order_of(
    reference: Float[np.ndarray, "batch height width channel"],
    pictures: Float[np.ndarray, "seed batch height width channel"],
) -> Float[np.ndarray, "seed batch height width channel"]:
    """Sets each seed's images where the reference has those they are nearest, one to one."""
    seeds, batch = pictures.shape[:2]
    if batch == 1:
        return pictures
    flat, fixed = pictures.reshape(seeds, batch, -1), reference.reshape(batch, -1)
    # Squared norms of the reference are the same for every order.
    costs = (flat**2).sum(axis=2)[:, None] - 2 * fixed @ flat.swapaxes(1, 2)
    order = np.stack([linear_sum_assignment(cost)[1] for cost in costs])
    return np.take_along_axis(pictures, order[:, :, None, None, None], axis=1)


def _products(
    aligned: Float[np.ndarray, "seed batch height width channel"],
    truth: UInt8[np.ndarray, "batch height width channel"],
) -> _Products:
    """Inner products of the seeds' images with each other and with every truth."""
    flat = aligned.reshape(*aligned.shape[:2], -1).swapaxes(0, 1)
    true = truth.reshape(len(truth), -1).astype(float)
    return _Products(flat @ flat.swapaxes(1, 2), flat @ true.T, (true**2).sum(axis=1))


def _psnr_of_means(
    trials: Trials, products: _Products, chosen: Bool[np.ndarray, "set seed"]
) -> Float[np.ndarray, " set"]:
    """PSNR in dB of the mean over each set of seeds, mean over images; NaN of an empty set.

    Where the seeds' recorded errors are on average below what 8 bits show, that average stands in:
    an upper limit of the mean's error, as squares are convex. So a mean of nearly exact
    reconstructions is not called exact, one of exact ones is.
    """
    members = chosen.astype(float)
    size = members.sum(axis=1)[:, None]
    total = np.einsum("isj,sj->si", members @ products.between, members)  # [set, image]
    errors = total[..., None] - 2 * size[..., None] * np.moveaxis(
        members @ products.with_truth, 0, 1
    )  # [set, image, truth]
    errors = _matched(errors + (size**2)[..., None] * products.of_truth)
    with np.errstate(divide="ignore", invalid="ignore"):
        errors /= size**2 * (255**2 * trials.truth[0].size)
        psnr = -10 * np.log10(errors).mean(axis=1)
        recorded = members @ np.nan_to_num(trials.mse) / size[:, 0]
        psnr = np.where(recorded < _ROUNDED, -10 * np.log10(recorded), psnr)
    return np.where(size[:, 0] == 1, trials.psnr[chosen.argmax(axis=1)], psnr)


def _matched(costs: Float[np.ndarray, "set image truth"]) -> Float[np.ndarray, "set image"]:
    """Costs of the one-to-one assignment of least total cost."""
    nearest = costs.argmin(axis=2)
    # Where no two images are nearest to one truth, that is the assignment.
    clash = (np.sort(nearest, axis=1) != np.arange(costs.shape[1])).any(axis=1)
    for at in np.flatnonzero(clash):
        nearest[at] = linear_sum_assignment(costs[at])[1]
    return np.take_along_axis(costs, nearest[..., None], axis=2)[..., 0]


def _lowest(
    members: Bool[np.ndarray, "set seed"],
    count: Int[np.ndarray, " set"],
    objective: Float[np.ndarray, " seed"],
) -> Bool[np.ndarray, "set seed"]:
    """The `count` members of each set with the lowest objective; failed seeds never."""
    order = np.argsort(objective, kind="stable")
    ranked = (members & ~np.isnan(objective))[:, order]
    chosen = np.empty_like(ranked)
    chosen[:, order] = ranked & (ranked.cumsum(axis=1) <= count[:, None])
    return chosen


@lru_cache(maxsize=16)
def _subsets(seeds: int, most: int) -> tuple[Bool[np.ndarray, "set seed"], Int[np.ndarray, " set"]]:
    """Subsets of every size k and their k: all of them, or where they are many `most` at random.

    The random ones grow with k by one seed each, so that a curve over k is not rough.
    """
    ranks = np.random.default_rng(0).random((most, seeds)).argsort(axis=1)
    parts = []
    for k in range(1, seeds + 1):
        if comb(seeds, k) > most:
            parts.append(ranks < k)
            continue
        every = np.array(list(combinations(range(seeds), k)))
        parts.append(np.zeros((len(every), seeds), bool))
        np.put_along_axis(parts[-1], every, True, axis=1)
    return np.concatenate(parts), np.repeat(np.arange(1, seeds + 1), [len(p) for p in parts])
