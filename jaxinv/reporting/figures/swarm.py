"""Dots beside each other at their heights, so that none hides another."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def swarms(
    groups: Sequence[Float[np.ndarray, " point"]], room: float, diameter: float = 0.075
) -> tuple[float, list[Float[np.ndarray, " point"]]]:
    """Sets each group's dots beside each other so that none overlap, nearest the middle first.

    Heights, `room` and `diameter` are in one unit. All dots shrink, as their size says nothing,
    until every group fits the room, down to a quarter; beyond that the outermost are set back to
    the edge and may overlap.

    Args:
      groups: heights of the dots.
      room: width that a group may take.
      diameter: of the dots, at most.

    Returns: the diameter used, and each dot's offset from its group's middle. Deterministic.
    """
    smallest = diameter / 4
    while True:
        packed = [_pack(np.asarray(heights, float), diameter) for heights in groups]
        widest = max(np.abs(offsets).max(initial=0) for offsets in packed)
        if widest + diameter / 2 <= room / 2:
            return diameter, packed
        if diameter <= smallest:
            edge = max(0.0, (room - diameter) / 2)
            return diameter, [np.clip(offsets, -edge, edge) for offsets in packed]
        diameter *= 0.85


def _pack(heights: np.ndarray, diameter: float) -> np.ndarray:
    """Places dots by rising height, each at the free offset nearest the middle."""
    offsets = np.zeros(len(heights))
    placed: list[int] = []
    for point in np.argsort(heights, kind="stable"):
        near = [p for p in placed if heights[point] - heights[p] < diameter]
        reach = np.sqrt(
            np.maximum(0, diameter**2 - np.array([heights[point] - heights[p] for p in near]) ** 2)
        )
        centers = offsets[near]
        options = np.concatenate([[0.0], centers + reach, centers - reach])
        gaps = np.abs(options[:, None] - centers[None, :]) - reach[None, :]
        free = options[(gaps > -1e-9).all(axis=1)]
        offsets[point] = free[np.lexsort((free, np.abs(free).round(9)))[0]]
        placed.append(point)
    return offsets
