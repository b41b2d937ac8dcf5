"""The audit of one update: capacity, identification, ceiling, reconstruction, and a verdict.

The client's view: it knows its images and what it did to its update, and asks what anyone who
receives the update, knows the network and knows the defense could learn.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxinv import client, defenses, metrics, rng
from jaxinv.attacks import ATTACKS, FAMILIES
from jaxinv.attacks.gauss_newton import GaussNewton
from jaxinv.attacks.gradient_matching import Method
from jaxinv.attacks.smoothed_gauss_newton import SmoothedGaussNewton
from jaxinv.audit import ceiling as ceilings
from jaxinv.audit import dp, games, measuring, server
from jaxinv.client import kinds
from jaxinv.client.capacity import Capacity, capacity
from jaxinv.data.image_prior import ImagePrior
from jaxinv.engine.likeness import Judge, Likeness, Lineup, likeness, line_up
from jaxinv.errors import UserError
from jaxinv.invert import invert
from jaxinv.machine import runtime
from jaxinv.networks import kinks
from jaxinv.privacy import accounting
from jaxinv.types import Normalization, PyTree, Target, Truth


class Short(NamedTuple):
    """A short attack."""

    name: str
    method: Method | GaussNewton | SmoothedGaussNewton
    iterations: int | None = None  # None, and of the seeds: as `jaxinv.invert` has them
    seeds: int | None = None


# `second_order` is the other.
FIRST_ORDER = Short(
    "gradient matching through a generator",
    Method(representation="generator"),
    iterations=500,
    seeds=4,
)


class Setting(NamedTuple):
    """What the client did, and how much is tried."""

    defense: str = "none"
    local: client.Local = client.Local()
    client_lr: float = 0.1
    method: str = "slab"  # of identification: `identification.METHODS`
    labels_known: bool = True  # to the attacker who names images
    games: int = 100  # with batches like this one, for the intervals
    seed: int = 0  # of the games
    imprint_bins: int | None = None  # of a malicious server's; None: the server is honest
    amplify: float = 1.0  # its factor on the last layer


class Found(NamedTuple):
    """A reconstruction, measured."""

    attack: str
    psnr: float  # dB
    likeness: Likeness
    images: Float[np.ndarray, "image height width channel"]  # pixels


class Audit(NamedTuple):
    """What an update gives away."""

    images: int
    parameters: int
    setting: Setting
    capacity: Capacity | None  # None: the client took several steps, and it is of one gradient
    named: int  # of this update's own images, among the candidates
    identification: games.Outcome  # over games with batches like this one
    inspection: server.Inspection
    imprinted: server.Imprinted | None  # what a malicious server reads
    fished: server.Fished | None  # whose gradient it can have alone
    ceiling: ceilings.Ceiling | None
    rank_psnr: float  # that no attacker of that prior exceeds by the layers alone, dB; inf: none
    found: tuple[Found, ...]
    not_tried: tuple[str, ...]  # attacks that are not for such an update, and why
    mean_color_psnr: float
    release_bound: float | None  # on naming one image, of a client with DP-SGD
    epsilon_shown: dp.Bound | None  # by the games, of the same
    truth: Float[np.ndarray, "image height width channel"]

    @property
    def best(self) -> Found | None:
        """The reconstruction of highest PSNR."""
        return max(self.found, key=lambda f: f.psnr, default=None)


def audit(
    module: nn.Module,
    variables: PyTree,
    normalization: Normalization,
    images: np.ndarray,
    image_labels: np.ndarray,
    others: games.Pool,
    *,
    update: PyTree | None = None,
    setting: Setting = Setting(),  # noqa: B008
    image_prior: ImagePrior | None = None,
    judge: Judge | None = None,
) -> Audit:
    """Audits the update of a client's images.

    Args:
      module, variables, normalization: the network and how it sees pixels.
      images: the client's, uint8 [image, height, width, channel].
      image_labels: their classes.
      others: other images of the same kind, among which its own are named.
      update: the gradient that the client sends (`client.kinds.understand` makes it of anything
        else); None: it is computed, as `setting` says.
      setting: what the client did, and how much is tried.
      image_prior: what an attacker knows of images; None leaves ceiling and reconstruction out.
      judge: a trained network that had no part in the update, by whose features and classes
        reconstructions are measured beside pixels.

    Raises:
      UserError: the images do not fit the network, there are too few candidates, or the update
        holds something else than finite numbers.
    """
    images, image_labels = np.asarray(images), np.asarray(image_labels, np.int32)
    count = len(image_labels)
    pool, members = _dealt(games.Pool(images, image_labels), others, setting)
    network = games.network(module, variables, normalization)
    candidates = network.normalize(pool)
    own, played = _play(network, pool, candidates, members, update, setting)
    outcome = games.count(games.Played(*(x[1:] for x in played)))
    imprinted = fished = None
    if setting.imprint_bins is not None:
        imprinted = server.play(
            *(network, candidates, members, setting.defense), setting.imprint_bins, setting.amplify
        )
        fished = server.fish(network, candidates, members)
    truth = Truth(jnp.asarray(images / np.float32(255)), jnp.asarray(image_labels))
    room = None
    if setting.local.steps(count) == 1:
        room = capacity(module, variables, pool.images.shape[1:])
    ceiling, rank_psnr, found, not_tried = None, math.inf, [], []
    if image_prior is not None:
        rank_psnr = _rank_psnr(image_prior, normalization, count, room)
        if setting.local.steps(count) == 1 and hides_by_noise(setting.defense):
            known = own.defense_knowledge
            ceiling = ceiling_of(network, truth, image_prior, known.variances if known else None)
        lineup = line_up(others.images / np.float32(255), judge)
        found, not_tried = reconstruct(network, truth, own.update, image_prior, setting, lineup)
    bound, shown = _epsilon(setting, outcome, count)
    return Audit(
        images=count,
        parameters=optax.tree.size(network.params),
        setting=setting,
        capacity=room,
        named=int(np.isin(played.picks[0], members[0]).sum()),
        identification=outcome,
        inspection=server.inspect(
            network.loss, network.params, candidates.images[members[0]], image_labels
        ),
        imprinted=imprinted,
        fished=fished,
        ceiling=ceiling,
        rank_psnr=rank_psnr,
        found=tuple(found),
        not_tried=tuple(not_tried),
        mean_color_psnr=float(metrics.mean_color(truth, normalization).psnr),
        release_bound=bound,
        epsilon_shown=shown,
        truth=np.asarray(truth.images),
    )


def _dealt(
    own: games.Pool, others: games.Pool, setting: Setting
) -> tuple[games.Pool, Int[np.ndarray, "game image"]]:
    """The candidates, and the images of each game: the first is the client's own.

    In an order that says nothing, for of equal scores the first are named.

    Raises:
      UserError: there are too few candidates.
    """
    count, total = len(own.labels), len(own.labels) + len(others.labels)
    if total < 2 * count:
        raise UserError(
            f"--candidates {total}: an update of {count} images needs {2 * count} to choose "
            "among, or more"
        )
    drawn = games.draw(setting.games, count, total, setting.seed)
    members = np.concatenate([np.arange(count)[None], drawn])
    key = rng.name_key(rng.stream_key(rng.Stream.DATA, setting.seed), "pool")
    order = np.asarray(jax.random.permutation(key, total))
    pool = games.Pool(*(np.concatenate(both)[order] for both in zip(own, others)))
    return pool, np.argsort(order)[members]


def _play(
    network: games.Network,
    pool: games.Pool,
    candidates: measuring.Candidates,
    members: Int[np.ndarray, "game image"],
    update: PyTree | None,
    setting: Setting,
) -> tuple[Target, games.Played]:
    """Plays the games of an audit; the first is of the client's own update, which is returned.

    Args:
      network, pool, members: as in `games.play`.
      candidates: the pool as the network sees it.
      update: what the client sends; None: it is computed.
      setting: of the audit.
    """
    count = members.shape[1]
    rules = games.Rules(count, setting.method, setting.defense, setting.local, setting.client_lr)
    if not setting.labels_known:
        of_one = functools.partial(network.module.apply, network.variables)
        rules = rules._replace(classes=jax.eval_shape(of_one, candidates.images[:1]).shape[-1])
    targets = games.share(network, pool, members, rules).targets
    if update is not None:
        sent = jax.tree.map(lambda x, own: x.at[0].set(own), targets.update, update)
        targets = targets._replace(update=sent)
    own = jax.tree.map(lambda x: x[0], targets)
    kinds.check_finite(own.update, "update")
    rows = games.known_rows(network, candidates)
    played = games.answer(network, candidates, targets, members, rules, rows)
    return own, played


def _rank_psnr(
    image_prior: ImagePrior, normalization: Normalization, count: int, room: Capacity | None
) -> float:
    """What no attacker of a prior exceeds by the layers alone, dB."""
    if room is None or room.free(count) <= 0:
        return math.inf
    left = ceilings.rank_bound(image_prior, normalization.std, count, room.determined(count))
    return -10 * math.log10(left)


def _epsilon(
    setting: Setting, outcome: games.Outcome, count: int
) -> tuple[float | None, dp.Bound | None]:
    """Of DP-SGD: the bound on naming one image, and the epsilon that the games show."""
    private = dict(defenses.parse(setting.defense)).get("dpsgd")
    if private is None:
        return None, None
    mechanism = accounting.Mechanism(private[1])
    bound = accounting.reconstruction_bound(mechanism, 1 / outcome.candidates)
    if count > 1:
        return bound, None
    wins = round(outcome.recall.value * outcome.games)
    return bound, dp.lower_bound(wins, outcome.games, outcome.candidates, 1e-5)


def hides_by_noise(defense: str) -> bool:
    """Whether the ceiling knows all that hides images: noise of a known variance, and a scale."""

    def known(name):
        own = defenses.DEFENSES[name]
        return name == "clip" or (own.random and own.variance is not None)

    return all(map(known, defenses.names(defenses.parse(defense))))


def ceiling_of(
    network: games.Network, truth: Truth, image_prior: ImagePrior, variances: PyTree | None = None
) -> ceilings.Ceiling:
    """Computes the ceiling of one gradient at the client's images, in float64.

    Args:
      network: that the client received.
      truth: the client's images and labels.
      image_prior: what the attacker knows of images.
      variances: of a known defense's noise, a scalar a leaf.
    """
    with runtime.arithmetic("float64") as cast:
        module, variables, normalization, _ = network
        variables, normalization, image_prior, variances, truth = cast(
            (variables, normalization, image_prior, variances, truth)
        )
        update_of, context = _gradient_of(module), (variables, truth.labels)
        images = normalization.normalize(truth.images)
        noise = ceilings.noise_variances(update_of(images, *context), variances)
        return ceilings.ceiling(update_of, images, image_prior, noise, normalization.std, context)


def ceiling_curve(
    network: games.Network, truth: Truth, image_prior: ImagePrior, most: int | None = None
) -> ceilings.Curve:
    """The same of one image without a defense, against the variance of noise to come.

    In float32: for noise above 1e-3. Other arguments are `ceiling_of`'s and `ceiling.curve`'s.
    """
    module, variables, normalization, _ = network
    images, context = normalization.normalize(truth.images), (variables, truth.labels)
    update_of = _gradient_of(module)
    return ceilings.curve(update_of, images, image_prior, normalization.std, context, most)


@functools.lru_cache(maxsize=16)
def _gradient_of(module: nn.Module) -> Callable[[Array, PyTree, Array], PyTree]:
    """The gradient of a client as a function of its normalized images, variables and labels."""

    @jax.jit
    def gradient(images, variables, labels):
        loss = client.loss_fn(module, variables)
        return client.gradient(loss, variables["params"], images, labels)[0]

    return gradient


def reconstruct(
    network: games.Network,
    truth: Truth,
    update: PyTree,
    image_prior: ImagePrior,
    setting: Setting,
    lineup: Lineup,
) -> tuple[list[Found], list[str]]:
    """Runs the best short attacks with an image prior: second order, and gradient matching.

    Args:
      network: that the client received.
      truth: the client's images, for the measures alone.
      update: that it sends.
      image_prior: of both attacks.
      setting: what the client did.
      lineup: candidates beside the images, among whom they are looked for.

    Returns:
      What was found, and in words the attacks that are not for such an update.
    """
    module, variables, normalization, _ = network
    count, shape = len(truth.labels), truth.images.shape[1:]
    steps, chain = setting.local.steps(count), defenses.parse(setting.defense)
    each_image = defenses.takes_each_image(defenses.names(chain))
    found, not_tried = [], []
    if not optax.tree.norm(update) > 0:
        return found, ["attacks on pixels: the update is zero in all layers"]
    for attack in (second_order(module, variables, shape), FIRST_ORDER):
        family = FAMILIES[type(attack.method)]
        if why := family.unfit(steps=steps, each_image=each_image):
            not_tried.append(f"{attack.name}, which {why}")
            continue
        result = invert(
            module,
            variables,
            update,
            image_shape=shape,
            mean=np.asarray(normalization.mean).tolist(),
            std=np.asarray(normalization.std).tolist(),
            labels=truth.labels.tolist(),
            images=count,
            update_kind="gradient",
            method=dataclasses.replace(attack.method, local=setting.local),
            client_lr=setting.client_lr if steps > 1 else None,
            defense=setting.defense,
            image_prior=image_prior if attack.method.needs_image_prior else None,
            seeds=attack.seeds,
            iterations=attack.iterations,
        )
        if np.isnan(result.objectives).all():
            continue
        found.append(_measured(attack.name, result.best, truth, normalization, lineup))
    return found, not_tried


def _measured(
    name: str,
    best: Float[np.ndarray, "image height width channel"],
    truth: Truth,
    normalization: Normalization,
    lineup: Lineup,
) -> Found:
    """An attack's images, each beside the true one that it is matched with."""
    pixels = metrics.match(jnp.asarray(best), truth.images, normalization.mean)
    pixels, own = np.asarray(pixels), np.asarray(truth.images)
    measured = likeness(pixels[None], own, normalization.mean, lineup)
    measured = Likeness(*(float(x[0]) for x in measured))
    psnr = float(metrics.psnr(jnp.asarray(pixels), jnp.asarray(own)).mean())
    return Found(name, psnr, measured, pixels)


def second_order(module: nn.Module, variables: PyTree, image_shape: Sequence[int]) -> Short:
    """The second-order attack that suits a network."""
    if has_kinks(module, variables, image_shape):
        cg_iterations = ATTACKS["smoothed_bayes"].settings["cg_iterations"]
        return Short("smoothed Gauss-Newton", SmoothedGaussNewton(cg_iterations=cg_iterations))
    return Short("annealed Gauss-Newton", GaussNewton())


def has_kinks(module: nn.Module, variables: PyTree, image_shape: Sequence[int]) -> bool:
    """Whether a network calls a kink (`networks.kinks`): which second-order attack suits it."""
    with kinks.recording() as seen:
        jax.eval_shape(lambda x: module.apply(variables, x), jnp.zeros((1, *image_shape)))
    return bool(seen)
