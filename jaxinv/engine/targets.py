"""What the clients of a study share: one target for every private batch, and the trials' keys."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxinv import client, defenses, rng
from jaxinv.attacks import labels
from jaxinv.attacks.objectives import compare, cosine
from jaxinv.defenses.base import ClientContext, PublicFacts
from jaxinv.types import Normalization, PyTree, Target, Truth


class ClientSettings(NamedTuple):
    """What the clients do, and what of it the attacker gets: static."""

    labels: str = "known"  # how the attacker comes by them: a name of `labels.LABELS`
    batch_norm: str = "eval"
    local: client.Local = client.Local()
    shuffled: bool = False  # each epoch in an order of its own, which the attacker does not know
    assumed_images: int | None = None  # images the attacker takes the update to be of; None: all
    assumed: client.Local = client.Local()  # what the attacker takes for `local`
    observe: bool = False  # whether the attacker compares statistics with the running ones
    defense: tuple[str, ...] = ()  # what they do to their updates: names of `defenses.DEFENSES`
    known_defense: tuple[str, ...] = ()  # of these, what the attacker knows
    classifier: tuple[str, ...] = ()  # path of the last dense layer, where an attacker asks for it


class SharedUpdates(NamedTuple):
    """What came of the clients' work. Axis: target."""

    targets: Target
    cosine: Float[Array, " target"]  # of what was shared with the update before the defense
    error: Float[Array, " target"]  # |shared - update| / |update|


def make_targets(
    module: nn.Module,
    variables: PyTree,
    truths: Truth,
    normalization: Normalization,
    clients: ClientSettings = ClientSettings(),  # noqa: B008
    client_lr: float = 1.0,
    order_keys: jax.Array | None = None,
    strengths: tuple = (),
    draw_keys: jax.Array | None = None,
) -> SharedUpdates:
    """Computes what the attacker gets for each private batch.

    Args:
      truths: with a leading target axis.
      clients: what they do.
      client_lr: the learning rate of their local steps.
      order_keys: [target], of the orders in which they take their images; None where not shuffled.
      strengths: of the defenses.
      draw_keys: [target], of the defenses' draws; by the target's position where not given.
    """
    count = len(truths.labels)
    if order_keys is None:
        order_keys = jnp.zeros(count)
    if draw_keys is None:
        draw_keys = noise_keys(range(count), [0] * count)
    strengths = jax.tree.map(lambda x: jnp.asarray(x, truths.images.dtype), strengths)
    return _make_targets(
        module,
        clients,
        variables,
        truths,
        normalization,
        jnp.asarray(client_lr, truths.images.dtype),
        strengths,
        order_keys,
        draw_keys,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _make_targets(
    module, clients, variables, truths, normalization, client_lr, strengths, order_keys, draw_keys
):
    loss = client.loss_fn(module, variables, clients.batch_norm)
    params = variables["params"]

    def one(arguments):
        truth, key, draw_key = arguments
        images, classes = normalization.normalize(truth.images), truth.labels
        context = ClientContext(module, variables, images, classes)
        if clients.shuffled:
            epochs = jax.random.split(key, clients.local.epochs)
            orders = jax.vmap(lambda k: jax.random.permutation(k, len(classes)))(epochs)
            images, classes = images[orders], classes[orders]
        update, statistics = client.update(loss, params, images, classes, clients.local, client_lr)
        bare = update
        if clients.defense:
            update = defenses.defend(clients.defense, update, strengths, draw_key, context)
        between = compare(update, bare)
        kept = 1 - cosine(between)
        error = jnp.sqrt(between.distance / between.shared)
        count = clients.assumed_images or len(truth.labels)
        knowledge = ()
        if clients.known_defense:
            facts = PublicFacts(clients.classifier, count)
            knowledge = defenses.adapt(clients.known_defense, strengths, update, facts)
        sent = statistics if clients.batch_norm == "train-shared" else ()
        if clients.observe:
            sent = {"batch_stats": variables["batch_stats"]}
        if clients.labels == "known":
            return SharedUpdates(Target(update, truth.labels, sent, knowledge), kept, error)
        if clients.labels == "joint":  # found beside the images: their number alone is told
            unknown = jnp.zeros(count, truth.labels.dtype)
            return SharedUpdates(Target(update, unknown, sent, knowledge), kept, error)
        found = labels.infer(
            clients.labels,
            module,
            variables,
            update,
            truth.images.shape[1:],
            count,
            clients.assumed.steps(count),
        )
        return SharedUpdates(Target(update, found, sent, knowledge), kept, error)

    return lax.map(one, (truths, order_keys, draw_keys))


@jax.jit
def _seed_keys(target_ids, seeds):
    def one(target, seed):
        return rng.stream_key(rng.Stream.ATTACK, seed, target)

    return jax.vmap(lambda t: jax.vmap(lambda s: one(t, s))(seeds))(target_ids)


def seed_keys(target_ids: Sequence[int], seeds: Sequence[int]) -> jax.Array:
    """Derives the randomness of each trial from its target and seed: keys [target, seed]."""
    return _seed_keys(jnp.asarray(target_ids, jnp.uint32), jnp.asarray(seeds, jnp.uint32))


def noise_keys(target_ids: Sequence[int], draws: Sequence[int]) -> jax.Array:
    """Derives the defense's draw for each target from its id and its noise seed: keys [target]."""

    def one(target, draw):
        return rng.stream_key(rng.Stream.DEFENSE, draw, target)

    return jax.vmap(one)(*(jnp.asarray(x, jnp.uint32) for x in (target_ids, draws)))


def order_keys(target_ids: Sequence[int]) -> jax.Array:
    """Derives the order in which each target's client takes its images: keys [target]."""

    def one(target):
        return rng.stream_key(rng.Stream.DATA, 0, target)

    return jax.vmap(one)(jnp.asarray(target_ids, jnp.uint32))
