"""A folder's lock: kept while a process works there, free when it is gone."""

import subprocess
import sys

import pytest

from jaxinv import files
from jaxinv.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from jaxinv import files
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match="run: another process is at work there"),
            files.locked(tmp_path / "run"),
        ):
            pass
    finally:
        other.kill()
        other.communicate()
    with files.locked(tmp_path / "run"):
        pass
