"""The one exception a user is meant to see, and how a command shows it."""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class UserError(ValueError):
    """Bad input: one line that names the setting and the fix. Commands exit with code 2."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are a `UserError`: one line, like all others.

    Flags are written out in full: `--seed` would else be taken for `--seeds`.
    """

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage and exiting."""
        raise UserError(f"{message} (see {self.prog} --help)")


def run_command(command: Callable[[], None]) -> int:
    """Runs a command's body and turns its two expected endings into exit codes.

    Returns:
      0 after success, 2 after a `UserError` (its one line on stderr) and where the machine fails
      (a disk, a right, a folder that is gone), 130 after Ctrl-C.
    """
    try:
        command()
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is finished", file=sys.stderr)
        return 130
    return 0
