"""A cell's name: the settings in which it differs from the others."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxinv.networks import NETWORKS

# What is said of a value over a picture.
SPOKEN = {
    ("attack", "geiping"): "cosine + TV",
    ("attack", "bayes"): "Gauss-Newton",
    ("attack", "smoothed_bayes"): "smoothed Gauss-Newton",
    ("defense", "none"): "no defense",
    ("representation", "coarse_to_fine"): "low frequencies first",
    **{("model", name): network.title for name, network in NETWORKS.items()},
}
ALWAYS = ("attack", "defense")  # said of every cell, where some differ in them
UNSET = {"victim": "untrained", "width": "published", "client_batch": "whole batch"}  # not given


def naming_settings(
    axes: Mapping[str, Sequence], cells: Sequence[Mapping[str, Any]], number: int
) -> dict[str, Any]:
    """The settings that name a cell: those that vary.

    In a study that varies one thing after another around its first cell, only what differs from
    that cell, but attack and defense always; and of the first itself, all that is set.

    Args:
      axes: the settings that vary, with their values.
      cells: every cell's settings.
      number: of the cell.
    """
    mine = cells[number]
    if len(cells) == math.prod(map(len, axes.values())):
        return {name: mine[name] for name in axes}
    usual = cells[0] if number else dict.fromkeys(axes)
    return {name: mine[name] for name in axes if name in ALWAYS or mine[name] != usual[name]}


def label_text(settings: Mapping[str, Any]) -> str:
    """Names a cell by its naming settings, "tv = 0.01, lr = 0.1"."""
    return ", ".join(f"{name} = {_said(name, value)}" for name, value in settings.items())


def heading_text(settings: Mapping[str, Any]) -> str:
    """The same over a picture, "cosine + TV, generator, tv = 0.01": the attack comes first, and
    words that name nothing else stand alone.
    """
    order = sorted(settings.items(), key=lambda item: item[0] != "attack")
    return ", ".join(
        spoken(name, value)
        if isinstance(value, str) or (name == "victim" and value is None)
        else label_text({name: value})
        for name, value in order
    )


def spoken(name: str, value: Any) -> str:
    """Says a setting's value in words, where it has some."""
    return SPOKEN.get((name, value), _said(name, value))


def network_text(settings: Mapping[str, Any]) -> str:
    """A network and its width: "ResNet18 (64)"."""
    width = "" if settings["width"] is None else f" ({settings['width']})"
    return spoken("model", settings["model"]) + width


def _said(name: str, value: Any) -> str:
    """Prints a setting's value, or what it means that it is not given."""
    return UNSET.get(name, "None") if value is None else setting_text(value)


def setting_text(value: Any) -> str:
    """Prints a setting's value briefly."""
    if isinstance(value, float | np.floating):
        return f"{value:g}"
    return str(value)
