"""The share of what the hardware can do: the rate of float32 matrix products, measured."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.race import Form, race
from jaxinv.machine import runtime


def matmul_peak(seconds: float) -> float:
    """Measures the best rate of large products, one on every device at once: FLOP/s of them all.

    Args:
      seconds: time per size of the matrices, about.
    """
    sizes = (512, 1024) if jax.default_backend() == "cpu" else (1024, 2048, 4096)
    times = race([product_form(size) for size in sizes], seconds)
    each = max(2 * size**3 / step for size, step in zip(sizes, times))
    return each * jax.local_device_count()


@runtime.arithmetic("float32")  # as an attack is computed by default
def product_form(size: int) -> Form:
    """Compiles a product of two random square matrices on each device."""
    devices = np.array(jax.local_devices())
    rows = PartitionSpec("device")
    mesh = Mesh(devices, ("device",))
    multiply = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=rows, out_specs=rows)
    shape = (devices.size * size, size)  # the devices' matrices below each other

    def draw(seed):
        return jax.random.normal(jax.random.key(seed), shape)

    left, right = jax.device_put((draw(0), draw(1)), NamedSharding(mesh, rows))
    program = jax.jit(multiply).lower(left, right).compile()

    def run(steps):
        for _ in range(steps):
            jax.block_until_ready(program(left, right))

    return Form(f"product of {size} x {size}", (1, 1), run)
