"""`python -m jaxinv.audit.study`: tables and figure of what updates leak, for docs/results.md.

    python -m jaxinv.audit.study identification [--victims lenet_zhu lenet_zhu-cifar10 ...]
    python -m jaxinv.audit.study noise harder false-alarms privacy ceiling cost figure

Each part prints its table as Markdown and writes its rows to `OUT/PART.csv`; `figure` draws from
the rows of `noise` and `ceiling`. A victim is a checkpoint's name, or a network's for an untrained
one: `resnet18:16` at width 16.
"""

import argparse
import csv
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from scipy import stats

from jaxinv import data, metrics
from jaxinv.attacks.gauss_newton import GaussNewton
from jaxinv.audit import dp, games
from jaxinv.audit import identification as ident
from jaxinv.audit.auditing import ceiling_of, choose_method, percent
from jaxinv.audit.capacity import capacity
from jaxinv.data.image_prior import ImageFacts, load_prior
from jaxinv.errors import run_command
from jaxinv.invert import invert
from jaxinv.machine import runtime
from jaxinv.reporting.figures import style as ps
from jaxinv.types import Normalization, Truth
from jaxinv.victim import checkpoints
from jaxinv.victim.untrained import untrained

VICTIMS = (
    "lenet_zhu",
    "lenet_zhu-cifar10",
    "convnet:16",
    "convnet-w16-cifar10",
    "resnet18:16",
    "resnet18-w16-cifar10",
    "mobilenetv2:8",
    "mobilenetv2-w8-cifar10",
)
BATCHES = (1, 4, 8, 32, 128)
NOISES = (0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
DEFENSES = (
    "none",
    "noise:1e-3",
    "noise:1e-2",
    "noise:1e-1",
    "noise:1",
    "noise:10",
    "prune:0.9",
    "prune:0.99",
    "quantize:4",
    "quantize:1",
    "sign",
    "clip:1",
    "dpsgd:1:0.01",
    "dpsgd:1:0.1",
)
MULTIPLIERS = (0.3, 0.5, 1.0, 2.0, 4.0)
DELTA = 1e-5
Row = dict[str, Any]


@dataclasses.dataclass
class Options:
    """What is asked for."""

    victims: Sequence[str]
    batches: Sequence[int]
    defenses: Sequence[str]
    candidates: int
    games: int
    method: str
    out: Path


@dataclasses.dataclass
class Scene:
    """A victim and its candidates, with what is computed once."""

    name: str
    network: games.Network
    pool: games.Pool
    dataset: data.Dataset
    _rows: ident.Rows | None = None

    def rows(self) -> ident.Rows:
        """The candidates' gradients; their sketches where they are not kept."""
        if self._rows is None:
            keep = {} if self.stored else {"keep": lambda x: ident.sketch(x, ident.SKETCH)}
            found = ident.gradients(self.network.loss, self.network.params, self.candidates, **keep)
            self._rows = ident.Rows(found, found @ found.T)
        return self._rows

    @property
    def stored(self) -> bool:
        """Whether the candidates' gradients are kept."""
        size = len(self.pool.labels) * optax.tree.size(self.network.params) * 4
        return size <= ident.STORED

    @property
    def candidates(self) -> ident.Candidates:
        """Normalized."""
        return self.network.normalize(self.pool)

    @property
    def known_rows(self) -> Callable[[], ident.Rows] | None:
        """Gives the candidates' gradients where they are kept."""
        return self.rows if self.stored else None

    def play(self, members: np.ndarray, rules: games.Rules) -> games.Played:
        """Plays games among the candidates."""
        return games.play(self.network, self.pool, members, rules, self.known_rows)


def load(name: str, candidates: int) -> Scene:
    """Loads a victim and the first test images of CIFAR-10."""
    images = data.load("cifar10", split="test", ids=candidates)
    normalization = Normalization.of(images.mean, images.std)
    pool = games.Pool(images.images, images.labels)
    if "-" in name:
        victim = checkpoints.load_victim(name)
        network = games.network(victim.module, victim.variables, normalization)
        return Scene(name, network, pool, images)
    model, _, width = name.partition(":")
    victim = untrained(
        model, classes=10, width=int(width) if width else None, seed=0, image_shape=(32, 32, 3)
    )
    network = games.network(victim.module, victim.variables, normalization)
    return Scene(f"{name}, untrained", network, pool, images)


def method_of(asked: Options, defense: str) -> str:
    """What is asked for, or the one that suits the defense."""
    return choose_method(defense) if asked.method == "auto" else asked.method


def _outcome(scene: Scene, outcome: games.Outcome, rules: games.Rules, seconds: float) -> Row:
    row: Row = {
        "victim": scene.name,
        "images": rules.images,
        "defense": rules.defense,
        "method": rules.method,
        "candidates": outcome.candidates,
        "games": outcome.games,
        "chance": outcome.chance,
        "seconds": seconds,
    }
    shares = {"recall": outcome.recall, "whole": outcome.whole}
    shares |= {f"tpr_at_{rate:g}": share for rate, share in outcome.true_positives.items()}
    for name, share in shares.items():
        row |= {name: share.value, f"{name}_low": share.low, f"{name}_high": share.high}
        row[f"_{name}"] = percent(share)
    return row


def _played(asked: Options, defenses: Sequence[str]) -> list[Row]:
    rows = []
    for name in asked.victims:
        scene = load(name, asked.candidates)
        for defense in defenses:
            for images in asked.batches:
                rules = games.Rules(images, method_of(asked, defense), defense)
                members = games.draw(asked.games, images, asked.candidates)
                start = time.perf_counter()
                outcome = games.count(scene.play(members, rules))
                rows.append(_outcome(scene, outcome, rules, time.perf_counter() - start))
                print(".", end="", file=sys.stderr, flush=True)
    return rows


def identification(asked: Options) -> list[Row]:
    """Recall by network, batch and defense."""
    rows = _played(asked, asked.defenses)
    columns = [
        "victim",
        "defense",
        "images",
        "method",
        "chance",
        "_recall",
        "_whole",
        "_tpr_at_0.01",
        "_tpr_at_0.001",
    ]
    markdown(rows, columns)
    return rows


def noise(asked: Options) -> list[Row]:
    """Recall against the variance of noise."""
    rows = []
    for name in asked.victims:
        scene = load(name, asked.candidates)
        # A sketch would add the noise up: of a network whose gradients are not kept, none.
        for variance in NOISES if scene.stored else NOISES[:1]:
            defense = f"noise:{variance:g}" if variance else "none"
            for images in asked.batches:
                rules = games.Rules(images, method_of(asked, defense), defense)
                members = games.draw(asked.games, images, asked.candidates)
                start = time.perf_counter()
                played = games.simulate(scene.rows(), members, rules.method, variance)
                seconds = time.perf_counter() - start
                rows.append(_outcome(scene, games.count(played), rules, seconds))
                write(asked.out / "noise.csv", rows)
    markdown(rows, ["victim", "defense", "images", "method", "chance", "_recall"])
    return rows


def methods(asked: Options) -> list[Row]:
    """Every method on the same games."""
    rows = []
    for method in ident.METHODS:
        rows += _played(dataclasses.replace(asked, method=method), asked.defenses)
    markdown(rows, ["victim", "defense", "images", "method", "chance", "_recall", "seconds"])
    return rows


def harder(asked: Options) -> list[Row]:
    """One image of an update, among its augmentations and its nearest neighbors of its class."""
    rows = []
    for name in asked.victims:
        scene = load(name, asked.candidates)
        targets = games.draw(asked.games, 1, asked.candidates)
        whole = data.load("cifar10", split="test")
        for defense in asked.defenses:
            rules = games.Rules(1, "matched", defense)
            shared = games.share(scene.network, scene.pool, targets, rules)
            wins: dict[str, list[bool]] = {"augmentations": [], "nearest of its class": []}
            for game, (target,) in enumerate(targets):
                one = scene.pool.images[target][None]
                own = np.concatenate([one, *games.variants(one).values()])
                near = games.nearest(whole.images, whole.labels, int(target), 8)
                pools = {
                    "augmentations": (own, np.full(len(own), scene.pool.labels[target])),
                    "nearest of its class": (whole.images[near], whole.labels[near]),
                }
                update, knowledge = jax.tree.map(
                    lambda x: x[game : game + 1],  # noqa: B023
                    (shared.targets.update, shared.targets.defense_knowledge),
                )
                for kind, (images, labels) in pools.items():
                    among = scene.network.normalize(games.Pool(images, labels))
                    ranking = games.attack(scene.network, among, update, knowledge, rules)
                    wins[kind].append(int(ranking.picks[0, 0]) == 0)
            for kind, won in wins.items():
                share = games.clopper_pearson(sum(won), len(won))
                rows.append(
                    {
                        "victim": scene.name,
                        "defense": defense,
                        "among": kind,
                        "candidates": 8,
                        "games": len(won),
                        "chance": 1 / 8,
                        "top1": share.value,
                        "top1_low": share.low,
                        "top1_high": share.high,
                        "_top1": percent(share),
                    }
                )
    markdown(rows, ["victim", "defense", "among", "candidates", "chance", "_top1"])
    return rows


def false_alarms(asked: Options) -> list[Row]:
    """Members found above a score that one in a hundred updates without any candidate reach."""
    rows = []
    for name in asked.victims:
        scene = load(name, 2 * asked.candidates)
        half = asked.candidates
        inside = games.Pool(scene.pool.images[:half], scene.pool.labels[:half])
        for defense in asked.defenses:
            for images in asked.batches:
                rules = games.Rules(images, "slab", defense)
                first = dataclasses.replace(scene, pool=inside, _rows=None)
                played = first.play(games.draw(asked.games, images, half), rules)
                outside = half + games.draw(asked.games, images, half, seed=1)
                shared = games.share(scene.network, scene.pool, outside, rules)
                empty = games.attack(
                    scene.network,
                    first.candidates,
                    shared.targets.update,
                    shared.targets.defense_knowledge,
                    rules,
                    first.known_rows,
                )
                share, _ = games.found_without_alarm(played, np.asarray(empty.scores))
                rows.append(
                    {
                        "victim": scene.name,
                        "defense": defense,
                        "images": images,
                        "candidates": half,
                        "games": asked.games,
                        "found": share.value,
                        "found_low": share.low,
                        "found_high": share.high,
                        "_found": percent(share),
                    }
                )
    markdown(rows, ["victim", "defense", "images", "candidates", "_found"])
    return rows


def private(asked: Options) -> list[Row]:
    """Epsilon shown by naming one image, beside the one promised; and with half the noise."""
    rows = []
    for name in asked.victims:
        scene = load(name, asked.candidates)
        clipped = ident.gradients(
            scene.network.loss, scene.network.params, scene.candidates, clip=1.0
        )
        targets = games.draw(asked.games, 1, asked.candidates)[:, 0]
        for multiplier in MULTIPLIERS:
            for steps in (1, 100):
                # Exact for Gaussian noise on all examples; a test compares it with the accountant.
                promised = dp.gdp_epsilon(steps**0.5 / multiplier, DELTA)
                for real in (1.0, 0.5):
                    mu = steps**0.5 / multiplier / real
                    # All steps at the same parameters are one release with steps as many copies.
                    scores = dp.informed_scores(
                        clipped[None] * steps**0.5, targets, multiplier * real, 0
                    )
                    wins = int((scores.argmax(axis=1) == targets).sum())
                    found = dp.lower_bound(wins, asked.games, asked.candidates, DELTA)
                    rows.append(
                        {
                            "victim": scene.name,
                            "multiplier": multiplier,
                            "steps": steps,
                            "noise": "as stated" if real == 1 else "half of it",
                            "success": found.success,
                            "expected": dp.expected_success(asked.candidates, mu),
                            "shown": found.epsilon,
                            "promised": promised,
                            "verdict": "caught" if found.epsilon > promised else "consistent",
                        }
                    )
    markdown(rows, list(rows[0]))
    return rows


def ceiling(asked: Options) -> list[Row]:
    """Ceiling and attained PSNR of one image under noise, by image."""
    rows = []
    for name in asked.victims:
        scene = load(name, asked.candidates)
        own = scene.dataset
        facts = ImageFacts("cifar10", None, (32, 32, 3), tuple(own.mean), tuple(own.std))
        prior, _ = load_prior("spectrum", facts)
        for variance in NOISES:
            defense = f"noise:{variance:g}" if variance else "none"
            rules = games.Rules(1, defense=defense)
            members = np.arange(asked.games)[:, None]
            shared = games.share(scene.network, scene.pool, members, rules)
            for i in range(asked.games):
                truth = Truth(
                    jnp.asarray(scene.pool.images[i][None] / np.float32(255)),
                    jnp.asarray(scene.pool.labels[i][None]),
                )
                update, knowledge = jax.tree.map(
                    lambda x: x[i],  # noqa: B023
                    (shared.targets.update, shared.targets.defense_knowledge),
                )
                bound = ceiling_of(
                    *scene.network[:3], truth, prior, knowledge.variances if knowledge else None
                )
                with runtime.arithmetic("float32") as cast:
                    found = invert(
                        *scene.network[:2],
                        update,
                        image_shape=(32, 32, 3),
                        labels=truth.labels.tolist(),
                        mean=own.mean,
                        std=own.std,
                        seeds=1,
                        iterations=28,
                        method=GaussNewton(),
                        image_prior=cast(prior),
                    )
                psnr = float(metrics.psnr(jnp.asarray(found.best), truth.images)[0])
                rows.append(
                    {
                        "victim": scene.name,
                        "variance": variance,
                        "image": i,
                        "ceiling": float(bound.psnr[0]),
                        "prior": float(bound.prior_psnr[0]),
                        "attained": psnr,
                    }
                )
                print(".", end="", file=sys.stderr, flush=True)
    summary = []
    for key in dict.fromkeys((r["victim"], r["variance"]) for r in rows):
        own = [r for r in rows if (r["victim"], r["variance"]) == key]
        top, got = (np.array([r[n] for r in own]) for n in ("ceiling", "attained"))
        rank = stats.spearmanr(top, got).statistic if len(own) > 2 else np.nan
        summary.append(
            {
                "victim": key[0],
                "variance": key[1],
                "images": len(own),
                "ceiling": top.mean(),
                "attained": got.mean(),
                "above": f"{(got > top).sum()} of {len(own)}",
                "most above": (got - top).max(),
                "Spearman": rank,
            }
        )
    markdown(summary, list(summary[0]))
    return rows


def capacities(asked: Options) -> list[Row]:
    """Images that one gradient can determine, by network."""
    rows = []
    for name in asked.victims:
        scene = load(name, 1)
        found = capacity(*scene.network[:2], (32, 32, 3))
        rows.append(
            {
                "victim": scene.name,
                "parameters": found.parameters,
                "images": found.images,
                "binding": found.binding.layer,
                "equality": found.equality,
                **{f"free at {b}": f"{found.free(b):.0%}" for b in asked.batches},
            }
        )
    markdown(rows, list(rows[0]))
    return rows


def cost(asked: Options) -> list[Row]:
    """Seconds of each part on one update, compilation apart."""
    rows = []
    for name in asked.victims:
        scene = load(name, asked.candidates)
        members = games.draw(1, asked.batches[0], asked.candidates)
        rules = games.Rules(asked.batches[0])
        shared = games.share(scene.network, scene.pool, members, rules)
        update, of = shared.targets.update, (scene.network.loss, scene.network.params)
        few = ident.Candidates(*(x[: 2 * ident.CHUNK] for x in scene.candidates))
        parts: dict[str, Callable[[ident.Candidates], Any]] = {
            "scores by jvp": lambda c: ident.scores(*of, c, update),  # noqa: B023
            "gradients, Gram": lambda c: ident.measure(*of, c, update),  # noqa: B023
        }
        for part, run in parts.items():
            run(few)
            start = time.perf_counter()
            result = run(scene.candidates)
            seconds = time.perf_counter() - start
            rows.append(
                {
                    "victim": scene.name,
                    "candidates": asked.candidates,
                    "part": part,
                    "seconds": seconds,
                }
            )
        for method in ident.METHODS:
            ident.identify(result, rules.images, method, 1 / rules.images)
            start = time.perf_counter()
            jax.block_until_ready(ident.identify(result, rules.images, method, 1 / rules.images))
            seconds = time.perf_counter() - start
            rows.append(
                {
                    "victim": scene.name,
                    "candidates": asked.candidates,
                    "part": method,
                    "seconds": seconds,
                }
            )
    markdown(rows, list(rows[0]))
    return rows


def figure(asked: Options) -> list[Row]:
    """Leakage by identification, by PSNR and its ceiling, against the noise."""
    ps.save(
        draw(read(asked.out / "noise.csv"), read(asked.out / "ceiling.csv")),
        asked.out / "leakage",
        ("png",),
    )
    return []


@ps.styled
def draw(named: list[Row], bounded: list[Row], width: float = ps.WIDE) -> Figure:
    """Draws two panels over the variance of the noise: images named, and decibels."""
    victims_ = list(dict.fromkeys(r["victim"] for r in bounded))
    batches = sorted({int(r["images"]) for r in named})
    colors = dict(zip(batches, ps.cell_colors(len(batches))))
    sheet = ps.Sheet(
        width,
        ps.Heading(
            "What noise leaves of an update",
            "Left: images of the update named among 2,000 candidates, 95% intervals. "
            "Right: one image, "
            "PSNR that the second-order attack attains, and the ceiling. "
            + "; ".join(victims_)
            + ".",
            keys=[
                *(
                    ps.Key("line", c, f"{b} images" if b > 1 else "1 image")
                    for b, c in colors.items()
                ),
                ps.Key("dash", ps.BASELINE, "ceiling; chance"),
            ],
        ),
        panels=2,
        columns=2,
        panel_height=2.4,
        margins=ps.Margins(gap=0.7, above=0.3),
    )
    left, right = sheet.axes

    def place(v):
        return np.log10(np.maximum(np.asarray(v, float), 1e-4))

    for b, color in colors.items():
        own = [r for r in named if int(r["images"]) == b and r["victim"] == victims_[0]]
        at = place([0 if r["defense"] == "none" else r["defense"].split(":")[1] for r in own])
        value, low, high = (
            [100 * float(r[n]) for r in own] for n in ("recall", "recall_low", "recall_high")
        )
        left.fill_between(at, low, high, color=color, alpha=0.18, linewidth=0)
        left.plot(at, value, color=color, linewidth=1.8, marker="o", markersize=3)
        left.plot(
            at,
            [100 * float(r["chance"]) for r in own],
            color=ps.BASELINE,
            linewidth=0.8,
            linestyle=(0, (4, 2.5)),
        )
    own = [r for r in bounded if r["victim"] == victims_[0]]
    variances = sorted({float(r["variance"]) for r in own})
    for name, color, style in (
        ("attained", colors[batches[0]], "-"),
        ("ceiling", ps.BASELINE, (0, (4, 2.5))),
    ):
        means = [
            np.mean([float(r[name]) for r in own if float(r["variance"]) == v]) for v in variances
        ]
        right.plot(place(variances), means, color=color, linestyle=style, linewidth=1.8)
    for ax, title in ((left, "Named (%)"), (right, "PSNR (dB)")):
        ax.set_title(title, weight="bold")
        ax.set_xlabel("variance of the noise")
        ax.set_xticks(place(NOISES), ["none", *(f"{v:g}" for v in NOISES[1:])])
    left.set_ylim(-4, 104)
    right.set_ylim(0, 60)
    return sheet.figure


PARTS: dict[str, Callable[[Options], list[Row]]] = {
    "identification": identification,
    "noise": noise,
    "methods": methods,
    "harder": harder,
    "false-alarms": false_alarms,
    "privacy": private,
    "ceiling": ceiling,
    "capacity": capacities,
    "cost": cost,
    "figure": figure,
}


def markdown(rows: list[Row], columns: Sequence[str]) -> None:
    """Prints rows as a table."""

    def shown(value):
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    print("\n| " + " | ".join(c.strip("_") for c in columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(shown(row[c]) for c in columns) + " |", flush=True)


def write(path: Path, rows: list[Row]) -> None:
    """Writes rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = [name for name in rows[0] if not name.startswith("_")]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    """Reads rows back, as text."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def main(argv: Sequence[str] | None = None) -> int:
    """Computes the parts; returns the exit code."""

    def command():
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("parts", nargs="+", choices=list(PARTS))
        parser.add_argument("--victims", nargs="+", default=list(VICTIMS))
        parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
        parser.add_argument("--defenses", nargs="+", default=list(DEFENSES))
        parser.add_argument("--candidates", type=int, default=2000)
        parser.add_argument("--games", type=int, default=200)
        parser.add_argument("--method", default="auto", choices=["auto", *ident.METHODS])
        parser.add_argument("--out", type=Path, default=Path("runs/audit-study"))
        asked = vars(parser.parse_args(argv))
        parts = asked.pop("parts")
        runtime.use_compilation_cache()
        for part in parts:
            rows = PARTS[part](Options(**asked))
            if rows:
                write(asked["out"] / f"{part}.csv", rows)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
