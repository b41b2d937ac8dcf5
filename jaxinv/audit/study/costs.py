"""Seconds of each part on one update."""

import time
from typing import Any

import jax
import optax

from jaxinv.audit import games, measuring
from jaxinv.audit import identification as ident
from jaxinv.audit.study.scene import Options, Row, Table, load


def cost(asked: Options) -> None:
    """Seconds of each part on one update, compilation apart, of the first batch size."""
    table = Table(asked, "cost")
    images = asked.batches[0]
    for name in asked.victims:
        key: Row = {"victim": name, "candidates": asked.candidates, "images": images}
        if not table.lacks(**key):
            continue
        scene = load(name, asked.candidates)
        members = games.draw(1, images, asked.candidates)
        update = games.share(scene.network, scene.pool, members, games.Rules(images)).targets.update
        of, whole = (scene.network.loss, scene.network.params), scene.candidates
        few = measuring.Candidates(*(x[: measuring.CHUNK] for x in whole))
        # The same program: sketches where those of all candidates are.
        fits = asked.candidates * optax.tree.size(scene.network.params) * 4 <= measuring.STORED
        measuring.scores(*of, few, update)
        measuring.measure(*of, few, update, stored=measuring.STORED if fits else 0)
        spent = {}
        spent["scores by jvp"], _ = _timed(measuring.scores, *of, whole, update)
        spent["one pass"], measured = _timed(measuring.measure, *of, whole, update)
        for method in ident.METHODS:
            last = (measured, images, method, 1 / images, 0.0, asked.shortlist)
            ident.identify_among(*last)
            spent[method], ranking = _timed(ident.identify_among, *last)
        named = len(set(ranking.picks[0].tolist()) & set(members[0].tolist()))
        more = {"solved": min(asked.shortlist, asked.candidates), "named": f"{named} of {images}"}
        for clock in ("wall", "CPU"):
            seconds = {part: taken[clock] for part, taken in spent.items()}
            table.add(key | {"clock": clock} | seconds | more)
    table.show(
        *("victim", "candidates", "images", "clock", "scores by jvp", "one pass"),
        *(*ident.METHODS, "solved", "named"),
    )


def _timed(function, *arguments) -> tuple[dict[str, float], Any]:
    """Seconds, of the wall and of all cores together: others may be at work beside it."""
    wall, cores = time.perf_counter(), time.process_time()
    found = jax.block_until_ready(function(*arguments))
    return {"wall": time.perf_counter() - wall, "CPU": time.process_time() - cores}, found
