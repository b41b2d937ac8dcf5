"""What a user has who installs the wheel: no clone, and still the sweeps and a trained victim."""

import os
import shutil
import subprocess
import sys
from zipfile import ZipFile

import pytest

BUILT_FROM = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "jaxinv", "sweeps")


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory, pytestconfig):
    """A folder that holds what the wheel does, built from a copy: a build leaves files behind."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "target"))
    for name in BUILT_FROM:
        path = pytestconfig.rootpath / name
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, source / name)
    for name in ("lenet_zhu-tiles", "resnet20-w16-cifar10"):
        folder = f"checkpoints/{name}"
        shutil.copytree(pytestconfig.rootpath / folder, source / folder)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--quiet", "-w", str(target), str(source))
    (wheel,) = target.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_the_wheel_has_the_sweeps_and_the_small_victims(installed, pytestconfig):
    sweeps = {path.name for path in (pytestconfig.rootpath / "sweeps").glob("*.toml")}
    assert {path.name for path in (installed / "jaxinv/sweeps").iterdir()} == sweeps
    victims = [path.name for path in (installed / "jaxinv/checkpoints").iterdir()]
    assert victims == ["lenet_zhu-tiles"]


def test_the_wheel_has_the_pages(installed):
    pages = {path.name for path in (installed / "jaxinv/reporting").glob("*.[ch][st][sm]*")}
    assert pages == {"page.html", "page.css", "gallery.html"}


# One process: most of its time goes into imports.
COMMANDS = """
import sys, jaxinv
from jaxinv import sweep
assert jaxinv.__file__.startswith(sys.argv[1]), jaxinv.__file__
few = ["--targets", "1", "--seeds", "1"]
assert not sweep.main(["sweeps/tv_weight.toml", *few, "--dry-run"])
assert not sweep.main(["tv_weight.toml", *few, "--dry-run"])
one = ["--victim", "lenet_zhu-tiles", *few, "--iterations", "1", "--tv", "0.01", "--out", "run"]
assert not sweep.main(one)
"""


def test_the_commands_of_the_readme_work_outside_a_clone(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = (sys.executable, "-c", COMMANDS, str(installed))
    printed = run(*command, cwd=tmp_path, env=environment)
    assert printed.count("tv_weight: Which total-variation weight") == 2
    assert (tmp_path / "run" / "report.html").exists()
