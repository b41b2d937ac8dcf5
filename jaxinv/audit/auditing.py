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
from jaxtyping import Array, Float

from jaxinv import client, defenses, metrics
from jaxinv.attacks.gauss_newton import GaussNewton
from jaxinv.attacks.gradient_matching import Method
from jaxinv.attacks.smoothed_gauss_newton import SmoothedGaussNewton
from jaxinv.audit import ceiling as ceilings
from jaxinv.audit import dp, games, server
from jaxinv.audit.capacity import Capacity, capacity
from jaxinv.audit.intervals import Share
from jaxinv.data.image_prior import ImagePrior
from jaxinv.engine.likeness import Judge, Likeness, Lineup, likeness, line_up
from jaxinv.errors import UserError
from jaxinv.invert import invert
from jaxinv.machine import runtime
from jaxinv.networks import kinks
from jaxinv.privacy import accounting
from jaxinv.types import Normalization, PyTree, Truth

EXACT = 100.0  # dB from which on an image is exact


class Setting(NamedTuple):
    """What the client did, and how much is tried."""

    defense: str = "none"
    local: client.Local = client.Local()
    client_lr: float = 0.1
    method: str = "slab"  # of identification: `identification.METHODS`
    games: int = 100  # with batches like this one, for the intervals
    ceiling: bool = True
    reconstruct: bool = True
    seed: int = 0  # of the games
    imprint_bins: int | None = None  # of a malicious server's; None: the server is honest


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
    capacity: Capacity
    named: int  # of this update's own images, among the candidates
    identification: games.Outcome  # over games with batches like this one
    inspection: server.Inspection
    imprinted: server.Imprinted | None  # what a malicious server reads
    fished: server.Fished | None  # whose gradient it can have alone
    ceiling: ceilings.Ceiling | None
    rank_psnr: float  # that no attacker of that prior exceeds by the layers alone, dB; inf: none
    found: tuple[Found, ...]
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
      update: what the client sends; None: it is computed, as `setting` says.
      setting: what the client did, and how much is tried.
      image_prior: what an attacker knows of images; None leaves ceiling and reconstruction out.
      judge: a trained network that had no part in the update, by whose features and classes
        reconstructions are measured beside pixels.

    Raises:
      UserError: the images do not fit the network, or there are too few candidates.
    """
    images, image_labels = np.asarray(images), np.asarray(image_labels, np.int32)
    count = len(image_labels)
    if len(others.labels) < count:
        raise UserError(
            f"--candidates {len(others.labels) + count}: an update of {count} images needs "
            f"{2 * count} to choose among, or more"
        )
    pool = games.Pool(
        np.concatenate([images, others.images]), np.concatenate([image_labels, others.labels])
    )
    drawn = games.draw(setting.games, count, len(pool.labels), setting.seed)
    members = np.concatenate([np.arange(count)[None], drawn])  # its own game is the first
    network = games.network(module, variables, normalization)
    steps, parameters = setting.local.steps(count), optax.tree.size(network.params)
    rules = games.Rules(count, setting.method, setting.defense, setting.local, setting.client_lr)
    targets = games.share(network, pool, members, rules).targets
    if update is not None:
        sent = jax.tree.map(lambda x, own: x.at[0].set(own), targets.update, update)
        targets = targets._replace(update=sent)
    update = jax.tree.map(lambda x: x[0], targets.update)
    candidates = network.normalize(pool)
    rows = games.known_rows(network, candidates)
    played = games.answer(network, candidates, targets, members, rules, rows)
    outcome = games.count(games.Played(*(x[1:] for x in played)))
    chain = defenses.parse(setting.defense)
    inspection = server.inspect(
        network.loss, network.params, candidates.images[:count], image_labels
    )
    imprinted = fished = None
    if setting.imprint_bins is not None:
        imprinted = server.play(network, candidates, members, setting.defense, setting.imprint_bins)
        fished = server.fish(network, candidates, members)
    truth = Truth(jnp.asarray(images / np.float32(255)), jnp.asarray(image_labels))
    room = capacity(module, variables, pool.images.shape[1:])
    ceiling, found, rank_psnr = None, None, math.inf
    if image_prior is not None and room.free(count) > 0:
        free = ceilings.rank_bound(image_prior, normalization.std, count, room.determined(count))
        rank_psnr = -10 * math.log10(free)
    if image_prior is not None and setting.ceiling and steps == 1:
        knowledge = targets.defense_knowledge
        ceiling = ceiling_of(
            module,
            variables,
            normalization,
            truth,
            image_prior,
            jax.tree.map(lambda x: x[0], knowledge.variances) if knowledge else None,
        )
    if image_prior is not None and setting.reconstruct:
        lineup = line_up(others.images / np.float32(255), judge)
        found = reconstruct(
            module, variables, normalization, truth, update, image_prior, setting, lineup
        )
    private = dict(chain).get("dpsgd")
    bound = shown = None
    if private is not None:
        mechanism = accounting.Mechanism(private[1])
        bound = accounting.reconstruction_bound(mechanism, 1 / len(pool.labels))
        if count == 1:
            wins = round(outcome.recall.value * outcome.games)
            shown = dp.lower_bound(wins, outcome.games, len(pool.labels), 1e-5)
    return Audit(
        count,
        parameters,
        setting,
        room,
        int(np.isin(played.picks[0], members[0]).sum()),
        outcome,
        inspection,
        imprinted,
        fished,
        ceiling,
        rank_psnr,
        tuple(found or ()),
        float(metrics.mean_color(truth, normalization).psnr),
        bound,
        shown,
        np.asarray(truth.images),
    )


def ceiling_of(
    module: nn.Module,
    variables: PyTree,
    normalization: Normalization,
    truth: Truth,
    image_prior: ImagePrior,
    variances: PyTree | None = None,
) -> ceilings.Ceiling:
    """Computes the ceiling of one gradient at the client's images, in float64.

    Args:
      module, variables, normalization: the network.
      truth: the client's images and labels.
      image_prior: what the attacker knows of images.
      variances: of a known defense's noise, a scalar a leaf.
    """
    with runtime.arithmetic("float64") as cast:
        variables, normalization, image_prior, variances, truth = cast(
            (variables, normalization, image_prior, variances, truth)
        )
        update_of, context = _gradient_of(module), (variables, truth.labels)
        images = normalization.normalize(truth.images)
        noise = ceilings.noise_variances(update_of(images, *context), variances)
        return ceilings.ceiling(update_of, images, image_prior, noise, normalization.std, context)


def ceiling_curve(network: games.Network, truth: Truth, image_prior: ImagePrior) -> ceilings.Curve:
    """The same of one image without a defense, against the variance of noise to come."""
    with runtime.arithmetic("float64") as cast:
        module, variables, normalization, _ = network
        variables, normalization, image_prior, truth = cast(
            (variables, normalization, image_prior, truth)
        )
        images, context = normalization.normalize(truth.images), (variables, truth.labels)
        return ceilings.curve(_gradient_of(module), images, image_prior, normalization.std, context)


@functools.lru_cache(maxsize=16)
def _gradient_of(module: nn.Module) -> Callable[[Array, PyTree, Array], PyTree]:
    """The gradient of a client as a function of its normalized images, variables and labels."""

    @jax.jit
    def gradient(images, variables, labels):
        loss = client.loss_fn(module, variables)
        return client.gradient(loss, variables["params"], images, labels)[0]

    return gradient


def reconstruct(
    module: nn.Module,
    variables: PyTree,
    normalization: Normalization,
    truth: Truth,
    update: PyTree,
    image_prior: ImagePrior,
    setting: Setting,
    lineup: Lineup,
) -> list[Found]:
    """Runs the best short attacks with an image prior: second order, and gradient matching.

    Args:
      module, variables, normalization: the network.
      truth: the client's images, for the measures alone.
      update: that it sends.
      image_prior: of both attacks.
      setting: what the client did.
      lineup: candidates beside the images, among whom they are looked for.
    """
    count, shape = len(truth.labels), truth.images.shape[1:]
    name, method, iterations = second_order(module, variables, shape)
    attacks = {
        name: (method, {"seeds": 1, "iterations": iterations}),
        "gradient matching through a generator": (
            Method(representation="generator"),
            {"seeds": 4, "iterations": 500},
        ),
    }
    found = []
    for name, (method, more) in attacks.items():
        result = invert(
            module,
            variables,
            update,
            image_shape=shape,
            mean=np.asarray(normalization.mean).tolist(),
            std=np.asarray(normalization.std).tolist(),
            labels=truth.labels.tolist(),
            images=count,
            method=dataclasses.replace(method, local=setting.local),
            client_lr=setting.client_lr if setting.local.steps(count) > 1 else None,
            defense=setting.defense,
            image_prior=image_prior,
            **more,
        )
        if np.isnan(result.objectives).all():
            continue
        pixels = metrics.match(jnp.asarray(result.best), truth.images, normalization.mean)
        pixels, own = np.asarray(pixels), np.asarray(truth.images)
        measured = likeness(pixels, own, normalization.mean, lineup)
        psnr = float(metrics.psnr(jnp.asarray(pixels), jnp.asarray(own)).mean())
        found.append(Found(name, psnr, measured, pixels))
    return found


def second_order(
    module: nn.Module, variables: PyTree, image_shape: Sequence[int]
) -> tuple[str, GaussNewton | SmoothedGaussNewton, int]:
    """The second-order attack that suits a network: its name, the method, its steps."""
    if has_kinks(module, variables, image_shape):
        return "smoothed Gauss-Newton", SmoothedGaussNewton(cg_iterations=30), 24
    return "annealed Gauss-Newton", GaussNewton(), 28


def has_kinks(module: nn.Module, variables: PyTree, image_shape: Sequence[int]) -> bool:
    """Whether a network calls a kink (`networks.kinks`): which second-order attack suits it."""
    with kinks.recording() as seen:
        jax.eval_shape(lambda x: module.apply(variables, x), jnp.zeros((1, *image_shape)))
    return bool(seen)


# --- In words -------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What an audit says, in sentences."""

    anyone: list[str]  # could read off this update
    nobody: list[str]
    not_tried: list[str]


