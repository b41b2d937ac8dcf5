"""Defenses: what a client does to its update before it sends it.

A defense is one entry of `DEFENSES`: a pure function of the update, its strengths and a key; beside
it, what an adaptive attacker makes of that. A chain of them is written
"clip:1,noise:1e-4" and applied from left to right. Names are static and strengths are traced: a
whole range of them shares one compilation.

An adaptive attacker knows the chain and its strengths, not the random draws. It puts its
candidate's update through what the defense does on average (`expect`, with what can be learned of
the shared update), and knows the variance of what the defense added to each layer (`variance`),
infinite where nothing of it can be trusted.
"""

import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxinv import rng
from jaxinv.defenses import compression, dp_sgd, noise, pruning, soteria
from jaxinv.defenses.base import ClientContext, Defense, DefenseKnowledge, PublicFacts
from jaxinv.types import PyTree, named

NONE = "none"
Chain = tuple[tuple[str, tuple[float, ...]], ...]
DEFENSES: dict[str, Defense] = {
    "dpsgd": dp_sgd.DP_SGD,
    "noise": noise.GAUSSIAN,
    "laplace": noise.LAPLACE,
    "relative": noise.RELATIVE,
    "prune": pruning.PRUNE,
    "prune-layer": pruning.PRUNE_LAYER,
    "top-k": pruning.TOP_K,
    "clip": dp_sgd.CLIP,
    "sign": compression.SIGN,
    "quantize": compression.QUANTIZE,
    "soteria": soteria.SOTERIA,
}


def parse(text: str) -> Chain:
    """Reads "clip:1,noise:1e-4"; "none" is the empty chain.

    Raises:
      ValueError: a name is unknown, or a strength is missing, too many or outside its range.
    """
    if text == NONE:
        return ()
    chain = []
    for position, part in enumerate(text.replace(" ", "").split(",")):
        name, *numbers = part.split(":")
        if name not in DEFENSES:
            raise ValueError(f"unknown defense '{name}'; known are none, {', '.join(DEFENSES)}")
        defense = DEFENSES[name]
        form = ":".join([name, *(p[0].upper() for p in defense.parameters)])
        try:
            strengths = tuple(map(float, numbers))
        except ValueError:
            raise ValueError(f"'{part}' is not of the form {form}") from None
        if len(strengths) != len(defense.parameters):
            raise ValueError(f"'{part}' is not of the form {form}")
        for value, (what, least, most) in zip(strengths, defense.parameters):
            if not least <= value <= most or not math.isfinite(value):
                top = "" if math.isinf(most) else f" and at most {most:g}"
                raise ValueError(f"'{part}': the {what} must be at least {least:g}{top}")
        if defense.of_each_image and position:
            raise ValueError(f"'{name}' makes the update itself; put it first")
        chain.append((name, strengths))
    return tuple(chain)


def spell(chain: Chain) -> str:
    """Writes a chain as `parse` reads it, the same for the same chain."""
    spelled = (":".join([name, *map(_digits, strengths)]) for name, strengths in chain)
    return ",".join(spelled) or NONE


def _digits(strength: float) -> str:
    """A strength in few digits where they are the same number, else in all."""
    short = f"{strength:g}"
    return short if float(short) == strength else repr(strength)


def names(chain: Chain) -> tuple[str, ...]:
    """The part of a chain that shapes the program."""
    return tuple(name for name, _ in chain)


def strengths(chain: Chain) -> tuple[tuple[float, ...], ...]:
    """The part of a chain that is traced."""
    return tuple(strengths for _, strengths in chain)


def is_random(chain: Chain) -> bool:
    """Whether another draw gives another update."""
    return any(DEFENSES[name].random for name in names(chain))


def asks_for_classifier(chain: Sequence[str | Defense]) -> bool:
    """Whether an attacker who knows of a chain has to know the network's last dense layer."""
    return any(named(DEFENSES, name).tells_classifier for name in chain)


def takes_each_image(chain: Iterable[str | Defense]) -> bool:
    """Whether a chain takes each image's own gradient, which is of one step."""
    return any(named(DEFENSES, name).of_each_image is not None for name in chain)


def changes_noise(chain: Chain) -> str | None:
    """The first defense that changes the variance of noise in front of it: nobody knows it then."""
    noisy = False
    for name in names(chain):
        if noisy and DEFENSES[name].rescales:
            return name
        noisy = noisy or DEFENSES[name].random
    return None


def defend(
    chain: tuple[str | Defense, ...],
    update: PyTree,
    strengths: tuple,
    key: Array,
    context: ClientContext | None,
) -> PyTree:
    """Applies a chain to an update.

    Args:
      chain: names of `DEFENSES`.
      update: as `client.update` has it.
      strengths: of each.
      key: of this trial's draw. A defense's noise does not depend on what stands before it in the
        chain: strengths and chains compare on the same draws.
      context: what the client knows beside it; None will do for a chain that does not ask.
    """
    for position, (name, own) in enumerate(zip(chain, strengths)):
        before = chain[:position].count(name)
        of_name = jax.random.fold_in(rng.name_key(key, name), before)
        update = DEFENSES[name].apply(update, own, of_name, context)
    return update


def adapt(
    chain: tuple[str | Defense, ...], strengths: tuple, shared: PyTree, facts: PublicFacts
) -> DefenseKnowledge:
    """Works out how far an attacker who knows the chain can trust what was shared.

    The weights are positive-part James-Stein estimates, the share of a leaf's power that is no
    noise: a leaf that is mostly noise tells little of the image and drowns the others in a cosine.
    Where nothing at all can be trusted, all weights are 1 again.

    Args:
      chain, strengths: the defense.
      shared: the defended update.
      facts: on the rest.
    """
    variances = jax.tree.map(lambda x: jnp.zeros((), x.dtype), shared)
    for name, own in zip(chain, strengths):
        if (variance := named(DEFENSES, name).variance) is not None:
            found = variance(shared, own, facts)
            variances = jax.tree.map(jnp.add, variances, found)

    def weight(x, variance):
        power = jnp.sum(jnp.square(x))
        # A leaf of nothing but zeros, without noise, is known as well as any other.
        noise = jnp.where(variance > 0, x.size * variance / jnp.maximum(power, 1e-30), 0)
        return jnp.maximum(0, 1 - noise)

    weights = jax.tree.map(weight, shared, variances)
    left = sum(w * jnp.sum(jnp.abs(x)) for w, x in zip(*map(jax.tree.leaves, (weights, shared))))
    weights = jax.tree.map(lambda w: jnp.where(left > 0, w, 1.0), weights)
    learned = tuple(named(DEFENSES, n).learn(shared, own) for n, own in zip(chain, strengths))
    return DefenseKnowledge(strengths, variances, weights, learned)


def expect(chain: tuple[str | Defense, ...], knowledge: DefenseKnowledge, update: PyTree) -> PyTree:
    """Puts a candidate's update through what the chain does on average."""
    for name, own, learned in zip(chain, knowledge.strengths, knowledge.learned, strict=True):
        update = named(DEFENSES, name).expect(update, own, learned)
    return update
