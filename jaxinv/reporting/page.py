"""The page of a report: one HTML file that needs nothing else, for desk and phone."""

import base64
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from jaxinv.reporting.consensus import quarter
from jaxinv.reporting.figures import style as ps
from jaxinv.reporting.figures.seeds import alt_text, averages
from jaxinv.reporting.statistics import BestOfK, Interval
from jaxinv.reporting.study import Cell, Study, count_text, interval_text, number_text
from jaxinv.reporting.tables import Row, size_text
from jaxinv.reporting.text import ASSUMED, AVERAGED, CAPTIONS, DEFINITIONS, NOT_TRIED, PAGE
from jaxinv.reporting.unknowns import SUFFICIENT, labels_found
from jaxinv.runs.results import SETTINGS
from jaxinv.settings.naming import setting_text

MOST_ROWS = 48  # of the per-target table on the page; the CSV has all
_SVG_LIMIT = 400_000  # bytes; above it a PNG loads faster and looks the same


class Picture(NamedTuple):
    """One figure as data URIs, for wide and for narrow screens."""

    wide: str
    narrow: str


def embed_files(path: Path) -> str:
    """Embeds a saved figure: its SVG, or the PNG where the SVG is large and larger."""
    svg, png = path.with_suffix(".svg").read_bytes(), path.with_suffix(".png").read_bytes()
    return _data_uri(png, "png") if _SVG_LIMIT < len(svg) > len(png) else _data_uri(svg, "svg+xml")


def embed_figure(figure: Figure) -> str:
    """Embeds a figure that has no file, by the same rule."""
    svg = ps.to_bytes(figure, "svg")
    if len(svg) <= _SVG_LIMIT:
        return _data_uri(svg, "svg+xml")
    png = ps.to_bytes(figure, "png")
    return _data_uri(png, "png") if len(png) < len(svg) else _data_uri(svg, "svg+xml")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def findings(study: Study) -> list[str]:
    """States the headline results in sentences computed from the rows."""
    sentences = [
        _labels_sentence(study),
        _spread_sentence(study),
        _choice_sentence(study),
        _consensus_sentence(study),
    ]
    if study.failed_trials:
        failed = count_text(study.failed_trials, "trial")
        sentences.append(
            f"{failed} of {study.finished_trials} turned non-finite; means over them are left out "
            "as —, not averaged over the survivors."
        )
    missing = study.planned_trials - study.finished_trials
    if missing > 0:
        sentences.append(
            f"The study is not finished: {study.finished_trials} of {study.planned_trials} trials "
            "are there."
        )
    return [s for s in sentences if s]


def _spread_sentence(study: Study) -> str:
    """Compares the seeds' spread: between the extreme cells, or with the targets' in one cell."""
    known = [c for c in study.cells if np.isfinite(c.mean.seed_std)]
    if not known:
        return ""
    low = min(known, key=lambda c: c.mean.seed_std)
    high = max(known, key=lambda c: c.mean.seed_std)
    std = {
        c.number: number_text(c.mean.seed_std, 1 if c.mean.seed_std >= 0.1 else 2) for c in known
    }
    if low is not high:
        return (
            f"At {low.label} the {len(low.seeds)} starts of one target differ by {std[low.number]} "
            f"dB (standard deviation), at {high.label} by {std[high.number]} dB."
        )
    sentence = f"The {len(low.seeds)} starts of one target differ by {std[low.number]} dB"
    between = low.components.between.value
    if np.isfinite(between):
        sentence += f", the {len(low.target_ids)} targets by {number_text(between, 1)} dB"
    return f"{sentence} (standard deviation)."


def _labels_sentence(study: Study) -> str:
    """States how many labels were found where they are found best and worst."""
    known = [row for row in labels_found(study) if np.isfinite(row["accuracy"])]
    if not known:
        return ""
    worst, *_ = ranked = sorted(known, key=lambda row: row["accuracy"])
    best = ranked[-1]
    share = lambda row: f"{number_text(100 * row['accuracy'], 1)}%"  # noqa: E731
    sentence = f"The attacker has {share(best)} of the labels right"
    if len(known) > 1:
        sentence += f" at {best['setting']}, {share(worst)} at {worst['setting']}"
    return f"{sentence}."


