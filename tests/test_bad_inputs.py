"""Bad input of every command: one line that names the setting and the fix, exit code 2, no trace.

Flags, sweep files, run folders, checkpoints, states of trainings, rungs of searches, updates, data
sets. Every row is refused before anything is compiled.
"""

import io
import json
import re
import shutil
import zipfile

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic_run import write_run

from jaxinv import files, prepare, report, search, sweep, train
from jaxinv.client import updates
from jaxinv.invert import __main__ as invert
from jaxinv.runs import results
from jaxinv.settings import reader
from jaxinv.victim import checkpoints

HUGE = "9" * 5000
DEEP = "[" * 100_000


def refused(command, arguments, message, folder, capsys):
    """Runs a command that must refuse: in one line, with nothing written."""
    before = contents(folder)
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert len(error) < 3000
    assert re.search(message, error.removeprefix("error: ").rstrip("\n")), error
    assert contents(folder) == before


def contents(folder):
    """Every file, but for the empty one that keeps other processes out."""
    files = {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}
    return {path: content for path, content in files.items() if path.name != ".lock"}


# Settings of a sweep that are wrong, do not go together, or would change nothing.
SETTINGS = [
    (["--model", "lenet"], "--model lenet: unknown; known are lenet_zhu, mlp, vit, convnet"),
    (["--objective", "cos"], "--objective cos: unknown; known are cosine, l2"),
    (["--tv", "-1"], "--tv -1: .*greater than or equal to 0"),
    (["--tv", "nan"], "--tv nan: .*finite"),
    (["--iterations", "ten"], "--iterations ten: .*integer"),
    (["--seeds", "0"], "--seeds 0: .*greater than or equal to 1"),
    (["--target-ids", "3,x"], "--target-ids x: .*integer"),
    (["--labels", "idlg", "--images", "2"], "--labels idlg reads one label"),
    (["--tv", "0.1", "0.1"], "a cell twice"),
    (["--model", "mobilenetv2", "--width", "4"], "--width 4: mobilenetv2 has widths that 8 div"),
    (["--defense", "noise:-1"], "--defense noise:-1: .*variance must be at least 0"),
    (["--defense", "noise:nan"], "--defense noise:nan: .*variance must be at least 0"),
    (["--defense", "prune:1.5"], "--defense prune:1.5: .*fraction must be .* at most 1"),
    (["--defense", "dpsgd:1:1", "--model", "convnet"], "BatchNorm .*use --model convnet_gn"),
    (["--defense", "dpsgd:1:1", "--client-epochs", "2"], "--defense dpsgd:1:1: of one gradient"),
    (["--defense", "victim"], "--defense victim: .*name one"),
    (["--adaptive", "true"], "--adaptive true: there is no --defense"),
    (
        ["--adaptive", "true", "--defense", "noise:1,clip:1"],
        "--defense noise:1,clip:1: an adaptive attacker does not know what clip makes of the noise",
    ),
    (["--prior-features", "1", "--labels", "joint"], "--prior-features: reads features by the"),
    (
        ["--attack", "learned", "--inverter", "x", "--batch-norm", "train"],
        "--batch-norm train: an inverter has learned from updates with eval",
    ),
    (["--attack", "bayes", "--tv", "0.1"], "--tv: --attack bayes does not use it"),
    (["--attack", "imprint"], "--attack imprint: .*give --server malicious"),
    (["--bins", "9"], "--bins 9: of an imprint; give --server malicious, or leave it out"),
    (["--bins", "1", "--server", "malicious"], "--bins 1: .*greater than or equal to 2"),
    (["--amplify", "10"], "--amplify 10.0: of an imprint; give --server malicious, or leave it"),
    (["--amplify", "0.1"], "--amplify 0.1: .*greater than or equal to 1"),
    (["--attack", "bayes", "--lr", "0.1"], "--lr: --attack bayes does not use it"),
    (["--attack", "geiping", "--damping", "0.1"], "--damping: --attack geiping does not use it"),
    (["--attack", "analytic", "--polish", "3"], "--polish: --attack analytic does not use it"),
    (
        ["--attack", "bayes", "--init", "normal"],
        "--init normal: --attack bayes does not begin so; use mean or prior",
    ),
    (["--init", "mean"], "--init mean: --attack geiping does not begin so; use normal or"),
    (
        ["--attack", "bayes", "--model", "convnet"],
        "--attack bayes: of smooth networks, not convnet; use --attack smoothed_bayes",
    ),
    (
        ["--attack", "bayes", "--server", "malicious"],
        "--attack bayes: of smooth networks, not lenet_zhu behind an imprint; use --attack smoo",
    ),
    (["--attack", "bayes", "--anneal-to", "200"], "--anneal-to 200: above --anneal-from 100"),
    (["--attack", "bayes", "--anneal-to", "0"], "--anneal-to 0: .*greater than 0"),
    (["--attack", "bayes", "--anneal-from", "-1"], "--anneal-from -1: .*greater than 0"),
    (["--attack", "bayes", "--image-prior", "dct"], "--image-prior dct: unknown; known are spec"),
    (["--attack", "bayes", "--posterior", "8", "--polish", "2"], "--posterior: of an image that"),
    (["--images", "1", "2", "--target-ids", "1,2"], "--target-ids .* several values of --images"),
    (["--width", "16"], "--width 16: lenet_zhu has one size"),
    (["--grouping", "repeated"], "--grouping repeated: of several images"),
    (["--client-lr", "0.1"], "--client-lr 0.1: the client takes one step"),
    (["--assumed-lr", "0.1"], "--assumed-lr 0.1: the client takes one step"),
    (
        [
            "--client-lr",
            "0.1",
            "--assumed-lr",
            "0.2",
            "--client-batch",
            "1",
            "--assumed-batch",
            "2",
            "--images",
            "2",
        ],
        "--assumed-lr 0.2: the client takes one step",
    ),
    (["--shuffled", "true", "--client-epochs", "2"], "--shuffled True: an epoch of one step"),
    (["--gram", "on", "--client-epochs", "2"], "--gram on: of one gradient"),
    (["--gram", "on", "--prior-features", "0.1"], "--gram on: .*without --prior-features"),
    (["--gram", "on", "--adaptive", "true", "--defense", "clip:1"], "--gram on: .*blind to the"),
    (["--noise-seeds", "4"], "--noise-seeds 4: no --defense here is random"),
    (["--noise-seeds", "4", "--defense", "prune:0.5"], "--noise-seeds 4: no --defense"),
    (["--simulation", "surrogate"], "--simulation surrogate: of several local steps"),
    (
        ["--simulation", "surrogate", "--client-epochs", "2", "--objective", "l2"],
        "--simulation surrogate: of several local steps .* with --objective cosine",
    ),
    (
        ["--simulation=surrogate", "--images=2", "--client-epochs=2", "--assumed-batch=1"],
        "--assumed-batch: --simulation surrogate takes one gradient",
    ),
    (["--seeds", "1", "--exchange", "halving"], "--exchange: looks at a target's other seeds"),
    (
        ["--exchange", "consensus", "--representation", "generator"],
        "--exchange consensus: takes means, which --representation generator has none of",
    ),
    (["--representation", "generator", "--box", "false"], "--box False: --representation gener"),
    (["--representation", "generator", "--init", "gray"], "--init gray: --representation gener"),
    (["--prior-schedule", "late", "--tv", "0"], "--prior-schedule late: no prior has a weight"),
    (["--seeds", "1", "--prior-group", "0.1"], "--prior-group: looks at a target's other seeds"),
    (["--data-dir", "/nowhere"], "--data-dir: the tiles ship with the package"),
    (["--memory", "1", "--attack", "analytic", "--model", "mlp"], "--memory: a closed form takes"),
    (["--attack", "analytic", "--labels", "joint"], "--labels joint: --attack analytic takes lab"),
    (["--attack", "analytic", "--images", "2", "--assumed-batch", "1"], "--assumed-batch: --att"),
    (["--attack", "learned"], "--attack learned: of an inverter that was trained; give --inverter"),
    (["--inverter", "x"], "--inverter x: of --init learned; give it, or leave the inverter out"),
    (["--inverter", "x", "--attack", "bayes"], "--inverter: --attack bayes does not use it"),
    (["--init", "learned"], "--init learned: of an inverter that was trained; give --inverter"),
    (["--init", "learned", "--inverter", "x"], "--seeds 32: of --init learned all are the same"),
    (
        ["--init", "learned", "--inverter", "x", "--exchange", "halving"],
        "--exchange: looks at other seeds, which --init learned makes the same",
    ),
    (["--entries", "0.7", "--exchange", "halving"], "--entries 0.7: seeds that compare different"),
    (
        ["--init", "learned", "--inverter", "x", "--labels", "joint"],
        "--init learned: an inverter takes labels as given",
    ),
    (
        ["--init", "learned", "--inverter", "x", "--client-epochs", "2"],
        "--init learned: of one gradient; leave --client-epochs",
    ),
    (["--attack", "learned", "--inverter", "x"], "--inverter x: no such checkpoint"),
    (["--denoiser", "x"], "--denoiser x: of --prior-denoiser; give its weight"),
    (["--prior-denoiser", "1", "--denoiser", "x"], "--denoiser x: no such checkpoint"),
    (
        ["--prior-denoiser", "1", "--denoiser", "prior-autoencoder-cifar10"],
        "--denoiser .*prior-autoencoder-cifar10: holds no denoiser",
    ),
    (
        ["--prior-denoiser", "1", "--denoiser", "lenet_zhu-tiles"],
        "--denoiser .*lenet_zhu-tiles: info.json: kind: Field required",
    ),
    (["--attack", "bayes", "--prior-denoiser", "2"], "--prior-denoiser 2: of --attack bayes the"),
    (["--prior-autoencoder", "-1"], "--prior-autoencoder -1: .*greater than or equal to 0"),
    (["--attack", "bayes", "--prior-autoencoder", "1"], "--prior-autoencoder: --attack bayes does"),
]
OF_SEARCH = [
    (["--space", "tv=1:0.1"], "give LOW:HIGH, 0 < LOW < HIGH, such as tv"),
    (["--space", "width=1:2"], "names are assumed_lr, lr, tv"),
    (["--space", "client_lr=0.1:1"], "names are assumed_lr, lr, tv"),
    (["--tv", "0.1"], "--tv: a search goes around one cell"),
    (["--iterations", "5", "6"], "--iterations: a search goes around one cell"),
    (["--criterion", "ssim"], "--criterion ssim"),
    (["--candidates", "0"], "--candidates 0"),
    (["--noise-seeds", "4", "--defense", "noise:1"], "--noise-seeds: a search draws a defense"),
    (["--space", "assumed_lr=0.1:1"], "--assumed-lr 0.1: the client takes one step"),
    (["--attack", "bayes", "--space", "prior_denoiser=0.1:5"], "--prior-denoiser 5: of --attack"),
    (
        ["--attack", "bayes", "--space", "anneal_from=1:100", "anneal_to=1e-6:2"],
        "--anneal-to 2: above --anneal-from 1;",
    ),
    (["--space", "prior_group=0.1:1"], "--prior-group: would draw the candidates together"),
    (["--simulation", "surrogate"], "--simulation surrogate: of several local steps"),
    (["--exchange", "halving"], "--exchange: would draw the candidates together"),
    (["--init", "learned", "--inverter", "x"], "--inverter: has learned from the images of a se"),
    (["--space", "prior_epoch_order=0.1:1"], "--prior-epoch-order compares the client's epochs"),
    (["--width", "16"], "--width 16: lenet_zhu has one size"),
    (["--polish", "1"], "--polish: takes hours for all candidates"),
    (["--judge", "lenet_zhu-tiles"], "--judge: no candidate is measured so; give it to the winner"),
    (["--lpips", "true"], "--lpips: no candidate is measured so"),
]
OF_TRAINING = [
    (["--stop-at", "epoch:9"], "--stop-at epoch:9: there are 3 --epochs"),
    (["--stop-at", "step:99999"], "--stop-at step:99999: there are"),
    (["--stop-at", "loss:1"], "--stop-at loss:1: give such as epoch:2, step:500 or accuracy:0.5"),
    (["--batch", "100000"], "--batch 100000: tiles has"),
    (["--schedule", "warm"], "known are step, cosine, one-cycle"),
    (["--model", "mobilenetv2", "--width", "9"], "widths that 8 divides"),
    (["--clip", "1"], "--clip: a setting of DP-SGD; add --dp"),
    (["--dp", "--delta", "1e-5"], "one of --noise-multiplier and --target-epsilon"),
    (["--dp", "--target-epsilon", "3"], "means nothing without its delta; give --delta"),
    (
        ["--dp", "--noise-multiplier", "1", "--delta", "1e-5", "--model", "convnet"],
        "under BatchNorm; use --model convnet_gn",
    ),
    (["--dp", "--noise-multiplier", "1", "--delta", "0.1"], "--delta 0.1: lets one of"),
    (["--dp", "--noise-multiplier", "-1", "--delta", "1e-5"], "--noise-multiplier -1: input"),
    (["--prior", "gan"], "--prior gan: unknown; known are denoiser, autoencoder"),
    (["--prior", "denoiser", "--inverter", "lenet_zhu-tiles"], "--inverter: not with --prior"),
    (["--prior", "denoiser", "--model", "mlp"], "--model: of a network that is attacked, not of"),
    (["--prior", "denoiser", "--batch", "4000"], "--batch 4000: tiles has"),
    (["--defense", "noise:1"], "--defense: of the updates that an inverter learns from"),
    (["--images", "2"], "--images: of the updates that an inverter learns from"),
    (["--inverter", "lenet_zhu-tiles", "--images", "3"], "--images 3: does not divide --batch"),
    (["--inverter", "nobody"], "--inverter nobody: no such checkpoint"),
    (["--inverter", "lenet_zhu-cifar10"], "--inverter was trained on cifar10 with 10 classes"),
]
ROWS = [
    *((sweep, *row) for row in SETTINGS),
    *((search, *row) for row in OF_SEARCH),
    *((train, ["--epochs", "3", *arguments], message) for arguments, message in OF_TRAINING),
]


