"""`python -m jaxinv.search`: try hundreds of settings of one attack at once, and keep the best.

    python -m jaxinv.search --space tv=1e-5:1e-1 lr=0.01:1 --candidates 64 --seeds 2

Every candidate attacks the same images from the same seeds, all in one batch. Successive halving:
each rung has a quarter of the candidates of the one before it and four times the iterations, the
last one the iterations asked for. The images are of the *training* split, which the attacker may
know, so that what was found can be measured on others. A rung is written when it is done and not
computed again.

References: Jamieson & Talwalkar 2016, arXiv 1502.07943 (successive halving).
"""

import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tomli_w
from rich.console import Console
from rich.table import Table
from scipy.stats import qmc

from jaxinv import files
from jaxinv.attacks import unused_settings
from jaxinv.engine import cells, planner, trials
from jaxinv.engine.snapshots import Snapshots
from jaxinv.engine.targets import seed_keys
from jaxinv.errors import UserError, run_command
from jaxinv.machine import runtime
from jaxinv.settings import flags, reader, requests, schema

ETA = 4  # candidates fall, and iterations rise, by this factor from rung to rung


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""

    def command():
        parser = flags.FlagParser("python -m jaxinv.search", __doc__.split("\n")[0])
        flags.add_search(parser)
        words = shlex.join(sys.argv[1:] if argv is None else argv)
        run(reader.load_search(vars(parser.parse_args(argv))), f"python -m jaxinv.search {words}")

    return run_command(command)


def draw(search: requests.Search) -> dict[str, np.ndarray]:
    """Draws the candidates, evenly in the logarithm: name of a setting -> its values."""
    dimensions = len(search.space)
    if search.draw == "sobol":
        sampler = qmc.Sobol(dimensions, rng=np.random.default_rng(search.seed))
        # A power of two is what keeps the sequence balanced.
        unit = sampler.random_base2(math.ceil(math.log2(search.candidates)))[: search.candidates]
    else:
        unit = np.random.default_rng(search.seed).random((search.candidates, dimensions))
    low, high = (np.log([r[i] for r in search.space.values()]) for i in (0, 1))
    return dict(zip(search.space, np.exp(low + unit * (high - low)).T))


