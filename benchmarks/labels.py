"""How many labels each rule reads off an update right, by network and training state.

    python -m benchmarks.labels [--networks lenet_zhu ...] [--victims NAME ...] [--data-dir DIR]

Batches of CIFAR-10 test images, drawn with replacement so that labels repeat: the share of labels
that each rule counts right, with its 95% interval over batches.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.race import read_network
from jaxinv import checkpoints, client, data, labels, metrics, victims
from jaxinv.statistics import mean_interval
from jaxinv.types import Normalization

SHAPE = (32, 32, 3)
NETWORKS = ("lenet_zhu", "convnet:8", "resnet18:8")
VICTIMS = ("lenet_zhu-cifar10", "convnet-w16-cifar10", "resnet18-w16-cifar10")
RULES = tuple(name for name in labels.LABELS if name != "known")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=NETWORKS, metavar="NAME:WIDTH")
    parser.add_argument("--victims", nargs="*", default=VICTIMS)
    parser.add_argument("--images", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--data-dir")
    arguments = parser.parse_args()
    dataset = data.load("cifar10", split="test", data_dir=arguments.data_dir)
    table = Table("network", "images", *RULES, title=f"{arguments.batches} batches")
    for text in arguments.networks:
        name, width = read_network(text)
        victim = victims.untrained(name, classes=10, width=width, seed=0, image_shape=SHAPE)
        add_rows(table, f"{text}, untrained", victim, dataset, arguments)
    for name in arguments.victims:
        add_rows(table, name, checkpoints.load_victim(name), dataset, arguments)
    Console(width=120).print(table)


def add_rows(table: Table, name: str, victim, dataset: data.Dataset, arguments) -> None:
    """Measures every rule on one network."""
    for images in arguments.images:
        shares = measure(victim, dataset, images, arguments.batches)
        cells = []
        for rule, values in zip(RULES, shares.T):
            interval = mean_interval(values[:, None])
            text = f"{interval.mean:.1%} [{interval.low:.1%}, {interval.high:.1%}]"
            cells.append("" if rule == "idlg" and images > 1 else text)
        table.add_row(name, str(images), *cells)


def measure(victim, dataset: data.Dataset, images: int, batches: int) -> np.ndarray:
    """The share of labels recovered, [batch, rule]."""
    normalization = Normalization.of(dataset.mean, dataset.std)
    loss = client.loss_fn(victim.module, victim.variables)
    chosen = np.random.default_rng(images).integers(0, len(dataset.labels), (batches, images))

    def one(arguments):
        pixels, truth = arguments
        params = victim.variables["params"]
        update, _ = client.gradient(loss, params, normalization.normalize(pixels / 255), truth)
        found = [
            labels.infer(rule, victim.module, victim.variables, update, SHAPE, images)
            for rule in RULES
        ]
        return jnp.stack([metrics.label_accuracy(truth, guess, 10) for guess in found])

    batch = (jnp.asarray(dataset.images[chosen], jnp.float32), jnp.asarray(dataset.labels[chosen]))
    return np.asarray(jax.jit(lambda b: jax.lax.map(one, b))(batch))


if __name__ == "__main__":
    main()
