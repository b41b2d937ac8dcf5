"""Games of identification: clients share updates of known images, an attacker names them.

A game is one update of B images, drawn at random, all different, out of N candidates. The attacker
gets the update and the candidates in an order that says nothing. Its success is counted over games
that are independent given the candidates, with exact intervals and chance beside it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Float, Int

from jaxinv import client, defenses, rng
from jaxinv.audit import identification as ident
from jaxinv.audit import measuring
from jaxinv.audit.intervals import Share, clopper_pearson, mean_share
from jaxinv.defenses.base import DefenseKnowledge, PublicFacts
from jaxinv.engine.targets import ClientSettings, SharedUpdates, make_targets, noise_keys
from jaxinv.networks.inspect import classifier_path
from jaxinv.types import Normalization, PyTree, Target, Truth

FALSE_POSITIVES = (0.01, 0.001)  # rates at which the rate of true positives is reported
FALSE_ALARMS = 0.01  # of updates that hold no candidate


class Network(NamedTuple):
    """The network that the clients received, and how it sees pixels."""

    module: nn.Module
    variables: PyTree
    normalization: Normalization
    loss: client.LossFn

    @property
    def params(self) -> PyTree:
        """The parameters, at which the gradients are taken."""
        return self.variables["params"]

    def normalize(self, pool: "Pool") -> measuring.Candidates:
        """A pool as the network sees it."""
        images = self.normalization.normalize(pool.images / np.float32(255))
        return measuring.Candidates(np.asarray(images), np.asarray(pool.labels, np.int32))


def network(module: nn.Module, variables: PyTree, normalization: Normalization) -> Network:
    """Makes a network, which is compiled once for all parameters and running statistics."""
    rest = {name: own for name, own in variables.items() if name != "params"}
    try:
        loss_of = _loss_of(module)
    except TypeError:  # a module with a list among its fields has no hash: compiled at every call
        loss_of = _loss_of.__wrapped__(module)
    return Network(module, variables, normalization, functools.partial(loss_of, rest))


@functools.lru_cache(maxsize=16)
def _loss_of(module: nn.Module) -> Callable:
    """The loss of a module, whose first argument is what it holds beside the parameters."""

    def loss(rest, params, images, labels):
        return client.loss_fn(module, rest)(params, images, labels)

    return loss


def known_rows(
    network: Network, candidates: measuring.Candidates
) -> Callable[[], measuring.Rows] | None:
    """Gives the candidates' gradients, computed once; None: too many to keep."""
    count = len(candidates.labels)
    if count * max(count, optax.tree.size(network.params)) * 4 > measuring.STORED:
        return None

    @functools.cache
    def rows():
        sizes = tuple(x.size for x in jax.tree.leaves(network.params))
        return measuring.Rows(measuring.gradients(network.loss, network.params, candidates), sizes)

    return rows


class Pool(NamedTuple):
    """The candidates of a victim, as they are stored."""

    images: np.ndarray  # uint8 [candidate, height, width, channel]
    labels: np.ndarray


class Rules(NamedTuple):
    """What one game is."""

    images: int = 1  # of an update
    method: str = "slab"
    defense: str = "none"  # the client's, known to the attacker
    local: client.Local = client.Local()
    client_lr: float = 0.1
    shortlist: int = ident.MOST  # candidates that the method sees; of more, the best
    classes: int | None = None  # of which `answer` tries each: labels are not known

    @property
    def steps(self) -> int:
        """The number of local steps that the client takes."""
        return self.local.steps(self.images)


class Outcome(NamedTuple):
    """What came of games of one kind."""

    recall: Share  # of an update's images that are among the B named
    whole: Share  # of updates all of whose images are named
    true_positives: dict[float, Share]  # of members, by the false positive rate
    chance: float  # recall of a guess
    games: int
    candidates: int


class Played(NamedTuple):
    """The games themselves."""

    members: Int[np.ndarray, "game image"]  # positions among the candidates
    scores: Float[np.ndarray, "game candidate"]
    picks: Int[np.ndarray, "game image"]


def draw(games: int, images: int, candidates: int, seed: int = 0) -> Int[np.ndarray, "game image"]:
    """Draws the members of each game, none twice within one."""
    random = np.random.default_rng([int(rng.Stream.DATA), seed, images])
    return np.stack([random.choice(candidates, images, replace=False) for _ in range(games)])


