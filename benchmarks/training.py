"""Training images per second, beside PyTorch on the same batch, in one run.

    python -m benchmarks.training [--networks resnet18:16 mobilenetv2:32 ...] [--seconds 10]

One step is what `jaxinv.train` does with a batch of 128: gather, crop and flip, forward, backward,
SGD with Nesterov momentum. PyTorch (`pip install torch`) gets its batch ready-made. Networks
without BatchNorm are trained with DP-SGD too: a gradient per image, clipped, in microbatches.
"""

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.race import Form, race, read_network
from jaxinv.machine import runtime
from jaxinv.types import Normalization
from jaxinv.victim import training
from jaxinv.victim.untrained import Victim, untrained

BATCH = 128
EXAMPLES = 1024
SHAPE = (32, 32, 3)
MICROBATCHES = (8, 32)
NETWORKS = (
    "lenet_zhu",
    "convnet:16",
    "resnet18:16",
    "mobilenetv2:16",
    "resnet18:64",
    "mobilenetv2:32",
    "resnet20_gn:8",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME:WIDTH")
    parser.add_argument("--seconds", type=float, default=10, help="time per figure, about")
    parser.add_argument("--precision", choices=training.PRECISIONS, default="float32")
    arguments = parser.parse_args(argv)
    console = Console(width=120)
    console.print(f"jax {jax.__version__}, {runtime.hardware()}")
    names = ("images / s", "PyTorch", "x PyTorch", *(f"DP-SGD, {m} at once" for m in MICROBATCHES))
    out = Table("network", *names, "cost of DP-SGD")
    for network in arguments.networks:
        name, width = read_network(network)
        victim = untrained(name, classes=10, width=width, seed=0, image_shape=SHAPE)
        private = [
            jax_form(victim, arguments.precision, training.DpSgd(1.0, 1.0, BATCH, microbatch))
            for microbatch in MICROBATCHES
            if "batch_stats" not in victim.variables
        ]
        forms = [jax_form(victim, arguments.precision), *private, *pytorch_forms(name, width)]
        speeds = [BATCH / step for step in race(forms, arguments.seconds)]
        ours, *rest = speeds
        theirs = rest[len(private)] if len(rest) > len(private) else float("nan")
        best = max(rest[: len(private)], default=float("nan"))
        shown = [f"{speed:.0f}" for speed in rest[: len(private)]] or ["", ""]
        cost = f"{ours / best:.2f} x" if private else ""
        out.add_row(network, f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}", *shown, cost)
        console.print(f"{network}: {ours:.0f} images / s")
    console.print(out)


def jax_form(victim: Victim, precision: str, private: training.DpSgd | None = None) -> Form:
    """The compiled training loop."""
    recipe = training.Recipe(1_000_000, 0.1, "cosine", True, precision, private)
    # The state is donated to every step: each form needs parameters of its own.
    state = training.start(recipe, jax.tree.map(jnp.copy, victim.variables))
    data = training.Data(
        jax.random.bits(jax.random.key(0), (EXAMPLES, *SHAPE), jnp.uint8),
        jnp.arange(EXAMPLES, dtype=jnp.int32) % 10,
    )
    normalization = Normalization.of([0.5] * 3, [0.25] * 3)
    order = jnp.arange(10_000 * BATCH, dtype=jnp.int32).reshape(-1, BATCH) % EXAMPLES

    def run(steps):
        nonlocal state
        state, _ = training.run_steps(
            victim.module, recipe, state, data, normalization, order, jax.random.key(1), 0, steps
        )
        jax.block_until_ready(state)

    return Form("jaxinv", (1, BATCH), run)


def pytorch_forms(name: str, width: int | None) -> list[Form]:
    """The PyTorch reference; nothing where it is not installed."""
    try:
        from benchmarks.pytorch_reference import make_training
    except ImportError:
        return []
    try:
        return [Form("PyTorch", (1, BATCH), make_training(name, width, BATCH))]
    except KeyError:  # a network that the reference does not have
        return []


if __name__ == "__main__":
    main()
