"""Which settings do not go together: each check yields the line that names them and the fix.

A setting that the chosen attack does not read at all is the business of
`attacks.unused_settings`.
"""

from collections.abc import Callable, Collection, Iterator

from jaxinv import networks
from jaxinv.attacks import CLOSED_FORM, SECOND_ORDER
from jaxinv.attacks.gauss_newton import PRIOR_INITS
from jaxinv.errors import UserError
from jaxinv.settings.schema import Cell, Training

# The settings of a training that mean nothing without --dp.
OF_PRIVACY = ("noise_multiplier", "target_epsilon", "clip", "delta", "accountant", "microbatch")


def check_cell(cell: Cell) -> None:
    """Refuses settings that do not go together.

    Raises:
      UserError: one line that names them.
    """
    networks.build(cell.model, classes=2, width=cell.width)  # refuses widths it cannot have
    for check in CELL_CHECKS:
        for message in check(cell):
            raise UserError(message)


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
    attacker = cell.attacker()
    if cell.labels == "idlg" and attacker.images > 1:
        yield "--labels idlg reads one label; use --images 1 or --labels known"
    if attacker.images % (attacker.local.batch or 1):
        yield (
            f"--assumed-batch {attacker.local.batch}: does not divide the {attacker.images} "
            "images assumed"
        )
    if attacker.images != cell.images and cell.labels == "known":
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
    if cell.dp_sgd() and f"{cell.model}_gn" in networks.NETWORKS:
        yield (
            f"--defense {cell.defense}: takes each image's own gradient, which BatchNorm does "
            f"not have; use --model {cell.model}_gn"
        )
    if cell.dp_sgd() and cell.local().steps(cell.images) > 1:
        yield (
            f"--defense {cell.defense}: of one gradient; leave --client-epochs and "
            "--client-batch out"
        )


def _attack(cell: Cell) -> Iterator[str]:
    if cell.optimizer == "lbfgs" and cell.sign != "none":
        yield (
            f"--optimizer lbfgs: needs the gradient itself, not --sign {cell.sign}; use --sign none"
        )
    if cell.attack in CLOSED_FORM and cell.local().steps(cell.images) > 1:
        yield (
            f"--attack {cell.attack}: of one gradient; leave --client-epochs and --client-batch out"
        )
    if cell.posterior > 0 and cell.polish > 0:
        yield "--posterior: of an image that is not polished; leave --polish or it out"


def _second_order(cell: Cell) -> Iterator[str]:
    if cell.init in PRIOR_INITS and cell.attack not in SECOND_ORDER:
        yield (
            f"--init {cell.init}: of --attack {' and '.join(SECOND_ORDER)}; others begin with noise"
        )
    if cell.init not in PRIOR_INITS and cell.attack in SECOND_ORDER:
        yield (
            f"--init {cell.init}: --attack {cell.attack} begins with its prior; use "
            f"{' or '.join(PRIOR_INITS)}"
        )
    if cell.anneal_to > cell.anneal_from:
        yield (
            f"--anneal-to {cell.anneal_to:g}: above --anneal-from {cell.anneal_from:g}; the error "
            "of the model must fall"
        )


def _smoothed(cell: Cell) -> Iterator[str]:
    if cell.attack != "smoothed_bayes":
        return
    if networks.NETWORKS[cell.model].smooth:
        yield (
            f"--attack smoothed_bayes: of networks with ReLUs, not {cell.model}; use --attack bayes"
        )
    if cell.local().steps(cell.images) > 1:
        yield (
            "--attack smoothed_bayes: of one gradient; leave --client-epochs and --client-batch out"
        )
    if cell.labels == "joint":
        yield "--attack smoothed_bayes: not with --labels joint"
    if cell.adaptive and cell.dp_sgd():
        yield "--attack smoothed_bayes: not with --adaptive true and DP-SGD"


CELL_CHECKS: tuple[Callable[[Cell], Iterator[str]], ...] = (
    _client, _attackers_view, _priors, _defense, _attack, _second_order, _smoothed,
)  # fmt: skip


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
