"""Writes run folders with made-up trials, so that the report is tested without an attack."""

import itertools
from pathlib import Path

import numpy as np

from jaxinv import defenses
from jaxinv.runs import results
from jaxinv.runs.results import COLUMNS
from jaxinv.settings import schema

SESSION = {
    "started": "2026-01-05T10:00:00+00:00",
    "command": "python -m jaxinv.sweep --seeds 32",
    "versions": {"jaxinv": "0.1.0", "jax": "0.10.2", "numpy": "2.4.0"},
    "device": "cpu, 2 cores",
}
DEFAULTS = schema.Cell(dataset="cifar10", model="convnet", width=16, tv=1e-3).model_dump()


def write_run(
    folder,
    *,
    axes=None,
    around_first=False,
    targets=2,
    seeds=4,
    draws=1,
    images=1,
    failed=(),
    exact=(),
    missing_cells=(),
    photographs=None,
    steps=(0, 100, 250, 500),
    block_targets=8,
    seed_std=None,
    level=None,
    facts=None,
):
    """Writes a run folder and returns it; `failed` and `exact` hold (cell, target, seed) triples.

    Args:
      axes: settings that vary, as in run.json.
      around_first: one axis after another around the first cell, instead of their product.
      photographs: [target, image, height, width, channel] uint8; gradients when None.
      draws: of the noise, in the cells whose defense is random; others have one.
      facts: further columns, by cell.
      seed_std: spread between seeds in dB by cell, level: mean PSNR in dB by cell.
    """
    axes = {} if axes is None else axes
    folder = Path(folder)
    cells = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    if around_first:
        cells = [c for c in cells if sum(c[name] != cells[0][name] for name in axes) <= 1]
    truths = _gradients(targets, images) if photographs is None else photographs
    seed_std = 0.2 * 2.5 ** np.arange(len(cells)) if seed_std is None else seed_std
    level = 18 + 2 * np.sin(np.arange(len(cells))) if level is None else level
    target_ids = [int(7 + 4 * i) for i in range(targets)]
    results.write_config(
        folder,
        {
            "name": "default",
            "study": {
                "question": "How much do the seeds of one attack differ?",
                "cost": "2 minutes on 2 cores",
                "expectation": "seeds differ more where the prior is weak",
            },
            "command": SESSION["command"],
            "axes": axes,
            "cells": [DEFAULTS | {"images": images} | settings for settings in cells],
            "target_ids": target_ids,
            "seeds": list(range(seeds)),
            "noise_seeds": list(range(draws)),
            "sessions": [SESSION],
        },
    )
    for cell, settings in enumerate(cells):
        if cell in missing_cells:
            continue
        for first in range(0, targets, block_targets):
            group = list(range(first, min(targets, first + block_targets)))
            own = settings | (facts or {}).get(cell, {})
            random = defenses.is_random(defenses.parse(settings.get("defense", "none")))
            block = _Block(cell, own, group, target_ids, seeds, images, truths, steps)
            block.draws = draws if random else 1
            block.make(seed_std[cell], level[cell], set(failed), set(exact))
            block.write(folder)
    return folder


def write_extras(folder, cell=0):
    """Writes beside a cell's trials what a second-order attack and a polish say of each target."""
    random = np.random.default_rng(0)
    for number, path in enumerate(sorted((folder / "images").glob(f"c{cell:04d}-*.npz"))):
        truths = np.load(path)["truths"] / 255
        std = random.uniform(0.05, 0.2, truths.shape)
        (folder / "extras").mkdir(exist_ok=True)
        spectrum = {}  # of the first targets alone
        if number == 0:
            spectrum = {
                "values": np.geomspace(1, 1e-6, 20) * np.ones((len(truths), 1)),
                "directions": random.normal(size=(len(truths), 2, *truths.shape[1:])),
            }
        np.savez(
            folder / "extras" / path.name,
            **spectrum,
            best=truths + std * random.normal(size=truths.shape),
            std=std,
            frames=np.stack([255 - 255 * truths, 255 * truths], axis=1).astype(np.uint8),
            frame_steps=np.tile([0, 7], (len(truths), 1)),
        )


def _gradients(targets, images):
    """Smooth color ramps, one direction and tint per image."""
    y, x = np.mgrid[0:16, 0:16] / 15
    angle = np.linspace(0, 5, targets * images)[:, None, None]
    ramp = (np.cos(angle) * x + np.sin(angle) * y + 1.5) / 3
    pixels = np.stack([ramp, 1 - ramp, 0.3 + 0.4 * ramp], axis=-1)
    return (255 * pixels).round().astype(np.uint8).reshape(targets, images, 16, 16, 3)


