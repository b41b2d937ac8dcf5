"""What every table starts from: victims and candidates, and rows that are kept."""

import csv
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxinv import data, defenses
from jaxinv.audit import games, measuring
from jaxinv.audit import identification as ident
from jaxinv.audit.intervals import Share
from jaxinv.errors import UserError
from jaxinv.types import Normalization, Target
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
NOISES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
DEFENSES = (
    "none",
    "prune:0.9",
    "prune:0.99",
    "quantize:4",
    "quantize:1",
    "sign",
    "clip:1",
    "dpsgd:1:0.01",
    "dpsgd:1:0.1",
)
TEST_IMAGES = 10_000
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What is asked for."""

    victims: Sequence[str]
    batches: Sequence[int]
    defenses: Sequence[str]
    noises: Sequence[float]  # variances
    candidates: int
    shortlist: int
    games: int
    method: str
    out: Path


@dataclass(frozen=True)
class Scene:
    """A victim and its candidates."""

    name: str
    network: games.Network
    pool: games.Pool
    dataset: data.Dataset
    trained: bool
    shared: dict[bytes, Target] = field(default_factory=dict)  # by the members of the games

    def first(self, count: int) -> "Scene":
        """The same victim, and the first of its candidates alone."""
        return replace(self, pool=games.Pool(*(x[:count] for x in self.pool)), shared={})

    @functools.cached_property
    def candidates(self) -> measuring.Candidates:
        """Normalized."""
        return self.network.normalize(self.pool)

    @functools.cached_property
    def gram(self) -> Any:
        """The exact products of the candidates' gradients with one another."""
        if self.known_rows is not None:
            return self.known_rows().gram
        return measuring.gram(self.network.loss, self.network.params, self.candidates)

    @functools.cached_property
    def root(self) -> Any:
        """Its root."""
        return games.root(self.gram)

    @functools.cached_property
    def known_rows(self) -> Callable[[], measuring.Rows] | None:
        """Gives the candidates' gradients where they are kept."""
        return games.known_rows(self.network, self.candidates)

    def rules(self, asked: Options, images: int, defense: str, method: str) -> games.Rules:
        """A game's rules."""
        return games.Rules(images, method, defense, shortlist=asked.shortlist)

    def play(self, members: Any, rules: games.Rules) -> games.Played:
        """Plays games among the candidates; one client is compiled for most defenses together."""
        chain = defenses.names(defenses.parse(rules.defense))
        if games.may_follow(rules):
            targets = games.send(self._bare(members, rules.images), rules)
        elif chain == ("dpsgd",) and self.known_rows is not None and rules.steps == 1:
            own = self.known_rows(), self.network.params, self.candidates.labels
            targets = games.send_private(*own, members, rules)
        else:
            return games.play(self.network, self.pool, members, rules, self.known_rows)
        kept = self.candidates, targets, members, rules, self.known_rows
        return games.answer(self.network, *kept)

    def _bare(self, members: Any, images: int) -> Target:
        """What clients share without a defense, of the last size that was asked for kept."""
        key = members.tobytes()
        if key not in self.shared:
            self.shared.clear()
            rules = games.Rules(images)
            self.shared[key] = games.share(self.network, self.pool, members, rules).targets
        return self.shared[key]

    def play_exactly(self, members: Any, rules: games.Rules) -> games.Played:
        """The same without a defense, by exact products where `play` has those of sketches."""
        if self.known_rows is not None:
            return self.play(members, rules)
        sent = games.share(self.network, self.pool, members, rules).targets.update
        of = self.network.loss, self.network.params, self.candidates
        measured = measuring.measure(*of, sent, noisy=True)._replace(gram=self.gram)
        ranking = ident.identify_among(
            measured, rules.images, rules.method, 1 / rules.images, most=rules.shortlist
        )
        return games.Played(members, np.asarray(ranking.scores), np.asarray(ranking.picks))


def split_of(candidates: int) -> str:
    """The split of CIFAR-10 that has so many images: test, or where that is too small train."""
    return "test" if candidates <= TEST_IMAGES else "train"


def load(name: str, candidates: int) -> Scene:
    """Loads a victim and the first images of a split of CIFAR-10 (`split_of`)."""
    images = data.load("cifar10", split=split_of(candidates), ids=candidates)
    normalization = Normalization.of(images.mean, images.std)
    pool = games.Pool(images.images, images.labels)
    trained = "-" in name
    if trained:
        victim = checkpoints.load_victim(name)
    else:
        model, _, width = name.partition(":")
        victim = untrained(
            model, classes=10, width=int(width) if width else None, seed=0, image_shape=(32, 32, 3)
        )
    network = games.network(victim.module, victim.variables, normalization)
    return Scene(name, network, pool, images, trained)


class Table:
    """Rows of one table, kept in a file: each is written as soon as it is there."""

    def __init__(self, asked: Options, name: str):
        self.path = asked.out / f"{name}.csv"
        self.rows: list[Row] = []
        self.used: list[Row] = []  # by this run
        if self.path.exists():
            with open(self.path, newline="") as file:
                self.rows = [{k: _number(v) for k, v in r.items()} for r in csv.DictReader(file)]

    def lacks(self, **key: Any) -> bool:
        """Whether there is no row of this key yet; where there is, it is used.

        Raises:
          UserError: the file is of a version whose rows had other columns.
        """
        missing = [k for k in key if self.rows and k not in self.rows[0]]
        if missing:
            raise UserError(f"{self.path}: has no column {missing[0]}; give another --out")
        found = [r for r in self.rows if all(r[k] == v for k, v in key.items())]
        self.used += found
        return not found

    def add(self, row: Row) -> None:
        """Keeps a row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if not self.rows:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)
        self.used.append(row)

    def show(self, *columns: str) -> None:
        """Prints the rows that were used."""
        markdown(self.used, columns)

    def show_by_images(self, *columns: str, share: str = "recall") -> None:
        """Prints one share of the rows that were used, with a column for each size of an update."""

        def size(row):
            return f"{row['images']} images ({row['chance']:.2%})"

        wide: dict[tuple, Row] = {}
        for row in self.used:
            line = wide.setdefault(tuple(row[c] for c in columns), {c: row[c] for c in columns})
            line |= {size(row) + end: row[share + end] for end in ("", "_low", "_high")}
        sizes = dict.fromkeys(map(size, sorted(self.used, key=lambda row: row["images"])))
        markdown(list(wide.values()), (*columns, *sizes))


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def with_interval(name: str, share: Share) -> Row:
    """A share as three columns, which `markdown` prints as one."""
    return {name: share.value, f"{name}_low": share.low, f"{name}_high": share.high}


def markdown(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Prints rows as a table."""

    def shown(row, column):
        value = row.get(column, "")
        if f"{column}_low" in row:
            return str(Share(value, row[f"{column}_low"], row[f"{column}_high"], 0))
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    print("\n| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(shown(row, c) for c in columns) + " |", flush=True)
