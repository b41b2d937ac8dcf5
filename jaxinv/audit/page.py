"""An audit as one HTML page and as JSON."""

import base64
import io
import json
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxinv import files
from jaxinv.audit import identification as ident
from jaxinv.audit.auditing import Audit
from jaxinv.audit.verdict import verdict

_STYLE = """
body { font: 16px/1.5 Inter, "Helvetica Neue", "DejaVu Sans", sans-serif; color: #1c2128;
  max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #e6e9ed; }
img { image-rendering: pixelated; height: 96px; margin: 0 4px 4px 0; } li { margin: .4rem 0; }
small, figcaption { color: #5b6470; } figure { margin: 0 0 1rem; } figcaption { font-size: .85rem; }
.lead { display: flex; gap: 1rem; flex-wrap: wrap; margin: 1.2rem 0; }
.lead div { flex: 1 1 12rem; border-top: 3px solid #0072b2; padding-top: .4rem; color: #5b6470;
  font-size: .85rem; line-height: 1.35; }
.lead b { display: block; font-size: 1.7rem; color: #1c2128; line-height: 1.2; }
td.best { font-weight: 600; }
"""
SHOWN = 8  # images


def write(found: Audit, folder: Path, words: str) -> None:
    """Writes `audit.html` and `audit.json`.

    Args:
      found: the audit.
      folder: is made where it is not there.
      words: the command, dataset and network, in a line.
    """
    files.write_file(folder / "audit.html", lambda f: f.write(render(found, words).encode()))
    text = json.dumps(to_json(found, words), indent=2) + "\n"
    files.write_file(folder / "audit.json", lambda f: f.write(text.encode()))


def to_json(found: Audit, words: str) -> dict[str, Any]:
    """All numbers of an audit; what is infinite or undefined is null."""
    outcome, cap, said = found.identification, found.capacity, verdict(found)
    fields = {
        "run": words,
        "images": found.images,
        "parameters": found.parameters,
        "defense": found.setting.defense,
        "verdict": said._asdict(),
        "capacity": cap
        and {
            "images": cap.images,
            "determined": cap.determined(found.images),
            "unknowns": found.images * cap.unknowns,
            "binding": cap.binding.layer,
            "equality": cap.equality,
            "why_not": list(cap.why),
        },
        "identification": {
            "candidates": outcome.candidates,
            "solved_among": min(outcome.candidates, ident.MOST),
            "games": outcome.games,
            "named_of_this_update": found.named,
            "recall": outcome.recall._asdict(),
            "whole_updates": outcome.whole._asdict(),
            "true_positives": {f"{r:g}": s._asdict() for r, s in outcome.true_positives.items()},
            "chance": outcome.chance,
        },
        "inspection": {
            "d_snr": found.inspection.d_snr,
            "uniqueness": found.inspection.uniqueness.tolist(),
            "parallel_units": found.inspection.parallel,
        },
        "ceiling": found.ceiling
        and {
            "psnr": found.ceiling.psnr.tolist(),
            "prior_psnr": found.ceiling.prior_psnr.tolist(),
            "dense": found.ceiling.dense,
            "relative_error": found.ceiling.probe_error,
            "relative_residual": found.ceiling.residual,
        },
        "rank_psnr": found.rank_psnr,
        "reconstructions": {f.attack: {"psnr": f.psnr} | f.likeness._asdict() for f in found.found},
        "malicious_server": found.imprinted
        and found.imprinted._asdict() | {"exact": found.imprinted.exact._asdict()},
        "fishing": found.fished
        and {"alone": found.fished.alone._asdict(), "cosine": found.fished.cosine},
        "mean_color_psnr": found.mean_color_psnr,
        "release_bound": found.release_bound,
        "epsilon_shown": found.epsilon_shown and found.epsilon_shown._asdict(),
    }
    return _finite(fields)


