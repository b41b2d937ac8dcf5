"""Harder games: candidates that are nearly the image, and updates that hold none of them."""

import jax
import numpy as np

from jaxinv import data
from jaxinv.audit import games
from jaxinv.audit.intervals import clopper_pearson
from jaxinv.audit.study.scene import Options, Row, Table, load, split_of, with_interval

NEAR = 8  # candidates of a harder game


def harder(asked: Options) -> None:
    """One image of an update, among its augmentations and its nearest neighbors of its class."""
    table = Table(asked, "harder")
    whole = data.load("cifar10", split=split_of(asked.candidates))
    for name in asked.victims:
        scene = load(name, asked.candidates)
        targets = games.draw(asked.games, 1, asked.candidates)
        for defense in asked.defenses:
            key: Row = {"victim": name, "defense": defense, "games": asked.games}
            key |= {"pool": asked.candidates}  # of which the images of the games are drawn
            if not table.lacks(**key):
                continue
            rules = games.Rules(1, "slab", defense)
            shared = games.share(scene.network, scene.pool, targets, rules)
            wins: dict[str, list[bool]] = {"augmentations": [], "nearest of its class": []}
            for game, (target,) in enumerate(targets):
                one = scene.pool.images[target][None]
                own = np.concatenate([one, *games.variants(one).values()])
                near = games.nearest(whole.images, whole.labels, int(target), NEAR)
                pools = {
                    "augmentations": (own, np.full(len(own), scene.pool.labels[target])),
                    "nearest of its class": (whole.images[near], whole.labels[near]),
                }
                update, knowledge = jax.tree.map(
                    lambda x: x[game : game + 1],  # noqa: B023
                    (shared.targets.update, shared.targets.defense_knowledge),
                )
                for kind, pool in pools.items():
                    among = scene.network.normalize(games.Pool(*pool))
                    ranking = games.attack(scene.network, among, update, knowledge, rules)
                    wins[kind].append(int(ranking.picks[0, 0]) == 0)
            for kind, won in wins.items():
                found = with_interval("top1", clopper_pearson(sum(won), len(won)))
                table.add(key | {"among": kind, "candidates": NEAR, "chance": 1 / NEAR} | found)
    table.show("victim", "defense", "among", "games", "chance", "top1")


def false_alarms(asked: Options) -> None:
    """Members found above a score that one in a hundred updates without any candidate reach."""
    table = Table(asked, "false-alarms")
    half = asked.candidates
    for name in asked.victims:
        both = load(name, 2 * half)
        scene = both.first(half)
        for defense in asked.defenses:
            for images in asked.batches:
                key: Row = {"victim": name, "defense": defense, "images": images}
                key |= {"candidates": half, "games": asked.games}
                if not table.lacks(**key):
                    continue
                rules = games.Rules(images, "slab", defense)
                played = scene.play(games.draw(asked.games, images, half), rules)
                outside = half + games.draw(asked.games, images, half, seed=1)
                targets = games.share(both.network, both.pool, outside, rules).targets
                empty = games.answer(
                    scene.network, scene.candidates, targets, outside, rules, scene.known_rows
                )
                share, _ = games.found_without_alarm(played, empty.scores)
                table.add(key | with_interval("found", share))
    table.show("victim", "defense", "images", "candidates", "games", "found")
