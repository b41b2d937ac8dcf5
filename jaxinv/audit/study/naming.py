"""Images named: by network, batch, noise, defense and method."""

import time
from collections.abc import Callable, Sequence

import optax

from jaxinv.audit import games
from jaxinv.audit import identification as ident
from jaxinv.audit.study.scene import Options, Row, Scene, Table, load, with_interval

CLASSES = 10  # of CIFAR-10


def identification(asked: Options) -> None:
    """Recall by network, batch and defense, as the client sends it."""
    table = _table(asked, "identification", lambda rules: [rules])
    table.show_by_images("victim", "defense", "method", "candidates", "games")


def noise(asked: Options) -> None:
    """Recall against the variance of noise."""
    table = Table(asked, "noise")
    for name in asked.victims:
        scene = load(name, asked.candidates)
        for images in asked.batches:
            rules = scene.rules(asked, images, "none", asked.method)
            _play(table, asked, scene, rules, scene.play_exactly)
        for variance in asked.noises:
            for images in asked.batches:
                rules = scene.rules(asked, images, f"noise:{variance:g}", asked.method)

                def play(members, rules, scene=scene, variance=variance):
                    entries = optax.tree.size(scene.network.params)
                    known = scene.gram, scene.root, entries
                    return games.simulate(*known, members, rules.method, variance)

                _play(table, asked, scene, rules, play)
    table.show_by_images("victim", "defense", "method", "games")


def methods(asked: Options) -> None:
    """Every method on the same games."""
    table = _table(
        asked, "methods", lambda rules: [rules._replace(method=name) for name in ident.METHODS]
    )
    table.show("victim", "defense", "images", "method", "games", "chance", "recall")


def labels(asked: Options) -> None:
    """Recall where the labels of the candidates are not known, and where they are."""
    table = _table(asked, "labels", lambda rules: [rules, rules._replace(classes=CLASSES)])
    table.show("victim", "defense", "images", "labels", "games", "chance", "recall")


def _table(
    asked: Options, name: str, variants: Callable[[games.Rules], Sequence[games.Rules]]
) -> Table:
    """Plays every victim, defense and batch by each variant of the rules."""
    table = Table(asked, name)
    for victim in asked.victims:
        scene = load(victim, asked.candidates)
        for images in asked.batches:
            for defense in asked.defenses:
                for rules in variants(scene.rules(asked, images, defense, asked.method)):
                    _play(table, asked, scene, rules, scene.play)
    return table


def _play(table: Table, asked: Options, scene: Scene, rules: games.Rules, play: Callable) -> None:
    """Plays the games of one row, unless it is there."""
    key: Row = {
        "victim": scene.name,
        "images": rules.images,
        "defense": rules.defense,
        "method": rules.method,
        "candidates": asked.candidates,
        "shortlist": min(asked.shortlist, asked.candidates),
        "games": asked.games,
        "labels": "known" if rules.classes is None else "unknown",
    }
    if not table.lacks(**key):
        return
    members = games.draw(asked.games, rules.images, asked.candidates)
    start = time.perf_counter()
    outcome = games.count(play(members, rules))
    row = key | {"chance": outcome.chance, "seconds": time.perf_counter() - start}
    row |= with_interval("recall", outcome.recall) | with_interval("whole", outcome.whole)
    for rate, share in outcome.true_positives.items():
        row |= with_interval(f"tpr_at_{rate:g}", share)
    table.add(row)
