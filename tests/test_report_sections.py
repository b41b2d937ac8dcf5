"""The list of the report's sections: none can be left off, none shows markup, none stays half."""

import dataclasses
import importlib
import io
import pkgutil
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from synthetic_run import write_extras, write_run

from jaxinv import report
from jaxinv.reporting import columns, page, sections
from jaxinv.reporting.figures import style
from jaxinv.reporting.figures.panels import held_fixed
from jaxinv.reporting.figures.pictures import read_album, shape_of
from jaxinv.reporting.leaderboard import board
from jaxinv.reporting.published import published
from jaxinv.reporting.section import Section
from jaxinv.reporting.sections import SECTIONS
from jaxinv.reporting.sections.psnr_by_step import psnr_by_step
from jaxinv.reporting.sections.psnr_by_target import psnr_by_target
from jaxinv.reporting.sections.psnr_distribution import _truth, psnr_distribution
from jaxinv.reporting.sections.spectrum import spectrum
from jaxinv.reporting.sections.success_rate import success_rate
from jaxinv.reporting.study import summarize
from jaxinv.reporting.wording import without_folders
from jaxinv.runs.results import read_run
from jaxinv.settings import schema

MARKUP = "<b>x</b> & [/b] $\\foo$ {y}"
TRAINED = {"victim": "net", "victim_accuracy": 0.5, "victim_epsilon": 8.0, "victim_delta": 1e-5}


def made(folder, name):
    """A small study that has what its name says."""
    one = {"targets": 2, "seeds": 1}
    folder = write_run(
        folder,
        **{
            "plain": {"targets": 1, "seeds": 1},
            "seeds": {"targets": 2, "seeds": 2, "axes": {"tv": [0.1, 0.01]}},
            "labels": one | {"axes": {"labels": ["counts"]}},
            "assumed": one | {"axes": {"assumed_images": [1, 2]}, "images": 2},
            "defended": one | {"axes": {"defense": ["none", "noise:0.1", "noise:1"]}, "draws": 2},
            "private": one | {"axes": {"defense": ["dpsgd:1:0.5"]}, "facts": {0: TRAINED}},
            "second_order": one | {"axes": {"polish": [2]}, "block_targets": 1},
            "grid": one | {"axes": {"model": ["lenet_zhu", "convnet"], "tv": [0.1, 0.01]}},
            "closed_form": one | {"steps": (0,)},
        }[name],
    )
    if name == "second_order":
        write_extras(folder)
    return folder


STUDIES = (
    "plain",
    "seeds",
    "labels",
    "assumed",
    "defended",
    "private",
    "second_order",
    "grid",
    "closed_form",
)


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    return {name: summarize(read_run(made(folder / name, name)), 19.0) for name in STUDIES}


@pytest.fixture
def quick(monkeypatch):
    """Drawings of no size: what is tested is where they go."""
    monkeypatch.setattr(style, "to_bytes", lambda figure, kind: b"drawn")


def build(folder):
    output = io.StringIO()
    report.build(folder, console=Console(file=output, width=100))
    return output.getvalue()


def test_every_file_of_sections_is_in_the_list():
    names = [module.name for module in pkgutil.iter_modules(sections.__path__)]
    there = [importlib.import_module(f"jaxinv.reporting.sections.{name}").SECTION for name in names]
    assert [section.name for section in there] == names  # a section has its file's name
    assert set(SECTIONS) == set(there)
    assert len(SECTIONS) == len(there)


ALWAYS = {"summary", "reconstructions", "success_rate", "per_target"}
OF_ONE_SEED = {"psnr_by_target", "psnr_by_step"}
OF_SEEDS = {
    "psnr_distribution",
    "psnr_by_step",
    "pixel_statistics",
    "best_of_k",
    "variance_components",
}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "plain",
            "ConvNet (16), untrained; 1 image in each update; cosine + TV, 500 steps, 1 seed. ",
        ),
        ("grid", "1 image in each update; cosine + TV, 500 steps, 1 seed. "),  # over pictures
        ("private", "ConvNet (16), test accuracy 50.0%; 1 image in each update, defense dpsgd:"),
    ],
)
def test_a_figure_says_what_does_not_vary(studies, name, words):
    assert held_fixed(studies[name]).startswith(words)


