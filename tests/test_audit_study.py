"""The study's rows: kept as they come, not computed again; and its figure."""

from pathlib import Path

import pytest

from jaxinv.audit.intervals import Share
from jaxinv.audit.study import figure, scene


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


def test_figure_draws_what_the_rows_say():
    shares = {"recall": 0.5, "recall_low": 0.4, "recall_high": 0.6}
    named = [
        {"victim": "a", "images": b, "defense": d} | shares
        for b in (1, 8)
        for d in ("none", "noise:0.1", "noise:10")
    ]
    bounded = [
        {"victim": "a", "variance": v, "image": i, "ceiling": 20.0 + i}
        | {"attained": 15.0, "prior": 12.0}
        for v in (0.1, 10.0)
        for i in range(2)
    ]
    drawn = figure.draw(named, bounded, ["a"], [1, 8])
    left, right = drawn.axes[0], drawn.axes[-1]
    lines = [line for line in left.lines if len(line.get_xdata()) == 3]
    assert len(lines) == 2
    assert list(lines[0].get_xdata()) == pytest.approx([-4, -1, 1])
    heights = sorted(line.get_ydata()[0] for line in right.lines)
    assert heights == [12.0, 15.0, 20.5]