def share(
    network: Network, pool: Pool, members: Int[np.ndarray, "game image"], rules: Rules
) -> SharedUpdates:
    """Lets the clients of the games share their updates, as a sweep does."""
    chain = defenses.parse(rules.defense)
    names = defenses.names(chain)
    truths = Truth(pool.images[members] / np.float32(255), pool.labels[members])
    classifier = ()
    if defenses.asks_for_classifier(names):
        classifier = classifier_path(network.module, network.variables, pool.images.shape[1:])
    clients = ClientSettings(
        local=rules.local, defense=names, known_defense=names, classifier=classifier
    )
    return make_targets(
        network.module,
        network.variables,
        truths,
        network.normalization,
        clients,
        rules.client_lr,
        strengths=defenses.strengths(chain),
    )


def may_follow(rules: Rules) -> bool:
    """Whether the defense needs no more than the update, so that `send` may apply it afterwards."""
    chain = defenses.names(defenses.parse(rules.defense))
    asks_more = defenses.asks_for_classifier(chain) or defenses.takes_each_image(chain)
    return not asks_more and rules.steps == 1


def send(bare: Target, rules: Rules) -> Target:
    """Puts updates without a defense through that of the rules: what `share` would have given.

    Args:
      bare: with a leading axis of games.
      rules: such that they `may_follow`.
    """
    chain = defenses.parse(rules.defense)
    keys = noise_keys(range(len(bare.labels)), [0] * len(bare.labels))
    sent = _defended(defenses.names(chain), bare.update, defenses.strengths(chain), keys)
    return bare._replace(update=sent[0], defense_knowledge=sent[1])


@functools.partial(jax.jit, static_argnums=0)
def _defended(names, updates, strengths, keys):
    strengths = jax.tree.map(jnp.float32, strengths)
    facts = PublicFacts((), 1)  # what these defenses add depends on neither: compiled once for all

    def one(arguments):
        update, key = arguments
        update = defenses.defend(names, update, strengths, key, None)
        return update, defenses.adapt(names, strengths, update, facts) if names else ()

    return lax.map(one, (updates, keys))


def send_private(
    rows: measuring.Rows,
    params: PyTree,
    labels: Int[np.ndarray, " candidate"],
    members: Int[np.ndarray, "game image"],
    rules: Rules,
) -> Target:
    """What clients with DP-SGD share, from the gradients of the candidates that they are.

    The same as `share` in distribution, without computing every image's gradient again.

    Args:
      rows: the candidates' gradients.
      params: whose shapes the updates have.
      labels: of the candidates.
      members: of each game.
      rules: their defense is "dpsgd:CLIP:MULTIPLIER" alone.
    """
    ((_, (clip, multiplier)),) = defenses.parse(rules.defense)
    clipped, games = rows.clipped(clip).rows, len(members)
    std = clip * multiplier / rules.images
    random = np.random.default_rng([int(rng.Stream.DEFENSE), 0])
    sent = np.stack([clipped[own].mean(axis=0) for own in members])
    sent += np.float32(std) * random.standard_normal(sent.shape, np.float32)
    leaves, structure = jax.tree.flatten(params)
    parts = np.split(sent, np.cumsum(rows.sizes)[:-1], axis=1)
    update = structure.unflatten([p.reshape(-1, *x.shape) for p, x in zip(parts, leaves)])
    variances = structure.unflatten([np.full(games, std**2)] * len(leaves))
    strengths = ((np.full(games, clip), np.full(games, multiplier)),)
    return Target(update, labels[members], (), DefenseKnowledge(strengths, variances, (), ((),)))


def play(
    network: Network,
    pool: Pool,
    members: Int[np.ndarray, "game image"],
    rules: Rules,
    rows: Callable[[], measuring.Rows] | None = None,
) -> Played:
    """Plays games among the candidates of a pool.

    Args:
      network: the victim.
      pool: the candidates.
      members: of each game.
      rules: what the clients do and how the attacker names them.
      rows: gives the candidates' undefended gradients, where they were computed before.
    """
    targets = share(network, pool, members, rules).targets
    return answer(network, network.normalize(pool), targets, members, rules, rows)