def _choice_sentence(study: Study) -> str:
    """States the best cell, and what choosing among seeds adds to it."""
    known = [c for c in study.cells if np.isfinite(c.mean.mean)]
    if not known:
        return ""
    best = max(known, key=lambda c: c.mean.mean)
    where = f"Best on average: {best.label}, " if len(study.cells) > 1 else "On average "
    limits = interval_text(best.mean.low, best.mean.high, 1)
    sentence = f"{where}{number_text(best.mean.mean, 1)} dB{' ' + limits if limits else ''}"
    sentence += f" against {number_text(best.baseline('psnr'), 1)} dB of a mean-colour image"
    gains = [choice.mean[-1] - best.mean.mean for choice in (best.attacker, best.oracle)]
    if len(best.seeds) > 1 and np.isfinite(gains).all():
        signed = [f"{gain:+.1f}".replace("-", "−") for gain in gains]
        sentence += (
            f"; choosing the best of {len(best.seeds)} seeds by the objective changes it by "
            f"{signed[0]} dB, choosing with the truth by {signed[1]} dB"
        )
    return f"{sentence}."


def _consensus_sentence(study: Study) -> str:
    """States what averaging seeds changes against picking one: in the best cell, and at most."""
    known = [c for c in study.cells if len(c.seeds) > 1 and np.isfinite(c.mean.mean)]
    known = [c for c in known if np.isfinite(c.gain(_average(c)).value)]
    if not known:
        return ""
    best = max(known, key=lambda c: c.mean.mean)
    most = max(known, key=lambda c: c.gain(_average(c)).value)
    count, where = quarter(len(best.seeds)), f" at {best.label}" if len(study.cells) > 1 else ""
    seeds = f"{len(best.seeds)} seeds"
    averaged = f"the {count} of {seeds} with the lowest objectives" if count > 1 else f"all {seeds}"
    gain = best.gain(_average(best))
    unseen = gain.low <= 0 <= gain.high
    verdict = "changes nothing that these targets can show" if unseen else "changes PSNR"
    sentence = f"Averaging {averaged} instead of picking one {verdict}{where}: {_gains(best)}"
    if most is not best:
        sentence += f"; at {most.label}: {_gains(most)}"
    return f"{sentence}{'; one target, no interval' if math.isnan(gain.low) else ''}."


def _average(cell: Cell) -> BestOfK:
    """The mean of the best quarter; of all seeds where the quarter is the pick."""
    return cell.consensus.quarter if quarter(len(cell.seeds)) > 1 else cell.consensus.all


def _gains(cell: Cell) -> str:
    """What averaging changes, and where that was of the best quarter what averaging all does."""
    words = _signed(cell.gain(_average(cell)))
    if quarter(len(cell.seeds)) > 1:
        words += f" (all {len(cell.seeds)}: {_signed(cell.gain(cell.consensus.all))})"
    return words


def _signed(gain: Interval) -> str:
    """A difference in dB with its sign and its interval over targets."""
    limits = interval_text(gain.low, gain.high, 1)
    return f"{gain.value:+.1f} dB{' ' + limits if limits else ''}".replace("-", "−")


def render(study: Study, tables: dict[str, list[Row]], pictures: dict[str, Picture]) -> str:
    """Renders the page; every text from the run is escaped."""
    config = study.run.config
    asked = config.get("study") or {}
    alts = alt_text(study)
    figures = {
        f"figure_{name}": _figure(picture, alts[name], CAPTIONS[name].format(**_facts(study)))
        for name, picture in pictures.items()
    }
    spread = ""
    if study.has_spread:
        spread = figures.pop("figure_pixel_statistics")
        spread += "<h2>More seeds, and who chooses</h2>" + figures.pop("figure_best_of_k")
        spread += "<h2>Where the variance comes from</h2>"
        spread += figures.pop("figure_variance_components")
        spread += _components_table(tables["variance_components"])
    paired = ""
    if tables["paired_differences"]:
        paired = f"<h2>Setting against setting</h2>{figures.pop('figure_paired_differences')}"
        paired += _paired_table(tables["paired_differences"])
    spectrum = ""
    if "figure_posterior" in figures:
        spectrum = "<h2>How sure the attack is</h2>" + figures.pop("figure_posterior")
    if "figure_spectrum" in figures:
        spectrum += "<h2>What the update pins down</h2>" + figures.pop("figure_spectrum")
    defended = ""
    if "figure_defense_curves" in figures or tables["defenses"]:
        defended = "<h2>Which defense leaves this attack nothing, at what cost</h2>"
        defended += figures.pop("figure_defense_curves", "")
        defended += _defenses_table(tables["defenses"]) + f'<p class="note">{NOT_TRIED}</p>'
    if "figure_trade_off" in figures:
        defended += "<h2>DP-SGD: utility, leakage, privacy</h2>"
        defended += figures.pop("figure_trade_off") + _dp_sgd_table(tables["dp_sgd"])
    labels = unknown = ""
    if tables["labels"]:
        labels = "<h2>Which labels the update gives away</h2>"
        labels += figures.pop("figure_label_accuracy") + _labels_table(tables["labels"])
    if tables["assumptions"]:
        unknown = "<h2>What the attacker does not know, and would assume</h2>"
        unknown += _assumptions_table(tables["assumptions"])
        unknown += f'<p class="note">{ASSUMED.format(factor=SUFFICIENT)}</p>'
    return Template(PAGE).substitute(
        title=escape(str(config.get("name", study.run.folder.name))),
        question=escape(asked.get("question") or "What does the attack recover?"),
        findings="".join(f"<li>{_unbroken(s)}</li>" for s in findings(study)),
        summary=_summary_table(study, tables["summary"]),
        spread=spread,
        paired=paired,
        defended=defended,
        spectrum=spectrum,
        labels=labels,
        unknown=unknown,
        targets=_targets_table(study, tables["per_target"]),
        definitions=_definitions(study),
        run=_run_section(study, asked),
        **figures,
    )


