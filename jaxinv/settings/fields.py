"""What a setting is: a field with limits, and with the flag and sentence of help that show it."""

import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from jaxinv import defenses

VICTIMS_OWN = "victim"  # the defense that a victim was trained with
MOST_SEED = 2**32 - 1  # a key of JAX is made of 32 bits; a larger seed would repeat a smaller one
MOST_COUNT = 2**31 - 1  # compiled loops count in 32 bits
MOST_WIDTH = 2**14
LEAST_FLOAT, MOST_FLOAT = 1.2e-38, 3.4e38  # what float32 can hold without becoming 0 or infinite
MOST_NAME = 200  # bytes of a file's name, with room for the endings of temporary files (255)
MOST_PATH = 2000
MOST_DEFENSES = 8  # of a chain; a longer one takes minutes to compile


class OneOf:
    """Accepts the names that stand in some tables at the time, and lists them otherwise."""

    def __init__(self, *tables: Iterable[str]):
        self._tables = tables

    @property
    def names(self) -> tuple[str, ...]:
        """All names, a user's own entries among them."""
        return tuple(name for table in self._tables for name in table)

    def __call__(self, name: str) -> str:
        """Returns the name.

        Raises:
          ValueError: it is not in the table.
        """
        if name not in self.names:
            raise ValueError(f"unknown; known are {', '.join(self.names)}")
        return name


def of_tables(*tables: Iterable[str]) -> AfterValidator:
    """What a setting may be: a name in one of these tables."""
    return AfterValidator(OneOf(*tables))


def setting(
    group: str,
    default: Any,
    text: str,
    metavar: str | None = None,
    traced: bool = False,
    **limits: Any,
) -> Any:
    """A field that is a flag.

    Args:
      group: heading of `--help` under which it stands.
      default: its value where it is not given; a function of the settings above it, or ... for a
        value that must be given.
      text: one sentence of `--help`.
      metavar: what stands for its value there; by its type where not given.
      traced: whether it may differ from seed to seed in one program: a search may vary it.
      limits: as pydantic names them (ge, gt, le, lt, min_length, ...).
    """
    shown = {"group": group, "metavar": metavar, "traced": traced}
    if callable(default):
        return Field(default_factory=default, description=text, json_schema_extra=shown, **limits)
    return Field(default, description=text, json_schema_extra=shown, **limits)


def weight(default: float, text: str) -> Any:
    """The weight of a prior; 0 leaves it out."""
    return setting("priors", default, text, ge=0, traced=True)


def kind_of(annotation: Any) -> type | None:
    """The one of bool, int and float that a setting's values are; None for other types."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation, *_ = (t for t in typing.get_args(annotation) if t is not type(None))
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation if annotation in (bool, int, float) else None


def published(width: Any) -> Any:
    """Reads the width "published": a sweep file's preset must be able to take a width back."""
    return None if width == "published" else width


def spell_chain(text: str) -> str:
    """Spells a chain of defenses in the one way there is."""
    if text == VICTIMS_OWN:
        return text
    if not text.isascii():
        raise ValueError("write it with plain letters and digits")
    chain = defenses.parse(text)
    if len(chain) > MOST_DEFENSES:
        raise ValueError(f"a chain of {len(chain)}; give {MOST_DEFENSES} at most")
    for value in (value for strengths in defenses.strengths(chain) for value in strengths):
        check_float(value)
    return defenses.spell(chain)


def check_plain(text: str) -> None:
    """Refuses digits with underscores between them, which Python takes for a number, and others."""
    if "_" in text or not text.isascii():
        raise ValueError("write a number with plain digits")


def split_ids(ids: Any) -> Any:
    """Reads "3,5,8", as a flag gives it."""
    if not isinstance(ids, str):
        return ids
    check_plain(ids)
    return ids.split(",")


def _path(text: str) -> str:
    """Accepts what a file system can name.

    Raises:
      ValueError: it is empty, holds a character that cannot be printed, or is too long.
    """
    if not text or not text.isprintable():
        raise ValueError("no name of a file or folder")
    longest = max(len(part.encode(errors="replace")) for part in Path(text).parts)
    if longest > MOST_NAME or len(text.encode(errors="replace")) > MOST_PATH:
        raise ValueError(f"too long; give names of at most {MOST_NAME} bytes")
    return text


FilePath = Annotated[str, AfterValidator(_path)]


def check_float(value: float) -> None:
    """Refuses what float32 cannot hold: it would become infinite or 0 on its way."""
    if value and not LEAST_FLOAT <= abs(value) <= MOST_FLOAT:
        raise ValueError(f"beyond what float32 holds, {LEAST_FLOAT:g} to {MOST_FLOAT:g}")


class Strict(BaseModel):
    """Unknown keys are errors, values are frozen, infinities and NaN are no numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses what Python takes for a number and a reader does not: 1_0, True, ٣."""
        kind = kind_of(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, str) and kind in (int, float):
            check_plain(value)
        if isinstance(value, bool) and kind in (int, float):
            raise ValueError("a number is wanted, not true or false")
        if isinstance(value, int) and not isinstance(value, bool) and kind is bool:
            raise ValueError("give true or false")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _in_float32(cls, value: Any) -> Any:
        """Refuses numbers that the program could not hold."""
        if isinstance(value, float):
            check_float(value)
        return value


# Of several commands.
BINS = setting("network", 128, "Bins of a malicious server's imprint.", ge=2, le=10**5)
AMPLIFY = setting(
    "network",
    1.0,
    "Factor by which a malicious server multiplies the network's last layer: gradients grow with "
    "it, and noise of a fixed variance does not.",
    ge=1,
)
DATA_DIR = setting(
    "data", None, "Folder of the tensorflow-datasets (default: $TFDS_DATA_DIR).", "DIR"
)
JUDGE = setting(
    "data",
    None,
    "Trained network without a part in the update, which judges reconstructions too.",
    "NAME|DIR",
)
MEMORY = setting(
    "output", None, "GiB of memory to use on each accelerator (default: nearly all).", gt=0
)
