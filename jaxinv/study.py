"""`python -m jaxinv.study`: run or resume many sweeps, and show what they found on one page.

    python -m jaxinv.study                                     all sweeps that come along
    python -m jaxinv.study noise.toml batches.toml --seeds 2   these, with some settings replaced

Every sweep is a run folder of its own. One that is finished is not run again; after a kill the same
command goes on where the last one stopped. The page is written anew after each sweep.
"""

import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxinv import data, files, sweep
from jaxinv.engine.cells import Loader, checkpoint_digests
from jaxinv.engine.likeness import judge_digest
from jaxinv.errors import UserError, run_command
from jaxinv.report import SUCCESS_PSNR
from jaxinv.reporting import gallery
from jaxinv.reporting.study import StudySummary, summarize
from jaxinv.runs.results import read_config, read_run
from jaxinv.settings import flags, reader, schema

DEFAULT_OUT = "runs/study"
SECONDS = "seconds.json"  # that each sweep has taken, over all sessions


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""

    def command():
        parser = flags.FlagParser("python -m jaxinv.study", __doc__)
        parser.add_argument(
            "sweeps",
            nargs="*",
            type=Path,
            metavar="STUDY",
            help="Sweep files, or names of those in sweeps/ (default: all of these).",
        )
        parser.add_argument(
            "--preset", metavar="NAME", help="Use the version of this name where a file has one."
        )
        flags.add_study(parser)
        flags.add_workers(parser)
        arguments = vars(parser.parse_args(argv))
        studies = load(arguments)
        words = shlex.join(sys.argv[1:] if argv is None else argv)
        run(studies, f"python -m jaxinv.study {words}".strip(), reader.load_workers(arguments))

    return run_command(command)


def load(arguments: Mapping[str, Any]) -> list[schema.Study]:
    """Validates all sweeps before the first is run.

    Args:
      arguments: `sweeps`, `preset`, and settings by name, which replace those of every file.

    Raises:
      UserError: one line that names the sweep, the setting and the fix.
    """
    paths = arguments["sweeps"] or sorted(reader.SWEEPS.glob("*.toml"))
    root = Path(arguments["out"] or DEFAULT_OUT)
    names = [path.stem for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name}: is named twice; its run folder would be one and the same")
    presets = [reader.presets_of(path) for path in paths]
    if arguments["preset"] and not any(arguments["preset"] in known for known in presets):
        raise UserError(f"--preset {arguments['preset']}: none of these sweeps has it")
    studies = []
    for path, known in zip(paths, presets):
        preset = arguments["preset"] if arguments["preset"] in known else None
        asked = {**arguments, "out": str(root / reader.name_of(path, preset))}
        try:
            studies.append(reader.load_study(path, asked, preset))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return studies


def run(studies: Sequence[schema.Study], command: str, workers: schema.Workers) -> None:
    """Runs what is not done of each sweep, and writes the page after each.

    Raises:
      UserError: a sweep cannot be run; those before it stand.
    """
    console, root = Console(), studies[0].folder.parent
    spent = _read_seconds(root)
    shown: list[StudySummary] = []
    for number, study in enumerate(studies, 1):
        console.rule(f"{study.name}, {number} of {len(studies)}")
        found = finished(study)
        if found is None:
            start = time.monotonic()
            try:
                sweep.run_study(study, command, workers)
            finally:
                took = time.monotonic() - start
                if study.folder.is_dir():
                    spent[study.name] = spent.get(study.name, 0.0) + took
                    _write(root / SECONDS, json.dumps(spent, indent=1))
            found = summarize(read_run(study.folder), SUCCESS_PSNR)
        shown.append(found)
        _write(
            root / "index.html", gallery.render(shown, [spent.get(s.name, 0.0) for s in studies])
        )
    console.print(f"{root / 'index.html'}: {len(shown)} of {len(studies)} sweeps")


def finished(study: schema.Study) -> StudySummary | None:
    """What a run folder holds, where that and its report are all that the sweep asks for."""
    config = read_config(study.folder)
    if config is None or not (study.folder / "report.html").is_file():
        return None
    judge, networks = judge_digest(study.plan.judge), checkpoint_digests(study.cells)
    same = (
        config["cells"] == [cell.model_dump() for cell in study.cells]
        and config["seeds"] == list(range(study.plan.seeds))
        and config["noise_seeds"] == list(range(study.plan.noise_seeds))
        and config.get("checkpoints", networks) == networks
        and config.get("judge", judge) == judge
        and config.get("lpips", study.plan.lpips) == study.plan.lpips
        and study.plan.target_ids is None
        and len(config["target_ids"]) == study.plan.targets
        and _same_pictures(study, config.get("targets"))
    )
    if not same:  # the sweep says what does not fit
        return None
    found = summarize(read_run(study.folder), SUCCESS_PSNR)
    return found if found.finished_trials == found.planned_trials else None


def _same_pictures(study: schema.Study, there: Sequence[Mapping[str, Any]] | None) -> bool:
    """Whether the data sets of one's own still hold what a run attacked; an older one said less."""
    own = [i for i, cell in enumerate(study.cells) if data.is_own(cell.dataset)]
    if there is None or not own:
        return True
    cells, load = [study.cells[i] for i in own], Loader(study.plan)
    now = sweep.targets_of(cells, [load.targets(cell) for cell in cells])
    return [there[i] for i in own] == now


def _read_seconds(root: Path) -> dict[str, float]:
    """What earlier sessions took; nothing where that is not known."""
    try:
        return {str(k): float(v) for k, v in json.loads((root / SECONDS).read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(path: Path, text: str) -> None:
    files.write_file(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    sys.exit(main())
