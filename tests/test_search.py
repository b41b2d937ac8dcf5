"""The search: draws in their ranges, halving in closed form, resume, the winner as a sweep file."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from jaxinv import search
from jaxinv.engine import cells
from jaxinv.settings import reader


def fake_measure(calls):
    """Attacks whose objective is how far tv is from 1e-2; PSNR is best at lr 0.1."""

    def measure(study, inputs, numbers, iterations, console, snapshots):
        calls.append((len(numbers["tv"]), iterations))
        distance = np.abs(np.log10(numbers["tv"]) + 2)
        psnr = 20 - np.abs(np.log10(numbers["lr"]) + 1)
        objective = np.where(numbers["lr"] > 0.9, np.nan, distance)  # diverged
        return {
            "objective": objective.tolist(),
            "psnr": psnr.tolist(),
            "ssim": psnr.tolist(),
            "baseline_psnr": [12.0] * len(psnr),
            "failed": np.isnan(objective).astype(int).tolist(),
        }

    return measure


def read(folder):
    with open(folder / "candidates.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("draw", ["sobol", "random"])
def test_draws_fill_their_ranges_evenly_in_the_logarithm(draw):
    space = ["tv=1e-4:1", "lr=0.01:1"]
    study = reader.load_search({"space": space, "candidates": "64", "draw": draw})
    values = search.draw(study.search)
    assert {name: len(v) for name, v in values.items()} == {"tv": 64, "lr": 64}
    for name, decades in (("tv", (-4, 0)), ("lr", (-2, 0))):
        logs = np.log10(values[name])
        assert logs.min() > decades[0]
        assert logs.max() < decades[1]
        counts = np.histogram(logs, bins=4, range=decades)[0]
        assert counts.tolist() == [16] * 4 if draw == "sobol" else counts.min() > 5
    again = search.draw(study.search)
    np.testing.assert_array_equal(again["tv"], values["tv"])


def test_rungs_trade_candidates_for_iterations():
    assert search.rungs(64, 3, 480) == [(64, 30), (16, 120), (4, 480)]
    assert search.rungs(3, 2, 1) == [(3, 1), (1, 1)]


def test_an_exact_candidate_wins(tmp_path, monkeypatch):
    def exact(*arguments):
        measured = fake_measure([])(*arguments)
        return measured | {"psnr": [np.nan, np.inf, *measured["psnr"][2:]]}

    monkeypatch.setattr(search, "measure", exact)
    command = ["--space", "tv=1e-4:1", "lr=0.01:1", "--candidates", "4", "--rungs", "1"]
    assert search.main([*command, "--criterion", "psnr", "--out", str(tmp_path)]) == 0
    assert read(tmp_path)[0]["candidate"] == "1"


@pytest.mark.parametrize("criterion", ["objective", "psnr"])
def test_the_best_survives_and_becomes_a_sweep_file(criterion, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(search, "measure", fake_measure(calls))
    out = tmp_path / "found"
    flags = ["--space", "tv=1e-4:1", "lr=0.01:1", "--candidates", "32", "--rungs", "2"]
    command = [*flags, "--iterations", "400", "--criterion", criterion, "--out", str(out)]
    assert search.main(command) == 0
    assert calls == [(32, 100), (8, 400)]
    rows = read(out)
    last = [row for row in rows if row["rung"] == "1"]
    assert len(rows) == 40
    best, name, at = last[0], *(("tv", -2) if criterion == "objective" else ("lr", -1))
    distances = [abs(np.log10(float(row[name])) - at) for row in rows]
    assert abs(np.log10(float(best[name])) - at) == min(distances)
    assert {row["chosen_by"] for row in rows} == {criterion}

    study = reader.load_study(out / "best.toml", {})
    assert len(study.cells) == 1
    assert (study.cells[0].tv, study.cells[0].lr) == (float(best["tv"]), float(best["lr"]))
    assert study.cells[0].iterations == 400

    # Given again, nothing is computed again; another search does not join the folder.
    assert search.main(command) == 0
    assert len(calls) == 2
    assert read(out) == rows
    assert search.main([*command, "--seeds", "3"]) == 2
    assert "holds another search" in capsys.readouterr().err


def test_the_winner_keeps_what_the_machine_needs(tmp_path):
    flags = {"dataset": ["cifar10"], "data_dir": "sets", "memory": "3", "out": str(tmp_path)}
    study = reader.load_search({**flags, "space": ["tv=1e-4:1"]})
    search._write(study, [{"rung": 0, "tv": 0.5, "chosen_by": "psnr"}], "command")
    found = reader.load_study(tmp_path / "best.toml", {})
    assert (found.plan.data_dir, found.plan.memory, found.cells[0].tv) == ("sets", 3, 0.5)


def asked_of(monkeypatch, study, numbers):
    """The cell and the numbers that a rung attacks with."""
    asked = []

    class Asked(Exception):
        pass

    def attack_cell(cell, inputs, keys, numbers, resources):
        asked.extend((cell, numbers))
        raise Asked

    monkeypatch.setattr(cells, "attack_cell", attack_cell)
    inputs = SimpleNamespace(ids=np.zeros((1, 1), int))
    with pytest.raises(Asked):
        search.measure(study, inputs, numbers, 3, Console(quiet=True))
    return asked


def test_a_rung_draws_no_error_bars(monkeypatch):
    study = reader.load_search({"attack": ["bayes"], "space": ["damping=0.1:1"], "seeds": "1"})
    cell, _ = asked_of(monkeypatch, study, {"damping": np.array([0.1, 0.5])})
    assert (cell.posterior, study.cell.posterior) == (0, 32)


def test_candidates_take_the_client_to_have_other_rates_and_it_has_its_own(monkeypatch):
    flags = {"client_epochs": ["2"], "client_lr": ["0.2"], "seeds": "1"}
    study = reader.load_search({**flags, "space": ["assumed_lr=0.01:1"]})
    cell, numbers = asked_of(monkeypatch, study, {"assumed_lr": np.array([0.1, 0.5])})
    assert cell.client_lr == 0.2
    assert numbers["client_lr"].tolist() == [0.1, 0.5]


def test_a_candidate_beside_others_is_measured_as_if_alone():
    """Candidates, seeds and targets keep their places: each candidate's means are its own."""
    flags = {"model": ["mlp"], "width": ["8"], "space": ["tv=1e-4:1", "lr=0.01:1"]}
    study = reader.load_search({**flags, "targets": "2", "seeds": "3", "candidates": "2"})
    inputs = cells.Loader(study.plan, split="train")(study.cell)
    console = Console(quiet=True)
    numbers = {"tv": np.array([1e-3, 1.0, 1e-2]), "lr": np.array([0.01, 0.3, 0.1])}
    together = search.measure(study, inputs, numbers, 3, console)
    own = {name: values[1:2] for name, values in numbers.items()}
    alone = search.measure(study, inputs, own, 3, console)
    for name in together:
        np.testing.assert_allclose(together[name][1], alone[name][0], rtol=1e-4)
    assert len(set(np.round(together["psnr"], 3))) == 3  # else their places could not be told
    assert together["failed"] == [0, 0, 0]
