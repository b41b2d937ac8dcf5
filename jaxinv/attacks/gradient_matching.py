"""Gradient matching: move the images until the update they would cause is the one that was shared.

Minimizes objective(update(x), target) + the priors, each times its weight, over the normalized
images x, and where asked over their labels too. The default of every field below is the recipe of
Geiping et al. 2020 ("Inverting Gradients"): cosine distance and total variation, Adam on the sign
of the gradient, a step schedule, and after every step a projection onto the images whose pixels lie
in [0, 1].
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinv import client, rng
from jaxinv.attacks import gram, learned_inverter
from jaxinv.attacks.base import (
    Assumed,
    Attack,
    Candidate,
    Family,
    Known,
    Losses,
    Simulation,
    check_names,
    per_seed,
    simulate_update,
)
from jaxinv.attacks.exchanges import EXCHANGES, Exchange, is_due, nudged
from jaxinv.attacks.objectives import OBJECTIVES, Comparison, compare
from jaxinv.attacks.priors import PRIORS, View, key_of, needing, weighted_sum
from jaxinv.attacks.representations import REPRESENTATIONS, Canvas, Representation
from jaxinv.errors import UserError
from jaxinv.networks.inspect import depths
from jaxinv.types import PyTree, named


def quantized(gradient: Array, progress: Array) -> Array:
    """Four fifths of the gradient, in halves of twice its median size, and a fifth of its sign.

    References: Ye et al. 2024, "High-Fidelity Gradient Inversion in Distributed Learning", AAAI;
      the public code.
    """
    del progress
    median = jnp.maximum(jnp.median(jnp.abs(gradient)), jnp.finfo(gradient.dtype).tiny)
    steps = jnp.clip(jnp.round(2 * gradient / median) / 2, -1, 1)
    return 0.2 * jnp.sign(gradient) + 0.8 * steps


# Each maps the gradient and the progress in [0, 1) to the direction the optimizer sees. The soft
# sign tanh(s g) / s with s = 1 - progress is breaching's; it hardens into the plain gradient.
SIGNS: dict[str, Callable[[Array, Array], Array]] = {
    "hard": lambda gradient, progress: jnp.sign(gradient),
    "soft": lambda gradient, progress: jnp.tanh(gradient * (1 - progress)) / (1 - progress),
    "quantized": quantized,
    "none": lambda gradient, progress: gradient,
}
# Each gives the step for a rate of 1. L-BFGS has a line search of its own (Nocedal & Wright 2006,
# algorithm 3.6); a Wolfe step that it cannot find in so many evaluations is one of length 0.
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": lambda: optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
    "sgd": optax.identity,
    "lbfgs": lambda: optax.chain(
        optax.scale_by_lbfgs(memory_size=HISTORY),
        optax.scale(-1.0),  # the search is for a step to be added
        optax.scale_by_zoom_linesearch(max_linesearch_steps=LINE_SEARCH),
        optax.scale(-1.0),
    ),
}
RATES = {"adam": 0.1, "sgd": 0.1, "lbfgs": 1.0}  # where none is given; a search finds the step
HISTORY, LINE_SEARCH = 100, 20  # as DLG; evaluations of a line search
TILE = 4  # pixels along a side of what a patterned image repeats


def default_rate(optimizer: str | Callable, representation: str | Representation) -> float:
    """The learning rate where none is given."""
    rate = RATES[optimizer] if isinstance(optimizer, str) else 0.1
    return rate * named(REPRESENTATIONS, representation).pace


def patterned(key: jax.Array, shape: tuple[int, ...]) -> Array:
    """A normal tile of `TILE` x `TILE` pixels, repeated over the image.

    References: Wei et al. 2020, arXiv 2004.10397 (patterned initial images converge more often).
    """
    *front, height, width, channels = shape
    tile = jax.random.normal(key, (*front, TILE, TILE, channels), jnp.float32)
    repeats = (1,) * len(front) + (-(-height // TILE), -(-width // TILE), 1)
    return jnp.tile(tile, repeats)[..., :height, :width, :]


INITS: dict[str, Callable[..., Array]] = {
    "normal": lambda key, shape: jax.random.normal(key, shape, jnp.float32),
    "uniform": lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0),
    "patterned": patterned,
    "gray": lambda key, shape: jnp.zeros(shape, jnp.float32),
}
LEARNED = "learned"  # what a trained inverter finds, the same for every seed


def step_decay(step: Int[Array, ""], iterations: Int[Array, ""]) -> Float[Array, ""]:
    """Factor on the learning rate: x0.1 at floor(T/2.667), floor(T/1.6) and floor(T/1.142).

    References: Geiping et al. 2020, the public code's milestones (about 3/8, 5/8, 7/8 of T).
    """
    milestones = jnp.floor(iterations / jnp.array([2.667, 1.6, 1.142]))
    return 0.1 ** jnp.sum(step >= milestones)


def cosine_decay(step: Int[Array, ""], iterations: Int[Array, ""]) -> Float[Array, ""]:
    """Factor on the learning rate: 50 steps of linear warm-up, then half a cosine down to 0.

    References: the "modern" settings of breaching (Geiping et al. 2022).
    """
    warmup = jnp.minimum(50, iterations // 2)
    rest = jnp.maximum(iterations - warmup, 1)
    decay = 0.5 * (1 + jnp.cos(jnp.pi * (step - warmup) / rest))
    return jnp.where(step < warmup, (step + 1) / jnp.maximum(warmup, 1), decay)


SCHEDULES: dict[str, Callable[..., Array]] = {
    "step": step_decay,
    "cosine": cosine_decay,
    "constant": lambda step, iterations: jnp.ones(()),
}
# Each maps the progress in [0, 1) to a factor on the weights of all priors.
PRIOR_SCHEDULES: dict[str, Callable[[Array], Array]] = {
    "constant": lambda progress: jnp.ones_like(progress),
    # First the update, then the smoothness: from a fifth of the way on, as Ye et al. 2024.
    "late": lambda progress: jnp.where(progress < 0.2, 0.0, 1.0).astype(progress.dtype),
    "decay": lambda progress: 10 ** (1 - progress),
}


def deep_first(depth: float, progress: Float[Array, ""]) -> Float[Array, ""]:
    """Weight of a layer: the deepest fifth alone at first, all after a quarter of the way.

    References: Ye et al. 2024 (by tensors numbered from the input, and without the first five
      tensors to the end).
    """
    return (depth > 0.8 * (1 - 4 * progress)).astype(progress.dtype)


# Each maps the depth of a layer's parameters in (0, 1] (`networks.inspect.depths`) and the progress
# in [0, 1) to their weight in the comparison; at the end of the way it is 1. None: it is 1 always.
LAYERS: dict[str, Callable[[float, Array], Array] | None] = {"all": None, "deep_first": deep_first}

# How the attacker computes what local steps on its candidate would send.
SIMULATIONS = {
    "unrolled": "all steps, one after another",
    "surrogate": "one gradient at a place on the way from the first parameters to the last",
}
MIDWAY, PACE = 0.5, 1e-3  # of that place: where it starts, and the rate of its own Adam


def mask(key: Array, share: float | Array, shared: PyTree) -> PyTree:
    """Weights of an update's entries, 1 for a random share of them and else 0.

    References: Ye et al. 2024 (0.7, drawn anew for every step).
    """

    def draw(key, x):
        return jax.random.bernoulli(key, share, x.shape).astype(x.dtype)

    return rng.over_leaves(key, shared, draw)


class Numbers(NamedTuple):
    """What is traced: a change does not recompile. Each may differ from seed to seed."""

    lr: Float[Array, "*seed"]
    client_lr: Float[Array, "*seed"]  # that the attacker simulates
    weights: dict[str, Float[Array, "*seed"]]  # of the priors
    iterations: Int[Array, ""]


class Moved(NamedTuple):
    """What the optimizer moves."""

    parameters: Any  # of the images, in the method's representation
    logits: Float[Array, "image class"] | None


class Surrogate(NamedTuple):
    """Where the surrogate of many local steps stands."""

    place: Float[Array, ""]  # 0 at the parameters that the client received, 1 at its last
    optimizer: Any


class AttackState(NamedTuple):
    """What the next step of one trial needs."""

    candidate: Candidate
    parameters: Any  # that the candidate's images came out of
    optimizer: Any
    key: Array | None  # of what is drawn on the way; None where nothing is
    surrogate: Surrogate | None  # None where all steps are unrolled


@dataclasses.dataclass(frozen=True)
class Method(Attack):
    """What shapes the compiled program: a change recompiles.

    Where a name of a table is wanted, a function like those in it does as well.
    """

    objective: str | Callable = "cosine"
    priors: tuple[str | Callable, ...] = ("tv",)  # those with a weight
    optimizer: str | Callable = "adam"
    sign: str | Callable = "hard"
    schedule: str | Callable = "step"
    layers: str | Callable = "all"  # that are compared, by the progress
    entries: float = 1.0  # share of their entries that each step compares
    prior_schedule: str | Callable = "constant"
    exchange: str | Exchange = "none"  # between the seeds of a target
    simulation: str = "unrolled"  # of the client's local steps
    representation: str | Representation = "pixels"  # what is moved
    init_from: str | Callable = "normal"  # of `INITS`, or `LEARNED`
    box: bool = True
    by_epoch: bool = False  # images of their own for each epoch, whose order is not known
    classes: int = 0  # where the labels are optimized beside the images, else 0
    classifier: tuple[str, ...] = ()  # path of the last dense layer, for the priors that ask for it
    gram: str | None = None  # the rule (`attacks.gram`) by which layers keep no weight gradient

    Numbers = Numbers
    steps_per_call = 50

    @property
    def needs_image_prior(self) -> bool:
        """Where what is moved are its coefficients."""
        return named(REPRESENTATIONS, self.representation).needs_prior

    @property
    def starts_learned(self) -> bool:
        """By the name of its start."""
        return self.init_from == LEARNED

    @property
    def couples_seeds(self) -> bool:
        """Where a prior looks at the other seeds, or they meet on the way."""
        return super().couples_seeds or named(EXCHANGES, self.exchange) is not None

    def numbers(self, seeds: int, settings: Mapping[str, Any]) -> Numbers:
        """Makes the traced part of settings, each one number for all seeds or one for each."""
        rates = per_seed(settings, ("lr", "client_lr"), seeds)
        weights = per_seed(settings, self.priors, seeds)
        weights = {key_of(prior): weight for prior, weight in weights.items()}
        return Numbers(**rates, weights=weights, iterations=np.int32(settings["iterations"]))

    def init(
        self,
        numbers: Numbers,
        key: Array,
        shape: tuple[int, ...],
        known: Known,
        initial: Candidate | None = None,
    ) -> AttackState:
        """Draws the random initial image of one trial, in the coordinates that are moved.

        It is not projected: the first projection comes after the first step, as published. In
        float64 it is the same image.

        Raises:
          UserError: an image is given to begin with, to which no parameters lead.
        """
        dtype = known.normalization.mean.dtype
        moved = named(REPRESENTATIONS, self.representation)
        front = (self.local.epochs,) if self.by_epoch else ()
        canvas = Canvas((*front, *shape), known.normalization, known.image_prior)
        if initial is None and self.starts_learned:
            inverter = known.learned.get("inverter")
            images = learned_inverter.find(known.target, shape[1:], inverter, known.normalization)
            initial = Candidate(images.astype(dtype), None)
        if initial is None:
            if moved.draw is None:
                parameters = named(INITS, self.init_from)(key, canvas.shape)
            else:
                parameters = moved.draw(canvas, key)
            parameters = jax.tree.map(lambda x: x.astype(dtype), parameters)
            logits = None
            if self.classes:
                of_labels = jax.random.fold_in(key, 1)
                logits = jax.random.normal(of_labels, (shape[0], self.classes), jnp.float32)
                logits = logits.astype(dtype)
            initial = Candidate(moved.to_images(canvas, parameters, jnp.zeros((), dtype)), logits)
        elif moved.to_parameters is None:
            raise UserError(
                f"method.representation={self.representation!r}: there is no way back to it from "
                "an image to begin with; use pixels"
            )
        else:
            parameters = moved.to_parameters(canvas, initial.images)
        here = Moved(parameters, initial.logits)
        draws = self.entries < 1 or named(EXCHANGES, self.exchange) is not None
        own = jax.random.fold_in(key, 2) if draws else None
        optimizer = named(OPTIMIZERS, self.optimizer)().init(here)
        surrogate = None
        if self.simulation == "surrogate":
            place = jnp.asarray(MIDWAY, dtype)
            surrogate = Surrogate(place, named(OPTIMIZERS, "adam")().init(place))
        return AttackState(initial, parameters, optimizer, own, surrogate)

    def compare(
        self,
        numbers: Numbers,
        known: Known,
        candidate: Candidate,
        progress: Float[Array, ""],
        place: Float[Array, ""] | None = None,
        entries: PyTree | None = None,
    ) -> tuple[Comparison, PyTree, PyTree]:
        """Compares the update that a candidate would cause with the target's.

        Args:
          numbers, known: as in `step`.
          candidate: what is moved.
          progress: in [0, 1).
          place: of the surrogate, whose gradient of all images stands for all local steps; None
            where these are unrolled.
          entries: weights of the updates' entries; None for 1.

        Returns:
          The comparison, the candidate's update (() where no weight gradients are kept), and the
          statistics of its batch.
        """
        target = known.target
        images, labels = candidate.images, candidate.labels(target.labels)
        local = self.local
        if place is not None:
            # The update is what the client went, divided by its rate.
            way = optax.tree.scale(place * numbers.client_lr, target.update)
            known = known._replace(params=optax.tree.sub(known.params, way))
            local = client.Local()
        weights, weigh = None, named(LAYERS, self.layers)
        if weigh is not None:
            batch = images[0] if self.by_epoch else images
            deep = depths(known.loss, known.params, batch, labels)
            weights = jax.tree.map(lambda depth: weigh(depth, progress), deep)
        if self.gram:
            between, statistics = gram.compare_updates(
                known.loss, known.params, images, labels, target.update, self.gram, weights
            )
            return between, (), statistics
        simulation = Simulation(local, self.by_epoch, self.defense)
        update, statistics = simulate_update(simulation, known, numbers.client_lr, candidate)
        if self.defense:
            known_weights = target.defense_knowledge.weights
            weights = known_weights if weights is None else optax.tree.mul(weights, known_weights)
        if entries is not None:
            weights = entries if weights is None else optax.tree.mul(weights, entries)
        return compare(update, target.update, weights), update, statistics

    def step(
        self, numbers: Numbers, known: Known, index: Int[Array, ""], state: AttackState
    ) -> tuple[AttackState, Losses]:
        """Takes one step of one trial; see `base.Attack`."""
        to_images, to_parameters, *_ = named(REPRESENTATIONS, self.representation)
        canvas = Canvas(state.candidate.images.shape, known.normalization, known.image_prior)
        progress = jnp.minimum(index, numbers.iterations - 1) / numbers.iterations
        place = None if state.surrogate is None else state.surrogate.place
        entries = self._entries(numbers, known, index, state.key)

        def shown(moved):
            return Candidate(to_images(canvas, moved.parameters, progress), moved.logits)

        def loss(moved, place):
            losses = self._losses(numbers, known, index, progress, shown(moved), place, entries)
            return losses.objective + losses.prior, losses

        here = Moved(state.parameters, state.candidate.logits)
        of_both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, losses), (gradient, of_place) = of_both(here, place)
        sign = named(SIGNS, self.sign)
        signs = jax.tree.map(lambda x: sign(x, progress), gradient.parameters)
        optimizer = optax.with_extra_args_support(named(OPTIMIZERS, self.optimizer)())
        descent, optimizer_state = optimizer.update(
            gradient._replace(parameters=signs),
            state.optimizer,
            here,
            value=value,
            grad=gradient,
            value_fn=lambda moved: loss(moved, place)[0],
        )
        rate = numbers.lr * named(SCHEDULES, self.schedule)(index, numbers.iterations)
        there = jax.tree.map(lambda x, d: x - rate * d, here, descent)
        candidate = shown(there)
        if to_parameters is not None:
            if self.box:
                candidate = candidate._replace(images=known.normalization.box(candidate.images))
            there = there._replace(parameters=to_parameters(canvas, candidate.images))
        surrogate = _step_surrogate(state.surrogate, of_place)
        moved = AttackState(candidate, there.parameters, optimizer_state, state.key, surrogate)
        exchange = named(EXCHANGES, self.exchange)
        if exchange is not None:

            def elsewhere():
                place, leaves = exchange.meet(value, there)
                place = nudged(state.key, index, place)
                fresh = optimizer.init(place)
                new = AttackState(shown(place), place.parameters, fresh, state.key, surrogate)
                return jax.tree.map(lambda new, old: jnp.where(leaves, new, old), new, moved)

            due = is_due(exchange, index, numbers.iterations)
            moved = lax.cond(due, elsewhere, lambda: moved)
        go = index < numbers.iterations
        return jax.tree.map(lambda new, old: jnp.where(go, new, old), moved, state), losses

    def _entries(
        self, numbers: Numbers, known: Known, index: Int[Array, ""], key: Array | None
    ) -> PyTree | None:
        """Weights of the update's entries in this step; None for 1."""
        if self.entries == 1:
            return None
        of_step = jax.random.fold_in(jax.random.fold_in(key, 1), index)
        # What is reported of the last candidate is of all entries.
        share = jnp.where(index < numbers.iterations, self.entries, 1.0)
        return mask(of_step, share, known.target.update)

    def _losses(
        self,
        numbers: Numbers,
        known: Known,
        index: Int[Array, ""],
        progress: Float[Array, ""],
        candidate: Candidate,
        place: Float[Array, ""] | None,
        entries: PyTree | None,
    ) -> Losses:
        """The objective of a candidate and its priors, weighted; arguments as in `compare`."""
        between, update, statistics = self.compare(
            numbers, known, candidate, progress, place, entries
        )
        view = View(
            candidate.images,
            update,
            statistics,
            known.target,
            known.params,
            self.classifier,
            known.normalization,
            known.learned,
            index,
            progress,
        )
        factor = named(PRIOR_SCHEDULES, self.prior_schedule)(progress)
        weights = {prior: factor * numbers.weights[key_of(prior)] for prior in self.priors}
        return Losses(named(OBJECTIVES, self.objective)(between), weighted_sum(weights, view))


