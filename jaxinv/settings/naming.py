"""A cell's name: the settings in which it differs from the others."""

import math
import re
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
    ("adaptive", False): "blind",
    ("adaptive", True): "adaptive",
    ("representation", "coarse_to_fine"): "low frequencies first",
    **{("model", name): network.title for name, network in NETWORKS.items()},
}
RECIPES = {"trained": "trained", "no-augment": "trained without augmentation"}
ALWAYS = ("attack", "defense")  # said of every cell, where some differ in them
# Settings whose values say what they are.
CLEAR = ("attack", "dataset", "defense", "model", "representation", "victim")
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
        if (name, value) in SPOKEN or (name in CLEAR and isinstance(value, str | None))
        else label_text({name: value})
        for name, value in order
    )


def spoken(name: str, value: Any) -> str:
    """Says a setting's value in words, where it has some."""
    if name == "victim" and value is not None:
        return victim_text(str(value))
    return SPOKEN.get((name, value), _said(name, value))


def network_text(model: str, width: int | str | None) -> str:
    """Names a network and its width: "ResNet18 (64)"."""
    return spoken("model", model) + ("" if width is None else f" ({width})")


def victim_text(victim: str) -> str:
    """Names a checkpoint as `jaxinv.train` does, in words: `resnet18-w32-cifar10-epoch1` is
    "ResNet18 (32) after 1 epoch". One that is called otherwise keeps its name, without folders.
    """
    own = victim.rstrip("/").rpartition("/")[2]
    parts = re.fullmatch(r"(?P<model>\w+)(-w(?P<width>\d+))?-[^-]+(-(?P<recipe>.+))?", own)
    if parts is None or parts["model"] not in NETWORKS:
        return own
    recipe = parts["recipe"] or "trained"
    if epochs := re.fullmatch(r"epoch(\d+)", recipe):
        count = int(epochs[1])
        state = f"after {count} epoch{'s' * (count > 1)}" if count else "before training"
    else:
        state = RECIPES.get(recipe, f"trained, {recipe}")
    return f"{network_text(parts['model'], parts['width'])} {state}"


def _said(name: str, value: Any) -> str:
    """Prints a setting's value, or what it means that it is not given."""
    return UNSET.get(name, "None") if value is None else setting_text(value)


def setting_text(value: Any) -> str:
    """Prints a setting's value briefly."""
    if isinstance(value, float | np.floating):
        return f"{value:g}"
    return str(value)
