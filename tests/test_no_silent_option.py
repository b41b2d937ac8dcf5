"""No silent option: every setting leaves its default in a run, and changes the rows or is refused.

One sweep for each family of attacks, on a perceptron of eight units: a cell for each setting that
differs from a base cell in that one alone, two steps each.
"""

import functools
import json
import sys
import types

import flax.linen as nn
import jax
import numpy as np
import pytest

from jaxinv import data, learned, networks, sweep
from jaxinv.attacks import levenberg_marquardt as lm
from jaxinv.engine import assembly, cells
from jaxinv.errors import UserError
from jaxinv.networks.layers import normalize
from jaxinv.runs import results
from jaxinv.settings import reader, schema
from jaxinv.victim import checkpoints
from jaxinv.victim.untrained import untrained

FAMILIES = ("geiping", "bayes", "smoothed_bayes", "analytic", "spear", "unmix", "learned")
TINY = {"model": "mlp", "width": 8}
# What a setting is tried beside, where the base cell is not enough; and its value there.
LOCAL = {"images": 2, "client_batch": 1, "client_epochs": 2, "client_lr": 0.5}
NORMED = {"model": "normed", "width": None, "images": 2}
CHANGES = {
    "dataset": ({}, "dots"),
    "model": ({"width": None}, "lenet_zhu"),
    "width": ({}, 4),
    "network_seed": ({}, 1),
    "victim": ({"model": "lenet_zhu", "width": None}, "lenet_zhu-tiles"),
    "batch_norm": (NORMED, "train"),
    "images": ({}, 2),
    "grouping": ({"images": 2}, "repeated"),
    "client_epochs": (LOCAL, 1),
    "client_batch": (LOCAL, 2),
    "client_lr": (LOCAL, 0.1),
    "shuffled": (LOCAL, True),
    "server": ({}, "malicious"),
    "bins": ({"server": "malicious"}, 16),
    "amplify": ({"server": "malicious"}, 10.0),
    "assumed_images": ({"images": 2, "labels": "counts"}, 1),
    "assumed_batch": (LOCAL, 2),
    "assumed_lr": (LOCAL, 0.1),
    "labels": ({}, "joint"),  # a rule may find the true ones, and change nothing
    "defense": ({}, "noise:1e-2"),
    "adaptive": ({"defense": "prune:0.5"}, True),
    "attack": ({}, "modern"),
    "objective": ({}, "l2"),
    "tv": ({}, 0.1),
    "tv_isotropic": ({}, 0.1),
    "tv_color": ({}, 0.1),
    "prior_l2": ({}, 0.1),
    "prior_batch_norm": (NORMED, 0.1),
    "prior_group": ({}, 0.1),
    "prior_features": ({}, 0.1),
    "prior_epoch_order": (LOCAL | {"shuffled": True}, 0.1),
    "prior_autoencoder": ({}, 0.1),
    "prior_denoiser": ({}, 0.1),
    "autoencoder": ({"prior_autoencoder": 0.1}, "other-autoencoder"),
    "denoiser": ({"prior_denoiser": 0.1}, "other-denoiser"),
    "inverter": ({}, "other-inverter"),
    "optimizer": ({}, "sgd"),
    "sign": ({}, "soft"),
    "lr": ({}, 0.05),
    "schedule": ({}, "constant"),
    "init": ({}, "uniform"),
    "box": ({}, False),
    "simulation": (LOCAL, "surrogate"),
    "representation": ({}, "whitened"),
    "layers": ({}, "deep_first"),
    "entries": ({}, 0.5),
    "exchange": ({}, "halving"),
    "prior_schedule": ({}, "decay"),
    "iterations": ({}, 3),
    "image_prior": ({}, "photographs"),
    "anneal_from": ({}, 10.0),
    "anneal_to": ({}, 0.5),
    "cg_iterations": ({}, 2),
    "damping": ({}, 0.5),
    "tolerance": ({}, 1e6),
    "posterior": ({}, 4),
    "draws": ({}, 4),
    "inflation": ({}, 5.0),
    "polish": ({"precision": "float64"}, 1),
    "gram": ({}, "on"),
    "precision": ({}, "float64"),
}
OF_SECOND_ORDER = {"attack": "analytic", "objective": "cosine", "init": "prior"}
OWN_VALUES = {
    "bayes": OF_SECOND_ORDER,
    "smoothed_bayes": OF_SECOND_ORDER,
    "analytic": {"attack": "spear"},
    "spear": {"attack": "analytic"},
    "unmix": {"attack": "analytic"},
    "learned": {"attack": "analytic"},
}
# How the work is done, not what: the rows may agree to rounding.
OF_EXECUTION = {"gram"}
BASES = {
    "geiping": TINY | {"attack": "geiping", "tv": 0.01, "iterations": 2},
    "bayes": TINY
    | {
        "model": "perceptron",
        "attack": "bayes",
        "iterations": 2,
        "cg_iterations": 3,
        "posterior": 0,
        "anneal_to": 1.0,
    },
    "smoothed_bayes": TINY
    | {"attack": "smoothed_bayes", "iterations": 2, "cg_iterations": 3, "draws": 2},
    "analytic": TINY | {"attack": "analytic"},
    "spear": TINY | {"attack": "spear"},
    "unmix": TINY | {"attack": "unmix"},
    "learned": TINY | {"attack": "learned", "inverter": "an-inverter"},
}
OF_MATCHING = {
    "tv",
    "tv_isotropic",
    "tv_color",
    "prior_l2",
    "prior_batch_norm",
    "prior_group",
    "prior_features",
    "prior_epoch_order",
    "prior_autoencoder",
    "autoencoder",
    "optimizer",
    "sign",
    "lr",
    "schedule",
    "box",
    "representation",
    "layers",
    "entries",
    "exchange",
    "simulation",
    "prior_schedule",
    "gram",
}
# What each family refuses: what it has no use for, and what it is not made for.
STEPS = {"client_epochs", "client_batch", "client_lr", "shuffled", "assumed_batch", "assumed_lr"}
ANNEALED = {"anneal_from", "anneal_to", "damping", "tolerance", "posterior"}
SMOOTHED = {"draws", "inflation"}
DENOISED = {"prior_denoiser", "denoiser"}
SECOND_ORDER = {"image_prior", "cg_iterations"} | ANNEALED | SMOOTHED
IMPRINTED = {"server", "bins", "amplify"}
CONVOLVED = {"model", "victim", "batch_norm"}  # the settings that are tried on a convolution
NO_CLOSED_FORM = {"init", "iterations", "polish", "adaptive", "labels"} | CONVOLVED | STEPS
REFUSED = {
    "geiping": SECOND_ORDER | {"inverter"},
    # No other attack has their base cell's settings.
    # It is for no network with kinks, such as an imprint's.
    "bayes": OF_MATCHING | SMOOTHED | IMPRINTED | {"attack", "inverter"},
    "smoothed_bayes": OF_MATCHING
    | ANNEALED
    | DENOISED
    | STEPS
    | CONVOLVED
    | {"attack", "labels", "inverter"},
    "analytic": OF_MATCHING | SECOND_ORDER | DENOISED | NO_CLOSED_FORM | {"inverter"},
    "spear": OF_MATCHING | SECOND_ORDER | DENOISED | NO_CLOSED_FORM | {"inverter"},
    "unmix": OF_MATCHING | SECOND_ORDER | DENOISED | NO_CLOSED_FORM | {"inverter"},
    # An inverter is for the updates of one network, defended as it has learned; its base cell is
    # no other attack's.
    "learned": OF_MATCHING
    | SECOND_ORDER
    | DENOISED
    | NO_CLOSED_FORM
    | {"width", "network_seed", "defense", "attack", "images", "grouping", "assumed_images"}
    | IMPRINTED,
}
MEASURED = ("psnr", "ssim", "mse", "objective", "prior", "label_accuracy", "update_error", "status")