@pytest.mark.parametrize(
    ("name", "own"),
    {
        "plain": OF_ONE_SEED,
        "seeds": OF_SEEDS | {"likeness", "paired_differences"},
        "labels": OF_ONE_SEED | {"labels"},
        "assumed": OF_ONE_SEED | {"assumptions", "likeness", "paired_differences"},
        "defended": OF_SEEDS | {"likeness", "paired_differences", "defenses", "defense_curves"},
        "private": OF_ONE_SEED | {"dp_sgd"},
        "second_order": OF_ONE_SEED | {"emergence", "posterior", "spectrum"},
        "grid": OF_ONE_SEED | {"leaderboard", "likeness", "paired_differences"},
        "closed_form": {"psnr_by_target"},
    }.items(),
)
def test_a_section_is_there_where_its_study_has_it(studies, name, own):
    assert {section.name for section in SECTIONS if section.when(studies[name])} == ALWAYS | own


def test_every_condition_is_exercised_both_ways(studies):
    for section in SECTIONS:
        found = {bool(section.when(study)) for study in studies.values()}
        assert found == ({True} if section.name in ALWAYS else {True, False}), section.name


def test_a_target_of_two_data_sets_has_no_one_baseline(tmp_path):
    axes = {"dataset": ["cifar10", "tiles"]}
    study = summarize(read_run(write_run(tmp_path, targets=1, seeds=2, axes=axes)), 19.0)
    assert np.isnan(study.baseline_of(study.target_ids[0]))
    for draw in (psnr_distribution, psnr_by_step):
        assert draw(study).axes


def test_every_target_has_its_dot_and_what_is_exact_or_failed_is_told(tmp_path):
    marks = {"exact": [(0, 0, 0)], "failed": [(0, 1, 0), (0, 2, 0)]}
    folder = write_run(tmp_path, targets=6, seeds=1, axes={"tv": [0.1, 0.01]}, **marks)
    study = summarize(read_run(folder), 19.0)
    axes = psnr_by_target(study).axes[0]
    first, second = (np.sort(drawn.get_offsets()[:, 0]) for drawn in axes.collections)
    np.testing.assert_allclose(first, np.sort(study.cells[0].psnr[3:, 0]))
    np.testing.assert_allclose(second, np.sort(study.cells[1].psnr[:, 0]))
    low, high = axes.get_xlim()
    assert (low < second).all()
    assert (second < high).all()
    words = [text.get_text() for text in axes.texts]
    assert any(text.endswith("1 exact, 2 failed") for text in words)


def test_on_a_leaderboard_weights_are_fitted_and_steps_are_not(tmp_path):
    axes = {"model": ["lenet_zhu", "convnet"], "representation": ["pixels", "generator"]}
    folder = write_run(tmp_path / "a", axes=axes | {"tv": [0.1, 0.01]}, targets=2, seeds=1)
    found = board(summarize(read_run(folder), 19.0))
    assert found.attackers == ["cosine + TV", "cosine + TV, generator"]
    best, other = found.at(found.tasks[0], "cosine + TV")
    assert {best.fitted, other.fitted} == {"tv 0.1", "tv 0.01"}
    assert best.cell.mean.mean > other.cell.mean.mean
    folder = write_run(tmp_path / "b", axes=axes | {"iterations": [10, 20]}, targets=2, seeds=1)
    assert board(summarize(read_run(folder), 19.0)) is None


