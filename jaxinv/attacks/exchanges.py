"""What the seeds of a target tell one another on the way: which of them to give up, or a mean.

At a few points of the way every seed hears the losses and the places of all. What it goes on from,
if not from its own place, is moved a little by a draw of its own and starts afresh, the optimizer
too. By the losses alone, which the attacker has. The trials of a target are then not independent.

References: Jamieson & Talwalkar 2016, arXiv 1502.07943 (successive halving).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinv import rng
from jaxinv.attacks.priors import SEEDS, mean_over_seeds
from jaxinv.types import PyTree

NUDGE = 0.1  # size of the draw, relative to the root mean square of what is moved


class Exchange(NamedTuple):
    """A table entry."""

    # (loss, place) of this seed -> the place to go on from, and whether it is another than its own.
    meet: Callable[[Float[Array, ""], PyTree], tuple[PyTree, Bool[Array, ""]]]
    at: tuple[float, ...]  # shares of the way
    averages: bool = False  # whether it takes means, which are no place of a generator's weights


def halve(loss: Float[Array, ""], place: PyTree) -> tuple[PyTree, Bool[Array, ""]]:
    """The worse half of the seeds goes on from the better half, worst from worst."""
    losses = lax.all_gather(jnp.where(jnp.isfinite(loss), loss, jnp.inf), SEEDS)
    order = jnp.argsort(losses)  # stable: of equal seeds the first is the better
    mine = lax.axis_index(SEEDS)
    rank = jnp.argsort(order)[mine]
    stays = len(losses) - len(losses) // 2
    source = jnp.where(rank < stays, mine, order[rank - stays])
    return jax.tree.map(lambda x: lax.all_gather(x, SEEDS)[source], place), rank >= stays


def average(loss: Float[Array, ""], place: PyTree) -> tuple[PyTree, Bool[Array, ""]]:
    """All seeds go on from their mean: what they agree on is more of the image than any of them."""
    return mean_over_seeds(place, jnp.isfinite(loss)), jnp.array(True)


EXCHANGES: dict[str, Exchange | None] = {
    "none": None,
    # Successive halving, as long as the step schedule takes its largest steps.
    "halving": Exchange(halve, (0.125, 0.25, 0.375)),
    # One restart from the consensus of all seeds.
    "consensus": Exchange(average, (0.375,), averages=True),
}


def is_due(
    exchange: Exchange, index: Int[Array, ""], iterations: Int[Array, ""]
) -> Bool[Array, ""]:
    """Whether the seeds meet after the step with this number."""
    return (index == jnp.floor(jnp.array(exchange.at) * iterations).astype(index.dtype)).any()


def nudged(key: Array, index: Int[Array, ""], place: PyTree) -> PyTree:
    """A place moved by normal numbers of `NUDGE` times the size of its own, leaf by leaf."""

    def one(key: Array, x: Array) -> Array:
        size = jnp.sqrt(jnp.square(x).mean())
        return x + NUDGE * size * jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype)

    return rng.over_leaves(jax.random.fold_in(key, index), place, one)
