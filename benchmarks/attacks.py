"""What a trial-iteration of each attack costs, under vmap over targets and seeds.

    python -m benchmarks.attacks [--seconds 5]

The attacks that iterate on LeNetZhu, those on the running statistics on ResNet20 (16); FedAvg by
its local steps; the closed forms per image on networks of dense layers.
"""

import argparse
import time

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.attack import SHAPE, jax_form, normalization, victim_of
from benchmarks.race import race
from jaxinv import config, runtime, trials
from jaxinv.attacks import ATTACKS, CLOSED_FORM
from jaxinv.types import Truth

SIZE = (4, 8)  # targets, seeds
LENET, RESNET = ("lenet_zhu", None), ("resnet20", 16)
# What is timed: network, images, settings beside those of the attack.
CASES = {
    "geiping": (LENET, 1, {}),
    "geiping, told of pruning": (LENET, 1, {"defense": "prune:0.9", "told": True}),
    "dlg": (LENET, 1, {}),
    "euclidean": (LENET, 1, {}),
    "modern": (LENET, 1, {}),
    "geiping, 8 images": (LENET, 8, {"images": 8}),
    "geiping, 8 images in 4 local steps": (LENET, 8, {"images": 8, "client_batch": 2}),
    "geiping, 5 local epochs": (LENET, 1, {"client_epochs": 5}),
    "geiping on ResNet20": (RESNET, 1, {}),
    "gradinversion on ResNet20": (RESNET, 1, {}),
}
DENSE = {"analytic": 1, "spear": 4}  # images


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5, help="time per figure, about")
    arguments = parser.parse_args()
    runtime.use_all_cores()
    console = Console(width=120)
    console.print(
        f"jax {jax.__version__}, {runtime.hardware()}, {SIZE[0]} targets x {SIZE[1]} seeds"
    )
    forms = []
    for name, (network, images, settings) in CASES.items():
        known = ATTACKS[name.split()[0].rstrip(",")]
        cell = config.Cell(model=network[0], width=network[1], **{**known, **settings})
        forms.append(jax_form(name, network, SIZE, images, cell=cell))
    out = Table("attack", "ms / trial-iteration", "temp MiB / trial", "compile s")
    for form, once in zip(forms, race(forms, arguments.seconds)):
        out.add_row(
            form.name, f"{1e3 * once / form.trials:.3g}", f"{form.memory / form.trials:.3g}",
            f"{form.compile_seconds:.1f}",
        )  # fmt: skip
    for name, images in DENSE.items():
        out.add_row(f"{name}, {images} images, whole", f"{closed_form(name, images):.3g}", "", "")
    console.print(out)


@runtime.arithmetic("float64")
def closed_form(name: str, images: int) -> float:
    """Times a closed form on an MLP of width 256: ms a trial, the best of five."""
    victim = victim_of(("mlp", 256))
    pixels = jax.random.uniform(jax.random.key(1), (SIZE[0], images, *SHAPE), jnp.float64)
    truths = Truth(pixels, jnp.tile(jnp.arange(images), (SIZE[0], 1)))
    variables = jax.tree.map(lambda x: x.astype(jnp.float64), victim.variables)
    scale = jax.tree.map(lambda x: x.astype(jnp.float64), normalization())
    shared = trials.make_targets(victim.module, variables, truths, scale).targets
    keys = trials.start_keys(range(SIZE[0]), range(SIZE[1]))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        trials.recover(
            CLOSED_FORM[name], victim.module, variables, shared, truths, scale, "cosine", keys
        )
        best = min(best, time.perf_counter() - started)
    return 1e3 * best / (SIZE[0] * SIZE[1])


if __name__ == "__main__":
    main()