def test_a_victim_has_its_folder_for_a_name_where_another_is_as_good(tmp_path):
    axes = {"victim": ["x/a", "x/b"], "representation": ["pixels", "generator"]}
    facts = {cell: {"victim_accuracy": 0.5} for cell in range(4)}
    study = summarize(read_run(write_run(tmp_path, axes=axes, seeds=1, facts=facts)), 19.0)
    assert board(study).tasks == [("x/a",), ("x/b",)]


def test_a_target_has_no_picture_where_cells_attack_others_by_its_number(studies):
    study = studies["seeds"]
    first, second = study.cells
    album = read_album(study)
    assert _truth(study.cells, album, first.target_ids[0]) is not None
    other = dataclasses.replace(second, image_ids=[[99], [98]])
    assert _truth([first, other], album, first.target_ids[0]) is None


@pytest.mark.parametrize("name", STUDIES)
def test_every_figure_and_table_that_is_made_is_on_the_page(tmp_path, quick, name):
    folder = made(tmp_path / "run", name)
    build(folder)
    html = (folder / "report.html").read_text()
    parts = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', html, re.S))
    drawn = {path.stem for path in (folder / "plots").glob("*.png")}
    assert drawn == {name for name, part in parts.items() if "<figure>" in part}
    for section in SECTIONS:
        if section.name in parts and section.table and not section.table.in_files_only:
            assert "<table>" in parts[section.name], section.name
            assert (folder / "tables" / f"{section.name}.csv").exists()
    for part in parts.values():
        assert part.count("<figcaption>") == part.count("<figure")
        assert 'alt=""' not in part


def test_a_section_more_is_on_the_page_without_another_edit(tmp_path, quick, monkeypatch):
    more = Section("more", "A figure more", draw=success_rate, alt="words", caption="what it is")
    monkeypatch.setattr(report, "SECTIONS", (*SECTIONS, more))
    folder = made(tmp_path, "plain")
    build(folder)
    assert (folder / "plots" / "more.svg").exists()
    assert "what it is" in (folder / "report.html").read_text()


def test_a_metric_is_one_column(studies):
    """Page, CSV and terminal are laid out from the same columns."""
    table = next(s.table for s in SECTIONS if s.name == "summary")
    study = studies["seeds"]
    metric = columns.Column(
        "worst",
        lambda cell: cell.psnr.min(),
        "worst\nseed",
        columns.decimals("worst"),
        definition=columns.Definition("Worst", "The least of all."),
    )
    wider = columns.Table(table.items, (*table.columns, metric))
    rows = wider.rows(study)
    assert [row["worst"] for row in rows] == [cell.psnr.min() for cell in study.cells]
    assert wider.on_page(study)[-1] is metric
    section = Section("wider", "Wider", table=wider)
    html = page.render(study, [section], {"wider": rows}, {}, {})
    assert f"<td>{study.cells[0].psnr.min():.2f}</td>" in html
    assert "<dt>Worst</dt><dd>The least of all.</dd>" in html


def test_names_are_shown_as_they_are(tmp_path, quick):
    """Markup of the page, of the terminal and of the figures' mathematics is text in a name."""
    folder = write_run(tmp_path / "run", axes={"dataset": [MARKUP, "other"]}, targets=2, seeds=2)
    config = (folder / "run.json").read_text()
    config = config.replace("How much do the seeds", "How <i>much</i> {do} the seeds")
    (folder / "run.json").write_text(config)
    printed = build(folder)
    html = (folder / "report.html").read_text()
    assert "How &lt;i&gt;much&lt;/i&gt; {do} the seeds" in html
    assert "<i>" not in html
    assert "<b>" not in html
    assert "&lt;b&gt;x&lt;/b&gt; &amp; [/b] $\\foo$ {y}" in html
    assert "[/b]" in printed
    assert "$\\foo$" in printed


def test_dollar_signs_are_drawn(tmp_path):
    """Mathematical text would refuse the name, or leave its signs out."""
    study = summarize(read_run(write_run(tmp_path, axes={"dataset": [MARKUP, "$a$"]})), 19.0)
    assert style.to_bytes(success_rate(study), "svg").startswith(b"<?xml")


