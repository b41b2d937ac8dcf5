"""Kinks: every place where a network's derivative jumps, seen and rounded off from outside.

A ReLU is one, a ReLU6 two, the larger of two numbers, max(a, b) = b + relu(a - b), one more. The
networks here call the functions below for all of them. These do nothing but compute, unless within

* `recording`, which also collects the input of every kink, relu(d): the d, in the order of calls;
* `smoothing`, in which every kink is its mean under Gaussian noise of its input,

      E relu(d + s n) = d Phi(d / s) + s phi(d / s),     n standard normal,

  with a spread s of each entry. Its slope is Phi(d / s), the share of the noise that opens it.

Outside both, and while recording, values and derivatives are those of the plain functions, bit for
bit. Both act on what is traced within them, and on nothing that was compiled before.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextvars import ContextVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# What becomes of the kinks: a list that collects their inputs, an iterator of their spreads, or
# nothing.
_mode: ContextVar[list | Iterator | None] = ContextVar("kinks", default=None)


@contextlib.contextmanager
def recording() -> Generator[list[Array]]:
    """Collects the inputs of the kinks in the list that it gives."""
    inputs: list[Array] = []
    token = _mode.set(inputs)
    try:
        yield inputs
    finally:
        _mode.reset(token)


@contextlib.contextmanager
def smoothing(spreads: Iterable[Array]) -> Generator[None]:
    """Rounds the kinks off.

    Args:
      spreads: standard deviation of each kink's input, above 0, in the order of `recording` and
        shaped like what that has collected.
    """
    token = _mode.set(iter(spreads))
    try:
        yield
    finally:
        _mode.reset(token)


@jax.custom_jvp
def smooth_relu(x: Float[Array, "..."], spread: Float[Array, "..."]) -> Float[Array, "..."]:
    """E relu(x + spread n): its derivative is written out, where autodiff finds three terms."""
    ratio = x / spread
    return x * _share_open(ratio) + spread * _density(ratio)


@smooth_relu.defjvp
def _smooth_relu_jvp(primals, tangents):
    # The spread is a constant: whoever measured it does not follow it.
    x, spread = primals
    return smooth_relu(x, spread), _smooth_step(x, spread) * tangents[0]


@jax.custom_jvp
def _smooth_step(x, spread):
    return _share_open(x / spread)


@_smooth_step.defjvp
def _smooth_step_jvp(primals, tangents):
    x, spread = primals
    return _smooth_step(x, spread), _density(x / spread) / spread * tangents[0]


def _share_open(ratio):
    """Phi, the distribution function of the standard normal."""
    return (1 + lax.erf(ratio * 0.5**0.5)) / 2


def _density(ratio):
    """phi, its density."""
    return jnp.exp(-ratio * ratio / 2) * (0.5 / jnp.pi) ** 0.5


def relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """ReLU; one kink."""
    spreads = _note(lambda: (x,))
    return nn.relu(x) if spreads is None else smooth_relu(x, next(spreads))


def relu6(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """ReLU6, relu(x) - relu(x - 6); two kinks."""
    spreads = _note(lambda: (x, x - 6))
    if spreads is None:
        return nn.relu6(x)
    return smooth_relu(x, next(spreads)) - smooth_relu(x - 6, next(spreads))


def larger(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """The larger of each two numbers, the first of equal ones; one kink."""
    spreads = _note(lambda: (a - b,))
    return jnp.where(a >= b, a, b) if spreads is None else b + smooth_relu(a - b, next(spreads))


def _note(inputs: Callable[[], tuple[Array, ...]]) -> Iterator | None:
    """Collects inputs where they are recorded; gives the spreads where kinks are smoothed."""
    mode = _mode.get()
    if isinstance(mode, list):
        mode.extend(inputs())
        return None
    return mode
