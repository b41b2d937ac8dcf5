"""The process a command runs in: cores, precision, compilation cache, what it says of itself."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from jaxinv.errors import UserError
from jaxinv.types import PyTree

NO_TRITON = "--xla_gpu_enable_triton_gemm=false"
SECONDS_A_LINE = 60  # of a log file
SECONDS_ESTIMATED = 600  # of the past, from which the time left is told


def use_all_cores() -> None:
    """Makes every CPU core a JAX device, so that trials share the cores as they share GPUs.

    Before anything else of JAX: the first key or array fixes the devices.
    """
    if jax.config.jax_num_cpu_devices == -1:
        # Raises where a program that embeds the command has started JAX: its devices hold.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", _cores())


def _cores() -> int:
    """Cores this process may use: OMP_NUM_THREADS where set (Ray and many a cluster do), or all."""
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Of an attack's arithmetic: JAX's name for the precision of products on an accelerator. Left to
# itself, XLA rounds their inputs to 10 bits there; the attack follows signs of second derivatives.
PRECISIONS = {"float32": "highest", "tensorfloat32": "tensorfloat32", "float64": "highest"}


def check_precision(precision: str) -> None:
    """Refuses a precision that this machine does not have.

    Raises:
      UserError: of GPUs, and there is none.
    """
    if precision == "tensorfloat32" and jax.default_backend() == "cpu":
        raise UserError("--precision tensorfloat32: of GPUs, and there is none here; use float32")


@contextlib.contextmanager
def arithmetic(precision: str) -> Generator[Callable[[PyTree], PyTree]]:
    """A context in which products have a precision; gives what casts a tree's floats to it."""
    double = precision == "float64"

    def cast(tree: PyTree) -> PyTree:
        dtype = jnp.float64 if double else jnp.float32

        def one(x):
            return jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)

        return jax.tree.map(one, tree)

    # A CPU's float32 is float32.
    named = None if jax.default_backend() == "cpu" else PRECISIONS[precision]
    with jax.default_matmul_precision(named), jax.enable_x64(double):
        yield cast


def set_up_compiler() -> None:
    """Leaves products on NVIDIA GPUs to cuBLAS, and keeps compiled programs in the user's cache.

    Of each product of a step XLA would else compile and time dozens of Triton kernels, on all cores
    and for minutes (docs/performance.md). It reads the flag before it compiles its first program;
    on other devices the flag means nothing. What XLA_FLAGS says itself stands, and so does a cache
    that JAX was told of. Where no cache can be written, every process compiles its programs anew;
    JAX would warn of each.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if NO_TRITON.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {NO_TRITON}".strip()
    if jax.config.jax_compilation_cache_dir is None:
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
            base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            folder = Path(base) / "jaxinv"
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                jax.config.update("jax_compilation_cache_dir", str(folder))


@contextlib.contextmanager
def held_interrupts(held: bool = True) -> Generator[list[int]]:
    """A context in which the first Ctrl-C is only noted, so that what is computed can be kept.

    The second one ends the work at once.

    Args:
      held: whether it is to; a signal reaches the main thread alone.
    """
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)
        print("keeping what is computed; again to stop at once", file=sys.stderr)

    if not held or threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Python's version and those of installed packages."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }


def hardware() -> str:
    """The devices in words."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} CPU cores"


class _Bar(Progress):
    """A progress bar, and where there is none to see, in a log file, a line every minute."""

    _said = 0.0  # when the last line was printed: set by the first update

    def update(self, task_id: TaskID, *args: Any, **fields: Any) -> None:
        """Moves the bar, as `Progress.update`."""
        super().update(task_id, *args, **fields)
        now = self.get_time()
        self._said = self._said or now
        if self.console.is_terminal or now < self._said + SECONDS_A_LINE:
            return
        self._said = now
        task = self.tasks[task_id]
        words = [f"{task.percentage:.0f}%", task.description]
        if task.time_remaining is not None:
            words.insert(1, f"{datetime.timedelta(seconds=task.time_remaining)} left")
        self.console.print(", ".join(words), soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    """A bar over all steps, with the time left and what its task says; in a log file, lines."""
    return _Bar(
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        # Each drawing takes time from the work, even where it is thrown away.
        refresh_per_second=2,
        speed_estimate_period=SECONDS_ESTIMATED,
        disable=not console.is_terminal,
    )