def test_powers_of_ten_need_no_mathematical_text(studies):
    figure = spectrum(studies["second_order"])
    figure.canvas.draw()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "10⁻²" in labels
    assert not any("$" in label for label in labels)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("sweep --out /home/ann/runs/a --tv 0.1", "sweep --out a --tv 0.1"),
        ("sweep ~/studies/noise.toml", "sweep noise.toml"),
        ("sweep sweeps/noise.toml --out=/somewhere/x/", "sweep sweeps/noise.toml --out=x/"),
        ("sweep --victim '/a b/c/net'", "sweep --victim 'net'"),
        ("sweep --defense clip:1,noise:1e-4", "sweep --defense clip:1,noise:1e-4"),
    ],
)
def test_a_command_names_no_folder_of_its_machine(command, shown):
    assert without_folders(command) == shown


def test_the_page_names_no_folder_of_its_machine(tmp_path, quick):
    folder = write_run(
        tmp_path / "run", axes={"victim": ["/home/ann/net", "/home/ann/other"]}, targets=1, seeds=1
    )
    config = (folder / "run.json").read_text()
    config = config.replace("--seeds 32", f"--out {folder}").replace("2 minutes", "/home/ann/min")
    (folder / "run.json").write_text(config)
    printed = build(folder)
    html = (folder / "report.html").read_text()
    assert "/ann" not in re.sub('data:image[^"]*', "", html)
    assert str(tmp_path) not in html
    assert "victim = other" in printed


