"""One cell: load what it attacks, let its clients share their updates, attack each.

What a sweep does for every cell, a search for all its candidates at once.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv import data, defenses, learned, metrics, networks
from jaxinv.attacks import CLOSED_FORM
from jaxinv.attacks.base import Attack
from jaxinv.attacks.priors import needing
from jaxinv.client.capacity import capacity
from jaxinv.data.image_prior import ImageFacts, ImagePrior, Source, load_prior
from jaxinv.engine import trials
from jaxinv.engine.assembly import Work, attack_targets
from jaxinv.engine.closed_form import Recovery
from jaxinv.engine.likeness import (
    Likeness,
    Lineup,
    check_no_part,
    likeness,
    line_up,
    load_judge,
    load_perceptual,
)
from jaxinv.engine.targets import (
    ClientSettings,
    SharedUpdates,
    make_targets,
    noise_keys,
    order_keys,
)
from jaxinv.errors import UserError
from jaxinv.learned import Learned
from jaxinv.machine import runtime
from jaxinv.networks.imprint import imprinted
from jaxinv.networks.inspect import classifier_path
from jaxinv.settings import schema
from jaxinv.types import Normalization, PyTree, Target, Truth
from jaxinv.victim import checkpoints
from jaxinv.victim.untrained import Victim, digest, untrained

CANDIDATES = 1000  # first images of the split, among whom reconstructions are looked for
CANDIDATE_NUMBERS = 2**24  # of all candidates' pixels: of large images there are fewer
WITH_SPECTRUM = 4  # targets of a study: the eigenvalues of one take longer than all before them


class Attacked(NamedTuple):
    """The private batches of a cell, [target, batch, ...]."""

    images: np.ndarray  # uint8
    labels: np.ndarray
    ids: np.ndarray


class CellInputs(NamedTuple):
    """What a cell attacks: the victim and the private batches, [target, batch, ...]."""

    victim: Victim
    normalization: Normalization
    classes: int
    images: np.ndarray  # uint8
    labels: np.ndarray
    ids: np.ndarray
    draws: np.ndarray  # [target], noise seeds of the client's defense
    image_prior: ImagePrior | None = None  # where the attack has one
    prior_source: Source | None = None
    lineup: Lineup | None = None  # among whom reconstructions are looked for
    learned: Mapping[str, Learned] = MappingProxyType({})  # by kind
    classes_seen: np.ndarray | None = None  # [target], whether what was learned is of its classes
    capacity: float = math.nan  # images that one gradient can determine; NaN: of several steps
    position: int = 0  # of the first target in the study's list

    def truths(self) -> Truth:
        """The private batches, pixels in [0, 1]."""
        return Truth(self.images / np.float32(255), self.labels)

    def of_targets(self, here: slice, draws: int) -> "CellInputs":
        """The same for some of the targets, each as often as its defense is drawn."""
        fields = ("images", "labels", "ids", "draws")
        fields += ("classes_seen",) if self.classes_seen is not None else ()
        own = {name: np.repeat(getattr(self, name)[here], draws, axis=0) for name in fields}
        own["draws"] = own["draws"] + np.arange(len(own["draws"])) % draws
        return self._replace(**own, position=here.start)


class CellResult(NamedTuple):
    """What came of a cell's attack."""

    result: trials.Result
    baseline: metrics.Scores  # of the mean color, per target
    label_accuracy: jax.Array  # [target, seed]
    shared: SharedUpdates
    extras: dict[str, np.ndarray] | None = None  # [target, ...]: spectra, std of pixels


def measure_likeness(inputs: CellInputs, result: trials.Result) -> Likeness:
    """Measures every trial beyond PSNR: each field [target, seed]."""
    pixels, truths = np.asarray(result.pixels), inputs.truths().images
    guess = np.asarray(inputs.normalization.mean)
    own = [likeness(x, t, guess, inputs.lineup) for x, t in zip(np.nan_to_num(pixels), truths)]
    return Likeness(*map(np.stack, zip(*own)))