def rungs(candidates: int, rungs: int, iterations: int) -> list[tuple[int, int]]:
    """Lists the (candidates, iterations) of each rung; a rung has one candidate at least."""
    return [
        (max(1, candidates // ETA**r), max(1, round(iterations / ETA ** (rungs - 1 - r))))
        for r in range(rungs)
    ]


def run(study: requests.SearchStudy, command: str) -> None:
    """Runs the rungs that are not done, then writes the table and the sweep file of the winner.

    Raises:
      UserError: data or shapes do not fit, or the folder holds another search.
    """
    console, search, folder = Console(markup=False), study.search, study.folder
    runtime.set_up_compiler()
    runtime.use_all_cores()
    runtime.check_precision(study.cell.precision)
    inputs = cells.Loader(study.plan, split="train")(study.cell)
    asked = {
        "search": search.model_dump(),
        "cell": study.cell.model_dump(),
        "target_ids": inputs.ids.tolist(),
        "seeds": study.plan.seeds,
        "checkpoints": cells.checkpoint_digests([study.cell]),
    }
    values, rows = draw(search), []
    alive = np.arange(search.candidates)
    for rung, (count, iterations) in enumerate(
        rungs(search.candidates, search.rungs, study.cell.iterations)
    ):
        alive = alive[:count]
        path = folder / f"rung{rung}.json"
        measured = _read(path, asked)
        if measured is None:
            console.print(f"rung {rung}: {count} candidates, {iterations} iterations")
            numbers = {name: values[name][alive] for name in values}
            snapshots = Snapshots(folder, path.stem, json.dumps(asked))
            with files.locked(folder):
                measured = measure(study, inputs, numbers, iterations, console, snapshots)
            text = json.dumps({"asked": asked, "measured": measured})
            files.write_file(path, lambda f, text=text: f.write(text.encode()))
            snapshots.clear()
        score = np.asarray(measured[search.criterion], np.float64)
        score = np.where(np.isnan(score), np.inf, -score if search.criterion == "psnr" else score)
        order = np.argsort(score, kind="stable")
        for place, i in enumerate(order):
            rows.append(
                {
                    "rung": rung,
                    "place": place,
                    "candidate": int(alive[i]),
                    **{name: float(values[name][alive[i]]) for name in values},
                    "iterations": iterations,
                    "chosen_by": search.criterion,
                    **{name: column[i] for name, column in measured.items()},
                }
            )
        alive = alive[order]
    if np.isposinf(score[order[0]]):
        raise UserError("--space: no candidate of the last rung stayed finite; take smaller --lr")
    _write(study, rows, command)
    console.print(_table(rows, list(values)))
    console.print(f"winner: python -m jaxinv.sweep {folder / 'best.toml'}", soft_wrap=True)


def measure(
    study: requests.SearchStudy,
    inputs: cells.CellInputs,
    numbers: dict[str, np.ndarray],
    iterations: int,
    console: Console,
    snapshots: Snapshots | None = None,
) -> dict[str, list[float]]:
    """Attacks every target with every candidate from every seed, all in one batch.

    Args:
      study: what is fixed.
      inputs: the victim and the images.
      numbers: of the candidates, [candidate] each.
      iterations: of this rung.
      console: for the plan.
      snapshots: of the rung, while it lasts.

    Returns:
      Columns by candidate: means of objective, PSNR and SSIM over targets and seeds, NaN where a
      trial failed; the mean color's PSNR; the number of failures.
    """
    cell = study.cell.model_copy(update={"posterior": 0})  # a rung shows no error bars
    seeds = range(study.plan.seeds)
    count = len(next(iter(numbers.values())))
    # Along the axis of seeds: candidate by candidate, each with the same seeds.
    of_seeds = {name: np.repeat(of, len(seeds)) for name, of in numbers.items()}
    if "assumed_lr" in of_seeds:
        of_seeds["client_lr"] = of_seeds["assumed_lr"]  # of the client that is simulated
    each = {**cell.numbers(), "iterations": iterations, **of_seeds}
    keys = jnp.tile(seed_keys(inputs.ids[:, 0], seeds), (1, count))
    result, baseline, *_ = cells.attack_cell(
        cell,
        inputs,
        keys,
        each,
        trials.Resources(
            memory=planner.memory_limit(study.plan.memory),
            announce=lambda plan: console.print(f"plan: {plan}", soft_wrap=True),
            snapshots=snapshots,
        ),
    )

    def by_candidate(x):
        return np.asarray(x, np.float64).reshape(-1, count, len(seeds))

    failed = ~by_candidate(result.finite).astype(bool)

    def mean(x):
        return np.where(failed, np.nan, by_candidate(x)).mean(axis=(0, 2)).tolist()

    return {
        "objective": mean(result.objective),
        "psnr": mean(result.scores.psnr),
        "ssim": mean(result.scores.ssim),
        "baseline_psnr": [float(np.mean(baseline.psnr))] * count,
        "failed": failed.sum(axis=(0, 2)).tolist(),
    }


def _read(path: Path, asked: dict[str, Any]) -> dict[str, list[float]] | None:
    """Reads a rung that is done; None where there is none."""
    try:
        there = files.read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another --out") from None
    if not isinstance(there, dict) or not {"asked", "measured"} <= set(there):
        raise UserError(f"{path} is no rung of a search; choose another --out")
    if there["asked"] != json.loads(json.dumps(asked)):
        raise UserError(f"--out {path.parent}: holds another search; choose another --out")
    return there["measured"]


def _write(study: requests.SearchStudy, rows: list[dict[str, Any]], command: str) -> None:
    """Writes all candidates, and the winner as a sweep file."""
    files.write_file(study.folder / "candidates.csv", lambda f: f.write(files.csv_bytes(rows)))
    last = max(row["rung"] for row in rows)
    best = next(row for row in rows if row["rung"] == last)
    settings = study.cell.model_dump(exclude_none=True)
    unused = unused_settings(study.cell.attack)
    settings = {name: value for name, value in settings.items() if name not in unused}
    if study.cell.victim is not None:
        settings = {k: v for k, v in settings.items() if k not in schema.OF_VICTIM}
    settings |= {name: best[name] for name in study.search.space}
    words = (
        f"Chosen by {best['chosen_by']} on the training split among {study.search.candidates} "
        f"candidates: {command}"
    )
    plan = study.plan.model_dump(
        include={"targets", "seeds", "data_dir", "memory"}, exclude_none=True
    )
    best = {
        "question": "How good are the settings that a search found, on other images?",
        "cost": "",
        "expectation": words.encode(errors="replace").decode(),  # a command may be no Unicode
        "run": plan,
        "grid": settings,
    }
    files.write_file(study.folder / "best.toml", lambda f: tomli_w.dump(best, f))


def _table(rows: list[dict[str, Any]], names: list[str]) -> Table:
    """The three best of each rung."""
    columns = ["rung", "candidate", *names, "iterations", "objective", "psnr", "failed"]
    table = Table(
        *("no." if c == "candidate" else "steps" if c == "iterations" else c for c in columns),
        title=f"chosen by {rows[0]['chosen_by']}; images of the training split, whose mean color "
        f"scores {rows[0]['baseline_psnr']:.2f} dB",
    )
    for row in rows:
        if row["place"] < 3:
            table.add_row(
                *(f"{v:.3g}" if isinstance(v := row[name], float) else str(v) for name in columns)
            )
    return table


if __name__ == "__main__":
    sys.exit(main())
