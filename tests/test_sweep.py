"""The whole chain at toy size: rows, resume after a kill, refusal of other settings."""

import csv
import errno
import functools
import io
import json
import os

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxinv import sweep
from jaxinv.attacks import levenberg_marquardt as lm
from jaxinv.engine import assembly, cells
from jaxinv.errors import UserError
from jaxinv.machine import runtime
from jaxinv.reporting.study import summarize
from jaxinv.runs import blocks, results
from jaxinv.settings import reader
from jaxinv.victim import checkpoints

ARGUMENTS = ["--targets", "2", "--seeds", "2", "--iterations", "3", "--tv", "0.01", "0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in two blocks per cell, never interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "TRIALS_PER_BLOCK", 2)
        assert sweep.main([*ARGUMENTS, "--out", str(folder)]) == 0
    return folder


def test_rows_and_files(finished):
    run = results.read_run(finished)
    rows = run.trials
    keys = list(zip(rows["cell"], rows["target_id"], rows["seed"]))
    assert keys == [(c, t, s) for c in (0, 1) for t in (0, 1) for s in (0, 1)]
    assert set(rows["status"]) == {"ok"}
    assert rows["tv"].tolist() == [0.01] * 4 + [0.0] * 4
    assert np.isfinite(rows["psnr"]).all()
    assert len(set(rows["victim_digest"])) == 1
    # The stored pictures are the ones that were scored, up to their 8 bits.
    images = run.images(0)
    error = images.reconstructions[1, 0] / 255.0 - images.truths[1] / 255.0
    np.testing.assert_allclose(np.square(error).mean(), rows["mse"][2], rtol=1e-2)
    assert (run.traces["step"].reshape(8, -1) == np.arange(4)).all()
    assert (finished / "report.html").exists()


# Every kind of client and of knowledge, each for a few steps of the second-order attack.
SECOND_ORDER = {
    "one image, with error bars": ["--posterior", "8"],
    "four local steps": ["--client-epochs", "2", "--client-batch", "1", "--images", "2"],
    "labels counted": ["--images", "2", "--labels", "counts", "--init", "prior"],
    "labels joint": ["--labels", "joint"],
    "more images than there are": ["--assumed-images", "2", "--labels", "counts"],
    "noise, adaptive": ["--defense", "noise:1e-2", "--adaptive", "true", "--damping", "0.01"],
    "pruned, adaptive": [
        "--defense",
        "prune:0.9",
        "--adaptive",
        "true",
        "--image-prior",
        "photographs",
    ],
    "DP-SGD, adaptive": ["--defense", "dpsgd:1:0.001", "--adaptive", "true"],
    "float64, polished": ["--polish", "1"],
}


# The others by `pytest -m slow`: each compiles a program of its own.
_OFTEN = ("one image, with error bars",)


@pytest.mark.parametrize(
    "name", [n if n in _OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in SECOND_ORDER]
)
def test_second_order_attacks_meet_every_client(name, perceptron, tmp_path, monkeypatch):
    """The residual falls, and nothing leaves the finite numbers."""
    # A normal matrix of 3,072 pixels and its eigenvalues are for no test.
    monkeypatch.setattr(cells, "WITH_SPECTRUM", 0)
    few_products = functools.partial(lm.LevenbergMarquardt, columns=0)
    monkeypatch.setattr(assembly, "LevenbergMarquardt", few_products)
    monkeypatch.setattr(lm, "REUSES", 1)
    monkeypatch.setattr(lm, "CG_ITERATIONS", 3)
    settings = [] if name.endswith("bars") else ["--posterior", "0"]
    few = ["--targets", "1", "--seeds", "1", "--iterations", "3", "--cg-iterations", "4"]
    few += ["--model", perceptron]  # compiling is the cost
    arguments = ["--attack", "bayes", *few, "--anneal-to", "1", *SECOND_ORDER[name], *settings]
    monkeypatch.setattr(sweep.report, "build", lambda folder, console: None)
    assert sweep.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    run = results.read_run(tmp_path / "run")
    assert np.isfinite(run.trials["psnr"]).all()
    assert run.trials["prior_source"][0]
    assert run.traces["objective"][3] < run.traces["objective"][0]
    if name.endswith("bars"):
        extras = run.extras(0)
        assert extras["std"].shape == extras["best"].shape == (1, 1, 32, 32, 3)
        assert (extras["std"] > 0).all()


def test_a_killed_run_resumes_to_the_same_rows(finished, tmp_path, monkeypatch):
    """The kill comes while a block is being written: half a file, no commit mark."""
    monkeypatch.setattr(blocks, "TRIALS_PER_BLOCK", 2)
    monkeypatch.setattr(sweep.report, "build", lambda folder, console: None)
    write, written = results.write_block, []

    class Killed(BaseException):
        pass

    def dies_in_the_third(folder, block, *parts):
        if len(written) == 2:
            (folder / "images" / f"{block}.npz").write_bytes(b"half")
            (folder / "trials" / f".{block}.parquet.1.tmp").write_bytes(b"half")
            raise Killed
        written.append(block)
        write(folder, block, *parts)

    out = ["--out", str(tmp_path / "run")]
    monkeypatch.setattr(results, "write_block", dies_in_the_third)
    with pytest.raises(Killed):
        sweep.main([*ARGUMENTS, *out])
    monkeypatch.setattr(results, "write_block", write)
    done = (tmp_path / "run" / "trials" / f"{written[0]}.parquet").stat().st_mtime_ns
    assert sweep.main([*ARGUMENTS, *out]) == 0
    assert (tmp_path / "run" / "trials" / f"{written[0]}.parquet").stat().st_mtime_ns == done
    whole, resumed = results.read_run(finished), results.read_run(tmp_path / "run")
    for name in whole.trials:
        np.testing.assert_array_equal(whole.trials[name], resumed.trials[name])
    np.testing.assert_array_equal(
        whole.images(1).reconstructions, resumed.images(1).reconstructions
    )
    assert len(resumed.config["sessions"]) == 2
    assert not (tmp_path / "run" / "snapshots").exists()


@pytest.mark.slow
def test_float64_goes_from_the_same_start_with_more_digits(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.report, "build", lambda folder, console: None)
    out = tmp_path / "run"
    settings = ["--targets", "1", "--seeds", "1", "--iterations", "3", "--tv", "0.01"]
    profile = ["--profile", str(tmp_path / "profile")]
    command = [*settings, "--precision", "float64", *profile, "--out", str(out)]
    assert sweep.main(command) == 0
    double, single = results.read_run(out), results.read_run(finished)
    assert list(double.trials["precision"]) == ["float64"]
    assert double.trials["status"].tolist() == ["ok"]
    # Only the first points: a step follows signs, and a sign near zero is not rounding's to keep.
    error = abs(double.traces["objective"][0] / single.traces["objective"][0] - 1)
    assert error < 1e-4
    assert double.traces["psnr"][0] == pytest.approx(single.traces["psnr"][0], rel=1e-5)
    assert double.trials["objective"][0] != single.trials["objective"][0]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_full_disk_is_one_line_and_loses_nothing(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(blocks, "TRIALS_PER_BLOCK", 2)
    monkeypatch.setattr(sweep.report, "build", lambda folder, console: None)
    command, synced, fsync = [*ARGUMENTS, "--out", str(tmp_path / "run")], [], os.fsync

    def full(number):
        synced.append(number)
        if len(synced) > 6:  # in the second block
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert sweep.main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot be written (No space left on device); make room there" in error
    assert len(list((tmp_path / "run" / "trials").iterdir())) == 1
    assert sweep.main(command) == 0
    whole, resumed = results.read_run(finished), results.read_run(tmp_path / "run")
    for name in whole.trials:
        np.testing.assert_array_equal(whole.trials[name], resumed.trials[name])


def test_cells_that_differ_in_numbers_share_every_program(tmp_path, monkeypatch):
    compiled, after_blocks, run_block = [], [], sweep.run_block

    def heard(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    def counted(*arguments):
        run_block(*arguments)
        after_blocks.append(len(compiled))

    jax.monitoring.register_event_duration_secs_listener(heard)
    monkeypatch.setattr(sweep, "run_block", counted)
    monkeypatch.setattr(sweep.report, "build", lambda folder, console: None)
    weights = [f"{10.0**-i:g}" for i in range(1, 16)]
    few = ["--targets", "1", "--seeds", "1", "--iterations", "2", "3"]
    try:
        assert sweep.main([*few, "--tv", *weights, "--out", str(tmp_path / "run")]) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert len(after_blocks) == 30
    assert len(set(after_blocks)) == 1


def test_other_settings_are_refused_and_change_nothing(finished, capsys):
    before = (finished / "run.json").read_text()
    for other in (["--lr", "0.2"], ["--seeds", "3"], ["--targets", "1"]):
        assert sweep.main([*ARGUMENTS, *other, "--out", str(finished)]) == 2
        assert "holds a run with other" in capsys.readouterr().err
    assert (finished / "run.json").read_text() == before


def joined(folder, **flags):
    """Opens the run of a batch of two tiles there, or joins it; attacks nothing."""
    asked = {"model": "mlp", "width": "8", "images": "2", "tv": "0", "out": str(folder), **flags}
    asked = {name: value for name, value in asked.items() if value is not None}
    study = reader.load_study(None, asked)
    load = cells.Loader(study.plan)
    sweep.open_run(study, [load(cell) for cell in study.cells], "command")


def test_a_run_goes_on_with_its_images_and_judge_alone(tmp_path):
    joined(tmp_path, target_ids="3,5")
    others = {
        "other images .*--target-ids": {"target_ids": "3,7"},
        "another --judge": {"target_ids": "3,5", "judge": "lenet_zhu-tiles"},
        "another --lpips": {"target_ids": "3,5", "lpips": "true"},
    }
    for message, other in others.items():
        with pytest.raises(UserError, match=f"holds a run with {message}"):
            joined(tmp_path, **other)
    joined(tmp_path, target_ids="3,5")
    assert len(results.read_config(tmp_path)["sessions"]) == 2


def test_a_run_does_not_go_on_with_another_network_of_the_same_name(tmp_path):
    """Half of its cells would be of the one, half of the other, and compared."""
    trained = checkpoints.load_victim("lenet_zhu-tiles")
    folder = tmp_path / "net"
    checkpoints.save(folder, trained.variables, trained.info, [])
    asked = {"victim": str(folder), "model": None, "width": None, "tv": "0.1"}
    joined(tmp_path / "run", **asked)
    joined(tmp_path / "run", **asked)
    other = jax.tree.map(lambda x: x + 1, trained.variables)
    checkpoints.save(folder, other, trained.info, [])
    with pytest.raises(UserError, match="another network behind the name of a checkpoint"):
        joined(tmp_path / "run", **asked)


def test_a_run_that_names_fewer_settings_goes_on(tmp_path):
    """It was begun before run.json said more than each target's first image."""
    joined(tmp_path, target_ids="3,5")
    there = json.loads((tmp_path / "run.json").read_text())
    for name in ("targets", "checkpoints", "judge", "lpips"):
        del there[name]
    (tmp_path / "run.json").write_text(json.dumps(there))
    joined(tmp_path, target_ids="3,5")
    with pytest.raises(UserError, match="holds a run with other target-ids"):
        joined(tmp_path, target_ids="4,5")


def test_each_cell_has_targets_of_its_own(tmp_path, monkeypatch):
    """Batches of unequal and of equal labels begin at other images, of one number of them too."""
    bars, progress_bar = [], runtime.progress_bar
    monkeypatch.setattr(runtime, "progress_bar", lambda c: bars.append(progress_bar(c)) or bars[0])
    monkeypatch.setattr(sweep.report, "build", lambda folder, console: None)
    arguments = ["--model", "mlp", "--width", "8", "--attack", "analytic", "--images", "2"]
    arguments += ["--grouping", "distinct", "repeated", "--targets", "2", "--seeds", "1"]
    assert sweep.main([*arguments, "--out", str(tmp_path)]) == 0
    assert bars[0].finished  # of closed forms, which say nothing on their way
    there = json.loads((tmp_path / "run.json").read_text())
    assert [own["ids"] for own in there["targets"]] == [[0, 2], [0, 1]]

    def cells_read():
        return [cell.target_ids for cell in summarize(results.read_run(tmp_path), 20.0).cells]

    assert cells_read() == [[0, 2], [0, 1]]
    # A run that names the first cell's alone, as runs begun before do, is read too.
    before = {name: value for name, value in there.items() if name != "targets"}
    (tmp_path / "run.json").write_text(json.dumps(before))
    assert cells_read() == [[0, 2], [0, 1]]
    there["targets"].reverse()
    (tmp_path / "run.json").write_text(json.dumps(there))
    with pytest.raises(UserError, match="does not know target_id 2"):
        results.read_run(tmp_path)


def test_a_log_file_has_a_line_now_and_then():
    """Where there is no bar to see: how far it is, the time left, and what is at work."""
    console = Console(file=io.StringIO(), markup=False)
    with runtime.progress_bar(console) as bar:
        task, seconds = bar.add_task("", total=40, completed=10), [50]
        bar.get_time = lambda: seconds[0]
        for done in (10, 20, 30):
            bar.update(task, completed=done, description=f"c0: {done}.00 dB")
            seconds[0] += runtime.SECONDS_A_LINE / 2
    assert console.file.getvalue() == "75%, 0:00:30 left, c0: 30.00 dB\n"


@pytest.fixture(scope="module")
def defended(tmp_path_factory):
    """Two defenses, one random and drawn twice, on one target."""
    folder = tmp_path_factory.mktemp("runs") / "defended"
    chosen = ["none", "noise:1e-3", "noise:10", "prune:0.5"]
    arguments = ["--targets", "1", "--seeds", "2", "--noise-seeds", "2", "--iterations", "3"]
    arguments += ["--tv", "0.01"]
    assert sweep.main([*arguments, "--defense", *chosen, "--out", str(folder)]) == 0
    return folder


def test_draws_of_noise_are_told_apart_from_starts(defended):
    rows = results.read_run(defended).trials
    keys = list(zip(rows["cell"], rows["noise_seed"], rows["seed"]))
    two = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert keys == [
        *((0, 0, s) for s in (0, 1)),
        *((c, d, s) for c in (1, 2) for d, s in two),
        *((3, 0, s) for s in (0, 1)),
    ]
    kept, error = rows["update_cosine"], rows["update_error"]
    np.testing.assert_allclose(kept[:2], 1, rtol=1e-6)
    assert (error[:2] == 0).all()
    # Seeds share their draw of the noise, and draws differ.
    assert kept[2] == kept[3] != kept[4] == kept[5]
    # The same draws at another strength: 100 times the standard deviation.
    np.testing.assert_allclose(error[6:10], 100 * error[2:6], rtol=1e-4)
    assert (kept[6:10] < kept[2:6]).all()
    # Every seed is the same with every draw.
    trace = results.read_run(defended).traces
    first = trace["psnr"][trace["step"] == 0].reshape(-1, 2)
    assert (first == first[0]).all()


def test_the_report_shows_the_defenses(defended):
    assert (defended / "plots" / "defense_curves.png").stat().st_size > 10_000
    page = (defended / "report.html").read_text()
    assert "Which defense leaves this attack nothing" in page
    with open(defended / "tables" / "defenses.csv") as file:
        rows = {row["defense"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"noise", "prune"}
    assert rows["noise"]["tried"] == "0.001 to 10"
    with open(defended / "tables" / "summary.csv") as file:
        assert [row["draws"] for row in csv.DictReader(file)][:4] == ["1", "2", "2", "1"]


@pytest.mark.parametrize("attack", ["bayes", "gradinversion", "analytic"])
def test_dry_run_counts_the_work_of_any_attack(tmp_path, capsys, attack):
    words = ["--attack", attack, "--targets", "1", "--dry-run", "--out", str(tmp_path / "run")]
    network = ["--model", "mlp", "--width", "8"] if attack == "analytic" else []
    if attack == "gradinversion":
        network = ["--prior-batch-norm", "0", "--seeds", "2"]
    assert sweep.main([*words, *network]) == 0
    assert "PFLOP in all" in capsys.readouterr().out


def test_dry_run_prints_the_cells_and_writes_nothing(tmp_path, capsys):
    assert sweep.main([*ARGUMENTS, "--dry-run", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "2 cells, 2 blocks" in printed
    assert "tv = 0.01 " in printed
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_no_markup(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "[b][x]$foo$.npz"
    np.savez(name, images=np.zeros((2, 32, 32, 3), np.uint8), labels=[0, 1])
    command = [*ARGUMENTS[:-3], "--tv", "0.01", "--dataset", "tiles", name]
    assert sweep.main([*command, "--dry-run", "--out", "run"]) == 0
    assert name in "".join(capsys.readouterr().out.split())


def test_run_json_says_what_was_run(finished):
    config = json.loads((finished / "run.json").read_text())
    assert config["command"].startswith("python -m jaxinv.sweep --targets 2")
    assert config["axes"] == {"tv": [0.01, 0.0]}
    assert {"jax", "flax", "python"} <= set(config["sessions"][0]["versions"])
