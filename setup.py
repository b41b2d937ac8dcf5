"""Puts what lies beside the package into the wheel: sweeps, small victims, learned priors.

All other settings are in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = [
    *Path("sweeps").glob("*.toml"),
    *Path("checkpoints").glob("lenet_zhu-*/**/*"),
    *Path("checkpoints").glob("prior-*/**/*"),
]


class BuildPy(build_py):
    """Copies `SHIPPED` to where `jaxinv.files.shipped` looks for it."""

    def run(self):
        super().run()
        if not self.editable_mode:  # an editable package finds them in the clone
            for file in filter(Path.is_file, SHIPPED):
                copy = Path(self.build_lib, "jaxinv", file)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)

    def get_source_files(self):
        """What a source distribution holds, so that a wheel can be made of it."""
        return super().get_source_files() + [str(file) for file in SHIPPED if file.is_file()]


setup(cmdclass={"build_py": BuildPy})