def spoil(folder, what):
    """Damages a run folder."""
    config = folder / "run.json"
    picture = next((folder / "images").glob("*.npz"))
    trials = next((folder / "trials").glob("*.parquet"))
    kind, _, how = what.partition(" ")
    if kind == "run.json":
        text = config.read_text()
        config.write_text(
            {
                "list": "[1]",
                "null": "null",
                "torn": text[: len(text) // 2],
                "binary": "\0\0",
                "no_cells": text.replace('"cells"', '"sells"'),
                "no_seeds": text.replace('"seeds"', '"sees"'),
                "fewer": re.sub(
                    r'"cells": \[.*?\],\n  "target', '"cells": [],\n  "target', text, flags=re.S
                ),
            }[how]
        )
    elif kind in ("npz", "parquet", "trace"):
        path = {"npz": picture, "parquet": trials}.get(kind)
        path = path or next((folder / "traces").glob("*.parquet"))
        content = path.read_bytes()
        if how == "gone":
            path.unlink()
        elif how == "pickled":
            np.savez(path, reconstructions=np.array([{}], dtype=object))
        elif how == "lacks":
            np.savez(path, seeds=np.arange(2))
        else:
            path.write_bytes({"torn": content[: len(content) // 2], "empty": b""}[how])
    elif kind == "images":
        shutil.rmtree(folder / "images")
    elif kind == "extras":
        (folder / "extras").mkdir()
        (folder / "extras" / picture.name).write_bytes(b"no archive")
    elif how == "folder":
        (folder / kind).mkdir()
    else:
        (folder / kind).write_text("a file of the user's")


DAMAGES = [
    *(f"run.json {how}" for how in ("list", "null", "torn", "no_cells", "no_seeds", "fewer")),
    *(f"npz {how}" for how in ("gone", "torn", "empty", "pickled", "lacks")),
    *(f"{kind} {how}" for kind in ("parquet", "trace") for how in ("torn", "empty")),
    "trace gone",
    "images gone",
    "extras torn",
    "report.html folder",
    "plots file",
    "tables file",
]


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_one_line_and_nothing_is_written(tmp_path, quick, capsys, what):
    folder = write_run(tmp_path / "run", targets=1, seeds=2)
    spoil(folder, what)
    before = sorted(path for path in folder.rglob("*"))
    assert report.main([str(folder)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert sorted(path for path in folder.rglob("*")) == before


def test_a_seed_that_lost_its_rows_is_found(tmp_path, quick):
    folder = write_run(tmp_path / "run", targets=1, seeds=3)
    run = read_run(folder)
    kept = {name: column[run.trials["seed"] < 2] for name, column in run.trials.items()}
    study = summarize(type(run)(folder, run.config, kept, run.traces), 19.0)
    by_step = next(section for section in SECTIONS if section.name == "psnr_by_step")
    with pytest.raises(ValueError, match="cell 0 does not hold each seed"):
        by_step.draw(study, style.WIDE)


def test_what_an_earlier_report_left_is_removed(tmp_path, quick):
    folder = made(tmp_path, "plain")
    (folder / "plots").mkdir()
    (folder / "tables").mkdir()
    for name in ("plots/labels.png", "tables/labels.csv", "plots/mine.png"):
        (folder / name).write_text("of another day")
    build(folder)
    assert not (folder / "plots/labels.png").exists()
    assert not (folder / "tables/labels.csv").exists()
    assert (folder / "plots/mine.png").exists()


@pytest.mark.parametrize(
    ("targets", "cells", "views", "largest", "across"),
    [
        (4, 1, 1, 1.9, 2),  # batches of one setting: two strands fill the width
        (8, 1, 1, 1.25, 3),
        (1, 1, 1, 1.25, 1),
        (4, 3, 3, 1.25, 1),  # the default study: one strand is wide enough
        (8, 5, 1, 1.25, 1),
    ],
)
def test_rows_stand_in_strands_where_there_is_room(targets, cells, views, largest, across):
    shape = shape_of(targets, cells, views, style.WIDE, largest)
    assert shape.across == across
    assert shape.across * shape.rows >= targets > (shape.across - 1) * shape.rows
    assert shape.size <= largest


def test_strands_use_the_width_and_do_not_overlap(tmp_path):
    folder = write_run(tmp_path, targets=4, seeds=1, images=4)
    study = summarize(read_run(folder), 19.0)
    section = next(section for section in SECTIONS if section.name == "reconstructions")
    figure = section.draw(study, style.WIDE)
    boxes = [image.get_extent() for image in figure.axes[0].images]
    assert len(boxes) == 8
    assert max(right for _, right, *_ in boxes) > 0.95 * style.WIDE
    for index, (left, right, bottom, top) in enumerate(boxes):
        for other_left, other_right, other_bottom, other_top in boxes[:index]:
            apart_x = left >= other_right or other_left >= right
            assert apart_x or top >= other_bottom or other_top >= bottom


@pytest.mark.parametrize(
    ("settings", "accuracy", "psnr"),
    [
        ({"model": "resnet20", "width": 64}, np.nan, 19.83),
        ({"model": "resnet20", "width": 64, "victim": "mine"}, 0.91, 13.95),
        ({"model": "convnet", "width": None, "images": 4}, np.nan, 16.92),  # published width
        ({"model": "resnet20", "width": 64, "victim": "mine-epoch1"}, 0.3, None),  # half trained
        ({"model": "resnet20", "width": 16}, np.nan, None),
        ({"model": "resnet20", "width": 64, "images": 4}, np.nan, None),
        ({"model": "resnet20", "width": 64, "defense": "noise:0.1"}, np.nan, None),
        ({"model": "convnet", "images": 4, "width": 64, "client_batch": 2}, np.nan, None),
    ],
)
def test_published_figures_stand_beside_the_tasks_that_they_are_of(settings, accuracy, psnr):
    asked = schema.Cell(dataset="cifar10", model="convnet").model_dump() | settings
    reported = published(SimpleNamespace(asked=asked, facts={"victim_accuracy": accuracy}))
    assert psnr is None if reported is None else reported.psnr == psnr
