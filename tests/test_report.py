"""The report on made-up runs: it builds, and its numbers are those computed here anew."""

import csv
import io
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from synthetic_run import write_run

from jaxinv import report
from jaxinv.reporting.figures import pictures, style
from jaxinv.reporting.figures.swarm import swarms
from jaxinv.reporting.sections import SECTIONS
from jaxinv.reporting.sections.assumptions import choose
from jaxinv.reporting.sections.pixel_statistics import pixel_statistics, pixel_std
from jaxinv.reporting.sections.psnr_distribution import psnr_distribution
from jaxinv.reporting.sections.reconstructions import reconstructions
from jaxinv.reporting.sections.success_rate import success_rate
from jaxinv.reporting.study import choose_evenly, summarize
from jaxinv.reporting.wording import interval_text, number_text
from jaxinv.runs.results import read_run

TV = {"tv": [1e-2, 1e-3, 1e-4]}
FIGURES = {
    "psnr_by_step",
    "psnr_distribution",
    "reconstructions",
    "likeness",
    "pixel_statistics",
    "best_of_k",
    "variance_components",
    "success_rate",
    "paired_differences",
}
VARIANTS = {
    "one_trial": {"targets": 1, "seeds": 1},
    "two_axes": {"axes": {"tv": [0.01, 0.001], "objective": ["cosine", "<euclidean>"]}},
    "around": {"axes": {"tv": [0.01, 0.001], "lr": [0.1, 0.01]}, "around_first": True},
    "images": {"targets": 2, "images": 6, "axes": {"lr": [0.1, 0.01]}},
    "unfinished": {"axes": TV, "missing_cells": (1,)},
    "all_failed": {"targets": 1, "seeds": 2, "failed": [(0, 0, 0), (0, 0, 1)]},
}


TABLES = {section.name: section.table for section in SECTIONS if section.table is not None}


def build(folder, **options):
    output = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.build(folder, console=Console(file=output, width=100), **options)
    return output.getvalue()