def verdict(found: Audit) -> Verdict:
    """Says what was found in plain words."""
    outcome, b = found.identification, found.images
    images = "its image" if b == 1 else f"its {b} images"
    anyone = [
        f"Whoever holds {outcome.candidates:,} candidates, {images} among them, names "
        f"{percent(outcome.recall)} of the images of such an update; a guess names "
        f"{outcome.chance:.2%}. Of this one: {found.named} of {b}."
    ]
    nobody, cap = [], found.capacity
    if b <= cap.images:
        anyone.append(
            "Nothing in the network's layers forbids exact images: one gradient can determine up "
            f"to {cap.images:,.1f} of them, and here are {b}."
        )
    else:
        nobody.append(
            f"From the gradient alone nobody determines more than {1 - cap.free(b):.0%} of the "
            f"numbers of {images}: the network's layers let through {cap.images:,.1f} images "
            f"(binding: {cap.binding.layer}). The rest must come from knowledge of images."
        )
    if found.best is not None:
        best = found.best
        anyone.append(
            f"The best of {len(found.found)} short attacks ({best.attack}) recovers "
            f"{images} at {best.psnr:.1f} dB; the mean color has {found.mean_color_psnr:.1f}. Of "
            f"what it recovers {best.likeness.named_by_pixels:.0%} is nearest to its own image "
            f"among the {outcome.candidates:,} candidates."
        )
    if found.imprinted is not None:
        read = found.imprinted
        anyone.append(
            f"A server that puts an imprint of {read.bins:,} bins in front of the network reads "
            f"{percent(read.exact)} of the images off such an update exactly (expected without a "
            f"defense: {read.expected:.1%}). Of this one: {read.own} of {b}."
        )
    if found.fished is not None and b > 1:
        anyone.append(
            "A server that fishes for a class gets the gradient of one image alone, which every "
            f"attack on single images may follow: {percent(found.fished.alone)} of the images are "
            "the only ones of their class in such an update."
        )
    knows = "An attacker who knows of images what a Gaussian prior says"
    if math.isfinite(found.rank_psnr):
        nobody.append(f"{knows} does not exceed {found.rank_psnr:.1f} dB by the layers alone.")
    if found.ceiling is not None and found.ceiling.solved:
        top = ", ".join(f"{p:.1f}" for p in found.ceiling.psnr[:8])
        if found.ceiling.psnr.min() > EXACT:
            anyone.append(
                f"Near the true images nothing but rounding hides them: the ceiling is {top} dB."
            )
        else:
            nobody.append(
                f"{knows} does not exceed, on average over the noise, {top} dB (the prior alone: "
                f"{float(np.mean(found.ceiling.prior_psnr)):.1f}). A local bound, at these images."
            )
    if found.release_bound is not None:
        nobody.append(
            f"By DP-SGD no attacker who sees this release alone names one given image among "
            f"{outcome.candidates:,} more often than in {found.release_bound:.3%} of the cases."
        )
    if found.inspection.dominated and b > 1:
        anyone.append(
            f"One image outweighs all others in the gradients of {len(found.inspection.dominated)} "
            "layers: look at the parameters you were sent."
        )
    if found.inspection.parallel > 0:
        anyone.append(
            f"{found.inspection.parallel:.0%} of a dense layer's units measure the same thing: "
            "this is how a malicious server imprints images."
        )
    return Verdict(anyone, nobody, list(NOT_TRIED))