class Normed(nn.Module):
    """The least network with BatchNorm."""

    classes: int

    @nn.compact
    def __call__(self, x, train=False):
        x = normalize(nn.Conv(4, (3, 3), strides=4)(x), "batch", train)
        return nn.Dense(self.classes)(nn.sigmoid(x).reshape(len(x), -1))


def learn(folder, kind, seed):
    """A checkpoint of what an attacker has trained, but for the training."""
    tiles = data.load("tiles", split="train")
    shape, classes = tiles.images.shape[1:], len(tiles.classes)
    key, width = jax.random.key(seed), 4
    entry = learned.KINDS[kind]
    variables = entry.network(width, int(np.prod(shape))).init(key, *entry.inputs(shape, classes))
    victim = untrained("mlp", classes=classes, width=8, seed=0, image_shape=shape)
    if kind == "inverter":
        scale = dict.fromkeys(("mean", "std"), np.ones(learned.nets.HASHED, np.float32))
        variables = {**variables, "scale": scale}
    told = {"kind": kind, "width": width, "dataset": "tiles", "images": 1, "recipe": {}}
    told |= {"classes": tiles.classes, "image_shape": shape, "victim_digest": victim.digest}
    told |= {"defense": "none", "epochs": 1, "steps": 1, "train_loss": 0.0, "test_loss": 0.0}
    told |= {"seconds": 0.0, "hardware": "", "versions": {}}
    checkpoints.write(folder, variables, learned.Info(**told).model_dump(exclude={"digest"}), [])


