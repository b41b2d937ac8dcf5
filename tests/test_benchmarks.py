"""Every benchmark runs: what each prints at a toy size, never how long anything took."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1]))  # they are not installed

from benchmarks import (
    assembly,
    attack,
    attacks,
    kills,
    memory,
    precision,
    scaling,
    time_to_quality,
    training,
    training_profile,
)
from jaxinv.data.image_prior import ImageFacts, load_prior
from jaxinv.victim.untrained import untrained

QUICK = ["--seconds", "0.01"]
SMALL = (8, 8, 3)


def small(cell):
    """One tile of 8x8 pixels on LeNetZhu."""
    whole = assembly.tiles(cell, targets=1)
    scale = (tuple(np.asarray(x).tolist()) for x in whole.normalization)
    prior, _ = load_prior("photographs", ImageFacts("tiles", None, SMALL, *scale))
    victim = untrained("lenet_zhu", classes=10, width=None, seed=0, image_shape=SMALL)
    return whole._replace(victim=victim, images=whole.images[:, :, ::4, ::4], image_prior=prior)


@pytest.mark.slow
def test_attack(capsys, monkeypatch):
    monkeypatch.setitem(attack.CASES, "lenet_zhu", attack.Case(None, chunks=(2,)))
    monkeypatch.setattr(attack.os, "cpu_count", lambda: 1)  # PyTorch on one thread alone
    attack.main(["--networks", "lenet_zhu", "--sizes", "1x2", *QUICK])
    printed = capsys.readouterr().out
    assert "jaxinv" in printed
    assert "nn.Conv under vmap" in printed


@pytest.mark.slow
def test_attacks(capsys, monkeypatch):
    monkeypatch.setattr(attacks, "SIZE", (1, 2))
    monkeypatch.setitem(attacks.WHOLE, "bayes", {"iterations": 1, "cg_iterations": 2})
    monkeypatch.setitem(attacks.WHOLE, "analytic", attacks.DENSE | {"width": 16})
    names = ["geiping, adaptive to pruning", "bayes", "analytic"]
    attacks.main(["--attacks", *names, *QUICK])
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


def test_memory(capsys):
    memory.main(["--networks", "lenet_zhu", "--trials", "2"])
    assert "arithmetic" in capsys.readouterr().out


def test_scaling(capsys, monkeypatch):
    monkeypatch.setattr(scaling, "FACTORS", (1,))
    monkeypatch.setattr(scaling, "SEEDS", (4,))
    scaling.main(["--networks", "lenet_zhu", *QUICK])
    assert "batch" in capsys.readouterr().out


def test_precision(capsys, monkeypatch):
    monkeypatch.setattr(precision, "ROUNDINGS", {"bfloat16": 7})
    precision.main(["--networks", "lenet_zhu"])
    assert "truth + 0.05" in capsys.readouterr().out


def test_training(capsys, monkeypatch):
    monkeypatch.setattr(training, "BATCH", 8)
    monkeypatch.setattr(training, "MICROBATCHES", (4,))
    training.main(["--networks", "lenet_zhu", *QUICK])
    assert "images / s" in capsys.readouterr().out


def test_operations_of_a_profile_have_a_kind():
    program = """
  %fusion.1 = f32[2]{0} fusion(%p), calls=%c, metadata={op_name="jit(f)/jvp(M)/Conv_0/add"}
  ROOT %mul.2 = f32[2]{0} multiply(%p, %p), metadata={op_name="jit(f)/transpose(jvp(M))/Norm_0/mul"}
"""
    operations = training_profile.read_operations(program)
    kinds = {name: training_profile.kind_of(operation) for name, operation in operations.items()}
    assert kinds == {"fusion.1": "convolution, forward", "mul.2": "normalization, backward"}


@pytest.mark.slow
def test_time_to_quality(capsys, monkeypatch, tmp_path):
    toy = {"geiping": ((3,), 0), "bayes-polish": ((2,), 1)}
    for name, (steps, polish) in toy.items():
        line = time_to_quality.LINES[name]._replace(steps=steps, polish=polish)
        monkeypatch.setitem(time_to_quality.LINES, name, line)
    monkeypatch.setattr(time_to_quality.cells, "Loader", lambda plan: small)
    path = tmp_path / "figure.png"
    time_to_quality.main(["--targets", "1", "--attacks", *toy, "--out", str(path)])
    assert "mean color" in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")
    with open(path.with_suffix(".csv"), newline="") as file:
        rows = [(row["attack"], row["steps"]) for row in csv.DictReader(file)]
    # The polish goes on behind the attack's last step.
    assert rows == [("geiping", "3"), ("bayes-polish", "2"), ("bayes-polish", "3")]


@pytest.mark.slow
def test_kills(capsys):
    assert kills.main(["--kills", "2"]) == 0
    assert "all the same" in capsys.readouterr().out


def test_runs_stop_where_the_next_would_take_too_long():
    before = [time_to_quality.Point(100, 0.5, np.zeros(4))]  # 2 seconds in all
    assert time_to_quality.is_affordable(100, [], 0.0)
    assert time_to_quality.is_affordable(300, before, 6.0)
    assert not time_to_quality.is_affordable(301, before, 6.0)


def test_names_beside_the_panel_keep_their_distance():
    places = time_to_quality.spread([3.0, 1.0, 1.2, 9.0], 1.0)
    np.testing.assert_allclose(places, [3.0, 1.0, 2.0, 9.0])


def test_pytorch_takes_the_same_steps():
    pytest.importorskip("torch")
    cell = assembly.cell_of("geiping")
    inputs = small(cell)
    line = time_to_quality.Line("", steps=(8,))
    ours = time_to_quality.points(line, cell, inputs, limit=0.0)
    theirs = time_to_quality.pytorch_points(line, cell, inputs, limit=0.0)
    # Rounding turns a few signs over.
    np.testing.assert_allclose(ours[0].psnr, theirs[0].psnr, atol=0.02)
