"""Many sweeps by one command: run, resumed, shown on one page."""

import json

import numpy as np
import pytest

from jaxinv import study, sweep
from jaxinv.engine.cells import Loader
from jaxinv.settings import reader

SWEEP = """
question = "Does {name} matter, or <b>not</b>?"
[run]
targets = 1
seeds = 2
[grid]
iterations = 3
tv = {values}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two sweeps of toy size, and the command that ran them."""
    folder = tmp_path_factory.mktemp("study")
    for name, values in (("weak", "[0.01, 0.02]"), ("strong", "0.5")):
        (folder / f"{name}.toml").write_text(SWEEP.format(name=name, values=values))
    command = [str(folder / "weak.toml"), str(folder / "strong.toml"), "--out", str(folder / "out")]
    assert study.main(command) == 0
    return folder / "out", command


def test_one_page_shows_all(finished):
    folder, _ = finished
    page = (folder / "index.html").read_text()
    assert page.count("<h2>") == 2
    assert "Does weak matter, or &lt;b&gt;not&lt;/b&gt;?" in page
    for name in ("weak", "strong"):
        assert f'href="{name}/report.html"' in page
        assert f'src="{name}/plots/reconstructions.png"' in page
        assert (folder / name / "plots/reconstructions.png").is_file()
    assert "4 of 4 trials" in page
    assert "2 of 2 trials" in page
    assert "2 sweeps, 6 trials" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # it needs nothing from outside


def test_what_is_finished_is_not_run_again(finished, monkeypatch):
    folder, command = finished
    seconds = json.loads((folder / "seconds.json").read_text())
    assert set(seconds) == {"weak", "strong"}
    asked = []
    monkeypatch.setattr(sweep, "run_study", lambda study, *_: asked.append(study.name))
    (folder / "index.html").unlink()
    assert study.main(command) == 0
    assert not asked
    assert (folder / "index.html").is_file()
    assert json.loads((folder / "seconds.json").read_text()) == seconds
    assert study.main([*command, "--seeds", "3"]) == 0  # no longer what is there: the sweep decides
    assert asked == ["weak", "strong"]
    asked.clear()
    assert study.main([*command, "--judge", "lenet_zhu-tiles"]) == 0  # who saw none of it
    assert asked == ["weak", "strong"]


def test_a_run_of_pictures_that_are_others_by_now_is_not_shown(tmp_path, rng_numpy):
    def put(images):
        np.savez(tmp_path / "own.npz", images=images, labels=[0, 1])

    put(images := rng_numpy.integers(0, 256, (2, 12, 12, 3), np.uint8))
    flags = {"dataset": [str(tmp_path / "own.npz")], "targets": "2", "tv": ["0.01", "0.1"]}
    asked = reader.load_study(None, flags)
    there = sweep.targets_of(asked.cells, [Loader(asked.plan).targets(c) for c in asked.cells])
    assert study._same_pictures(asked, there)
    assert study._same_pictures(asked, None)
    put(255 - images)
    assert not study._same_pictures(asked, there)


def test_nothing_is_run_before_all_is_right(finished, tmp_path, capsys):
    _, (first, *_) = finished
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[grid]\ntvv = 1\n")
    assert study.main([first, str(wrong), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "wrong.toml" in error
    assert "tvv" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert study.main([first, first, "--out", str(tmp_path / "out")]) == 2
    assert "twice" in capsys.readouterr().err


def test_all_sweeps_that_come_along_are_right():
    for preset in (None, "full"):
        assert len(study.load({"sweeps": [], "preset": preset, "out": None})) > 20
