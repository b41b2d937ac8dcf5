"""What an attacker learns of images like those it attacks: image priors, and an inverter.

A checkpoint is a folder like a victim's (`victim/checkpoints.py`): info.json, log.csv and arrays/,
whose digest is checked on every load. `python -m jaxinv.train --prior` and `--inverter` make them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxinv import files
from jaxinv.errors import UserError
from jaxinv.learned import nets
from jaxinv.types import PyTree
from jaxinv.victim import checkpoints


class Kind(NamedTuple):
    """An entry of `KINDS`."""

    network: Callable[[int | None, int], nn.Module]  # of a width, or the default; numbers made
    inputs: Callable[[tuple[int, int, int], int], tuple]  # of an image's shape; all labels' classes


def _bins(shape: tuple[int, int, int], classes: int) -> tuple:
    del shape
    return (jnp.zeros((1, nets.HASHED + classes)),)


KINDS = {
    "denoiser": Kind(
        lambda width, numbers: nets.Denoiser(width or nets.Denoiser.width),
        lambda shape, classes: (jnp.zeros((1, *shape)), jnp.ones(1)),
    ),
    "autoencoder": Kind(
        lambda width, numbers: nets.Autoencoder(width or nets.Autoencoder.width),
        lambda shape, classes: (jnp.zeros((1, *shape)),),
    ),
    "inverter": Kind(lambda width, numbers: nets.Inverter(numbers, width or nets.WIDTH), _bins),
}
PRIORS = ("denoiser", "autoencoder")
MOST_WIDTH = 2**14


class Info(BaseModel):
    """What info.json says of a network that an attacker has trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str  # a name of `KINDS`
    width: Annotated[int, Field(ge=1, le=MOST_WIDTH)]
    dataset: str
    images: int  # of its training split that it was trained on
    classes: tuple[str, ...]  # of these images: what it has seen of
    image_shape: tuple[checkpoints.Size, checkpoints.Size, checkpoints.Size]
    update_images: checkpoints.Size = 1  # of an inverter: images of each update
    victim: str | None = None  # whose updates it was trained on,
    victim_digest: str | None = None
    defense: str | None = None  # and how these were defended
    recipe: dict[str, Any]  # every setting of the training
    epochs: int
    steps: int
    train_loss: float
    test_loss: float
    seconds: float  # of training
    hardware: str
    versions: dict[str, str]
    storage: str = "float32"
    digest: str = ""  # filled in on writing

    @property
    def source(self) -> str:
        """In a word, for the rows: what it is, and of what."""
        return f"{self.kind} of {self.dataset}/train, {self.images} images, {self.digest[:16]}"


class Learned(NamedTuple):
    """A network that an attacker has trained, loaded."""

    variables: PyTree  # "params", and what else it holds
    info: Info


def load(kind: str, path_or_name: str) -> Learned:
    """Loads a trained network of an attacker's.

    Args:
      kind: of `KINDS`, and the name of the setting.
      path_or_name: as in `checkpoints.load_victim`.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or of another kind.
    """
    folder = checkpoints.find(path_or_name, kind)
    try:
        info = Info.model_validate(checkpoints.read_fields(folder))
    except ValidationError as error:
        raise UserError(f"--{kind} {folder}: info.json: {files.first_error(error)}") from None
    if info.kind != kind:
        raise UserError(f"--{kind} {folder}: holds no {kind} (but: {info.kind}); give another")
    template = blank(info.kind, info.width, info.image_shape, len(info.classes), info.update_images)
    variables = checkpoints.read(folder, template, info.digest, f"a {kind} of this width")
    return Learned(variables, info)


def network(
    kind: str, width: int | None, shape: tuple[int, int, int], classes: int, images: int = 1
) -> tuple[nn.Module, tuple]:
    """A kind's network, and arrays shaped like its inputs, for updates of so many images."""
    entry = KINDS[kind]
    module = entry.network(width, images * math.prod(shape))
    return module, entry.inputs(shape, images * classes)


def blank(
    kind: str, width: int | None, shape: tuple[int, int, int], classes: int, images: int = 1
) -> PyTree:
    """The shapes of the variables of a kind's network."""
    module, inputs = network(kind, width, shape, classes, images)
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    if kind != "inverter":
        return variables
    bins = jax.ShapeDtypeStruct((nets.HASHED,), jnp.float32)
    return {**variables, "scale": {"mean": bins, "std": bins}}


def params_of(trained: Mapping[str, PyTree], kind: str) -> PyTree:
    """The parameters of what an attacker has trained, of one kind.

    Raises:
      UserError: it has no such thing.
    """
    if kind not in trained:
        raise UserError(f"prior_{kind}: there is no {kind}; give one (learned=), or leave it out")
    return trained[kind]["params"]


def check_fits(learned: Learned, setting: str, shape: tuple[int, ...]) -> None:
    """Raises a UserError unless it is of images of this shape."""
    info = learned.info
    if info.image_shape != tuple(shape):
        own, wanted = ("x".join(map(str, s)) for s in (info.image_shape, shape))
        raise UserError(
            f"--{setting}: is of {own} images of {info.dataset}, not of {wanted}; train one of "
            "these (python -m jaxinv.train) and name it"
        )


def check_learned_from(inverter: Learned, victim_digest: str, defense: str, images: int) -> None:
    """Raises a UserError unless it has learned from such updates of this very network."""
    info = inverter.info
    if info.victim_digest != victim_digest:
        raise UserError(
            f"--inverter: has learned from the updates of {info.victim}, which is not the network "
            "here; name that with --victim, or train another"
        )
    if info.defense != defense:
        raise UserError(
            f"--inverter: has learned from updates with --defense {info.defense}, not {defense}; "
            "give that, or train another"
        )
    if info.update_images != images:
        raise UserError(
            f"--inverter: has learned from updates of {info.update_images} images, not {images}; "
            "give that, or train another"
        )