def _step_surrogate(surrogate: Surrogate | None, gradient: Array | None) -> Surrogate | None:
    """The surrogate one step of its own optimizer further; None where there is none."""
    if surrogate is None:
        return None
    forward, kept = named(OPTIMIZERS, "adam")().update(gradient, surrogate.optimizer)
    return Surrogate(jnp.clip(surrogate.place - PACE * forward, 0, 1), kept)


# The fields of a method that are names, and the tables that have them.
_NAMES = {
    "objective": OBJECTIVES,
    "optimizer": OPTIMIZERS,
    "sign": SIGNS,
    "schedule": SCHEDULES,
    "layers": LAYERS,
    "prior_schedule": PRIOR_SCHEDULES,
    "exchange": EXCHANGES,
    "simulation": SIMULATIONS,
    "representation": REPRESENTATIONS,
    "init_from": (*INITS, LEARNED),
    "batch_norm": client.BATCH_NORM,
}


def check(method: Method) -> None:
    """Checks the names in a method.

    Raises:
      UserError: one is unknown (the known ones are listed), or two of them do not go together.
    """
    check_names(method, _NAMES)
    if not 0 < method.entries <= 1:
        raise UserError(f"method.entries={method.entries:g}: a share; give one above 0, at most 1")
    found = set(conflicts(method))
    if "entries" in found:
        raise UserError("method.entries: seeds that compare different entries exchange nothing")
    if "optimizer" in found:
        raise UserError("method.optimizer='lbfgs': needs the gradient itself; use sign='none'")
    if "exchange" in found:
        raise UserError(
            f"method.exchange={method.exchange!r}: takes means, which the representation "
            f"{method.representation!r} has none of; use 'halving'"
        )


