"""What rounding does to the image gradient, whose signs the attack follows.

    python -m benchmarks.precision [--networks lenet_zhu resnet18:16 ...] [--victims NAME ...]

The gradient of the cosine objective with respect to the image, against float64: the relative error
and the share of pixels whose sign is another. In float32; and in float32 with the factors of every
product, convolutions of all orders and dense layers, rounded as TensorFloat-32 (10 bits) and
bfloat16 (7 bits) hardware does, sums in float32. At three candidates: a random initial image, the
truth under noise of standard deviation 0.3, and of 0.05 (normalized). The truth is the first tile.
"""

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from benchmarks.race import read_network
from jaxinv import client, data
from jaxinv.attacks.objectives import compare, cosine
from jaxinv.machine import runtime
from jaxinv.networks.convolution import conv_p, dgrad_p, wgrad_p
from jaxinv.types import Normalization
from jaxinv.victim import checkpoints
from jaxinv.victim.untrained import Victim, untrained

NETWORKS = ("lenet_zhu", "convnet:16", "resnet18:16", "mobilenetv2:8")
ROUNDINGS = {"float32": None, "TensorFloat-32": 10, "bfloat16": 7}  # bits of a factor's mantissa
NOISES = {"initial": None, "truth + 0.3": 0.3, "truth + 0.05": 0.05}
PRODUCTS = {p.name for p in (conv_p, dgrad_p, wgrad_p)} | {"dot_general"}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=NETWORKS, metavar="NAME:WIDTH")
    parser.add_argument("--victims", nargs="*", default=(), help="trained networks beside them")
    arguments = parser.parse_args(argv)
    console = Console(width=120)
    console.print(f"jax {jax.__version__}, {runtime.hardware()}")
    table = Table("network", "candidate", *ROUNDINGS)
    for text in arguments.networks:
        name, width = read_network(text)
        victim = untrained(name, classes=10, width=width, seed=1, image_shape=(32, 32, 3))
        add_rows(table, text, victim)
    for name in arguments.victims:
        add_rows(table, name, checkpoints.load_victim(name))
    console.print(table)


def add_rows(table: Table, name: str, victim: Victim) -> None:
    """Studies one network: a row for each candidate."""
    tile = data.load("tiles", ids=1)
    normalization = Normalization.of(tile.mean, tile.std)
    truth = np.asarray(normalization.normalize(tile.images / np.float32(255)), np.float64)
    noise = np.random.default_rng(1).normal(size=truth.shape)
    candidates = [noise if size is None else truth + size * noise for size in NOISES.values()]
    with jax.enable_x64(True):
        exact = image_gradients(victim, truth, candidates, np.float64, None)
    rounded = [
        image_gradients(victim, truth, candidates, np.float32, bits) for bits in ROUNDINGS.values()
    ]
    for index, candidate in enumerate(NOISES):
        cells = [compare_gradients(found[index], exact[index]) for found in rounded]
        table.add_row(name, candidate, *cells)


def compare_gradients(found: np.ndarray, exact: np.ndarray) -> str:
    """The relative error, and the share of signs that differ."""
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    return f"{error:.1e}, {np.mean(np.sign(found) != np.sign(exact)):.2%}"


def image_gradients(
    victim: Victim,
    truth: np.ndarray,
    candidates: Sequence[np.ndarray],
    dtype: type,
    bits: int | None,
) -> list[np.ndarray]:
    """The objective's gradient at each candidate, with the factors of all products rounded."""

    def cast(tree):
        return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, dtype)), tree)

    variables, labels = cast(victim.variables), jnp.array([3])
    loss = client.loss_fn(victim.module, variables)

    def update(images):
        return client.gradient(loss, variables["params"], images, labels)[0]

    def image_gradient(images, shared):
        return jax.grad(lambda x: cosine(compare(update(x), shared)))(images)

    truth = cast(truth)
    shared = jax.jit(update)(truth)
    program = jax.make_jaxpr(image_gradient)(truth, shared)
    run = jax.jit(lambda *leaves: evaluate(program, leaves, bits)[0])
    return [np.asarray(run(cast(x), *jax.tree.leaves(shared))) for x in candidates]


def evaluate(program: ClosedJaxpr, arguments: Sequence[Array], bits: int | None) -> list[Array]:
    """Runs a jaxpr with the factors of its products rounded to so many bits of mantissa."""
    jaxpr = program.jaxpr
    values = dict(zip(jaxpr.constvars, program.consts)) | dict(zip(jaxpr.invars, arguments))

    def read(v):
        return v.val if isinstance(v, Literal) else values[v]

    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if isinstance(inner, ClosedJaxpr):
            outputs = evaluate(inner, operands, bits)
        else:
            if bits and eqn.primitive.name in PRODUCTS:
                operands = [jax.lax.reduce_precision(x, 8, bits) for x in operands]
            out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
            outputs = out if eqn.primitive.multiple_results else [out]
        values |= dict(zip(eqn.outvars, outputs))
    return [read(v) for v in jaxpr.outvars]


if __name__ == "__main__":
    main()
