"""Which settings do not go together: each check yields the line that names them and the fix.

A setting that the chosen attack does not read at all is the business of
`attacks.unused_settings`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from jaxinv import defenses, networks
from jaxinv.attacks import ATTACKS
from jaxinv.attacks.gradient_matching import (
    LEARNED,
    conflicts,
    may_be_surrogate,
    may_drop_gradients,
)
from jaxinv.attacks.labels import LABELS
from jaxinv.attacks.priors import needing
from jaxinv.attacks.representations import REPRESENTATIONS
from jaxinv.errors import UserError
from jaxinv.settings.fields import VICTIMS_OWN
from jaxinv.settings.flags import flag
from jaxinv.settings.requests import Training
from jaxinv.settings.schema import Cell, Plan

# The settings of a training that mean nothing without --dp.
OF_PRIVACY = ("noise_multiplier", "target_epsilon", "clip", "delta", "accountant", "microbatch")

# And those that mean nothing to a prior or an inverter.
OF_VICTIMS = ("model", "augment", "precision", "stop_at", "dp", *OF_PRIVACY)


# Of a learning rate that nothing is multiplied with.
ONE_STEP = "the client takes one step; give --client-epochs or --client-batch, or leave it out"


def check_cell(cell: Cell) -> None:
    """Refuses settings that do not go together.

    Raises:
      UserError: one line that names them.
    """
    networks.build(cell.model, classes=2, width=cell.width)  # refuses widths it cannot have
    for check in CELL_CHECKS:
        for message in check(cell):
            raise UserError(message)


def _learned(cell: Cell) -> Iterator[str]:
    if cell.prior_denoiser > 1 and "posterior" in cell.family().reads:
        yield (
            f"--prior-denoiser {cell.prior_denoiser:g}: of --attack {cell.attack} the denoiser's "
            "share in what is believed; give 1 at the most"
        )
    begins = cell.init == LEARNED
    if cell.uses_inverter() and cell.inverter is None:
        asked = "--init learned" if begins else f"--attack {cell.attack}"
        yield (
            f"{asked}: of an inverter that was trained; give --inverter "
            "(python -m jaxinv.train --inverter makes them)"
        )
    if cell.uses_inverter() and cell.batch_norm != "eval":
        yield (
            f"--batch-norm {cell.batch_norm}: an inverter has learned from updates with eval; use "
            "that"
        )
    if begins and cell.couplings():
        yield (
            f"{flag(cell.couplings()[0])}: looks at other seeds, which --init learned makes the "
            "same; leave one of the two out"
        )
    if begins and cell.labels == "joint":
        yield "--init learned: an inverter takes labels as given; use --labels known, or a rule"
    if begins and max(cell.local().steps(cell.images), cell.assumed().local.steps(cell.images)) > 1:
        yield (
            "--init learned: of one gradient; leave --client-epochs, --client-batch and "
            "--assumed-batch out"
        )


def _client(cell: Cell) -> Iterator[str]:
    steps = cell.local().steps(cell.images)
    if cell.images % (cell.client_batch or 1):
        yield f"--client-batch {cell.client_batch}: does not divide --images {cell.images}"
    if cell.batch_norm == "train-shared" and steps > 1:
        yield (
            "--batch-norm train-shared: statistics of one step; leave --client-epochs and "
            "--client-batch out"
        )


def _attackers_view(cell: Cell) -> Iterator[str]:
    assumed = cell.assumed()
    rule = LABELS.get(cell.labels)
    if rule is not None and rule.one_image and assumed.images > 1:
        yield f"--labels {cell.labels} reads one label; use --images 1 or --labels known"
    if assumed.images % (assumed.local.batch or 1):
        yield (
            f"--assumed-batch {assumed.local.batch}: does not divide the {assumed.images} "
            "images assumed"
        )
    if assumed.images != cell.images and cell.labels == "known":
        yield (
            "--assumed-images needs a label rule such as --labels counts: with --labels known, "
            "the labels already reveal how many images there are"
        )


def _priors(cell: Cell) -> Iterator[str]:
    if cell.prior_batch_norm > 0 and cell.batch_norm == "train":
        yield (
            "--prior-batch-norm: --batch-norm train keeps the client's statistics private; use "
            "eval or train-shared"
        )
    if cell.prior_features > 0 and cell.labels == "joint":
        yield "--prior-features: reads features by the label; not with --labels joint"
    if cell.prior_epoch_order > 0:
        if cell.client_epochs == 1 or not cell.shuffled:
            yield (
                "--prior-epoch-order compares the client's epochs; give --client-epochs 2 or "
                "more and --shuffled true"
            )
        if cell.adaptive:
            yield "--prior-epoch-order: not with --adaptive true"
        if cell.polish > 0:
            yield "--prior-epoch-order: not with --polish, which has one set of images"
        if cell.labels == "joint":
            yield "--prior-epoch-order: not with --labels joint"


def _defense(cell: Cell) -> Iterator[str]:
    if cell.adaptive and not cell.chain():
        yield "--adaptive true: there is no --defense to adapt to"
    if cell.adaptive and cell.polish > 0:
        yield "--polish: not with --adaptive true"
    if cell.adaptive and (changed := defenses.changes_noise(cell.chain())):
        yield (
            f"--defense {cell.defense}: an adaptive attacker does not know what {changed} makes of "
            "the noise in front of it; put the noise last, or use --adaptive false"
        )
    if cell.of_each_image() and f"{cell.model}_gn" in networks.NETWORKS:
        yield (
            f"--defense {cell.defense}: takes each image's own gradient, which BatchNorm does "
            f"not have; use --model {cell.model}_gn"
        )
    if cell.of_each_image() and cell.local().steps(cell.images) > 1:
        yield (
            f"--defense {cell.defense}: of one gradient; leave --client-epochs and "
            "--client-batch out"
        )


def _attack(cell: Cell) -> Iterator[str]:
    found = set(conflicts(cell))
    if "optimizer" in found:
        yield (
            f"--optimizer lbfgs: needs the gradient itself, not --sign {cell.sign}; use --sign none"
        )
    if "exchange" in found:
        yield (
            f"--exchange {cell.exchange}: takes means, which --representation "
            f"{cell.representation} has none of; use halving"
        )
    if "entries" in found:
        yield (
            f"--entries {cell.entries:g}: seeds that compare different entries exchange nothing; "
            "leave --exchange out"
        )
    assumed = cell.assumed()
    steps = assumed.local.steps(assumed.images)
    if cell.simulation == "surrogate":
        if not may_be_surrogate(cell.objective, cell.priors(), steps, assumed.defense):
            yield (
                "--simulation surrogate: of several local steps (--client-epochs, --client-batch), "
                "with --objective cosine, blind to the defense, without --prior-epoch-order"
            )
        if cell.assumed_batch is not None:
            yield (
                "--assumed-batch: --simulation surrogate takes one gradient of all images; leave "
                "it out"
            )
    if cell.posterior > 0 and cell.polish > 0:
        yield "--posterior: of an image that is not polished; leave --polish or it out"
    if cell.anneal_to > cell.anneal_from:
        yield (
            f"--anneal-to {cell.anneal_to:g}: above --anneal-from {cell.anneal_from:g}; the error "
            "of the model must fall"
        )


def _family(cell: Cell) -> Iterator[str]:
    """What the kind of attack is not for."""
    family, assumed = cell.family(), cell.assumed()
    if family.inits and cell.init not in family.inits:
        yield (
            f"--init {cell.init}: --attack {cell.attack} does not begin so; use "
            f"{' or '.join(family.inits)}"
        )
    if cell.attack == "imprint" and cell.server == "honest":
        yield "--attack imprint: reads what a server imprinted; give --server malicious"
    if family.unfit(steps=cell.local().steps(cell.images)):
        yield (
            f"--attack {cell.attack}: of one gradient; leave --client-epochs and --client-batch out"
        )
    if why := family.unfit(steps=assumed.local.steps(assumed.images)):
        yield f"--assumed-batch: --attack {cell.attack} {why}; leave it out"
    if why := family.unfit(joint_labels=cell.labels == "joint"):
        yield f"--labels joint: --attack {cell.attack} {why}; use known, or a rule"
    if family.unfit(each_image=cell.adaptive and cell.of_each_image()):
        yield f"--adaptive true: --attack {cell.attack} cannot adapt to --defense {cell.defense}"
    if family.only_kinked and not cell.has_kinks():
        yield (
            f"--attack {cell.attack}: of networks with ReLUs, not {cell.model}; use --attack bayes"
        )
    smoothed = ATTACKS["smoothed_bayes"].family
    if family.only_smooth and cell.has_kinks() and not smoothed.unfit(**cell.asks()):
        network = cell.model + (" behind an imprint" if cell.server == "malicious" else "")
        yield (
            f"--attack {cell.attack}: of smooth networks, not {network}; use --attack "
            "smoothed_bayes"
        )


CELL_CHECKS: tuple[Callable[[Cell], Iterator[str]], ...] = (
    _client,
    _attackers_view,
    _priors,
    _defense,
    _attack,
    _family,
    _learned,
)


def check_used(grids: Sequence[Mapping[str, Any]], cells: Sequence[Sequence[Cell]]) -> None:
    """Refuses a setting that changes none of the cells that it was given for.

    Args:
      grids: the settings that were given.
      cells: of each grid.

    Raises:
      UserError: one line that names it and says why.
    """
    used, idle = set(), {}
    for grid, made in zip(grids, cells):
        for cell in made:
            reasons = dict(_idle(cell))
            for name in grid:
                if name in reasons:
                    idle[name] = f"{flag(name)} {getattr(cell, name)}: {reasons[name]}"
                else:
                    used.add(name)
    for name, message in idle.items():
        if name not in used:
            raise UserError(message)


def _default(name: str) -> Any:
    """The value of a setting where it is not given."""
    return Cell.model_fields[name].default


def _idle(cell: Cell) -> Iterator[tuple[str, str]]:
    """The settings off their defaults that change nothing beside the others, with the reason."""
    assumed = cell.assumed()
    assumed_steps = assumed.local.steps(assumed.images)
    steps = max(cell.local().steps(cell.images), 1 if cell.assumed_lr else assumed_steps)
    if cell.image_prior != _default("image_prior") and not cell.has_image_prior():
        yield "image_prior", "of --representation whitened; give it, or leave the prior out"
    if REPRESENTATIONS[cell.representation].to_parameters is None and not cell.box:
        yield "box", f"--representation {cell.representation} makes images in the box; leave it out"
    if REPRESENTATIONS[cell.representation].draw is not None and cell.init != _default("init"):
        yield "init", f"--representation {cell.representation} draws its own start; leave it out"
    if cell.prior_schedule != "constant" and not cell.priors():
        yield "prior_schedule", "no prior has a weight; give one, such as --tv, or leave it out"
    if cell.inverter is not None and not cell.uses_inverter():
        yield "inverter", "of --init learned; give it, or leave the inverter out"
    for kind in ("denoiser", "autoencoder"):
        default = Cell.model_fields[kind].default
        if getattr(cell, kind) != default and kind not in cell.learned():
            yield kind, f"of --prior-{kind}; give its weight, or leave it out"
    if cell.width is not None and networks.NETWORKS[cell.model].width is None:
        yield "width", f"{cell.model} has one size; leave it out"
    for name in ("bins", "amplify"):
        if getattr(cell, name) != _default(name) and cell.server == "honest":
            yield name, "of an imprint; give --server malicious, or leave it out"
    if cell.grouping != "stored" and cell.images == 1:
        yield "grouping", "of several images; give --images, or leave it out"
    if cell.client_lr != _default("client_lr") and steps == 1:
        yield "client_lr", ONE_STEP
    if cell.assumed_lr is not None and assumed_steps == 1:
        yield "assumed_lr", ONE_STEP
    whole = cell.images == (cell.client_batch or cell.images)
    if cell.shuffled and whole and not needing("epochs", cell.priors()):
        yield "shuffled", "an epoch of one step has no order; give --client-batch, or leave it out"
    dropped = may_drop_gradients(
        cell.priors(),
        assumed.local.steps(assumed.images),
        assumed.defense,
        cell.simulation,
        cell.entries,
    )
    if cell.gram == "on" and not dropped:
        yield (
            "gram",
            "of one gradient and all its entries, blind to the defense, without --prior-features; "
            "leave it out",
        )


def check_plan(plan: Plan, cells: Sequence[Cell]) -> None:
    """Refuses what is asked of every cell and changes none.

    Raises:
      UserError: one line that names it.
    """
    for message in _plan(plan, cells):
        raise UserError(message)


def _plan(plan: Plan, cells: Sequence[Cell]) -> Iterator[str]:
    if plan.noise_seeds > 1 and not any(defenses.is_random(cell.chain()) for cell in cells):
        yield f"--noise-seeds {plan.noise_seeds}: no --defense here is random; leave it out"
    if plan.memory is not None and all(cell.family().make is None for cell in cells):
        yield "--memory: a closed form takes what it takes; leave it out"
    if plan.data_dir is not None and all(cell.dataset == "tiles" for cell in cells):
        yield "--data-dir: the tiles ship with the package; leave it out"
    yield from start_of_seeds(plan.seeds, cells)
    coupled = [name for cell in cells for name in cell.couplings()]
    if coupled and plan.seeds == 1:
        yield f"{flag(coupled[0])}: looks at a target's other seeds; give --seeds 2 or more"


def start_of_seeds(seeds: int, cells: Sequence[Cell]) -> Iterator[str]:
    """Several seeds that all begin, and go on, alike."""
    if seeds > 1 and any(cell.init == LEARNED and cell.entries == 1 for cell in cells):
        yield f"--seeds {seeds}: of --init learned all are the same; give --seeds 1"


def check_search(plan: Plan, cell: Cell) -> None:
    """Refuses what a search around a cell has no use for.

    Raises:
      UserError: one line that names it.
    """
    if plan.noise_seeds > 1:
        raise UserError("--noise-seeds: a search draws a defense once; leave it out")
    if cell.polish > 0:
        raise UserError("--polish: takes hours for all candidates; polish the winner in a sweep")
    if cell.uses_inverter():
        raise UserError("--inverter: has learned from the images of a search; leave it out")
    if coupled := cell.couplings():
        raise UserError(f"{flag(coupled[0])}: would draw the candidates together; leave it out")
    for name in ("judge", "lpips"):
        if getattr(plan, name):
            raise UserError(f"--{name}: no candidate is measured so; give it to the winner's sweep")
    check_plan(plan, [cell])


def check_training(training: Training, given: Collection[str]) -> None:
    """Refuses settings of a training that do not go together.

    Args:
      training: all settings.
      given: the names of those that are no defaults.

    Raises:
      UserError: one line that names them.
    """
    for message in _training(training, given):
        raise UserError(message)


def _training(training: Training, given: Collection[str]) -> Iterator[str]:
    yield from _learning(training, given)
    extra = [name for name in OF_PRIVACY if name in given]
    if extra and not training.dp:
        yield f"--{extra[0].replace('_', '-')}: a setting of DP-SGD; add --dp true"
    if training.dp:
        if (training.noise_multiplier is None) == (training.target_epsilon is None):
            yield "--dp: say how much noise: one of --noise-multiplier and --target-epsilon"
        if training.delta is None:
            yield "--dp: an epsilon means nothing without its delta; give --delta, such as 1e-5"
        if f"{training.model}_gn" in networks.NETWORKS:
            yield (
                "--dp: no example has a gradient of its own under BatchNorm; use --model "
                f"{training.model}_gn"
            )
    for stop in training.stop_at:
        if stop.kind == "epoch" and stop.value > training.epochs:
            yield f"--stop-at epoch:{stop.value:g}: there are {training.epochs} --epochs"


def _learning(training: Training, given: Collection[str]) -> Iterator[str]:
    """Of a prior or an inverter."""
    if training.prior and training.inverter:
        yield "--inverter: not with --prior; train one after the other"
    if training.learns:
        asked = "--prior" if training.prior else "--inverter"
        for name in OF_VICTIMS:
            if name in given:
                yield f"{flag(name)}: of a network that is attacked, not of {asked}; leave it out"
    if training.images > 1 and not training.inverter:
        yield "--images: of the updates that an inverter learns from; give --inverter"
    if training.batch % training.images:
        yield (
            f"--images {training.images}: does not divide --batch {training.batch}; give a "
            "--batch that it divides"
        )
    if training.defense != defenses.NONE and not training.inverter:
        yield "--defense: of the updates that an inverter learns from; give --inverter"
    if training.defense == VICTIMS_OWN:
        yield "--defense victim: of a sweep; spell the chain, such as dpsgd:1:1"