def read_csv(folder, name):
    with open(folder / "tables" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Three cells with one failed and one exact trial, and its report."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, axes=TV, targets=3, seeds=5, failed=[(1, 0, 2)], exact=[(2, 1, 4)])
    return folder, build(folder)


def column(folder, cell, name):
    trials = read_run(folder).trials
    return trials[name][trials["cell"] == cell].reshape(3, 5)


def test_everything_is_written(study):
    folder, printed = study
    written = {path.name for path in (folder / "plots").iterdir()}
    assert written == {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    assert {path.name for path in (folder / "tables").iterdir()} == {
        "summary.csv",
        "per_target.csv",
        "best_of_k.csv",
        "likeness.csv",
        "variance_components.csv",
        "paired_differences.csv",
    }
    assert "tv = 0.0001" in printed
    assert not list(folder.glob(".*"))


def test_summary_equals_what_is_computed_anew(study):
    folder, _ = study
    row = read_csv(folder, "summary")[0]
    psnr, objective = column(folder, 0, "psnr"), column(folder, 0, "objective")
    picked = psnr[np.arange(3), objective.argmin(axis=1)]
    expected = {
        "targets": 3,
        "seeds": 5,
        "failed": 0,
        "exact": 0,
        "psnr_mean": psnr.mean(),
        "psnr_seed_std": np.sqrt(psnr.var(axis=1, ddof=1).mean()),
        "psnr_median": np.median(psnr),
        "psnr_attacker_best": picked.mean(),
        "psnr_oracle_best": psnr.max(axis=1).mean(),
        "baseline_psnr": column(folder, 0, "baseline_psnr").mean(),
        "ssim_mean": column(folder, 0, "ssim").mean(),
        "mse_mean": column(folder, 0, "mse").mean(),
        "success_rate": (psnr > 19).mean(),
    }
    for name, value in expected.items():
        assert float(row[name]) == pytest.approx(value, rel=1e-6), name
    half = 4.302653 * psnr.mean(axis=1).std(ddof=1) / np.sqrt(3)
    assert float(row["psnr_high"]) == pytest.approx(psnr.mean() + half, rel=1e-6)


def test_the_consensus_is_that_of_the_pictures(study):
    folder, printed = study
    run = read_run(folder)
    pictures, objective = run.images(0), column(folder, 0, "objective")
    best = np.argsort(objective, axis=1)[:, :2]  # the quarter of five
    expected = {"quarter": best, "all": np.tile(np.arange(5), (3, 1))}
    for name, seeds in expected.items():
        mean = np.stack([r[s].mean(axis=0) for r, s in zip(pictures.reconstructions, seeds)])
        errors = ((mean - pictures.truths) ** 2).mean(axis=(1, 2, 3, 4)) / 255**2
        found = read_csv(folder, "per_target")[:3]
        values = [float(row[f"psnr_consensus_{name}"]) for row in found]
        assert values == pytest.approx(-10 * np.log10(errors), rel=1e-6)
        mean = pytest.approx(np.mean(values), rel=1e-6)
        assert float(read_csv(folder, "summary")[0][f"psnr_consensus_{name}"]) == mean
        curve = [row for row in read_csv(folder, "best_of_k") if row["cell"] == "0"]
        assert float(curve[-1][f"consensus_{name}_psnr"]) == mean
        assert float(curve[0][f"consensus_{name}_psnr"]) == float(curve[0]["attacker_psnr"])
        assert float(curve[-1][f"consensus_{name}_low"]) < np.mean(values)
    assert "consensus" in printed
    page = (folder / "report.html").read_text()
    shown = summarize(run, 19.0)
    cell = shown.cells[0]
    gain = cell.consensus.quarter.per_target[:, -1] - cell.pick.per_target[:, -1]
    half = 4.302653 * gain.std(ddof=1) / np.sqrt(3)
    assert (
        "Averaging the 2 of 5 seeds with the lowest objectives instead of picking one changes PSNR "
        f"at tv\u00a0=\u00a00.01: {gain.mean():+.1f} dB [{gain.mean() - half:.1f}, " in page
    )
    words = {text.get_text() for text in reconstructions(shown).texts}
    assert {"pick", "consensus", "worst"} <= words
    assert number_text(shown.cells[0].consensus.first_draw[0], 1) in words


def test_one_start_has_no_consensus(tmp_path):
    """Nothing is read for it, and nothing said; the columns repeat the only trial there is."""
    study = summarize(read_run(write_run(tmp_path, targets=2, seeds=1)), 19.0)
    next((tmp_path / "images").glob("*.npz")).rename(tmp_path / "away.npz")
    row = TABLES["summary"].rows(study)[0]
    assert row["psnr_consensus_quarter"] == row["psnr_consensus_all"] == row["psnr_mean"]
    (tmp_path / "away.npz").rename(tmp_path / "images" / "c0000-t0000.npz")
    assert "consensus" not in build(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Averaging" not in page
    assert "best ¼" not in page


def test_paired_differences_are_of_the_same_targets(study, tmp_path):
    folder, _ = study
    assert [r["psnr_difference"] for r in read_csv(folder, "paired_differences")] == ["nan", "inf"]
    write_run(tmp_path, axes=TV, targets=3, seeds=5)
    first, second = (column(tmp_path, cell, "psnr").mean(axis=1) for cell in (0, 1))
    row = TABLES["paired_differences"].rows(summarize(read_run(tmp_path), 19))[0]
    assert (row["setting"], row["reference"]) == ("tv = 0.001", "tv = 0.01")
    assert row["psnr_difference"] == pytest.approx((second - first).mean(), rel=1e-6)
    # Batches that begin at the same image are others where the rest of them is.
    summary = summarize(read_run(tmp_path), 19)
    summary.cells[1].image_ids[0].append(99)
    assert [pair.cell.number for pair in summary.pairs] == [2]


def test_failed_and_exact_trials_are_counted_and_not_averaged(study):
    folder, _ = study
    _, failed, exact, baseline = read_csv(folder, "summary")
    assert (failed["failed"], failed["exact"], failed["psnr_mean"]) == ("1", "0", "nan")
    psnr = column(folder, 1, "psnr")
    assert float(failed["success_rate"]) == pytest.approx(np.nansum(psnr > 19) / 15)
    assert float(failed["psnr_oracle_best"]) == pytest.approx(np.nanmax(psnr, axis=1).mean())
    assert (exact["exact"], exact["psnr_mean"]) == ("1", "inf")
    assert baseline["setting"] == "mean color"
    curve = [float(r["oracle_psnr"]) for r in read_csv(folder, "best_of_k") if r["cell"] == "1"]
    assert np.isnan(curve).tolist() == [True, False, False, False, False]


def test_page_stands_alone_and_says_what_it_must(study):
    folder, _ = study
    page = (folder / "report.html").read_text()
    outside = re.findall(r'(?:src|srcset|href)="(?!data:image/|#)([^"]*)"', page)
    assert outside == []
    assert "<script" not in page
    assert page.count("<figure>") == len(FIGURES)
    for words in (
        "How much do the seeds of one attack differ?",
        "python -m jaxinv.sweep --seeds",
        "cpu, 2 cores",
        "jax 0.10.2",
        "Dimitrov",
        "1 trial of 45 turned non-finite",
        "1 failed",
        "Wilson",
        "mean color",
        "attacker",
        "oracle",
    ):
        assert words in page, words
    psnr = column(folder, 0, "psnr")
    assert f"<td>{number_text(psnr.mean())} <small>" in page


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_build(tmp_path, name, monkeypatch):
    draw = style.to_bytes  # the vector files cost as much again and draw the same
    monkeypatch.setattr(style, "to_bytes", lambda f, s: draw(f, s) if s == "png" else b"")
    write_run(tmp_path, **VARIANTS[name])
    build(tmp_path)
    page = (tmp_path / "report.html").read_text()
    alone = not summarize(read_run(tmp_path), 19.0).pairs
    lucky = 3 * (name == "one_trial")  # nothing to say of seeds where there is one
    assert page.count("<figure>") == len(FIGURES) - 2 * alone - lucky
    assert "<euclidean>" not in page
    assert ("not finished: 16 of 24" in page) == (name == "unfinished")
    if name == "around":
        assert [cell.label for cell in summarize(read_run(tmp_path), 19.0).cells] == [
            "tv = 0.01, lr = 0.1",
            "lr = 0.01",
            "tv = 0.001",
        ]
    if name == "images":
        assert "4 of each target" in plots_text(tmp_path)


def plots_text(folder):
    """What the pictures' heading says."""
    study = summarize(read_run(folder), 19.0)
    return " ".join(text.get_text() for text in reconstructions(study).texts)


def test_images_too_small_for_ssim_have_a_report(tmp_path):
    """SSIM, and what is relative to it, is NaN: nothing of it is drawn or compared."""
    small = dict.fromkeys(("ssim", "rdlv", "baseline_ssim"), np.nan)
    facts = dict.fromkeys(range(3), small)
    axes = {"defense": ["none", "noise:0.1", "noise:1"]}
    write_run(tmp_path, axes=axes, level=[25, 20, 9], facts=facts)
    build(tmp_path)
    assert {row["ssim_mean"] for row in read_csv(tmp_path, "summary")} == {"nan"}
    assert {row["psnr_rank"] for row in read_csv(tmp_path, "likeness")} == {"1", "2", "3"}


def test_a_large_study_says_what_its_figures_leave_out(tmp_path):
    axes = {"lr": [0.1, 0.03, 0.01], "tv": [0.1, 0.01, 0.001]}
    write_run(tmp_path, axes=axes, targets=12, seeds=2, block_targets=5)
    study = summarize(read_run(tmp_path), 19.0)
    texts = [text.get_text() for text in psnr_distribution(study).texts]
    assert "the first 8 of 12 targets and 6 of 9 cells" in " ".join(texts)
    assert len(study.cells) == 9
    assert study.target_ids == read_run(tmp_path).config["target_ids"]


def test_figures_of_a_row_per_cell_say_how_many_they_show(tmp_path):
    axes = {"tv": np.geomspace(1e-6, 1, 60).tolist()}
    write_run(tmp_path, axes=axes, seeds=2, targets=1, seed_std=[0.3] * 60)
    study = summarize(read_run(tmp_path), 19.0)
    figure = success_rate(study)
    assert "Shown: 48 of 60 cells" in " ".join(text.get_text() for text in figure.texts)
    assert "Shown" not in " ".join(text.get_text() for text in success_rate_of(study, 40).texts)


def success_rate_of(study, cells):
    """The figure of a study's first cells."""
    return success_rate(type(study)(study.run, study.cells[:cells]))


def test_rows_in_any_order_give_the_same_study(tmp_path):
    run = read_run(write_run(tmp_path, axes=TV, targets=3, seeds=4))
    order = np.random.default_rng(0).permutation(len(run.trials["cell"]))
    shuffled = {name: column[order] for name, column in run.trials.items()}
    mixed = summarize(type(run)(run.folder, run.config, shuffled, run.traces), 19.0)
    for cell, other in zip(summarize(run, 19.0).cells, mixed.cells):
        np.testing.assert_array_equal(cell.psnr, other.psnr)
        assert cell.image_ids == other.image_ids


def test_bad_input_is_one_line_and_code_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    broken = write_run(tmp_path / "broken")
    next((broken / "trials").glob("*.parquet")).write_bytes(b"no parquet")
    lacking = write_run(tmp_path / "lacking")
    next((lacking / "images").glob("*.npz")).unlink()
    partly = write_run(tmp_path / "partly", block_targets=1)
    next((partly / "images").glob("*.npz")).unlink()
    cases = [
        [],
        [str(tmp_path / "nowhere")],
        [str(tmp_path / "empty")],
        [str(broken)],
        [str(lacking)],
        [str(partly)],
        [str(tmp_path), "--success-psnr", "high"],
        [str(write_run(tmp_path / "good")), "--success-psnr", "nan"],
    ]
    for arguments in cases:
        assert report.main(arguments) == 2, arguments
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, arguments
        assert lines[0].startswith("error: "), arguments


def test_pixel_std_by_hand():
    pictures = np.zeros((2, 1, 1, 2, 3))
    pictures[1, 0, 0, 0] = [0.2, 0.2, 0.2]  # std 0.2 / sqrt(2) in every channel
    pictures[1, 0, 0, 1, 0] = 0.6  # in one of three
    expected = [[[0.2 / np.sqrt(2), 0.6 / np.sqrt(6)]]]
    np.testing.assert_allclose(pixel_std(pictures), expected)


@pytest.mark.parametrize("images", [1, 2, 9])
def test_pictures_keep_their_proportions(tmp_path, images):
    study = summarize(read_run(write_run(tmp_path, targets=2, seeds=3, images=images)), 19.0)
    for draw in (reconstructions, pixel_statistics):
        canvas = draw(study).axes[0]
        assert len(canvas.images) >= 4
        for picture in canvas.images:
            left, right, bottom, top = picture.get_extent()
            tall, wide = picture.get_array().shape[:2]
            assert (bottom - top) / (right - left) == pytest.approx(tall / wide)


def test_tile_sets_images_in_a_square():
    images = np.arange(3.0)[:, None, None, None] * np.ones((3, 2, 2, 1))
    tiled = pictures.tile(images, gap=9)[..., 0]
    assert tiled.shape == (5, 5)
    assert (tiled[0, 0], tiled[0, 3], tiled[3, 0], tiled[2, 0]) == (0, 1, 2, 9)


def test_swarm_dots_do_not_overlap():
    heights = np.random.default_rng(0).normal(size=60)
    diameter, (offsets,) = swarms([heights], room=3.0, diameter=0.2)
    apart = np.hypot(heights[:, None] - heights, offsets[:, None] - offsets)
    assert apart[np.triu_indices(60, 1)].min() >= diameter - 1e-9
    assert np.abs(offsets).max() + diameter / 2 <= 1.5
    _, (again,) = swarms([heights], room=3.0, diameter=0.2)
    np.testing.assert_array_equal(offsets, again)


def test_dots_of_one_figure_have_one_size():
    crowd, few = np.zeros(60), np.zeros(2)
    diameter, (wide, narrow) = swarms([crowd, few], room=3.0, diameter=0.2)
    assert diameter < 0.2
    assert np.abs(wide).max() + diameter / 2 <= 1.5
    assert abs(narrow[1] - narrow[0]) == pytest.approx(diameter)


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    study = summarize(read_run(write_run(tmp_path, axes=TV)), 19.0)
    first, second = (style.to_bytes(success_rate(study), "svg") for _ in range(2))
    assert first == second


def test_a_name_too_wide_for_its_column_breaks_at_its_hyphens():
    lines = style.wrap("victim = lenet_zhu-cifar10-no-augment", 1.25, 8.8, "bold")
    assert "".join(lines).replace(" ", "") == "victim=lenet_zhu-cifar10-no-augment"
    assert all(style.text_width(line, 8.8, "bold") <= 1.25 for line in lines)
    assert style.wrap("tv = 1e-05", 1.25, 8.8) == ["tv = 1e-05"]


def test_numbers_for_people():
    assert number_text(np.nan) == "—"
    assert number_text(np.inf) == "∞"
    assert number_text(-1.234) == "−1.23"
    assert interval_text(np.nan, 2.0) == ""
    assert choose_evenly(list(range(30)), 4) == [0, 10, 19, 29]


def trained_with(epsilon, accuracy):
    """What the rows say of a victim; None: without DP-SGD."""
    return {
        "victim": f"net-{epsilon}",
        "victim_accuracy": accuracy,
        "victim_epsilon": epsilon,
        "victim_delta": None if epsilon is None else 1e-5,
    }


@pytest.fixture(scope="module")
def defended(tmp_path_factory):
    """Noise and bits at two strengths, a sign, and two networks of DP-SGD; the first undefended."""
    chosen = [
        "none",
        "noise:0.1",
        "noise:1",
        "quantize:8",
        "quantize:1",
        "sign",
        "dpsgd:1:0.5",
        "dpsgd:1:2",
    ]
    facts = {6: trained_with(8.0, 0.5), 7: trained_with(1.0, 0.4)}
    facts |= {cell: trained_with(None, 0.6) for cell in range(6)}
    folder = tmp_path_factory.mktemp("report") / "defended"
    return write_run(
        folder,
        axes={"defense": chosen},
        targets=4,
        draws=3,
        facts=facts,
        level=[25, 22, 9, 24, 9, 9, 9, 8],
        seed_std=[0.3] * 8,
    )


def test_verdicts_name_the_least_strength_that_stops_the_attack(defended):
    study = summarize(read_run(defended), 19.0)
    rows = {row["defense"]: row for row in TABLES["defenses"].rows(study)}
    assert {name: (row["stops"], row["tried"]) for name, row in rows.items()} == {
        "noise": (True, "0.1 to 1"),
        "quantize": (True, "8 to 1"),
        "sign": (True, ""),
    }
    assert rows["noise"]["strength"] == 1
    assert rows["quantize"]["strength"] == 1  # fewer bits protect more
    assert rows["noise"]["undefended_psnr"] == pytest.approx(study.cells[0].mean.mean)
    # Draws count: three of noise to one without.
    assert [c.psnr.shape for c in study.cells[:4]] == [(4, 4), (4, 12), (4, 12), (4, 12)]
    assert study.planned_trials == study.finished_trials == 4 * 4 * (2 + 6 * 3)


def test_the_trade_off_is_of_networks_by_epsilon(defended):
    study = summarize(read_run(defended), 19.0)
    rows = TABLES["dp_sgd"].rows(study)
    assert [(r["epsilon"], r["test_accuracy"]) for r in rows] == [(1, 0.4), (8, 0.5), (np.inf, 0.6)]
    # Phi(Phi^-1(1e-4) + 1 / multiplier), by a table of the normal distribution.
    assert [r["release_bound"] for r in rows] == pytest.approx([6.43e-4, 0.0428, 1], rel=2e-3)
    output = build(defended)
    assert "report: " in output
    assert {"defense_curves.png", "dp_sgd.png"} <= {
        p.name for p in (defended / "plots").glob("*.png")
    }
    page = (defended / "report.html").read_text()
    assert "DP-SGD: utility, leakage, privacy" in page
    assert "between draws\nof noise" in page
    assert "1e+02%" not in page


def test_an_unknown_is_chosen_by_the_objective_alone():
    nan = np.nan
    objective = np.array([[8.0, 3, 1, nan], [1, 1, 1.5, nan], [0.6, 9, 0.9, nan]])
    # At most twice the least: one image too few is refused, one too many is not needed.
    assert choose(objective, fewest=True).tolist() == [1, 1, 0, -1]
    assert choose(objective, fewest=False).tolist() == [2, 1, 2, -1]


def test_the_page_says_what_the_attacker_would_assume(tmp_path):
    axes = {"assumed_images": [3, 1, 2], "tv": [0.01, 0.001]}
    write_run(tmp_path, axes=axes, targets=4, seeds=3, images=2, failed=[(0, 1, 2)])
    build(tmp_path)
    rows = read_csv(tmp_path, "assumptions")
    assert [(r["assumed"], r["true"], r["setting"]) for r in rows] == [
        (str(value), "2", f"tv = {tv:g}") for tv in axes["tv"] for value in (1, 2, 3)
    ]
    trials = read_run(tmp_path).trials
    for tv, group in zip(axes["tv"], (rows[:3], rows[3:])):
        least = np.full((3, 4), np.inf)
        for value, target, objective, status, weight in zip(
            *(trials[n] for n in ("assumed_images", "target_id", "objective", "status", "tv"))
        ):
            if status == "ok" and weight == tv:
                at = int(value) - 1, (target - 7) // 4
                least[at] = min(least[at], objective)
        assert [float(r["objective"]) for r in group] == pytest.approx(least.mean(axis=1))
        chosen = [next(v for v in range(3) if o[v] <= 2 * o.min()) for o in least.T]
        assert [int(r["chosen"]) for r in group] == [chosen.count(v) for v in range(3)]
    assert "would assume" in (tmp_path / "report.html").read_text()


def test_the_page_says_which_labels_were_found(tmp_path):
    axes = {"labels": ["known", "counts", "joint"]}
    facts = {1: {"label_accuracy": 0.75}}
    write_run(tmp_path, axes=axes, targets=4, seeds=3, images=4, facts=facts)
    build(tmp_path)
    rows = read_csv(tmp_path, "labels")
    assert [(r["rule"], r["images"]) for r in rows] == [("counts", "4"), ("joint", "4")]
    assert [(float(r["accuracy"]), float(r["all_right"])) for r in rows] == [(0.75, 0), (1, 1)]
    page = (tmp_path / "report.html").read_text()
    assert "Which labels the update gives away" in page
    assert "has 100.0% of the labels right at labels\u00a0=\u00a0joint, 75.0% at labels" in page
    assert (tmp_path / "plots" / "labels.png").exists()


def test_cells_on_other_images_stand_in_a_band_of_their_own():
    def make(ids, dataset="cifar10"):
        behind = [(dataset, tuple(batch)) for batch in ids]
        return SimpleNamespace(attacked=behind, target_ids=[batch[0] for batch in ids])

    single, pairs = [[0], [1], [2]], [[0, 1], [2, 3]]
    cells = [make(single), make(pairs), make(single[:2]), make(pairs), make(pairs)]
    first, second = pictures.bands_of(cells, 2)
    assert first.cells == [cells[0], cells[2]]
    assert first.targets == [0, 1, 2]
    assert first.first_with(2) is cells[0]
    assert second.cells == [cells[1], cells[4]]
    assert second.targets == [0, 2]
    assert len(pictures.bands_of([make(single), make(single, "cifar100")], 2)) == 2
