"""Timing several forms of one computation against each other."""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

ROUND = 0.03  # seconds of a fast form
# Of a slow one as many steps as fit: a call's own cost, fresh memory for the most part, is spread
# over some 50 in a sweep.
STEPS, LONG_ROUND = 8, 3.0


class Form(NamedTuple):
    """One way to compute, compiled."""

    name: str
    size: tuple[int, int]  # targets, seeds; or 1, images in a batch
    run: Callable[[int], None]  # takes that many steps
    compile_seconds: float = float("nan")
    memory: float = float("nan")  # temporary, of all devices, MiB

    @property
    def trials(self) -> int:
        """Of each step."""
        return self.size[0] * self.size[1]


def read_network(text: str) -> tuple[str, int | None]:
    """Reads NAME:WIDTH, or NAME for the published width."""
    name, _, width = text.partition(":")
    return name, int(width) if width else None


def race(forms: Sequence[Form], seconds: float) -> list[float]:
    """Times the forms in turn, in many short rounds: the best seconds per step of each.

    What a busy machine steals is left out that way, and it steals from all of them. A form that
    has had its `seconds` sits the later rounds out.
    """

    def time_steps(form, count):
        started = time.perf_counter()
        form.run(count)
        return time.perf_counter() - started

    best = [min(time_steps(form, 1) for _ in range(2)) for form in forms]  # the first warms up
    steps = [max(1, round(ROUND / once), min(STEPS, round(LONG_ROUND / once))) for once in best]
    best, used = [math.inf] * len(forms), [0.0] * len(forms)
    while min(used) < seconds:
        for index, form in enumerate(forms):
            if used[index] < seconds:
                elapsed = time_steps(form, steps[index])
                used[index] += elapsed
                best[index] = min(best[index], elapsed / steps[index])
    return best
