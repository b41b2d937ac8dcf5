"""Shared by all tests: quick compilation, four devices, and one compiled attack."""

import math
import os
from pathlib import Path

# Compilation is the cost of this suite; what it computes is small.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

# What one worker compiled, the others and the next run need not.
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "jaxinv-tests")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

# In the environment, so that a test's subprocess computes with the same devices, bit for bit.
os.environ["JAX_NUM_CPU_DEVICES"] = "4"

import hypothesis
from jaxtyping import install_import_hook

# The shapes in the annotations of the pure modules are checked at every call.
SHAPES_CHECKED = [
    f"jaxinv.{name}"
    for name in (
        "metrics",
        "privacy",
        "defenses",
        "data.image_prior",
        "reporting.statistics",
        "reporting.consensus",
    )
]
install_import_hook(SHAPES_CHECKED, "beartype.beartype")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import networks, rng
from jaxinv.attacks.gradient_matching import Method
from jaxinv.engine import planner, trials
from jaxinv.engine.targets import make_targets, seed_keys
from jaxinv.types import Normalization, Truth
from jaxinv.victim.untrained import untrained

# The same examples in every run, and no clock: a first call compiles.
hypothesis.settings.register_profile(
    "jaxinv", derandomize=True, max_examples=25, deadline=None, database=None
)
hypothesis.settings.load_profile("jaxinv")


# Every compiled program keeps mappings of memory, of which Linux grants a process 65,530: the one
# that is loaded beyond them ends in a segmentation fault, far into the suite.
MOST_MAPPINGS = 15_000


@pytest.fixture(autouse=True, scope="module")
def _few_mappings():
    yield
    mappings = Path("/proc/self/maps")  # of Linux alone
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


class Problem:
    """Two targets of one 8x8 image on LeNetZhu, small enough to attack in a test."""

    shape = (8, 8, 3)
    seeds = 4

    def __init__(self):
        self.victim = untrained("lenet_zhu", classes=10, width=None, seed=0, image_shape=self.shape)
        self.normalization = Normalization(jnp.full(3, 0.5), jnp.full(3, 0.25))
        images = jax.random.uniform(rng.stream_key(rng.Stream.DATA, 0), (2, 1, *self.shape))
        self.truths = Truth(images, jnp.array([[3], [7]]))
        self.targets = make_targets(
            self.victim.module, self.victim.variables, self.truths, self.normalization
        ).targets
        self.keys = seed_keys([0, 1], range(self.seeds))

    def run(
        self,
        *,
        iterations=12,
        targets=None,
        truths=None,
        keys=None,
        group=2,
        devices=1,
        lr=0.1,
        tv=0.01,
        memory=math.inf,
        frames=0,
        method=Method(),  # noqa: B008
    ):
        """Attacks; every call with the default shapes shares one compilation."""
        keys = self.keys if keys is None else keys
        settings = {"lr": lr, "client_lr": 1.0, "tv": tv, "iterations": iterations}
        return trials.run(
            self.problem(targets, truths),
            method,
            method.numbers(keys.shape[1], settings),
            keys,
            trials.Resources(
                planner.GroupPlan(1, group, devices, method.couples_seeds), memory, frames=frames
            ),
        )

    def problem(self, targets=None, truths=None, image_prior=None):
        """What the loop is given."""
        return trials.Problem(
            self.victim.module,
            self.shape,
            self.victim.variables,
            self.targets if targets is None else targets,
            self.truths if truths is None else truths,
            self.normalization,
            image_prior,
        )


@pytest.fixture(scope="session")
def problem():
    return Problem()


@pytest.fixture(scope="session")
def result(problem):
    return problem.run()


class Perceptron(nn.Module):
    """One hidden layer without kinks: the least network for attacks of smooth ones."""

    classes: int
    width: int = 8

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(self.classes)(nn.sigmoid(nn.Dense(self.width)(x.reshape(len(x), -1))))


@pytest.fixture
def perceptron(monkeypatch):
    """Its name among the networks."""
    entry = networks.Network("Perceptron", Perceptron, width=8, smooth=True)
    monkeypatch.setitem(networks.NETWORKS, "perceptron", entry)
    return "perceptron"


@pytest.fixture
def rng_numpy():
    return np.random.default_rng(0)
