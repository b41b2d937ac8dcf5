"""A server that fishes: in how many updates one image is alone, and what clients see of it."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from jaxinv import data, rng
from jaxinv.audit import games, measuring, server
from jaxinv.audit.intervals import clopper_pearson
from jaxinv.audit.study.scene import TEST_IMAGES, Options, Row, Scene, Table, load, with_interval
from jaxinv.errors import UserError
from jaxinv.networks.inspect import Classifier, classifier_features, replace
from jaxinv.types import PyTree, path_name

# Images by which the server knows how features are distributed: the network has not seen them, and
# they are no candidates. Of images that it was trained on features lie elsewhere.
KNOWN = range(TEST_IMAGES // 2, TEST_IMAGES)
ALONE = 100.0  # D-SNR, of all layers in front of the last, from which on an image is alone there

Layer = tuple[Array, Array]  # kernel [feature, class] and bias of the last dense layer


class Known(NamedTuple):
    """What the server knows of a class."""

    feature: int  # by which its images are told apart
    values: Float[np.ndarray, " image"]  # of that, of images that are not the client's


# What becomes of the last layer, for a class and a batch of so many images.
SERVERS: dict[str, Callable[[Layer, int, Known, int], Layer]] = {
    "honest": lambda layer, wanted, known, images: layer,
    "class": lambda layer, wanted, known, images: server.fish_class(*layer, wanted),
    "feature": lambda layer, wanted, known, images: server.fish_feature(
        *layer, wanted, known.feature, np.quantile(known.values, 1 - 1 / images)
    ),
}


def fishing(asked: Options) -> None:
    """Updates that give one image alone, and those in which a client sees that one dominates.

    Whoever fishes for a class gets batches of any images, and wants one of the first image's class;
    whoever fishes within a class gets batches of that class.
    """
    table = Table(asked, "fishing")
    if asked.candidates > KNOWN.start:
        raise UserError(f"--candidates {asked.candidates}: {KNOWN.start} at the most")
    for name in asked.victims:
        scene = load(name, asked.candidates)
        place = server.fished_layer(scene.network, scene.candidates.images.shape[1:])
        if place is None:
            raise UserError(f"--victims {name}: no dense layer with a bias makes its logits")
        most = int(np.bincount(scene.pool.labels).min())
        if max(asked.batches) > most:
            raise UserError(
                f"--batches {max(asked.batches)}: {most} candidates of a class; give more"
            )
        known, params = _known(scene, place), scene.network.params
        layer = place.matrix(params), place.vector(params)
        labels = scene.pool.labels
        for images, kind in itertools.product(asked.batches, SERVERS):
            key: Row = {"victim": name, "server": kind, "images": images, "games": asked.games}
            key |= {"candidates": asked.candidates}
            if not table.lacks(**key):
                continue
            seen = []
            for own in _batches(labels, images, asked.games, of_one_class=kind == "feature"):
                wanted = int(labels[own[0]])
                sent = _with(params, place, SERVERS[kind](layer, wanted, known[wanted], images))
                seen.append(_look(scene, place, sent, own))
            alone, dominated = (clopper_pearson(sum(x), len(x)) for x in zip(*seen))
            row = key | {"expected": _expected(labels, images, kind)}
            table.add(row | with_interval("alone", alone) | with_interval("dominated", dominated))
    table.show("victim", "server", "images", "games", "expected", "alone", "dominated")


def _known(scene: Scene, place: Classifier) -> dict[int, Known]:
    """What goes into the last layer for images that the server has, by class."""
    own = data.load("cifar10", split="test", ids=tuple(KNOWN))
    images = scene.network.normalize(games.Pool(own.images, own.labels)).images
    found = classifier_features(scene.network.module, scene.network.variables, images, place)
    classes = {int(c): np.asarray(found)[own.labels == c] for c in np.unique(own.labels)}
    features = {c: server.most_normal(x) for c, x in classes.items()}
    return {c: Known(features[c], x[:, features[c]]) for c, x in classes.items()}


def _batches(
    labels: Int[np.ndarray, " candidate"], images: int, count: int, of_one_class: bool
) -> Int[np.ndarray, "game image"]:
    """Draws the members of each update, none twice within one."""
    if not of_one_class:
        return games.draw(count, images, len(labels))
    random = np.random.default_rng([int(rng.Stream.DATA), 1, images])
    drawn = random.choice(np.unique(labels), count)
    classes = (np.flatnonzero(labels == c) for c in drawn)
    return np.stack([random.choice(c, images, replace=False) for c in classes])


def _with(params: PyTree, place: Classifier, layer: Layer) -> PyTree:
    """The parameters with another last layer."""
    params = replace(params, place.kernel, layer[0])
    return replace(params, place.bias, layer[1])


def _look(
    scene: Scene, place: Classifier, sent: PyTree, own: Int[np.ndarray, " image"]
) -> tuple[bool, bool]:
    """Whether one image is alone in front of the last layer, and whether one dominates a layer."""
    batch = measuring.Candidates(*(x[own] for x in scene.candidates))
    ratios = server.d_snrs(scene.network.loss, sent, *batch)
    last = {path_name(place.kernel), path_name(place.bias)}
    in_front = [ratio for name, ratio in ratios.items() if name not in last]
    there = [ratio for ratio in in_front if not np.isnan(ratio)]
    return bool(there) and min(there) > ALONE, max(there, default=0) > server.DOMINANT


def _expected(labels: Int[np.ndarray, " candidate"], images: int, kind: str) -> float:
    """The share of updates of which one image is alone: of its class, or above the threshold."""
    if kind == "honest":
        return float(images == 1)
    if kind == "feature":
        return (1 - 1 / images) ** (images - 1)
    # No other of the batch is of the class: drawn from the rest without replacement.
    count, of_class = len(labels), np.bincount(labels)
    left = count - 1 - np.arange(images - 1)
    none = [np.prod(np.maximum(left - (n - 1), 0) / left) for n in of_class]
    return float(np.average(none, weights=of_class))
