"""The process a command runs in: its cores, its compilation cache, and what it says of itself."""

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


def use_all_cores() -> None:
    """Makes every CPU core a JAX device, so that trials share the cores as they share GPUs."""
    if jax.config.jax_num_cpu_devices == -1:
        # Raises where a program that embeds the command has started JAX: its devices hold.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", _cores())


def _cores() -> int:
    """Cores this process may run on, where the system tells (Linux); else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told where to."""
    if jax.config.jax_compilation_cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "jaxinv"))


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Python's version and those of installed packages."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }


def hardware() -> str:
    """The devices in words."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} CPU cores"


def progress_bar(console: Console) -> Progress:
    """A bar over all steps, with the time left and what its task says of itself."""
    return Progress(
        BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn(),
        TextColumn("{task.description}"), console=console,
        refresh_per_second=2,  # each drawing takes time from the work
    )  # fmt: skip