def answer(
    network: Network,
    candidates: measuring.Candidates,
    targets: Target,
    members: np.ndarray,
    rules: Rules,
    rows: Callable[[], measuring.Rows] | None = None,
) -> Played:
    """The attacker's part of games: the members are noted down, not looked at.

    Args:
      network, candidates, rules, rows: as in `play`, the candidates as the network sees them.
      targets: what the clients shared, with a leading axis of games.
      members: of each game.
    """
    if rules.classes is not None:
        candidates, rows = ident.all_labels(candidates, rules.classes), None
    rankings = [
        attack(network, candidates, update, knowledge, rules, rows)
        for update, knowledge in _together(targets, rules)
    ]
    if rules.classes is not None:
        rankings = [ident.best_of_labels(r, rules.classes) for r in rankings]
    scores = np.concatenate([np.asarray(r.scores) for r in rankings])
    return Played(members, scores, np.concatenate([np.asarray(r.picks) for r in rankings]))


def _together(targets, rules: Rules):
    """The updates that can be measured in one go: all, or each alone."""
    count = len(targets.labels)
    chain = defenses.names(defenses.parse(rules.defense))
    alone = rules.steps > 1 or not set(chain) <= ALIKE
    step = 1 if alone else count
    sent = (targets.update, targets.defense_knowledge)
    for start in range(0, count, step):
        some = slice(start, start + step)
        yield jax.tree.map(lambda x, some=some: x[some], sent)


def root(gram: Float[np.ndarray, "candidate candidate"]) -> Float[np.ndarray, "candidate draw"]:
    """A matrix whose product with its transpose is `gram`, of which gradients may be dependent."""
    values, vectors = np.linalg.eigh(gram.astype(np.float64))
    return vectors * np.sqrt(np.maximum(values, 0))


def simulate(
    gram: Float[np.ndarray, "candidate candidate"],
    factor: Float[np.ndarray, "candidate draw"],
    entries: int,
    members: Int[np.ndarray, "game image"],
    method: str,
    variance: float,
    seed: int = 0,
) -> Played:
    """Plays games of one gradient each under Gaussian noise, from the products of gradients alone.

    The same games as `play`, in distribution, without compiling a client, storing a gradient or
    drawing a number for each entry: the products of N gradients with noise of variance v are
    normal, of mean 0 and covariance v K.

    Args:
      gram: K, the candidates' products with one another.
      factor: its `root`.
      entries: of an update, more than candidates.
      members: of each game.
      method: one of `identification.METHODS`.
      variance: of the noise on each entry, above 0.
      seed: of the noise.
    """
    random = np.random.default_rng([int(rng.Stream.DEFENSE), seed])
    games, count = len(members), len(gram)
    drawn = random.standard_normal((games, count))
    noise = drawn @ factor.T
    rest = random.chisquare(entries - count, games)  # of the noise, across all gradients
    taken = np.zeros((games, count))
    np.put_along_axis(taken, members, 1 / members.shape[1], axis=1)
    clean = taken @ gram
    cross = clean + variance**0.5 * noise
    power = (taken * (clean + 2 * variance**0.5 * noise)).sum(axis=1)
    power += variance * (np.square(drawn).sum(axis=1) + rest)
    products = measuring.Products(gram, np.float32(cross), np.float32(power), entries)
    images = members.shape[1]
    ranking = ident.identify(products, images, method, 1 / images, variance)
    return Played(members, np.asarray(ranking.scores), np.asarray(ranking.picks))


ALIKE = {"noise", "laplace", "dpsgd", "clip"}  # defenses that mean the same for every update
SPARSE = {"prune", "prune-layer", "top-k"}  # that send some entries alone
RESCALED = {"clip", "sign"}  # after which the weight of an image is not known