@pytest.fixture
def small(perceptron, monkeypatch, tmp_path):
    """A second data set, a small network, trained things, and no report, spectrum or matrix."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("an-inverter", *(f"other-{kind}" for kind in learned.KINDS))):
        learn(tmp_path / checkpoints.FOLDER / name, name.split("-")[1], seed)
    read = data.load
    dots = types.ModuleType("dots")

    def other(name, split, ids, data_dir):
        tiles = read("tiles", split=split, ids=ids)
        return data.Dataset(**vars(tiles) | {"name": name, "images": 255 - tiles.images})

    dots.read = other
    monkeypatch.setitem(sys.modules, "dots", dots)
    monkeypatch.setitem(data.SOURCES, "dots", "dots")
    monkeypatch.setitem(
        networks.NETWORKS, "normed", networks.Network("Normed", Normed, None, smooth=True)
    )
    monkeypatch.setattr(sweep.report, "build", lambda folder, console: None)
    monkeypatch.setattr(cells, "WITH_SPECTRUM", 0)
    monkeypatch.setattr(
        assembly, "LevenbergMarquardt", functools.partial(lm.LevenbergMarquardt, columns=0)
    )
    monkeypatch.setattr(lm, "REUSES", 1)
    monkeypatch.setattr(lm, "CG_ITERATIONS", 3)


def written(folder, cells, **run):
    """A sweep file of these cells."""

    def spell(value):
        return json.dumps("published" if value is None else value)

    def table(values):
        return "".join(f"{k} = {spell(v)}\n" for k, v in values.items())

    path = folder / "study.toml"
    path.write_text(f"[run]\n{table(run)}" + "".join(f"[[vary]]\n{table(c)}" for c in cells))
    return path


def cell_of(folder, grid, run, load):
    """The one cell of a grid, as a run would take it.

    Raises:
      UserError: what a user is told of it.
    """
    (cell,) = reader.load_study(written(folder, [grid], **run), {}).cells
    load(cell)
    return cell


def test_every_setting_is_tried_with_another_value():
    assert set(CHANGES) == set(schema.Cell.model_fields)
    defaults = {name: field.default for name, field in schema.Cell.model_fields.items()}
    for name, (beside, value) in CHANGES.items():
        assert value != (defaults | BASES["geiping"] | beside)[name]


# Minutes each: `pytest -m slow`.
SLOW = {"geiping", "bayes", "smoothed_bayes", "spear", "unmix"}


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in FAMILIES]
)
def test_a_setting_changes_the_rows_or_is_refused(family, small, tmp_path):
    run = {"targets": 2, "seeds": 2}
    load = cells.Loader(schema.Plan(**run))
    refused, pairs = {}, {}
    for name, (beside, value) in CHANGES.items():
        base = BASES[family] | beside
        changed = base | {name: OWN_VALUES.get(family, {}).get(name, value)}
        if name == "victim":  # which says what network it is
            changed = {k: v for k, v in changed.items() if k not in schema.OF_VICTIM}
        try:
            cell = cell_of(tmp_path, changed, run, load)
            pairs[name] = base, changed, cell_of(tmp_path, base, run, load), cell
        except UserError as error:
            refused[name] = str(error)
    assert sorted(refused) == sorted(REFUSED[family]), refused
    assert all("\n" not in message and "--" in message for message in refused.values())

    grids = [grid for base, changed, *_ in pairs.values() for grid in (base, changed)]
    path = written(tmp_path, grids, **run)
    assert sweep.main([str(path), "--out", str(tmp_path / "run")]) == 0
    there, run = reader.load_study(path, {}).cells, results.read_run(tmp_path / "run")
    measured = {
        cell: [run.trials[name][run.trials["cell"] == i] for name in MEASURED]
        + list(run.extras(i).values())
        for i, cell in enumerate(there)
    }
    silent = {
        name
        for name, (*_, base, changed) in pairs.items()
        if agree(measured[base], measured[changed], 1e-5 if name != "precision" else 0)
    }
    assert silent <= OF_EXECUTION


def test_every_part_of_a_plan_is_used(small, tmp_path, monkeypatch):
    asked = {
        "target_ids": "17",
        "seeds": "2",
        "noise_seeds": "2",
        "memory": "1",
        "data_dir": str(tmp_path),
        "out": str(tmp_path / "run"),
    }
    # Targets: the runs above; how a reconstruction is judged: tests/test_likeness.py.
    assert {*asked, "targets", "judge", "lpips"} == set(schema.Plan.model_fields)
    read, folders = sys.modules["dots"].read, []

    def watched(name, split, ids, data_dir):
        folders.append(data_dir)
        return read(name, split, ids, data_dir)

    monkeypatch.setattr(sys.modules["dots"], "read", watched)
    base = ["--model", "mlp", "--width", "8", "--iterations", "1", "--tv", "0.01"]
    base += ["--dataset", "dots", "--defense", "noise:1e-3"]
    flags = [
        part for name, value in asked.items() for part in (f"--{name.replace('_', '-')}", value)
    ]
    assert sweep.main([*base, *flags]) == 0
    rows = results.read_run(tmp_path / "run").trials
    trials = list(zip(rows["target_id"], rows["noise_seed"], rows["seed"]))
    assert trials == [(17, 0, 0), (17, 0, 1), (17, 1, 0), (17, 1, 1)]
    assert set(folders) == {str(tmp_path)}
    little = [*base, "--memory", "1e-6", "--out", str(tmp_path / "little")]
    assert sweep.main(little) == 2


def agree(one, other, rtol):
    """Whether two cells measured the same."""
    if [x.shape for x in one] != [x.shape for x in other]:
        return False

    def close(a, b):
        return (a == b).all() if a.dtype == object else np.allclose(a, b, rtol=rtol, atol=0)

    return all(close(a, b) for a, b in zip(one, other))
