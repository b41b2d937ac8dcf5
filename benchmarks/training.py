"""Training images per second, beside PyTorch on the same batch, in one run.

    python -m benchmarks.training [--networks resnet18:16 mobilenetv2:32 ...] [--seconds 10]

One step is what `jaxinv.train` does with a batch of 128: gather, crop and flip, forward, backward,
SGD with Nesterov momentum. PyTorch (`pip install torch`) gets its batch ready-made.
"""

import argparse

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.race import Form, race, read_network
from jaxinv import runtime, training, victims
from jaxinv.types import Normalization

BATCH = 128
EXAMPLES = 1024
SHAPE = (32, 32, 3)
NETWORKS = ("lenet_zhu", "convnet:16", "resnet18:16", "mobilenetv2:16", "resnet18:64",
            "mobilenetv2:32")  # fmt: skip


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME:WIDTH")
    parser.add_argument("--seconds", type=float, default=10, help="time per figure, about")
    parser.add_argument("--precision", choices=training.PRECISIONS, default="float32")
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(f"jax {jax.__version__}, {runtime.hardware()}")
    out = Table("network", "images / s", "PyTorch images / s", "x PyTorch")
    for network in arguments.networks:
        name, width = read_network(network)
        forms = [jax_form(name, width, arguments.precision), *pytorch_forms(name, width)]
        speeds = [BATCH / step for step in race(forms, arguments.seconds)]
        ours, theirs = speeds if len(speeds) > 1 else (*speeds, float("nan"))
        out.add_row(network, f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}")
        console.print(f"{network}: {ours:.0f} images / s")
    console.print(out)


def jax_form(name: str, width: int | None, precision: str) -> Form:
    """The compiled training loop."""
    victim = victims.untrained(name, classes=10, width=width, seed=0, image_shape=SHAPE)
    recipe = training.Recipe(1_000_000, 0.1, "cosine", True, precision)
    state = training.start(recipe, victim.variables)
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
    return [Form("PyTorch", (1, BATCH), make_training(name, width, BATCH))]


if __name__ == "__main__":
    main()