def conflicts(chosen: Any) -> Iterator[str]:
    """The settings of gradient matching, in a method or a cell, that do not go with another.

    Args:
      chosen: has them as attributes, each a known name or what stands for one.

    Yields:
      entries: each seed compares its own, while they exchange what they move.
      optimizer: L-BFGS needs the gradient itself, of which it gets a sign.
      exchange: takes means, and what is moved has none.
    """
    if chosen.entries < 1 and chosen.exchange != "none":
        yield "entries"
    if chosen.optimizer == "lbfgs" and chosen.sign != "none":
        yield "optimizer"
    met = named(EXCHANGES, chosen.exchange)
    moved = named(REPRESENTATIONS, chosen.representation)
    if met is not None and met.averages and moved.to_parameters is None:
        yield "exchange"


STATIC = (
    "optimizer",
    "sign",
    "schedule",
    "layers",
    "entries",
    "prior_schedule",
    "exchange",
    "simulation",
    "representation",
    "box",
)  # settings that are fields of a `Method`


def make(settings: Any, assumed: Assumed) -> Method:
    """The method of a cell's settings."""
    priors = tuple(name for name in PRIORS if getattr(settings, name) > 0)
    return Method.of_settings(
        settings,
        assumed,
        **{name: getattr(settings, name) for name in STATIC},
        init_from=settings.init,
        priors=priors,
        by_epoch=bool(needing("epochs", priors)),
        classes=assumed.classes,
        classifier=assumed.classifier,
        gram=gram.choose_rule(settings.gram, settings.objective)
        if may_drop_gradients(
            priors,
            assumed.local.steps(assumed.images),
            assumed.defense,
            settings.simulation,
            settings.entries,
        )
        else None,
    )