def _finite(value: Any) -> Any:
    """JSON knows no infinity."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def render(found: Audit, words: str) -> str:
    """The page; it needs nothing but itself."""
    said, outcome = verdict(found), found.identification
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Audit of an update</title>",
        f"<style>{_STYLE}</style><h1>What this update gives away</h1>",
        f"<p><small>{escape(words)}</small></p>",
        _lead(found),
        _sentences("What anyone could read off it", said.anyone),
        _sentences("What nobody can", said.nobody or ["Nothing was found that forbids anything."]),
        _sentences("What was not tried", said.not_tried),
        "<h2>Identification</h2>",
        _table(
            [
                ["images named, of those in the update", str(outcome.recall)],
                ["updates with all images named", str(outcome.whole)],
                *(
                    [f"members found at {r:.1%} false positives", str(s)]
                    for r, s in outcome.true_positives.items()
                ),
                ["a guess", f"{outcome.chance:.2%}"],
                ["candidates, games", f"{outcome.candidates:,}, {outcome.games}"],
                *(
                    [["solved among a shortlist of", f"{ident.MOST:,}"]]
                    if outcome.candidates > ident.MOST
                    else []
                ),
            ]
        ),
        "<p><small>Exact 95% intervals over games (Clopper and Pearson; batches: Bentkus).</small>",
        _capacity(found),
        "<h2>Gradients one by one</h2>",
        _table(
            [
                ["largest D-SNR of a layer", f"{_largest(found.inspection.d_snr):.3g}"],
                [
                    "least and most unique gradient",
                    f"{found.inspection.uniqueness.min():.2f}, "
                    f"{found.inspection.uniqueness.max():.2f}",
                ],
                ["dense units that measure the same", f"{found.inspection.parallel:.0%}"],
            ]
        ),
        _likeness(found),
        _pictures(found),
        "</html>",
    ]
    return "\n".join(parts)


def _capacity(found: Audit) -> str:
    """What one gradient can determine; nothing of several steps."""
    cap, count = found.capacity, found.images
    if cap is None:
        return ""
    rows = [
        ["numbers of the images", f"{count * cap.unknowns:,}"],
        ["determined at the most", f"{cap.determined(count):,}"],
        ["left to a prior", f"{cap.free(count):.1%}"],
        ["images that one gradient can determine", f"{cap.images:,.1f}"],
        ["binding layer", escape(cap.binding.layer)],
        [
            "this is",
            "an equality, in general" if cap.equality else f"a bound: {escape(', '.join(cap.why))}",
        ],
    ]
    return f"<h2>Capacity</h2>{_table(rows)}"


def _lead(found: Audit) -> str:
    """The figures that say most, large."""
    outcome, cap, b = found.identification, found.capacity, found.images
    tiles = [
        (
            f"{outcome.recall.value:.0%}",
            f"of its images are named among {outcome.candidates:,} (a guess: {outcome.chance:.2%})",
        )
    ]
    if cap is not None:
        words = f"of the numbers of {b} image{'s' * (b > 1)} at the most come of the gradient alone"
        tiles.append((f"{1 - cap.free(b):.0%}", words))
    if found.best is not None:
        gained = found.best.psnr - found.mean_color_psnr
        tiles.append((f"{gained:+.1f} dB", "over the mean color, by the best attack tried"))
    return (
        "<div class=lead>"
        + "".join(f"<div><b>{escape(n)}</b>{escape(t)}</div>" for n, t in tiles)
        + "</div>"
    )


def _largest(ratios: dict[str, float]) -> float:
    return max((r for r in ratios.values() if not math.isnan(r)), default=math.nan)


def _sentences(title: str, sentences: list[str]) -> str:
    items = "".join(f"<li>{escape(s)}</li>" for s in sentences)
    return f"<h2>{title}</h2><ul>{items}</ul>"


def _table(rows: list[list[str]]) -> str:
    body = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows)
    return f"<table>{body}</table>"


def _likeness(found: Audit) -> str:
    """What the reconstructions are like, a row each: the measures need not agree on the best."""
    if not found.found:
        return ""
    shown = (
        ("psnr", "PSNR (dB)", "{:.1f}", max),
        ("named_by_pixels", "nearest is its own, by pixels", "{:.0%}", max),
        ("named_by_judge", "by the judge's features", "{:.0%}", max),
        ("same_class", "the judge sees the class", "{:.0%}", max),
        ("rdlv", "RDLV", "{:.2f}", max),
        ("avd", "AVD", "{:.3f}", min),
    )
    measured = [{"psnr": f.psnr} | f.likeness._asdict() for f in found.found]
    best = {name: pick(m[name] for m in measured) for name, _, _, pick in shown}

    def cell(value, name, form):
        if math.isnan(value):
            return "<td>–</td>"
        told = any(m[name] != value for m in measured)
        mark = " class=best" if told and value == best[name] else ""
        return f"<td{mark}>{form.format(value)}</td>"

    head = "".join(f"<th>{escape(title)}</th>" for title in ["attack", *(t for _, t, *_ in shown)])
    body = "".join(
        f"<tr><td>{escape(f.attack)}</td>"
        + "".join(cell(own[name], name, form) for name, _, form, _ in shown)
        + "</tr>"
        for f, own in zip(found.found, measured)
    )
    return (
        f"<h2>Reconstruction</h2><table><tr>{head}</tr>{body}</table><p><small>The nearest of "
        f"{found.identification.candidates:,} candidates (a guess: "
        f"{1 / found.identification.candidates:.2%}). RDLV: SSIM gained over the mean color, "
        "relative to it; AVD: distance of the pixels' differences, 0 for the image itself. In bold "
        "the best by each. A judge "
        "is a trained network that had no part in the update (<code>--judge</code>).</small>"
    )


def _pictures(found: Audit) -> str:
    """The images and what each attack made of them, in rows."""
    rows = [("the client's images", found.truth)]
    rows += [(f"{f.attack}: {f.psnr:.1f} dB", f.images) for f in found.found]
    if found.ceiling is not None and found.ceiling.solved:
        spread = found.ceiling.spread
        title = f"how far each pixel stays unknown (white: {spread.max():.2f})"
        rows.append((title, spread / max(float(spread.max()), 1e-9)))
    figures = [
        f"<figure>{''.join(_image(x) for x in images[:SHOWN])}"
        f"<figcaption>{escape(title)}</figcaption></figure>"
        for title, images in rows
    ]
    return "<h2>Images</h2>" + "".join(figures)


def _image(pixels: np.ndarray) -> str:
    values = np.clip(np.round(np.asarray(pixels) * 255), 0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(values.squeeze()).save(content, "png")
    text = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="" src="data:image/png;base64,{text}">'