def attack(
    network: Network,
    candidates: measuring.Candidates,
    updates: PyTree,
    knowledge: DefenseKnowledge | tuple,
    rules: Rules,
    rows: Callable[[], measuring.Rows] | None = None,
) -> ident.Ranking:
    """Names the images of updates, knowing what the client does.

    Args:
      network: that the client received.
      candidates: who may be in the updates.
      updates: shaped like `params` with a leading axis; of one alone, but for defenses that mean
        the same for every update.
      knowledge: what an adaptive attacker works with (`defenses.adapt`), with a leading axis.
      rules: what the client does.
      rows: gives the candidates' undefended gradients, where they were computed before.
    """
    names = set(defenses.names(defenses.parse(rules.defense)))
    steps = rules.steps
    weight = rules.local.epochs / (rules.local.batch or rules.images)
    if names & RESCALED:
        weight = None
    variance, variances, clip = 0.0, None, None
    if knowledge:
        own = jax.tree.map(lambda x: x[0], knowledge)
        leaves = np.array(jax.tree.leaves(own.variances))
        if (leaves == leaves[0]).all():
            variance = float(leaves[0])
        else:
            # Where nothing was added an entry is known as well as identification can use.
            square = optax.tree.norm(updates, squared=True) / optax.tree.size(updates)
            least = ident.LEAST_VARIANCE * float(square)
            variances = jax.tree.map(lambda v: np.maximum(v, least), own.variances)
            variance = 1.0
        if "dpsgd" in names:
            clip = float(own.strengths[0][0])
    params = network.params
    if steps > 1:
        sent = jax.tree.map(lambda x: x[0], updates)
        params = measuring.midpoint(params, sent, rules.client_lr, steps)
    known = None if rows is None or steps > 1 else rows()
    measured = measuring.measure(
        network.loss,
        params,
        candidates,
        updates,
        clip=clip,
        variances=variances,
        sent_only=bool(names & SPARSE),
        noisy=variance > 0,
        known=known,
    )
    return ident.identify_among(
        measured, rules.images, rules.method, weight, variance, rules.shortlist
    )


def count(played: Played) -> Outcome:
    """Counts the successes."""
    members, candidates = played.members, played.scores.shape[1]
    games, images = members.shape
    named = np.array([np.isin(m, p).mean() for m, p in zip(members, played.picks)])
    inside = np.zeros(played.scores.shape, bool)
    np.put_along_axis(inside, members, True, axis=1)
    outside = np.sort(played.scores[~inside])
    rates = {}
    for rate in FALSE_POSITIVES:
        threshold = outside[min(len(outside) - 1, int(np.ceil((1 - rate) * len(outside))))]
        found = np.take_along_axis(played.scores, members, axis=1) > threshold
        rates[rate] = mean_share(found.mean(axis=1))
    whole = clopper_pearson(int((named == 1).sum()), games)
    return Outcome(mean_share(named), whole, rates, images / candidates, games, candidates)


def found_without_alarm(
    played: Played, empty: Float[np.ndarray, "game candidate"]
) -> tuple[Share, float]:
    """The share of members above a score that 1% of updates without any candidate reach.

    Args:
      played: games whose images are among the candidates.
      empty: scores of games whose images are not.

    Returns:
      The share, and that score.
    """
    threshold = float(np.quantile(empty.max(axis=1), 1 - FALSE_ALARMS, method="higher"))
    members = np.take_along_axis(played.scores, played.members, axis=1)
    return mean_share((members > threshold).mean(axis=1)), threshold


def variants(images: np.ndarray) -> dict[str, np.ndarray]:
    """Augmentations of images, by name: the harder candidates beside the true one.

    Args:
      images: uint8 [image, height, width, channel].
    """

    def lighter(factor):
        return np.clip(images * np.float32(factor), 0, 255).astype(np.uint8)

    return {
        "flipped": images[:, :, ::-1],
        "one pixel down": _shifted(images, 1, 0),
        "one pixel up": _shifted(images, -1, 0),
        "one pixel right": _shifted(images, 0, 1),
        "one pixel left": _shifted(images, 0, -1),
        "5% lighter": lighter(1.05),
        "5% darker": lighter(0.95),
    }


def _shifted(images: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Moves images by up to two pixels; what comes in is what lies at the border, mirrored."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    return np.roll(padded, (rows, columns), axis=(1, 2))[:, 2:-2, 2:-2]


def nearest(images: np.ndarray, labels: np.ndarray, position: int, count: int) -> np.ndarray:
    """Positions of an image and its nearest in pixels among those of its class, itself first."""
    same = np.flatnonzero(labels == labels[position])
    difference = images[same].astype(np.float32) - images[position]
    order = np.square(difference).sum(axis=(1, 2, 3)).argsort(kind="stable")
    return same[order][:count]