NOT_TRIED = (
    "an attacker with a learned image prior (a diffusion model, a generator)",
    "updates of several rounds together",
    "candidates that differ from the true images a little, and labels that are not known",
    "BatchNorm in training mode, where images see one another",
    "hours of attack: each ran for seconds to minutes, from one to four seeds",
)


def percent(share: Share) -> str:
    """A share with its interval."""
    return f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"


# --- The client's filter --------------------------------------------------------------------------


class Limits(NamedTuple):
    """From when on an update is held back."""

    d_snr: float = server.DOMINANT  # of a layer: one image against all others
    parallel: float = 0.0  # share of a dense layer's units that measure what another does
    least_images: float = 1.0  # times the network's capacity: fewer can be determined exactly
    psnr: float = math.inf  # dB that the ceiling may reach; inf: it is not computed


class Decision(NamedTuple):
    """Whether to send."""

    action: str  # "send" or "hold"
    reasons: tuple[str, ...]


def filter(
    module: nn.Module,
    variables: PyTree,
    normalization: Normalization,
    images: np.ndarray,
    image_labels: np.ndarray,
    *,
    variances: PyTree | None = None,
    image_prior: ImagePrior | None = None,
    limits: Limits = Limits(),  # noqa: B008
) -> Decision:
    """Decides for a client, before it sends, in seconds.

    Args:
      module, variables: as the server sent them.
      normalization: how the network sees pixels.
      images: the client's batch, uint8.
      image_labels: its classes.
      variances: of the noise that it will add, a scalar a leaf; None: none.
      image_prior: for the ceiling, where `limits.psnr` asks for it.
      limits: from when on it is held back.
    """
    count = len(image_labels)
    normalized = normalization.normalize(np.asarray(images) / np.float32(255))
    network = games.network(module, variables, normalization)
    seen = server.inspect(network.loss, network.params, normalized, image_labels)
    reasons = []
    if count == 1:
        reasons.append("one image alone: the update is its gradient; take more images")
    else:
        worst = max(seen.d_snr, key=lambda name: np.nan_to_num(seen.d_snr[name]))
        if seen.d_snr[worst] > limits.d_snr:
            reasons.append(
                f"one image outweighs all others in {worst} (D-SNR {seen.d_snr[worst]:.2g})"
            )
    if seen.parallel > limits.parallel:
        reasons.append(f"{seen.parallel:.0%} of a dense layer's units measure the same thing")
    room = capacity(module, variables, normalized.shape[1:]).images
    if variances is None and count <= limits.least_images * room:
        reasons.append(
            f"without noise one gradient can determine {room:.1f} images; here are {count}"
        )
    if math.isfinite(limits.psnr):
        if image_prior is None:
            raise UserError("limits.psnr: the ceiling needs an image_prior")
        truth = Truth(np.asarray(images) / np.float32(255), np.asarray(image_labels, np.int32))
        top = ceiling_of(module, variables, normalization, truth, image_prior, variances).psnr.max()
        if top > limits.psnr:
            reasons.append(f"an attacker may reach {top:.1f} dB; the limit is {limits.psnr:g}")
    return Decision("hold" if reasons else "send", tuple(reasons))