@pytest.mark.parametrize(("command", "arguments", "message"), ROWS)
def test_settings(command, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(command, arguments, message, tmp_path, capsys)


# Values of every shape and size.
VALUES = {
    "seeds 23 digits": (sweep, ["--seeds", "9" * 23], "--seeds 9+: .*less than or equal"),
    "seeds 5,000 digits": (sweep, ["--seeds", HUGE], r"--seeds 9{200}\.\.\.: "),
    "seeds 1_0": (sweep, ["--seeds", "1_0"], "--seeds 1_0: write a number with plain digits"),
    "lr of other digits": (sweep, ["--lr", "٣"], "--lr ٣: write a number with plain digits"),
    "id 1_0": (sweep, ["--target-ids", "1_0"], "--target-ids 1_0: write a number"),
    "target twice": (sweep, ["--target-ids", "1,1"], "--target-ids: give each image once"),
    "two kinds of targets": (sweep, ["--target-ids", "1", "--targets", "2"], "leave --targets out"),
    "iterations 3e9": (sweep, ["--iterations", "3000000000"], "--iterations 3000000000: "),
    "width": (sweep, ["--model", "mlp", "--width", "100000000"], "--width 100000000: "),
    "network seed": (sweep, ["--network-seed", str(2**32)], "--network-seed 4294967296: "),
    "tv beyond float32": (sweep, ["--tv", "1e308"], r"--tv 1e308: beyond what float32 holds"),
    "defense beyond": (sweep, ["--defense", "noise:1e300"], "--defense noise:1e300: beyond"),
    "defense digits": (sweep, ["--defense", "noise:٣"], "--defense noise:٣: write it with plain"),
    "long chain": (sweep, ["--defense", ",".join(["noise:1"] * 50)], "a chain of 50; give 8"),
    "judge of another set": (
        sweep,
        ["--judge", "lenet_zhu-cifar10", "--dataset", "tiles"],
        "--judge lenet_zhu-cifar10: was trained on other images or classes",
    ),
    "judge that is the victim": (
        sweep,
        ["--judge", "lenet_zhu-tiles", "--victim", "lenet_zhu-tiles"],
        "--judge lenet_zhu-tiles: is the victim; name a network without a part",
    ),
    "long victim": (sweep, ["--victim", "a" * 5000], r"--victim a+\.\.\.: too long"),
    "long out": (sweep, ["--out", "x" * 300], r"--out x+\.\.\.: too long"),
    "out with NUL": (sweep, ["--out", "a\0b"], r"--out 'a\\x00b': no name of a file"),
    "out with a line": (sweep, ["--out", "a\nb"], r"--out 'a\\nb': no name of a file"),
    "out empty": (sweep, ["--out", ""], "--out : no name of a file"),
    "profile": (sweep, ["--profile", "/proc/xx", "--dry-run"], "--profile: cannot be made there"),
    "an abbreviation": (sweep, ["--iter", "1"], "unrecognized arguments: --iter"),
    "millions of cells": (
        sweep,
        ["--tv", *map(str, range(1, 5001)), "--lr", *map(str, range(1, 5001))],
        "the study has 25,000,000 cells; 10,000 at most",
    ),
    "endless study": (sweep, ["/dev/zero"], "sweep file /dev/zero cannot be read: more than"),
    "a folder": (sweep, ["."], r"sweep file \. cannot be read: Is a directory"),
    "training seed": (train, ["--seed", str(2**32)], "--seed 4294967296: "),
    "training out": (train, ["--out", "x" * 300], r"--out x+\.\.\.: too long"),
    "candidates": (search, ["--candidates", "100000000000"], "--candidates 100000000000: "),
    "rungs": (search, ["--rungs", "1000"], "--rungs 1000: "),
    "range twice": (search, ["--space", "tv=0.1:1", "tv=0.2:1"], "'tv' has two ranges; give one"),
    "range beyond": (search, ["--space", "lr=1e30:1e39"], "beyond what float32 holds"),
    "endless archive": (
        prepare,
        ["cifar10", "--archive", "/dev/zero", "--data-dir", "x"],
        "--archive /dev/zero: is no file",
    ),
    "update with NUL": (invert, ["--update", "a\0b"], r"--update 'a\\x00b': no name"),
    "classes": (invert, ["--update", "u", "--victim", "v", "--classes", "3,x"], "--classes x: "),
    "no such flag": (sweep, ["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    "more targets than there are": (sweep, ["--targets", "100000"], "100000"),
    "unknown data": (sweep, ["--dataset", "no_such_set"], "no_such_set: unknown|no_such_set"),
    "no dense layer first": (sweep, ["--attack", "analytic"], "need a network whose first layer"),
    "no dense layer, spear": (sweep, ["--attack", "spear"], "need a network whose first layer"),
    "patches of a batch": (
        sweep,
        ["--attack", "patches", "--model", "vit", "--images", "2", "--targets", "1"],
        "--attack patches: is for one image",
    ),
    "more images than neurons": (
        sweep,
        ["--attack", "unmix", "--model", "mlp", "--width", "2", "--images", "4", "--targets", "1"],
        "--images 4 are more than the first layer's 2 neurons",
    ),
    "no run folder": (report, ["nowhere"], "nowhere: no run.json there"),
    "no folder": (report, [], "the following arguments are required"),
    "report NUL": (report, ["a\0b"], "cannot be read"),
    "report long": (report, ["a" * 500], "cannot be read"),
    "success nan": (report, ["r", "--success-psnr", "nan"], "--success-psnr must be a finite"),
    "success underscore": (report, ["r", "--success-psnr", "1_0"], "--success-psnr: invalid float"),
    "success text": (report, ["r", "--success-psnr", "high"], "--success-psnr: invalid float"),
    "update missing": (
        invert,
        ["--update", "u.npz", "--victim", "lenet_zhu-tiles"],
        "--update u.npz: cannot be read as .npz, .safetensors",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(*VALUES[name], tmp_path, capsys)


SWEEP_FILES = {
    "nesting": ("grid = " + "[" * 50_000, "nest too deeply"),
    "closed nesting": ("grid = " + "[" * 20_000 + "]" * 20_000, "nest too deeply"),
    "dotted keys": ("a." * 30_000 + "a = 1", "nest too deeply"),
    "5,000 digits": (f"[run]\nseeds = {HUGE}", "cannot be read: "),
    "20 digits": ("[grid]\nnetwork_seed = 99999999999999999999", "--network-seed 9{20}: "),
    "50 MB": ("#" * 50_000_000, "more than 65,536 characters"),
    "millions of cells": (
        f"[grid]\ntv = {[*range(5000)]}\nlr = {[*range(1, 5001)]}",
        "the study has 25,000,000 cells",
    ),
    "true for a number": ("[run]\nseeds = true", "--seeds True: a number is wanted"),
    "true for a weight": ("[grid]\ntv = [true]", "--tv True: a number is wanted"),
    "1 for true": ("[grid]\nbox = 1", "--box 1: give true or false"),
    "a list in a list": ("[grid]\nattack = [['dlg']]", "--attack .'dlg'.: .* valid string"),
    "targets twice": ("[run]\ntargets = 1\ntarget_ids = [1]", "leave --targets out"),
    "no targets": ("[run]\ntarget_ids = []", r"--target-ids \[\]: .*at least 1"),
}


@pytest.mark.parametrize("name", SWEEP_FILES)
def test_sweep_files(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, message = SWEEP_FILES[name]
    (tmp_path / "study.toml").write_text(text)
    refused(sweep, ["study.toml"], message, tmp_path, capsys)


def raw(file, content):
    """A change of a folder: another content of a file, which may be a pattern."""

    def change(folder):
        (path,) = folder.glob(file)
        path.write_bytes(content)

    return change


def cut(file):
    """A change of a folder: half of a file."""

    def change(folder):
        (path,) = folder.glob(file)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return change


def fields(file, **values):
    """A change of a folder: other values in a JSON file; None for a key that is gone."""

    def change(folder):
        there = json.loads((folder / file).read_text()) | values
        lacking = {key for key, value in values.items() if value is None}
        there = {key: value for key, value in there.items() if key not in lacking}
        (folder / file).write_text(json.dumps(there))

    return change


def rows(change):
    """A change of a run: other rows."""

    def apply(folder):
        (path,) = (folder / "trials").iterdir()
        pq.write_table(change(pq.read_table(path)), path)

    return apply


def pictures(change):
    """A change of a run: other arrays in place of its pictures."""

    def apply(folder):
        (path,) = (folder / "images").iterdir()
        np.savez(path, **change(dict(np.load(path))))

    return apply


def gone(name):
    """A change of a folder: a part of it is not there."""
    return lambda folder: shutil.rmtree(folder / name)


def in_the_way(name, kind):
    """A change of a folder: something else has the place of a file or folder."""
    return lambda folder: getattr(folder / name, kind)()


def flipped(table):
    """Rows with another number in place of the version."""
    version = pa.array([results.SCHEMA_VERSION - 1] * len(table), pa.int32())
    return table.set_column(
        table.schema.get_field_index("schema_version"), "schema_version", version
    )


NOT_OF_RUN = "the two are not of one run"
RUNS = {
    "run.json empty": (raw("run.json", b""), "r/run.json cannot be read"),
    "run.json torn": (cut("run.json"), "r/run.json cannot be read"),
    "run.json no text": (raw("run.json", b"\xff\xfe"), "r/run.json cannot be read"),
    "run.json deep": (raw("run.json", DEEP.encode()), "r/run.json cannot be read .*too deeply"),
    "run.json a list": (raw("run.json", b"[]"), "r/run.json is no table of settings"),
    "run.json null": (raw("run.json", b"null"), "r/run.json is no table of settings"),
    "run.json of another version": (fields("run.json", schema_version=1), "written with schema 1"),
    "no cells": (fields("run.json", cells=None), "run.json: cells: Field required"),
    "no axes": (fields("run.json", axes=None), "run.json: axes: Field required"),
    "no sessions": (fields("run.json", sessions=None), "run.json: sessions: Field required"),
    "cells a number": (fields("run.json", cells=3), "run.json: cells: .*valid list"),
    "cells of nothing": (fields("run.json", cells=[{}]), "run.json: cells: .*a cell has no "),
    "cells of none": (fields("run.json", cells=[]), "run.json: cells: .*at least 1"),
    "axes of strangers": (fields("run.json", axes={"x": [1]}), "run.json: axes: .*x is no setting"),
    "sessions of nothing": (fields("run.json", sessions=[{}]), "run.json: sessions.0.started: "),
    "study of nothing": (fields("run.json", study=3), "run.json: study: "),
    "another target": (fields("run.json", target_ids=[7]), f"target_id 11.*{NOT_OF_RUN}"),
    "targets of no cell": (fields("run.json", targets=[]), "run.json: targets: .*are 1 cells"),
    "another cell's targets": (
        fields("run.json", targets=[{"ids": [7], "digest": "0"}]),
        f"target_id 11.*{NOT_OF_RUN}",
    ),
    "fewer seeds": (fields("run.json", seeds=[0]), f"does not know seed 1.*{NOT_OF_RUN}"),
    "more seeds": (fields("run.json", seeds=[*range(9)]), f"knows seed 4.*{NOT_OF_RUN}"),
    "trials gone": (gone("trials"), "no finished trials yet"),
    "traces gone": (gone("traces"), "traces/c0000-t0000.parquet: cannot be read"),
    "images gone": (gone("images"), "r/images: cell 0 has no reconstructions"),
    "trials torn": (cut("trials/*"), "trials/c0000-t0000.parquet: cannot be read"),
    "trials empty": (raw("trials/*", b""), "trials/c0000-t0000.parquet: cannot be read"),
    "traces torn": (cut("traces/*"), "traces/c0000-t0000.parquet: cannot be read"),
    "images torn": (cut("images/*"), "images/c0000-t0000.npz: cannot be read"),
    "images empty": (raw("images/*", b""), "images/c0000-t0000.npz: cannot be read"),
    "images no zip": (raw("images/*", b"PK\3\4"), "images/c0000-t0000.npz: cannot be read"),
    "extras torn": (
        lambda run: write_file(run / "extras" / "c0000-t0000.npz", b"PK\3\4"),
        "extras/c0000-t0000.npz: cannot be read",
    ),
    "rows dropped": (rows(lambda t: t.slice(0, 3)), "knows seed 3|each seed of each target once"),
    "rows twice": (rows(lambda t: pa.concat_tables([t, t])), "each seed of each target once"),
    "no rows": (rows(lambda t: t.slice(0, 0)), "it has no rows"),
    "a column gone": (rows(lambda t: t.drop_columns(["psnr"])), "columns are not those of this"),
    "rows of another version": (rows(flipped), "its rows are of another version"),
    "pickled": (pictures(lambda a: a | {"truths": np.array([{}], object)}), "Object arrays"),
    "smaller": (pictures(lambda a: a | {"truths": a["truths"][:, :, :3]}), "not those of its tr"),
    "text": (pictures(lambda a: a | {"truths": a["truths"].astype(str)}), "not those of its tr"),
    "seeds fewer": (
        pictures(lambda a: a | {"reconstructions": a["reconstructions"][:, :1]}),
        "not those of its trials",
    ),
    "numbers": (pictures(lambda a: dict.fromkeys(a, np.zeros(()))), "cannot be read"),
    "plots a file": (in_the_way("plots", "touch"), "r/plots is a file; move it away"),
    "page a folder": (in_the_way("report.html", "mkdir"), "r/report.html is a folder; move"),
}


def write_file(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize("name", RUNS)
def test_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # What is in the way of the report is seen when it is made: of a run that is quick to report.
    quick = name in ("plots a file", "page a folder")
    write_run(tmp_path / "r", seeds=1 if quick else 4, targets=1 if quick else 2)
    change, message = RUNS[name]
    change(tmp_path / "r")
    refused(report, ["r"], message, tmp_path, capsys)


VICTIM = checkpoints.find("lenet_zhu-tiles").absolute()
CHECKPOINTS = {
    "a list": (raw("info.json", b"[]"), "info.json holds no settings"),
    "torn": (cut("info.json"), "info.json cannot be read .damaged"),
    "deep": (raw("info.json", DEEP.encode()), "info.json cannot be read .damaged"),
    "no text": (raw("info.json", b"\xff\xfe{"), "info.json cannot be read .damaged"),
    "no seed": (fields("info.json", recipe={}), "recipe.seed: no seed of a network"),
    "seed text": (fields("info.json", recipe={"seed": "x"}), "recipe.seed: no seed"),
    "seed true": (fields("info.json", recipe={"seed": True}), "recipe.seed: no seed"),
    "seed huge": (fields("info.json", recipe={"seed": 10**30}), "recipe.seed: no seed"),
    "images huge": (fields("info.json", image_shape=[10**9, 9, 3]), "info.json: image_shape.0"),
    "accuracy nan": (fields("info.json", test_accuracy=np.nan), "info.json: test_accuracy"),
    "mean infinite": (fields("info.json", mean=[np.inf] * 3), "info.json: mean.0: .*finite"),
    "std nan": (fields("info.json", std=[np.nan] * 3), "info.json: std.0: "),
    "a width": (fields("info.json", width=5), "width: lenet_zhu has one size, not 5"),
    "no classes": (fields("info.json", classes=[]), "made for another network"),
    "arrays gone": (gone("arrays"), "arrays/ cannot be read .missing or damaged"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    change, message = CHECKPOINTS[name]
    shutil.copytree(VICTIM, "victim")
    change(tmp_path / "victim")
    arguments = ["--victim", "victim", "--targets", "1", "--seeds", "1", "--tv", "0.01"]
    refused(sweep, arguments, message, tmp_path, capsys)


# Of a training's folder, and of the state beside it: what is there, and the message.
LOG = {"epoch": 1, "step": 5, "train_accuracy": 0.5, "test_accuracy": 0.5}
TRAINED = {
    "no recipe": (b"{}", "its recipe is damaged"),
    "recipe null": (b'{"recipe": null}', "its recipe is damaged"),
    "a list": (b"[]", "info.json holds no settings"),
    "torn": (b"{", "info.json cannot be read"),
    "deep": (DEEP.encode(), "info.json cannot be read"),
    "another's": (b'{"recipe": {}}', "holds a training with"),
}
STATES = {
    "no recipe": ({"recipe": None}, "its recipe is damaged"),
    "another's": ({"recipe": {}}, "holds a training with dataset None"),
    "no sums": ({"within": None}, "not what a training writes .within: Field required"),
    "sums text": ({"within": ["a", "b"]}, "not what a training writes .within"),
    "log a number": ({"log": 3}, "not what a training writes .log"),
    "rows of nothing": ({"log": [{}]}, "not what a training writes .log: .*lacks a column"),
    "rows numbers": ({"log": [1]}, "not what a training writes .log.0"),
    "more epochs than steps": ({"log": [LOG] * 9}, "logs 9 epochs, its state has taken 0 steps"),
    "seconds text": ({"seconds": "x"}, "not what a training writes .seconds"),
    "digest": ({"digest": "0"}, "is not the digest in info.json: damaged"),
}
TRAINING = ["--epochs", "1", "--batch", "64"]


@pytest.mark.parametrize("name", TRAINED)
def test_trained(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content, message = TRAINED[name]
    (tmp_path / "k" / "x").mkdir(parents=True)
    (tmp_path / "k" / "x" / "info.json").write_bytes(content)
    refused(train, [*TRAINING, "--out", "k/x"], message, tmp_path, capsys)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """A training that has not begun, and its state on disk."""
    folder = tmp_path_factory.mktemp("trainings") / "x"
    given = {"epochs": "1", "batch": "64", "out": str(folder)}
    trainer = train.Trainer(reader.load_training(given))
    trainer._write_state()
    return trainer.state_folder


@pytest.mark.parametrize("name", STATES)
def test_states(name, state, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    values, message = STATES[name]
    shutil.copytree(state, tmp_path / "k" / ".x.training")
    fields("info.json", **values)(tmp_path / "k" / ".x.training" / "step00000000")
    refused(train, [*TRAINING, "--out", "k/x"], message, tmp_path, capsys)


def test_a_file_in_the_place_of_a_trainings_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k").touch()
    refused(train, [*TRAINING, "--out", "k/x"], "cannot be written|Not a dir", tmp_path, capsys)


RUNGS = {
    "a list": (b"[]", "rung0.json is no rung of a search"),
    "no asked": (b'{"measured": {}}', "rung0.json is no rung of a search"),
    "null": (b"null", "rung0.json is no rung of a search"),
    "torn": (b"{", "rung0.json cannot be read"),
    "deep": (DEEP.encode(), "rung0.json cannot be read .*too deeply"),
    "another's": (b'{"asked": 1, "measured": {}}', "holds another search"),
}


@pytest.mark.parametrize("name", RUNGS)
def test_rungs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content, message = RUNGS[name]
    write_file(tmp_path / "o" / "rung0.json", content)
    refused(search, ["--space", "tv=0.01:1", "--out", "o"], message, tmp_path, capsys)


def bomb(name):
    """A zip a thousandth of its size, of an array that would be 8 GB."""
    header, packed = io.BytesIO(), io.BytesIO()
    shape = {"descr": "<f8", "fortran_order": False, "shape": (10**9,)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.npy", header.getvalue() + bytes(10**6))
    return packed.getvalue()


UPDATES = {
    "complex": (lambda x: x.astype(complex), [], "holds complex128; an update is of real"),
    "text": (lambda x: x.astype(str), [], "holds .* more than the network's|real numbers"),
    "dates": (lambda x: x.astype(int).astype("M8[s]"), [], "holds datetime64"),
    "fields": (lambda x: np.zeros(x.shape, [("a", "f4")]), [], "an update is of real numbers"),
    "beyond": (lambda x: x * 1e300, [], "its norm is inf; scale it into"),
    "nan": (lambda x: x * np.nan, [], "has 12 NaN of 12 numbers"),
    "zeros": (lambda x: x * 0, [], "is zero in all layers"),
    "booleans": (lambda x: x > 0, [], "holds bool; an update is of real numbers"),
    "class 99": (lambda x: x, ["--classes", "99"], "99 is no class; the network has 7"),
    "out a file": (lambda x: x, ["--out", "u.npz"], "u.npz is a file; give a folder"),
}


@pytest.mark.parametrize("name", UPDATES)
def test_updates(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    change, arguments, message = UPDATES[name]
    params = checkpoints.load_victim(VICTIM).variables["params"]
    np.savez("u.npz", **updates.names_of(jax.tree.map(lambda x: change(np.float64(x)), params)))
    few = ["--update", "u.npz", "--victim", "lenet_zhu-tiles", "--seeds", "1"]
    refused(invert, [*few, *arguments], message, tmp_path, capsys)


@pytest.mark.parametrize("name", ["Conv_0/kernel", "other"])
def test_a_bomb_is_no_update(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "u.npz").write_bytes(bomb(name))
    arguments = ["--update", "u.npz", "--victim", "lenet_zhu-tiles"]
    refused(invert, arguments, "far more than the network's", tmp_path, capsys)


def test_a_bomb_is_no_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "MOST_UNPACKED", 10**5)
    (tmp_path / "own.npz").write_bytes(bomb("images"))
    message = "own.npz: cannot be read as .npz .would take"
    refused(sweep, ["--dataset", "own.npz"], message, tmp_path, capsys)
