"""The audit of one update: capacity, identification, ceiling, reconstruction, and a verdict.

The client's view: it knows its images and what it did to its update, and asks what anyone who
receives the update, knows the network and knows the defense could learn.
"""

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
from jaxinv.errors import UserError
from jaxinv.invert import invert
from jaxinv.machine import runtime
from jaxinv.networks import kinks
from jaxinv.privacy import accounting
from jaxinv.types import Normalization, PyTree, Truth


class Setting(NamedTuple):
    """What the client did, and how much is tried."""

    defense: str = "none"
    local: client.Local = client.Local()
    client_lr: float = 0.1
    method: str = "auto"  # of identification: `identification.METHODS`, or by noise
    games: int = 100  # with batches like this one, for the intervals
    ceiling: bool = True
    reconstruct: bool = True
    seed: int = 0  # of the games


class Found(NamedTuple):
    """A reconstruction, measured."""

    attack: str
    psnr: float  # mean over the images, dB
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
    ceiling: ceilings.Ceiling | None
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
    rules = _rules(setting, count)
    network = games.network(module, variables, normalization)
    targets = games.share(network, pool, members, rules).targets
    if update is not None:
        sent = jax.tree.map(lambda x, own: x.at[0].set(own), targets.update, update)
        targets = targets._replace(update=sent)
    update = jax.tree.map(lambda x: x[0], targets.update)
    candidates = network.normalize(pool)
    stored = len(pool.labels) * optax.tree.size(network.params) * 4 <= games.ident.STORED
    rows = None
    if stored:
        rows = functools.cache(lambda: _rows_of(network, candidates))
    played = games.answer(network, candidates, targets, members, rules, rows)
    outcome = games.count(games.Played(*(x[1:] for x in played)))
    chain = defenses.parse(setting.defense)
    inspection = server.inspect(
        network.loss, network.params, candidates.images[:count], image_labels
    )
    truth = Truth(jnp.asarray(images / np.float32(255)), jnp.asarray(image_labels))
    ceiling = found = None
    if image_prior is not None and setting.ceiling and setting.local.steps(count) == 1:
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
        found = reconstruct(module, variables, normalization, truth, update, image_prior, setting)
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
        optax.tree.size(network.params),
        setting,
        capacity(module, variables, pool.images.shape[1:]),
        int(np.isin(played.picks[0], members[0]).sum()),
        outcome,
        inspection,
        ceiling,
        tuple(found or ()),
        float(metrics.mean_color(truth, normalization).psnr),
        bound,
        shown,
        np.asarray(truth.images),
    )


def _rules(setting: Setting, images: int) -> games.Rules:
    method = setting.method
    if method == "auto":
        method = choose_method(setting.defense, setting.local.steps(images))
    return games.Rules(images, method, setting.defense, setting.local, setting.client_lr)


def choose_method(defense: str, steps: int = 1) -> str:
    """The method that names most: least squares of an update as it was computed, else slab."""
    return "ridge" if defense == defenses.NONE and steps == 1 else "slab"


def _rows_of(network: games.Network, candidates: games.ident.Candidates) -> games.ident.Rows:
    rows = games.ident.gradients(network.loss, network.params, candidates)
    return games.ident.Rows(rows, rows @ rows.T)


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
) -> list[Found]:
    """Runs the best short attacks: second order with an image prior, and gradient matching."""
    count, shape = len(truth.labels), truth.images.shape[1:]
    smooth = not has_kinks(module, variables, shape)
    known = {"seeds": 1, "image_prior": image_prior}
    attacks = {
        "annealed Gauss-Newton": (GaussNewton(local=setting.local), known | {"iterations": 28}),
        "smoothed Gauss-Newton": (
            SmoothedGaussNewton(local=setting.local, cg_iterations=30),
            known | {"iterations": 24},
        ),
        "gradient matching, cosine + TV": (
            Method(local=setting.local),
            {"seeds": 4, "iterations": 500},
        ),
    }
    del attacks["smoothed Gauss-Newton" if smooth else "annealed Gauss-Newton"]
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
            method=method,
            client_lr=setting.client_lr if setting.local.steps(count) > 1 else None,
            defense=setting.defense,
            **more,
        )
        if np.isnan(result.objectives).all():
            continue
        pixels = metrics.match(jnp.asarray(result.best), truth.images, normalization.mean)
        psnr = float(metrics.psnr(pixels, truth.images).mean())
        found.append(Found(name, psnr, np.asarray(pixels)))
    return found


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
        anyone.append(
            f"The best of {len(found.found)} short attacks ({found.best.attack}) recovers "
            f"{images} at {found.best.psnr:.1f} dB; the mean color has {found.mean_color_psnr:.1f}."
        )
    if found.ceiling is not None:
        top = ", ".join(f"{p:.1f}" for p in found.ceiling.psnr[:8])
        nobody.append(
            f"An attacker who knows of images what a Gaussian prior says does not exceed, on "
            f"average over the noise, {top} dB (the prior alone: "
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