class Loader:
    """Loads what cells attack, each data set and each victim once."""

    def __init__(self, plan: schema.Plan, split: str = "test"):
        self._plan = plan
        self._load = functools.cache(
            functools.partial(data.load, split=split, data_dir=plan.data_dir)
        )
        self._untrained = functools.cache(untrained)
        self._trained = functools.cache(_load_victim)
        self._load_prior = functools.cache(load_prior)
        self._line_up = functools.cache(self._new_lineup)
        self._learned = functools.cache(learned.load)
        self._capacities: dict[tuple, float] = {}

    def __call__(self, cell: schema.Cell) -> CellInputs:
        """Loads a cell's victim and private batches.

        Raises:
          UserError: the data set is not there, or its images do not suit the network.
        """
        dataset = self._dataset(cell)
        shape = dataset.images.shape[1:]
        networks.check_image_size(cell.model, cell.dataset, shape)
        victim = self._victim(cell, dataset)
        if cell.server == "malicious":
            victim = self._imprint(cell, victim, shape)
        if "batch_stats" not in victim.variables:
            if cell.batch_norm != "eval":
                raise UserError(
                    f"--batch-norm {cell.batch_norm}: {cell.model} has no BatchNorm; use eval"
                )
            if cell.prior_batch_norm > 0:
                raise UserError(f"--prior-batch-norm: {cell.model} has no BatchNorm; give 0")
        if cell.attack in CLOSED_FORM:
            count = cell.assumed().images
            CLOSED_FORM[cell.attack].check(victim.module, victim.variables, shape, count)
        images, labels, ids = self.targets(cell)
        prior, source = self._prior(cell, dataset) if cell.has_image_prior() else (None, None)
        known = self._learned_of(cell, shape, victim)
        seen = None
        if known:
            common = set.intersection(*(set(own.info.classes) for own in known.values()))
            seen = np.isin(np.array(dataset.classes)[labels], list(common)).all(axis=1)
        return CellInputs(
            victim,
            Normalization.of(dataset.mean, dataset.std),
            len(dataset.classes),
            images,
            labels,
            ids,
            np.zeros(len(ids), int),
            prior,
            source,
            learned=known,
            classes_seen=seen,
            capacity=self._capacity(cell, victim, shape),
        )

    def _capacity(self, cell: schema.Cell, victim: Victim, shape: tuple[int, ...]) -> float:
        """How many images the cell's update can determine at the most, by the layers alone."""
        if cell.local().steps(cell.images) > 1:
            return math.nan
        key = victim.module, shape, cell.batch_norm
        if key not in self._capacities:
            found = capacity(victim.module, victim.variables, shape, cell.batch_norm)
            self._capacities[key] = found.images
        return self._capacities[key]

    def with_lineup(self, cell: schema.Cell, inputs: CellInputs) -> CellInputs:
        """Adds the candidates among whom a cell's reconstructions are looked for.

        Raises:
          UserError: the judge is not there or does not suit the data, or LPIPS is not there.
        """
        count = min(CANDIDATES, CANDIDATE_NUMBERS // inputs.images[0, 0].size)
        lineup = self._line_up(cell.dataset, count)
        check_no_part(lineup.judge, inputs.victim.digest)
        return inputs._replace(lineup=lineup)

    def _new_lineup(self, dataset: str, count: int) -> Lineup:
        """Makes a lineup of a data set's first images."""
        first = self._first(dataset, count)
        judge = perceptual = None
        if self._plan.judge is not None:
            judge = load_judge(self._plan.judge, first.images.shape[1:], tuple(first.classes))
        if self._plan.lpips:
            perceptual = load_perceptual(first.images.shape[1:])
        return line_up(first.images / np.float32(255), judge, perceptual)

    def _first(self, dataset: str, count: int, split: str | None = None) -> data.Dataset:
        """The first images of a data set's split, by default that of the targets."""
        of_split = {} if split is None else {"split": split}
        try:
            return self._load(dataset, ids=count, **of_split)
        except UserError:  # the split is smaller
            return self._load(dataset, ids=None, **of_split)

    def _learned_of(
        self, cell: schema.Cell, shape: tuple[int, ...], victim: Victim
    ) -> dict[str, Learned]:
        """What the attacker of a cell has trained for itself."""
        found = {kind: self._learned(kind, name) for kind, name in cell.learned().items()}
        for kind, own in found.items():
            learned.check_fits(own, kind, shape)
            if kind == "inverter":
                learned.check_learned_from(own, victim.digest, cell.defense, cell.assumed().images)
        return found

    def _prior(self, cell: schema.Cell, dataset: data.Dataset) -> tuple[ImagePrior, Source]:
        """What the attacker of a cell believes of images."""
        shape = dataset.images.shape[1:]
        facts = ImageFacts(
            cell.dataset, self._plan.data_dir, shape, tuple(dataset.mean), tuple(dataset.std)
        )
        return self._load_prior(cell.image_prior, facts)

    def targets(self, cell: schema.Cell) -> Attacked:
        """Loads a cell's private batches alone.

        Raises:
          UserError: the data set is not there, or has too few images.
        """
        dataset = self._dataset(cell)
        if self._plan.target_ids is None:
            chosen = data.group(
                dataset.labels, self._plan.targets, cell.images, len(dataset.classes), cell.grouping
            )
        elif cell.grouping == "stored":
            chosen = np.arange(len(dataset.ids)).reshape(-1, cell.images)
        else:
            raise UserError(f"--grouping {cell.grouping}: chooses the images; use --targets")
        return Attacked(dataset.images[chosen], dataset.labels[chosen], dataset.ids[chosen])

    def _victim(self, cell: schema.Cell, dataset: data.Dataset) -> Victim:
        """The network of a cell: a checkpoint's, or freshly initialized."""
        if cell.victim is None:
            return self._untrained(
                cell.model,
                classes=len(dataset.classes),
                width=cell.width,
                seed=cell.network_seed,
                image_shape=dataset.images.shape[1:],
            )
        trained, victim = self._trained(cell.victim)
        checkpoints.check_fits(trained, dataset)
        return victim

    def _imprint(self, cell: schema.Cell, victim: Victim, shape: tuple[int, ...]) -> Victim:
        """Puts an imprint in front of a network; the server knows how bright images are."""
        known = self._first(cell.dataset, CANDIDATES, "train")
        normalized = Normalization.of(known.mean, known.std).normalize(known.images / 255)
        bright = np.asarray(normalized).mean(axis=(1, 2, 3))
        module, variables = imprinted(
            victim.module, victim.variables, shape, cell.bins, bright, cell.amplify
        )
        return victim._replace(module=module, variables=variables, digest=digest(variables))

    def _dataset(self, cell: schema.Cell) -> data.Dataset:
        """The images of a cell's targets: the first ones, or those asked for."""
        ids = self._plan.target_ids
        if ids is not None and len(ids) % cell.images:
            raise UserError(f"--target-ids: {len(ids)} do not make targets of {cell.images} images")
        wanted = self._plan.targets * cell.images if ids is None else tuple(ids)
        if ids is None and cell.grouping != "stored":
            wanted = None  # all there are, to choose from
        return self._load(cell.dataset, ids=wanted)


def checkpoint_digests(cells: Iterable[schema.Cell]) -> dict[str, str]:
    """The digest of each trained network that cells name, by what they call it.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    called: dict[str, str] = {}
    for cell in cells:
        called |= {name: kind for kind, name in cell.learned().items()}
        called |= {} if cell.victim is None else {cell.victim: "victim"}
    return {
        name: str(checkpoints.read_fields(checkpoints.find(name, called[name])).get("digest"))
        for name in sorted(called)
    }


def _load_victim(name: str) -> tuple[checkpoints.TrainedVictim, Victim]:
    """A checkpoint, and what of it is attacked."""
    trained = checkpoints.load_victim(name)
    return trained, trained.as_victim()


def attack_cell(
    cell: schema.Cell,
    inputs: CellInputs,
    keys: jax.Array,
    numbers: Mapping[str, Any],
    resources: trials.Resources,
) -> CellResult:
    """Lets clients share their updates and attacks each from many seeds, as a cell says.

    Args:
      cell: the settings; those in `cell.numbers()` are taken from `numbers`.
      inputs: the victim and the private batches.
      keys: [target, seed].
      numbers: each one for all seeds, or [seed].
      resources: as in `attack_targets`.
    """
    # Polishing needs a float64 target, so the client's update is computed in float64 too.
    with runtime.arithmetic("float64" if cell.polish else cell.precision) as cast:
        shared = share(cell, inputs, cast)
    if cell.attack in CLOSED_FORM:
        attack = Recovery(CLOSED_FORM[cell.attack].find, cell.objective, cell.batch_norm)
    else:
        attack = attack_of(cell, inputs)
    spectra = max(0, WITH_SPECTRUM - inputs.position)
    work = Work(attack, numbers, cell.precision, cell.polish, cell.posterior, spectra)

    def make_problem(cast):
        return problem_of(inputs, shared.targets, cast)

    result, extras = attack_targets(make_problem, work, keys, resources)
    with runtime.arithmetic(cell.precision) as cast:
        measured = _per_target(make_problem(cast), result.labels, inputs.classes)
    return CellResult(result, *measured, shared, extras)


def share(cell: schema.Cell, inputs: CellInputs, cast: Callable[[PyTree], PyTree]) -> SharedUpdates:
    """Lets the clients of a cell share their updates."""
    clients = ClientSettings(
        cell.labels,
        cell.batch_norm,
        cell.local(),
        cell.shuffled,
        cell.assumed().images,
        cell.assumed().local,
        observe=cell.batch_norm == "eval" and cell.prior_batch_norm > 0,
        defense=defenses.names(cell.chain()),
        known_defense=cell.assumed().defense,
        classifier=classifier_of(cell, inputs),
    )
    truths, normalization, variables = cast(
        (inputs.truths(), inputs.normalization, inputs.victim.variables)
    )
    return make_targets(
        inputs.victim.module,
        variables,
        truths,
        normalization,
        clients,
        cell.client_lr,
        order_keys(inputs.ids[:, 0]),
        defenses.strengths(cell.chain()),
        noise_keys(inputs.ids[:, 0], inputs.draws),
    )


def problem_of(
    inputs: CellInputs, targets: Target, cast: Callable[[PyTree], PyTree]
) -> trials.Problem:
    """What the trials of a cell share, in one precision."""
    victim = inputs.victim
    return trials.Problem(
        victim.module,
        inputs.images.shape[2:],
        *cast(
            (
                victim.variables,
                targets,
                inputs.truths(),
                inputs.normalization,
                inputs.image_prior,
                {kind: own.variables for kind, own in inputs.learned.items()},
            )
        ),
    )


def attack_of(cell: schema.Cell, inputs: CellInputs) -> Attack:
    """The iterative attack of a cell, for a network and its data."""
    return cell.make_attack(inputs.classes, classifier_of(cell, inputs))


def shapes_of(inputs: CellInputs, attack: Attack, images: int) -> trials.Problem:
    """One target of so many images, without numbers: what a step's work is counted on."""
    victim = inputs.victim
    observed = needing("statistics", attack.priors)
    sent = {"batch_stats": victim.variables["batch_stats"]} if observed else ()
    target = Target(victim.variables["params"], jnp.zeros(images, jnp.int32), sent)
    problem = trials.Problem(
        victim.module,
        inputs.images.shape[2:],
        victim.variables,
        jax.tree.map(lambda x: x[None], target),
        None,
        inputs.normalization,
        inputs.image_prior,
        {kind: own.variables for kind, own in inputs.learned.items()},
    )
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.result_type(x)), problem)


def classifier_of(cell: schema.Cell, inputs: CellInputs) -> tuple[str, ...]:
    """The path of the network's last dense layer, where the attacker asks for it; else ()."""
    known = defenses.asks_for_classifier(cell.assumed().defense)
    if needing("update", cell.priors()) or known:
        victim = inputs.victim
        return classifier_path(victim.module, victim.variables, inputs.images.shape[2:])
    return ()


@functools.partial(jax.jit, static_argnums=2)
def _per_target(
    problem: trials.Problem, labels: jax.Array, classes: int
) -> tuple[metrics.Scores, jax.Array]:
    """The mean-color baseline of each target, and the label accuracy of each [target, seed]."""
    truths, normalization = problem.truths, problem.normalization

    def accuracy(t, found):
        return metrics.label_accuracy(t, found, classes)

    of_target = jax.vmap(jax.vmap(accuracy, in_axes=(None, 0)))
    return (
        jax.vmap(lambda truth: metrics.mean_color(truth, normalization))(truths),
        of_target(truths.labels, labels),
    )
