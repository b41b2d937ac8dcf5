"""Settings as flags: one per field, in groups, with what it may be.

By argparse: a flag's text must stay text until a sweep file lies under it, and several values make
an axis, which libraries that parse by type (tyro, cyclopts) would validate flag by flag.
"""

import argparse
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NoReturn

from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from jaxinv.errors import OneLineParser, UserError
from jaxinv.settings.fields import OneOf, kind_of
from jaxinv.settings.requests import Auditing, Inverting, Search, Training
from jaxinv.settings.schema import RENAMED, Cell, Plan, Workers

# Headings of `--help`, in order.
_GROUPS = (
    "update",
    "search",
    "data",
    "network",
    "client",
    "defense",
    "attack",
    "priors",
    "second-order attack",
    "training",
    "privacy",
    "machines",
    "output",
)
# What of a cell does not concern an update that is there already.
_NOT_INVERTED = {
    "dataset",
    "model",
    "width",
    "network_seed",
    "grouping",
    "server",
    "bins",
    "amplify",
    "shuffled",
    "client_lr",
    "assumed_images",
    "assumed_batch",
    "assumed_lr",
    "adaptive",
    "prior_epoch_order",
    "gram",
}
_SEVERAL = {"space", "resources", "stop_at"}  # several values make a list, not an axis


class FlagParser(OneLineParser):
    """A parser of settings: flags in groups."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, formatter_class=_OneEllipsis)
        self._named = {name: self.add_argument_group(name) for name in _GROUPS}

    def group(self, name: str) -> Any:
        """The group of `--help` with this name."""
        return self._named[name]


class _OneEllipsis(argparse.HelpFormatter):
    """Writes a flag of several values as `--tv FLOAT ...`, and no flags into the usage line.

    Paragraphs are filled each on its own, and one that is indented, examples, is left as it is.
    """

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, max_help_position=28, **options)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.strip().split("\n\n")
        filled = (super(_OneEllipsis, self)._fill_text(part, width, indent) for part in parts)
        return "\n\n".join(p if p.startswith(" ") else f for p, f in zip(parts, filled))

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+":
            return f"{action.metavar} ..."
        return super()._format_args(action, default_metavar)

    def add_usage(self, usage, actions, groups, prefix=None):
        positional = [action for action in actions if not action.option_strings]
        super().add_usage(
            f"{self._prog} [FLAG VALUE ...]"
            + "".join(
                f" [{action.metavar}]" if action.nargs == "?" else f" {action.metavar}"
                for action in positional
            ),
            actions,
            groups,
            prefix,
        )


class _Renamed(argparse.Action):
    """A flag of an earlier version: says what it is called now."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: Any = None
    ) -> NoReturn:
        """Raises the one line."""
        raise UserError(f"{option_string}: is now {self.const}")


def flag(setting: str) -> str:
    """The flag's spelling of a setting."""
    return f"--{setting.replace('_', '-')}"


def add_study(parser: FlagParser) -> None:
    """Adds one flag per setting of a study; their values stay text until they are validated."""
    _add(parser, Plan)
    _add(parser, Cell, axes=True)
    parser.epilog = "A flag with ... takes several values, which make an axis of the grid."
    _add_renamed(parser, {flag(old): flag(new) for old, new in RENAMED.items()})


def add_search(parser: FlagParser) -> None:
    """Adds the flags of a search, and those of a study."""
    _add(parser, Search)
    add_study(parser)


def add_inverting(parser: FlagParser) -> None:
    """Adds the flags of `jaxinv.invert`."""
    _add(parser, Inverting)
    _add(parser, Cell, left_out=_NOT_INVERTED)
    _add_renamed(parser, {flag(a): flag(b) for a, b in RENAMED.items() if b not in _NOT_INVERTED})


def add_audit(parser: FlagParser) -> None:
    """Adds the flags of `jaxinv.audit`."""
    _add(parser, Auditing)


def add_workers(parser: FlagParser) -> None:
    """Adds the flags that say where a sweep is computed."""
    _add(parser, Workers)


def add_training(parser: FlagParser) -> None:
    """Adds the flags of a training."""
    _add(parser, Training)
    _add_renamed(parser, {"--no-augment": "--augment false"})


def _add(
    parser: FlagParser, model: type[BaseModel], axes: bool = False, left_out: Collection[str] = ()
) -> None:
    """Adds a flag per field, of several values where they make an axis or a list."""
    for name, field in model.model_fields.items():
        if name in left_out:
            continue
        options: dict[str, Any] = {"metavar": _metavar(field), "help": _help(field)}
        if axes or name in _SEVERAL:
            options["nargs"] = "+"
        elif kind_of(field.annotation) is bool:  # alone it says true: --dp
            options |= {"nargs": "?", "const": "true"}
        parser.group(_shown(field)["group"]).add_argument(flag(name), **options)


def _add_renamed(parser: FlagParser, names: Mapping[str, str]) -> None:
    """Adds flags of earlier versions, which say what they are called now."""
    for old, new in names.items():
        parser.add_argument(old, nargs="*", action=_Renamed, const=new, help=argparse.SUPPRESS)


def _shown(field: FieldInfo) -> dict[str, Any]:
    return typing.cast(dict, field.json_schema_extra)


def _help(field: FieldInfo) -> str:
    """The sentence, with the default where there is one that the sentence does not say."""
    text = (field.description or "").replace("%", "%%")
    default = field.default
    if field.is_required() or field.default_factory is not None or default in (None, (), {}):
        return text
    if isinstance(default, tuple):
        default = " ".join(default)
    shown = f"{default:g}" if isinstance(default, float) else str(default)
    return f"{text} (default: {shown.lower() if isinstance(default, bool) else shown})"


def _metavar(field: FieldInfo) -> str:
    """What a value may be: its choices, or its type in capitals."""
    if _shown(field)["metavar"] is not None:
        return _shown(field)["metavar"]
    if choices := list(_choices(field)):
        return f"{{{','.join(choices)}}}"
    kind = kind_of(field.annotation)
    return {bool: "{true,false}", int: "INT", float: "FLOAT", None: "TEXT"}[kind]


def _choices(field: FieldInfo) -> Iterator[str]:
    """The names that a field accepts; none where it accepts others."""
    if typing.get_origin(field.annotation) is typing.Literal:
        yield from typing.get_args(field.annotation)
    for check in field.metadata:
        if isinstance(check, AfterValidator) and isinstance(check.func, OneOf):
            yield from check.func.names