class _Block:
    """The trials of one cell on a group of targets."""

    draws = 1

    def __init__(self, cell, settings, group, target_ids, seeds, images, truths, steps):
        self.cell, self.settings, self.group, self.steps = cell, settings, group, steps
        self.target_ids, self.seeds, self.images = target_ids, seeds, images
        self.truths = truths[group]

    def make(self, seed_std, level, failed, exact):
        random = np.random.default_rng([self.cell, self.group[0]])
        trials, traces, pictures = [], [], []
        for row, target in enumerate(self.group):
            offset = 2 * np.random.default_rng([99, target]).normal()
            bend = random.normal(size=self.draws) if self.draws > 1 else [0.0]
            for draw, seed in itertools.product(range(self.draws), range(self.seeds)):
                place = (self.cell, target, seed)
                psnr = level + offset + bend[draw] + seed_std * random.normal()
                psnr = np.inf if place in exact else np.nan if place in failed else psnr
                names = {"target_id": self.target_ids[target], "noise_seed": draw, "seed": seed}
                trials.append(self._trial(target, psnr, self.truths[row], random) | names)
                trace = self._trace(psnr, trials[-1]["objective"], random)
                traces += [names | point for point in trace]
                pictures.append(_degrade(self.truths[row], psnr, random))
        self.trials, self.traces = trials, traces
        self.pictures = np.reshape(
            pictures, (len(self.group) * self.draws, self.seeds, *self.truths.shape[1:])
        ).astype(np.uint8)

    def _trial(self, target, psnr, truth, random):
        pixels = truth / 255
        flat = np.mean((pixels - 0.47) ** 2, axis=(1, 2, 3))
        bad = np.isnan(psnr)
        return dict.fromkeys(results.TRIALS.names) | {  # what is not named here is null
            "schema_version": results.SCHEMA_VERSION,
            "cell": self.cell,
            "image_ids": [self.target_ids[target] + i for i in range(self.images)],
            "status": "nonfinite" if bad else "ok",
            "psnr": psnr,
            "psnr_best": psnr,
            "psnr_images": [psnr] * self.images,
            "ssim": np.nan if bad else min(1.0, max(0.0, (min(psnr, 40) - 8) / 25)),
            "mse": 10 ** (-psnr / 10),
            "named_by_pixels": np.nan if bad else float(psnr > 17),
            "named_by_judge": np.nan if bad else float(psnr > 16),
            "same_class": np.nan if bad else float(psnr > 15),
            "rdlv": np.nan if bad else min(psnr, 40) / 10 - 1,
            "avd": np.nan if bad else 1 / max(psnr, 1),
            "capacity": 1.9,
            "judge_digest": "1" * 64,
            "candidates": 1000,
            "objective": np.nan if bad else 10 ** (-min(psnr, 60) / 14 + 0.08 * random.normal()),
            "prior": np.nan if bad else 0.05,
            "label_accuracy": 1.0,
            "baseline_psnr": float(np.mean(-10 * np.log10(flat))),
            "baseline_ssim": 0.05,
            "baseline_mse": float(np.mean(flat)),
            "update_cosine": 0.8,
            "update_error": 0.5,
            "victim_digest": "0" * 64,
            "targets_at_once": 1,
            "seeds_at_once": 8,
            "devices": 2,
            "program_bytes": 2**24,
            **{COLUMNS.get(k, k): v for k, v in (DEFAULTS | self.settings).items()},
            "images": self.images,
        }

    def _trace(self, psnr, objective, random):
        last = max(self.steps) or 1  # a closed form has none
        speed = 3 + random.random()
        for step in self.steps:
            share = (1 - np.exp(-speed * step / last)) / (1 - np.exp(-speed))
            value = psnr if step == max(self.steps) else 8 + (min(psnr, 60) - 8) * share
            yield {
                "schema_version": results.SCHEMA_VERSION,
                "cell": self.cell,
                "step": step,
                "psnr": value,
                "objective": objective + 0.5 * (1 - share),
            }

    def write(self, folder):
        results.write_block(
            folder,
            results.block_name(self.cell, self.group[0]),
            _columns(self.trials),
            _columns(self.traces),
            results.BlockImages(
                np.repeat([self.target_ids[t] for t in self.group], self.draws),
                np.arange(self.seeds),
                self.pictures,
                np.repeat(self.truths, self.draws, axis=0),
            ),
        )


def _columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def _degrade(truth, psnr, random):
    """Adds smooth noise of the PSNR asked for, so that pictures look as bad as their number."""
    if np.isnan(psnr):
        return np.zeros_like(truth)
    noise = random.normal(size=truth.shape)
    noise = noise + np.roll(noise, 1, axis=1) + np.roll(noise, 1, axis=2)
    noise *= 10 ** (-psnr / 20) / noise.std()
    return np.clip(truth + 255 * noise, 0, 255).round().astype(np.uint8)
