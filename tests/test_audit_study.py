"""The study's rows: kept as they come, not computed again; and its figure."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from jaxinv.audit import games
from jaxinv.audit.intervals import Share
from jaxinv.audit.study import __main__ as study
from jaxinv.audit.study import figure, fishing, harder, scene
from jaxinv.errors import UserError
from jaxinv.settings import flags


@pytest.fixture
def asked(tmp_path):
    return scene.Options(("a",), (1, 8), ("none",), (0.1,), 100, 100, 20, "slab", Path(tmp_path))


def test_rows_are_kept_and_not_computed_again(asked, capsys):
    first = scene.Table(asked, "noise")
    for victim in ("a", "b"):
        key = {"victim": victim, "images": 8}
        assert first.lacks(**key)
        first.add(key | scene.with_interval("recall", Share(0.5, 0.25, 0.75, 20)))
    second = scene.Table(asked, "noise")
    assert not second.lacks(victim="a", images=8)
    assert second.lacks(victim="a", images=1)
    assert second.lacks(victim="c", images=8)
    capsys.readouterr()
    second.show("victim", "images", "recall")
    # Rows of other runs stay in the file and out of the table.
    assert capsys.readouterr().out.splitlines()[1:] == [
        "| victim | images | recall |",
        "|---|---|---|",
        "| a | 8 | 50.0% [25.0%, 75.0%] |",
    ]


def test_rows_of_other_columns_are_refused(asked):
    scene.Table(asked, "harder").add({"victim": "a", "games": 100})
    with pytest.raises(UserError, match=r"harder.csv: has no column pool; give another --out"):
        scene.Table(asked, "harder").lacks(victim="a", pool=2000)


def test_neighbors_and_outsiders_are_of_the_candidates_split(asked, monkeypatch):
    """Of more candidates than CIFAR-10 has test images, and of twice as many, all are of train."""
    seen = []

    class Kept(scene.Table):
        def lacks(self, **key):
            seen.append(key)
            return False

    def load(name, candidates):
        seen.append(candidates)
        return scene.Scene(name, None, games.Pool(*2 * [np.arange(candidates)]), None, False)

    monkeypatch.setattr(harder, "Table", Kept)
    monkeypatch.setattr(harder, "load", load)
    monkeypatch.setattr(harder.data, "load", lambda name, split: seen.append(split))
    for candidates, split in ((10_000, "test"), (10_001, "train")):
        seen.clear()
        harder.harder(dataclasses.replace(asked, candidates=candidates))
        key = {"victim": "a", "defense": "none", "games": 20, "pool": candidates}
        assert seen == [split, candidates, key]
    seen.clear()
    harder.false_alarms(dataclasses.replace(asked, candidates=6000))
    assert seen[0] == 12_000
    assert not any(isinstance(x, int) for x in seen[1:])  # nothing else is loaded
    assert (load("a", 6).first(4).pool.labels == [0, 1, 2, 3]).all()


def test_sizes_of_updates_stand_beside_one_another(asked, capsys):
    table = scene.Table(asked, "noise")
    for images, defense in ((8, "none"), (1, "none"), (1, "sign")):
        key = {"victim": "a", "images": images, "defense": defense, "chance": images / 100}
        table.add(key | scene.with_interval("recall", Share(images / 10, 0, 1, 20)))
    table.show_by_images("victim", "defense")
    assert capsys.readouterr().out.splitlines()[1:] == [
        "| victim | defense | 1 images (1.00%) | 8 images (8.00%) |",
        "|---|---|---|---|",
        "| a | none | 10.0% [0.0%, 100.0%] | 80.0% [0.0%, 100.0%] |",
        "| a | sign | 10.0% [0.0%, 100.0%] |  |",
    ]


def test_how_often_a_server_that_fishes_has_one_image_alone():
    """Of six images, two of each class: the others of a pair of any two are of the class in 1 of 5.

    Counted over all batches of three too, and (1 - 1/3)^2 within a class.
    """
    labels = np.array([0, 0, 1, 1, 2, 2])
    assert fishing._expected(labels, 2, "class") == pytest.approx(4 / 5)
    triples = list(itertools.permutations(range(6), 3))
    alone = np.mean([(labels[list(t)] == labels[t[0]]).sum() == 1 for t in triples])
    assert fishing._expected(labels, 3, "class") == pytest.approx(alone)
    assert fishing._expected(labels, 3, "feature") == pytest.approx(4 / 9)
    assert [fishing._expected(labels, b, "honest") for b in (1, 2)] == [1, 0]
    batches = fishing._batches(np.repeat([0, 1, 2], 5), 3, 20, of_one_class=True)
    assert all(len(set(b)) == 3 and len(set(b // 5)) == 1 for b in batches)


def test_help_says_of_every_option_what_it_is():
    parser = flags.FlagParser("python -m jaxinv.audit.study", study.__doc__)
    study.add_options(parser)
    assert all(action.help for action in parser._actions)
    text = parser.format_help()
    assert text.startswith("usage: python -m jaxinv.audit.study ")
    # Examples stand a line each.
    assert "\n    python -m jaxinv.audit.study figure\n\nEach part" in text


def test_figure_draws_what_the_rows_say():
    shares = {"recall": 0.5, "recall_low": 0.4, "recall_high": 0.6}
    named = [
        {"victim": "convnet:16", "images": b, "defense": d} | shares
        for b in (1, 8)
        for d in ("none", "noise:0.1", "noise:10")
    ]
    bounded = [
        {"victim": "convnet:16", "variance": v, "image": i, "ceiling": 20.0 + i}
        | {"attained": 15.0, "prior": 12.0}
        for v in (0.1, 10.0)
        for i in range(2)
    ]
    drawn = figure.draw(named, bounded, ["convnet:16"], [1, 8])
    left, right = drawn.axes[0], drawn.axes[-1]
    lines = [line for line in left.lines if len(line.get_xdata()) == 2]
    assert len(lines) == 2
    assert list(lines[0].get_xdata()) == pytest.approx([-1, 1])
    apart = [line for line in left.lines if list(line.get_xdata()) == [-4]]  # no noise at all
    assert {line.get_ydata()[0] for line in apart} == {0.5}
    assert left.get_title(loc="left") == "ConvNet (16) untrained\nimages named"
    heights = sorted(line.get_ydata()[0] for line in right.lines)
    assert heights == [12.0, 15.0, 20.5]