def may_be_surrogate(
    objective: str | Callable, priors: Iterable[str], steps: int, defense: Sequence[str]
) -> bool:
    """Whether one gradient can stand for the client's steps, of which it has not the length.

    Args:
      objective: of the comparison; a function of one's own must be blind to the scale.
      priors: names.
      steps: of the client, as the attacker takes it.
      defense: names that the attacker knows.

    References: Zhu et al. 2023 (SME).
    """
    return objective != "l2" and steps > 1 and not defense and not needing("epochs", priors)


def may_drop_gradients(
    priors: Iterable[str], steps: int, defense: Sequence[str], simulation: str, entries: float
) -> bool:
    """Whether nothing asks for the candidate's weight gradients themselves.

    Args:
      priors: names.
      steps: of the client, as the attacker takes it.
      defense: names that the attacker knows.
      simulation: one of `SIMULATIONS`.
      entries: share of the update's that are compared.
    """
    one = steps == 1 or simulation == "surrogate"
    return one and not defense and not needing("update", priors) and entries == 1


FAMILY = Family(
    make,
    frozenset(
        {
            *PRIORS,
            *STATIC,
            "lr",
            "init",
            "gram",
            "iterations",
            "polish",
            "adaptive",
            "image_prior",
            "autoencoder",
            "denoiser",
            "inverter",
        }
    ),
    inits=(*INITS, LEARNED),
)