def _facts(study: Study) -> dict[str, str]:
    seeds = max(len(c.seeds) for c in study.cells)
    best = str(quarter(seeds))
    averaged = averages(study.cells)
    return {
        **{name: text.format(quarter=best) * averaged for name, text in AVERAGED.items()},
        "seeds": count_text(seeds, "seed"),
        "quarter": best,
        "threshold": setting_text(float(study.cells[0].success_psnr)),
    }


def _figure(picture: Picture, alt: str, caption: str) -> str:
    return (
        f'<figure><picture><source media="(max-width: 640px)" srcset="{picture.narrow}">'
        f'<img src="{picture.wide}" alt="{escape(alt)}"></picture>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], last: int = 0) -> str:
    """An HTML table that scrolls in its box; the `last` rows are set apart as reference.

    Cells come escaped. The first column holds names, all others numbers.
    """
    header = "".join(f"<th>{name}</th>" for name in head)
    body = "".join(
        f"<tr{' class=reference' if index >= len(rows) - last else ''}>"
        + "".join(f"<td>{value}</td>" for value in row)
        + "</tr>"
        for index, row in enumerate(rows)
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{header}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _unbroken(text: str) -> str:
    """Escapes text and keeps "tv = 0.01" on one line."""
    return escape(text).replace(" = ", "&nbsp;=&nbsp;")


def _name(row: Row) -> str:
    return _unbroken(row["setting"])


def _with_interval(value: float, low: float, high: float, digits: int = 2, unit: str = "") -> str:
    limits = interval_text(low, high, digits)
    shown = number_text(value, digits) + (unit if math.isfinite(value) else "")
    return f"{shown} <small>{limits}</small>" if limits else shown


def _counted(value: float, row: Row, digits: int = 2) -> str:
    """A mean; where failures make it undefined, with their number beside the dash."""
    text = number_text(value, digits)
    return (
        f"{text} <small>{row['failed']} failed</small>" if row["failed"] and text == "—" else text
    )


def _best(study: Study) -> dict[str, str]:
    """Columns of what is made of all seeds, by name and heading; one seed has no consensus."""
    averaged = {"consensus_quarter": "consensus, best quarter", "consensus_all": "consensus, all"}
    return {
        "attacker_best": "attacker’s best",
        **(averaged if study.has_starts else {}),
        "oracle_best": "oracle’s best",
    }


def _summary_table(study: Study, rows: list[Row]) -> str:
    threshold = setting_text(float(study.cells[0].success_psnr))
    best = _best(study)
    head = ["PSNR in dB", "targets × seeds", "failed", "mean [95%]", "seed std", *best.values(),
            "mean colour", f"above {threshold} dB [95%]", "median", "exact",
            "SSIM", "MSE", "labels right"]  # fmt: skip
    body = []
    for row in rows:
        is_cell = row["cell"] != ""
        own = [_counted(row[f"psnr_{name}"], row) for name in best]
        own.append(number_text(row["baseline_psnr"]))
        mean = _with_interval(row["psnr_mean"], row["psnr_low"], row["psnr_high"])
        labels = 100 * row["label_accuracy"]
        rate = [100 * row[name] for name in ("success_rate", "success_low", "success_high")]
        body.append(
            [
                _name(row),
                size_text(row),
                str(row["failed"]) if is_cell else "",
                mean if np.isfinite(row["psnr_mean"]) else _counted(row["psnr_mean"], row),
                number_text(row["psnr_seed_std"]) if is_cell else "",
                *(own if is_cell else [""] * len(own)),
                _with_interval(*rate, 0, "%"),
                number_text(row["psnr_median"]),
                str(row["exact"]) if is_cell else "",
                number_text(row["ssim_mean"], 3),
                number_text(row["mse_mean"], 4),
                f"{number_text(labels, 0)}%" if np.isfinite(labels) else "—" if is_cell else "",
            ]
        )  # fmt: skip
    return _table(head, body, sum(row["cell"] == "" for row in rows))


def _components_table(rows: list[Row]) -> str:
    drawn = any(np.isfinite(row["noise_std"]) for row in rows)
    head = ["standard deviation in dB", "targets × seeds", "failed", "between targets",
            *(["between draws of noise"] if drawn else []), "between seeds",
            "targets’ share (ICC)"]  # fmt: skip
    body = []
    for row in rows:
        cells = [
            _with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"])
            for name in ("between_std", "noise_std", "within_std", "icc")
            if name != "noise_std" or drawn
        ]
        is_cell = row["cell"] != ""
        size = size_text(row)
        failed = str(row["failed"]) if is_cell else ""
        body.append([_name(row), size, failed, *cells])
    return _table(head, body, sum(row["cell"] == "" for row in rows))


def _paired_table(rows: list[Row]) -> str:
    head = ["difference of PSNR in dB", "against", "targets × seeds", "failed", "mean [95%]"]
    body = []
    for row in rows:
        limits = (row[name] for name in ("psnr_difference", "difference_low", "difference_high"))
        size = size_text(row)
        body.append([_name(row), _unbroken(row["reference"]), size, str(row["failed"]),
                     _with_interval(*limits)])  # fmt: skip
    return _table(head, body)


def _defenses_table(rows: list[Row]) -> str:
    """What the least sufficient strength of each defense leaves to the attack, and its price."""
    head = ["defense", "leaves this attack nothing", "tried", "PSNR in dB there [95%]",
            "mean colour", "undefended", "above threshold", "cosine to the true update",
            "test accuracy"]  # fmt: skip
    body = []
    for row in rows:
        name = escape(row["defense"]) + (f"<br><small>{_unbroken(row['setting'])}</small>"
                                         if row["setting"] else "")  # fmt: skip
        least = f"from {row['parameter']} {setting_text(row['strength'])}"
        least = least if row["parameter"] else "yes"
        psnr = _with_interval(row["psnr_mean"], row["psnr_low"], row["psnr_high"])
        body.append([
            name, least if row["stops"] else "no", row["tried"],
            psnr if np.isfinite(row["psnr_mean"]) else _counted(row["psnr_mean"], row),
            number_text(row["baseline_psnr"]), number_text(row["undefended_psnr"]),
            f"{100 * row['success_rate']:.0f}%", number_text(row["update_cosine"], 3),
            _percent(row["victim_accuracy"]),
        ])  # fmt: skip
    return _table(head, body)


def _dp_sgd_table(rows: list[Row]) -> str:
    head = ["network", "noise multiplier", "clip", "epsilon", "delta", "test accuracy",
            "PSNR in dB [95%]", "mean colour", "above threshold",
            "bound on any attack"]  # fmt: skip
    body = []
    for row in rows:
        known = math.isfinite(row["noise_multiplier"])
        body.append([
            escape(str(row["victim"])),
            setting_text(row["noise_multiplier"]) if known else "—",
            setting_text(row["clip"]) if known else "—",
            f"{row['epsilon']:.3g}" if math.isfinite(row["epsilon"]) else "∞",
            "—" if row["delta"] is None or math.isnan(row["delta"]) else f"{row['delta']:g}",
            _percent(row["test_accuracy"]),
            _with_interval(row["psnr_mean"], row["psnr_low"], row["psnr_high"]),
            number_text(row["baseline_psnr"]), f"{100 * row['success_rate']:.0f}%",
            f"{100 * row['release_bound']:.3g}%",
        ])  # fmt: skip
    return _table(head, body)


def _labels_table(rows: list[Row]) -> str:
    head = ["labels by", "rule", "images", "targets × seeds", "failed", "right [95%]",
            "updates with all right", "PSNR in dB", "mean colour"]  # fmt: skip
    body = []
    for row in rows:
        right = (100 * row[f"accuracy{end}"] for end in ("", "_low", "_high"))
        body.append([
            _name(row), escape(row["rule"]), str(row["images"]), size_text(row),
            str(row["failed"]), _with_interval(*right, 1, "%"), _percent(row["all_right"]),
            _counted(row["psnr_mean"], row), number_text(row["baseline_psnr"]),
        ])  # fmt: skip
    return _table(head, body)


def _assumptions_table(rows: list[Row]) -> str:
    head = ["unknown", "assumed", "true", "targets × seeds", "failed",
            "objective of the best start", "chosen for", "PSNR in dB", "mean colour"]  # fmt: skip
    body = []
    for row in rows:
        setting = f"<br><small>{_unbroken(row['setting'])}</small>" if row["setting"] else ""
        body.append([
            escape(row["unknown"]) + setting, setting_text(row["assumed"]),
            setting_text(row["true"]), size_text(row), str(row["failed"]),
            f"{row['objective']:.2g}", f"{row['chosen']} of {row['targets']}",
            _counted(row["psnr_mean"], row), number_text(row["baseline_psnr"]),
        ])  # fmt: skip
    return _table(head, body)


def _percent(share: float) -> str:
    return "—" if math.isnan(share) else f"{100 * share:.1f}%"


def _targets_table(study: Study, rows: list[Row]) -> str:
    best = _best(study)
    head = ["setting", "target", "failed", "exact", "mean", "seed std", "median", "worst",
            *best.values(), "mean colour"]  # fmt: skip
    names = ["psnr_mean", "psnr_seed_std", "psnr_median", "psnr_worst",
             *(f"psnr_{name}" for name in best), "baseline_psnr"]  # fmt: skip
    body = [
        [_name(row), str(row["target"]), str(row["failed"]), str(row["exact"])]
        + [number_text(row[name]) for name in names]
        for row in rows[:MOST_ROWS]
    ]
    more = f"<p>The first {MOST_ROWS} of {len(rows)} rows.</p>" if len(rows) > MOST_ROWS else ""
    return _table(head, body) + more


def _definitions(study: Study) -> str:
    facts = {k: escape(v) for k, v in _facts(study).items()}
    return "".join(
        f"<dt>{name.format(**facts)}</dt><dd>{text.format(**facts)}</dd>"
        for name, text in DEFINITIONS
        if name != "Consensus" or study.has_starts
    )


def _run_section(study: Study, asked: dict[str, Any]) -> str:
    """What was run, with what, and how far it got."""
    config = study.run.config
    entries = [("Command", f"<code>{escape(str(config.get('command', '')))}</code>")]
    for name in ("cost", "expectation"):
        if asked.get(name):
            entries.append((f"{name.capitalize()}, as stated before", escape(str(asked[name]))))
    axes = config.get("axes") or {}
    varied = "; ".join(f"{k}: {', '.join(map(setting_text, v))}" for k, v in axes.items())
    entries.append(("Settings that vary", escape(varied or "none")))
    entries.append(("Settings that do not", escape(_fixed_settings(study))))
    entries.append(("Trials", f"{study.finished_trials} of {study.planned_trials} there, "
                    f"{study.failed_trials} failed"))  # fmt: skip
    digests = sorted({str(d)[:12] for d in study.run.trials["victim_digest"]})
    entries.append(("Attacked parameters (sha256)", escape(", ".join(digests[:6]))))
    for session in config.get("sessions") or []:
        versions = ", ".join(f"{k} {v}" for k, v in (session.get("versions") or {}).items())
        words = f"{session.get('device', '')}; {versions}; <code>{{}}</code>"
        command = escape(str(session.get("command", "")))
        started = str(session.get("started", ""))[:16].replace("T", " ")
        entries.append((f"Session {escape(started)}", _fill(words, command)))
    return "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in entries)


def _fill(words: str, command: str) -> str:
    """Escapes everything but the place of the command, which comes escaped."""
    before, after = words.split("<code>{}</code>")
    return f"{escape(before)}<code>{command}</code>{escape(after)}"


def _fixed_settings(study: Study) -> str:
    """Settings with one value in all rows; those that say that something is off are left out."""
    parts = []
    for name, _ in SETTINGS:
        values = {setting_text(v) for v in study.run.trials[name]}
        off = ("nan", "None", "0", "False") if name != "network_seed" else ()
        if len(values) == 1 and (value := values.pop()) not in off:
            parts.append(f"{name.removesuffix('_type')} = {value}")
    return ", ".join(parts)
